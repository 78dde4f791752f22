"""Instructions that only compute, most of a kernel's: what each needs is looked up once, not each time that it runs."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from castpoint.harness.ptx.arithmetic import operation
from castpoint.harness.ptx.numbers import UNSIGNED, Array
from castpoint.harness.ptx.program import Instruction, Program

NAMES = frozenset("abs add and bfe cvt fma lop3 mad max min mov mul neg not or prmt selp setp shl shr sub xor".split())
_WORD = re.compile(r"[bsuf](16|32|64)")


class Plain(NamedTuple):
    """sources: names of registers, and of numbers, which stand among them."""

    target: str
    function: Callable[..., Array]
    sources: tuple[str, ...]


@functools.lru_cache(64)
def plain(program: Program) -> tuple[list[Plain | None], dict[str, Array]]:
    """A program's instructions, None for one that does more, or has a guard; and its numbers."""
    numbers: dict[str, Array] = {}
    return [_prepared(i, numbers) for i in program.instructions], numbers


def _prepared(i: Instruction, numbers: dict[str, Array]) -> Plain | None:
    if i.guard or i.refusal or i.words[0] not in NAMES or not isinstance(i.operands[0], str):
        return None
    sources = []
    for operand in i.operands[1:]:
        if not isinstance(operand, str | int) or isinstance(operand, str) and operand.startswith("!"):
            return None
        if isinstance(operand, int):
            word = np.uint64 if "wide" in i.words else _word(i.words[-1])
            name = f"{word.__name__} {operand}"
            numbers[name] = word(operand & (1 << 8 * word().itemsize) - 1)
            operand = name
        sources.append(operand)
    return Plain(i.operands[0], operation(i.words), tuple(sources))


def _word(kind: str) -> type[np.unsignedinteger]:
    """What holds a number among operands of that type."""
    found = _WORD.fullmatch(kind)
    return UNSIGNED[int(found[1])] if found else np.uint64
