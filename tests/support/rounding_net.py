"""The net of rounding: what the kernels' round_to and truncate_tf32 make of every pattern, against tables."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from support import DEVICE, INTEGER, Kernels
from torch import Tensor


@triton.jit
def apply_kernel(in_ptr, out_ptr, N, FUNCTION: tl.constexpr, WORD: tl.constexpr, BLOCK: tl.constexpr):
    """out = FUNCTION(in), or FUNCTION(in, WORD) for a word, as bits."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(in_ptr + offs, mask=offs < N, other=0.0)
    if WORD == "":
        result = FUNCTION(value)
    else:
        result = FUNCTION(value, WORD)
    tl.store(out_ptr + offs, result.to(out_ptr.dtype.element_ty, bitcast=True), mask=offs < N)


def applied(function: object, value: Tensor, word: str = "", *, narrow: bool = False) -> Tensor:
    """A device function's result on every element, as float32, or bf16 for narrow."""
    out = torch.empty(value.shape, dtype=torch.int16 if narrow else torch.int32, device=value.device)
    block = 4096
    apply_kernel[(triton.cdiv(value.numel(), block),)](
        value, out, value.numel(), FUNCTION=function, WORD=word, BLOCK=block
    )
    return out.view(torch.bfloat16 if narrow else torch.float32)


@functools.cache
def every_bf16() -> Tensor:
    """All 65,536 bit patterns."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@functools.cache
def fp32_patterns() -> Tensor:
    """2^20 bit patterns: for every bf16 value itself, its tie with the next, what lies beside both, and the ends of
    its tf32 steps; of every kind of subnormal, infinity and NaN; the rest random, a sixteenth of it subnormal."""
    upper = torch.arange(2**16, dtype=torch.int64) << 16
    lower = torch.tensor([0, 1, 0x1FFF, 0x2000, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    special = torch.tensor(
        [0x7F800000, 0x7F800001, 0x7FBFFFFF, 0x7FC00000, 0x7FC00001, 0x7FFF8000, 0x7FFFFFFF]  # infinity, every NaN
        + [0x00000001, 0x00007FFF, 0x00008000, 0x00008001, 0x00018000, 0x007FFFFF, 0x00800000]  # about the subnormals
        + [0x7F7F0000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF]  # the last that stays finite, the first that overflows
    )
    chosen = torch.cat([(upper[:, None] + lower).flatten(), special, special + 2**31])
    rest = torch.randint(0, 2**32, (2**20 - len(chosen),), generator=torch.Generator().manual_seed(0))
    rest[::16] &= 0x807FFFFF
    return torch.cat([chosen, rest]).to(torch.int32).view(torch.float32)


def truncated_by_table(value: Tensor, dropped_bits: int) -> Tensor:
    """float32 cut toward zero to the values whose dropped_bits lowest bits are zero; NaN made quiet, then cut.

    Found in the sorted table of all such values, as numbers: no mask, no shift of the value's own bits.
    """
    table = (
        (torch.arange((0x7F800000 >> dropped_bits) + 1) << dropped_bits).to(torch.int32).view(torch.float32).double()
    )
    magnitude = torch.where(value.isnan(), 0.0, value.double().abs())
    found = table[torch.searchsorted(table, magnitude, right=True) - 1]
    return torch.where(value.isnan(), quiet_nan(value, dropped_bits), found.copysign(value.double()).float())


def nearest_by_table(value: Tensor) -> Tensor:
    """float32 rounded to the nearest bf16 value, ties to the even one; beyond the largest counts 2^128, infinity."""
    table = (torch.arange(0x7F80 + 1) << 16).to(torch.int32).view(torch.float32).double()
    ends = table.clone()
    ends[-1] = 2.0**128
    magnitude = torch.where(value.isnan(), 0.0, value.double().abs()).clamp(max=2.0**128)
    below = (torch.searchsorted(ends, magnitude, right=True) - 1).clamp(max=len(ends) - 2)
    to_below, to_above = magnitude - ends[below], ends[below + 1] - magnitude
    up = (to_above < to_below) | ((to_above == to_below) & (below % 2 == 1))
    found = table[below + up].copysign(value.double()).float()
    return torch.where(value.isnan(), quiet_nan(value, 16), found)


def quiet_nan(value: Tensor, dropped_bits: int) -> Tensor:
    """The same NaN with the quiet bit set and the lowest bits dropped."""
    bits = value.view(torch.int32).long() % 2**32
    bits = bits + torch.where(bits // 2**22 % 2 == 0, 2**22, 0)
    return (bits - bits % 2**dropped_bits).to(torch.int32).view(torch.float32)


def assert_same_patterns(*, actual: Tensor, expected: Tensor) -> None:
    """Fails unless both hold the same bit patterns, NaN payloads too."""
    actual, expected = (value.cpu().view(INTEGER[value.dtype]) for value in (actual, expected))
    wrong = (actual != expected).nonzero().flatten()
    shown = [(int(i), hex(int(actual[i]) % 2**32), hex(int(expected[i]) % 2**32)) for i in wrong[:3]]
    assert not len(wrong), f"{len(wrong)} of {len(actual)} patterns differ; (index, actual, expected): {shown}"


ROUNDINGS = {
    "bf16-rne": nearest_by_table,
    "bf16-rtz": functools.partial(truncated_by_table, dropped_bits=16),
    "tf32": functools.partial(truncated_by_table, dropped_bits=13),
}


@functools.cache
def rounded_by_table(word: str) -> Tensor:
    return ROUNDINGS[word](fp32_patterns())


def check_rounding(kernels: Kernels, word: str) -> None:
    """round_to, or truncate_tf32 for the word tf32, gives the table's bit pattern for each of 2^20 patterns."""
    value = fp32_patterns().to(DEVICE)
    functions = kernels.rounding
    if word == "tf32":
        actual = applied(functions.truncate_tf32, value)
    else:
        actual = applied(functions.round_to, value, word)
    assert_same_patterns(actual=actual, expected=rounded_by_table(word))
