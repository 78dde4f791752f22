"""PTX as a graph, in the words of audit.registers."""

from __future__ import annotations

import re
from pathlib import PurePath

from castpoint.harness.audit.graph import NOWHERE, Node, place_of
from castpoint.harness.audit.registers import JUMP, Builder, Instruction, graph_of, word_of


def ptx_graph(text: str) -> list[Node]:
    """Every value of the PTX. Halves of 64 bits are `pack`ed and taken `part`s of; prmt is `bytes`."""
    files = {number: PurePath(name).name for number, name in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', text, re.M)}
    lines, place, inline = [], NOWHERE, False
    for line in text.split("\n\t.section", 1)[0].splitlines():
        inline = "begin inline asm" in line or inline and "end inline asm" not in line
        line = line.split("//")[0].strip()
        if inline and line.startswith(".loc"):  # LLVM counts the lines of the assembly as if they were the source's
            continue
        if loc := re.match(r"\.loc\s+(\d+) (\d+) (\d+)(?:.*inlined_at (\d+) (\d+) (\d+))?", line):
            spots = [loc.groups()[:3], *([loc.groups()[3:]] if loc[4] else [])]
            place = place_of([f"{files.get(file, '')}:{row}:{column}" for file, row, column in spots])
        elif label := re.fullmatch(r"(?!\$L__(?:tmp|func))([$\w]+):", line):
            lines.append(label[1])
        elif ";" in line and not line.startswith((".", "{ .", "{.")):
            for statement in filter(None, (each.strip() for each in line.split(";"))):
                guard, op, rest = re.match(r"(@!?[%\w]+\s+)?([\w.:]+)\s*(.*)", statement.lstrip("{} ")).groups("")
                operands = [each.strip() for each in re.split(r",\s*(?![^{]*\})", rest)] if rest else []
                lines.append(Instruction(op, operands, statement, place, bool(guard)))
    return graph_of(lines, _lower_ptx)


def _ptx_operand(builder: Builder, operand: str) -> Node | int:
    if number := re.fullmatch(r"0f([0-9A-Fa-f]{8})|(-?\d+)|(0x[0-9a-fA-F]+)U?", operand):
        float_, decimal, hexadecimal = number.groups()
        return int(float_, 16) if float_ else int(hexadecimal or decimal, 0) & 0xFFFFFFFF
    return builder.read(operand)


def _lower_ptx(builder: Builder, instruction: Instruction) -> None:
    op, operands = instruction.op, instruction.operands
    if not operands or JUMP.match(op):
        return
    lists = [re.findall(r"[%\w$]+", each) if each[0] in "{[" else [each] for each in operands]
    target = re.findall(r"[%\w]+", operands[0]) if operands[0][0] != "[" else []
    values = [[_ptx_operand(builder, each) for each in names] for names in lists[1:]]
    flat = [value for each in values for value in each]
    word = word_of(op)
    if op.startswith("mov.b") and (operands[0][0] == "{" or operands[1][0] == "{"):
        _move_ptx(builder, op, target, flat)
        return
    if op.startswith(("mov.", "cvt.u32.u16", "cvt.u64.u32")):
        result = flat[0]
    elif op.startswith("cvt.u16.u32"):
        result = builder.add("and", flat[0], 0xFFFF)
    elif op.startswith("abs.f32"):
        result = builder.add("and", flat[0], 0x7FFFFFFF)
    elif word == "select_ptx":
        result = builder.add("select", flat[2], flat[0], flat[1])
    elif word == "prmt" and isinstance(flat[2], int):
        result = builder.add("bytes", flat[0], flat[1], sum((flat[2] >> 4 * i & 7) << 8 * i for i in range(4)))
    elif op.endswith("f32x2"):
        lanes = [[_part(builder, value, lane) for value in flat] for lane in (0, 1)]
        result = builder.add("pack", *(builder.add(word, *lane) for lane in lanes))
    elif op.startswith("wgmma.mma_async"):  # its first operand is read too
        result = builder.add(op, *(builder.read(each) for each in target), *flat)
    else:
        result = builder.add(word, *(flat if target else flat + [builder.read(each) for each in lists[0]]))
    builder.write_all(target, result)


def _part(builder: Builder, value: Node | int, lane: int) -> Node | int:
    if isinstance(value, int):
        return value
    return value.args[lane] if value.op == "pack" else builder.add("part", value, lane)


def _move_ptx(builder: Builder, op: str, target: list[str], values: list[Node | int]) -> None:
    """mov between one register and its halves."""
    wide = op == "mov.b64"
    if len(target) == 1:
        low, high = (*values, 0)[:2]
        shifted = values if wide else [low, builder.add("shl", high, 16)]
        builder.write(target[0], builder.add("pack" if wide else "or", *shifted))
    elif wide:
        for lane, register in enumerate(target):
            builder.write(register, _part(builder, values[0], lane))
    else:
        builder.write(target[0], builder.add("and", values[0], 0xFFFF))
        builder.write(target[1], builder.add("shr", values[0], 16))
