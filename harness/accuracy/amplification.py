"""What the K norm's weights do to an error in K, and what attention sees of it.

With r = sqrt(mean(k^2) + eps), n = k / r and y = w * n, an error e in k becomes, to first order,

    dy = (1 / r) diag(w) (I - n n^T / d) e

so an error in channel j is multiplied by |w_j| / r, its absolute gain; relative to y_j the weight cancels.
Logits q.k / sqrt(d), or times the model's own scale, inherit the absolute error; softmax sees absolute differences
of logits.
Attention here is causal and without position encoding, from the plan's q and k, in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from castpoint.harness.accuracy.errors import error_stats
from castpoint.variants.problem import Problem
from castpoint.variants.spec import Chain


def k_before(problem: Problem, chain: Chain) -> Tensor:
    """K before its head norm, [T, Hkv, Dh] float64."""
    return problem.split_heads(chain.proj)[1]


def amplification(problem: Problem, chain: Chain, truth: Chain) -> dict[str, float]:
    """The measured columns of amplification.csv for a plan's chain against the truth. Needs a head norm and T >= 1."""
    before = error_stats(actual=k_before(problem, chain), reference=k_before(problem, truth))
    after = error_stats(actual=chain.k, reference=truth.k)
    predicted, measured = channel_gains(problem, chain, truth)
    logits, true_logits = (attention_logits(side.q, side.k, problem.logit_scale) for side in (chain, truth))
    causal = true_logits.isfinite()
    error = (logits - true_logits)[causal]
    weights, true_weights = logits.softmax(-1), true_logits.softmax(-1)
    variation = (weights - true_weights).abs().sum(-1) / 2
    return {
        "k_norm_max": applied(problem, problem.k_norm_weight).abs().max().item(),
        "gain_predicted_max": predicted.max().item(),
        "gain_measured_max": measured.max().item(),
        "k_max_abs_before": before.max_abs,
        "k_max_abs_after": after.max_abs,
        "k_rel_rms_before": before.rel_rms,
        "k_rel_rms_after": after.rel_rms,
        "logit_rms_error": error.square().mean().sqrt().item(),
        "logit_max_error": error.abs().max().item(),
        "softmax_tv_mean": variation.mean().item(),
        "softmax_tv_max": variation.max().item(),
        "top_key_flips": (logits.argmax(-1) != true_logits.argmax(-1)).double().mean().item(),
    }


def channel_gains(problem: Problem, chain: Chain, truth: Chain) -> tuple[Tensor, Tensor]:
    """Predicted and measured gain of the K norm, each [Dh].

    Predicted: rms of |w_j| / r over tokens and heads, weighted by the error that arrives there. Measured: the
    plan's K before the norm and the true one are both put through the norm in float64, so that no later rounding
    is mixed in; rms of the difference behind over rms of the difference before. Channels without an error give 0.
    """
    k, true_k = k_before(problem, chain), k_before(problem, truth)
    error = k - true_k
    weight = applied(problem, problem.k_norm_weight)
    true_rstd = (true_k.square().mean(-1, keepdim=True) + problem.eps).rsqrt()
    arriving = error.square().mean((0, 1)).sqrt()
    predicted = (error * true_rstd).square().mean((0, 1)).sqrt() * weight.abs() / arriving
    rstd = (k.square().mean(-1, keepdim=True) + problem.eps).rsqrt()
    behind = ((k * rstd - true_k * true_rstd) * weight).square().mean((0, 1)).sqrt()
    return predicted.nan_to_num(), (behind / arriving).nan_to_num()


def attention_logits(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """q.k times scale (None: Dh^-1/2), [Hq, T, T] float64, -inf above the diagonal; q [T, Hq, Dh], k [T, Hkv, Dh]."""
    k = k.to(torch.float64).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = torch.einsum("qhd,khd->hqk", q.to(torch.float64), k)
    logits = logits / math.sqrt(q.shape[-1]) if scale is None else logits * scale
    return logits.masked_fill(torch.ones_like(logits[0], dtype=torch.bool).triu(1), -math.inf)


def applied(problem: Problem, weight: Tensor) -> Tensor:
    """The factor that a norm weight of that problem stands for, float64."""
    return weight.to(torch.float64) + (1.0 if problem.weight_offset else 0.0)
