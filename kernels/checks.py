"""Checks of the chain's inputs: one sentence that says what is wrong and what would be right."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .plan import CastPlan

# What a tensor is joined from, where several were given in its place.
PARTS = {
    "norm_weight": "q, k and v share the norm before them; the head norms' weights are q_norm_weight and k_norm_weight",
    "qkv_weight": "join them by rows with torch.cat, q, k, v",
    "packed": "join them by rows with torch.cat, q, k, v",
    "bias": "join them with torch.cat, q, k, v",
    "cos_sin_cache": "a row is cos of Dh / 2 angles, then their sin, joined with torch.cat",
    "residual": "give one residual stream, which is added to x",
}
WITHOUT = {"norm_weight": "a norm without a weight takes ones (zeros where the plan adds 1)"}


def check_inputs(
    x: Tensor, norm_weight: Tensor, qkv_weight: Tensor, num_q_heads: int, num_kv_heads: int,
    q_norm_weight: Tensor | None, k_norm_weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    eps: float, positions: Tensor | None, cos_sin_cache: Tensor | None, *, weight_name: str = "qkv_weight",
) -> None:  # fmt: skip
    """Raises ValueError unless types, shapes, dtypes, devices, heads and eps fit together. Reads no element.

    weight_name: what the caller calls qkv_weight.
    """
    check_plain("x", x)
    check_plain("norm_weight", norm_weight)
    check_plain(weight_name, qkv_weight)
    optional = {
        "q_norm_weight": q_norm_weight, "k_norm_weight": k_norm_weight, "bias": bias, "residual": residual,
        "positions": positions, "cos_sin_cache": cos_sin_cache,
    }  # fmt: skip
    for name, given in optional.items():
        if given is not None:
            check_plain(name, given, codes=name == "positions")
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"x must be [tokens, hidden size], not {list(x.shape)}")
    check_count("num_q_heads", num_q_heads)
    check_count("num_kv_heads", num_kv_heads)
    if num_q_heads < 1 or num_kv_heads < 1 or num_q_heads % num_kv_heads:
        raise ValueError(
            f"{num_q_heads} query heads do not divide into groups over {num_kv_heads} key/value heads: "
            "num_q_heads must be a positive multiple of num_kv_heads"
        )
    hidden_size, heads = x.shape[1], num_q_heads + 2 * num_kv_heads
    if qkv_weight.ndim != 2 or qkv_weight.shape[1] != hidden_size:
        raise ValueError(f"{weight_name} must be [rows, {hidden_size}] to match x, not {list(qkv_weight.shape)}")
    rows = qkv_weight.shape[0]
    if rows == 0 or rows % heads:
        raise ValueError(f"{weight_name} has {rows} rows, which do not divide into {heads} heads (q, k and v together)")
    if (q_norm_weight is None) != (k_norm_weight is None):
        raise ValueError("q_norm_weight and k_norm_weight must be given together, or neither")
    check_eps(eps)
    check_tensor("x", x, list(x.shape), like=x)
    check_tensor("norm_weight", norm_weight, [hidden_size], like=x)
    check_tensor(weight_name, qkv_weight, [rows, hidden_size], like=x)
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
    positions: Tensor | None, cos_sin_cache: Tensor | None, tokens: int, head_dim: int, *, like: Tensor,
    first: str = "x",
) -> None:  # fmt: skip
    """Raises ValueError unless both are None or fit together. That positions lie within the cache is not checked,
    since that would wait for the GPU."""
    if (positions is None) != (cos_sin_cache is None):
        raise ValueError("positions and cos_sin_cache must be given together, or neither")
    if positions is None or cos_sin_cache is None:
        return
    check_plain("cos_sin_cache", cos_sin_cache)
    check_rotated(positions, tokens, head_dim, like=like, first=first)
    rows = cos_sin_cache.shape[0] if cos_sin_cache.ndim == 2 else "positions"
    if cos_sin_cache.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"cos_sin_cache must be torch.float32 or torch.bfloat16, not {cos_sin_cache.dtype}")
    check_tensor("cos_sin_cache", cos_sin_cache, [rows, head_dim], like=like, first=first, dtype=cos_sin_cache.dtype)
    if not cos_sin_cache.is_contiguous():
        right = "contiguous, cos in the first half of each row"
        raise ValueError(f"cos_sin_cache must be {right}, not of strides {cos_sin_cache.stride()}")


def check_rotated(positions: Tensor, tokens: int, head_dim: int, *, like: Tensor, first: str = "x") -> None:
    """Raises ValueError unless these are positions of that many tokens, and heads of that size can be rotated."""
    check_plain("positions", positions, codes=True)
    if head_dim < 16 or head_dim & (head_dim - 1):
        right = "the head size must be 16, 32, 64 and so on"
        raise ValueError(f"RoPE cuts a tile that holds one head into halves: {right}, not {head_dim}")
    check_tensor("positions", positions, [tokens], like=like, first=first, dtype=torch.int64)


def check_plan(plan: CastPlan) -> None:
    """Raises ValueError for what is no plan, such as the name of one."""
    if not isinstance(plan, CastPlan):
        raise ValueError(f"plan must be a CastPlan, such as CastPlan(proj='bf16-rne'), not {described(plan)}")


def check_eps(eps: float) -> None:
    if isinstance(eps, bool) or not (isinstance(eps, int | float) and math.isfinite(eps) and eps > 0):
        raise ValueError(f"eps must be a positive number (Qwen3 uses 1e-6), not {described(eps)}")


def check_count(name: str, count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int):
        raise ValueError(f"{name} must be an int, not {described(count)}")


def check_outputs(out: tuple[Tensor, ...] | None, names: Sequence[str]) -> tuple[Tensor | None, ...]:
    """The tensors to write to, of each name one. Raises ValueError for anything but None or as many in a tuple."""
    if out is None:
        return (None,) * len(names)
    if not isinstance(out, tuple | list) or len(out) != len(names):
        raise ValueError(f"out must be a tuple ({', '.join(names)}) of tensors, or None, not {described(out)}")
    return tuple(out)


def check_plain(name: str, tensor: Tensor | None, *, codes: bool = False) -> None:
    """Raises ValueError unless it is a dense tensor in memory, whose elements are the numbers they stand for.

    codes: True where integers and bytes are taken too.
    """
    if not isinstance(tensor, Tensor):
        hint = _instead_of(name, tensor)
        raise ValueError(f"{name} must be a tensor, not {described(tensor)}" + (f": {hint}" if hint else ""))
    if tensor.is_nested:
        raise ValueError(f"{name} is a nested tensor: give one dense tensor, such as .values() of a jagged one")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} is sparse ({tensor.layout}): give {name}.to_dense()")
    if tensor.is_quantized or not codes and _needs_scale(tensor.dtype):
        way = f"{name}.dequantize()" if tensor.is_quantized else f"({name}.float() * scale).to(torch.bfloat16)"
        raise ValueError(
            f"{name} is {tensor.dtype}, whose numbers mean nothing without their scale: dequantise it with that, "
            f"for instance by {way}"
        )
    if hasattr(type(tensor), "__tensor_flatten__"):
        raise ValueError(
            f"{name} is a {type(tensor).__name__}, which wraps other tensors: give a plain one, such as .to_local() "
            "of a DTensor or .dequantize() of quantised weights"
        )


def _needs_scale(dtype: torch.dtype) -> bool:
    """Whether numbers of that type are codes: of 8 bits or fewer, or several packed into an integer."""
    return dtype != torch.bool and (dtype.itemsize == 1 or (not _is_real(dtype) and dtype.itemsize < 8))


def _is_real(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def check_no_grad(**tensors: object) -> None:
    """Raises ValueError where a gradient waits for what a launch makes, since it would be lost without a word."""
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires grad, and these kernels have no backward: launch them under torch.no_grad(), or give "
                f"{name}.detach()"
            )


def check_tensor(
    name: str, tensor: Tensor, shape: Sequence[object], *, like: Tensor, first: str = "x",
    dtype: torch.dtype = torch.bfloat16,
) -> None:  # fmt: skip
    """Raises ValueError unless tensor has that shape and dtype and lies in memory, on the device of `like`, which the
    caller calls `first`."""
    if list(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, not {list(tensor.shape)}")
    if tensor.dtype != dtype:
        alike = tensor.dtype.is_floating_point == dtype.is_floating_point and _is_real(tensor.dtype) == _is_real(dtype)
        how = f": convert it with .to({dtype})" if alike and tensor.dtype != torch.bool else ""
        raise ValueError(f"{name} must be {dtype}, not {tensor.dtype}{how}")
    if tensor.device != like.device:
        empty = ", and load it there, since meta holds no elements" if tensor.is_meta else ""
        where = f"{name} is on {tensor.device} but {first} is on {like.device}"
        raise ValueError(f"{where}: move them to one device{empty}")
    if tensor.is_meta:
        raise ValueError(f"{name} is on meta, which holds no elements: load it to the device on which the kernel runs")


def described(value: object) -> str:
    """What an argument is, in a few words of one line."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, torch.nn.Module):
        return f"the module {type(value).__name__}"
    if type(value).__name__ == "ndarray":
        shape, dtype = getattr(value, "shape", ()), getattr(value, "dtype", "")
        return f"a numpy array {list(shape)} of {dtype}"
    shown = " ".join(repr(value).split())
    shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
    return shown if type(value).__module__ == "builtins" else f"{shown}, a {type(value).__name__}"


def _instead_of(name: str, value: object) -> str:
    """What would be right in place of something that is no tensor; empty where nothing is known."""
    if value is None:
        return WITHOUT.get(name, "")
    if isinstance(value, tuple | list):
        if value and all(isinstance(part, Tensor) for part in value):
            return PARTS.get(name, "give one tensor")
        return f"torch.tensor({name}) makes one"
    if isinstance(value, torch.nn.Module):
        return f"give its {'bias' if name == 'bias' else 'weight'}"
    return f"torch.from_numpy({name}) makes one" if type(value).__module__ == "numpy" else ""
