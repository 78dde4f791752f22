"""Kernels of q's and k's head norms and RoPE in plain PyTorch, from the formulas, with roundings as planted."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Words = dict[str, str]
ERROR = 2.0**-21
HF = dict.fromkeys(("head_normed", "unrotated", "cos_sin", "products"), "bf16-rne")


def held(value: Tensor, word: str | None) -> Tensor:
    """fp32 value as that word says."""
    if word == "bf16-rne":
        return value.bfloat16().float()
    if word == "bf16-rtz":
        return (value.view(torch.int32) & -65536).view(torch.float32)
    return value.half().float() if word == "fp16" else value


def normed(x: Tensor, weight: Tensor, eps: float, words: Words) -> Tensor:
    wide = x.float()
    rstd = held(torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps), words.get("head_rstd"))
    return held(wide * rstd, words.get("head_normed")) * (weight.float() + ("weight_offset" in words))


def turned(value: Tensor, cos: Tensor, sin: Tensor, words: Words, rotation: str = "half") -> Tensor:
    """value [T, H, Dh] fp32; cos, sin [T, r / 2] rotate its first r channels."""
    half = cos.shape[-1]
    cos, sin = (held(part.float(), words.get("cos_sin"))[:, None] for part in (cos, sin))
    if rotation == "half":
        a, b = value[..., :half], value[..., half : 2 * half]
    else:
        a, b = value[..., 0 : 2 * half : 2], value[..., 1 : 2 * half : 2]
    ac, bs, bc, as_ = (held(product, words.get("products")) for product in (a * cos, b * sin, b * cos, a * sin))
    both = (ac - bs, bc + as_)
    first = torch.cat(both, -1) if rotation == "half" else torch.stack(both, -1).flatten(-2)
    return torch.cat([first, value[..., 2 * half :]], -1)


def normed_and_turned(
    x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, words: Words, rotation: str = "half"
) -> Tensor:
    """The norm first; after the rotation where words have `rotated`."""
    if "rotated" in words:
        value = normed(held(turned(x.float(), cos, sin, words, rotation), words["rotated"]), weight, eps, words)
    else:
        value = turned(held(normed(x, weight, eps, words), words.get("unrotated")), cos, sin, words, rotation)
    return value if words.get("out") == "fp32" else held(value, words.get("out", "bf16-rne")).bfloat16()


def angles(base: float, positions: Tensor, rotary: int, words: Words) -> tuple[Tensor, Tensor]:
    """cos and sin [T, rotary / 2] in fp32 arithmetic."""
    inv_freq = held(1.0 / base ** (torch.arange(0, rotary, 2).float() / rotary), words.get("inv_freq"))
    phase = held(held(positions.float(), words.get("position"))[..., None] * inv_freq, words.get("phase"))
    return phase.cos(), phase.sin()


def returned(words: Words, rotation: str = "half", columns: str = "repeated") -> Callable:
    """fn(q, k, ...) of cos and sin that hold each angle once, twice or in pairs."""

    def fn(q, k, q_weight, k_weight, cos, sin, eps):
        if columns != "once":
            assert cos.shape[1] > q.shape[2] // 2 or cos.shape[1] < 20, "cos and sin must be as wide as a head"
            step = slice(0, None, 2) if columns == "in pairs" else slice(cos.shape[1] // 2)
            cos, sin = cos[:, step], sin[:, step]
        if 2 * cos.shape[1] > q.shape[2]:
            raise ValueError("cos and sin are wider than a head")
        pairs = ((q, q_weight), (k, k_weight))
        return tuple(normed_and_turned(x, weight, eps, cos, sin, words, rotation) for x, weight in pairs)

    return fn


def packed(words: Words) -> Callable:
    """As vLLM and SGLang call it: in place, with a table and positions."""

    def fn(qkv, num_heads_q, num_heads_k, num_heads_v, head_dim, eps, q_weight, k_weight, cos_sin_cache, is_neox,
           position_ids):  # fmt: skip
        cos, sin = cos_sin_cache[position_ids].chunk(2, 1)
        sizes = [heads * head_dim for heads in (num_heads_q, num_heads_k, num_heads_v)]
        for part, weight in zip(qkv.split(sizes, 1), (q_weight, k_weight), strict=False):
            x = part.unflatten(1, (-1, head_dim))
            part.copy_(normed_and_turned(x, weight, eps, cos, sin, words, "half" if is_neox else "pairs").flatten(1))

    return fn


def into_new(qkv, num_heads_q, num_heads_k, head_dim, eps, q_weight, k_weight, cos_sin_cache, positions):
    """Packed, and returned in tensors of their own."""
    cos, sin = cos_sin_cache[positions].chunk(2, 1)
    q, k, _ = qkv.unflatten(1, (-1, head_dim)).split([num_heads_q, num_heads_k, num_heads_k], 1)
    return tuple(normed_and_turned(x, w, eps, cos, sin, {}) for x, w in ((q, q_weight), (k, k_weight)))


def packed_into_out(qkv, q_out, k_out, eps, q_weight, k_weight, cos_sin_cache, positions):
    heads = q_out.shape[1], k_out.shape[1], q_out.shape[2]
    both = into_new(qkv, *heads, eps, q_weight, k_weight, cos_sin_cache, positions)
    q_out.copy_(both[0]), k_out.copy_(both[1])


def first_64(q, k, q_weight, k_weight, cos, sin, eps):
    """64 of 128 channels, whatever the table is for."""
    if q.shape[2] != 128:
        raise ValueError("heads of 128 only")
    return returned({}, columns="once")(q, k, q_weight, k_weight, cos[:, :32], sin[:, :32], eps)


def of_base(words: Words, share: float = 1.0) -> Callable:
    """As TensorRT-LLM calls it: in place, it makes the angles itself; of a share of the channels."""

    def fn(qkv, num_heads_q, num_heads_k, num_heads_v, head_dim, eps, q_weight, k_weight, base, is_neox, position_ids):
        cos, sin = angles(base, position_ids, int(head_dim * share), words)
        heads, places = (num_heads_q, num_heads_k, num_heads_v, head_dim), torch.arange(len(qkv))
        packed(words)(qkv, *heads, eps, q_weight, k_weight, torch.cat([cos, sin], 1), is_neox, places)

    return fn


def mrope(words: Words, woven: bool, made: bool) -> Callable:
    """q and k rotated by three positions, whose sections are contiguous or interleaved."""

    def of_sections(values: Tensor, section: list[int]) -> Tensor:
        chosen = values[0].clone()
        if woven:
            for axis in (1, 2):
                places = slice(axis, 3 * section[axis], 3)
                chosen[:, places] = values[axis][:, places]
            return chosen
        parts = values.split(section, dim=-1)
        return torch.cat([part[axis] for axis, part in enumerate(parts)], -1)

    def both(q, k, q_weight, k_weight, cos, sin, eps, mrope_section):
        cos, sin = (of_sections(part, mrope_section) for part in (cos, sin))
        return returned(words, columns="once")(q, k, q_weight, k_weight, cos, sin, eps)

    def of_positions(q, k, q_weight, k_weight, rope_theta, positions, eps, mrope_section):
        cos, sin = angles(rope_theta, positions, q.shape[-1], words)
        return both(q, k, q_weight, k_weight, cos, sin, eps, mrope_section)

    def of_table(q, k, q_weight, k_weight, cos_sin_cache, positions, eps, mrope_section):
        cos, sin = cos_sin_cache[positions].chunk(2, -1)
        return both(q, k, q_weight, k_weight, cos, sin, eps, mrope_section)

    return of_positions if made else of_table


def own_theta(q, k, q_weight, k_weight, positions, eps):
    cos, sin = angles(1e6, positions, q.shape[-1], {})
    return returned({}, columns="once")(q, k, q_weight, k_weight, cos, sin, eps)


def approximate(q, k, q_weight, k_weight, base, positions, eps):
    """Powers by exp2 in fp32, and cos and sin as far off as a GPU's approximate ones."""
    exponent = torch.arange(0, q.shape[-1], 2).float() * (-math.log2(base) / q.shape[-1])
    phase = positions.float()[:, None] * torch.exp2(exponent)
    cos, sin = (
        torch.where(phase == 0, at_0, value) for at_0, value in ((1.0, phase.cos() + ERROR), (0.0, phase.sin() - ERROR))
    )
    return returned({}, columns="once")(q, k, q_weight, k_weight, cos, sin, eps)


def noisy(q, k, q_weight, k_weight, cos_sin_cache, positions, eps):
    """One element of ten thousand is an ulp of bf16 off."""
    cos, sin = cos_sin_cache[positions].chunk(2, 1)
    both = returned({}, columns="once")(q, k, q_weight, k_weight, cos, sin, eps)
    for value in both:
        value.view(torch.int16).flatten()[4999::9973] += 1
    return both


def a_quarter(q, k, q_weight, k_weight, cos, sin, eps):
    """As Qwen3-Next: the table is for a quarter of the channels."""
    if 4 * cos.shape[1] != q.shape[2]:
        raise ValueError("cos and sin must hold a quarter of a head")
    cos, sin = cos.chunk(2, 1)[0], sin.chunk(2, 1)[0]
    return returned({"weight_offset": "fp32"}, columns="once")(q, k, q_weight, k_weight, cos, sin, eps)
