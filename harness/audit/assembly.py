"""PTX and AMD assembly as graphs, in the words of audit.registers.

AMD's execution mask is not modelled: what some lanes write counts as written, except across a branch.
"""

from __future__ import annotations

import re
import struct
from pathlib import PurePath

from castpoint.harness.audit.graph import NOWHERE, Node, place_of
from castpoint.harness.audit.registers import Builder, Instruction, graph_of, word_of


def machine_graph(asm: dict[str, str]) -> list[Node]:
    """The values of a compiled kernel's PTX or AMD assembly."""
    return ptx_graph(asm["ptx"]) if "ptx" in asm else amdgcn_graph(asm["amdgcn"])


# ---------------------------------------------------------------- PTX


def ptx_graph(text: str) -> list[Node]:
    """Every value of the PTX. Halves of 64 bits are `pack`ed and taken `part`s of; prmt is `bytes`."""
    files = {number: PurePath(name).name for number, name in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', text, re.M)}
    lines, place, inline, blocks = [], NOWHERE, False, 0
    text = re.sub(r"\bcall\b[^;]*;", lambda call: " ".join(call[0].split()), text)  # on several lines
    for line in text.split("\n\t.section", 1)[0].splitlines():
        blocks += "begin inline asm" in line
        inline = "begin inline asm" in line or inline and "end inline asm" not in line
        line = line.split("//")[0].strip()
        if inline and line.startswith(".loc"):  # LLVM counts the lines of the assembly as if they were the source's
            continue
        if loc := re.match(r"\.loc\s+(\d+) (\d+) (\d+)(?:.*inlined_at (\d+) (\d+) (\d+))?", line):
            spots = [loc.groups()[:3], *([loc.groups()[3:]] if loc[4] else [])]
            place = place_of([f"{files.get(file, '')}:{row}:{column}" for file, row, column in spots])
        elif label := re.fullmatch(r"(?!\$L__(?:tmp|func))([$\w]+):", line):
            lines.append(f"{label[1]}_{blocks}" if inline else label[1])
        elif ";" in line and not line.startswith((".", "{ .", "{.")):
            for statement in filter(None, (each.strip() for each in line.split(";"))):
                parts = re.match(r"(@!?[%\w]+\s+)?([\w.:]+)\s*(.*)", statement.lstrip("{} \t"))
                if not parts:
                    continue
                guard, op, rest = parts.groups("")
                operands = [each.strip() for each in re.split(r",\s*(?![^{]*\})", rest)] if rest else []
                if inline and op.startswith("bra"):  # a label of a block of inline assembly, which others have too
                    operands = [f"{operands[0]}_{blocks}"]
                lines.append(Instruction(op, operands, statement, place, bool(guard)))
    return graph_of(lines, _lower_ptx)


def _ptx_operand(builder: Builder, operand: str) -> Node | int:
    if number := re.fullmatch(r"0f([0-9A-Fa-f]{8})|(-?\d+|0x[0-9a-fA-F]+)U?", operand):
        return int(number[1], 16) if number[1] else int(number[2], 0) & 0xFFFFFFFF
    return builder.read(operand)


def _lower_ptx(builder: Builder, instruction: Instruction) -> None:
    op, operands = instruction.op, instruction.operands
    lists = [re.findall(r"[%\w$]+", each) if each[0] in "{[" else [each] for each in operands]
    target = re.findall(r"[%\w]+", operands[0]) if operands[0][0] != "[" else []
    flat = [_ptx_operand(builder, each) for names in lists[1:] for each in names]
    if op.startswith("mov.b") and (operands[0][0] == "{" or operands[1][0] == "{"):
        _move_ptx(builder, op, target, flat)
        return
    word = word_of(op)
    if op.startswith(("mov.", "cvt.u32.u16", "cvt.u64.u32")):
        result = flat[0]
    elif op.startswith("cvt.u16.u32"):
        result = builder.add("and", flat[0], 0xFFFF)
    elif op.startswith("abs.f32"):
        result = builder.add("and", flat[0], 0x7FFFFFFF)
    elif word == "prmt" and isinstance(flat[2], int):
        result = builder.add("bytes", flat[0], flat[1], sum((flat[2] >> 4 * i & 7) << 8 * i for i in range(4)))
    elif op.endswith("f32x2"):
        lanes = [[_part(builder, value, lane) for value in flat] for lane in (0, 1)]
        result = builder.add("pack", *(builder.add(word, *lane) for lane in lanes))
    elif op.startswith("wgmma.mma_async"):  # its first operand is read too
        result = builder.add(op, *(builder.read(each) for each in target), *flat)
    else:
        result = builder.operation(op, flat if target else flat + [builder.read(each) for each in lists[0]])
    if op.startswith("atom."):  # its result is seldom read
        builder.effects.append(result)
    builder.write_all(target, result)


def _part(builder: Builder, value: Node | int, lane: int) -> Node | int:
    return value if isinstance(value, int) else builder.add("part", value, lane)


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


# ---------------------------------------------------------------- AMD


def amdgcn_graph(text: str) -> list[Node]:
    """Every value of the AMD assembly, in the words of ptx_graph; packed instructions are two operations."""
    lines, place = [], NOWHERE
    for line in text.splitlines():
        code, _, comment = line.partition(";")
        code = code.strip()
        if code.startswith(".loc"):
            place = place_of(re.findall(r"[\w.-]+:\d+:\d+", comment))
        elif label := re.fullmatch(r"(\.LBB\w+):", code):
            lines.append(label[1])
        elif code and not code.startswith(".") and not code.endswith(":"):
            op, _, rest = code.partition(" ") if " " in code else code.partition("\t")
            operands = [each.strip() for each in re.split(r",(?![^\[]*\])", rest)] if rest else []
            lines.append(Instruction(re.sub(r"(_e32|_e64|_sdwa|_dpp)+$", "", op), operands, code, place))
    return graph_of(lines, _lower_amd)


def _amd_registers(operand: str) -> list[str]:
    """The 32-bit registers of an operand; none for a constant."""
    name = operand.split()[0].strip("-|") if operand else ""
    if span := re.fullmatch(r"([vsa])\[(\d+):(\d+)\]", name):
        return [f"{span[1]}{index}" for index in range(int(span[2]), int(span[3]) + 1)]
    return [name] if re.fullmatch(r"[vsa]\d+|vcc|vcc_lo|exec|m0|scc", name) else []


def _amd_value(builder: Builder, operand: str, half: int = 0) -> Node | int:
    """Value of an operand, or of the given half of a register pair."""
    if registers := _amd_registers(operand):
        value = builder.read(registers[min(half, len(registers) - 1)])
        value = builder.add("and", value, 0x7FFFFFFF) if "|" in operand else value
        return builder.add("neg", value) if operand.startswith("-") else value
    word = operand.split()[0]
    if word == "neg(0)":  # of v_fma_mix, which widens a half and multiplies it
        return 0x80000000
    if re.fullmatch(r"-?\d+\.\d+", word):
        return struct.unpack("<I", struct.pack("<f", float(word)))[0]
    return int(word, 0) & 0xFFFFFFFF if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", word) else builder.add(word)


_NO_RESULT = re.compile(
    r"(buffer|global|flat|scratch)_(store|atomic)|ds_write|ds_add|s_(waitcnt|nop|barrier|sleep|setprio|cmp|bitcmp|set)"
)
_PART_WRITTEN = re.compile(r"v_cvt_(pk|sr)_(fp8|bf8)_f32|v_fma_mix(lo|hi)_f16|.*UNUSED_PRESERVE")  # the rest stays
# Operations that one instruction does, the second on the result of the first.
_TWO_IN_ONE = {"v_add3_u32": "iadd iadd", "v_and_or_b32": "and or", "v_or3_b32": "or or", "v_lshl_or_b32": "shl or"}


def _lower_amd(builder: Builder, instruction: Instruction) -> None:
    op, operands, text = instruction.op, instruction.operands, instruction.text
    word = word_of(op)
    target = [] if _NO_RESULT.match(op) else _amd_registers(operands[0])
    sources = operands[1:] if target else operands
    if op.startswith(("v_pk_", "v_mov_b64", "s_mov_b64")):
        _lower_packed(builder, op, word, target, sources, text)
        return
    if op.startswith("v_mad_u64"):  # its lower half comes from lower halves alone; the upper one may be by chance
        values = [_amd_value(builder, each, half) for half in (0, 1) for each in sources[1:]]
        builder.write(target[1], builder.add(op, *values))
        builder.write(target[0], builder.add(op, *values[:3]))
        return
    if re.match(r"v_div_scale|v_\w+_co_\w*u32", op):  # the second operand is written too
        target, sources = target + _amd_registers(sources[0]), sources[1:]
    if re.match(r"v_(fmac|mac)_", op):
        sources = [*sources, operands[0]]
    values = [_amd_value(builder, each) for each in sources]
    if not word.startswith(("select", "cmp")):  # tuples are read whole, in one value a register
        wide = [each for source in sources for each in _amd_registers(source)[1:]]
        values += [builder.read(each) for each in wide]
    values = [_selected(builder, text, index, value) for index, value in enumerate(values)]
    if re.match(r"v_mov_b32$|s_mov_b32|s_movk_i32|v_accvgpr", op) and "quad_perm" not in text and "row_" not in text:
        result = values[0]
    elif op in ("v_bfrev_b32", "s_brev_b32") and isinstance(values[0], int):
        result = int(f"{values[0]:032b}"[::-1], 2)
    elif op in _TWO_IN_ONE:
        first, second = _TWO_IN_ONE[op].split()
        result = builder.add(second, builder.add(first, *values[:2]), values[2])
    else:
        result = builder.operation(op, values)
    if target and _PART_WRITTEN.match(text):
        result = builder.add("phi", builder.read(target[0]), result)
    builder.write_all(target, result)


def _selected(builder: Builder, text: str, index: int, value: Node | int) -> Node | int:
    """The part of an operand that an instruction's selector names."""
    selector = re.search(rf"src{index}_sel:(\w+)", text)
    if not selector or selector[1] == "DWORD":
        return value
    shift, mask = {"WORD_0": (0, 0xFFFF), "WORD_1": (16, 0xFFFF)}.get(selector[1], (8 * int(selector[1][-1]), 0xFF))
    value = builder.add("shr", value, shift) if shift else value
    return value if shift == 16 else builder.add("and", value, mask)


def _lower_packed(builder: Builder, op: str, word: str, target: list[str], sources: list[str], text: str) -> None:
    """Two operations, on the halves that op_sel and op_sel_hi name; v_pk_mov takes one of each source, by op_sel."""
    results, one_each = [], op == "v_pk_mov_b32"
    for lane in (0, 1):
        found = re.search(rf"op_sel{'_hi' if lane and not one_each else ''}:\[([\d,]+)\]", text)
        halves = [int(each) for each in found[1].split(",")] if found else [0 if one_each else lane] * len(sources)
        values = [_amd_value(builder, each, half) for each, half in zip(sources, halves, strict=False)]
        moved = one_each or op in ("v_mov_b64", "s_mov_b64")
        results.append(values[lane * (len(values) - 1)] if moved else builder.add(word, *values))
    for register, value in zip(target, results, strict=False):
        builder.write(register, value)
