"""Cases of sums of tensors: x + residual, ranks of an all-reduce, a chain of additions.

A truncated sum is never larger in magnitude than the exact one, so what a tolerance passes in one call adds up over
calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from castpoint.harness.cases.case import Case, Claim, Inputs, Side, Way, count, printed
from castpoint.harness.cases.figures import beyond_ulps, exponent, magnitude_bias, share, share_by_row, ulps
from castpoint.harness.cases.inputs import near_one, normal, sum_inputs
from castpoint.kernels.plan import KEEP, RNE, RTZ
from castpoint.variants.catalogue import ONE_ROUNDING
from castpoint.variants.spec import store


def summed(plan: Side, inputs: Inputs) -> Tensor:
    """x + residual as the plan stores it, [T, D]: the first line of its spec."""
    return store(inputs["x"].double() + inputs["residual"].double(), plan.x)


def accumulated(plan: Side, inputs: Inputs) -> Tensor:
    """The residual after each call, [calls, T, D]: residual = x + residual, stored as the plan says."""
    residual, after = inputs["residual"], []
    for x in inputs["calls"]:
        residual = summed(plan, {"x": x, "residual": residual})
        after.append(residual)
    return torch.stack(after)


def residual_calls(rng: torch.Generator) -> list[Inputs]:
    """72 additions of x ~ N(0, 1) [4, 4096] to a residual of the same size; x new each call, x the same, x a third."""
    residual, same = normal(rng, 4, 4096), normal(rng, 4, 4096)
    steps = [[normal(rng, 4, 4096, scale=scale) for _ in range(72)] for scale in (1.0, 0.3)]
    return [{"residual": residual, "calls": calls} for calls in (steps[0], [same] * 72, steps[1])]


def shrink(before: Tensor, after: Tensor) -> Tensor:
    """Change of the mean magnitude after each call, [calls]."""
    return after.abs().mean((1, 2)) / before.abs().mean((1, 2)) - 1


def reduced(parts: list[Tensor], residual: Tensor, storage: str) -> Tensor:
    """Ranks' parts summed in fp32, stored, then added to the residual and rounded to bf16."""
    total = store(sum(part.double() for part in parts), storage)
    return store(total + residual.double(), RNE)


def all_reduce_inputs(ranks: int, *residuals: float) -> Callable[..., list[Inputs]]:
    """A part ~ N(0, 1) [64, 4096] from every rank and a residual, one set-up for each deviation of it."""
    return lambda rng: [
        {"parts": [normal(rng, 64, 4096) for _ in range(ranks)], "residual": normal(rng, 64, 4096, scale=scale)}
        for scale in residuals
    ]


def add_add(rng: torch.Generator) -> list[Inputs]:
    """a, b, c fp16 uniform in -1 … 1, 500 tests of 64·5·4·3 elements."""
    return [{name: (2 * torch.rand(500, 3840, generator=rng) - 1).half() for name in "abc"}]


def failing_nmse(before: Tensor, after: Tensor) -> Tensor:
    """Normalised mean squared error of those tests that exceed the cap of 1e-7: only such a test is reported."""
    errors = (after - before).square().sum(-1) / before.square().sum(-1)
    return errors[errors > 1e-7]


ADDED_IN_FP16 = Way("a + b to fp16, + c to fp16", lambda a, b, c: ((a + b) + c).double())
ADDED_IN_FP32 = Way("a + b in fp32, + c to fp16", lambda a, b, c: (a.float() + b.float() + c.float()).half().double())
RANKS_ROUNDED = Way("sum of ranks to bf16, then + residual", functools.partial(reduced, storage=RNE))
RANKS_KEPT = Way("sum of ranks kept, then + residual", functools.partial(reduced, storage=KEEP))
TRUNCATED = ONE_ROUNDING.replace(x=RTZ)
ADD_SCALES = ((1.0, 1.0), (1.0, 30.0), (3.0, 3.0))

# fmt: off
RESIDUAL: tuple[Case, ...] = (
    Case(7, "vllm #52104, vllm.cpp #3103", "x + residual", ONE_ROUNDING.replace(x=KEEP), ONE_ROUNDING,
        "norm outputs that differ in one row of 128", "share", share_by_row,
        count("33 of 128 values of the first norm", 33, 128),
        "single rows, x ~ N(0, 1), the residual 0.3, 1 or 3 times as large: the sum rounded before the variance",
        sum_inputs(400, 128, (1.0, 1.0), (1.0, 0.3), (1.0, 3.0), weight=near_one), draws=2),
    Case(14, "aiter #5151", "x + residual", ONE_ROUNDING, TRUNCATED,
        "mean change of the magnitude of x + residual, both N(0, 1)", "relative", magnitude_bias,
        printed("mean signed magnitude error, smaller end: -1.53e-3", -1.53e-3, 1e-5),
        "the thread's own inputs (128 of its 512 rows a draw): a sum of two bf16 values of a size is often exact",
        sum_inputs(128, 4096, ADD_SCALES[0], ADD_SCALES[2]), draws=4, run=summed),
    Case(14, "aiter #5151", "x + residual", ONE_ROUNDING, TRUNCATED,
        "elements of x + residual that differ, residual ~ N(0, 30)", "share", share,
        printed("27 to 50 % of residual_out, larger end", 0.50, 0.01),
        "the thread's own inputs, the residual 30 times as large, where the most sums are inexact",
        sum_inputs(128, 4096, ADD_SCALES[1]), draws=4, run=summed),
    Case(14, "aiter #5151", "hidden", ONE_ROUNDING, ONE_ROUNDING.replace(hidden=RTZ),
        "elements of the norm's output that differ", "share", share,
        printed("27 to 50 % of residual_out, larger end", 0.50, 0.01),
        "the call's other output, whose products are never exact: the 50 % fit it, not the sum of the row above",
        sum_inputs(128, 4096, *ADD_SCALES), draws=2),
    Case(14, "aiter #5151", "x + residual", ONE_ROUNDING, TRUNCATED,
        "largest step of one call", "bf16 ulp", lambda a, b: ulps(a, b).max(),
        Claim("at most 1 ulp a call", 1.0, 0.0, 1.0),
        "the thread's own inputs: what every tolerance passes",
        sum_inputs(128, 4096, *ADD_SCALES), draws=2, run=summed),
    Case(14, "aiter #5151", "x + residual", ONE_ROUNDING, TRUNCATED,
        "change of the residual's mean magnitude after 72 calls", "relative",
        lambda a, b: shrink(a, b)[-1], printed("the residual shrinks by 8.98 %", -0.0898, 1e-4),
        "x ~ N(0, 1) new in each call, or the same, or a third of it, onto a residual ~ N(0, 1)",
        residual_calls, draws=2, run=accumulated, grow=lambda a, b: exponent(shrink(a, b).abs())),
    Case(16, "aiter #2586", "all-reduce", RANKS_ROUNDED, RANKS_KEPT,
        "elements of the new residual that differ", "share", share, printed("about 25 % of the elements", 0.25, 0.01),
        "4 ranks' parts ~ N(0, 1), the residual as large as one part, a quarter or four times it",
        all_reduce_inputs(4, 1.0, 0.25, 4.0), draws=4),
    Case(16, "aiter #2586, sglang #28226", "all-reduce", RANKS_ROUNDED, RANKS_KEPT,
        "of the elements that differ, those that move by more than 4 ulps", "share", functools.partial(beyond_ulps, 4),
        Claim("1 to 4 ulps; elsewhere: exactly 1 ulp", 0.0, 0.0, 0.0),
        "the same sums; where sum and residual cancel, half an ulp of the sum is many ulps of the result",
        all_reduce_inputs(4, 1.0, 0.25, 4.0), draws=4),
    Case(26, "llama.cpp #28719", "a + b", ADDED_IN_FP16, ADDED_IN_FP32,
        "NMSE of the tests that exceed the cap of 1e-7", "NMSE", failing_nmse,
        printed("1.02e-7, over a cap of 1e-7", 1.02e-7, 1e-9),
        "the test's own shape, uniform in -1 to 1: its mean is 9.0e-8, the cap lies two deviations above",
        add_add, draws=3, outputs=False),
)
# fmt: on
