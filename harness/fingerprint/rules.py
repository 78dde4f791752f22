"""The family of numerical functions among which a fingerprint decides, each with what it computes on given rows.

A Rule is one RMSNorm over rows, and optionally what a matmul reads of it:

    x    -> variance = mean(x^2) -> root = 1 / sqrt(variance + eps) -> normed = x * root -> out = normed * weight

Every arithmetic step is one IEEE fp32 operation, as implementations make them; sums are exact here, because the rows
of fingerprint.probes are such that they are exact in any order. So a prediction holds for every block size.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from castpoint.harness.fingerprint.stores import round_to, storages
from castpoint.kernels.plan import KEEP, RNE, CastPlan
from castpoint.variants.spec import matmul_operand

ROOTS = ("rsqrt", "sqrt", "1/sqrt")
ORDERS = ("(x*rstd)*w", "x*(rstd*w)", "(x*w)*rstd")
OFFSETS = ("none", KEEP, RNE)
T = TypeVar("T")
TF32 = {matmul: CastPlan(hidden=KEEP, matmul=matmul) for matmul in ("tf32", "tf32x3")}


@dataclass(frozen=True)
class Rule:
    """One numerical function. Storages as in CastPlan; besides:

    eps    where variance + eps is formed: `float32`; `float64`, the root in float64 too, rounded once to fp32;
           `bf16 sum`, the sum rounded to bf16 (a norm written wholly in bf16); `bf16`, eps itself before that; fp16 too
    root   `rsqrt`: x is multiplied by 1 / sqrt(.); `sqrt`: x is divided by sqrt(.); `1/sqrt`: sqrt(.) is rounded as
           rstd first, then 1 / sqrt(.); with rstd kept that is a way to compute rsqrt, and no rule of its own
    order  of the three factors; only the first forms x * rstd, which alone can be rounded as `normed`
    weight the norm's weight as it is used, which makes a difference where it is given in fp32; `none`: it has none
    hidden, scale, matmul   as in CastPlan, for rows that are read through a matmul; `out` is then what it stores. Where
           out has 8 bits, hidden is the result before it is divided by a scale
    bias   `before`: added before the result is rounded; `after`: to the rounded result, which is rounded again
    """

    x: str = RNE
    statistics: str = KEEP
    variance: str = KEEP
    eps: str = "float32"
    root: str = "rsqrt"
    rstd: str = KEEP
    order: str = ORDERS[0]
    normed: str = KEEP
    weight: str = KEEP
    weight_offset: str = "none"
    hidden: str = KEEP
    scale: str = "prologue"
    matmul: str = "fp32"
    bias: str = "before"
    out: str = RNE

    def replace(self, **changes: str) -> Rule:
        return dataclasses.replace(self, **changes)

    @functools.cached_property
    def narrow(self) -> str:
        """bf16 or fp16, to which it rounds."""
        return "fp16" if any(word.startswith("fp16") for word in vars(self).values()) else "bf16"


@dataclass(frozen=True)
class Readout:
    """Columns [N] of a projection with at most two weights each: first * h[channel] + second * h[other] (+ bias)."""

    channel: Tensor
    first: Tensor
    other: Tensor
    second: Tensor
    bias: Tensor | None = None

    def weight(self, width: int) -> Tensor:
        """[N, width] fp32: the rows of the projection's weight."""
        matrix = torch.zeros(len(self.channel), width)
        columns = torch.arange(len(self.channel))
        matrix[columns, self.channel] += self.first
        matrix[columns, self.other] += self.second
        return matrix


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows to be normalised, all exact in fp32: x [R, D], residual [R, D] or None, weight [D] or [R, D] as stored,
    over `width` channels (those of x, and zeros that are left out)."""

    x: Tensor
    weight: Tensor
    eps: float
    width: int
    residual: Tensor | None = None
    readout: Readout | None = None
    exact: bool = True  # whether the sum of squares is exact in fp32, in any order
    scales: Tensor | None = None  # [R, D] fp32: what a result is divided by before it is stored in 8 bits

    def at(self, eps: float) -> Rows:
        """The same rows with another eps."""
        return self if eps == self.eps else self.remembered(("at", eps), lambda: dataclasses.replace(self, eps=eps))

    def first(self, count: int) -> Rows:
        """The first rows."""
        return self.remembered(("first", count), lambda: self.of(torch.arange(count)))

    def of(self, places: Tensor) -> Rows:
        """The rows at those places."""
        weight = self.weight if self.weight.ndim == 1 else self.weight[places]
        residual = None if self.residual is None else self.residual[places]
        scales = None if self.scales is None else self.scales[places]
        return dataclasses.replace(self, x=self.x[places], weight=weight, residual=residual, scales=scales)

    @functools.cached_property
    def nonzero(self) -> Tensor:
        """Which elements of the result are not zero whatever the rule: bool, [R, D] or [R, N]."""
        there = (self.x if self.residual is None else self.x + self.residual) != 0
        if self.readout is None:
            return there
        return there[:, self.readout.channel] | (there[:, self.readout.other] & (self.readout.second != 0))

    @functools.cached_property
    def counted(self) -> int:
        return int(self.nonzero.sum())

    @functools.cached_property
    def _kept(self) -> dict[tuple[object, ...], Any]:
        return {}

    def remembered(self, key: tuple[object, ...], make: Callable[[], T]) -> T:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


def source(rule: Rule, rows: Rows) -> Tensor:
    """[R, D] fp32: the rows that are normalised, x + residual as the rule stores it."""
    x = rows.x if rows.residual is None else rows.x + rows.residual
    return rows.remembered(("x", rule.x), functools.partial(round_to, x, rule.x))


def mean_of_squares(rule: Rule, rows: Rows) -> Tensor:
    """[R, 1] float64: the variance as the rule stores it. The sum is exact."""

    def make() -> Tensor:
        x = source(rule, rows)
        squares = round_to(x * x, rule.statistics).to(torch.float64)
        mean = squares.sum(-1, keepdim=True) / rows.width
        return round_to(mean.to(torch.float32), rule.variance).to(torch.float64)

    return rows.remembered(("variance", rule.x, rule.statistics, rule.variance), make)


def means_agree(rule: Rule, rows: Rows) -> Tensor:
    """[R, 1] bool: whether the mean is the same by division, as a CPU makes it, and by multiplication with 1 / width,
    as CUDA does: an ulp apart in some rows where the width is no power of two."""
    total = round_to(source(rule, rows).square(), rule.statistics).double().sum(-1, keepdim=True)
    return (total / rows.width).float() == total.float() * torch.tensor(1 / rows.width)


def scalar(rule: Rule, variance: Tensor, eps: float | Tensor) -> Tensor:
    """fp32 of variance's shape, eps in float64: what multiplies x (root `rsqrt`), or divides it (`sqrt`)."""
    if rule.eps == "float64":
        under = variance + eps
    else:
        added = torch.as_tensor(eps, dtype=torch.float32)
        narrow = KEEP if rule.eps == "float32" else f"{rule.eps.split()[0]}-rne"
        added = round_to(added, KEEP if rule.eps.endswith("sum") else narrow).to(torch.float64)
        under = (variance + added).to(torch.float32)
        under = round_to(under, narrow).to(torch.float64)
    if rule.root == "rsqrt":
        return round_to(under.rsqrt().to(torch.float32), rule.rstd)
    root = round_to(under.sqrt().to(torch.float32), rule.rstd)
    return root if rule.root == "sqrt" else round_to(1 / root, rule.rstd)


def two_step(rule: Rule, variance: Tensor, eps: float | Tensor) -> Tensor:
    """scalar as 1 / sqrt in two fp32 roundings: what many implementations call rsqrt; an ulp off in one of four."""
    if rule.root != "rsqrt":
        return scalar(rule, variance, eps)
    root = scalar(rule.replace(root="sqrt", rstd=KEEP), variance, eps)
    return round_to(1 / root, rule.rstd)


def _root_key(rule: Rule) -> tuple[str, ...]:
    return (rule.x, rule.statistics, rule.variance, rule.eps, rule.root, rule.rstd)


def factor_of(rule: Rule, rows: Rows) -> Tensor:
    """[R, 1] fp32: scalar of the rows."""
    return rows.remembered(("scalar", *_root_key(rule)), lambda: scalar(rule, mean_of_squares(rule, rows), rows.eps))


def applied_weight(rule: Rule, rows: Rows) -> Tensor:
    """fp32 of the weight's shape: w, or 1 + w; ones where there is none."""

    def make() -> Tensor:
        if rule.weight == "none":
            return torch.ones_like(rows.weight)
        weight = round_to(rows.weight, rule.weight)
        return weight if rule.weight_offset == "none" else round_to(1 + weight, rule.weight_offset)

    return rows.remembered(("weight", rule.weight, rule.weight_offset), make)


def predict(rule: Rule, rows: Rows, factor: Tensor | None = None) -> Tensor:
    """What an implementation of the rule returns: [R, D] fp32, or [R, N] with a readout. factor [R, 1]: of the rows,
    where it is known."""
    factor = factor_of(rule, rows) if factor is None else factor
    x, weight = source(rule, rows), applied_weight(rule, rows)

    def product() -> Tensor:
        key = ("product", *_root_key(rule), rule.order, rule.normed, rule.weight, rule.weight_offset)
        return rows.remembered(key, functools.partial(_normalised, rule, x, factor, weight))

    def read() -> Tensor:
        if rule.scale == "folded":
            return _read(rule, x, _folded(rows.readout, weight))
        return _read(rule, round_to(product() if rule.scale == "prologue" else x * weight, rule.hidden), rows.readout)

    if rows.readout is None:
        value = product()
        return round_to(value if rows.scales is None else round_to(value, rule.hidden) / rows.scales, rule.out)
    before = (*_root_key(rule), rule.order, rule.normed) if rule.scale == "prologue" else (rule.x,)
    value = rows.remembered(
        ("read", rule.scale, *before, rule.weight, rule.weight_offset, rule.hidden, rule.matmul), read
    )
    value = value if rule.scale == "prologue" else scaled(rule, value, factor)
    if rows.readout.bias is not None:
        value = (round_to(value, rule.out) if rule.bias == "after" else value) + rows.readout.bias
    return round_to(value, rule.out)


def size_of_terms(rule: Rule, rows: Rows) -> Tensor:
    """[R, N] fp32: of elements that are sums of two products and a bias, the sum of their sizes; zero of others."""
    if rows.readout is None:
        return torch.zeros(1)
    readout = rows.readout
    sizes = {name: getattr(readout, name).abs() for name in ("first", "second")}
    bias = None if readout.bias is None else readout.bias.abs()
    x, weight = source(rule, rows).abs(), applied_weight(rule, rows).abs()
    sized = dataclasses.replace(rows, x=x, residual=None, weight=weight,
                                readout=dataclasses.replace(readout, bias=bias, **sizes))  # fmt: skip
    plain = Rule(statistics=rule.statistics, hidden=KEEP, matmul="fp32", scale=rule.scale, out=KEEP)
    return predict(plain, sized)


def scaled(rule: Rule, value: Tensor, factor: Tensor) -> Tensor:
    """value by the factor of scalar, in one fp32 rounding."""
    return value / factor if rule.root == "sqrt" else value * factor


def _normalised(rule: Rule, x: Tensor, factor: Tensor, weight: Tensor) -> Tensor:
    if rule.order == "(x*w)*rstd":
        return scaled(rule, x * weight, factor)
    if rule.order == "x*(rstd*w)":
        return x * (factor * weight)
    return round_to(scaled(rule, x, factor), rule.normed) * weight


def _read(rule: Rule, hidden: Tensor, readout: Readout) -> Tensor:
    if rule.matmul in TF32:
        hidden = matmul_operand(hidden.to(torch.float64), TF32[rule.matmul])
    hidden = hidden.to(torch.float64)  # two products of 24 by 8 bits and their sum: one rounding to fp32
    value = hidden[:, readout.channel] * readout.first + hidden[:, readout.other] * readout.second
    return value.to(torch.float32)


def _folded(readout: Readout, weight: Tensor) -> Readout:
    first = round_to(readout.first * weight[readout.channel], RNE)
    return dataclasses.replace(readout, first=first, second=round_to(readout.second * weight[readout.other], RNE))


def norm_rules(
    *, outs: tuple[str, ...], xs: tuple[str, ...] = (RNE,), roots: tuple[str, ...] = ROOTS, narrow: str = "bf16",
    hiddens: tuple[str, ...] = (KEEP,), weightless: bool = False,
) -> list[Rule]:  # fmt: skip
    """Every rule of a norm up to its fp32 arithmetic (eps in fp32 or float64, root, order: see arithmetic).

    outs: storages that the dtype of the result allows. xs: of the sum under the norm, where there is one. roots: those
    in question where rstd is rounded. narrow: bf16 or fp16, to which values are rounded. hiddens: storages of what is
    stored in 8 bits. weightless: without a weight, where a last rounding is that of normed too.
    """
    words, weight = storages(narrow), "none" if weightless else KEEP
    return [
        Rule(x, statistics, variance, eps, root, rstd, ORDERS[0], normed, weight, offset, hidden, out=out)
        for x, statistics, variance, rstd, normed in itertools.product(
            xs, *[words] * 3, words[:1] if weightless else words
        )
        for offset, hidden, out in itertools.product(("none",) if weightless else ("none", *words[:2]), hiddens, outs)
        for eps in (("float32",) if variance == KEEP else ("float32", f"{narrow} sum", narrow))
        for root in (ROOTS[:1] if rstd == KEEP else roots)
    ]


def projected_rules(*, outs: tuple[str, ...], xs: tuple[str, ...] = (RNE,), narrow: str = "bf16") -> list[Rule]:
    """Every rule of a norm read through a matmul, up to its fp32 arithmetic. matmul `bf16` is one of operands that are
    rounded to narrow; folded weights are of bf16."""
    kept, *rounded = storages(narrow)
    operands = [*((word, "bf16") for word in rounded), *((kept, matmul) for matmul in ("tf32", "tf32x3", "fp32"))]
    rules = []
    for rule in norm_rules(outs=outs, xs=xs, roots=ROOTS[:1], narrow=narrow):
        rules += [rule.replace(hidden=hidden, matmul=matmul) for hidden, matmul in operands]
        if rule.normed == KEEP:
            rules += [rule.replace(hidden=h, matmul=m, scale="epilogue") for h, m in operands]
            if rule.x != KEEP and narrow == "bf16":
                rules.append(rule.replace(scale="folded", matmul="bf16"))
    return rules


def arithmetic(rule: Rule) -> Iterator[Rule]:
    """The rule with every choice that changes a result by fp32 ulps only: eps, root and order."""
    eps = ("float32", "float64") if rule.eps == "float32" else (rule.eps,)
    roots = ("rsqrt", "sqrt") if rule.rstd == KEEP else (rule.root,)
    exact = rule.rstd != KEEP and rule.weight_offset != KEEP  # three factors of 8 bits: no order rounds
    exact |= rule.weight == "none"
    orders = ORDERS if rule.normed == KEEP and rule.scale == "prologue" and not exact else ORDERS[:1]
    for e, root, order in itertools.product(eps, roots, orders):
        if root == "rsqrt" or order != "x*(rstd*w)":
            yield rule.replace(eps=e, root=root, order=order)
