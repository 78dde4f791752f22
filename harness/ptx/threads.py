"""Threads of some programs in step: where each stands, and the registers, numpy arrays with an element a thread."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from castpoint.harness.ptx.memory import Global, Shared
from castpoint.harness.ptx.numbers import Array, Unsupported, read
from castpoint.harness.ptx.program import Address, Operand, Program, declared

SHARED = "global_smem"  # Triton's only shared array; it starts at 0


class Threads:
    """places: of the programs, [programs, 3], x y z; values: of the kernel's parameters; unknown: 64 bits that
    a register holds which was never written, the last one of a predicate; None: drawn ones."""

    def __init__(
        self, program: Program, places: Array, grid: Sequence[int], threads: int, shared: int, memory: Global,
        values: dict[str, Array], unknown: int | None,
    ) -> None:  # fmt: skip
        self.program, self.memory, self.values, self.unknown = program, memory, values, unknown
        self.shared = Shared(len(places), shared)
        self.threads = len(places) * threads
        self.shared_start = np.repeat(self.shared.starts, threads)  # where its shared memory begins
        thread = np.tile(np.arange(threads, dtype=np.uint32), len(places))
        self.registers: dict[str, Array] = {"%laneid": thread % 32}
        for axis, place, size in zip("xyz", places.T, grid, strict=True):
            self.registers[f"%tid.{axis}"] = thread if axis == "x" else np.uint32(0)
            self.registers[f"%ntid.{axis}"] = np.uint32(threads if axis == "x" else 1)
            self.registers[f"%ctaid.{axis}"] = place.astype(np.uint32).repeat(threads)
            self.registers[f"%nctaid.{axis}"] = np.uint32(size)
        self.everyone = np.ones(self.threads, bool)
        self.start = np.full(self.threads, unknown or 0, np.uint64)
        self.active = self.everyone  # threads that are at this place
        self.waiting: dict[int, Array] = {}  # threads that are at others
        self.executing = self.active  # threads that execute the instruction
        self.unwritten: dict[str, Array] = {}  # threads for which a register that others wrote is not
        self.places: dict[Hashable, tuple[Array, Array]] = {}  # of shared memory, and the register that they are from
        self.guessed: set[str] = set()  # registers that were read and never written

    def bits(self, operand: Operand) -> Array:
        """A register's bits, an element a thread or one for all; an integer's in 64 bits."""
        if isinstance(operand, int):
            return np.array(operand & (1 << 64) - 1, np.uint64)
        if operand == SHARED:
            return np.uint64(0)
        if operand not in self.registers:
            self._start(operand)
        if operand in self.unwritten and (self.unwritten[operand] & self.executing).any():
            self.guessed.add(operand)
        return self.registers[operand]

    def _start(self, name: str) -> None:
        """Fills a register that was never written. Raises Unsupported for what is no register."""
        kind = declared(name, self.program.registers)
        if kind is None:
            raise Unsupported(name)
        bits = self.start
        if self.unknown is None:
            bits = np.random.default_rng(list(name.encode())).integers(0, 1 << 64, self.threads, np.uint64)
        self.registers[name] = bits & np.uint64(1) == 1 if kind == "pred" else bits
        self.unwritten[name] = self.everyone

    def get(self, operand: Operand, kind: str) -> Array:
        return read(self.bits(operand), kind)

    def predicate(self, operand: Operand) -> Array:
        if isinstance(operand, int):
            return np.array(operand != 0)
        return ~self.bits(operand[1:]) if operand.startswith("!") else self.bits(operand)

    def put(self, name: str, bits: Array, mask: Array) -> None:
        self.put_each((name,), (bits,), mask)

    def put_each(self, names: Sequence[str], found: Iterable[Array], mask: Array) -> None:
        """Bits into registers, of those threads; `_` is none."""
        registers, unwritten = self.registers, self.unwritten
        if mask is self.everyone or mask.all():
            registers.update(zip(names, found, strict=True))
            if unwritten:
                for name in names:
                    unwritten.pop(name, None)
            return
        others = ~mask
        for name, bits in zip(names, found, strict=True):
            if name == "_":
                continue
            if name not in registers:
                self._start(name)
                registers[name] = registers[name].astype(bits.dtype)
            if name in unwritten:
                unwritten[name] = unwritten[name] & others
            registers[name] = np.where(mask, bits, registers[name])

    def each(self, values: Array) -> Array:
        """An element a thread."""
        return values if values.shape == (self.threads,) else np.full(self.threads, values)

    def stacked(self, names: Sequence[Operand], part: slice | None = None) -> Array:
        """[names, threads] of float32 that registers hold, or those of a part of the threads."""
        with contextlib.suppress(KeyError, IndexError, ValueError):  # a number, one never written, one value for all
            found = [self.registers[name] for name in names]
            rows = np.concatenate([each[part] for each in found] if part else found)
            if rows.dtype == np.uint32 and self.unwritten.keys().isdisjoint(names):
                return rows.view(np.float32).reshape(len(names), -1)
        return np.stack([self.each(self.get(name, "f32"))[part or slice(None)] for name in names])

    def addresses(self, address: Address) -> Array:
        return self.each(self.bits(address.base).astype(np.int64) + address.offset)
