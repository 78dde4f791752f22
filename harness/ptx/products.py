"""Products of float32 matrices as a thread computes them, `fma.rn.f32` after `fma.rn.f32`: many sums at once.

In float64 a product of two float32 is exact, so that a sum is rounded twice, to float64 and to float32. That differs
from one rounding only where float64 lies in the middle between two float32 and the sum does not, as seldom happens, or
below float32's normal numbers: where a sum of a run does, numbers.fma computes all.
"""

from __future__ import annotations

import threading

import numpy as np

from castpoint.harness.ptx.numbers import Array, fma
from castpoint.harness.ptx.runs import Products

# a product of factors from here on has no bit below 2^-166, so that a sum below 2^-126 is exact in float64
SMALL = np.float32(2.0**-60).view(np.uint32)
SIZE, INFINITE, MINUS_ZERO = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000), np.uint32(1 << 31)  # bits of float32
LEFT = np.uint64(0x1FFFFFFF)  # the bits of float64 that float32 has no place for
MIDDLE = np.uint64(0x10000000)  # they, where it lies between two


class Room(threading.local):
    """Of each thread, used again by every run: it stays in cache."""

    def __init__(self) -> None:
        self.rows = np.empty((2, 1 << 18))


ROOM = Room()


def summed(run: Products, starts: Array, factors: Array) -> Array:
    """The sums of the run, float32 as starts, [sums, threads], and factors, [factors, threads]."""
    sizes = np.bitwise_and(factors.view(np.uint32), SIZE)
    busy, found = np.flatnonzero(~_idle(run, starts, sizes)), starts.copy()
    at_once = max(1, ROOM.rows.shape[1] // (len(starts) + len(run.places)))
    for first in range(0, len(busy), at_once):
        part = busy[first : first + at_once]
        found[:, part] = _computed(run, *(each.take(part, 1) for each in (starts, factors, sizes)))
    return found


def _idle(run: Products, starts: Array, sizes: Array) -> Array:
    """Threads whose sums stay as they start, since all products are zeros: of rows of a matrix beyond its last one."""
    largest = sizes[: run.first].max(0), sizes[run.first :].max(0)
    stays = (starts.view(np.uint32) != MINUS_ZERO).all(0)
    return (np.minimum(*largest) == 0) & (np.maximum(*largest) < INFINITE) & stays


def _computed(run: Products, starts: Array, factors: Array, sizes: Array) -> Array:
    wide, small = factors.astype(np.float64), (sizes - np.uint32(1)).min() < SMALL - 1  # 0 becomes the largest
    room = (len(starts) + len(run.places)) * starts.shape[1] <= ROOM.rows.shape[1]
    found = _rounded_twice(run, starts, wide) if room and not small else None
    return _rounded_once(run, starts, wide) if found is None else found


def _rounded_twice(run: Products, starts: Array, factors: Array) -> Array | None:
    """None where a sum in float64 lies in the middle, and is not exact."""
    begun, (count, threads) = len(starts), (len(starts) + len(run.places), starts.shape[1])
    totals, other = (room[: count * threads].reshape(count, threads) for room in ROOM.rows)
    totals[:begun], products = starts, totals[begun:]  # what is added to each, and then all sums on their way
    factors.take(run.places[:, 0], 0, products, "clip")  # which no place needs, and which is faster
    factors.take(run.places[:, 1], 0, other[begun:], "clip")
    np.multiply(products, other[begun:], products)
    sums, single, at = totals[:begun].copy(), starts.copy(), begun
    for left in run.counts:
        total, c, narrow = totals[at : at + left], sums[:left], single[:left]
        np.add(total, c, total)
        np.copyto(narrow, total, casting="same_kind")
        np.copyto(c, narrow)
        at += left
    middle = np.flatnonzero(np.bitwise_and(totals.view(np.uint64), LEFT, other.view(np.uint64)) == MIDDLE)
    return None if len(middle) and _inexact(run, totals, factors, *np.divmod(middle, threads)) else single


def _inexact(run: Products, totals: Array, factors: Array, rows: Array, threads: Array) -> bool:
    """Whether one of these sums is not what float64 holds of it."""
    ends = np.cumsum([0, run.counts[0], *run.counts])
    level = np.searchsorted(ends, rows, "right") - 1
    c = totals[rows - ends[level] + ends[level - 1], threads].astype(np.float32)
    a, b = (factors[places, threads] for places in run.places[rows - ends[1]].T)
    product, total = a * b, totals[rows, threads]
    rest = total - product
    return bool((product - (total - rest) != rest - c).any())


def _rounded_once(run: Products, starts: Array, factors: Array) -> Array:
    sums, at = starts.copy(), 0
    for left in run.counts:
        a, b = factors[run.places[at : at + left].T]
        sums[:left] = fma(a, b, sums[:left])
        at += left
    return sums
