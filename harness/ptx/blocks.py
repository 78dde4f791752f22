"""Instructions that only compute, most of a kernel's: those in a row are one Python function, whose local variables are
the registers. What each takes and gives is known when the function is made, not looked up each time that it runs."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from castpoint.harness.ptx.arithmetic import of_values
from castpoint.harness.ptx.numbers import UNSIGNED, Array, read, width
from castpoint.harness.ptx.program import Instruction, Operand, Program
from castpoint.harness.ptx.runs import runs

# all that only compute but div and rem, which are refused where a thread divides by zero
NAMES = frozenset(
    "abs add and bfe copysign cvt ex2 fma lg2 lop3 mad max min mov mul neg not or prmt rcp rsqrt selp setp shl shr "
    "sqrt sub xor".split()
)
_REGISTER = re.compile(r"%[\w.]+")


class Block(NamedTuple):
    """Instructions in a row that run from the first to the last. end: the place behind them; function: of the bits of
    reads, the registers that they read before they write them, to those of writes, which others read."""

    end: int
    function: Callable[..., Sequence[Array]]
    reads: tuple[str, ...]
    writes: tuple[str, ...]


@functools.lru_cache(64)
def blocks(program: Program) -> dict[int, Block]:
    """A program's blocks by their first places. None goes on past a label or into a run of ptx.runs."""
    named = Counter(name for i in program.instructions for name in _REGISTER.findall(i.text))
    at_once = runs(program)
    borders = {*program.labels.values(), *at_once, *(run.end for run in at_once.values())}
    found, start = {}, 0
    for place, i in enumerate([*program.instructions, None]):
        if i is None or place in borders or not _only_computes(i):
            if inside := program.instructions[start:place]:
                found[start] = _block(inside, place, named)
            start = place
        if i is not None and not _only_computes(i):
            start = place + 1
    return found


def _only_computes(i: Instruction) -> bool:
    """No guard, no list of registers, not the opposite of a predicate, no name of memory."""
    if i.guard or i.refusal or i.words[0] not in NAMES or not isinstance(i.operands[0], str):
        return False
    return all(isinstance(o, int) or isinstance(o, str) and o.startswith("%") for o in i.operands[1:])


@dataclass
class _Text:
    """A function that is being written. names: what its lines call by name; values: of registers, the variable that
    holds each and its kind, None where it may have more bits."""

    names: dict[str, Any] = field(default_factory=lambda: {"read": read, **_VIEWS})
    values: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    reads: list[str] = field(default_factory=list)
    lines: list[tuple[str, list[str]]] = field(default_factory=list)  # and variables that each reads

    def named(self, value: object) -> str:
        name = f"n{len(self.names)}"
        self.names[name] = value
        return name

    def write(self, i: Instruction) -> None:
        function, kinds, result = of_values(i.words)
        given = [self._source(operand, kind) for operand, kind in zip(i.operands[1:], kinds, strict=False)]
        sources, variables = zip(*given, strict=True)
        variable = f"v{len(self.lines)}"
        text = self._by_numbers(i, sources) or f"{self.named(function)}({', '.join(sources)})"
        self.lines.append((f"{variable} = {text}", [name for name in variables if name]))
        self.values[i.operands[0]] = variable, result

    def _by_numbers(self, i: Instruction, sources: Sequence[str]) -> str:
        """A shift, a field or bytes by numbers that the text has, shorter than for any; empty where it is none."""
        name, kind = i.words[0], i.words[-1]
        numbers = i.operands[-_BY_NUMBERS.get(name, 1) :]
        if name not in _BY_NUMBERS or kind[0] == "s" or not all(isinstance(number, int) for number in numbers):
            return ""

        def word(value: int) -> str:
            return self.named(UNSIGNED[width(kind)](value))

        if name == "prmt":
            moved = [(sources[n], "<<" if by > 0 else ">>", by, mask) for n, by, mask in _moves(numbers[0])]
            return " | ".join(f"({bits} {way} {word(abs(by))} & {word(mask)})" for bits, way, by, mask in moved)
        if not all(0 <= number < width(kind) for number in numbers):
            return ""
        if name == "bfe":
            return f"{sources[0]} >> {word(numbers[0])} & {word((1 << numbers[1]) - 1)}"
        return f"{sources[0]} {'<<' if name == 'shl' else '>>'} {word(numbers[0])}"

    def _source(self, operand: Operand, kind: str) -> tuple[str, str | None]:
        """A source as text, and the variable in it."""
        if isinstance(operand, int):
            return self.named(read(np.uint64(operand & (1 << 64) - 1), kind)), None
        if operand not in self.values:
            self.values[operand] = f"a{len(self.reads)}", None
            self.reads.append(operand)
        variable, held = self.values[operand]
        if held == kind or held and held != "pred" and kind != "pred" and width(held) == width(kind) and kind in _SAME:
            return variable, variable
        if held and kind in _VIEWS and width(held) == width(kind):
            return f"{variable}.view({kind})", variable
        return f"read({variable}, {kind!r})", variable


def _moves(choice: int) -> Iterator[tuple[int, int, int]]:
    """What prmt takes: of which source, moved up by how many bits, those that this mask has. None of one that copies
    signs."""
    found: Counter[tuple[int, int]] = Counter()
    for n in () if choice & 0x8888 else range(4):
        byte = choice >> 4 * n & 7
        found[byte // 4, 8 * (n - byte % 4)] += 0xFF << 8 * n
    yield from ((*place, mask) for place, mask in found.items())


_BY_NUMBERS = {"shl": 1, "shr": 1, "bfe": 2, "prmt": 1}  # and how many


_VIEWS = {"f32": np.float32, "s16": np.int16, "s32": np.int32, "s64": np.int64}  # that have the bits' width
_SAME = ("b16", "b32", "b64", "u16", "u32", "u64")


def _block(inside: Sequence[Instruction], end: int, named: Counter[str]) -> Block:
    """named: how often the program names each register."""
    text = _Text()
    for i in inside:
        text.write(i)
    here = Counter(name for i in inside for name in _REGISTER.findall(i.text))
    writes = [name for name in {i.operands[0]: None for i in inside} if named[name] > here[name] or name in text.reads]
    kept = [text.values[name][0] for name in writes]
    body = "\n ".join(_lines(text.lines, {*kept, *(f"a{n}" for n in range(len(text.reads)))}))
    arguments = ", ".join(f"a{n}" for n in range(len(text.reads)))
    exec(f"def function({arguments}):\n {body}\n return ({''.join(f'{name}, ' for name in kept)})", text.names)
    return Block(end, text.names["function"], tuple(text.reads), tuple(writes))


def _lines(lines: Sequence[tuple[str, Sequence[str]]], kept: set[str]) -> Iterator[str]:
    """Each line, and behind it those variables forgotten that nobody reads any more, so that memory is used again."""
    last = {variable: n for n, (_, variables) in enumerate(lines) for variable in (f"v{n}", *variables)}
    ends: dict[int, list[str]] = {}
    for variable, n in last.items():
        if variable not in kept:
            ends.setdefault(n, []).append(variable)
    for n, (text, _) in enumerate(lines):
        yield text
        yield from (f"del {variable}" for variable in ends.get(n, ()))
