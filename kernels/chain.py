"""The chain's steps as device functions, shared by the kernels: rows in, heads out.

Roundings stand here and in head_norm.py only, so that every way to cut a launch is the same numerical function. They
read where to round from PLAN, the words of a CastPlan (plan.py).
"""

import triton
import triton.language as tl

from .head_norm import normalize_head, rotate, rsqrt_rn, store_head
from .rounding import applied_weight, narrow, round_to, truncate_tf32, widen


@triton.jit
def load_x(x_ptr, residual_ptr, offs_m, offs_k, T, D, stride_xm, stride_xk, stride_rm, stride_rk, PLAN: tl.constexpr):
    """[M, K] fp32: x, or x + residual rounded as PLAN.x says; zero outside. residual_ptr may be None."""
    mask = (offs_m < T)[:, None] & (offs_k < D)[None, :]
    x = widen(tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk, mask=mask, other=0.0))
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + offs_m[:, None] * stride_rm + offs_k[None, :] * stride_rk
        x = round_to(x + widen(tl.load(residual_ptrs, mask=mask, other=0.0)), PLAN.x)
    return x


@triton.jit
def row_squares(
    x_ptr, residual_ptr, offs_m, T, D, stride_xm, stride_xk, stride_rm, stride_rk,
    PLAN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[M] fp32: sum of the squares of whole rows. STAGES: loads in flight, None where the compiler chooses."""
    sum_of_squares = tl.zeros([BLOCK_M], dtype=tl.float32)
    for start in tl.range(0, D, BLOCK_K, num_stages=STAGES):
        offs_k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        x = load_x(x_ptr, residual_ptr, offs_m, offs_k, T, D, stride_xm, stride_xk, stride_rm, stride_rk, PLAN)
        sum_of_squares += tl.sum(round_to(x * x, PLAN.statistics), axis=1)
    return sum_of_squares


@triton.jit
def row_rstd(sum_of_squares, D, eps, PLAN: tl.constexpr):
    """[M] fp32: rstd of rows whose squares add up to sum_of_squares."""
    variance = round_to(tl.div_rn(sum_of_squares, D.to(tl.float32)), PLAN.variance)
    return round_to(rsqrt_rn(variance + eps), PLAN.rstd)


@triton.jit
def scaled(x, rstd, norm_weight_ptr, offs_k, D, PLAN: tl.constexpr):
    """[M, K] fp32: hidden, the matmul's left operand, of rows x [M, K] fp32. rstd [M] is read for `prologue` alone."""
    hidden = x
    if PLAN.scale == "prologue":
        hidden = round_to(hidden * rstd[:, None], PLAN.normed)
    if PLAN.scale != "folded":
        norm_weight = tl.load(norm_weight_ptr + offs_k, mask=offs_k < D, other=0.0)
        hidden = round_to(hidden * applied_weight(norm_weight, PLAN.weight_offset)[None, :], PLAN.hidden)
    return hidden


@triton.jit
def dot(hidden, weight, acc, PLAN: tl.constexpr, INTERPRETED: tl.constexpr):
    """acc [M, N] fp32 + hidden [M, K] fp32 or bf16 @ weight [K, N] bf16, operands in the precision of PLAN.matmul.

    Interpreted, operands stay fp32: products of bf16 or tf32 values are exact there, so only the order of
    the sums differs. tf32x3 needs two products here, not three: a bf16 weight has no tf32 remainder.
    """
    if PLAN.matmul == "bf16":
        if INTERPRETED:
            acc = tl.dot(widen(hidden), widen(weight), acc, input_precision="ieee")
        else:
            acc = tl.dot(narrow(hidden), weight, acc)
    else:  # not behind a return: Triton type-checks what follows a taken branch
        wide = widen(weight)
        if PLAN.matmul == "fp32":
            acc = tl.dot(hidden, wide, acc, input_precision="ieee")
        else:
            high = truncate_tf32(hidden)
            acc = tl.dot(high, wide, acc, input_precision="tf32")
            if PLAN.matmul == "tf32x3":
                acc = tl.dot(truncate_tf32(hidden - high), wide, acc, input_precision="tf32")
    return acc


@triton.jit
def multiply(
    x_ptr, residual_ptr, norm_weight_ptr, qkv_weight_ptr, rstd, offs_m, head, begin, end, T, D,
    stride_xm, stride_xk, stride_rm, stride_rk, stride_wn, stride_wk,
    PLAN: tl.constexpr, DH: tl.constexpr, PREPASS: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """hidden @ W^T of one head over the channels from begin to end, [M, N] fp32, and the sum of their squares, [M].

    The squares are zero where nobody needs them: rstd came before, or is there from a pre-pass. For PREPASS `hidden`
    x_ptr is hidden, and goes to the matmul as it was loaded, so that a compiler can leave it in shared memory.
    """
    offs_n = tl.arange(0, BLOCK_N)  # [N] channels of this head
    rows = head * DH + offs_n  # [N] rows of W
    sum_of_squares = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(begin, end, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        if PREPASS == "hidden":
            mask = (offs_m < T)[:, None] & (offs_k < D)[None, :]
            hidden = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk, mask=mask, other=0.0)
        else:
            x = load_x(x_ptr, residual_ptr, offs_m, offs_k, T, D, stride_xm, stride_xk, stride_rm, stride_rk, PLAN)
            if PLAN.scale != "prologue" and PREPASS == "none":
                sum_of_squares += tl.sum(round_to(x * x, PLAN.statistics), axis=1)
            hidden = scaled(x, rstd, norm_weight_ptr, offs_k, D, PLAN)
        weight_ptrs = qkv_weight_ptr + rows[None, :] * stride_wn + offs_k[:, None] * stride_wk
        weight = tl.load(weight_ptrs, mask=(offs_k < D)[:, None] & (offs_n < DH)[None, :], other=0.0)  # [K, N]
        acc = dot(hidden, weight, acc, PLAN, INTERPRETED)
    return acc, sum_of_squares


@triton.jit
def finish_head(
    acc, rstd, bias_ptr, q_norm_ptr, k_norm_ptr, positions_ptr, cos_sin_ptr, q_ptr, k_ptr, v_ptr, offs_m, head, T,
    HQ, HKV, eps, stride_qm, stride_qh, stride_km, stride_kh, stride_vm, stride_vh,
    PLAN: tl.constexpr, DH: tl.constexpr, HEAD_NORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stores one head of q, k or v from the matmul's whole sum acc [M, N] fp32. rstd [M]: as scaled() did not use it.

    HEAD_NORM: `none`, `fused`, or `later`: q and k are stored as proj, for head_norm to finish, RoPE included.
    """
    offs_n = tl.arange(0, BLOCK_N)
    if PLAN.scale != "prologue":
        acc = acc * rstd[:, None]
    if bias_ptr is not None:
        acc += widen(tl.load(bias_ptr + head * DH + offs_n, mask=offs_n < DH, other=0.0))[None, :]
    proj = round_to(acc, PLAN.proj)

    mask = (offs_m < T)[:, None] & (offs_n < DH)[None, :]
    if head >= HQ + HKV:
        v_ptrs = v_ptr + offs_m[:, None] * stride_vm + (head - HQ - HKV) * stride_vh + offs_n[None, :]
        store_head(v_ptrs, round_to(proj, PLAN.out), mask)
    else:
        out = proj
        if HEAD_NORM == "fused":
            if head < HQ:
                stored = tl.load(q_norm_ptr + offs_n, mask=offs_n < DH, other=0.0)
            else:
                stored = tl.load(k_norm_ptr + offs_n, mask=offs_n < DH, other=0.0)
            weight = applied_weight(stored, PLAN.weight_offset)
            out = normalize_head(out, weight, eps, PLAN, DH)
        if HEAD_NORM != "later":
            if cos_sin_ptr is not None:
                out = rotate(out, positions_ptr, cos_sin_ptr, offs_m, T, PLAN, DH, BLOCK_M)
            out = round_to(out, PLAN.out)
        if head < HQ:
            store_head(q_ptr + offs_m[:, None] * stride_qm + head * stride_qh + offs_n[None, :], out, mask)
        else:
            store_head(k_ptr + offs_m[:, None] * stride_km + (head - HQ) * stride_kh + offs_n[None, :], out, mask)
