"""Instructions that read and write memory: global, shared, parameters."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable

import numpy as np

from castpoint.harness.ptx.arithmetic import operation
from castpoint.harness.ptx.memory import check_aligned
from castpoint.harness.ptx.numbers import UNSIGNED, Array, Unsupported, extended, width
from castpoint.harness.ptx.program import Address, Instruction, listed
from castpoint.harness.ptx.threads import Threads

REMEMBERED = 1 << 12  # threads up to which it is remembered where in shared memory they read and write


class Accesses(Threads):
    """A method an instruction, called with the threads that execute it."""

    def _mine(self, values: Array, mask: Array) -> Array:
        """Of the threads that execute it."""
        values = self.each(values)
        return values if mask is self.everyone else values[mask]

    def _shared(self, i: Hashable, address: Address, bits: int, mask: Array, found: Callable[[], Array]) -> Array:
        """Where elements of shared memory lie whose addresses are found, from that address on. Of all threads they are
        found once while its register is the same: most are in a loop that does not change it."""
        register = self.registers.get(address.base)
        known, places = self.places.get((i, bits), (None, None))
        if register is not None and known is register and mask is self.everyone:
            return places
        places = self.shared.places(self._mine(self.shared_start, mask), found(), bits)
        if mask is self.everyone and self.threads <= REMEMBERED:
            self.places[i, bits] = register, places
        return places

    def _ld(self, i: Instruction, mask: Array) -> None:
        if "param" not in i.words:
            self._load((i,), mask)
            return
        name, address, kind = i.operands[0], i.operands[1], i.words[-1]
        given = self.values.get(address.base)
        if given is None or address.offset or given.itemsize * 8 < width(kind):
            raise Unsupported("other bits than the first of a parameter")
        self.put(*listed(name), extended(given, kind), mask)

    def _load(self, loads: tuple[Instruction, ...], mask: Array) -> None:
        """Loads of one opcode, at offsets from one register."""
        names, offsets = _parts(loads)
        kind, first = loads[0].words[-1], loads[0].operands[1]
        bits = width(kind)

        def base() -> Array:
            addresses = self._mine(self.addresses(first), mask)
            check_aligned(addresses, bits // 8 * len(names) // len(loads))
            return addresses

        if _space(loads[0]) == "global":
            found = self.memory.load_each(base(), offsets, bits)
        else:
            places = self._shared(loads, first, bits, mask, lambda: base() + offsets[:, None])
            found = self.shared.take(places, bits)
        if mask is not self.everyone:
            there, found = found, np.zeros((len(names), self.threads), UNSIGNED[bits])
            found[:, mask] = there
        self.put_each(names, extended(found, kind), mask)

    def _st(self, i: Instruction, mask: Array) -> None:
        address, sources = i.operands[0], listed(i.operands[1])
        bits, space = width(i.words[-1]), _space(i)

        def addresses() -> Array:
            first = self._mine(self.addresses(address), mask)
            check_aligned(first, bits // 8 * len(sources))
            return first + bits // 8 * np.arange(len(sources))[:, None]

        values = np.stack([self._mine(self.get(source, f"b{bits}"), mask) for source in sources])
        if space == "global":
            self.memory.store(addresses(), values, bits)
        else:
            self.shared.put(self._shared(i, address, bits, mask, addresses), values, bits)

    def _cp(self, i: Instruction, mask: Array) -> None:
        """cp.async: so many bytes to shared memory, of them the first from global memory, the rest zeros."""
        target, source = i.operands[0], self._mine(self.addresses(i.operands[1]), mask)
        size, *rest = i.operands[2 : -1 if "L2_cache_hint" in i.words else None]
        given = self._mine(self.get(rest[0] if rest else size, "u32"), mask)
        check_aligned(source[given > 0], size)
        check_aligned(given, 4)
        every = (given == size).all()
        bits = 64 if every and size > 4 else 32
        byte = np.arange(0, size, bits // 8)[:, None]
        there = ... if every else given > byte
        words = np.zeros((len(byte), len(source)), UNSIGNED[bits])
        words[there] = self.memory.load((source + byte)[there], bits)

        def addresses() -> Array:
            first = self._mine(self.addresses(target), mask)
            check_aligned(first, size)
            return first + byte

        self.shared.put(self._shared(i, target, bits, mask, addresses), words, bits)

    def _atom(self, i: Instruction, mask: Array) -> None:
        """Sums of 32 bits in global memory, thread after thread in the order of programs; a GPU takes any order. Those
        of floats flush subnormals."""
        kind = i.words[-1]
        words = ("add", "ftz", kind) if kind == "f32" else ("add", kind)
        addresses, values = self.addresses(i.operands[-2]), self.each(self.get(i.operands[-1], "b32"))
        check_aligned(addresses[mask], 4)
        old = np.zeros(self.threads, np.uint32)
        for thread in np.flatnonzero(mask).tolist():
            place = addresses[[thread]]
            old[[thread]] = self.memory.load(place, 32)
            self.memory.store(place, operation(words)(old[[thread]], values[[thread]]), 32)
        if i.words[0] == "atom":
            self.put(i.operands[0], old, mask)

    _red = _atom


@functools.lru_cache(4096)
def _parts(loads: tuple[Instruction, ...]) -> tuple[list[str], Array]:
    """What loads from one register write, and how many bytes behind the first one's address each lies. Raises
    IndexError where these are no multiples of what one reads: all are aligned if the first one is."""
    size, names = width(loads[0].words[-1]) // 8, [listed(i.operands[0]) for i in loads]
    offsets = np.array([i.operands[1].offset - loads[0].operands[1].offset for i in loads])
    check_aligned(offsets, size * len(names[0]))
    return [*itertools.chain(*names)], (offsets[:, None] + size * np.arange(len(names[0]))).ravel()


def _space(i: Instruction) -> str:
    return "global" if "global" in i.words else "shared"
