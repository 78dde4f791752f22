"""Checks of the chain's inputs: one sentence that says what is wrong and what would be right."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .plan import CastPlan


def check_inputs(
    x: Tensor, norm_weight: Tensor, qkv_weight: Tensor, num_q_heads: int, num_kv_heads: int,
    q_norm_weight: Tensor | None, k_norm_weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    eps: float, positions: Tensor | None, cos_sin_cache: Tensor | None,
) -> None:  # fmt: skip
    """Raises ValueError unless shapes, dtypes, devices, heads and eps fit together. Reads no element."""
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"x must be [tokens, hidden size], not {list(x.shape)}")
    if num_q_heads < 1 or num_kv_heads < 1 or num_q_heads % num_kv_heads:
        raise ValueError(
            f"{num_q_heads} query heads do not divide into groups over {num_kv_heads} key/value heads: "
            "num_q_heads must be a positive multiple of num_kv_heads"
        )
    hidden_size, heads = x.shape[1], num_q_heads + 2 * num_kv_heads
    if qkv_weight.ndim != 2 or qkv_weight.shape[1] != hidden_size:
        raise ValueError(f"qkv_weight must be [rows, {hidden_size}] to match x, not {list(qkv_weight.shape)}")
    rows = qkv_weight.shape[0]
    if rows == 0 or rows % heads:
        raise ValueError(f"qkv_weight has {rows} rows, which do not divide into {heads} heads (q, k and v together)")
    if (q_norm_weight is None) != (k_norm_weight is None):
        raise ValueError("q_norm_weight and k_norm_weight must be given together, or neither")
    check_eps(eps)
    check_tensor("x", x, list(x.shape), like=x)
    check_tensor("norm_weight", norm_weight, [hidden_size], like=x)
    check_tensor("qkv_weight", qkv_weight, [rows, hidden_size], like=x)
    for name, tensor, shape in (
        ("q_norm_weight", q_norm_weight, [rows // heads]),
        ("k_norm_weight", k_norm_weight, [rows // heads]),
        ("bias", bias, [rows]),
        ("residual", residual, list(x.shape)),
    ):
        if tensor is not None:
            check_tensor(name, tensor, shape, like=x)
    check_rope(positions, cos_sin_cache, x.shape[0], rows // heads, like=x)


def check_rope(
    positions: Tensor | None, cos_sin_cache: Tensor | None, tokens: int, head_dim: int, *, like: Tensor
) -> None:
    """Raises ValueError unless both are None or fit together. That positions lie within the cache is not checked,
    since that would wait for the GPU."""
    if (positions is None) != (cos_sin_cache is None):
        raise ValueError("positions and cos_sin_cache must be given together, or neither")
    if positions is None or cos_sin_cache is None:
        return
    if head_dim < 16 or head_dim & (head_dim - 1):
        right = "the head size must be 16, 32, 64 and so on"
        raise ValueError(f"RoPE cuts a tile that holds one head into halves: {right}, not {head_dim}")
    check_tensor("positions", positions, [tokens], like=like, dtype=torch.int64)
    rows = cos_sin_cache.shape[0] if cos_sin_cache.ndim == 2 else "positions"
    if cos_sin_cache.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"cos_sin_cache must be torch.float32 or torch.bfloat16, not {cos_sin_cache.dtype}")
    check_tensor("cos_sin_cache", cos_sin_cache, [rows, head_dim], like=like, dtype=cos_sin_cache.dtype)
    if not cos_sin_cache.is_contiguous():
        right = "contiguous, cos in the first half of each row"
        raise ValueError(f"cos_sin_cache must be {right}, not of strides {cos_sin_cache.stride()}")


def check_plan(plan: CastPlan) -> None:
    """Raises ValueError for what is no plan, such as the name of one."""
    if not isinstance(plan, CastPlan):
        raise ValueError(f"plan must be a CastPlan, such as CastPlan(proj='bf16-rne'), not {plan!r}")


def check_eps(eps: float) -> None:
    if not (isinstance(eps, int | float) and math.isfinite(eps) and eps > 0):
        raise ValueError(f"eps must be a positive number (Qwen3 uses 1e-6), not {eps!r}")


def check_tensor(
    name: str, tensor: Tensor, shape: Sequence[object], *, like: Tensor, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Raises ValueError unless tensor has that shape and dtype and lies on the device of `like`."""
    if list(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, not {list(tensor.shape)}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, not {tensor.dtype}: convert it with .to({dtype})")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device} but x is on {like.device}: move them to one device")
