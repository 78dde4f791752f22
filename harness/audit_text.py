"""Compiler texts as graphs: TTIR, PTX and AMD assembly, each value with what it was computed from.

TTIR is in static single assignment form as it stands. The registers of machine code are brought into it (Braun et
al., Simple and Efficient Construction of SSA Form, 2013), because AMD's are reused and PTX's change in loops. Only
what carries floating point or its bits is understood; every other instruction is an opaque value with its operands.
Control flow is a merge of values (`phi`), and memory, shared memory too, ends a path. AMD's execution mask is not
modelled: what some lanes write counts as written, except across a branch.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePath

from harness.aot import MATRIX_INSTRUCTION

# Where an operation was written: file:line:column of it, and of the call that inlined it.
Place = tuple[str, str]
NOWHERE: Place = ("", "")


@dataclass(eq=False)
class Node:
    """A value, or an operation without one. Constants of machine code are ints: 32 bits, unsigned."""

    op: str
    args: list[Node | int] = field(default_factory=list)
    text: str = ""  # TTIR: attributes and types; machine code: the instruction
    place: Place = NOWHERE
    users: list[Node] = field(default_factory=list)


def link(nodes: list[Node]) -> list[Node]:
    """The same nodes, each with its users."""
    for node in nodes:
        for arg in {id(arg): arg for arg in node.args if isinstance(arg, Node)}.values():
            arg.users.append(node)
    return nodes


# ---------------------------------------------------------------- TTIR

_LOC = re.compile(r" loc\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)")
_OPERATION = re.compile(r'(?:(%[\w.]+)(?::(\d+))? = )?"?([\w.]+)"?(.*)')
_NAME = r"%[\w.]+(?:#\d+)?"
_CONSTANT = re.compile(r"(?:dense<)?(-?\d+)>? : (?:tensor<[\dx]+)?i(?:16|32)\b")
_BITS = {"andi": "and", "ori": "or", "addi": "iadd", "shrui": "shr", "shli": "shl", "select": "select", "cmpi": "cmp"}


def ttir_graph(text: str) -> list[Node]:
    """Every value and operation of TTIR, in order.

    Names are MLIR's (`arith.mulf`), but integer operations have the words of machine code (`and`, `iadd`) and integer
    constants are ints. Arguments of functions are `arg` with name and type as text; loop-carried values and results
    of branches are `phi`. The text of a reduction ends with the operations that combine two values. Arguments of
    other regions (`scf.while`) are `region_arg`, of which nothing is known.
    """
    places, nodes = _ttir_places(text), []
    scopes: list[dict[str, Node | int]] = [{}]
    owners: list[list[Node]] = [[]]  # of each open region: the phis that its yield feeds, or its reduction

    def value(name: str) -> Node | int:
        return next((scope[name] for scope in reversed(scopes) if name in scope), Node("unknown", text=name))

    def define(name: str, node: Node) -> Node:
        scopes[-1][name] = node
        nodes.append(node)
        return node

    for line in text.splitlines():
        locs = _LOC.findall(line)
        line = _LOC.sub("", line).strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("}"):
            scopes.pop()
            owner = owners.pop()
            if line.endswith("{"):  # else, do
                scopes.append({})
                owners.append(owner)
            continue
        if line.startswith(("module", "tt.func", "^")):
            if not line.startswith("^"):
                scopes.append({})
                owners.append([])
            for name, type_ in re.findall(r"(%\w+): ([^,{)]+)", line):
                define(name, Node("region_arg" if line[0] == "^" else "arg", text=f"{name[1:]} {type_.strip()}"))
            continue
        name, count, op, rest = _OPERATION.match(line).groups()
        place = places.get(locs[-1], NOWHERE) if locs else NOWHERE
        args = [value(each) for each in re.findall(_NAME, re.split(r" : |iter_args|->", rest)[0])]
        if op == "scf.yield":
            for phi, arg in zip(owners[-1], args, strict=False):
                phi.args.append(arg)
            continue
        if op == "arith.constant" and (number := _CONSTANT.match(rest.strip())):
            scopes[-1][name] = int(number[1]) & 0xFFFFFFFF
            continue
        op = _BITS.get(op.removeprefix("arith."), op)
        if owners[-1] and owners[-1][0].op in ("tt.reduce", "tt.scan"):
            owners[-1][0].text += f" {op}"
        merges = op in ("scf.for", "scf.if") and name is not None
        results = [Node("phi" if merges else op, [] if merges else args, rest, place) for _ in range(int(count or 1))]
        for index, node in enumerate(results):
            define(f"{name}#{index}" if count else str(name), node)
        if line.endswith("{"):
            owners.append(results if merges or op in ("tt.reduce", "tt.scan") else [])
            scopes.append({})
            _open_loop(op, rest, results, value, define, scopes[-1])
    return link(nodes)


def _open_loop(
    op: str,
    rest: str,
    results: list[Node],
    value: Callable[[str], Node | int],
    define: Callable[[str, Node], Node],
    scope: dict[str, Node | int],
) -> None:
    """Names inside a loop. A result of scf.for is its carried value too, whose first operand comes from before."""
    carried = re.findall(rf"(%\w+) = ({_NAME})", rest)
    if op == "scf.for":
        define(carried.pop(0)[0], Node("counter"))
        for (inner, init), phi in zip(carried, results, strict=False):
            phi.args.append(value(init))
            scope[inner] = phi
    else:
        for inner, _ in carried:
            define(inner, Node("region_arg", text=inner))


def _ttir_places(text: str) -> dict[str, Place]:
    """Place of each location that TTIR names."""
    named = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.M))

    def chain(loc: str) -> list[str]:
        if call := re.fullmatch(r"callsite\((.+) at (.+)\)", loc):
            return [*chain(call[1]), *chain(call[2])]
        if spot := re.fullmatch(r'"([^"]*)":(\d+):(\d+)', loc):
            return [f"{PurePath(spot[1]).name}:{spot[2]}:{spot[3]}"]
        if label := re.fullmatch(r'"[^"]*"\((.+)\)', loc):
            return chain(label[1])
        return chain(named[loc]) if loc in named else [""]

    return {name: _place(chain(loc)) for name, loc in named.items()}


def _place(spots: list[str]) -> Place:
    """The first two of a chain of calls, innermost first; line 0 is the compiler's word for nowhere."""
    if not spots or ":0:" in spots[0]:
        return NOWHERE
    return spots[0], spots[1] if len(spots) > 1 else ""


# ---------------------------------------------------------------- machine code


@dataclass
class _Instruction:
    op: str
    operands: list[str]
    text: str
    place: Place
    guarded: bool = False  # executed under a predicate: what was in the registers may stay


@dataclass
class _Block:
    instructions: list[_Instruction] = field(default_factory=list)
    next: list[str] = field(default_factory=list)  # labels; the block after it is called by its number
    registers: dict[str, Node | int] = field(default_factory=dict)  # at its end


class _Builder:
    """Registers of blocks as values: a register read before it was written merges the ends of the blocks before."""

    def __init__(self, blocks: dict[str, _Block], lower: Callable[[_Builder, _Instruction], None]) -> None:
        self.blocks, self.nodes, self.effects = blocks, [], []
        self.entries: dict[tuple[str, str], Node] = {}
        self.before: dict[str, list[str]] = {name: [] for name in blocks}
        for name, block in blocks.items():
            for target in block.next:
                if target in self.before:
                    self.before[target].append(name)
        for self.here, block in blocks.items():
            self.registers = block.registers
            for self.instruction in block.instructions:
                lower(self, self.instruction)
        self._fill_phis()

    def read(self, register: str) -> Node | int:
        return self.registers[register] if register in self.registers else self._entry(self.here, register)

    def write(self, register: str, value: Node | int) -> None:
        if self.instruction.guarded:
            value = self.add("phi", self.read(register), value)
        self.registers[register] = value

    def add(self, op: str, *args: Node | int) -> Node:
        node = Node(op, list(args), self.instruction.text, self.instruction.place)
        self.nodes.append(node)
        return node

    def _entry(self, block: str, register: str) -> Node:
        if (block, register) not in self.entries:
            self.entries[block, register] = Node("phi", text=register)
        return self.entries[block, register]

    def _fill_phis(self) -> None:
        done: set[tuple[str, str]] = set()
        while todo := self.entries.keys() - done:
            for block, register in todo:
                phi = self.entries[block, register]
                for name in self.before[block]:
                    ends = self.blocks[name].registers
                    phi.args.append(ends[register] if register in ends else self._entry(name, register))
            done |= todo
        same: dict[Node, Node | int] = {}  # a phi of one value besides itself is that value

        def real(value: Node | int) -> Node | int:
            while isinstance(value, Node) and value in same:
                value = same[value]
            return value

        changed = True
        while changed:
            changed = False
            for phi in self.entries.values():
                if phi not in same:
                    values = {id(v) if isinstance(v, Node) else v: v for v in map(real, phi.args) if v is not phi}
                    if len(values) == 1:
                        same[phi] = next(iter(values.values()))
                        changed = True
        self.nodes += [phi for phi in self.entries.values() if phi not in same]
        for node in self.nodes:
            node.args = [real(arg) for arg in node.args]

    def live(self) -> list[Node]:
        """The nodes that reach an effect: tuples of registers are read whole, with what was in them by chance."""
        found, todo = set(self.effects), list(self.effects)
        while todo:
            new = {arg for arg in todo.pop().args if isinstance(arg, Node)} - found
            found |= new
            todo += new
        return [node for node in self.nodes if node in found]


def _blocks(lines: list[_Instruction | str]) -> dict[str, _Block]:
    """Blocks of instructions and labels, the latter plain strings."""
    block = _Block()
    blocks, open_ = {"entry": block}, True
    for line in lines:
        if isinstance(line, str):
            if open_:
                block.next.append(line)
            block = blocks[line] = _Block()
            open_ = True
            continue
        block.instructions.append(line)
        if _JUMP.match(line.op):
            after = f"after {len(blocks)}"
            block.next += line.operands[-1:]
            if open_ := line.guarded or line.op.startswith("s_cbranch"):
                block.next.append(after)
            block = blocks[after] = _Block()
    return blocks


_JUMP = re.compile(r"bra\b|ret\b|exit\b|s_branch|s_cbranch|s_endpgm|s_setpc")
# Operations by the words of the graph, for both machines; what is not here keeps its own name.
_WORDS = [
    (re.compile(pattern), word)
    for pattern, word in (
        (r"and\.b|[vs]_and_b", "and"),
        (r"or\.b|[vs]_or_b", "or"),
        (r"add\.[su]|v_add_u32|v_add_nc_u32|s_add_[iu]32", "iadd"),
        (r"v_add3_u32", "iadd3"),
        (r"shr\.[bu]|s_lshr_b32", "shr"),
        (r"shl\.b|s_lshl_b32", "shl"),
        (r"v_lshrrev_b32", "shr_reversed"),
        (r"v_lshlrev_b32", "shl_reversed"),
        (r"bfe\.u32|v_bfe_u32", "bfe"),
        (r"selp\.", "select_ptx"),
        (r"v_cndmask_b32", "select_amd"),
        (r"setp\.|v_cmp_", "cmp"),
        (r"prmt\.b32", "prmt"),
        (r"v_bfi_b32", "bfi"),
        (r"fma\.|mad\.\w*\.?f\d|v_(pk_)?(fma|mad|mac|fmac|fmaak|fmamk|fma_mix\w*)_(f\d|bf16)|v_dot2\w*", "fma"),
        (r"cvt\.r\w+\.(\w+\.)*?(bf16|f16|tf32|e\dm\d)|v_cvt_(pk|sr|pkrtz|_)*(bf16|f16|bf8|fp8)", "cvt"),
        (r"mul\..*(bf16|f16)|add\..*bf16|sub\..*bf16|v_(pk_)?(mul|add)_(bf16|f16)", "narrow_arithmetic"),
        (r"mul\..*f32|v_(pk_)?mul_f32", "fmul"),
        (r"add\..*f32|v_(pk_)?add_f32", "fadd"),
        (r"sub\..*f32|v_sub_f32|v_subrev_f32", "fsub"),
        (r"div\..*f32|v_div_fixup", "fdiv"),
        (r"sqrt\.|v_sqrt", "fsqrt"),
        (r"rsqrt\.|v_rsq", "frsqrt"),
    )
]


def _word(op: str) -> str:
    return next((word for pattern, word in _WORDS if pattern.match(op)), op)


def ptx_graph(text: str) -> list[Node]:
    """Every value of the PTX. Halves of 64 bits are `pack`ed and taken `part`s of; prmt is `bytes`."""
    files = {number: PurePath(name).name for number, name in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', text, re.M)}
    lines, place = [], NOWHERE
    for line in text.split("\n\t.section", 1)[0].splitlines():
        line = line.split("//")[0].strip()
        if loc := re.match(r"\.loc\s+(\d+) (\d+) (\d+)(?:.*inlined_at (\d+) (\d+) (\d+))?", line):
            spots = [loc.groups()[:3], *([loc.groups()[3:]] if loc[4] else [])]
            place = _place([f"{files.get(file, '')}:{row}:{column}" for file, row, column in spots])
        elif label := re.fullmatch(r"(?!\$L__(?:tmp|func))([$\w]+):", line):
            lines.append(label[1])
        elif ";" in line and not line.startswith((".", "{ .", "{.")):
            for statement in filter(None, (each.strip() for each in line.split(";"))):
                guard, op, rest = re.match(r"(@!?[%\w]+\s+)?([\w.:]+)\s*(.*)", statement.lstrip("{} ")).groups("")
                operands = [each.strip() for each in re.split(r",\s*(?![^{]*\})", rest)] if rest else []
                lines.append(_Instruction(op, operands, statement, place, bool(guard)))
    return link(_Builder(_blocks(lines), _lower_ptx).live())


def _ptx_operand(builder: _Builder, operand: str) -> Node | int:
    if number := re.fullmatch(r"0f([0-9A-Fa-f]{8})|(-?\d+)|(0x[0-9a-fA-F]+)U?", operand):
        float_, decimal, hexadecimal = number.groups()
        return int(float_, 16) if float_ else int(hexadecimal or decimal, 0) & 0xFFFFFFFF
    return builder.read(operand)


def _lower_ptx(builder: _Builder, instruction: _Instruction) -> None:
    op, operands = instruction.op, instruction.operands
    if not operands or _JUMP.match(op):
        return
    lists = [re.findall(r"[%\w$]+", each) if each[0] in "{[" else [each] for each in operands]
    target = re.findall(r"[%\w]+", operands[0]) if operands[0][0] != "[" else []
    values = [[_ptx_operand(builder, each) for each in names] for names in lists[1:]]
    flat = [value for each in values for value in each]
    word = _word(op)
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
    _write_all(builder, target, result)


def _write_all(builder: _Builder, registers: list[str], value: Node | int) -> None:
    """One register takes the value, more of them its parts (a mask of lanes whole); none makes it an effect."""
    if not registers:
        builder.effects.append(value)
    whole = len(registers) == 1 or isinstance(value, Node) and value.op == "cmp"
    for register in registers:
        builder.write(register, value if whole else builder.add("part", value))


def _part(builder: _Builder, value: Node | int, lane: int) -> Node | int:
    if isinstance(value, int):
        return value
    return value.args[lane] if value.op == "pack" else builder.add("part", value)


def _move_ptx(builder: _Builder, op: str, target: list[str], values: list[Node | int]) -> None:
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


def amdgcn_graph(text: str) -> list[Node]:
    """Every value of the AMD assembly, in the words of ptx_graph; packed instructions are two operations."""
    lines, place = [], NOWHERE
    for line in text.splitlines():
        code, _, comment = line.partition(";")
        code = code.strip()
        if code.startswith(".loc"):
            place = _place(re.findall(r"[\w.-]+:\d+:\d+", comment))
        elif label := re.fullmatch(r"(\.LBB\w+):", code):
            lines.append(label[1])
        elif code and not code.startswith(".") and not code.endswith(":"):
            op, _, rest = code.partition(" ") if " " in code else code.partition("\t")
            operands = [each.strip() for each in re.split(r",(?![^\[]*\])", rest)] if rest else []
            lines.append(_Instruction(re.sub(r"(_e32|_e64|_sdwa|_dpp)+$", "", op), operands, code, place))
    return link(_Builder(_blocks(lines), _lower_amd).live())


def _amd_registers(operand: str) -> list[str]:
    """The 32-bit registers of an operand; none for a constant."""
    name = operand.split()[0].strip("-|") if operand else ""
    if span := re.fullmatch(r"([vsa])\[(\d+):(\d+)\]", name):
        return [f"{span[1]}{index}" for index in range(int(span[2]), int(span[3]) + 1)]
    return [name] if re.fullmatch(r"[vsa]\d+|vcc|vcc_lo|exec|m0|scc", name) else []


def _amd_value(builder: _Builder, operand: str, half: int = 0) -> Node | int:
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


def _lower_amd(builder: _Builder, instruction: _Instruction) -> None:
    op, operands, text = instruction.op, instruction.operands, instruction.text
    if not operands or _JUMP.match(op):
        return
    word = _word(op)
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
    _write_all(builder, target, result)


def _amd_result(builder: _Builder, op: str, word: str, values: list[Node | int]) -> Node:
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


def _selected(builder: _Builder, text: str, index: int, value: Node | int) -> Node | int:
    """The part of an operand that an instruction's selector names."""
    selector = re.search(rf"src{index}_sel:(\w+)", text)
    if not selector or selector[1] == "DWORD":
        return value
    shift, mask = {"WORD_0": (0, 0xFFFF), "WORD_1": (16, 0xFFFF)}.get(selector[1], (8 * int(selector[1][-1]), 0xFF))
    value = builder.add("shr", value, shift) if shift else value
    return value if shift == 16 else builder.add("and", value, mask)


def _lower_packed(builder: _Builder, op: str, word: str, target: list[str], sources: list[str], text: str) -> None:
    """Two operations, on the halves that op_sel and op_sel_hi name."""
    results = []
    for lane, pattern in enumerate((r"op_sel:\[([\d,]+)\]", r"op_sel_hi:\[([\d,]+)\]")):
        found = re.search(pattern, text)
        halves = [int(each) for each in found[1].split(",")] if found else [lane] * len(sources)
        values = [_amd_value(builder, each, half) for each, half in zip(sources, halves, strict=False)]
        moved = op in ("v_mov_b64", "s_mov_b64", "v_pk_mov_b32")
        results.append(values[lane * (len(values) - 1)] if moved else builder.add(word, *values))
    for register, value in zip(target, results, strict=False):
        builder.write(register, value)


# ---------------------------------------------------------------- roundings

QUIET, HALF_ULP, INFINITY, ABSOLUTE = 0x00400000, 0x7FFF, 0x7F800000, 0x7FFFFFFF
BF16, TF32 = 0xFFFF0000, 0xFFFFE000  # the bits that stay
NANS = (0x7FFF0000, 0x7FFF, 0x7FC00000, 0x7FC0)  # that a compiler may put for any NaN, in fp32 or in its upper half
ONES, MINUS_ZEROS = (0x3F800000, 0x3F80, 0x3F803F80), (0x80000000, 0x8000, 0xFFFF8000, 0x80008000)  # fp32, bf16, two
FLOAT = ("fmul", "fadd", "fsub", "fdiv", "fsqrt", "frsqrt", "fma")


@dataclass(frozen=True)
class Rounding:
    """A value rounded: by integers on its bits, as kernels/rounding.py does, or by a conversion."""

    kind: str  # bf16-rne, bf16-rtz, tf32-rtz, fp16-rne ...; with a blank in it where the idiom is not whole
    value: Node  # what is rounded
    node: Node  # what comes out
    places: frozenset[Place]


def rounded_bits(node: Node | int) -> tuple[str, Node, bool] | None:
    """(mode, v, whether the lower bits are gone) where node holds the bits of v, with bf16's rounding added if need be.

    The idiom is v + 0x7FFF + (bit 16 of v), or v as it is (`rtz`), with a NaN made quiet instead; LLVM may shift the
    upper half down first, and its own conversion for AMD puts one constant for every NaN. The mode is `rne without
    NaN` where nothing spares a NaN.
    """
    if not isinstance(node, Node):
        return None
    if node.op != "select":
        value = _nearest(node)
        return ("rne without NaN", value, False) if value else None
    for quiet, other, holds in ((*node.args[1:3], True), (node.args[2], node.args[1], False)):
        value, half = _with_constant(quiet, "or", QUIET), False
        if value is None and (upper := _upper(_with_constant(quiet, "or", QUIET >> 16))):
            value, other, half = upper, _upper(other), True
        elif value is None and quiet in NANS:
            other, half = _with_constant(other, "and", BF16) or _upper(other), True
            value = _nearest(other)
        if isinstance(value, Node) and _is_nan(node.args[0], value) is holds:
            if other is value:
                return "rtz", value, half
            if _nearest(other) is value:
                return "rne", value, half
    return None


def _with_constant(node: Node | int | None, op: str, constant: int) -> Node | int | None:
    """The other operand of a commutative operation with that constant."""
    if not isinstance(node, Node) or node.op != op or constant not in node.args[:2]:
        return None
    return node.args[1] if node.args[0] == constant else node.args[0]


def _upper(node: Node | int | None) -> Node | int | None:
    """v where node is v >> 16."""
    return node.args[0] if isinstance(node, Node) and node.op == "shr" and node.args[1] == 16 else None


def _nearest(node: Node | int | None) -> Node | None:
    """v where node is v + 0x7FFF + (bit 16 of v), in any order."""
    if not isinstance(node, Node) or node.op != "iadd":
        return None
    terms = [e for arg in node.args for e in (arg.args if isinstance(arg, Node) and arg.op == "iadd" else [arg])]
    for value in terms if len(terms) == 3 and HALF_ULP in terms else ():
        if isinstance(value, Node) and any(_bit_16(each) is value for each in terms):
            return value
    return None


def _bit_16(node: Node | int) -> Node | int | None:
    """v where node is bit 16 of v."""
    if isinstance(node, Node) and node.op == "bfe":
        return node.args[0] if node.args[1:3] == [16, 1] else None
    return _upper(_with_constant(node, "and", 1))


def _is_nan(condition: Node | int, value: Node) -> bool | None:
    """True where the condition holds for a NaN in these bits alone, False for all others, None for another test."""
    if not isinstance(condition, Node) or condition.op not in ("cmp", "arith.cmpf"):
        return None
    text, (left, right) = condition.text, condition.args[:2]
    if left is right and (left is value or left in value.args):
        unordered, ordered = re.search(r"\b(une|uno|nan)\b|_u_f32", text), re.search(r"\b(ord|num)\b|_o_f32", text)
        return True if unordered else False if ordered else None
    above, below = re.search(r"\bugt\b|gt\.u32|gt_u32", text), re.search(r"\bult\b|lt\.u32|lt_u32", text)
    if below:  # a < b as b > a
        left, right = right, left
    if above or below:
        if right == INFINITY and _with_constant(left, "and", ABSOLUTE) is value:
            return True
        if left == INFINITY + 1 and _with_constant(right, "and", ABSOLUTE) is value:
            return False
    return None


def cut(node: Node, user: Node) -> str | None:
    """`bf16` or `tf32` where that user reads only as many upper bits of node, else None."""
    mask = next((arg for arg in user.args if isinstance(arg, int)), 1)
    if user.op == "and":
        return "bf16" if not mask & 0xFFFF else "tf32" if mask | 1 << 31 == TF32 else None
    if user.op == "shr":
        return "bf16" if user.args[1] == 16 else None
    if user.op == "bfi" and isinstance(user.args[0], int):
        kept = user.args[0] if user.args[1] is node else user.args[0] ^ 0xFFFFFFFF
        return None if kept & 0xFFFF else "bf16"
    if user.op == "bytes" and isinstance(user.args[2], int):
        chosen = [user.args[2] >> 8 * index & 0xFF for index in range(4)]
        return "bf16" if all(e >= 8 or e % 4 > 1 for e in chosen if e >= 8 or user.args[e // 4] is node) else None
    return None


_ADDRESS = re.compile(r"v_(add_lshl|lshl_add|mul_lo|mul_hi|mad_\w*u)|mul\.(lo|wide)|mad\.(lo|wide)")


def _cuts(node: Node, seen: set[Node]) -> set[str | None]:
    """To what the bits of node are cut, each way they go: through merges, and past a second test for NaN.

    Addresses are no way: where AMD's registers are reused, a merge has arms that are never taken together.
    """
    found: set[str | None] = set()
    for user in node.users:
        passed = user.op in ("phi", "pack", "part", "select") or user.op == "or" and QUIET in user.args
        if passed and user not in seen:
            seen.add(user)
            found |= _cuts(user, seen)
        elif not passed and not _ADDRESS.match(user.op):
            found.add(cut(node, user))
    return found


def machine_roundings(nodes: list[Node]) -> list[Rounding]:
    """Every rounding in machine code, one an element. One of a value that is rounded already is left out."""
    cores = {node: core for node in nodes if node.op == "select" and (core := rounded_bits(node))}
    steps = {node: rounding_operations(node, core[1]) for node, core in cores.items()}
    inner = set().union(*steps.values())
    bare = {node: core for node in nodes if node.op == "iadd" and node not in inner and (core := rounded_bits(node))}
    steps |= {node: rounding_operations(node, core[1]) for node, core in bare.items()}
    cores |= bare
    inner = set().union(*steps.values())
    found = []
    for node, (mode, value, half) in cores.items():
        if not _is_cut(value, cores, set()):
            cuts = {"bf16"} if half else _cuts(node, {node})
            kind = f"{cuts.pop()}-{mode}" if len(cuts) == 1 and None not in cuts else f"{mode} with lower bits kept"
            found.append(Rounding(kind, value, node, frozenset(each.place for each in steps[node]) - {NOWHERE}))
    for node in nodes:
        if node.op in ("cvt", "narrow_arithmetic") or node.op == "fma" and "f16" in node.text:
            lanes = 2 if re.search(r"x2|_pk", node.text) else 1
            values = node.args[:lanes] if node.op == "cvt" else [node] * lanes
            places = frozenset({node.place})
            found += [Rounding(conversion(node.text), v, node, places) for v in values if isinstance(v, Node)]
        for user in node.users:
            if user not in inner and (type_ := cut(node, user)) and node not in cores and is_float(node):
                found.append(Rounding(f"{type_}-rtz without NaN", node, user, frozenset({user.place})))
    return found


def rounding_operations(node: Node, value: Node) -> set[Node]:
    """The operations of a rounding of that value, from the select or sum that ends it."""
    found, todo = {node}, [node]
    while todo:
        for arg in todo.pop().args:
            known = isinstance(arg, Node) and arg.op in ("or", "iadd", "cmp", "arith.cmpf", "shr", "and", "bfe")
            if known and arg is not value and arg not in found:
                found.add(arg)
                todo.append(arg)
    return found


def _is_cut(value: Node | int, cores: dict[Node, object], seen: set[Node]) -> bool:
    """Whether a value holds a narrower type already: masked, shifted up, rounded, or merged of such."""
    if not isinstance(value, Node) or value in seen:
        return True
    if value.op == "phi":
        return bool(value.args) and all(_is_cut(arg, cores, seen | {value}) for arg in value.args)
    masked = value.op == "and" and any(isinstance(arg, int) and not arg & 0xFFFF for arg in value.args)
    return masked or value in cores or value.op == "shl" and value.args[1] == 16


def is_fused(node: Node) -> bool:
    """Whether a multiply-add has a product and a sum: sm_80, which lacks both in bf16, adds -0 or multiplies by 1."""
    return node.op == "fma" and not (node.args[2] in MINUS_ZEROS or any(arg in ONES for arg in node.args[:2]))


def is_float(node: Node) -> bool:
    """Whether machine code computed this as fp32: arithmetic, a matrix instruction, a merge of such alone."""
    return all(
        each.op in FLOAT or MATRIX_INSTRUCTION.match(each.op) or each.op.startswith("tcgen05.ld")
        for each in origins(node)
    )


def origins(node: Node) -> set[Node]:
    """The values that node is merged of or a part of: itself where it is neither."""
    found, seen, todo = set(), set(), [node]
    while todo:
        each = todo.pop()
        if each.op in ("phi", "part", "pack"):
            todo += [arg for arg in each.args if isinstance(arg, Node) and arg not in seen]
            seen |= {arg for arg in each.args if isinstance(arg, Node)}
        else:
            found.add(each)
    return found


def conversion(text: str) -> str:
    """Kind of a conversion to a narrow type, or of arithmetic in one, by the instruction's name."""
    type_ = re.search(r"(bf16|f16|tf32|e\dm\d|bf8|fp8)", text)[1]
    mode = "rtz" if re.search(r"\.rz\b|rtz", text) else "rna" if ".rna" in text else "rne"
    return f"{'fp16' if type_ == 'f16' else type_}-{mode}"
