"""Instructions in a row that are executed many at once: loads, products of matrices by warps, and products of float32
matrices by threads.

What they leave is what they leave one after the other: in a run, no register is written twice, or after another
instruction has read it, and but for the sums of Products none is read behind the one that writes it.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from castpoint.harness.ptx.numbers import Array
from castpoint.harness.ptx.program import Address, Instruction, Operand, Program, listed

FMA = ("fma", "rn", "f32")
SHORTEST = {"fma": 4, "ld": 2, "mma": 2}  # that is worth it
_NAME = re.compile(r"%\w+")


@dataclass(frozen=True)
class Loads:
    """Of one opcode, at offsets from so many registers as there are parts. end: the place behind it."""

    parts: tuple[tuple[Instruction, ...], ...]
    end: int


@dataclass(frozen=True)
class Matrices:
    """mma of one opcode. end: the place behind it."""

    instructions: tuple[Instruction, ...]
    end: int


@dataclass(frozen=True)
class Products:
    """Sums of products, each in one register after another of which nobody reads any but the last: starts, what they
    begin with; targets, where they end; factors, so many first ones and then second ones; places, [products, 2], of
    these two among them. The longest sums are the first, so that each level goes on with the first ones: counts."""

    starts: tuple[Operand, ...]
    targets: tuple[Operand, ...]
    factors: tuple[Operand, ...]
    first: int  # factors that are first ones
    places: Array
    counts: tuple[int, ...]
    end: int


Run = Loads | Matrices | Products


@functools.lru_cache(64)
def runs(program: Program) -> dict[int, Run]:
    """Runs that begin at these places; none goes on past a label, where a loop may come back."""
    found: dict[int, Run] = {}
    labels, instructions = set(program.labels.values()), program.instructions
    named = Counter(name for i in instructions for name in _NAME.findall(i.text))
    start, before, read, written = 0, (), set[Operand](), set[Operand]()
    for place, kind in enumerate([*map(_kind, instructions), ()]):
        reads, writes = (_read(instructions[place]), _written(instructions[place])) if kind else (set(), set())
        if place in labels or kind != before or writes & (read | written) or kind != FMA and reads & written:
            if before and place - start >= SHORTEST[before[0]]:
                run = _run(before, instructions[start:place], place, named)
                found |= {start: run} if run else {}
            start, before, read, written = place, kind, set(), set()
        read |= reads
        written |= writes
    return found


def _run(kind: Sequence[str], inside: Sequence[Instruction], end: int, named: Counter[str]) -> Run | None:
    if kind == FMA:
        return _products(inside, end, named)
    if kind[0] == "mma":
        return Matrices(tuple(inside), end)
    bases = dict.fromkeys(i.operands[1].base for i in inside)
    return Loads(tuple(tuple(i for i in inside if i.operands[1].base == base) for base in bases), end)


def _kind(i: Instruction) -> tuple[str, ...]:
    """Alike for what may share a run; empty for what is in none."""
    if i.guard or i.refusal:
        return ()
    if i.words[0] == "ld" and "param" not in i.words or i.words[0] == "mma":
        return i.words
    return i.words if i.words == FMA else ()


def _written(i: Instruction) -> set[Operand]:
    return {name for name in listed(i.operands[0]) if name != "_"}


def _read(i: Instruction) -> set[Operand]:
    parts = (part for operand in i.operands[1:] for part in listed(operand))
    return {part.base if isinstance(part, Address) else part for part in parts}


def _products(found: Sequence[Instruction], end: int, named: Counter[str]) -> Products | None:
    """None where they are no such sums. named: how often the program names each register."""
    sums: dict[Operand, list[Instruction]] = {}  # by the register that holds them
    for i in found:
        sums[i.operands[0]] = [*sums.pop(i.operands[3], ()), i]
    ordered = sorted(sums.values(), key=len, reverse=True)
    levels = [[each[n] for each in ordered if n < len(each)] for n in range(len(ordered[0]))]
    first = {source: n for n, source in enumerate(dict.fromkeys(i.operands[1] for i in found))}
    second = {source: n for n, source in enumerate(dict.fromkeys(i.operands[2] for i in found), len(first))}
    written = {i.operands[0] for i in found}
    kept = any(named[i.operands[0]] != 2 for each in ordered for i in each[:-1])
    if kept or written & (first.keys() | second.keys()):
        return None
    return Products(
        starts=tuple(each[0].operands[3] for each in ordered),
        targets=tuple(each[-1].operands[0] for each in ordered),
        factors=(*first, *second),
        first=len(first),
        places=np.array([[first[i.operands[1]], second[i.operands[2]]] for level in levels for i in level]),
        counts=tuple(map(len, levels)),
        end=end,
    )
