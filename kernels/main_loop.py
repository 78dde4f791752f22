"""The fused kernel's main loop by itself: hidden @ W^T as `fused` after a stored hidden runs it, with nothing behind.

    proj = hidden @ W^T      rounded once to bf16

No chain is made of it. Timed beside cuBLAS it says what our loop loses before anything is fused: where it is slower
than a whole chain of separate kernels, no fusion around it can pay.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .chain import multiply
from .checks import check_count, check_no_grad, check_plain, check_tensor
from .config import Config, check_config_type
from .head_norm import check_device, output_tensor
from .norm_qkv import launch_constants
from .plan import DEFAULT, RNE
from .rounding import narrow, round_to


@triton.jit(do_not_specialize=["T"])
def matmul_kernel(
    hidden_ptr,  # [T, D] bf16
    weight_ptr,  # [H * DH, D] bf16
    proj_ptr,  # [T, H * DH] bf16
    T, D, stride_xm, stride_xk, stride_wn, stride_wk, stride_pm,
    PLAN: tl.constexpr,  # Words of DEFAULT
    DH: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,  # power of two >= DH
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    head = tl.program_id(1).to(tl.int64)
    acc, _squares = multiply(  # after a stored hidden it reads no other tensor, and no word but PLAN.matmul
        hidden_ptr, None, None, weight_ptr, None, offs_m, head, 0, D, T, D, stride_xm, stride_xk, 0, 0, stride_wn,
        stride_wk, PLAN, DH, "hidden", INTERPRETED, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    offs_n = tl.arange(0, BLOCK_N)  # [N]
    proj_ptrs = proj_ptr + offs_m[:, None] * stride_pm + head * DH + offs_n[None, :]
    tl.store(proj_ptrs, narrow(round_to(acc, "bf16-rne")), mask=(offs_m < T)[:, None] & (offs_n < DH)[None, :])


def matmul(hidden: Tensor, weight: Tensor, head_dim: int, config: Config, out: Tensor | None = None) -> Tensor:
    """proj [T, H * Dh] bf16 = hidden [T, D] @ weight [H * Dh, D]^T, both bf16 of any strides; fp32 sums, rounded to
    nearest.

    head_dim: Dh, the rows of W that a program takes. config: tiles of kernel='fused' with prepass='hidden'.
    Raises ValueError for shapes, dtypes, devices, a head size or a config that do not fit.
    """
    check_plain("hidden", hidden)
    check_plain("weight", weight)
    check_count("head_dim", head_dim)
    check_config_type(config)
    if config is None or (config.kernel, config.prepass) != ("fused", "hidden"):
        raise ValueError(f"matmul is the loop of kernel='fused' after prepass='hidden': config must be, not {config}")
    if hidden.ndim != 2 or hidden.shape[1] == 0:
        raise ValueError(f"hidden must be [tokens, hidden size], not {list(hidden.shape)}")
    tokens, hidden_size = hidden.shape
    if weight.ndim != 2 or weight.shape[1] != hidden_size:
        raise ValueError(f"weight must be [rows, {hidden_size}] to match hidden, not {list(weight.shape)}")
    rows = weight.shape[0]
    if head_dim < 1 or rows == 0 or rows % head_dim:
        raise ValueError(f"weight has {rows} rows, which do not divide into heads of {head_dim}")
    check_tensor("hidden", hidden, [tokens, hidden_size], like=hidden)
    check_tensor("weight", weight, [rows, hidden_size], like=hidden, first="hidden")
    check_no_grad(hidden=hidden, weight=weight)
    interpreted = check_device("hidden", hidden, matmul_kernel)
    out = output_tensor("out", out, (tokens, rows), RNE, like=hidden, first="hidden")
    if tokens == 0:
        return out
    matmul_kernel[(triton.cdiv(tokens, config.block_m), rows // head_dim)](
        hidden, weight, out, tokens, hidden_size, *hidden.stride(), *weight.stride(), out.stride(0),
        **launch_constants(DEFAULT, config, head_dim, interpreted), enable_fp_fusion=False,
    )  # fmt: skip
    return out
