"""What a plan may store of recorded inputs, whose sums depend on their order: an interval an element.

A chain's plan is a CastPlan, whose intervals variants.envelope has. A single norm's is a Rule, since it may round the
sum with eps and the root besides; its intervals are made here, of the same parts.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from castpoint.harness.fingerprint.capture import Capture, Chain, Norm
from castpoint.harness.fingerprint.rules import OFFSETS, Rows, Rule, applied_weight, source
from castpoint.harness.fingerprint.stores import round_to, storages
from castpoint.kernels.plan import KEEP, RNE, STORAGE, CastPlan
from castpoint.variants.envelope import (
    RSQRT_ULPS,
    Interval,
    U,
    outputs_interval,
    product,
    proj_interval,
    stored,
    variance_interval,
    widened,
)
from castpoint.variants.problem import Problem

Plan = CastPlan | Rule
OPERANDS = ((RNE, "bf16"), ("bf16-rtz", "bf16"), (KEEP, "tf32"), (KEEP, "tf32x3"), (KEEP, "fp32"))
HEAD_WORDS = ("head_rstd", "head_normed")


def bounds_of(capture: Capture) -> Callable[[Plan], dict[str, Interval]]:
    """Of a plan the lowest and highest value of each element of the capture's outputs, float64. What plans share is
    made once."""
    if isinstance(capture, Norm):
        return _norm_bounds(capture)
    proj = functools.cache(lambda plan: proj_interval(plan, capture.problem))
    return lambda plan: outputs_interval(plan, capture.problem, proj(before_proj(plan)))


def v_bounds_of(capture: Chain, step: int) -> Callable[[CastPlan], Interval]:
    """Of a plan the interval of every step-th channel of v [T, channels], stored as its words proj and out say."""
    p = capture.problem
    columns = slice((p.num_q_heads + p.num_kv_heads) * p.head_dim, None, step)
    proj = functools.cache(lambda plan: proj_interval(plan, p, columns))
    return lambda plan: stored(stored(proj(before_proj(plan)), plan.proj), plan.out)


def before_proj(plan: CastPlan) -> CastPlan:
    """The plan by what it does before proj is rounded."""
    return plan.without_rope().replace(proj=KEEP, head_rstd=KEEP, head_normed=KEEP, out=RNE)


def input_plans(problem: Problem, outs: tuple[str, ...]) -> Iterator[CastPlan]:
    """Every plan of a chain up to proj, v being stored as one of outs: the head norm's words are left at KEEP."""
    ways = [("prologue", normed, *operand) for normed in STORAGE for operand in OPERANDS]
    ways += [("epilogue", KEEP, *operand) for operand in OPERANDS] + [("folded", KEEP, KEEP, "bf16")]
    xs = (RNE,) if problem.residual is None else STORAGE
    for x, statistics, variance, rstd, offset, way in itertools.product(xs, *[STORAGE] * 3, OFFSETS, ways):
        scale, normed, hidden, matmul = way
        if (scale, x) != ("folded", KEEP):
            for out in outs:
                yield CastPlan(x, statistics, variance, rstd, normed, hidden, proj=KEEP, out=out, scale=scale,
                               matmul=matmul, weight_offset=offset)  # fmt: skip


def turned(problem: Problem) -> tuple[str, ...]:
    """Boundaries of RoPE that a capture shows: none without positions; a table's own only where it is fp32."""
    if problem.positions is None or problem.cos_sin_cache is None:
        return ()
    return ("unrotated", *(["cos_sin"] if problem.cos_sin_cache.dtype == torch.float32 else []), "products")


def head_plans(plan: CastPlan, problem: Problem, outs: tuple[str, ...]) -> Iterator[CastPlan]:
    """Every plan that stores v as that one of input_plans: what it leaves open of proj, the head norm, RoPE and out."""
    words = STORAGE if problem.has_head_norm else (KEEP,)
    names = turned(problem)
    ropes = [dict(zip(names, ways, strict=True)) for ways in itertools.product(STORAGE, repeat=len(names))]
    stores = [(plan.out, out) for out in outs] if plan.out != KEEP else []
    for (proj, out), head_rstd, head_normed in itertools.product([*stores, (KEEP, plan.out)], words, words):
        whole = plan.replace(proj=proj, out=out, head_rstd=head_rstd, head_normed=head_normed)
        yield from (whole.replace(**ways) for ways in ropes)


def _norm_bounds(capture: Norm) -> Callable[[Rule], dict[str, Interval]]:
    residual = None if capture.residual is None else capture.residual.float()
    rows = Rows(capture.x.float(), capture.weight.float(), capture.eps, capture.x.shape[-1], residual, exact=False)

    @functools.cache
    def variance(x: str, statistics: str, variance: str) -> Interval:
        value = source(Rule(x), rows).to(torch.float64)
        return variance_interval((value, value), statistics, variance)

    def bounds(rule: Rule) -> dict[str, Interval]:
        y = {"y": _norm(rule, rows, variance(rule.x, rule.statistics, rule.variance))}
        returned = capture.outputs.get("residual_out")
        return y if returned is None else y | {"residual_out": _sum(rule, rows, returned.dtype, capture.narrow)}

    return bounds


def _sum(rule: Rule, rows: Rows, dtype: torch.dtype, narrow: str) -> Interval:
    """x + residual as it may be returned: as it is normalised, or rounded for the store alone, either way; in fp32 also
    unrounded."""
    kept, *rounded = storages(narrow)
    words = (rule.x, kept) if dtype == torch.float32 else rounded if rule.x == kept else (rule.x,)
    values = torch.stack([source(rule.replace(x=word), rows) for word in words]).to(torch.float64)
    return values.amin(0), values.amax(0)


def _norm(rule: Rule, rows: Rows, variance: Interval) -> Interval:
    """[..., D] as the rule stores it; where x * rstd is not rounded the factors may come in any order."""
    x, weight = (value.to(torch.float64) for value in (source(rule, rows), applied_weight(rule, rows)))
    normed = product((x, x), _factor(rule, variance, rows.eps))
    if rule.normed == KEEP:
        return stored(widened(product(normed, (weight, weight)), 2 * U), rule.out)
    return stored(product(stored(normed, rule.normed), (weight, weight)), rule.out)


def _factor(rule: Rule, variance: Interval, eps: float) -> Interval:
    """What x is multiplied by; where x is divided, its reciprocal."""
    if rule.eps != "float32":
        narrow = f"{rule.eps.split()[0]}-rne"
        added = torch.tensor(eps)
        added = added if rule.eps.endswith("sum") else round_to(added, narrow)
        under = stored((variance[0] + added.item(), variance[1] + added.item()), narrow)
    else:
        under = variance[0] + eps, variance[1] + eps
    approximate = 2 * RSQRT_ULPS * U
    if rule.root == "rsqrt":
        return stored(widened((under[1].rsqrt(), under[0].rsqrt()), approximate), rule.rstd)
    root = stored(widened((under[0].sqrt(), under[1].sqrt()), approximate), rule.rstd)
    inverse = 1 / root[1], 1 / root[0]
    return widened(inverse, 2.0**-50) if rule.root == "sqrt" else stored(widened(inverse, U), rule.rstd)


def flat(bounds: dict[str, Interval]) -> Interval:
    """The outputs side by side, [T, elements]."""
    low, high = (torch.cat([ends[end].flatten(1) for ends in bounds.values()], dim=1) for end in (0, 1))
    return low, high


def disjoint(a: Interval, b: Interval) -> Tensor:
    """How many elements of each token no value can be of both, [T]."""
    return ((a[1] < b[0]) | (b[1] < a[0])).sum(1)
