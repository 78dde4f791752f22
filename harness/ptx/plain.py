"""Instructions that only compute, most of a kernel's: what each needs is looked up once, not each time that it runs."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from castpoint.harness.ptx.arithmetic import operation
from castpoint.harness.ptx.numbers import UNSIGNED, Array
from castpoint.harness.ptx.program import Instruction, Program

# all that only compute but div and rem, which are refused where a thread divides by zero
NAMES = frozenset(
    "abs add and bfe copysign cvt ex2 fma lg2 lop3 mad max min mov mul neg not or prmt rcp rsqrt selp setp shl shr "
    "sqrt sub xor".split()
)
_WORD = re.compile(r"[bsuf](16|32|64)")


class Plain(NamedTuple):
    """sources: names of registers, and of numbers, which stand among them."""

    target: str
    function: Callable[..., Array]
    sources: tuple[str, ...]


@functools.lru_cache(64)
def plain(program: Program) -> tuple[list[Plain | None], dict[str, Array]]:
    """A program's instructions, None where there is more to do (a guard, a list of registers, the opposite of
    a predicate); and its numbers."""
    numbers: dict[str, Array] = {}
    return [_prepared(i, numbers) for i in program.instructions], numbers


def _prepared(i: Instruction, numbers: dict[str, Array]) -> Plain | None:
    if i.guard or i.refusal or i.words[0] not in NAMES or not isinstance(i.operands[0], str):
        return None
    sources = []
    for operand in i.operands[1:]:
        if not isinstance(operand, str | int) or isinstance(operand, str) and operand.startswith("!"):
            return None
        sources.append(operand if isinstance(operand, str) else _among(numbers, operand, i.words))
    return Plain(i.operands[0], operation(i.words), tuple(sources))


def _among(numbers: dict[str, Array], number: int, words: Sequence[str]) -> str:
    """The name of a number, which no register can have. Its word is the instruction's, so that it need not be made
    one each time, or, where it does not fit and may be of another type, has 64 bits as others of Threads.bits."""
    found = None if "wide" in words else _WORD.fullmatch(words[-1])
    bits = int(found[1]) if found else 64
    if not -1 << bits - 1 <= number < 1 << bits:
        bits = 64
    name = f";{number}:{bits}"
    numbers[name] = UNSIGNED[bits](number & (1 << bits) - 1)
    return name
