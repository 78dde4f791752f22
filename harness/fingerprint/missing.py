"""Which word the family lacks, where no rule explains a norm: what else it may do with eps, the mean, the weight, or a
boundary. Tried one by one; none of these is a rule, so that none is ever an answer."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from castpoint.harness.fingerprint.evidence import UNEXPLAINED, Call
from castpoint.harness.fingerprint.rules import Rule, applied_weight, mean_of_squares, predict, source
from castpoint.harness.fingerprint.stores import round_to, storages
from castpoint.kernels.plan import KEEP

CONSTANTS = (1e-6, 1e-5, 1e-8, 1e-12, 2.0**-23, 1e-3)
TYPES = {"fp16-rne": "rounded to fp16", "fp16-rtz": "cut to 11 bits, as tf32 and fp16 have them"}
NEAR = 2.0**-6  # two ulps of bf16: of another formula the roundings are not asked
Root = Callable[[Tensor, float], Tensor]  # of the mean of squares, float64, and eps: 1 / rstd


def missing_word(best: Rule, calls: Sequence[Call], names: dict[str, str]) -> str:
    """What would explain the calls, in words; empty where nothing tried does, or the best rule explains nearly all.
    names: a plan's, of the rule's boundaries."""
    if min(call.share(best) for call in calls) >= 1 - UNEXPLAINED:
        return ""
    near = list(dict.fromkeys([best, *_plain(best)]))
    shares: dict[str, float] = {}
    for said, root in _roots(calls[0].rows.width):
        shares[said] = max(min(_by_root(rule, root, call) for call in calls) for rule in near)
    for name in ("statistics", "variance", "rstd", "normed", "weight_offset", "out"):
        others = [r for r in near if name != "weight_offset" or r.weight_offset != "none"]
        for word, said in TYPES.items():
            each = [rule.replace(**{name: word}) for rule in others]
            explained = [min(call.share(other) for call in calls) for other in each]
            shares[f"{names.get(name, name)} is {said}"] = max(explained, default=0.0)
    if calls[0].rows.readout is None and calls[0].rows.weight.ndim == 1 and calls[0].rows.scales is None:
        for said, formula in list(FORMULAS.items())[: 1 if best.weight == "none" else None]:
            for more, offset in (("", "none"), (", with 1 + w", KEEP)):  # best's is chance where all else is wrong
                rule = best.replace(weight_offset=offset)
                shares[said + more] = min(_by_formula(formula, rule, call) for call in calls)
        for rule in near:
            size = _size(rule, calls[0])
            if abs(size - 1) > NEAR:
                shares[f"the result is {size:.3g} times as large"] = min(_by_size(rule, size, c) for c in calls)
    said = max(shares, key=lambda said: shares[said])
    return f"all is explained if {said}" if shares[said] >= 1 - UNEXPLAINED else ""


def _plain(best: Rule) -> Iterator[Rule]:
    """Rules as most norms are: where another thing is missing the best may be any."""
    kept, *rounded = storages(best.narrow)
    outs = [kept] if best.out == kept else rounded
    for normed, offset, out in itertools.product([kept, *rounded], ("none", kept, rounded[0]), outs):
        if best.scale == "prologue" or normed == kept:
            rule = Rule(x=best.x, normed=normed, weight=best.weight, weight_offset=offset, out=out)
            yield rule.replace(hidden=best.hidden, scale=best.scale, matmul=best.matmul)


def _roots(width: int) -> Iterator[tuple[str, Root]]:
    yield "eps is not used", lambda mean, eps: mean.sqrt()
    for value in CONSTANTS:
        yield f"it adds {value:g} whatever eps is", lambda mean, eps, value=value: (mean + value).sqrt()
    yield "eps is added to the root, not under it", lambda mean, eps: mean.sqrt() + eps
    yield "eps is the least variance, max(variance, eps)", lambda mean, eps: mean.clamp(min=eps).sqrt()
    yield "eps is the least root, max(sqrt(variance), eps)", lambda mean, eps: mean.sqrt().clamp(min=eps)
    yield "eps is added to the sum of squares, not to its mean", lambda mean, eps: (mean + eps / width).sqrt()
    yield "eps is multiplied by the number of channels", lambda mean, eps: (mean + eps * width).sqrt()
    yield "eps is squared", lambda mean, eps: (mean + eps * eps).sqrt()
    yield "the mean is over one channel less", lambda mean, eps: (mean * width / (width - 1) + eps).sqrt()
    yield "squares are summed up, not averaged", lambda mean, eps: (mean * width + eps).sqrt()
    yield "squares are summed up, and eps is not used: it is the L2 norm", lambda mean, eps: (mean * width).sqrt()


def _by_root(rule: Rule, root: Root, call: Call) -> float:
    """Share of elements that the rule explains with that root."""
    rows = dataclasses.replace(call.rows)  # what it remembers is of another root
    under = root(mean_of_squares(rule, rows), rows.eps).float()
    factor = round_to(under if rule.root == "sqrt" else 1 / under, rule.rstd)
    near = (predict(rule, rows, factor) - call.stored).abs() <= call.stored.abs() * 2.0**-20 * (rule.out == KEEP)
    return near[rows.nonzero].double().mean().item()


def _size(rule: Rule, call: Call) -> float:
    """How many times as large as the rule's most elements are."""
    return (call.stored / predict(rule, call.rows))[call.rows.nonzero].nanmedian().item()


def _by_size(rule: Rule, size: float, call: Call) -> float:
    """Share of elements that are so many times as large as the rule's, up to NEAR."""
    expected = size * predict(rule, call.rows)
    near = (expected - call.stored).abs() <= NEAR * expected.abs()
    return near[call.rows.nonzero].double().mean().item()


def _layer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, None, eps)


def _without_weight(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], None, eps)


FORMULAS = {  # of float64 x, applied weight and eps, before any rounding
    "the mean is subtracted: it is LayerNorm": _layer_norm,
    "no weight is applied": _without_weight,
    "the weight is applied without a norm": lambda x, weight, eps: x * weight,
    "the weight is applied before the mean is taken": lambda x, weight, eps: _without_weight(x * weight, weight, eps),
}


def _by_formula(formula: Callable[[Tensor, Tensor, float], Tensor], rule: Rule, call: Call) -> float:
    """Share of elements that the formula explains up to NEAR."""
    rows = call.rows
    missing = (0, rows.width - rows.x.shape[1])
    x = torch.nn.functional.pad(source(rule, rows).double(), missing)
    weight = torch.nn.functional.pad(applied_weight(rule, rows).double(), missing, value=1.0)
    expected = formula(x, weight, rows.eps)[:, : rows.x.shape[1]]
    near = (expected - call.stored).abs() <= NEAR * expected.abs()
    return near[rows.nonzero].double().mean().item()
