"""Kernels of q's and k's norms and RoPE that are wrong in one thing, and what must be said of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from rope_kernels import HF, angles, into_new, normed_and_turned, of_base, own_theta, packed, returned
from torch import Tensor

from castpoint.kernels.plan import RNE


def table_kernel(change: Callable[..., Any]) -> Callable[..., Any]:
    """Kernels that are right but for what change makes of x, weight, cos and sin, and of which of q and k it is."""

    def fn(q, k, q_weight, k_weight, cos_sin_cache, positions, eps):
        cos, sin = cos_sin_cache[positions].chunk(2, 1)
        given = {"q": (q, q_weight, cos, sin), "k": (k, k_weight, cos, sin)}
        both = {name: change(name, eps, *values) for name, values in given.items()}
        return tuple(value if isinstance(value, Tensor) else normed_and_turned(*value[:2], eps, *value[2:], {})
                     for value in both.values())  # fmt: skip

    return fn


def another_position(name, eps, x, weight, cos, sin):
    return (x, weight, *(part.roll(1, 0) if name == "k" else part for part in (cos, sin)))


def odd_heads(name, eps, x, weight, cos, sin):
    value = normed_and_turned(x, weight, eps, cos, sin, {})
    if x.shape[1] % 2 and x.shape[1] > 1:
        value[:, -1] = normed_and_turned(x, weight, eps, torch.ones_like(cos), torch.zeros_like(sin), {})[:, -1]
    return value


def as_if_contiguous(name, eps, x, weight, cos, sin):
    return x.as_strided(x.shape, (x.shape[1] * x.shape[2], x.shape[2], 1)), weight, cos, sin


def sign_of_the_second_half(name, eps, x, weight, cos, sin):
    half, value = x.shape[-1] // 2, normed_and_turned(x, weight, eps, cos, sin, {})
    value[..., half:] = normed_and_turned(x, weight, eps, cos, -sin, {})[..., half:]
    return value


def the_other_way(name, eps, x, weight, cos, sin):
    return x, weight, cos, -sin


def aligned_table(q, k, q_weight, k_weight, cos, sin, eps):
    """Reads cos and sin from an address that it rounds down to 16 bytes."""
    few = 16 // cos.element_size()
    cos, sin = (t.as_strided(t.shape, t.stride(), t.storage_offset() // few * few) for t in (cos, sin))
    return returned({})(q, k, q_weight, k_weight, cos, sin, eps)


def kv_heads_of(wrong):
    def fn(q, k, q_weight, k_weight, cos, sin, eps):
        q, k = returned({})(q, k, q_weight, k_weight, cos, sin, eps)
        return q, k * (1 + wrong(*k.shape))

    return fn


def eps_ignored(name, eps, x, weight, cos, sin):
    return normed_and_turned(x, weight, 1e-6, cos, sin, {})


def fp16_table(name, eps, x, weight, cos, sin):
    return x, weight, cos.half().float(), sin.half().float()


def not_rotated(name, eps, x, weight, cos, sin):
    return x, weight, torch.ones_like(cos), torch.zeros_like(sin)


def k_alone_rounds(name, eps, x, weight, cos, sin):
    return normed_and_turned(x, weight, eps, cos, sin, {"products": RNE} if name == "k" else {})


def k_norm_rounds(name, eps, x, weight, cos, sin):
    return normed_and_turned(x, weight, eps, cos, sin, {"head_normed": RNE} if name == "k" else {})


def half_of_a_large_head(name, eps, x, weight, cos, sin):
    return (x, weight, *((part[:, :64] if x.shape[-1] == 256 else part) for part in (cos, sin)))


def tokens_beyond_512(name, eps, x, weight, cos, sin):
    return (x, weight, *(part[torch.arange(len(x)) % 512] for part in (cos, sin)))


def overflowing(name, eps, x, weight, cos, sin):
    return x.half().clamp(-6e4, 6e4).float(), weight, cos, sin


def wrong_for(tokens: Callable[[int], bool]) -> Callable[..., Any]:
    """The last token of so many is not rotated."""

    def change(name, eps, x, weight, cos, sin):
        if not tokens(len(x)):
            return x, weight, cos, sin
        still = torch.arange(len(x))[:, None] == len(x) - 1
        return x, weight, cos.where(~still, 1), sin.where(~still, 0)

    return change


def last_kv_head(name, eps, x, weight, cos, sin):
    value = normed_and_turned(x, weight, eps, cos, sin, {})
    if name == "k" and x.shape[1] >= 8:
        value[:, -1] = value[:, 0]
    return value


def last_pair_still(rotation: str) -> Callable[..., Any]:
    def fn(q, k, q_weight, k_weight, cos, sin, eps):
        still = torch.arange(cos.shape[1]) == cos.shape[1] - 1
        angles = cos.where(~still, 1), sin.where(~still, 0)
        return returned({}, rotation, columns="once")(q, k, q_weight, k_weight, *angles, eps)

    return fn


def stride_of_k(name, eps, x, weight, cos, sin):
    return as_if_contiguous(name, eps, x, weight, cos, sin) if name == "k" else (x, weight, cos, sin)


def reads_what_it_wrote(q, k, q_weight, k_weight, cos_sin_cache, positions, eps):
    cos, sin = (part[:, None] for part in cos_sin_cache[positions].chunk(2, 1))
    for x, weight in ((q, q_weight), (k, k_weight)):
        first, second = x.chunk(2, -1)
        x.copy_(normed_and_turned(x, weight, eps, torch.ones_like(cos[:, 0]), torch.zeros_like(sin[:, 0]), {}))
        first.copy_(first * cos - second * sin)
        second.copy_(second * cos + first * sin)


def spoils_q(qkv, num_heads_q, num_heads_k, head_dim, eps, q_weight, k_weight, cos_sin_cache, positions):
    q, k = into_new(qkv, num_heads_q, num_heads_k, head_dim, eps, q_weight, k_weight, cos_sin_cache, positions)
    qkv[:, : q.shape[1] * q.shape[2]] = q.flatten(1)
    return q, k


def wide_v(qkv, num_heads_q, num_heads_k, head_dim, eps, q_weight, k_weight, cos_sin_cache, positions):
    q, k = into_new(qkv, num_heads_q, num_heads_k, head_dim, eps, q_weight, k_weight, cos_sin_cache, positions)
    return q, k, qkv[:, -num_heads_k * head_dim :].float()


def with_positions(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def fn(q, k, q_weight, k_weight, cos_sin_cache, positions, eps):
        cos, sin = cos_sin_cache[change(positions).clamp(min=0)].chunk(2, 1)
        return returned({}, columns="once")(q, k, q_weight, k_weight, cos, sin, eps)

    return fn


def swapped_weights(q, k, q_weight, k_weight, cos, sin, eps):
    return returned(HF)(q, k, q_weight, q_weight, cos, sin, eps)


def swapped_back(q, k, q_weight, k_weight, cos, sin, eps):
    return returned(HF)(q, k, k_weight, k_weight, cos, sin, eps)


def changes_v(qkv, num_heads_q, num_heads_k, num_heads_v, head_dim, eps, q_weight, k_weight, cos_sin_cache, is_neox,
              position_ids):  # fmt: skip
    heads = (num_heads_q, num_heads_k, num_heads_v, head_dim)
    packed({})(qkv, *heads, eps, q_weight, k_weight, cos_sin_cache, is_neox, position_ids)
    qkv[:, -1] *= 2


def stride_of_qkv(qkv, num_heads_q, num_heads_k, num_heads_v, head_dim, eps, q_weight, k_weight, cos_sin_cache, is_neox,
                  position_ids):  # fmt: skip
    heads = (num_heads_q, num_heads_k, num_heads_v, head_dim)
    flat = qkv.as_strided(qkv.shape, (qkv.shape[1], 1))
    packed({})(flat, *heads, eps, q_weight, k_weight, cos_sin_cache, is_neox, position_ids)


def half_alone(qkv, num_heads_q, num_heads_k, num_heads_v, head_dim, eps, q_weight, k_weight, cos_sin_cache, is_neox,
               position_ids):  # fmt: skip
    heads = (num_heads_q, num_heads_k, num_heads_v, head_dim)
    packed({})(qkv, *heads, eps, q_weight, k_weight, cos_sin_cache, True, position_ids)


def first_axis_alone(q, k, q_weight, k_weight, rope_theta, positions, eps, mrope_section):
    cos, sin = angles(rope_theta, positions[0], q.shape[-1], {})
    return returned({}, columns="once")(q, k, q_weight, k_weight, cos, sin, eps)


def base_ignored(q, k, q_weight, k_weight, base, positions, eps):
    return own_theta(q, k, q_weight, k_weight, positions, eps)


def moves_positions(q, k, q_weight, k_weight, cos_sin_cache, positions, eps):
    both = with_positions(lambda p: p)(q, k, q_weight, k_weight, cos_sin_cache, positions, eps)
    positions += 1
    return both


def of_frequencies(change: Callable[[Tensor], Tensor], rotation: str = "half", size: float = 1.0) -> Callable[..., Any]:
    """Kernels that make their angles, of what change makes of theta's frequencies; cos and sin times size."""

    def fn(q, k, q_weight, k_weight, base, positions, eps):
        steps = torch.arange(0, q.shape[-1], 2).double() / q.shape[-1]
        phase = positions[:, None].double() * change(base**-steps)
        cos, sin = (size * phase.cos()).float(), (size * phase.sin()).float()
        return returned({}, rotation, "once")(q, k, q_weight, k_weight, cos, sin, eps)

    return fn


def shares_of(frequencies: Tensor) -> Tensor:
    """2i / Dh."""
    return torch.arange(len(frequencies)).double() / len(frequencies)


def llama_3(frequencies: Tensor) -> Tensor:
    """Long wavelengths over 8, short ones as they are, smoothly between."""
    turns = 8192 * frequencies / (2 * math.pi)
    smooth = ((turns - 1) / 3).clamp(0, 1)
    return frequencies * (smooth + (1 - smooth) / 8)


WRONG: dict[str, tuple[Callable[..., Any], str]] = {  # and what the reason must say
    "k is rotated by another position": (table_kernel(another_position), "explains 100.00% of q and"),
    "the last of an odd number of heads": (table_kernel(odd_heads), r"head [24] of [qk] has"),
    "strides are ignored": (table_kernel(as_if_contiguous), "it reads x as if it were contiguous"),
    "the stride of rows of qkv is ignored": (stride_of_qkv, "with rows of a packed buffer: .* writes beside q and k"),
    "the sign of the second half": (table_kernel(sign_of_the_second_half), "the nearest rotation"),
    "the other way": (table_kernel(the_other_way), "it rotates the other way, by minus the angle"),
    "eps is ignored": (table_kernel(eps_ignored), "q at position 0, .*eps is not used"),
    "a table in fp16": (table_kernel(fp16_table), "all is explained if cos_sin is rounded to fp16"),
    "nothing is rotated": (table_kernel(not_rotated), "make no difference"),
    "k alone rounds products": (table_kernel(k_alone_rounds), "head . of k has"),
    "k's norm rounds": (
        table_kernel(k_norm_rounds),
        "norms of q and k differ, head_normed=fp32 against bf16-rne",
    ),
    "half of a large head": (table_kernel(half_of_a_large_head), r"with q \[33, 3, 256\]"),
    "tokens beyond 512": (table_kernel(tokens_beyond_512), r"with q \[600, 16, 128\]"),
    "the last of 65 tokens": (table_kernel(wrong_for(lambda tokens: tokens == 65)), r"with q \[65, 4, 128\]"),
    "the last of 257 tokens": (table_kernel(wrong_for(lambda tokens: tokens == 257)), r"with q \[257, 2, 128\]"),
    "the last kv head": (table_kernel(last_kv_head), r"k at position 0, .* with x \[1, 16, 256\]"),
    "the last pair": (last_pair_still("half"), "the nearest rotation, half .* explains 98"),
    "the last pair, interleaved": (
        last_pair_still("interleaved"),
        "it is given angles of 128 channels, and rotates the first 126",
    ),
    "strides of k are ignored": (table_kernel(stride_of_k), "k at position 0, .* with heads before tokens"),
    "what was written is read": (reads_what_it_wrote, "the nearest rotation"),
    "q is spoiled": (spoils_q, "writes into q and k, and returns other tensors"),
    "v in fp32": (wide_v, r"returned v as \[64, 256\] of torch.float32, expected \[64, 2, 128\] of torch.bfloat16"),
    "fp16 overflows": (table_kernel(overflowing), "with x .* where the plan has"),
    "positions of 15 bits": (with_positions(lambda p: p.to(torch.int16).long()), r"with q \[7, 16, 256\]"),
    "positions of 16 bits": (with_positions(lambda p: p & 0xFFFF), "with positions up to 131,071"),
    "the weight of q for k": (swapped_weights, "k at position 0"),
    "the weight of k for q": (swapped_back, "q at position 0"),
    "v is changed": (changes_v, "changes v"),
    "is_neox is ignored": (half_alone, "is_neox=False"),
    "one position of three": (first_axis_alone, "the nearest rotation"),
    "the base is ignored": (base_ignored, r"all is explained, roundings aside, if theta is 1e\+06"),
    "a theta of its own": (of_frequencies(lambda f: 150000 ** -shares_of(f)), "if theta is 150000"),
    "positions over 4": (of_frequencies(lambda f: f / 4), "theta's frequencies are divided by 4: scaled RoPE"),
    "frequencies of Llama 3, interleaved": (
        of_frequencies(llama_3, "interleaved"),
        "theta's frequencies are divided by 1 to 8: scaled RoPE",
    ),
    "cos and sin times 1.1": (of_frequencies(lambda f: f, size=1.1), "q at position 0, .*is 1.1 times as large"),
    "cos and sin beyond one": (
        table_kernel(lambda name, eps, x, weight, cos, sin: (x, weight, cos.clamp(-1, 1), sin.clamp(-1, 1))),
        "with cos and sin times 1.25",
    ),
    "cos and sin at an offset": (aligned_table, "with cos and sin as views at an offset of one element"),
    "256 tokens": (
        kv_heads_of(lambda tokens, heads, size: (tokens, size) == (256, 128)),
        r"with q \[256, 7, 128\], k ",
    ),
    "ten kv heads": (kv_heads_of(lambda tokens, heads, size: heads == 10), r"with x \[33, 10, 64\]"),
    "positions are written": (moves_positions, "writes beside q and k"),
    "inv_freq in fp16": (of_base({"inv_freq": "fp16"}), "if inv_freq is rounded to fp16"),
}
