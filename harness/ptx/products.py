"""Products of float32 matrices as a thread computes them, `fma.rn.f32` after `fma.rn.f32`: many sums at once.

In float64 a product of two float32 is exact, so that a sum is rounded twice, to float64 and to float32. That differs
from one rounding only where float64 lies in the middle between two float32, as seldom happens, or below float32's
normal numbers: there numbers.fma computes it.
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
    sums, wide, small = starts.astype(np.float64), factors.astype(np.float64), _any_small(factors)
    room, single = np.empty((4, *sums.shape)), np.empty(sums.shape, np.float32)  # used again, they stay in the cache
    for places in levels:
        count = len(places)
        a, b, total, left = room[:, :count]
        for each, factor in zip((a, b), places.T, strict=True):
            wide.take(factor, axis=0, out=each, mode="clip")  # which no place needs, and which is faster
        c = sums[:count]
        if small:
            total = fma(a, b, c)
        else:
            np.add(np.multiply(a, b, out=total), c, out=total)
            middle = np.bitwise_and(total.view(np.uint64), LEFT, out=left.view(np.uint64)) == MIDDLE
            if np.count_nonzero(middle):
                _mend(total, a, b, c, np.flatnonzero(middle))
        np.copyto(single[:count], total, casting="same_kind")
        c[:] = single[:count]
    return sums.astype(np.float32)


def _mend(total: Array, a: Array, b: Array, c: Array, places: Array) -> None:
    """Computes sums in the middle anew if one of them is not exact, as is seldom so; fma leaves those that are."""
    product, start, found = a.take(places) * b.take(places), c.take(places), total.take(places)
    rest = found - product
    if (product - (found - rest) != rest - start).any():
        total.flat[places] = fma(a.take(places), b.take(places), start)


def _any_small(factors: Array) -> bool:
    """Whether one is below SMALL, and not 0."""
    sizes = np.bitwise_and(factors.view(np.uint32), np.uint32(0x7FFFFFFF))
    sizes -= np.uint32(1)  # so that 0 becomes the largest
    return bool(sizes.min() < SMALL.view(np.uint32) - 1)
