"""What a layer's K-norm weights do, and which of them: the layer with its own, and with others in their place.

A logit's error is a sum over channels, c_j = (q_j k_j - q*_j k*_j) / sqrt(d), of the plan's q and k and the true ones.
With q_j = wq_j nq_j and k_j = wk_j nk_j (n: behind the head norm, of mean square 1), and with relative, independent
roundings, c_j has a mean square proportional to wq_j^2 wk_j^2. So K-norm weights multiply the logits' rms error by

    gain = sqrt(sum_j wq_j^2 wk_j^2 / sum_j wq_j^2)

against weights of 1: by the rms of K's weights, each counted as the square of q's weight at its channel. The logits
themselves are sums of q_j k_j / sqrt(d), and are multiplied alike: to first order their relative error stays.
In real models channels do not carry alike: there the true products' squares predict it (Parts.terms).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from castpoint.harness.accuracy.amplification import amplification, applied, attention_logits
from castpoint.harness.accuracy.errors import error_stats
from castpoint.harness.runs.errors import reason_of
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import KNormRow
from castpoint.harness.runs.words import KNorms, Status
from castpoint.variants.catalogue import plan_named
from castpoint.variants.eager import eager_plan
from castpoint.variants.problem import Problem
from castpoint.variants.spec import Chain, spec, truth

# Of eight significant bits, as many as bf16 has: a product with it is rounded like one with any other weight. A product
# with a power of two is exact, so that weights of 1 or 64 take a rounding of K away.
NEAR_1 = 129 / 128


def arms(problem: Problem) -> Iterator[tuple[KNorms, KNorms, Problem]]:
    """What q's and K's norm weights are, and the problem with these; its own first. The largest is that of |w|, as it
    is applied."""
    for q_norm in (KNorms.OWN, KNorms.NEAR_1):
        for k_norm in KNorms if q_norm == KNorms.OWN else (KNorms.OWN, KNorms.NEAR_1):
            weights = {"q_norm_weight": problem.q_norm_weight, "k_norm_weight": _k_norm(problem, k_norm)}
            if q_norm == KNorms.NEAR_1:
                weights["q_norm_weight"] = _stored(problem, torch.full_like(problem.q_norm_weight, NEAR_1))
            yield q_norm, k_norm, problem.replace(**weights)


def largest(problem: Problem) -> int:
    """The channel of the largest K-norm weight."""
    return int(applied(problem, problem.k_norm_weight).abs().argmax())


def _k_norm(problem: Problem, which: KNorms) -> Tensor:
    """[Dh] bf16, as that problem stores them."""
    own, at = problem.k_norm_weight, largest(problem)
    near_1 = _stored(problem, torch.full_like(own, NEAR_1))
    there = torch.arange(len(own), device=own.device) == at
    return {
        KNorms.OWN: own,
        KNorms.NEAR_1: near_1,
        KNorms.ALL_LARGEST: own[at].expand_as(own),
        KNorms.LARGEST_ALONE: torch.where(there, own, near_1),
        KNorms.WITHOUT_LARGEST: torch.where(there, near_1, own),
    }[which]


def _stored(problem: Problem, weight: Tensor) -> Tensor:
    return weight - 1 if problem.weight_offset else weight


def add_k_norms(records: Records, problem: Problem, sample: int) -> None:
    """Rows of all arms of a problem with head norms that these records do not have yet, of eager's plan.

    sample: the seed of a drawn problem, the number of a text."""
    at, plan = largest(problem), eager_plan(problem)
    key = {"model": problem.model, "weights": problem.weights, "layer": problem.layer, "tokens": problem.tokens}
    for q_norm, k_norm, arm in arms(problem):
        row = {**key, "sample": sample, "plan": plan, "q_norm": q_norm, "k_norm": k_norm}
        if records.has(KNormRow, **row):
            continue
        try:
            measured = measures(arm, spec(plan_named(plan), arm), truth(arm), at)
        except Exception as error:  # a row, and on
            records.add(KNormRow(**row, status=Status.FAILED, reason=reason_of(error)))
            continue
        records.add(KNormRow(**row, **measured))


def measures(problem: Problem, chain: Chain, exact: Chain, channel: int) -> dict[str, Any]:
    """The measured columns of k_norms.csv for a plan's chain against the truth. channel: whose part of the logits'
    squared error is taken. Softmax sees neither a query's mean logit nor its error: logit_rel_error is without both."""
    q_weight, k_weight = (applied(problem, w) for w in (problem.q_norm_weight, problem.k_norm_weight))
    k = error_stats(actual=chain.k, reference=exact.k)
    found = amplification(problem, chain, exact)
    logits, true_logits = (attention_logits(side.q, side.k, problem.logit_scale) for side in (chain, exact))
    parts = channel_parts(chain, exact, problem.logit_scale)
    return {
        "channel": channel,
        "k_norm_there": k_weight[channel].item(),
        "q_norm_there": (q_weight[channel] / q_weight.square().mean().sqrt()).item(),
        "weights_rank": _rank_correlation(q_weight, k_weight),
        "gain_predicted": ((q_weight * k_weight).square().sum() / q_weight.square().sum()).sqrt().item(),
        "logit_terms": parts.terms,
        "channel_share": parts.shares[channel].item(),
        "cross_share": 1 - parts.squares.sum().item(),
        "k_max_abs": k.max_abs,
        "k_rel_rms": k.rel_rms,
        "k_p99_ulp": k.p99_ulp,
        "k_share_equal": k.share_equal,
        "logit_rms_error": found["logit_rms_error"],
        "logit_rel_error": (_spread(logits - true_logits) / _spread(true_logits)).item(),
        "softmax_tv_mean": found["softmax_tv_mean"],
        "top_key_flips": found["top_key_flips"],
    }


def _rank_correlation(a: Tensor, b: Tensor) -> float | None:
    """Of |a| and |b|, [Dh]; None where either is all the same."""
    a, b = (
        (x.abs()[:, None] > x.abs()).double().sum(1) + (x.abs()[:, None] >= x.abs()).double().sum(1) for x in (a, b)
    )
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item() if a.std() and b.std() else None


def _spread(logits: Tensor) -> Tensor:
    """Rms of causal logits [H, T, T] around their mean over the keys that a query sees."""
    seen = torch.ones_like(logits[0], dtype=torch.bool).tril()
    mean = torch.where(seen, logits, 0.0).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True)
    return (logits - mean)[:, seen].square().mean().sqrt()


@dataclass(frozen=True)
class Parts:
    """Of the squared error of causal logits, by channel: shares and squares [Dh]; and the true logits' terms.

    shares   <c_j sum_i c_i> / <(sum_i c_i)^2>: a channel's square, and half of its cross terms; they sum to 1
    squares  <c_j^2> / <(sum_i c_i)^2>: they sum to 1 less all cross terms
    terms    root of <sum_j (q*_j k*_j)^2 / d>, with the model's scale for d^-1/2 where it has one: independent
             roundings of relative rms e of q and k make of it a logit error of rms sqrt(2) e terms
    """

    shares: Tensor
    squares: Tensor
    terms: float


def channel_parts(chain: Chain, exact: Chain, scale: float | None = None) -> Parts:
    """Parts of a plan's chain against the truth. Without an error shares and squares are NaN."""
    group = exact.q.shape[1] // exact.k.shape[1]
    q, true_q = chain.q.transpose(0, 1), exact.q.transpose(0, 1)  # [Hq, T, Dh]
    k, true_k = (side.k.repeat_interleave(group, 1).transpose(0, 1) for side in (chain, exact))
    dq, dk = q - true_q, k - true_k
    error = (q @ k.mT - true_q @ true_k.mT).tril()
    shares = (dq * (error @ k) + true_q * (error @ dk)).sum((0, 1))
    kk, kd, dd = ((a * b).cumsum(1) for a, b in ((k, k), (k, dk), (dk, dk)))  # over the keys that a query sees
    squares = (dq * dq * kk + 2 * dq * true_q * kd + true_q * true_q * dd).sum((0, 1))
    whole = error.square().sum()
    heads, tokens, channels = q.shape
    terms = (true_q.square() * true_k.square().cumsum(1)).sum() / (heads * tokens * (tokens + 1) / 2)
    terms *= 1 / channels if scale is None else scale**2
    return Parts(shares / whole, squares / whole, terms.sqrt().item())
