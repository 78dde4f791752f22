"""Cases of casts within one norm: rstd, normed, hidden, the weight offset, the store.

Rounding after the multiplication by rstd or not (`hf` against `one-rounding`) is what many threads met: in one norm it
moves a quarter of the elements, each by one bf16 ulp.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from castpoint.harness.cases.case import Case, Claim, Inputs, Side, Way, count, hidden, printed
from castpoint.harness.cases.figures import largest, largest_relative, mean_abs, relative, share, share_by_row
from castpoint.harness.cases.inputs import calibrated, near_one, norm_inputs, normal, ones, uniform
from castpoint.harness.cases.sums import EXACT_NORM, FP32_SUM
from castpoint.kernels.plan import KEEP, RNE
from castpoint.variants.catalogue import FP32, HF, ONE_ROUNDING, plan_named
from castpoint.variants.spec import applied_weight


def fp8_codes(plan: Side, inputs: Inputs) -> Tensor:
    """The norm's output in FP8 (e4m3), scaled a token at a time so that its largest value becomes 448."""
    value = hidden(plan, **inputs)
    return (value * (448 / value.abs().amax(-1, keepdim=True))).float().to(torch.float8_e4m3fn).double()


def offset_weight(plan: Side, inputs: Inputs) -> Tensor:
    return applied_weight(inputs["weight"], plan)


def eps_kept(x: Tensor, weight: Tensor, eps: float, wide: bool) -> Tensor:
    """A norm in fp32 whose eps, root and reciprocal are fp32 steps, or fp64 rounded once."""
    mean = x.float().square().mean(-1, keepdim=True)
    rstd = (1 / (mean.double() + eps).sqrt()).float() if wide else 1 / (mean + torch.tensor(eps)).sqrt()
    return ((x.float() * rstd) * weight.float()).bfloat16().double()


def at_15_8(rng: torch.Generator, size: int) -> Tensor:
    return torch.full([size], 15.8125).bfloat16()


def all_uniform(rng: torch.Generator) -> list[Inputs]:
    x, residual, weight = uniform(rng, 128, 2048), uniform(rng, 128, 2048), uniform(rng, 2048)
    return [{"x": x, "residual": residual, "weight": weight, "eps": 1e-5}]


def mean_in_256ths(before: Tensor, after: Tensor) -> Tensor:
    return relative(before, after).mean() * 256


OFFSETS = (plan_named("gemma"), plan_named("gemma-bf16-offset"))
BF16_VARIANCE = ONE_ROUNDING.replace(statistics=RNE, variance=RNE)
EPS_FP32 = Way("eps, root and reciprocal in fp32", functools.partial(eps_kept, wide=False))
EPS_FP64 = Way("eps, root and reciprocal in fp64, then fp32", functools.partial(eps_kept, wide=True))
LLADA = norm_inputs(128, 2048, near_one, normal, uniform)

# fmt: off
NORM: tuple[Case, ...] = (
    Case(1, "vllm #42325, #42379", "normed", HF, ONE_ROUNDING,
        "largest difference in one call", "absolute", largest,
        printed("a reproduction prints a maximum of 3.125e-2", 3.125e-2, 1e-5),
        "norm of N(0, 1) with weights near 1, or normal, or uniform: one bf16 ulp of the largest outputs, 4 to 8",
        LLADA),
    Case(1, "vllm #42379", "normed", HF, ONE_ROUNDING,
        "mean difference of an element in one call", "absolute", mean_abs,
        printed("about 0.03 error for every element and layer", 0.03, 0.01),
        "the same norm: 0.03 is what the worst of its elements does, three in four do not differ at all",
        LLADA),
    Case(3, "TensorRT-LLM #14464", "hidden before FP8", ONE_ROUNDING, FP32,
        "FP8 codes that differ", "share", share, Claim("GSM8K falls from 93.0 to 83.5"),
        "N(0, 1) through the norm to e4m3, scaled a token at a time; the benchmark on the checkpoint would decide",
        norm_inputs(128, 2048, near_one), run=fp8_codes),
    Case(4, "verl-omni #637", "normed", HF, ONE_ROUNDING,
        "elements that differ", "share", share, printed("norm and q/k norm are 74 % equal", 0.26, 0.01),
        "N(0, 1), hidden size 2048, weights of the published spread of Qwen3-0.6B's layers 14, 0, 27, or near 1",
        norm_inputs(128, 2048, calibrated(14), calibrated(0), calibrated(27), near_one)),
    Case(6, "vllm #49616, #49639", "normed", HF, ONE_ROUNDING,
        "elements that differ in one row of 4,096", "share", share_by_row, count("1,208 of 4,096 elements", 1208, 4096),
        "single rows of N(0, 1): they share one rstd, so a row's share strays 12 times as far as 4,096 draws would",
        norm_inputs(150, 4096, near_one, normal, uniform), draws=2),
    Case(9, "vllm #53203", "weight offset", *OFFSETS,
        "error of the scale 1 + w at w = 0.05", "relative", largest_relative,
        printed("about 0.3 % scale error at w = 0.05", 0.003, 0.001),
        "1 + w formed in bf16 against fp32, w = 0.05 as bf16 holds it: exact, nothing is drawn",
        lambda rng: [{"weight": torch.tensor([0.05], dtype=torch.bfloat16)}], draws=1, outputs=False, run=offset_weight,
    ),
    Case(9, "vllm #29810", "weight offset", *OFFSETS,
        "outputs that differ where w = 15.8125", "share", share,
        Claim("weights such as 15.8125 make it visible", low=0.0, high=1.0),
        "norm of N(0, 1) with that weight: the scale errs by 0.37 %, 1.2 times as much as at w = 0.05, so it shows in "
        "absolute differences, not in ulps",
        norm_inputs(64, 1024, at_15_8, weight_offset=True)),
    Case(10, "vllm #57123", "rstd", EPS_FP32, EPS_FP64,
        "elements that differ", "share", share, printed("about 1e-5 of the output elements", 1e-5, 1e-5),
        "578 tokens of N(0, 1) of hidden size 4096 a draw, eps 1e-5; a GPU's approximate root would add to it",
        norm_inputs(578, 4096, near_one, normal, eps=1e-5), draws=8),
    Case(12, "vllm #37838", "normed", HF, ONE_ROUNDING,
        "elements that differ when a norm loses its inner rounding", "share", share,
        Claim("a few elements in millions, the compiler removes the rounding", 3e-6, 1e-6, 1e-5),
        "thread not read again; a removed rounding moves a quarter of all elements, a few in millions is what the "
        "order of a sum does (next row)",
        norm_inputs(128, 4096, near_one, uniform)),
    Case(15, "aiter #3806", "statistics, variance", FP32, BF16_VARIANCE,
        "mean distance to fp32 if the variance is formed in bf16", "2^-8 of the value", mean_in_256ths,
        printed("bf16 accumulation: mean 0.36 ulp, max 1.00", 0.36, 0.01),
        "the least bf16 variance there is, squares and mean rounded once, is already farther off than reported",
        norm_inputs(1024, 1024, ones)),
    Case(15, "aiter #3806", "out alone", FP32, ONE_ROUNDING,
        "mean distance to fp32 if nothing but the output is rounded", "2^-8 of the value", mean_in_256ths,
        printed("bf16 accumulation: mean 0.36 ulp, max 1.00", 0.36, 0.01),
        "a correctly rounded norm: 1 / (4 ln 2) = 0.3607 and at most 1, so the figures show no bf16 accumulation",
        norm_inputs(1024, 1024, ones)),
    Case(22, "pytorch #141727", "out", EXACT_NORM, FP32_SUM,
        "largest error against float64", "absolute", largest, printed("0.0311 eager and compiled", 0.0311, 1e-4),
        "the thread's own inputs, x and scale normal, [314, 4096]: half an ulp at 8 to 16, one rounding's all",
        norm_inputs(314, 4096, normal), draws=8),
    Case(22, "pytorch #158699", "normed", HF.replace(x=KEEP), ONE_ROUNDING.replace(x=KEEP),
        "largest difference", "absolute", largest, printed("at most 0.0078, compiled against eager", 0.0078, 1e-4),
        "the thread's own inputs, all uniform in 0 to 1: outputs stay below 2, where one ulp is 0.0078",
        all_uniform),
    Case(22, "pytorch #141727, #158699", "normed", HF, ONE_ROUNDING,
        "elements that differ when Inductor drops the inner cast", "share", share, Claim("2.2 % of the elements"),
        "a dropped inner cast moves a quarter; the passage with 2.2 % was not found again: its inputs would decide",
        norm_inputs(128, 4096, near_one, uniform)),
    Case(27, "Liger-Kernel #1462", "weight offset", *OFFSETS,
        "largest difference, [128, 4096]", "absolute", largest,
        printed("0.0625 before the fix, 0 after it", 0.0625, 1e-4),
        "x normal, w normal or uniform: one ulp at 8 to 16",
        norm_inputs(128, 4096, normal, uniform, weight_offset=True)),
)
# fmt: on
