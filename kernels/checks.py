"""Checks of the chain's inputs: one sentence that says what is wrong and what would be right."""

from __future__ import annotations

import math

import torch
from torch import Tensor

KEEP = "fp32"
RNE = "bf16-rne"
RTZ = "bf16-rtz"
STORAGE = (KEEP, RNE, RTZ)  # how a value is held: kept, rounded to nearest even, truncated

# The values of the chain that may be rounded, in order; three of them exist only where q and k are rotated.
ROPE_BOUNDARIES = ("unrotated", "cos_sin", "products")
BOUNDARIES = (
    *("x", "statistics", "variance", "rstd", "normed", "hidden", "proj", "head_rstd", "head_normed"),
    *ROPE_BOUNDARIES,
    "out",
)
CHOICES = {
    "scale": ("prologue", "epilogue", "folded"),
    "matmul": ("bf16", "tf32", "tf32x3", "fp32"),
    "weight_offset": ("none", "fp32", "bf16-rne"),
}


def check_flags(flags: dict[str, str]) -> None:
    """Raises ValueError unless every flag has a word it knows and no two contradict each other.

    flags: a word for each boundary that matters and each choice, by name.
    """
    for name, word in flags.items():
        allowed = CHOICES.get(name, STORAGE)
        if word not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {word!r}")
    if "matmul" not in flags:
        return
    scale, matmul, normed, hidden = (flags[name] for name in ("scale", "matmul", "normed", "hidden"))
    if scale != "prologue" and normed != KEEP:
        raise ValueError(
            f"scale={scale!r} applies rstd after the matmul, so x * rstd is never formed: "
            f"normed must be {KEEP!r}, not {normed!r}"
        )
    if scale == "folded":
        if hidden != KEEP:
            raise ValueError(
                "scale='folded' feeds x itself to the matmul, so there is no x * w_in to round: "
                f"hidden must be {KEEP!r}, not {hidden!r}"
            )
        if matmul != "bf16" or flags["x"] == KEEP:
            raise ValueError(
                "scale='folded' multiplies x in bf16 with weights folded to bf16: "
                f"matmul must be 'bf16' and x rounded, not matmul={matmul!r} with x={flags['x']!r}"
            )
    elif (matmul == "bf16") != (hidden != KEEP):
        raise ValueError(
            f"matmul={matmul!r} contradicts hidden={hidden!r}: a bf16 matmul needs hidden in bf16, and with hidden in "
            "bf16 every wider matmul is the same function, because products of bf16 values are exact in fp32"
        )


def check_inputs(
    x: Tensor,
    norm_weight: Tensor,
    qkv_weight: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    positions: Tensor | None = None,
    cos_sin_cache: Tensor | None = None,
) -> None:
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
    if positions is None:
        return
    if head_dim < 16 or head_dim & (head_dim - 1):
        raise ValueError(
            "RoPE cuts a tile that holds one head into halves: the head size must be 16, 32, 64 and so on, not "
            f"{head_dim}"
        )
    check_tensor("positions", positions, [tokens], like=like, dtype=torch.int64)
    rows = cos_sin_cache.shape[0] if cos_sin_cache.ndim == 2 else "positions"
    if cos_sin_cache.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"cos_sin_cache must be torch.float32 or torch.bfloat16, not {cos_sin_cache.dtype}")
    check_tensor("cos_sin_cache", cos_sin_cache, [rows, head_dim], like=like, dtype=cos_sin_cache.dtype)
    if not cos_sin_cache.is_contiguous():
        raise ValueError(
            f"cos_sin_cache must be contiguous, cos in the first half of each row, not of strides "
            f"{cos_sin_cache.stride()}"
        )


def check_eps(eps: float) -> None:
    if not (isinstance(eps, int | float) and math.isfinite(eps) and eps > 0):
        raise ValueError(f"eps must be a positive number (Qwen3 uses 1e-6), not {eps!r}")


def check_tensor(
    name: str, tensor: Tensor, shape: list[int], *, like: Tensor, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Raises ValueError unless tensor has that shape and dtype and lies on the device of `like`."""
    if list(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, not {list(tensor.shape)}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, not {tensor.dtype}: convert it with .to({dtype})")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device} but x is on {like.device}: move them to one device")
