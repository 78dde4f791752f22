"""The spec: what a plan means, in plain PyTorch, on any device; and the truth, the chain in float64.

The plan's roundings are made exactly. Everything between them (reductions, rsqrt, dot products) is
computed in float64 and rounded once to float32. So a spec depends on no order of summation, and

    spec(plan) - truth          is the cost of the plan's boundaries,
    implementation - spec(plan) is order of summation and approximate instructions.

Values are carried as float64 tensors that hold float32 or bf16 values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from castpoint.kernels.plan import KEEP, PHASE_BOUNDARIES, RNE, RTZ, CastPlan
from castpoint.variants import rope
from castpoint.variants.problem import Problem, both_halves, rotate_half
from castpoint.variants.rope import Store

TF32_MASK = -(1 << 13)  # keeps sign, exponent and 10 of 23 bits of mantissa
BF16_MASK = -(1 << 16)
Rotated = TypeVar("Rotated", bound=Problem)


@dataclass(frozen=True)
class Chain:
    """Every value of the chain, float64. Head values are None for a model without head norm."""

    x: Tensor  # [T, D]
    variance: Tensor  # [T, 1]
    rstd: Tensor  # [T, 1]
    normed: Tensor | None  # [T, D]; None where rstd is applied after the matmul
    hidden: Tensor  # [T, D]
    product: Tensor  # [T, H * Dh], hidden @ W^T as the operands' precision has it, before rstd where that is deferred
    proj: Tensor  # [T, H, Dh]
    head_rstd: Tensor | None  # [T, Hq + Hkv, 1]
    head_normed: Tensor | None  # [T, Hq + Hkv, Dh]
    q: Tensor  # [T, Hq, Dh]
    k: Tensor  # [T, Hkv, Dh]
    v: Tensor  # [T, Hkv, Dh]

    def outputs(self) -> dict[str, Tensor]:
        return {"q": self.q, "k": self.k, "v": self.v}


def round_to(value: Tensor, storage: str) -> Tensor:
    """float32 tensor as that storage type holds it, in float32; NaN stays NaN under truncation too."""
    if storage == KEEP:
        return value
    if storage == RNE:
        return value.to(torch.bfloat16).to(torch.float32)
    return _masked(value, BF16_MASK) if storage == RTZ else _half(value, storage)


def _half(value: Tensor, storage: str) -> Tensor:
    """`fp16-rne` and `fp16-rtz`, which no plan has: envelopes of other people's kernels do."""
    half = value.half()
    if storage == "fp16-rtz":
        half = torch.where(half.float().abs() > value.abs(), half.nextafter(torch.zeros_like(half)), half)
    return half.float()


def truncate_tf32(value: Tensor) -> Tensor:
    """float32 tensor with its mantissa cut to tf32's 10 bits, in float32."""
    return _masked(value, TF32_MASK)


def _masked(value: Tensor, mask: int) -> Tensor:
    return torch.where(value.isnan(), value, (value.view(torch.int32) & mask).view(torch.float32))


def store(value: Tensor, storage: str) -> Tensor:
    """float64 value rounded once to float32, then as storage holds it; float64."""
    return round_to(value.to(torch.float32), storage).to(torch.float64)


def applied_weight(weight: Tensor, plan: CastPlan) -> Tensor:
    """The factor a stored norm weight stands for, float64: w, or 1 + w formed as plan.weight_offset says."""
    weight = weight.to(torch.float64)
    return weight if plan.weight_offset == "none" else store(1 + weight, plan.weight_offset)


def check_offset(plan: CastPlan, problem: Problem) -> None:
    """Raises ValueError if the plan reads norm weights otherwise than the problem stores them."""
    if (plan.weight_offset != "none") != problem.weight_offset:
        raise ValueError(
            f"a plan with weight_offset={plan.weight_offset!r} cannot run a problem whose norm weights are stored as "
            f"{'w - 1 (Gemma)' if problem.weight_offset else 'w'}: "
            + ("use one of the gemma plans" if problem.weight_offset else "use a problem with weight_offset=True")
        )


def check_table(plan: CastPlan, problem: Problem) -> None:
    """Raises ValueError if the plan rounds what a table is made of, and the problem brings its table."""
    rounded = [f"{name}={getattr(plan, name)!r}" for name in PHASE_BOUNDARIES if getattr(plan, name) != KEEP]
    if rounded and problem.positions is not None and problem.cos_sin_cache is not None:
        raise ValueError(
            f"a plan with {', '.join(rounded)} makes its own table of cos and sin, and this problem brings one: use a "
            "problem with positions and theta, without cos_sin_cache"
        )


def spec(plan: CastPlan, problem: Problem, product: Tensor | None = None) -> Chain:
    """The plan's exact definition on that problem. product: Chain.product, if it is at hand.

    Raises ValueError if plan and problem do not fit together.
    """
    check_offset(plan, problem)
    check_table(plan, problem)
    return _chain(plan, problem, store, lambda weight: applied_weight(weight, plan), product)


def truth(problem: Problem) -> Chain:
    """The chain in float64 from the same bf16 inputs, nothing rounded; angles from theta and positions, whatever table
    the problem brings."""
    plan, problem = CastPlan(hidden=KEEP, matmul="fp32"), problem.replace(cos_sin_cache=None)
    offset = 1.0 if problem.weight_offset else 0.0
    return _chain(plan, problem, lambda value, storage: value, lambda weight: weight.to(torch.float64) + offset)


def matmul_operand(hidden: Tensor, plan: CastPlan) -> Tensor:
    """hidden, float64, as the matmul's operand precision reads it. bf16 and fp32 read it whole."""
    if plan.matmul not in ("tf32", "tf32x3"):
        return hidden
    hidden = hidden.to(torch.float32)
    high = truncate_tf32(hidden)
    if plan.matmul == "tf32":
        return high.to(torch.float64)
    return high.to(torch.float64) + truncate_tf32(hidden - high).to(torch.float64)


def cos_sin(plan: CastPlan, problem: Problem, store: Store = store) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, Dh] float64 of a problem with positions, as the plan holds them: made by the plan, or of the
    table that the problem brings."""
    p = problem
    if p.cos_sin_cache is not None:
        cos, sin = p.cos_sin()
        return store(cos.to(torch.float64), plan.cos_sin), store(sin.to(torch.float64), plan.cos_sin)
    assert p.positions is not None and p.theta is not None, "q and k of a problem without positions are not rotated"
    return both_halves(rope.rows(plan, p.positions, p.theta, p.head_dim, store).to(p.x.device))


def with_table(plan: CastPlan, problem: Rotated) -> Rotated:
    """That problem with the table that the plan makes, [P, Dh] fp32 for positions below P, whose values whoever reads
    it rounds as plan.cos_sin says; rows of no token are NaN. The problem itself where it brings a table or has no
    positions."""
    p = problem
    if p.positions is None or p.theta is None or p.cos_sin_cache is not None:
        return p
    positions = p.positions.cpu()
    table = torch.full((int(positions.max()) + 1 if p.tokens else 0, p.head_dim), torch.nan)
    table[positions] = rope.rows(plan.replace(cos_sin=KEEP), positions, p.theta, p.head_dim, store).to(torch.float32)
    return p.replace(cos_sin_cache=table.to(p.x.device))


def rotated(value: Tensor, cos: Tensor, sin: Tensor, plan: CastPlan, store: Store = store) -> Tensor:
    """q or k [T, H, Dh] float64 after RoPE, not yet rounded as `out`; cos, sin [T, 1, Dh] as the plan holds them."""
    return store(value * cos, plan.products) + store(rotate_half(value) * sin, plan.products)


def _mean_of_squares(value: Tensor, plan: CastPlan, store: Store) -> Tensor:
    squares = value * value
    if plan.statistics != KEEP:
        squares = store(squares, plan.statistics)
    return squares.mean(-1, keepdim=True)


def _chain(
    plan: CastPlan, problem: Problem, store: Store, applied: Callable[[Tensor], Tensor], product: Tensor | None = None,
) -> Chain:  # fmt: skip
    w_in = applied(problem.norm_weight)
    x = problem.x.to(torch.float64)
    if problem.residual is not None:
        x = store(x + problem.residual.to(torch.float64), plan.x)

    variance = store(_mean_of_squares(x, plan, store), plan.variance)
    rstd = store((variance + problem.eps).rsqrt(), plan.rstd)
    normed = store(x * rstd, plan.normed) if plan.scale == "prologue" else None
    hidden = x if plan.scale == "folded" else store((x if normed is None else normed) * w_in, plan.hidden)
    if product is None:
        weight = problem.qkv_weight.to(torch.float64)
        weight = store(weight * w_in, RNE) if plan.scale == "folded" else weight
        product = matmul_operand(hidden, plan) @ weight.T

    proj = product if plan.scale == "prologue" else product * rstd
    if problem.bias is not None:
        proj = proj + problem.bias.to(torch.float64)
    proj = store(proj, plan.proj).reshape(problem.tokens, problem.num_heads, problem.head_dim)

    q, k, v = problem.split_heads(proj)
    head_rstd = head_normed = None
    if weights := problem.head_weights:
        qk = torch.cat([q, k], dim=1)
        head_variance = store(_mean_of_squares(qk, plan, store), plan.variance)
        head_rstd = store((head_variance + problem.eps).rsqrt(), plan.head_rstd)
        head_normed = store(qk * head_rstd, plan.head_normed)
        q, k = head_normed.split([problem.num_q_heads, problem.num_kv_heads], dim=1)
        q, k = (value * applied(weight) for value, weight in zip((q, k), weights, strict=True))
    if problem.positions is not None:
        cos, sin = cos_sin(plan, problem, store)
        q, k = (rotated(store(value, plan.unrotated), cos, sin, plan, store) for value in (q, k))
    q, k, v = (store(value, plan.out) for value in (q, k, v))
    return Chain(x, variance, rstd, normed, hidden, product, proj, head_rstd, head_normed, q, k, v)
