"""Cases of products: a·b alone, the two products of RoPE, and what is rounded before or behind RoPE.

Where the two products cancel, half an ulp of one is many ulps of the result.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from castpoint.harness.cases.case import Case, Claim, Inputs, Side, Way, hidden, printed
from castpoint.harness.cases.figures import beyond_ulps, outside, share
from castpoint.harness.cases.inputs import near_one, normal, values
from castpoint.kernels.plan import KEEP, RNE, RTZ
from castpoint.variants.catalogue import FP32, ONE_ROUNDING
from castpoint.variants.spec import store


def rope(x0: Tensor, x1: Tensor, f0: Tensor, f1: Tensor, first: str, second: str) -> Tensor:
    """x0 f0 + x1 f1, each product stored as it says, the sum rounded to bf16."""
    x0, x1, f0, f1 = (value.double() for value in (x0, x1, f0, f1))
    return store(store(x0 * f0, first) + store(x1 * f1, second), RNE)


def angles(rng: torch.Generator, tokens: int, size: int) -> Tensor:
    """Positions up to 4,096 times RoPE's frequencies with base 10,000, [tokens, size / 2]."""
    positions = torch.randint(4096, (tokens, 1), generator=rng)
    return positions * 10000.0 ** (-torch.arange(size // 2) * 2 / size)


def rope_inputs(rng: torch.Generator) -> list[Inputs]:
    """Activations ~ N(0, 1), cos and sin of real angles, bf16, [2048, 64] each."""
    angle = angles(rng, 2048, 128)
    x0, x1 = normal(rng, 2, 2048, 64)
    return [{"x0": x0, "x1": x1, "f0": angle.cos().bfloat16(), "f1": angle.sin().bfloat16()}]


def rotated(plan: Side, inputs: Inputs) -> Tensor:
    """The norm's output through RoPE in fp32, rounded to bf16."""
    value = hidden(plan, x=inputs["x"], weight=inputs["weight"])
    cos, sin = inputs["angle"].double().cos(), inputs["angle"].double().sin()
    a, b = value.chunk(2, -1)
    return store(torch.cat([a * cos - b * sin, b * cos + a * sin], -1), RNE)


def indexer_outputs(rng: torch.Generator) -> list[Inputs]:
    """1,000 runs of 37 x 128 outputs: LayerNorm with normal weight and bias, RoPE with normal cos and sin on half."""
    x = normal(rng, 1000, 37, 128).float()
    centred = x - x.mean(-1, keepdim=True)
    normed = centred * (centred.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    value = normed * torch.randn(1000, 1, 128, generator=rng) + torch.randn(1000, 1, 128, generator=rng)
    cos, sin = torch.randn(2, 1000, 37, 32, generator=rng)
    a, b, rest = value.split([32, 32, 64], -1)
    return [{"value": torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1).flatten(1)}]


def turned_norm(rng: torch.Generator) -> list[Inputs]:
    return [{"x": normal(rng, 512, 128), "weight": near_one(rng, 128), "angle": angles(rng, 512, 128)}]


NEAREST = Way("a·b to nearest", lambda a, b: store(a.double() * b.double(), RNE))
TRUNCATED = Way("a·b truncated", lambda a, b: store(a.double() * b.double(), RTZ))
FP32_VALUE = Way("fp32", lambda value: value.double())
ROUNDED_VALUE = Way("rounded to bf16", lambda value: store(value.double(), RNE))
ROUNDED_PRODUCTS = Way("both RoPE products in bf16", functools.partial(rope, first=RNE, second=RNE))
ONE_PRODUCT = Way("one RoPE product kept (addcmul, fma)", functools.partial(rope, first=RNE, second=KEEP))
KEPT_PRODUCTS = Way("RoPE in fp32, rounded once", functools.partial(rope, first=KEEP, second=KEEP))
TRUNCATED_PRODUCTS = Way("both RoPE products truncated", functools.partial(rope, first=RTZ, second=RTZ))
ROPE_VALUES = values(1 << 20, "x0", "x1", "f0", "f1")

# fmt: off
ROPE: tuple[Case, ...] = (
    Case(18, "triton #11217, #11227", "one product", NEAREST, TRUNCATED,
        "products of 2^20 random pairs that differ", "share", share,
        Claim("52.58 % and 52.54 % are equal", 1 - 0.5256, 1 - 0.52585, 1 - 0.52535),
        "normal bf16 pairs: half of all products are rounded up, less those that are exact or tie downwards",
        values(1 << 20, "a", "b"), draws=4),
    Case(18, "triton #11217", "RoPE products", KEPT_PRODUCTS, TRUNCATED_PRODUCTS,
        "RoPE outputs outside 1e-3 of fp32, products truncated", "share", outside,
        printed("about 41 % on AMD", 0.41, 0.01),
        "activations and factors normal as in that kernel's test, the reference rounded to bf16, atol = rtol",
        ROPE_VALUES, draws=4),
    Case(18, "triton #11217", "RoPE products", KEPT_PRODUCTS, ROUNDED_PRODUCTS,
        "RoPE outputs outside 1e-3 of fp32, the same formula to nearest", "share", outside,
        printed("about 14 % for the same formula in eager torch", 0.14, 0.01),
        "the same test: the formula with both products rounded; eager's addcmul is another formula (next row)",
        ROPE_VALUES, draws=4),
    Case(18, "triton #11217", "RoPE products", KEPT_PRODUCTS, ONE_PRODUCT,
        "RoPE outputs outside 1e-3 of fp32, addcmul to nearest", "share", outside,
        printed("about 14 % for the same formula in eager torch", 0.14, 0.01),
        "the same test: eager keeps the second product, so part of 41 against 14 is a boundary, not truncation",
        ROPE_VALUES, draws=4),
    Case(19, "sglang #34347, #34505", "RoPE products", ROUNDED_PRODUCTS, ONE_PRODUCT,
        "of the outputs that differ, those that move by more than 1 ulp", "share", functools.partial(beyond_ulps, 1),
        Claim("the contracted result differs by one ulp", 0.0, 0.0, 0.0),
        "N(0, 1) turned by real angles: where the products cancel, half an ulp of one is many ulps of the result",
        rope_inputs),
    Case(28, "flashinfer #3148", "hidden before RoPE", ONE_ROUNDING, FP32,
        "RoPE outputs that differ when the rounding before it is left out", "share", share,
        Claim("without the rounding results differ from the reference", low=0.0, high=1.0),
        "the norm of N(0, 1) [512, 128] turned by real angles in fp32",
        turned_norm, run=rotated),
    Case(30, "sglang #35795", "out", FP32_VALUE, ROUNDED_VALUE,
        "runs of 37 x 128 outputs with an element over the tolerance of 0.06", "share",
        lambda a, b: ((b - a).abs() > 0.06).any(-1).double().mean(),
        printed("flaky at roughly 1 %", 0.01, 0.01),
        "the test's own distributions: half an ulp at 16 to 32 is 0.0625, and a quarter of the runs gets there",
        indexer_outputs, draws=5),
)
# fmt: on
