"""Two ways to run the chain in ordinary PyTorch arithmetic.

eager       the bf16 path as Hugging Face runs that architecture: Qwen3 and Qwen2, or Gemma 3 where norm
            weights are stored as w - 1; rotated by apply_rotary_pos_emb where there are positions. The
            yardstick of every table.
plan_eager  any plan, its roundings as casts and everything between them in fp32. What Inductor compiles.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from castpoint.kernels.norm_qkv import fold_norm_weight
from castpoint.kernels.plan import CastPlan
from castpoint.variants.catalogue import plan_named
from castpoint.variants.problem import Problem, rotate_half
from castpoint.variants.spec import round_to, truncate_tf32, with_table

Outputs = tuple[Tensor, Tensor, Tensor]


def eager_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: bool) -> Tensor:
    """Qwen3RMSNorm.forward, or Gemma3RMSNorm.forward for weights stored as w - 1 (transformers 5). Any shape, bf16."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight_offset:
        return (normed * (1.0 + weight.float())).type_as(x)
    return weight * normed.to(x.dtype)


def eager_plan(problem: Problem) -> str:
    """The plan that Hugging Face's code for this way of storing norm weights implements."""
    return "gemma" if problem.weight_offset else "hf"


def rope_table(problem: Problem) -> tuple[Tensor, Tensor] | None:
    """cos and sin of each token [T, 1, Dh] in bf16, which a model makes once for all its layers; None: no positions."""
    if problem.positions is None:
        return None
    cos, sin = with_table(plan_named(eager_plan(problem)), problem).cos_sin()
    return cos.to(torch.bfloat16), sin.to(torch.bfloat16)


def eager(problem: Problem, proj_only: bool = False, table: tuple[Tensor, Tensor] | None = None) -> Outputs:
    """q [T, Hq, Dh], k [T, Hkv, Dh], v [T, Hkv, Dh] bf16, as Hugging Face computes them on this device.

    One fused projection instead of three: the same dot products, whose order of summation is the BLAS's business.
    proj_only leaves out the head norm and RoPE. table: rope_table(problem), if it is at hand.
    """
    p = problem
    x = p.x if p.residual is None else p.x + p.residual
    hidden = eager_norm(x, p.norm_weight, p.eps, p.weight_offset)
    q, k, v = p.split_heads(F.linear(hidden, p.qkv_weight, p.bias))
    if proj_only:
        return q, k, v
    if weights := p.head_weights:
        q, k = (eager_norm(value, w, p.eps, p.weight_offset) for value, w in zip((q, k), weights, strict=True))
    if p.positions is not None and (table := table or rope_table(p)):
        cos, sin = table
        q, k = (value * cos + rotate_half(value) * sin for value in (q, k))
    return q, k, v


def plan_weight(plan: CastPlan, problem: Problem) -> Tensor:
    """The QKV weight as the plan stores it: folded ahead of time for scale='folded', else as it is."""
    if plan.scale == "folded":
        return fold_norm_weight(problem.qkv_weight, problem.norm_weight, plan)
    return problem.qkv_weight


def plan_eager(plan: CastPlan, problem: Problem, qkv_weight: Tensor) -> Outputs:
    """q, k, v of that plan in fp32 arithmetic; qkv_weight is plan_weight(plan, problem). With positions and
    without a table the plan's is made; Inductor takes a problem with_table.

    A bf16 matmul whose result is rounded anyway is one bf16 matmul. Where its fp32 accumulator is kept, the
    operands are widened, because PyTorch's bf16 matmul on CPUs returns bf16 only.
    """
    p = with_table(plan, problem)
    x = p.x.float()
    if p.residual is not None:
        x = round_to(x + p.residual.float(), plan.x)
    rstd = _rstd(x, plan, p.eps, plan.rstd)
    hidden = x
    if plan.scale == "prologue":
        hidden = round_to(hidden * rstd, plan.normed)
    if plan.scale != "folded":
        hidden = round_to(hidden * _applied_weight(p.norm_weight, plan), plan.hidden)
    proj = _project(plan, hidden, qkv_weight, rstd, p.bias)
    q, k, v = p.split_heads(proj)
    if weights := p.head_weights:
        q, k = (_head_norm(value, weight, plan, p.eps) for value, weight in zip((q, k), weights, strict=True))
    if p.positions is not None:
        q, k = (_rotated(value, p, plan) for value in (q, k))
    dtype = torch.float32 if plan.out == "fp32" else torch.bfloat16
    q, k, v = (round_to(value, plan.out).to(dtype) for value in (q, k, v))
    return q, k, v


def _rstd(value: Tensor, plan: CastPlan, eps: float, storage: str) -> Tensor:
    variance = round_to(round_to(value * value, plan.statistics).mean(-1, keepdim=True), plan.variance)
    return round_to(torch.rsqrt(variance + eps), storage)


def _applied_weight(weight: Tensor, plan: CastPlan) -> Tensor:
    weight = weight.float()
    return weight if plan.weight_offset == "none" else round_to(1 + weight, plan.weight_offset)


def _head_norm(proj: Tensor, weight: Tensor, plan: CastPlan, eps: float) -> Tensor:
    head_normed = round_to(proj * _rstd(proj, plan, eps, plan.head_rstd), plan.head_normed)
    return head_normed * _applied_weight(weight, plan)


def _rotated(value: Tensor, p: Problem, plan: CastPlan) -> Tensor:
    value = round_to(value, plan.unrotated)
    cos, sin = (round_to(factor.float(), plan.cos_sin) for factor in p.cos_sin())
    return round_to(value * cos, plan.products) + round_to(rotate_half(value) * sin, plan.products)


def _project(plan: CastPlan, hidden: Tensor, weight: Tensor, rstd: Tensor, bias: Tensor | None) -> Tensor:
    if plan.matmul == "bf16" and plan.proj == "bf16-rne" and plan.scale == "prologue":
        return F.linear(hidden.bfloat16(), weight, bias).float()
    wide = weight.float()
    if plan.matmul == "tf32":
        proj = truncate_tf32(hidden) @ wide.T
    elif plan.matmul == "tf32x3":
        high = truncate_tf32(hidden)
        proj = high @ wide.T + truncate_tf32(hidden - high) @ wide.T
    else:
        proj = hidden @ wide.T
    if plan.scale != "prologue":
        proj = proj * rstd
    if bias is not None:
        proj = proj + bias.float()
    return round_to(proj, plan.proj)
