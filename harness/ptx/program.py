"""PTX text as a list of instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass

_STATEMENT = re.compile(r"(?:@(!?)([%\w.$]+)\s+)?([\w.:]+)\s*(.*)", re.S)
_COMMA = re.compile(r",\s*(?![^{\[]*[}\]])")  # not inside of { } or [ ]
_FLOAT = re.compile(r"0[fFdD]([0-9A-Fa-f]{8}|[0-9A-Fa-f]{16})")
_INTEGER = re.compile(r"(-?(?:0[xX][0-9a-fA-F]+|\d+))U?")
_SKIPPED = re.compile(r"\.(?:loc|file|pragma)\b[^\n]*\n?|([$\w]+):(?!:)|[{}]")
_PARAMETER = re.compile(r"\.param\b.*?\.([usbf]\d+)\b.*?(\w+)", re.S)


@dataclass(frozen=True)
class Address:
    """[base + offset]; base is a register, a parameter or the shared array."""

    base: str
    offset: int


Operand = str | int | Address | tuple["str | int", ...]  # a register or name, bits, memory, a list of registers


@dataclass(frozen=True)
class Instruction:
    """words: the opcode in its parts, `ld`, `global`, `v4`, `b32`. guard: the predicate, or None; unless: negated."""

    words: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: str | None
    unless: bool
    text: str


@dataclass(frozen=True)
class Program:
    """One kernel. parameters: (name, type) in order. labels: name -> index of the instruction behind it."""

    name: str
    parameters: tuple[tuple[str, str], ...]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


def parse(text: str) -> Program:
    """The only kernel of that PTX. Raises ValueError where there is none, or one with a parameter that is no number."""
    text = re.sub(r"//[^\n]*", "", text)
    entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)", text, re.S)
    if entry is None:
        raise ValueError("no kernel in this PTX: it has no .entry")
    parameters = [_PARAMETER.fullmatch(each.strip()) for each in entry[2].split(",") if each.strip()]
    if not all(parameters):
        raise ValueError(f"{entry[1]} has a parameter that is neither a number nor a pointer")
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    body = text[text.index("{", entry.end()) + 1 :]
    for statement in body.split("\t.section", 1)[0].split(";"):
        rest = statement.strip()
        while skipped := _SKIPPED.match(rest):
            if skipped[1]:
                labels[skipped[1]] = len(instructions)
            rest = rest[skipped.end() :].strip()
        if rest and not rest.startswith("."):
            instructions.append(_instruction(rest))
    return Program(entry[1], tuple((found[2], found[1]) for found in parameters), tuple(instructions), labels)


def _instruction(text: str) -> Instruction:
    negated, guard, opcode, operands = _STATEMENT.fullmatch(text).groups()
    parts = _COMMA.split(operands.strip()) if operands.strip() else []
    words = tuple(opcode.replace("::", "_").split("."))
    return Instruction(words, tuple(_operand(part.strip()) for part in parts), guard, negated == "!", text)


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(_operand(part.strip()) for part in text.strip("{} ").split(","))
    if text.startswith("["):
        base, _, offset = text.strip("[] ").partition("+")
        return Address(base.strip(), int(offset, 0) if offset else 0)
    if found := _FLOAT.fullmatch(text):
        return int(found[1], 16)
    if found := _INTEGER.fullmatch(text):
        return int(found[1], 0)
    return text
