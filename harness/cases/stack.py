"""Cases of many layers: how the error of a residual stream grows with depth.

A step of the drawn stack is stream + W norm(stream); a side makes it by a plan's spec, in float64 or over
tensor-parallel ranks. Such layers hardly amplify an error: a claim about a trained model cannot be decided on them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from castpoint.harness.cases.case import Case, Claim, Inputs, Side, Way, hidden
from castpoint.harness.cases.figures import exponent
from castpoint.harness.cases.inputs import near_one, normal
from castpoint.harness.problems.drawn import residual_std, residual_stream
from castpoint.kernels.plan import KEEP, RNE, CastPlan
from castpoint.variants.catalogue import HF, ONE_ROUNDING
from castpoint.variants.problem import Problem
from castpoint.variants.spec import spec, store


def exact_step(stream: Tensor, weight: Tensor, projection: Tensor, scale: float = 1.0) -> Tensor:
    """stream + scale * W norm(stream) in float64. [T, D], [D], [D, D]."""
    normed = stream * (stream.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    return stream + scale * (normed @ projection.double().T)


def plan_step(plan: CastPlan, stream: Tensor, weight: Tensor, projection: Tensor) -> Tensor:
    """The same by the plan's spec: W norm(stream) stored as proj, the sum as x."""
    problem = Problem(stream.bfloat16(), weight, projection, num_q_heads=2, num_kv_heads=1)
    return store(stream + spec(plan, problem).proj.flatten(1), plan.x)


def parallel_step(stream: Tensor, weight: Tensor, projection: Tensor, storage: str) -> Tensor:
    """The same over 8 tensor-parallel ranks: each rank's part of W norm(stream) stored, their sum rounded to bf16."""
    normed = hidden(ONE_ROUNDING, x=stream.bfloat16(), weight=weight)
    parts = zip(normed.chunk(8, -1), projection.double().chunk(8, -1), strict=True)
    return store(stream + store(sum(store(h @ w.T, storage) for h, w in parts), RNE), RNE)


def stack(side: Side, inputs: Inputs) -> Tensor:
    """The residual stream after each of L steps, [L, T, D]. A Way's function is its step."""
    step = side.run if isinstance(side, Way) else functools.partial(plan_step, side)
    streams = [inputs["x"].double()]
    for weight, projection in zip(inputs["norms"], inputs["projections"], strict=True):
        streams.append(step(streams[-1], weight, projection))
    return torch.stack(streams[1:])


def stack_errors(side: Side, inputs: Inputs) -> Tensor:
    """The side's stream less the float64 one's, [L, T, D]."""
    return stack(side, inputs) - stack(EXACT_STEP, inputs)


def stack_inputs(
    layers: int, *, published: bool = False, massive: bool = False, tokens: int = 16, size: int = 256
) -> Callable[..., list[Inputs]]:
    """Inputs of a stack. Deltas keep the size of the first stream; published: they let the stream grow as
    Qwen3-0.6B's; massive: the stream of its layer 8, whose first token and four channels stand out."""

    def draw(rng: torch.Generator) -> list[Inputs]:
        sizes = [residual_std(layer) if published else 1.0 for layer in range(layers + 1)]
        steps = [math.sqrt(b * b - a * a) if published else 1.0 for a, b in zip(sizes, sizes[1:], strict=False)]
        x = normal(rng, tokens, size, scale=sizes[0])
        if massive:
            x = residual_stream(tokens, size, 8, rng)
            steps = [x.double()[1:].square().mean().sqrt().item()] * layers
        norms = [near_one(rng, size) for _ in steps]
        projections = [normal(rng, size, size, scale=step / math.sqrt(size)) for step in steps]
        return [{"x": x, "norms": norms, "projections": projections}]

    return draw


def depth_exponent(errors: Tensor) -> float:
    return exponent(errors.square().mean((1, 2)).sqrt())


def apart(before: Tensor, after: Tensor) -> Tensor:
    """1 - mean cosine of the tokens after each step, [L]."""
    return 1 - torch.cosine_similarity(before, after, dim=-1).mean(-1)


EXACT_STEP = Way("every step in float64", exact_step)
SCALED_STEP = Way("every norm 0.3 % too large, nothing rounded", functools.partial(exact_step, scale=1.003))
RANKS_KEPT, RANKS_STORED = (
    Way(f"8 ranks' parts {how}", functools.partial(parallel_step, storage=storage))
    for how, storage in (("kept in fp32", KEEP), ("stored in bf16", RNE))
)
RSTD_ROUNDED = ONE_ROUNDING.replace(rstd=RNE, normed=RNE)

# fmt: off
STACK: tuple[Case, ...] = (
    Case(5, "TransformerEngine #1132, transformers #33133", "normed", HF, ONE_ROUNDING,
        "elements of the stream that differ by more than 0.01 after 27 layers", "share",
        lambda a, b: ((b[-1] - a[-1]).abs() > 0.01).double().mean(),
        Claim("80 % of hidden values differ by more than 0.01"),
        "a drawn stack whose stream grows as Qwen3-0.6B's; the share follows its size, so Llama 3 would decide",
        stack_inputs(27, published=True), draws=2, run=stack, grow=lambda a, b: depth_exponent(b - a)),
    Case(16, "TransformerEngine #1761", "all-reduce", RANKS_KEPT, RANKS_STORED,
        "relative rms difference of the stream after 32 layers", "relative",
        lambda a, b: (b[-1] - a[-1]).square().mean().sqrt() / a[-1].square().mean().sqrt(),
        Claim("an average logit error of 15 % between TP degrees"),
        "a drawn stack, whose layers hardly amplify; logits of a checkpoint at two TP degrees would decide",
        stack_inputs(32), draws=2, run=stack, grow=lambda a, b: depth_exponent(b - a)),
    Case(17, "amd/IRON #139", "rstd, normed", ONE_ROUNDING, RSTD_ROUNDED,
        "exponent of the error's growth with depth, rstd in bf16", "exponent", lambda a, b: depth_exponent(b),
        Claim("with rstd in bf16 the error grows linearly with depth", 1.0, 0.75, 1.25),
        "rms error against float64 over 36 additions of a drawn stack; halfway to a square root counts as linear",
        stack_inputs(36), draws=3, outputs=False, run=stack_errors, grow=lambda a, b: depth_exponent(b)),
    Case(17, "amd/IRON #139", "rstd, normed", ONE_ROUNDING, RSTD_ROUNDED,
        "what rounding rstd adds to that exponent", "exponent",
        lambda a, b: depth_exponent(b) - depth_exponent(a),
        Claim("without it the error grows as the root of depth: half less", 0.5, 0.25, 0.75),
        "the same stack with and without: rounding the stream itself, which grows as a root, is linear already",
        stack_inputs(36), draws=3, outputs=False, run=stack_errors, grow=lambda a, b: depth_exponent(a)),
    Case(17, "amd/IRON #139", "rstd", EXACT_STEP, SCALED_STEP,
        "exponent of the growth of a coherent error of rstd alone", "exponent", lambda a, b: depth_exponent(b),
        Claim("an error of one direction in every norm adds up linearly", 1.0, 0.75, 1.25),
        "the same stack: the error stays the same share of a stream whose drawn deltas do not line up",
        stack_inputs(36), draws=3, outputs=False, run=stack_errors, grow=lambda a, b: depth_exponent(b)),
    Case(20, "sglang #27540", "statistics, variance", HF, HF.replace(statistics=RNE, variance=RNE),
        "1 - mean cosine of the streams after 58 layers", "1 - cosine", lambda a, b: apart(a, b)[-1],
        Claim("cosine per layer falls from 0.913 to 0.513"),
        "a drawn stack with massive activations; an error of rstd is a common factor: gemma-4 itself would decide",
        stack_inputs(58, massive=True), draws=1, run=stack, grow=lambda a, b: exponent(apart(a, b))),
)
# fmt: on
