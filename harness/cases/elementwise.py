"""Cases of sums and products, element by element: x + residual, an all-reduce, a·b alone and the two products of RoPE.

A truncated sum is never larger in magnitude than the exact one, so what a tolerance passes in one call adds up over
calls. Where the two products of RoPE cancel, half an ulp of one is many ulps of the result.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from castpoint.harness.cases.case import CLAIMS, Case, Inputs, Side, Way, hidden
from castpoint.harness.cases.figures import beyond_ulps, magnitude_bias, outside, share, share_by_row, ulps
from castpoint.harness.cases.inputs import ONES, near_one, normal, sum_inputs, values
from castpoint.harness.problems.drawn import standard_normal
from castpoint.kernels.plan import KEEP, RNE, RTZ
from castpoint.variants.catalogue import FP32, ONE_ROUNDING
from castpoint.variants.rope import frequencies
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


def calls(rng: torch.Generator) -> list[Inputs]:
    """72 additions of x ~ N(0, 1) [4, 4096] to a residual of the same size; x new each call, x the same, x a third."""
    residual, same = normal(rng, 4, 4096), normal(rng, 4, 4096)
    steps = [[normal(rng, 4, 4096, scale=scale) for _ in range(72)] for scale in (1.0, 0.3)]
    return [{"residual": residual, "calls": each} for each in (steps[0], [same] * 72, steps[1])]


def shrink(before: Tensor, after: Tensor) -> Tensor:
    """Change of the mean magnitude after each call, [calls]."""
    return after.abs().mean((1, 2)) / before.abs().mean((1, 2)) - 1


def reduced(parts: list[Tensor], residual: Tensor, storage: str) -> Tensor:
    """Ranks' parts summed in fp32, stored, then added to the residual and rounded to bf16."""
    total = store(sum(part.double() for part in parts), storage)
    return store(total + residual.double(), RNE)


def four_ranks(rng: torch.Generator) -> list[Inputs]:
    """A part ~ N(0, 1) [64, 4096] from every rank and a residual, as large, a quarter and four times as large."""
    return [
        {"parts": [normal(rng, 64, 4096) for _ in range(4)], "residual": normal(rng, 64, 4096, scale=scale)}
        for scale in (1.0, 0.25, 4.0)
    ]


def add_add(rng: torch.Generator) -> list[Inputs]:
    """a, b, c fp16 uniform in -1 … 1, 500 tests of 64·5·4·3 elements."""
    return [{name: (2 * torch.rand(500, 3840, generator=rng) - 1).half() for name in "abc"}]


def runs_over(before: Tensor, after: Tensor) -> Tensor:
    """Share of runs with an element outside the test's tolerance."""
    return ((after - before).abs() > 0.06).any(-1).double().mean()


def failing_nmse(before: Tensor, after: Tensor) -> Tensor:
    """Normalised mean squared error of those tests that exceed the cap of 1e-7: only such a test is reported."""
    errors = (after - before).square().sum(-1) / before.square().sum(-1)
    return errors[errors > 1e-7]


def rope(x0: Tensor, x1: Tensor, f0: Tensor, f1: Tensor, first: str, second: str) -> Tensor:
    """x0 f0 + x1 f1, each product stored as it says, the sum rounded to bf16."""
    x0, x1, f0, f1 = (value.double() for value in (x0, x1, f0, f1))
    return store(store(x0 * f0, first) + store(x1 * f1, second), RNE)


def angles(rng: torch.Generator, tokens: int, size: int) -> Tensor:
    """Positions up to 4,096 times RoPE's frequencies with base 10,000, [tokens, size / 2] float64."""
    positions = torch.randint(4096, (tokens, 1), generator=rng)
    return positions * frequencies(10_000, size)


def at_real_angles(rng: torch.Generator) -> list[Inputs]:
    """Activations ~ N(0, 1), cos and sin of real angles, bf16, [2048, 64] each."""
    angle = angles(rng, 2048, 128)
    x0, x1 = normal(rng, 2, 2048, 64)
    return [{"x0": x0, "x1": x1, "f0": angle.cos().bfloat16(), "f1": angle.sin().bfloat16()}]


def turned(value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of [..., D] in the type of its inputs; cos and sin [..., D / 2]."""
    a, b = value.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def norm_turned(plan: Side, inputs: Inputs) -> Tensor:
    """The norm's output through RoPE, rounded to bf16."""
    value, angle = hidden(plan, x=inputs["x"], weight=inputs["weight"]), inputs["angle"].double()
    return store(turned(value, angle.cos(), angle.sin()), RNE)


def indexer_outputs(rng: torch.Generator) -> list[Inputs]:
    """1,000 runs of 37 x 128 outputs: LayerNorm with normal weight and bias, RoPE with normal cos and sin on half."""
    x = normal(rng, 1000, 37, 128).double()
    centred = x - x.mean(-1, keepdim=True)
    normed = centred * (centred.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    value = normed * standard_normal(rng, 1000, 1, 128) + standard_normal(rng, 1000, 1, 128)
    cos, sin = standard_normal(rng, 2, 1000, 37, 32)
    half, rest = value.chunk(2, -1)
    return [{"value": torch.cat([turned(half, cos, sin), rest], -1).flatten(1).float()}]


def norm_and_angle(rng: torch.Generator) -> list[Inputs]:
    return [{"x": normal(rng, 512, 128), "weight": near_one(rng, 128), "angle": angles(rng, 512, 128)}]


ADDED_IN_FP16 = Way("a + b to fp16, + c to fp16", lambda a, b, c: ((a + b) + c).double())
ADDED_IN_FP32 = Way("a + b in fp32, + c to fp16", lambda a, b, c: (a.float() + b.float() + c.float()).half().double())
RANKS_ROUNDED = Way("sum of ranks to bf16, then + residual", functools.partial(reduced, storage=RNE))
RANKS_KEPT = Way("sum of ranks kept, then + residual", functools.partial(reduced, storage=KEEP))
TRUNCATED = (ONE_ROUNDING, ONE_ROUNDING.replace(x=RTZ))
ROWS_OF_128 = sum_inputs(400, 128, near_one, (1.0, 1.0), (1.0, 0.3), (1.0, 3.0))
ALL_SCALES = sum_inputs(128, 4096, ONES, (1.0, 1.0), (1.0, 30.0), (3.0, 3.0))
ALIKE, LARGE = sum_inputs(128, 4096, ONES, (1.0, 1.0), (3.0, 3.0)), sum_inputs(128, 4096, ONES, (1.0, 30.0))
PRODUCT_ROUNDED = Way("a·b to nearest", lambda a, b: store(a.double() * b.double(), RNE))
PRODUCT_TRUNCATED = Way("a·b truncated", lambda a, b: store(a.double() * b.double(), RTZ))
FP32_VALUE = Way("fp32", lambda value: value.double())
BF16_VALUE = Way("rounded to bf16", lambda value: store(value.double(), RNE))
ROPE_ROUNDED = Way("both RoPE products in bf16", functools.partial(rope, first=RNE, second=RNE))
ROPE_ADDCMUL = Way("one RoPE product kept (addcmul, fma)", functools.partial(rope, first=RNE, second=KEEP))
ROPE_KEPT = Way("RoPE in fp32, rounded once", functools.partial(rope, first=KEEP, second=KEEP))
ROPE_TRUNCATED = Way("both RoPE products truncated", functools.partial(rope, first=RTZ, second=RTZ))
PAIRS = values("a", "b", shape=(1 << 20,))
ROPE_VALUES = values("x0", "x1", "f0", "f1", shape=(1 << 20,))

ELEMENTWISE: tuple[Case, ...] = (
    Case(CLAIMS["row-of-128"], ONE_ROUNDING.replace(x=KEEP), ONE_ROUNDING, share_by_row, ROWS_OF_128, draws=2),
    Case(CLAIMS["truncated-sum"], *TRUNCATED, magnitude_bias, ALIKE, draws=4, run=summed),
    Case(CLAIMS["truncated-sum-30"], *TRUNCATED, share, LARGE, draws=4, run=summed),
    Case(CLAIMS["truncated-hidden"], ONE_ROUNDING, ONE_ROUNDING.replace(hidden=RTZ), share, ALL_SCALES, draws=2),
    Case(CLAIMS["truncated-step"], *TRUNCATED, lambda a, b: ulps(a, b).max(), ALL_SCALES, draws=2, run=summed),
    Case(CLAIMS["72-calls"], *TRUNCATED, lambda a, b: shrink(a, b)[-1], calls, draws=2, run=accumulated, grow=shrink),
    Case(CLAIMS["all-reduce"], RANKS_ROUNDED, RANKS_KEPT, share, four_ranks, draws=4),
    Case(CLAIMS["all-reduce-ulps"], RANKS_ROUNDED, RANKS_KEPT, functools.partial(beyond_ulps, 4), four_ranks, draws=4),
    Case(CLAIMS["added-in-fp16"], ADDED_IN_FP16, ADDED_IN_FP32, failing_nmse, add_add, draws=3, outputs=False),
    Case(CLAIMS["product-truncated"], PRODUCT_ROUNDED, PRODUCT_TRUNCATED, share, PAIRS, draws=4),
    Case(CLAIMS["rope-truncated"], ROPE_KEPT, ROPE_TRUNCATED, outside, ROPE_VALUES, draws=4),
    Case(CLAIMS["rope-nearest"], ROPE_KEPT, ROPE_ROUNDED, outside, ROPE_VALUES, draws=4),
    Case(CLAIMS["rope-addcmul"], ROPE_KEPT, ROPE_ADDCMUL, outside, ROPE_VALUES, draws=4),
    Case(CLAIMS["rope-contracted"], ROPE_ROUNDED, ROPE_ADDCMUL, functools.partial(beyond_ulps, 1), at_real_angles),
    Case(CLAIMS["rope-unrounded"], ONE_ROUNDING, FP32, share, norm_and_angle, run=norm_turned),
    Case(CLAIMS["indexer-runs"], FP32_VALUE, BF16_VALUE, runs_over, indexer_outputs, draws=5),
)
