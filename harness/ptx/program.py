"""PTX text as a list of instructions."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from castpoint.harness.ptx import isa

_STATEMENT = re.compile(r"(?:@(!?)([%\w.$]+)\s+)?([\w.:]+)\s*(.*)", re.S)
_COMMA = re.compile(r",\s*(?![^{\[]*[}\]])")  # not inside of { } or [ ]
_FLOAT = re.compile(r"0[fFdD]([0-9A-Fa-f]{8}|[0-9A-Fa-f]{16})")
_INTEGER = re.compile(r"(-?(?:0[xX][0-9a-fA-F]+|\d+))U?")
_SKIPPED = re.compile(r"\.(?:loc|file|pragma)\b[^\n]*\n?|([$\w]+):(?!:)|[{}]")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+([^;]+);")
_NUMBERED = re.compile(r"(%?[\w$]*?)<\d+>")
_PARAMETER = re.compile(r"\.param\b.*?\.([usbf]\d+)\b.*?(\w+)", re.S)


@dataclass(frozen=True)
class Address:
    """[base + offset]; base is a register, a parameter or the shared array."""

    base: str
    offset: int


Operand = str | int | Address | tuple["str | int", ...]  # a register or name, bits, memory, a list of registers


@dataclass(frozen=True, eq=False)
class Instruction:
    """words: the opcode in its parts, `ld`, `global`, `v4`, `b32`. guard: the predicate, or None; unless: negated.
    refusal: why it cannot be executed, or None."""

    words: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: str | None
    unless: bool
    text: str
    refusal: str | None


@dataclass(frozen=True, eq=False)
class Program:
    """One kernel. parameters: (name, type) in order. labels: name -> index of the instruction behind it. registers:
    name -> type, `%r<>` of all that are `%r` and a number."""

    name: str
    parameters: tuple[tuple[str, str], ...]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    registers: dict[str, str]


def listed(operand: Operand) -> tuple[Operand, ...]:
    return operand if isinstance(operand, tuple) else (operand,)


def declared(name: str, registers: dict[str, str]) -> str | None:
    """A register's type, `b32` or `pred`; None for what is no register."""
    return registers.get(name) or registers.get(name.rstrip("0123456789") + "<>")


@functools.lru_cache(64)  # a kernel without a module is asked for its launcher at each launch
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
    body = text[text.index("{", entry.end()) + 1 :].split("\t.section", 1)[0]
    declarations = ((name.strip(), kind) for kind, names in _REGISTERS.findall(body) for name in names.split(","))
    registers = {_NUMBERED.sub(r"\1<>", name): kind for name, kind in declarations}
    for statement in body.split(";"):
        rest = statement.strip()
        while skipped := _SKIPPED.match(rest):
            if skipped[1]:
                labels[skipped[1]] = len(instructions)
            rest = rest[skipped.end() :].strip()
        if rest and not rest.startswith("."):
            instructions.append(_instruction(rest, registers))
    given = tuple((found[2], found[1]) for found in parameters)
    return Program(entry[1], given, tuple(instructions), labels, registers)


def _instruction(text: str, registers: dict[str, str]) -> Instruction:
    negated, guard, opcode, operands = _STATEMENT.fullmatch(text).groups()
    parts = _COMMA.split(operands.strip()) if operands.strip() else []
    words = tuple(opcode.replace("::", "_").split("."))
    read = tuple(_operand(part.strip()) for part in parts)
    refusal = isa.refusal(words, tuple(_kind(operand, registers) for operand in read))
    return Instruction(words, read, guard, negated == "!", text, refusal)


def _kind(operand: Operand, registers: dict[str, str]) -> str:
    """What isa.refusal calls it."""
    if isinstance(operand, int):
        return "#"
    if isinstance(operand, Address):
        return "["
    if isinstance(operand, tuple):
        inside = {_kind(each, registers) for each in operand if each != "_"}
        return f"{{{len(operand)}" if inside <= {"r", "#"} else "{?"
    if "|" in operand:
        return "".join(_kind(part, registers) for part in operand.split("|"))
    kind = declared(operand.removeprefix("!"), registers)
    if kind != "pred":
        return "r" if kind and not operand.startswith("!") else "s"
    return "n" if operand.startswith("!") else "p"


@functools.lru_cache(1 << 14)
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
