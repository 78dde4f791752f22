"""RMSNorm -> QKV projection -> Q and K head norm in one kernel, one head per tile of N.

    rstd   = (mean(x^2) + eps)^-1/2
    hidden = x * rstd * w_in                    `prologue`
             x * w_in                           `epilogue` (deferred: rstd moves behind the matmul)
             x                                  `folded`   (w_in was folded into W ahead of time as well)
    proj   = hidden @ W^T (* rstd) (+ bias)
    q, k   = proj * (mean(proj^2) + eps)^-1/2 * w_head        v = proj

rstd commutes with the matmul because it is one number a token (FlashNorm, arXiv 2407.09577); the roundings
do not commute, and so the three are three numerical functions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import check_flags, check_inputs
from kernels.head_norm import check_device, head_norm, normalize_head, output_tensor, rsqrt_rn, store_head
from kernels.rounding import applied_weight, narrow, round_to, truncate_tf32, widen


@triton.jit
def load_x(
    x_ptr, residual_ptr, offs_m, offs_k, T, D, stride_xm, stride_xk, stride_rm, stride_rk,
    HAS_RESIDUAL: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """[M, K] fp32: x, or x + residual rounded as X says; zero outside."""
    mask = (offs_m < T)[:, None] & (offs_k < D)[None, :]
    x = widen(tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk, mask=mask, other=0.0))
    if HAS_RESIDUAL:
        residual_ptrs = residual_ptr + offs_m[:, None] * stride_rm + offs_k[None, :] * stride_rk
        x = round_to(x + widen(tl.load(residual_ptrs, mask=mask, other=0.0)), X)
    return x


@triton.jit
def row_rstd(sum_of_squares, D, eps, VARIANCE: tl.constexpr, RSTD: tl.constexpr):
    """[M] fp32: rstd of rows whose squares add up to sum_of_squares."""
    variance = round_to(tl.div_rn(sum_of_squares, D.to(tl.float32)), VARIANCE)
    return round_to(rsqrt_rn(variance + eps), RSTD)


@triton.jit
def dot(hidden, weight, acc, MATMUL: tl.constexpr, INTERPRETED: tl.constexpr):
    """acc [M, N] fp32 + hidden [M, K] fp32 @ weight [K, N] bf16, operands in the precision of MATMUL.

    Interpreted, operands stay fp32: products of bf16 or tf32 values are exact there, so only the order of
    the sums differs. tf32x3 needs two products here, not three: a bf16 weight has no tf32 remainder.
    """
    if MATMUL == "bf16":
        if INTERPRETED:
            return tl.dot(hidden, widen(weight), acc, input_precision="ieee")
        return tl.dot(narrow(hidden), weight, acc)
    wide = widen(weight)
    if MATMUL == "fp32":
        return tl.dot(hidden, wide, acc, input_precision="ieee")
    high = truncate_tf32(hidden)
    acc = tl.dot(high, wide, acc, input_precision="tf32")
    if MATMUL == "tf32x3":
        acc = tl.dot(truncate_tf32(hidden - high), wide, acc, input_precision="tf32")
    return acc


@triton.jit
def norm_qkv_kernel(
    x_ptr,  # [T, D] bf16
    residual_ptr,  # [T, D] bf16
    norm_weight_ptr,  # [D] bf16
    qkv_weight_ptr,  # [H * DH, D] bf16, rows q, k, v
    bias_ptr,  # [H * DH] bf16
    q_norm_ptr,  # [DH] bf16
    k_norm_ptr,  # [DH] bf16
    q_ptr,  # [T, HQ, DH] bf16 or fp32
    k_ptr,  # [T, HKV, DH] bf16 or fp32
    v_ptr,  # [T, HKV, DH] bf16 or fp32
    T,
    D,
    eps,
    stride_xm,
    stride_xk,
    stride_rm,
    stride_rk,
    stride_wn,
    stride_wk,
    stride_qm,
    stride_qh,
    stride_km,
    stride_kh,
    stride_vm,
    stride_vh,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    DH: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HEAD_NORM: tl.constexpr,  # `none`, `fused`, or `later`: q and k are stored as proj, for head_norm to finish
    X: tl.constexpr,
    STATISTICS: tl.constexpr,
    VARIANCE: tl.constexpr,
    RSTD: tl.constexpr,
    NORMED: tl.constexpr,
    HIDDEN: tl.constexpr,
    PROJ: tl.constexpr,
    HEAD_RSTD: tl.constexpr,
    HEAD_NORMED: tl.constexpr,
    OUT: tl.constexpr,
    SCALE: tl.constexpr,
    MATMUL: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # power of two >= DH
    BLOCK_K: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    head = tl.program_id(1).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)  # [N] channels of this head
    rows = head * DH + offs_n  # [N] rows of W
    sum_of_squares = tl.zeros([BLOCK_M], dtype=tl.float32)
    rstd = tl.zeros([BLOCK_M], dtype=tl.float32)

    if SCALE == "prologue":  # hidden needs rstd, so the rows are read twice
        for start in range(0, D, BLOCK_K):
            offs_k = start + tl.arange(0, BLOCK_K).to(tl.int64)
            x = load_x(
                x_ptr, residual_ptr, offs_m, offs_k, T, D, stride_xm, stride_xk, stride_rm, stride_rk, HAS_RESIDUAL, X
            )
            sum_of_squares += tl.sum(round_to(x * x, STATISTICS), axis=1)
        rstd = row_rstd(sum_of_squares, D, eps, VARIANCE, RSTD)

    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        x = load_x(
            x_ptr, residual_ptr, offs_m, offs_k, T, D, stride_xm, stride_xk, stride_rm, stride_rk, HAS_RESIDUAL, X
        )
        hidden = x
        if SCALE == "prologue":
            hidden = round_to(hidden * rstd[:, None], NORMED)
        else:
            sum_of_squares += tl.sum(round_to(x * x, STATISTICS), axis=1)
        if SCALE != "folded":
            norm_weight = tl.load(norm_weight_ptr + offs_k, mask=offs_k < D, other=0.0)
            hidden = round_to(hidden * applied_weight(norm_weight, WEIGHT_OFFSET)[None, :], HIDDEN)
        weight_ptrs = qkv_weight_ptr + rows[None, :] * stride_wn + offs_k[:, None] * stride_wk
        weight = tl.load(weight_ptrs, mask=(offs_k < D)[:, None] & (offs_n < DH)[None, :], other=0.0)  # [K, N]
        acc = dot(hidden, weight, acc, MATMUL, INTERPRETED)

    if SCALE != "prologue":
        rstd = row_rstd(sum_of_squares, D, eps, VARIANCE, RSTD)
        acc = acc * rstd[:, None]
    if HAS_BIAS:
        acc += widen(tl.load(bias_ptr + rows, mask=offs_n < DH, other=0.0))[None, :]
    proj = round_to(acc, PROJ)

    mask = (offs_m < T)[:, None] & (offs_n < DH)[None, :]
    if head >= HQ + HKV:
        v_ptrs = v_ptr + offs_m[:, None] * stride_vm + (head - HQ - HKV) * stride_vh + offs_n[None, :]
        store_head(v_ptrs, round_to(proj, OUT), mask)
    else:
        if HEAD_NORM == "none":
            out = round_to(proj, OUT)
        elif HEAD_NORM == "later":
            out = proj
        else:
            if head < HQ:
                stored = tl.load(q_norm_ptr + offs_n, mask=offs_n < DH, other=0.0)
            else:
                stored = tl.load(k_norm_ptr + offs_n, mask=offs_n < DH, other=0.0)
            weight = applied_weight(stored, WEIGHT_OFFSET)
            out = normalize_head(proj, weight, eps, DH, STATISTICS, VARIANCE, HEAD_RSTD, HEAD_NORMED, OUT)
        if head < HQ:
            store_head(q_ptr + offs_m[:, None] * stride_qm + head * stride_qh + offs_n[None, :], out, mask)
        else:
            store_head(k_ptr + offs_m[:, None] * stride_km + (head - HQ) * stride_kh + offs_n[None, :], out, mask)


def norm_qkv(
    x: Tensor,
    norm_weight: Tensor,
    qkv_weight: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    *,
    statistics: str = "fp32",
    variance: str = "fp32",
    rstd: str = "fp32",
    normed: str = "fp32",
    hidden: str = "bf16-rne",
    proj: str = "fp32",
    head_rstd: str = "fp32",
    head_normed: str = "fp32",
    out_storage: str = "bf16-rne",
    x_storage: str = "bf16-rne",
    scale: str = "prologue",
    matmul: str = "bf16",
    weight_offset: str = "none",
    separate_head_norm: bool = False,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm -> QKV -> head norm of T tokens, rounding where the flags say.

    x              [T, D] bf16, any strides, T >= 0
    norm_weight    [D] bf16, w_in; not read for scale='folded'
    qkv_weight     [(Hq + 2 Hkv) * Dh, D] bf16, any strides, rows ordered q, k, v; for scale='folded' the
                   result of fold_norm_weight, made once, ahead of time
    q_norm_weight, k_norm_weight   [Dh] bf16, or None: no head norm (Qwen2, Llama)
    bias           [(Hq + 2 Hkv) * Dh] bf16 or None, added in fp32
    residual       [T, D] bf16 or None, added to x first
    eps            added to every mean of squares, > 0

    statistics, variance, rstd, normed, hidden, proj, head_rstd, head_normed, x_storage (of x + residual)
    and out_storage: `fp32` keeps that value, `bf16-rne` rounds it to nearest even, `bf16-rtz` truncates it.
    scale          `prologue`, `epilogue` or `folded`: where rstd is applied (see the module's text)
    matmul         `bf16` (hidden must be rounded), `tf32`, `tf32x3` or `fp32`; fp32 accumulation in all
    weight_offset  `none`; `fp32` or `bf16-rne` for norm weights stored as w - 1 (Gemma), the type of 1 + w
    separate_head_norm   True: the head norm runs as a second kernel, over proj as stored. Same function
    out            (q, k, v) to write to, last dimension contiguous; or None

    Returns q [T, Hq, Dh], k [T, Hkv, Dh], v [T, Hkv, Dh]: bf16, or float32 for out_storage='fp32'.
    Run to run deterministic. Tiles do not depend on T, so a row's bits do not depend on its batch, for one
    memory layout; separate_head_norm may add a head's squares in another order. On a CPU it runs only interpreted
    (TRITON_INTERPRET=1 set before the import). Raises ValueError for inputs that do not fit.
    """
    flags = {
        "x": x_storage,
        "statistics": statistics,
        "variance": variance,
        "rstd": rstd,
        "normed": normed,
        "hidden": hidden,
        "proj": proj,
        "head_rstd": head_rstd,
        "head_normed": head_normed,
        "out": out_storage,
        "scale": scale,
        "matmul": matmul,
        "weight_offset": weight_offset,
    }
    check_flags(flags)
    check_inputs(
        x, norm_weight, qkv_weight, num_q_heads, num_kv_heads, q_norm_weight, k_norm_weight, bias, residual, eps
    )
    interpreted = check_device("x", x, norm_qkv_kernel)
    tokens, hidden_size = x.shape
    head_dim = qkv_weight.shape[0] // (num_q_heads + 2 * num_kv_heads)
    heads = (num_q_heads, num_kv_heads, num_kv_heads)
    out = out or (None, None, None)
    q, k, v = (
        output_tensor(name, given, (tokens, count, head_dim), out_storage, like=x)
        for name, given, count in zip(("q", "k", "v"), out, heads, strict=True)
    )
    later = separate_head_norm and q_norm_weight is not None
    q_store, k_store = (output_tensor("proj", None, tuple(t.shape), proj, like=x) if later else t for t in (q, k))
    if tokens == 0:
        return q, k, v
    blocks = block_sizes(head_dim, matmul, interpreted)
    grid = (triton.cdiv(tokens, blocks["BLOCK_M"]), sum(heads))
    norm_qkv_kernel[grid](
        x,
        x if residual is None else residual,
        norm_weight.contiguous(),
        qkv_weight,
        norm_weight if bias is None else bias.contiguous(),
        norm_weight if q_norm_weight is None else q_norm_weight.contiguous(),
        norm_weight if k_norm_weight is None else k_norm_weight.contiguous(),
        q_store,
        k_store,
        v,
        tokens,
        hidden_size,
        eps,
        *x.stride(),
        *(x if residual is None else residual).stride(),
        *qkv_weight.stride(),
        *q_store.stride()[:2],
        *k_store.stride()[:2],
        *v.stride()[:2],
        HQ=num_q_heads,
        HKV=num_kv_heads,
        DH=head_dim,
        HAS_RESIDUAL=residual is not None,
        HAS_BIAS=bias is not None,
        HEAD_NORM="none" if q_norm_weight is None else "later" if later else "fused",
        **{name.upper(): word for name, word in flags.items()},
        INTERPRETED=interpreted,
        **blocks,
        enable_fp_fusion=False,
    )
    if later:
        for store, weight, result in ((q_store, q_norm_weight, q), (k_store, k_norm_weight, k)):
            head_norm(
                store,
                weight,
                eps,
                statistics=statistics,
                variance=variance,
                head_rstd=head_rstd,
                head_normed=head_normed,
                out_storage=out_storage,
                weight_offset=weight_offset,
                out=result,
            )
    return q, k, v


def block_sizes(head_dim: int, matmul: str, interpreted: bool) -> dict[str, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K, num_warps and num_stages of a launch.

    They do not depend on the number of tokens: smaller tiles for fewer tokens would mean other matrix instructions
    and other sums, and a row's bits would change with its batch. Operands wider than bf16 take smaller tiles,
    because they wait in shared memory at 4 bytes. The interpreter's cost is per operation, whatever the tile.
    """
    block_n = max(16, triton.next_power_of_2(head_dim))
    if interpreted:
        return {"BLOCK_M": 64, "BLOCK_N": block_n, "BLOCK_K": 256}
    if matmul != "bf16":
        return {"BLOCK_M": 32, "BLOCK_N": block_n, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    if block_n >= 256:  # at BLOCK_K 64 three stages of W pass gfx942's 64 KiB, and on four warps the accumulator spills
        return {"BLOCK_M": 64, "BLOCK_N": block_n, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 64, "BLOCK_N": block_n, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}


def fold_norm_weight(qkv_weight: Tensor, norm_weight: Tensor, weight_offset: str = "none") -> Tensor:
    """W' = bf16(W * w_in), [rows, D] bf16, for scale='folded'; done once, when a model is loaded."""
    weight = norm_weight.float()
    if weight_offset != "none":
        weight = 1 + weight
        weight = weight.to(torch.bfloat16).float() if weight_offset == "bf16-rne" else weight
    return (qkv_weight.float() * weight).to(torch.bfloat16)
