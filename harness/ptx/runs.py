"""Instructions in a row that are executed many at once: loads from one address on, and products of float32 matrices.

What they leave is what they leave one after the other: in a run, no register is written twice, or after another
instruction has read it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from castpoint.harness.ptx.program import Address, Instruction, Operand, Program, listed

FMA = ("fma", "rn", "f32")
SHORTEST = 4  # that is worth it


@dataclass(frozen=True)
class Run:
    """levels: instructions of one opcode whose operands are there once those of the levels before are done; given:
    operands that the run does not compute; end: the place behind it."""

    levels: tuple[tuple[Instruction, ...], ...]
    given: tuple[Operand, ...]
    end: int


@functools.lru_cache(64)
def runs(program: Program) -> dict[int, Run]:
    """Runs that begin at these places; none goes on past a label, where a loop may come back."""
    found: dict[int, Run] = {}
    labels, instructions = set(program.labels.values()), program.instructions
    start, before, touched = 0, (), set[Operand]()
    for place, kind in enumerate([*map(_kind, instructions), ()]):
        if place in labels or kind != before or kind and touched & set(_written(instructions[place])):
            if before and place - start >= SHORTEST:
                found[start] = _run(instructions[start:place], place)
            start, before, touched = place, kind, set()
        if kind:
            touched |= {*_written(instructions[place]), *_read(instructions[place])}
    return found


def _kind(i: Instruction) -> tuple[object, ...]:
    """Alike for what may share a run; empty for what is in none."""
    if i.guard or i.refusal:
        return ()
    if i.words[0] == "ld" and "param" not in i.words:
        return i.words, *_read(i)
    return i.words if i.words == FMA else ()


def _written(i: Instruction) -> tuple[Operand, ...]:
    return tuple(name for name in listed(i.operands[0]) if name != "_")


def _read(i: Instruction) -> tuple[Operand, ...]:
    return tuple(part.base if isinstance(part, Address) else part for part in i.operands[1:])


def _run(found: tuple[Instruction, ...], end: int) -> Run:
    depth: dict[Operand, int] = {}
    levels: dict[int, list[Instruction]] = {}
    given: dict[Operand, None] = {}
    for i in found:
        given |= dict.fromkeys(source for source in _read(i) if source not in depth)
        deep = 1 + max(depth.get(source, 0) for source in _read(i))
        depth |= dict.fromkeys(_written(i), deep)
        levels.setdefault(deep, []).append(i)
    return Run(tuple(map(tuple, levels.values())), tuple(given), end)
