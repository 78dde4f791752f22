"""The registers of machine code as values, and the words that PTX and AMD assembly have in common.

They are brought into static single assignment form (Braun et al., Simple and Efficient Construction of SSA Form, 2013),
because AMD's are reused and PTX's change in loops.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from castpoint.harness.audit.graph import Node, Place, link, reached

JUMP = re.compile(r"bra\b|ret\b|exit\b|s_branch|s_cbranch|s_endpgm|s_setpc")


@dataclass
class Instruction:
    op: str
    operands: list[str]
    text: str
    place: Place
    guarded: bool = False  # executed under a predicate: what was in the registers may stay


@dataclass
class _Block:
    instructions: list[Instruction] = field(default_factory=list)
    next: list[str] = field(default_factory=list)  # labels; the block after it is called by its number
    registers: dict[str, Node | int] = field(default_factory=dict)  # at its end


def _blocks(lines: list[Instruction | str]) -> dict[str, _Block]:
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
        if JUMP.match(line.op):
            after = f"after {len(blocks)}"
            block.next += line.operands[-1:]
            if open_ := line.guarded or line.op.startswith("s_cbranch"):
                block.next.append(after)
            block = blocks[after] = _Block()
    return blocks


class Builder:
    """Registers of blocks as values: a register read before it was written merges the ends of the blocks before."""

    def __init__(self, blocks: dict[str, _Block], lower: Callable[[Builder, Instruction], None]) -> None:
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

    def write_all(self, registers: list[str], value: Node | int) -> None:
        """One register takes the value, more of them its parts (a mask of lanes whole); none makes it an effect."""
        if not registers:
            self.effects.append(value)
        whole = len(registers) == 1 or isinstance(value, Node) and value.op == "cmp"
        for register in registers:
            self.write(register, value if whole else self.add("part", value))

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
        same: dict[Node, Node | int] = {}  # a phi of one value besides itself is that value, half a pack what went in

        def real(value: Node | int) -> Node | int:
            while isinstance(value, Node) and value in same:
                value = same[value]
            return value

        halves = {node for node in self.nodes if node.op == "part" and len(node.args) == 2}
        changed = True
        while changed:
            changed = False
            for phi in self.entries.values():
                if phi not in same:
                    values = {id(v) if isinstance(v, Node) else v: v for v in map(real, phi.args) if v is not phi}
                    if len(values) == 1:
                        same[phi] = next(iter(values.values()))
                        changed = True
            for node in halves - same.keys():
                whole = real(node.args[0])
                if isinstance(whole, Node) and whole.op == "pack":
                    same[node] = whole.args[node.args[1]]
                    changed = True
        self.nodes += [phi for phi in self.entries.values() if phi not in same]
        for node in self.nodes:
            node.args = [real(arg) for arg in node.args]

    def live(self) -> list[Node]:
        """The nodes that reach an effect: tuples of registers are read whole, with what was in them by chance."""
        found = reached(self.effects, lambda each: each.args)
        return [node for node in self.nodes if node in found]


def graph_of(lines: list[Instruction | str], lower: Callable[[Builder, Instruction], None]) -> list[Node]:
    """The values of instructions and labels that reach an effect; lower(builder, instruction) reads and writes."""
    return link(Builder(_blocks(lines), lower).live())


# ---------------------------------------------------------------- words

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


def word_of(op: str) -> str:
    return next((word for pattern, word in _WORDS if pattern.match(op)), op)
