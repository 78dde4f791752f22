"""The list that llama.cpp's `llama-perplexity --kl-divergence` prints, in its words, of token-wise differences.

Definitions are those of its tools/perplexity: a standard error is sqrt((<x^2> - <x>^2) / (n - 1)); those of a ratio and
a difference of perplexities take the covariance of both into account; quantiles are interpolated linearly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

QUANTILES = {"99.9%": 0.999, "99.0%": 0.99, "95.0%": 0.95, "90.0%": 0.9, "75.0%": 0.75, "Median": 0.5, "25.0%": 0.25}
QUANTILES |= {"10.0%": 0.1, "5.0%": 0.05, "1.0%": 0.01, "0.1%": 0.001}
OF_P_ALONE = ("75.0%", "25.0%")  # not printed of the KL
CHUNK = 16  # positions at once


@dataclass
class Tokens:
    """A value a token, over all texts: what both models say of the token that follows, KL, same first choice."""

    nll: list[float] = field(default_factory=list)
    base_nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)

    def add(self, logits: Tensor, base: Tensor, ids: list[int]) -> None:
        """Logits [S, V] of both models on one text; the last position has no token behind it."""
        for at in range(0, len(ids) - 1, CHUNK):
            part = slice(at, min(at + CHUNK, len(ids) - 1))
            log_q, log_b = (each[part].float().log_softmax(-1) for each in (logits, base))
            following = torch.tensor(ids[part.start + 1 : part.stop + 1])[:, None]
            self.nll += (-log_q.gather(1, following)[:, 0]).tolist()
            self.base_nll += (-log_b.gather(1, following)[:, 0]).tolist()
            self.kl += (log_b.exp() * (log_b - log_q)).sum(-1).tolist()
            self.same += (log_q.argmax(-1) == log_b.argmax(-1)).tolist()


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    spread = float((values * values).mean() - values.mean() ** 2)
    return float(values.mean()), math.sqrt(max(spread, 0.0) / (len(values) - 1))


def listed(tokens: Tokens) -> dict[str, tuple[float, float | None]]:
    """Statistic -> its value and its standard error, where it has one; two tokens at least. Of dp in percent, KL in
    nats."""
    nll, base, kl = (np.array(each) for each in (tokens.nll, tokens.base_nll, tokens.kl))
    change = np.exp(-nll) - np.exp(-base)
    return {
        **_perplexities(nll, base),
        **_spread("KLD", kl, 1.0, [name for name in QUANTILES if name not in OF_P_ALONE]),
        **_spread("Δp", change, 100.0, list(QUANTILES)),
        "RMS Δp": _rms(change),
        "Same top p": _share(np.array(tokens.same)),
    }


def _perplexities(nll: np.ndarray, base: np.ndarray) -> dict[str, tuple[float, float | None]]:
    (mean, error), (base_mean, base_error) = mean_and_error(nll), mean_and_error(base)
    covariance = float(((nll * base).mean() - mean * base_mean) / (len(nll) - 1))
    ppl, base_ppl, ratio = math.exp(mean), math.exp(base_mean), math.exp(mean - base_mean)
    log_error = math.sqrt(max(error**2 + base_error**2 - 2 * covariance, 0.0))
    difference = (ppl * error) ** 2 + (base_ppl * base_error) ** 2 - 2 * ppl * base_ppl * covariance
    correlation = covariance / (error * base_error) if error * base_error else math.nan
    return {
        "Mean PPL(Q)": (ppl, ppl * error),
        "Mean PPL(base)": (base_ppl, base_ppl * base_error),
        "Cor(ln(PPL(Q)), ln(PPL(base)))": (100 * correlation, None),
        "Mean ln(PPL(Q)/PPL(base))": (mean - base_mean, log_error),
        "Mean PPL(Q)/PPL(base)": (ratio, ratio * log_error),
        "Mean PPL(Q)-PPL(base)": (ppl - base_ppl, math.sqrt(max(difference, 0.0))),
    }


def _spread(what: str, values: np.ndarray, unit: float, quantiles: list[str]) -> dict[str, tuple[float, float | None]]:
    mean, error = mean_and_error(values)
    found: dict[str, tuple[float, float | None]] = {
        f"Mean {what}": (unit * mean, unit * error),
        f"Maximum {what}": (unit * float(values.max()), None),
    }
    for name in quantiles:
        found[f"{name} {what}"] = (unit * float(np.quantile(values, QUANTILES[name])), None)
    return found | {f"Minimum {what}": (unit * float(values.min()), None)}


def _rms(change: np.ndarray) -> tuple[float, float]:
    mean, error = mean_and_error(change**2)
    rms = math.sqrt(mean)
    return 100 * rms, 100 * error / (2 * rms) if rms else 0.0


def _share(same: np.ndarray) -> tuple[float, float]:
    share = float(same.mean())
    return 100 * share, 100 * math.sqrt(share * (1 - share) / (len(same) - 1))
