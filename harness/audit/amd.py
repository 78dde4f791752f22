"""AMD assembly as a graph, in the words of audit.registers.

The execution mask is not modelled: what some lanes write counts as written, except across a branch.
"""

from __future__ import annotations

import re
import struct

from castpoint.harness.audit.graph import NOWHERE, Node, place_of
from castpoint.harness.audit.registers import JUMP, Builder, Instruction, graph_of, word_of


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
    if re.fullmatch(r"-?\d+\.\d+", word):
        return struct.unpack("<I", struct.pack("<f", float(word)))[0]
    return int(word, 0) & 0xFFFFFFFF if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", word) else builder.add(word)


_NO_RESULT = re.compile(
    r"(buffer|global|flat|scratch)_(store|atomic)|ds_write|ds_add|s_(waitcnt|nop|barrier|sleep|setprio|cmp|bitcmp|set)"
)


def _lower_amd(builder: Builder, instruction: Instruction) -> None:
    op, operands, text = instruction.op, instruction.operands, instruction.text
    if not operands or JUMP.match(op):
        return
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
    else:
        result = _amd_result(builder, op, word, values)
    builder.write_all(target, result)


def _amd_result(builder: Builder, op: str, word: str, values: list[Node | int]) -> Node:
    """Fused integer operations as two, operands in PTX's order."""
    if word in ("shr_reversed", "shl_reversed"):
        return builder.add(word[:3], values[1], values[0])
    if word == "select_amd":
        return builder.add("select", values[2], values[1], values[0])
    if word == "iadd3":
        return builder.add("iadd", builder.add("iadd", *values[:2]), values[2])
    if op in ("v_and_or_b32", "v_or3_b32", "v_lshl_or_b32"):
        first = {"v_and_or_b32": "and", "v_or3_b32": "or", "v_lshl_or_b32": "shl"}[op]
        return builder.add("or", builder.add(first, *values[:2]), values[2])
    if op == "v_perm_b32":  # its bytes 0 to 3 are the second operand's
        return builder.add("bytes", values[1], values[0], values[2])
    return builder.add(word, *values)


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
    results = []
    for lane, pattern in enumerate((r"op_sel:\[([\d,]+)\]", r"op_sel_hi:\[([\d,]+)\]")):
        one_each = op == "v_pk_mov_b32"
        found = re.search(r"op_sel:\[([\d,]+)\]" if one_each else pattern, text)
        halves = [int(each) for each in found[1].split(",")] if found else [0 if one_each else lane] * len(sources)
        values = [_amd_value(builder, each, half) for each, half in zip(sources, halves, strict=False)]
        moved = one_each or op in ("v_mov_b64", "s_mov_b64")
        results.append(values[lane * (len(values) - 1)] if moved else builder.add(word, *values))
    for register, value in zip(target, results, strict=False):
        builder.write(register, value)
