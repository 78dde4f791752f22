"""RMSNorm of whole rows: what a launch computes before the matmul, where its config asks for it.

rstd   = (mean(x^2) + eps)^-1/2
hidden = x * rstd * w_in, or what `scale` leaves of it before the matmul (see norm_qkv.py)
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .chain import load_x, row_rstd, scaled
from .plan import CastPlan, words
from .rounding import narrow, round_to

ROW = 8192  # channels that a program keeps in registers; wider rows are read twice


@triton.jit
def store_hidden(hidden_ptr, x, rstd, norm_weight_ptr, offs_m, offs_k, T, D, PLAN: tl.constexpr):
    hidden = scaled(x, rstd, norm_weight_ptr, offs_k, D, PLAN)
    mask = (offs_m < T)[:, None] & (offs_k < D)[None, :]
    tl.store(hidden_ptr + offs_m[:, None] * D + offs_k[None, :], narrow(hidden), mask=mask)


@triton.jit(do_not_specialize=["T"])
def rms_norm_kernel(
    x_ptr,  # [T, D] bf16
    residual_ptr,  # [T, D] bf16, or None
    norm_weight_ptr,  # [D] bf16
    hidden_ptr,  # [T, D] bf16 contiguous, or None: not stored
    rstd_ptr,  # [T] fp32, or None: not stored
    T, D, eps, stride_xm, stride_xk, stride_rm, stride_rk,
    PLAN: tl.constexpr,  # Words of a CastPlan
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    first = tl.arange(0, BLOCK_K).to(tl.int64)  # [K]
    x = load_x(x_ptr, residual_ptr, offs_m, first, T, D, stride_xm, stride_xk, stride_rm, stride_rk, PLAN)
    sum_of_squares = tl.sum(round_to(x * x, PLAN.statistics), axis=1)
    for start in range(BLOCK_K, D, BLOCK_K):
        more = load_x(
            x_ptr, residual_ptr, offs_m, start + first, T, D, stride_xm, stride_xk, stride_rm, stride_rk, PLAN
        )
        sum_of_squares += tl.sum(round_to(more * more, PLAN.statistics), axis=1)
    rstd = row_rstd(sum_of_squares, D, eps, PLAN)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + offs_m, rstd, mask=offs_m < T)
    if hidden_ptr is not None:
        store_hidden(hidden_ptr, x, rstd, norm_weight_ptr, offs_m, first, T, D, PLAN)
        for start in range(BLOCK_K, D, BLOCK_K):
            more = load_x(
                x_ptr, residual_ptr, offs_m, start + first, T, D, stride_xm, stride_xk, stride_rm, stride_rk, PLAN
            )
            store_hidden(hidden_ptr, more, rstd, norm_weight_ptr, offs_m, start + first, T, D, PLAN)


def row_blocks(hidden_size: int, interpreted: bool) -> dict[str, int]:
    """Tiles of rms_norm_kernel: a program reads one row, at once where it has up to ROW channels. Interpreted it reads
    more, since there the cost is per operation, whatever the tile."""
    block_k = min(ROW, triton.next_power_of_2(hidden_size))
    if interpreted:
        return {"BLOCK_M": 64, "BLOCK_K": block_k}
    return {"BLOCK_M": 1, "BLOCK_K": block_k, "num_warps": 8 if block_k >= 4096 else 4}


def launch_rms_norm(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, hidden: Tensor | None, rstd: Tensor | None,
    plan: CastPlan, eps: float,
) -> None:  # fmt: skip
    """Writes hidden [T, D] bf16 and rstd [T] fp32, both contiguous, where given. x and residual [T, D], any strides.

    plan: one under which hidden is a bf16 value, where it is given.
    """
    tokens, hidden_size = x.shape
    blocks = row_blocks(hidden_size, interpreted=not isinstance(rms_norm_kernel, triton.JITFunction))
    rms_norm_kernel[(triton.cdiv(tokens, blocks["BLOCK_M"]),)](
        x, residual, norm_weight, hidden, rstd, tokens, hidden_size, float(eps),
        *x.stride(), *(x if residual is None else residual).stride(),
        PLAN=words(plan), **blocks, enable_fp_fusion=False,
    )  # fmt: skip
