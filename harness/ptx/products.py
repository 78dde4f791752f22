"""Products of float32 matrices as a thread computes them, `fma.rn.f32` after `fma.rn.f32`: many sums at once.

In float64 a product of two float32 is exact, so that a sum is rounded twice, to float64 and to float32. That differs
from one rounding only where float64 lies in the middle between two float32 and the sum does not, as seldom happens, or
below float32's normal numbers: where a sum of a run does, numbers.fma computes all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from castpoint.harness.ptx.numbers import Array, fma

# a product of factors from here on has no bit below 2^-166, so that a sum below 2^-126 is exact in float64
SMALL = np.float32(2.0**-60)
LEFT = np.uint64(0x1FFFFFFF)  # the bits of float64 that float32 has no place for
MIDDLE = np.uint64(0x10000000)  # they, where it lies between two


def summed(starts: Array, factors: Array, levels: Sequence[Array]) -> Array:
    """The sums of runs.Products, float32 as starts, [sums, threads], and factors, [factors, threads]."""
    wide = factors.astype(np.float64)
    found = None if _any_small(factors) else _rounded_twice(starts, wide, levels)
    return _rounded_once(starts, wide, levels) if found is None else found


def _rounded_twice(starts: Array, factors: Array, levels: Sequence[Array]) -> Array | None:
    """None where a sum in float64 lies in the middle, and is not exact."""
    sums, single = starts.astype(np.float64), np.empty(starts.shape, np.float32)
    room, flags, middles = np.empty((4, *sums.shape)), np.empty(sums.shape, bool), []  # used again: they stay in cache
    for places in levels:
        count = len(places)
        c, narrow, middle, (a, b, total, left) = sums[:count], single[:count], flags[:count], room[:, :count]
        factors.take(places[:, 0], 0, a, "clip")  # which no place needs, and which is faster
        factors.take(places[:, 1], 0, b, "clip")
        np.add(np.multiply(a, b, total), c, total)
        np.equal(np.bitwise_and(total.view(np.uint64), LEFT, left.view(np.uint64)), MIDDLE, middle)
        if np.count_nonzero(middle):
            found = np.flatnonzero(middle)
            middles.append([each.take(found) for each in (a, b, c, total)])
        np.copyto(narrow, total, casting="same_kind")
        np.copyto(c, narrow)
    if middles:
        a, b, c, total = np.concatenate(middles, axis=1)
        product, rest = a * b, total - a * b
        if (product - (total - rest) != rest - c).any():
            return None
    return single


def _rounded_once(starts: Array, factors: Array, levels: Sequence[Array]) -> Array:
    sums = starts.copy()
    for places in levels:
        a, b = factors[places.T]
        sums[: len(places)] = fma(a, b, sums[: len(places)])
    return sums


def _any_small(factors: Array) -> bool:
    """Whether one is below SMALL, and not 0."""
    sizes = np.bitwise_and(factors.view(np.uint32), np.uint32(0x7FFFFFFF))
    sizes -= np.uint32(1)  # so that 0 becomes the largest
    return bool(sizes.min() < SMALL.view(np.uint32) - 1)
