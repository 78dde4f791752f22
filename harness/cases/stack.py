"""Cases of many layers: how the error of a residual stream grows with depth.

A step of the drawn stack is stream + W norm(stream); a side makes it by a plan's spec, in float64 or over
tensor-parallel ranks. Such layers hardly amplify an error: a claim about a trained model cannot be decided on them.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from castpoint.harness.cases.case import CLAIMS, Case, Draw, Inputs, Side, Way, hidden
from castpoint.harness.cases.figures import exponent
from castpoint.harness.cases.inputs import near_one, normal
from castpoint.harness.cases.norm import exact_norm
from castpoint.harness.problems.drawn import residual_std, residual_stream
from castpoint.kernels.plan import KEEP, RNE, CastPlan
from castpoint.variants.catalogue import HF, ONE_ROUNDING
from castpoint.variants.problem import Problem
from castpoint.variants.spec import spec, store


def exact_step(stream: Tensor, weight: Tensor, projection: Tensor, scale: float = 1.0) -> Tensor:
    """stream + scale * W norm(stream) in float64. [T, D], [D], [D, D]."""
    return stream + scale * (exact_norm(stream, weight, eps=1e-6) @ projection.double().T)


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


def stack_inputs(layers: int, *, published: bool = False, massive: bool = False) -> Draw:
    """Inputs of a stack, T = 16, D = 256. Deltas keep the size of the first stream; published: they let the stream
    grow as Qwen3-0.6B's; massive: the stream of its layer 8, whose first token and four channels stand out."""

    def draw(rng: torch.Generator) -> list[Inputs]:
        sizes = [residual_std(layer) if published else 1.0 for layer in range(layers + 1)]
        steps = [math.sqrt(b * b - a * a) if published else 1.0 for a, b in zip(sizes, sizes[1:], strict=False)]
        x = normal(rng, 16, 256, scale=sizes[0])
        if massive:
            x = residual_stream(16, 256, 8, rng)
            steps = [x.double()[1:].square().mean().sqrt().item()] * layers
        norms = [near_one(rng, 256) for _ in steps]
        projections = [normal(rng, 256, 256, scale=step / 16) for step in steps]  # by the root of D
        return [{"x": x, "norms": norms, "projections": projections}]

    return draw


def rms(errors: Tensor) -> Tensor:
    """Of each step's [T, D], [L]."""
    return errors.square().mean((1, 2)).sqrt()


def growth(errors: Tensor) -> float:
    return exponent(rms(errors))


def far_apart(before: Tensor, after: Tensor) -> Tensor:
    """Share of the last stream's elements that differ by more than 0.01."""
    return ((after[-1] - before[-1]).abs() > 0.01).double().mean()


def apart(before: Tensor, after: Tensor) -> Tensor:
    """1 - mean cosine of the tokens after each step, [L]."""
    return 1 - torch.cosine_similarity(before, after, dim=-1).mean(-1)


EXACT_STEP = Way("every step in float64", exact_step)
SCALED_STEP = Way("every norm 0.3 % too large, nothing rounded", functools.partial(exact_step, scale=1.003))
RANKS_KEPT = Way("8 ranks' parts kept in fp32", functools.partial(parallel_step, storage=KEEP))
RANKS_STORED = Way("8 ranks' parts stored in bf16", functools.partial(parallel_step, storage=RNE))
RSTD = (ONE_ROUNDING, ONE_ROUNDING.replace(rstd=RNE, normed=RNE))
VARIANCE = (HF, HF.replace(statistics=RNE, variance=RNE))
DEEP, MASSIVE = stack_inputs(32), stack_inputs(58, massive=True)
STREAMS = {"draws": 2, "run": stack, "grow": lambda a, b: rms(b - a)}
ERRORS = {"draw": stack_inputs(36), "draws": 3, "outputs": False, "run": stack_errors}

STACK: tuple[Case, ...] = (
    Case(CLAIMS["llama-stream"], HF, ONE_ROUNDING, far_apart, stack_inputs(27, published=True), **STREAMS),
    Case(CLAIMS["tp-stream"], RANKS_KEPT, RANKS_STORED, lambda a, b: rms(b - a)[-1] / rms(a)[-1], DEEP, **STREAMS),
    Case(CLAIMS["rstd-depth"], *RSTD, lambda a, b: growth(b), **ERRORS, grow=lambda a, b: rms(b)),
    Case(CLAIMS["rstd-added"], *RSTD, lambda a, b: growth(b) - growth(a), **ERRORS, grow=lambda a, b: rms(a)),
    Case(CLAIMS["rstd-coherent"], EXACT_STEP, SCALED_STEP, lambda a, b: growth(b), **ERRORS, grow=lambda a, b: rms(b)),
    Case(CLAIMS["gemma-stream"], *VARIANCE, lambda a, b: apart(a, b)[-1], MASSIVE, draws=1, run=stack, grow=apart),
)
