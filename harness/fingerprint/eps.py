"""What a norm does with eps, where that is all that no rule explains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from castpoint.harness.fingerprint.evidence import UNEXPLAINED, Call, mean_shares
from castpoint.harness.fingerprint.rules import Rule, mean_of_squares, predict, round_to
from castpoint.kernels.plan import KEEP

CONSTANTS = (1e-6, 1e-5, 1e-8, 1e-12, 2.0**-23, 1e-3)
Root = Callable[[Tensor, float], Tensor]  # of the mean, float64, and eps: 1 / rstd


def other_eps(rules: Sequence[Rule], calls: Sequence[Call]) -> str:
    """In words: it ignores eps, adds a constant, or adds it elsewhere. Empty where none of these explains the calls."""
    rule = max(mean_shares(rules, calls[:1]).items(), key=lambda item: item[1])[0].replace(eps="float32")
    shares = {said: min(_share(rule, root, call) for call in calls) for said, root in _roots(calls[0].rows.width)}
    said = max(shares, key=lambda said: shares[said])
    return f"all is explained if {said}" if shares[said] >= 1 - UNEXPLAINED else ""


def _roots(width: int) -> Iterator[tuple[str, Root]]:
    yield "eps is not used", lambda mean, eps: mean.sqrt()
    for value in CONSTANTS:
        yield f"it adds {value:g} whatever eps is", lambda mean, eps, value=value: (mean + value).sqrt()
    yield "eps is added to the root, not under it", lambda mean, eps: mean.sqrt() + eps
    yield "eps is the least variance, max(variance, eps)", lambda mean, eps: mean.clamp(min=eps).sqrt()
    yield "eps is the least root, max(sqrt(variance), eps)", lambda mean, eps: mean.sqrt().clamp(min=eps)
    yield "eps is added to the sum of squares, not to its mean", lambda mean, eps: (mean + eps / width).sqrt()
    yield "eps is squared", lambda mean, eps: (mean + eps * eps).sqrt()


def _share(rule: Rule, root: Root, call: Call) -> float:
    rows = dataclasses.replace(call.rows)  # what it remembers is of another root
    under = root(mean_of_squares(rule, rows), rows.eps).float()
    factor = round_to(under if rule.root == "sqrt" else 1 / under, rule.rstd)
    near = (predict(rule, rows, factor) - call.stored).abs() <= call.stored.abs() * 2.0**-20 * (rule.out == KEEP)
    return near[rows.nonzero].double().mean().item()
