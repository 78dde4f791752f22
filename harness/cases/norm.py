"""Cases within one norm: where it rounds, and the order and the precision of its sum of squares, which no plan says.

Rounding after the multiplication by rstd or not (`hf` against `one-rounding`) is what many threads met: in one norm it
moves a quarter of the elements, each by one bf16 ulp. An fp32 sum in another order moves a few elements in millions. A
sum carried in bf16 stalls: beside 256, 1 is half an ulp.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from castpoint.harness.cases.case import CLAIMS, Case, Inputs, Side, Way, hidden
from castpoint.harness.cases.figures import largest, relative, relative_l1, share, share_by_row
from castpoint.harness.cases.inputs import (
    ONES,
    calibrated,
    filled,
    in_turn,
    near_one,
    norm_inputs,
    normal,
    uniform,
    values,
)
from castpoint.kernels.plan import KEEP, RNE, RTZ
from castpoint.variants.catalogue import FP32, HF, ONE_ROUNDING, plan_named
from castpoint.variants.spec import applied_weight, round_to, store


def fp8_codes(plan: Side, inputs: Inputs) -> Tensor:
    """The norm's output in FP8 (e4m3), scaled a token at a time so that its largest value becomes 448."""
    value = hidden(plan, **inputs)
    return (value * (448 / value.abs().amax(-1, keepdim=True))).float().to(torch.float8_e4m3fn).double()


def eps_kept(x: Tensor, weight: Tensor, eps: float, wide: bool) -> Tensor:
    """A norm in fp32, its mean exact and rounded once; eps, root and reciprocal are fp32 steps, or fp64 rounded once.

    A root in fp32 is that in fp64, rounded: PyTorch's own can be an ulp off, on some CPUs in a fifth of all numbers.
    """
    mean = x.double().square().mean(-1, keepdim=True).float()
    in_fp32 = 1 / (mean + torch.tensor(eps)).double().sqrt().float()
    rstd = (1 / (mean.double() + eps).sqrt()).float() if wide else in_fp32
    return ((x.float() * rstd) * weight.float()).bfloat16().double()


def all_uniform(rng: torch.Generator) -> list[Inputs]:
    x, residual, weight = uniform(rng, 128, 2048), uniform(rng, 128, 2048), uniform(rng, 2048)
    return [{"x": x, "residual": residual, "weight": weight, "eps": 1e-5}]


def norm_of_sum(words: str, sum_of_squares: Callable[[Tensor], Tensor], store_as: tuple[str, str, str]) -> Way:
    """A norm from a way to sum squares; rstd, normed and output stored as store_as says, unless inputs name `products`,
    which then says it for the last two."""

    def run(x: Tensor, weight: Tensor, eps: float = 1e-5, products: str | None = None) -> Tensor:
        x, weight = x.double(), weight.double()
        normed, out = (products, products) if products else store_as[1:]
        rstd = store((sum_of_squares(x) / x.shape[-1] + eps).rsqrt(), store_as[0])
        return store(store(x * rstd, normed) * weight, out)

    return Way(words, run)


def exact_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, **_: object) -> Tensor:
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


def exact_sum(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True)


def fp32_sum(groups: int, x: Tensor) -> Tensor:
    """Sum of squares in fp32: within each of 2^k groups of neighbours from left to right, then the first half of the
    groups onto the second, until one is left."""
    squares = x.float().square().reshape(*x.shape[:-1], groups, -1)
    total = functools.reduce(torch.add, squares.unbind(-1))
    while total.shape[-1] > 1:
        first, second = total.chunk(2, -1)
        total = first + second
    return total.double()


def bf16_sum(storage: str, x: Tensor) -> Tensor:
    """Sum of squares in 16 lanes, every square and every partial sum stored in bf16; the lanes are added last."""

    def add(total: Tensor, value: Tensor) -> Tensor:
        return round_to(total + value, storage)

    squares = round_to(x.float().square(), storage).reshape(*x.shape[:-1], -1, 16)
    lanes = functools.reduce(add, squares.unbind(-2))
    return functools.reduce(add, lanes.unbind(-1)).unsqueeze(-1).double()


def outlier_ratio(before: Tensor, after: Tensor) -> Tensor:
    """rms relative error of rstd on the tokens with an outlier over that on those without."""
    error = (after / before - 1).square().mean(-1)
    return (error[1::2].mean() / error[::2].mean()).sqrt()


def with_outliers(outlier: float, rng: torch.Generator) -> list[Inputs]:
    """x ~ N(0, 1) [512, D], D = 5376 or 1024; every other token has one channel of that size, anywhere."""
    setups = []
    for size in (5376, 1024):
        x = normal(rng, 512, size)
        x[range(1, 512, 2), torch.randint(size, (256,), generator=rng)] = outlier
        setups.append({"x": x})
    return setups


def grouped(groups: int) -> Way:
    """A norm with one rounding whose squares are summed in that many groups."""
    words = f"squares summed in fp32 in {groups} groups"
    return norm_of_sum(words, functools.partial(fp32_sum, groups), (KEEP, KEEP, RNE))


OFFSETS = (plan_named("gemma"), plan_named("gemma-bf16-offset"))
BF16_VARIANCE = ONE_ROUNDING.replace(statistics=RNE, variance=RNE)
EPS_FP32 = Way("eps, root and reciprocal in fp32", functools.partial(eps_kept, wide=False))
EPS_FP64 = Way("eps, root and reciprocal in fp64, then fp32", functools.partial(eps_kept, wide=True))
LLADA = norm_inputs(128, 2048, near_one, normal, uniform)
PUBLISHED = norm_inputs(128, 2048, calibrated(14), calibrated(0), calibrated(27), near_one)
ROWS = norm_inputs(150, 4096, near_one, normal, uniform)
WEIGHT_ALONE = {"draws": 1, "outputs": False, "run": lambda plan, inputs: applied_weight(inputs["weight"], plan)}
SMALL_WEIGHT = values("weight", shape=(1,), draw=filled(0.05))
UNWEIGHTED = norm_inputs(1024, 1024, ONES)
TWO_WEIGHTS = norm_inputs(128, 4096, near_one, uniform)
FP32_SUM = norm_of_sum("sum of squares exact, one rounding", exact_sum, (KEEP, KEEP, RNE))
FP32_SUM_PRODUCTS = norm_of_sum("sum of squares in fp32, products in bf16", exact_sum, (KEEP, RTZ, RTZ))
EXACT_NORM = Way("float64", exact_norm)
BF16_SUM, BF16_SUM_TRUNCATED = (
    norm_of_sum(f"squares and sums in bf16 {how}, 16 lanes", functools.partial(bf16_sum, mode), (mode, mode, mode))
    for how, mode in (("to nearest", RNE), ("truncated", RTZ))
)
RSTDS = (
    Way("rstd, squares summed exactly", lambda x: (exact_sum(x.double()) / x.shape[-1] + 1e-6).rsqrt()),
    Way("rstd, squares and sums in bf16, 16 lanes", lambda x: (bf16_sum(RNE, x) / x.shape[-1] + 1e-6).rsqrt()),
)
HEADS = norm_inputs(512 * 16, 128, near_one)
MASSIVE, LARGE = functools.partial(with_outliers, 1800.0), functools.partial(with_outliers, 32.0)
THREE_SIZES = in_turn(*(norm_inputs(64, size, normal, eps=1e-5) for size in (2048, 1024, 4096)))
TWO_PRODUCTS = in_turn(*(norm_inputs(64, 2048, normal, products=kind) for kind in (RTZ, RNE)))

NORM: tuple[Case, ...] = (
    Case(CLAIMS["llada-largest"], HF, ONE_ROUNDING, largest, LLADA),
    Case(CLAIMS["llada-mean"], HF, ONE_ROUNDING, lambda a, b: (b - a).abs().mean(), LLADA),
    Case(CLAIMS["fp8-codes"], ONE_ROUNDING, FP32, share, norm_inputs(128, 2048, near_one), run=fp8_codes),
    Case(CLAIMS["published-weights"], HF, ONE_ROUNDING, share, PUBLISHED),
    Case(CLAIMS["row-of-4096"], HF, ONE_ROUNDING, share_by_row, ROWS, draws=2),
    Case(CLAIMS["offset-scale"], *OFFSETS, lambda a, b: relative(a, b).max(), SMALL_WEIGHT, **WEIGHT_ALONE),
    Case(CLAIMS["offset-large"], *OFFSETS, share, norm_inputs(64, 1024, filled(15.8125), weight_offset=True)),
    Case(CLAIMS["eps-fp64"], EPS_FP32, EPS_FP64, share, norm_inputs(578, 4096, near_one, normal, eps=1e-5), draws=8),
    Case(CLAIMS["inner-rounding"], HF, ONE_ROUNDING, share, TWO_WEIGHTS),
    Case(CLAIMS["bf16-variance"], FP32, BF16_VARIANCE, lambda a, b: 256 * relative(a, b).mean(), UNWEIGHTED),
    Case(CLAIMS["bf16-output"], FP32, ONE_ROUNDING, lambda a, b: 256 * relative(a, b).mean(), UNWEIGHTED),
    Case(CLAIMS["compiled-fp64"], EXACT_NORM, FP32_SUM, largest, norm_inputs(314, 4096, normal), draws=8),
    Case(CLAIMS["compiled-uniform"], HF.replace(x=KEEP), ONE_ROUNDING.replace(x=KEEP), largest, all_uniform),
    Case(CLAIMS["dropped-cast"], HF, ONE_ROUNDING, share, TWO_WEIGHTS),
    Case(CLAIMS["offset-fixed"], *OFFSETS, largest, norm_inputs(128, 4096, normal, uniform, weight_offset=True)),
    Case(CLAIMS["sum-order"], FP32_SUM, grouped(128), share, norm_inputs(512, 4096, near_one)),
    Case(CLAIMS["sum-order-heads"], grouped(1), grouped(128), lambda a, b: relative(a, b).max(), HEADS),
    Case(CLAIMS["bf16-sum-massive"], *RSTDS, outlier_ratio, MASSIVE, draws=4, outputs=False),
    Case(CLAIMS["bf16-sum-outlier"], *RSTDS, outlier_ratio, LARGE, draws=4, outputs=False),
    Case(CLAIMS["bf16-sum-nearest"], EXACT_NORM, BF16_SUM, relative_l1, THREE_SIZES, draws=3),
    Case(CLAIMS["bf16-sum-truncated"], EXACT_NORM, BF16_SUM_TRUNCATED, relative_l1, THREE_SIZES, draws=3),
    Case(CLAIMS["fp32-sum"], EXACT_NORM, FP32_SUM_PRODUCTS, relative_l1, TWO_PRODUCTS, draws=3),
)
