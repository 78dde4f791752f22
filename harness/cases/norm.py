"""Cases of casts within one norm: rstd, normed, hidden, the weight offset, the store.

Rounding after the multiplication by rstd or not (`hf` against `one-rounding`) is what many threads met: in one norm it
moves a quarter of the elements, each by one bf16 ulp.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from castpoint.harness.cases.case import Case, Claim, Figure, Inputs, Side, Thread, Way, count, hidden, printed
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


def mean_in_256ths(before: Tensor, after: Tensor) -> Tensor:
    return relative(before, after).mean() * 256


BF16_VARIANCE = ONE_ROUNDING.replace(statistics=RNE, variance=RNE)
LLADA = norm_inputs(128, 2048, near_one, normal, uniform)

NORM: tuple[Case, ...] = (
    Case(
        Thread(1, "vllm #42325, #42379", "normed"),
        sides=(HF, ONE_ROUNDING),
        figure=Figure("largest difference in one call", "absolute", largest),
        claim=printed("a reproduction prints a maximum of 3.125e-2", 3.125e-2, 1e-5),
        why="norm of N(0, 1) with weights near 1, or normal, or uniform: one bf16 ulp of the largest outputs, 4 to 8",
        draw=LLADA,
    ),
    Case(
        Thread(1, "vllm #42379", "normed"),
        sides=(HF, ONE_ROUNDING),
        figure=Figure("mean difference of an element in one call", "absolute", mean_abs),
        claim=printed("about 0.03 error for every element and layer", 0.03, 0.01),
        why="the same norm: 0.03 is what the worst of its elements does, three in four do not differ at all",
        draw=LLADA,
    ),
    Case(
        Thread(3, "TensorRT-LLM #14464", "hidden before FP8"),
        sides=(ONE_ROUNDING, FP32),
        figure=Figure("FP8 codes that differ", "share", share),
        claim=Claim("GSM8K falls from 93.0 to 83.5"),
        why="N(0, 1) through the norm to e4m3, scaled a token at a time; the benchmark on the checkpoint would decide",
        draw=norm_inputs(128, 2048, near_one),
        run=fp8_codes,
    ),
    Case(
        Thread(4, "verl-omni #637", "normed"),
        sides=(HF, ONE_ROUNDING),
        figure=Figure("elements that differ", "share", share),
        claim=printed("norm and q/k norm are 74 % equal", 0.26, 0.01),
        why="N(0, 1), hidden size 2048, weights of the published spread of Qwen3-0.6B's layers 14, 0, 27, or near 1",
        draw=norm_inputs(128, 2048, calibrated(14), calibrated(0), calibrated(27), near_one),
    ),
    Case(
        Thread(6, "vllm #49616, #49639", "normed"),
        sides=(HF, ONE_ROUNDING),
        figure=Figure("elements that differ in one row of 4,096", "share", share_by_row),
        claim=count("1,208 of 4,096 elements", 1208, 4096),
        why="single rows of N(0, 1): they share one rstd, so a row's share strays 12 times as far as 4,096 draws would",
        draw=norm_inputs(150, 4096, near_one, normal, uniform),
        draws=2,
    ),
    Case(
        Thread(9, "vllm #53203", "weight offset"),
        sides=(plan_named("gemma"), plan_named("gemma-bf16-offset")),
        figure=Figure("error of the scale 1 + w at w = 0.05", "relative", largest_relative),
        claim=printed("about 0.3 % scale error at w = 0.05", 0.003, 0.001),
        why="1 + w formed in bf16 against fp32, w = 0.05 as bf16 holds it: exact, nothing is drawn",
        draw=lambda rng: [{"weight": torch.tensor([0.05], dtype=torch.bfloat16)}],
        draws=1,
        outputs=False,
        run=offset_weight,
    ),
    Case(
        Thread(9, "vllm #29810", "weight offset"),
        sides=(plan_named("gemma"), plan_named("gemma-bf16-offset")),
        figure=Figure("outputs that differ where w = 15.8125", "share", share),
        claim=Claim("weights such as 15.8125 make it visible", low=0.0, high=1.0),
        why="norm of N(0, 1) with that weight: the scale errs by 0.37 %, 1.2 times as much as at w = 0.05, so it shows "
        "in absolute differences, not in ulps",
        draw=lambda rng: [
            {"x": normal(rng, 64, 1024), "weight": torch.full([1024], 15.8125).bfloat16(), "weight_offset": True}
        ],
    ),
    Case(
        Thread(10, "vllm #57123", "rstd"),
        sides=(
            Way("eps, root and reciprocal in fp32", functools.partial(eps_kept, wide=False)),
            Way("eps, root and reciprocal in fp64, then fp32", functools.partial(eps_kept, wide=True)),
        ),
        figure=Figure("elements that differ", "share", share),
        claim=printed("about 1e-5 of the output elements", 1e-5, 1e-5),
        why="578 tokens of N(0, 1) of hidden size 4096 a draw, eps 1e-5; a GPU's approximate root would add to it",
        draw=norm_inputs(578, 4096, near_one, normal, eps=1e-5),
        draws=8,
    ),
    Case(
        Thread(12, "vllm #37838", "normed"),
        sides=(HF, ONE_ROUNDING),
        figure=Figure("elements that differ when a norm loses its inner rounding", "share", share),
        claim=Claim("a few elements in millions, the compiler removes the rounding", 3e-6, 1e-6, 1e-5),
        why="thread not read again; a removed rounding moves a quarter of all elements, a few in millions is what the "
        "order of a sum does (next row)",
        draw=norm_inputs(128, 4096, near_one, uniform),
    ),
    Case(
        Thread(15, "aiter #3806", "statistics, variance"),
        sides=(FP32, BF16_VARIANCE),
        figure=Figure("mean distance to fp32 if the variance is formed in bf16", "2^-8 of the value", mean_in_256ths),
        claim=printed("bf16 accumulation: mean 0.36 ulp, max 1.00", 0.36, 0.01),
        why="the least bf16 variance there is, squares and mean rounded once, is already farther off than reported",
        draw=norm_inputs(1024, 1024, ones),
    ),
    Case(
        Thread(15, "aiter #3806", "out alone"),
        sides=(FP32, ONE_ROUNDING),
        figure=Figure(
            "mean distance to fp32 if nothing but the output is rounded", "2^-8 of the value", mean_in_256ths
        ),
        claim=printed("bf16 accumulation: mean 0.36 ulp, max 1.00", 0.36, 0.01),
        why="a correctly rounded norm: 1 / (4 ln 2) = 0.3607 and at most 1, so the figures show no bf16 accumulation",
        draw=norm_inputs(1024, 1024, ones),
    ),
    Case(
        Thread(22, "pytorch #141727", "out"),
        sides=(EXACT_NORM, FP32_SUM),
        figure=Figure("largest error against float64", "absolute", largest),
        claim=printed("0.0311 eager and compiled", 0.0311, 1e-4),
        why="the thread's own inputs, x and scale normal, [314, 4096]: half an ulp at 8 to 16, one rounding's all",
        draw=norm_inputs(314, 4096, normal),
        draws=8,
    ),
    Case(
        Thread(22, "pytorch #158699", "normed"),
        sides=(HF.replace(x=KEEP), ONE_ROUNDING.replace(x=KEEP)),
        figure=Figure("largest difference", "absolute", largest),
        claim=printed("at most 0.0078, compiled against eager", 0.0078, 1e-4),
        why="the thread's own inputs, all uniform in 0 to 1: outputs stay below 2, where one ulp is 0.0078",
        draw=lambda rng: [
            {
                "x": uniform(rng, 128, 2048),
                "residual": uniform(rng, 128, 2048),
                "weight": uniform(rng, 2048),
                "eps": 1e-5,
            }
        ],
    ),
    Case(
        Thread(22, "pytorch #141727, #158699", "normed"),
        sides=(HF, ONE_ROUNDING),
        figure=Figure("elements that differ when Inductor drops the inner cast", "share", share),
        claim=Claim("2.2 % of the elements"),
        why="a dropped inner cast moves a quarter; the passage with 2.2 % was not found again: its inputs would decide",
        draw=norm_inputs(128, 4096, near_one, uniform),
    ),
    Case(
        Thread(27, "Liger-Kernel #1462", "weight offset"),
        sides=(plan_named("gemma"), plan_named("gemma-bf16-offset")),
        figure=Figure("largest difference, [128, 4096]", "absolute", largest),
        claim=printed("0.0625 before the fix, 0 after it", 0.0625, 1e-4),
        why="x normal, w normal or uniform: one ulp at 8 to 16",
        draw=norm_inputs(128, 4096, normal, uniform, weight_offset=True),
    ),
)
