"""Memory of kernels that run on a CPU: the tensors of their arguments, and shared memory, which starts as NaN."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from torch import Tensor

from castpoint.harness.ptx.numbers import UNSIGNED, Array

SHIFTS = {8: 0, 16: 1, 32: 2, 64: 3}  # from an address to an element of so many bits


class Global:
    """The storages of CPU tensors, at the addresses where they lie. They must outlive it."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        storages = {(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in (t.untyped_storage() for t in tensors)}
        merged: list[list[int]] = []
        for start, end in sorted(storages):  # of two that overlap, one
            if merged and start < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            elif end > start:
                merged.append([start, end])
        self.starts, self.ends = np.array(merged, np.int64).reshape(-1, 2).T
        self.aligned = self.starts & -8  # where the views begin, so that elements lie at multiples of their size
        self.bytes = [
            np.frombuffer((ctypes.c_uint8 * (end - start)).from_address(start), np.uint8)
            for start, end in zip(self.aligned.tolist(), self.ends.tolist(), strict=True)
        ]

    def contents(self) -> list[Array]:
        """A copy of every byte."""
        return [part[start:].copy() for part, start in self._parts()]

    def fill(self, contents: list[Array]) -> None:
        for (part, start), saved in zip(self._parts(), contents, strict=True):
            part[start:] = saved

    def _parts(self) -> Iterator[tuple[Array, int]]:
        """Each storage's view, and where in it the storage begins."""
        yield from zip(self.bytes, (self.starts - self.aligned).tolist(), strict=True)

    def load(self, addresses: Array, bits: int) -> Array:
        found = np.zeros(addresses.shape, UNSIGNED[bits])
        for elements, mine, places in self._places(addresses, bits):
            found[mine] = elements[places]
        return found

    def load_each(self, base: Array, offsets: Array, bits: int) -> Array:
        """[offsets, base] what load finds at each offset, a multiple of the elements' size, from each base."""
        owner = self._owner(base.min() + offsets.min(), base.max() + offsets.max(), bits)
        if owner is None:
            return self.load(base + offsets[:, None], bits)
        places = base - self.aligned[owner] >> SHIFTS[bits]
        return self._elements(owner, bits).take(places + (offsets >> SHIFTS[bits])[:, None])

    def store(self, addresses: Array, values: Array, bits: int) -> None:
        """Where threads write to one address, the last one's value stays."""
        for elements, mine, places in self._places(addresses, bits):
            elements[places] = values[mine]

    def _places(self, addresses: Array, bits: int) -> Iterator[tuple[Array, Any, Array]]:
        """A storage's elements, which addresses lie there (... : all), and where. Raises IndexError for one outside of
        all storages."""
        size, shift = bits // 8, SHIFTS[bits]
        if not addresses.size:
            return
        first = self._owner(addresses.min(), addresses.max(), bits)
        if first is not None:
            yield self._elements(first, bits), ..., addresses - self.aligned[first] >> shift
            return
        owner = np.searchsorted(self.starts, addresses, side="right") - 1
        outside = (owner < 0) | (addresses + size > self.ends[owner])
        if outside.any():
            raise IndexError(f"{int(outside.sum())} threads reach beyond the tensors that the kernel was given")
        for each in np.unique(owner).tolist():
            mine = owner == each
            yield self._elements(each, bits), mine, addresses[mine] - self.aligned[each] >> shift

    def _owner(self, first: int, last: int, bits: int) -> int | None:
        """The storage in which all elements from first to last lie, as nearly always; None where there is none."""
        owner = int(np.searchsorted(self.starts, first, side="right")) - 1
        return owner if owner >= 0 and last + bits // 8 <= self.ends[owner] else None

    def _elements(self, storage: int, bits: int) -> Array:
        size, view = bits // 8, self.bytes[storage]
        return view[: len(view) // size * size].view(UNSIGNED[bits])


class Shared:
    """Bytes of each program of a launch, those of one at starts; an address counts from there."""

    def __init__(self, programs: int, size: int) -> None:
        self.size = max(16, -(-size // 16) * 16)
        self.starts = np.arange(programs) * self.size
        self.bytes = np.full(programs * self.size, 0xFF, np.uint8)

    def load(self, starts: Array, addresses: Array, bits: int) -> Array:
        return self.take(self.places(starts, addresses, bits), bits)

    def take(self, places: Array, bits: int) -> Array:
        """The elements at these places."""
        return self.bytes.view(UNSIGNED[bits]).take(places)

    def store(self, starts: Array, addresses: Array, values: Array, bits: int) -> None:
        self.put(self.places(starts, addresses, bits), values, bits)

    def put(self, places: Array, values: Array, bits: int) -> None:
        self.bytes.view(UNSIGNED[bits])[places] = values

    def places(self, starts: Array, addresses: Array, bits: int) -> Array:
        """Of elements, counted from the first program's first one. Raises IndexError for one outside."""
        if addresses.size:
            self._check(addresses.min(), addresses.max(), bits)
        return starts + addresses >> SHIFTS[bits]

    def _check(self, first: int, last: int, bits: int) -> None:
        if first < 0 or last > self.size - bits // 8:
            raise IndexError(f"an address outside of {self.size} bytes of shared memory")


def check_aligned(addresses: Array, size: int) -> None:
    """Raises IndexError for an address that is no multiple of the bytes read or written there."""
    if np.bitwise_or.reduce(addresses, axis=None) % size:
        raise IndexError(f"{size} bytes at an address that is no multiple of {size}")
