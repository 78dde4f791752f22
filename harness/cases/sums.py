"""Cases of the sum of squares: its order and its precision, which no cast plan says.

An fp32 sum in another order moves a few elements in millions. A sum carried in bf16 stalls: beside 256, 1 is half an
ulp.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from castpoint.harness.cases.case import Case, Claim, Inputs, Way, printed
from castpoint.harness.cases.figures import largest_relative, relative_l1, share
from castpoint.harness.cases.inputs import near_one, norm_inputs, normal
from castpoint.kernels.plan import KEEP, RNE, RTZ
from castpoint.variants.spec import round_to, store


def norm_of_sum(sum_of_squares: Callable[[Tensor], Tensor], store_as: tuple[str, str, str]) -> Callable[..., Tensor]:
    """A norm from a way to sum squares; rstd, normed and output stored as store_as says, unless inputs name `products`,
    which then says it for the last two."""

    def run(x: Tensor, weight: Tensor, eps: float = 1e-5, products: str | None = None) -> Tensor:
        x, weight = x.double(), weight.double()
        normed, out = (products, products) if products else store_as[1:]
        rstd = store((sum_of_squares(x) / x.shape[-1] + eps).rsqrt(), store_as[0])
        return store(store(x * rstd, normed) * weight, out)

    return run


def exact_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, **_: object) -> Tensor:
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


def exact_sum(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True)


def fp32_sum(groups: int, x: Tensor) -> Tensor:
    """Sum of squares in fp32: within each of 2^k groups of neighbours from left to right, then the groups in pairs."""
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


def outlier_inputs(outlier: float) -> Callable[..., list[Inputs]]:
    """x ~ N(0, 1) [512, D], D = 5376 or 1024; every other token has one channel of that size, anywhere."""

    def draw(rng: torch.Generator) -> list[Inputs]:
        setups = []
        for size in (5376, 1024):
            x = normal(rng, 512, size)
            x[range(1, 512, 2), torch.randint(size, (256,), generator=rng)] = outlier
            setups.append({"x": x})
        return setups

    return draw


def grouped(groups: int) -> Way:
    """A norm with one rounding whose squares are summed in that many groups."""
    run = norm_of_sum(functools.partial(fp32_sum, groups), (KEEP, KEEP, RNE))
    return Way(f"squares summed in fp32 in {groups} groups", run)


def three_sizes(rng: torch.Generator) -> list[Inputs]:
    """x and weight ~ N(0, 1), [64, D] and [D], for three D."""
    return [{"x": normal(rng, 64, size), "weight": normal(rng, size), "eps": 1e-5} for size in (2048, 1024, 4096)]


def two_products(rng: torch.Generator) -> list[Inputs]:
    return [{"x": normal(rng, 64, 2048), "weight": normal(rng, 2048), "products": kind} for kind in (RTZ, RNE)]


FP32_SUM = Way("sum of squares exact, one rounding", norm_of_sum(exact_sum, (KEEP, KEEP, RNE)))
FP32_SUM_PRODUCTS = Way("sum of squares in fp32, products in bf16", norm_of_sum(exact_sum, (KEEP, RTZ, RTZ)))
EXACT_NORM = Way("float64", exact_norm)
BF16_SUM, BF16_SUM_TRUNCATED = (
    Way(f"squares and sums in bf16 {how}, 16 lanes", norm_of_sum(functools.partial(bf16_sum, mode), (mode, mode, mode)))
    for how, mode in (("to nearest", RNE), ("truncated", RTZ))
)
RSTD_OF_EXACT_SUM = Way("rstd, squares summed exactly", lambda x: (exact_sum(x.double()) / x.shape[-1] + 1e-6).rsqrt())
RSTD_OF_BF16_SUM = Way(
    "rstd, squares and sums in bf16, 16 lanes", lambda x: (bf16_sum(RNE, x) / x.shape[-1] + 1e-6).rsqrt()
)

# fmt: off
SUMS: tuple[Case, ...] = (
    Case(12, "vllm #37838", "order of the sum", FP32_SUM, grouped(128),
        "elements that differ when only the order of the sum changes", "share", share,
        Claim("a few elements in millions", 3e-6, 1e-6, 1e-5),
        "one norm of N(0, 1) [512, 4096], no boundary moved",
        norm_inputs(512, 4096, near_one)),
    Case(20, "sglang #27540", "sum of squares", RSTD_OF_EXACT_SUM, RSTD_OF_BF16_SUM,
        "rstd's error on tokens with a massive activation over that on others", "ratio", outlier_ratio,
        Claim("massive activations cost a bf16 sum of squares its precision", low=1.0, high=math.inf),
        "one channel of 1,800 times the rms, as a public sample of Qwen2.5 has it: its square outweighs all that the "
        "sum loses, so such tokens err less",
        outlier_inputs(1800.0), draws=4, outputs=False),
    Case(20, "sglang #27540", "sum of squares", RSTD_OF_EXACT_SUM, RSTD_OF_BF16_SUM,
        "rstd's error on tokens with an outlier of 32 times the rms over that on others", "ratio", outlier_ratio,
        Claim("massive activations cost a bf16 sum of squares its precision", low=1.0, high=math.inf),
        "the same with outliers too small to be called massive: they swallow what is added to them, and do cost",
        outlier_inputs(32.0), draws=4, outputs=False),
    Case(25, "Megatron-LM #6459", "order of the sum", grouped(1), grouped(128),
        "largest relative difference", "relative", largest_relative,
        Claim("within one ulp, at most 7.6e-3", 7.6e-3, 0.0, 7.65e-3),
        "512 tokens, 16 heads of 128: one ulp of a few elements; a moved cast stays at 7.8e-3 too, in a quarter of the "
        "elements, so this bound tells no order of sums from an order of casts",
        norm_inputs(512 * 16, 128, near_one)),
    Case(29, "mlir-air #1679", "sum of squares", EXACT_NORM, BF16_SUM,
        "relative L1 error, sum of squares in bf16 to nearest", "relative L1", relative_l1,
        printed("6.9e-2 with the sum in bf16", 6.9e-2, 1e-3),
        "x and w normal, hidden size 2048, 1024 or 4096: rounding to nearest is an order of magnitude short",
        three_sizes, draws=3),
    Case(29, "mlir-air #1679", "sum of squares", EXACT_NORM, BF16_SUM_TRUNCATED,
        "relative L1 error, sum of squares in bf16 truncated", "relative L1", relative_l1,
        printed("6.9e-2 with the sum in bf16", 6.9e-2, 1e-3),
        "the same with truncation, that hardware's default: the loss is the rounding mode's at least as much",
        three_sizes, draws=3),
    Case(29, "mlir-air #1679", "sum of squares", EXACT_NORM, FP32_SUM_PRODUCTS,
        "relative L1 error, sum of squares in fp32", "relative L1", relative_l1,
        printed("4.2e-3 with the sum in fp32", 4.2e-3, 1e-4),
        "hidden size 2048, both products truncated like the hardware's default, or to nearest, which makes 1.9e-3",
        two_products, draws=3),
)
# fmt: on
