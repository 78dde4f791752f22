"""Variant: a plan and a way to run it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from castpoint.kernels.config import Config
from castpoint.kernels.norm_qkv import norm_qkv
from castpoint.kernels.plan import CastPlan
from castpoint.variants.eager import Outputs, eager, plan_eager, plan_weight
from castpoint.variants.problem import Problem
from castpoint.variants.spec import check_offset, check_table, spec, with_table

# Compiled once per plan and shape; PyTorch's own limit of 8 is meant for one function, not for a family.
torch._dynamo.config.recompile_limit = 1024

BACKENDS = ("spec", "eager", "triton", "triton-separate", "inductor")


def run_triton(
    plan: CastPlan, problem: Problem, *, qkv_weight: Tensor | None = None, separate: bool = False,
    config: Config | None = None, out: Outputs | None = None,
) -> Outputs:  # fmt: skip
    """q, k, v of the Triton kernels: compiled on a GPU, interpreted on a CPU.

    qkv_weight: plan_weight(plan, problem), if it is at hand. separate: the head norm as a kernel of its own. With
    positions the plan's table is made first, unless the problem brings one: it waits for the GPU.
    config: how the launch is cut into programs, None for the default. Raises ValueError where it cannot express the
    plan (kernels.config.unsupported), or where plan and problem do not fit together.
    """
    check_offset(plan, problem)
    check_table(plan, problem)
    weight = plan_weight(plan, problem) if qkv_weight is None else qkv_weight
    inputs = {**with_table(plan, problem).inputs(), "qkv_weight": weight}
    return norm_qkv(**inputs, plan=plan, separate_head_norm=separate, config=config, out=out)


@functools.cache
def compiled_plan(plan: CastPlan) -> Callable[[Problem, Tensor], Outputs]:
    """plan_eager of that plan through Inductor, its casts kept: emulate_precision_casts forbids Inductor to
    cancel a cast to bf16 and back, which it does by default."""
    function = functools.partial(plan_eager, plan)
    return torch.compile(function, dynamic=False, fullgraph=True, options={"emulate_precision_casts": True})


@functools.cache
def compiled_eager() -> Callable[[Problem], Outputs]:
    """eager through torch.compile as users call it. It cancels roundings of eager: a baseline of speed, not of bits."""
    return torch.compile(eager, dynamic=False, fullgraph=True)


def check_backend(backend: str) -> None:
    """Raises ValueError unless it is one of BACKENDS."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: backends are {', '.join(BACKENDS)}")


def run(plan: CastPlan, problem: Problem, backend: str) -> Outputs:
    """q [T, Hq, Dh], k and v [T, Hkv, Dh] of that plan on one of BACKENDS.

    `spec` returns float64 tensors that hold the stored values; the others bf16, or float32 for plan.out='fp32'.
    Raises ValueError for an unknown backend or a plan and problem that do not fit together.
    """
    check_backend(backend)
    if backend == "spec":
        chain = spec(plan, problem)
        return chain.q, chain.k, chain.v
    if backend == "eager":
        check_offset(plan, problem)
        check_table(plan, problem)
        return plan_eager(plan, problem, plan_weight(plan, problem))
    if backend in ("triton", "triton-separate"):
        return run_triton(plan, problem, separate=backend == "triton-separate")
    check_offset(plan, problem)
    check_table(plan, problem)
    return compiled_plan(plan)(with_table(plan, problem), plan_weight(plan, problem))
