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
from castpoint.harness.ptx.program import Instruction, Program
from castpoint.harness.ptx.runs import runs

# all that only compute but div and rem, which are refused where a thread divides by zero
NAMES = frozenset(
    "abs add and bfe copysign cvt ex2 fma lg2 lop3 mad max min mov mul neg not or prmt rcp rsqrt selp setp shl shr "
    "sqrt sub xor".split()
)
_REGISTER = re.compile(r"%[\w.]+")
_WORDS = ("b16", "b32", "b64", "u16", "u32", "u64")  # types that are bits as registers hold them
_VIEWS = {"f32": np.float32, "s16": np.int16, "s32": np.int32, "s64": np.int64}  # other types, of as many bits
_BY_NUMBERS = {"shl": 1, "shr": 1, "bfe": 2, "prmt": 1}  # whose last operands, so many, are mostly numbers
Step = tuple[Any, ...]  # the words of an instruction, and its operands: names r0, r1, ... and numbers


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
    for place, computes in enumerate([*map(_only_computes, program.instructions), False]):
        if (place in borders or not computes) and start < place:
            found[start] = _block(program.instructions[start:place], place, named)
            start = place
        if not computes:
            start = place + 1
    return found


def _only_computes(i: Instruction) -> bool:
    """No guard, no list of registers, not the opposite of a predicate, no name of memory."""
    if i.guard or i.refusal or i.words[0] not in NAMES or not isinstance(i.operands[0], str):
        return False
    return all(isinstance(o, int) or isinstance(o, str) and o[0] == "%" for o in i.operands[1:])


def _block(inside: Sequence[Instruction], end: int, named: Counter[str]) -> Block:
    """named: how often the program names each register."""
    names: dict[str, str] = {}  # by which a function's text calls the registers
    steps = tuple(
        (i.words, *(names.setdefault(o, f"r{len(names)}") if isinstance(o, str) else o for o in i.operands))
        for i in inside
    )
    here = Counter(operand for i in inside for operand in i.operands)
    elsewhere = tuple(name for register, name in names.items() if named[register] > here[register])
    function, *both = _function(steps, elsewhere)
    registers = {name: register for register, name in names.items()}
    return Block(end, function, *(tuple(map(registers.__getitem__, each)) for each in both))


@functools.lru_cache(4096)  # most are alike: a compiler writes the same again for each part of a tile
def _function(
    steps: Sequence[Step], elsewhere: Sequence[str]
) -> tuple[Callable[..., Sequence[Array]], list[str], list[str]]:
    """A function of steps, what it reads and what it writes. elsewhere: what other steps name too."""
    text = _Text()
    lines = [text.line(*step) for step in steps]
    written = dict.fromkeys(step[1] for step in steps)
    writes = [name for name in written if name in elsewhere or name in text.reads]
    body = "\n ".join(_forgetting(lines, steps, {*text.reads, *writes}))
    results = "".join(f"{name}, " for name in writes)
    exec(f"def function({', '.join(text.reads)}):\n {body}\n return ({results})", text.names)
    return text.names["function"], text.reads, writes


def _forgetting(lines: Sequence[str], steps: Sequence[Step], kept: set[str]) -> Iterator[str]:
    """Each line, and behind it those names forgotten that nobody reads any more, so that memory is used again."""
    last = {name: n for n, step in enumerate(steps) for name in step[1:] if isinstance(name, str) and name not in kept}
    ends: dict[int, list[str]] = {}
    for name, n in last.items():
        ends.setdefault(n, []).append(name)
    for n, line in enumerate(lines):
        yield line
        yield from (f"del {name}" for name in ends.get(n, ()))


@dataclass
class _Text:
    """Of a function. names: what it calls by name beside registers; kinds: of the bits that registers hold, None where
    they may have more; reads: registers that are read before they are written."""

    names: dict[str, Any] = field(default_factory=lambda: {"read": read, **_VIEWS})
    kinds: dict[str, str | None] = field(default_factory=dict)
    reads: list[str] = field(default_factory=list)

    def line(self, words: tuple[str, ...], target: str, *operands: str | int) -> str:
        function, kinds, result = of_values(words)
        sources = [self._source(operand, kind) for operand, kind in zip(operands, kinds, strict=False)]
        text = self._by_numbers(words, operands, sources) or f"{self._named(function)}({', '.join(sources)})"
        self.kinds[target] = result
        return f"{target} = {text}"

    def _named(self, value: object) -> str:
        name = f"n{len(self.names)}"
        self.names[name] = value
        return name

    def _source(self, operand: str | int, kind: str) -> str:
        """As numbers.read makes it of that kind."""
        if isinstance(operand, int):
            return self._named(read(np.uint64(operand & (1 << 64) - 1), kind))
        if operand not in self.kinds:
            self.kinds[operand] = None
            self.reads.append(operand)
        held = self.kinds[operand]
        alike = held and "pred" not in (held, kind) and width(held) == width(kind)
        if held == kind or alike and kind in _WORDS:
            return operand
        if alike and kind in _VIEWS:
            return f"{operand}.view({kind})"
        return f"read({operand}, {kind!r})"

    def _by_numbers(self, words: Sequence[str], operands: Sequence[str | int], sources: Sequence[str]) -> str:
        """A shift, a field or bytes by numbers, shorter than by any; empty where it is none."""
        name, kind = words[0], words[-1]
        numbers = operands[-_BY_NUMBERS.get(name, 1) :]
        if name not in _BY_NUMBERS or kind[0] == "s" or not all(isinstance(number, int) for number in numbers):
            return ""

        def word(value: int) -> str:
            return self._named(UNSIGNED[width(kind)](value))

        if name == "prmt":
            moved = [(sources[n], "<<" if by > 0 else ">>", by, mask) for n, by, mask in _moves(numbers[0])]
            return " | ".join(f"({bits} {way} {word(abs(by))} & {word(mask)})" for bits, way, by, mask in moved)
        if not all(0 <= number < width(kind) for number in numbers):
            return ""
        if name == "bfe":
            return f"{sources[0]} >> {word(numbers[0])} & {word((1 << numbers[1]) - 1)}"
        return f"{sources[0]} {'<<' if name == 'shl' else '>>'} {word(numbers[0])}"


def _moves(choice: int) -> Iterator[tuple[int, int, int]]:
    """What prmt takes: of which source, moved up by how many bits, those that this mask has. None of one that copies
    signs."""
    found: Counter[tuple[int, int]] = Counter()
    for n in () if choice & 0x8888 else range(4):
        byte = choice >> 4 * n & 7
        found[byte // 4, 8 * (n - byte % 4)] += 0xFF << 8 * n
    yield from ((*place, mask) for place, mask in found.items())
