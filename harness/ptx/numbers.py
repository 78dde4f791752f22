"""PTX's types on numpy arrays, an element a thread.

A register holds bits: an unsigned array of its width. read gives them the type that an instruction names, bits_of turns
a result back. Results are rounded once, to nearest even.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]

NAN = np.uint32(0x7FFFFFFF)  # of every arithmetic result that is none
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
TYPE = re.compile(r"([bsuf]|bf)(8|16|32|64)")


class Unsupported(ValueError):
    """PTX whose meaning is not known here: refused, so that no bit is guessed."""


@functools.cache
def width(kind: str) -> int:
    """Bits of a PTX type: 16 of `bf16`, 64 of `s64`. Raises Unsupported for one that is not known here."""
    found = TYPE.fullmatch(kind)
    if found is None or kind == "f64":
        raise Unsupported(f"type {kind}")
    return int(found[2])


@functools.cache
def _forms(kind: str) -> tuple[np.dtype[Any], np.dtype[Any]]:
    """Of a type's bits, and of its values."""
    if kind == "pred":
        return np.dtype(bool), np.dtype(bool)
    unsigned = UNSIGNED[width(kind)]
    signed = SIGNED[width(kind)] if kind[0] == "s" else unsigned
    return np.dtype(unsigned), np.dtype({"f32": np.float32, "f16": np.float16}.get(kind, signed))


def read(bits: Array, kind: str) -> Array:
    """Bits, of the type's width or wider, as values; bf16 and f16 as float32, a predicate as bool."""
    word, form = _forms(kind)
    if bits.dtype is not word:
        bits = bits.astype(word, copy=False)
    if form is not word:
        bits = bits.view(form)
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.astype(np.float32) if kind == "f16" else bits


def bits_of(values: Array, kind: str) -> Array:
    """The bits of values as that type holds them; floats are float32 or float64."""
    if kind == "bf16":
        return bf16_bits(values)
    if kind == "f32":
        single = np.asarray(values, np.float32)
        nan = single != single
        return np.where(nan, NAN, single.view(np.uint32)) if np.count_nonzero(nan) else single.view(np.uint32)
    return np.asarray(values).astype(UNSIGNED[width(kind)])


def extended(bits: Array, kind: str) -> Array:
    """Bits of that type, cut to its width, as a wider register holds them: signed ones with their sign."""
    if kind[0] == "s":
        return read(bits, kind).astype(np.int64).view(np.uint64)
    return bits.astype(UNSIGNED[width(kind)], copy=False)


def bf16_bits(values: Array) -> Array:
    bits = (odd_f32(values) if values.dtype == np.float64 else values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def odd_f32(values: Array) -> Array:
    """float32 of float64, inexact ones as that neighbour whose last bit is odd: rounded once more, to fewer bits, they
    are what the exact values are (Boldo and Melquiond, 2008)."""
    near = values.astype(np.float32)
    even = near.view(np.uint32) & np.uint32(1) == 0
    inexact = (near.astype(np.float64) != values) & np.isfinite(near)
    towards = np.where(values > near, np.float32(np.inf), np.float32(-np.inf))
    return np.where(inexact & even, np.nextafter(near, towards), near).astype(np.float32)


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float32 values in float64, such that one more rounding is the only one: inexact sums that end in 28
    zeros, as ties of float32 and bf16 do, have an odd last bit."""
    product = np.multiply(a, b, dtype=np.float64)  # exact: 24 + 24 bits
    total = np.asarray(product + c)
    doubtful = np.asarray(total.view(np.uint64) & np.uint64(0x0FFFFFFF) == 0)
    if not doubtful.any():
        return total
    part = total - product
    error = np.asarray((product - (total - part)) + (c - part))
    doubtful &= (error != 0) & np.isfinite(total)
    if doubtful.any():
        total[doubtful] = np.nextafter(total[doubtful], np.where(error[doubtful] > 0, np.inf, -np.inf))
    return total


def flushed(values: Array) -> Array:
    """float32 with subnormals as zeros of their sign, as `.ftz` has them."""
    tiny = np.abs(values) < np.finfo(np.float32).tiny
    return np.where(tiny, np.copysign(np.float32(0), values), values)
