"""A Triton kernel of q's and k's head norms and RoPE, in place in qkv."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _kernel(
    qkv_ptr, stride_t, q_weight_ptr, k_weight_ptr, table_ptr, positions_ptr, eps,
    Q_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, BLOCK)
    there = channel < HALF
    first_ptr = qkv_ptr + token * stride_t + head * HEAD_DIM + channel
    first = tl.load(first_ptr, mask=there, other=0).to(tl.float32)
    second = tl.load(first_ptr + HALF, mask=there, other=0).to(tl.float32)
    rstd = tl.math.rsqrt((tl.sum(first * first) + tl.sum(second * second)) / HEAD_DIM + eps)
    is_q = head < Q_HEADS
    q_first, k_first = (tl.load(q_weight_ptr + channel, mask=there), tl.load(k_weight_ptr + channel, mask=there))
    q_second = tl.load(q_weight_ptr + HALF + channel, mask=there)
    k_second = tl.load(k_weight_ptr + HALF + channel, mask=there)
    first = first * rstd * tl.where(is_q, q_first, k_first).to(tl.float32)
    second = second * rstd * tl.where(is_q, q_second, k_second).to(tl.float32)
    row_ptr = table_ptr + tl.load(positions_ptr + token) * HEAD_DIM + channel
    cos = tl.load(row_ptr, mask=there, other=0).to(tl.float32)
    sin = tl.load(row_ptr + HALF, mask=there, other=0).to(tl.float32)
    tl.store(first_ptr, (first * cos - second * sin).to(tl.bfloat16), mask=there)
    tl.store(first_ptr + HALF, (second * cos + first * sin).to(tl.bfloat16), mask=there)


def fused(qkv, num_heads_q, num_heads_k, num_heads_v, head_dim, eps, q_weight, k_weight, cos_sin_cache, positions):
    if cos_sin_cache.shape[1] != head_dim:
        raise ValueError("all channels are rotated")
    _kernel[(len(qkv), num_heads_q + num_heads_k)](
        qkv, qkv.stride(0), q_weight, k_weight, cos_sin_cache, positions, eps, num_heads_q, head_dim, head_dim // 2,
        triton.next_power_of_2(head_dim // 2), num_warps=1,
    )  # fmt: skip


def by_its_width(
    qkv, num_heads_q, num_heads_k, num_heads_v, head_dim, eps, q_weight, k_weight, cos_sin_cache, positions
):
    """A launcher that takes rows of qkv to lie one behind the other."""
    fused(
        qkv.as_strided(qkv.shape, ((num_heads_q + num_heads_k + num_heads_v) * head_dim, 1), qkv.storage_offset()),
        num_heads_q, num_heads_k, num_heads_v, head_dim, eps, q_weight, k_weight, cos_sin_cache, positions,
    )  # fmt: skip
