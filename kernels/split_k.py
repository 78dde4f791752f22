"""RMSNorm -> QKV -> head norm for few tokens: several programs a head, each over a share of D (split-K).

With few tokens the time is that of reading W, and one program a head would leave most processors idle. So each
program multiplies one share of D and stores its fp32 sums; the program of a head that arrives last adds them up, in
the order of the shares, whichever came when, so that every run gives the same bits, and finishes the head.

Why the last one sees all sums. A program's stores come before its barrier, and its one atomic behind it: a barrier
orders the threads of a block, and causality order is transitive, so that the release of that atomic covers the stores
of all threads (PTX ISA, Memory Consistency Model, Causality Order; cooperative groups synchronise a grid in the same
way). Additions to one counter form a release sequence, so the last arriver's acquire, which reads the last of them,
synchronises with all, and Triton hands its result to the block's other threads through shared memory and a barrier.
Their loads then must not return older data, which an L1 cache could hold: the acquire invalidates it, and the loads
bypass it anyway (`.cg`), since each sum is read once.

On AMD's GPUs none of this was shown: compiled for gfx942 the barrier does not wait for other waves' stores to global
memory (no s_waitcnt vmcnt before s_barrier, Triton 3.9), so a launch there is refused.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chain import finish_head, multiply, row_rstd, row_squares
from .config import Config

TOGETHER = 4  # shares whose loads are in flight at once when they are summed
COUNTERS = 4096  # smallest buffer of counters: 512 tokens of 128 heads


@triton.jit(do_not_specialize=["T", "HQ", "HKV"], do_not_specialize_on_alignment=["positions_ptr"])
def split_k_kernel(
    x_ptr,  # [T, D] bf16
    residual_ptr,  # [T, D] bf16, or None
    norm_weight_ptr,  # [D] bf16
    qkv_weight_ptr,  # [H * DH, D] bf16, rows q, k, v
    bias_ptr,  # [H * DH] bf16, or None
    q_norm_ptr,  # [DH] bf16, or None
    k_norm_ptr,  # [DH] bf16, or None
    positions_ptr,  # [T] int64, or None
    cos_sin_ptr,  # [positions, DH] fp32 or bf16, cos in the first half of a row; None: no RoPE
    rstd_ptr,  # [T] fp32, or None
    q_ptr,  # [T, HQ, DH] bf16 or fp32
    k_ptr,  # [T, HKV, DH] bf16 or fp32
    v_ptr,  # [T, HKV, DH] bf16 or fp32
    sums_ptr,  # [blocks of tokens, H, splits, M, N] fp32
    squares_ptr,  # [blocks of tokens, H, splits, M] fp32
    counter_ptr,  # [blocks of tokens, H] int32, all zero before and after
    T, D, HQ, HKV, eps, stride_xm, stride_xk, stride_rm, stride_rk, stride_wn, stride_wk,
    stride_qm, stride_qh, stride_km, stride_kh, stride_vm, stride_vh,
    PLAN: tl.constexpr,  # Words of a CastPlan
    DH: tl.constexpr, HEAD_NORM: tl.constexpr, PREPASS: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,  # power of two >= DH
    BLOCK_R: tl.constexpr,  # rows whose statistics are computed: 1 for one token, else BLOCK_M
    BLOCK_X: tl.constexpr,  # channels of a step of the statistics
    STAGES: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    split, splits = tl.program_id(2), tl.num_programs(2)
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    rstd = tl.zeros([BLOCK_M], dtype=tl.float32)
    if PREPASS != "none":
        if rstd_ptr is not None:
            rstd = tl.load(rstd_ptr + offs_m, mask=offs_m < T, other=0.0)
    elif PLAN.scale == "prologue":  # hidden needs the rstd of whole rows, which are few: every program reads them
        whole = row_squares(
            x_ptr, residual_ptr, block * BLOCK_M + tl.arange(0, BLOCK_R), T, D, stride_xm, stride_xk,
            stride_rm, stride_rk, PLAN, BLOCK_R, BLOCK_X, STAGES,
        )  # fmt: skip
        rstd += row_rstd(whole, D, eps, PLAN)  # one token's is spread over rows that hold nothing else

    share = tl.cdiv(tl.cdiv(D, BLOCK_K), splits) * BLOCK_K  # channels; the last shares may be shorter, or empty
    begin = split * share
    acc, sum_of_squares = multiply(
        x_ptr, residual_ptr, norm_weight_ptr, qkv_weight_ptr, rstd, offs_m, head, begin, tl.minimum(begin + share, D),
        T, D, stride_xm, stride_xk, stride_rm, stride_rk, stride_wn, stride_wk, PLAN, DH, PREPASS, INTERPRETED,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip

    cell = block * tl.num_programs(1) + head  # of the grid: a head of a block of tokens
    tile_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    in_tile = tile_m[:, None] * BLOCK_N + offs_n[None, :]
    mask = (offs_m < T)[:, None] & (offs_n < DH)[None, :]
    sums_ptrs = sums_ptr + cell * splits * BLOCK_M * BLOCK_N + in_tile
    squares_ptrs = squares_ptr + cell * splits * BLOCK_M + tile_m
    tl.store(sums_ptrs + split * BLOCK_M * BLOCK_N, acc, mask=mask)
    if PLAN.scale != "prologue" and PREPASS == "none":
        tl.store(squares_ptrs + split * BLOCK_M, sum_of_squares, mask=offs_m < T)
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr + cell, 1, sem="acq_rel", scope="gpu")
    if arrived == splits - 1:
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        sum_of_squares = tl.zeros([BLOCK_M], dtype=tl.float32)
        for other in tl.range(0, splits, loop_unroll_factor=TOGETHER):
            acc += tl.load(sums_ptrs + other * BLOCK_M * BLOCK_N, mask=mask, other=0.0, cache_modifier=".cg")
            if PLAN.scale != "prologue" and PREPASS == "none":
                squares = tl.load(squares_ptrs + other * BLOCK_M, mask=offs_m < T, other=0.0, cache_modifier=".cg")
                sum_of_squares += squares
        if PLAN.scale != "prologue" and PREPASS == "none":
            rstd = row_rstd(sum_of_squares, D, eps, PLAN)
        finish_head(
            acc, rstd, bias_ptr, q_norm_ptr, k_norm_ptr, positions_ptr, cos_sin_ptr, q_ptr, k_ptr, v_ptr, offs_m, head,
            T, HQ, HKV, eps, stride_qm, stride_qh, stride_km, stride_kh, stride_vm, stride_vh, PLAN, DH, HEAD_NORM,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip
        tl.store(counter_ptr + cell, 0)  # seen by the next launch, which starts when all programs have ended


@functools.cache
def counters(device: torch.device, size: int) -> Tensor:
    """[size] int32, zero between launches; one buffer a device and size, never freed, since CUDA graphs keep its
    address. Raises RuntimeError where it would be made inside a graph's capture, and so hold no zeros yet."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the first split-k launch cannot be captured into a CUDA graph: run it once before "
            "(config=None takes split-k for few tokens)"
        )
    return torch.zeros(size, dtype=torch.int32, device=device)


def statistics_blocks(tokens: int, block_m: int) -> dict[str, int]:
    """BLOCK_R and BLOCK_X: 16 or 32 elements a thread, whatever the number of tokens and channels."""
    rows = 1 if tokens == 1 else block_m
    return {"BLOCK_R": rows, "BLOCK_X": 2048 if rows == 1 else max(64, 4096 // rows)}


def launch_split_k(
    tensors: tuple[Any, ...], numbers: tuple[Any, ...], constants: dict[str, Any], config: Config, heads: int
) -> None:
    """norm_qkv's launch of this kernel. tensors and numbers in the order of norm_qkv_kernel's arguments, constants by
    name.

    Launches that share a device share counters, and so must be ordered: in one stream, or by events. A launch that
    was broken off may leave them set. Raises ValueError on AMD's GPUs (see the module's text).
    """
    if torch.version.hip:
        raise ValueError("kernel='split-k' is not shown to be right on AMD's GPUs: take 'fused' or 'separate'")
    device, tokens, block_m = tensors[0].device, tensors[0].shape[0], config.block_m
    grid = (triton.cdiv(tokens, block_m), heads, config.splits)
    cells = grid[0] * heads
    squares = torch.empty(cells * config.splits * block_m, dtype=torch.float32, device=device)
    sums = torch.empty(squares.numel() * constants["BLOCK_N"], dtype=torch.float32, device=device)
    counter = counters(device, max(COUNTERS, triton.next_power_of_2(cells)))
    split_k_kernel[grid](
        *tensors, sums, squares, counter, *numbers, **constants, **statistics_blocks(tokens, block_m),
        STAGES=config.num_stages, TOGETHER=TOGETHER, enable_fp_fusion=False,
    )  # fmt: skip
