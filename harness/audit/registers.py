"""The registers of machine code as values, and the words that PTX and AMD assembly have in common.

They are brought into static single assignment form (Braun et al., Simple and Efficient Construction of SSA Form, 2013),
because AMD's are reused and PTX's change in loops.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from castpoint.harness.audit.graph import Node, Place, link, reached
from castpoint.harness.audit.instructions import narrowing, widens

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
        self.phis: list[tuple[str, str, Node]] = []
        self.before = {name: [other for other, block in blocks.items() if name in block.next] for name in blocks}
        for self.here, block in blocks.items():
            for self.instruction in block.instructions:
                if self.instruction.operands and not JUMP.match(self.instruction.op):
                    lower(self, self.instruction)
        self._fill_phis()

    def read(self, register: str) -> Node | int:
        return self._value_at(self.here, register)

    def write(self, register: str, value: Node | int) -> None:
        if self.instruction.guarded:
            value = self.add("phi", self.read(register), value)
        self.blocks[self.here].registers[register] = value

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

    def operation(self, op: str, values: list[Node | int]) -> Node:
        """What the instruction of that name makes of these operands, as its word has them."""
        order = _ORDERS.get(op.split(".")[0], range(len(values)))
        return self.add(word_of(op), *(values[index] for index in order))

    def _value_at(self, block: str, register: str) -> Node | int:
        """Its value so far in that block: what comes into it, where nothing was written."""
        registers = self.blocks[block].registers
        if register not in registers:
            registers[register] = phi = Node("phi", text=register)
            self.phis.append((block, register, phi))
        return registers[register]

    def _fill_phis(self) -> None:
        for block, register, phi in self.phis:  # others join them meanwhile
            phi.args += [self._value_at(before, register) for before in self.before[block]]
        same: dict[Node, Node | int] = {}  # a phi of one value besides itself is that value, half a pack what went in

        def real(value: Node | int) -> Node | int:
            while isinstance(value, Node) and value in same:
                value = same[value]
            return value

        halves = {node for node in self.nodes if node.op == "part" and len(node.args) == 2}
        phis, known = [phi for _, _, phi in self.phis], -1
        while known < len(same):
            known = len(same)
            for phi in phis:
                values = {real(arg) for arg in phi.args} - {phi}
                if phi not in same and len(values) == 1:
                    same[phi] = values.pop()
            for node in halves - same.keys():
                whole = real(node.args[0])
                if isinstance(whole, Node) and whole.op == "pack":
                    same[node] = whole.args[node.args[1]]
        self.nodes += [phi for phi in phis if phi not in same]
        for node in self.nodes:
            node.args = [real(arg) for arg in node.args]


def graph_of(lines: list[Instruction | str], lower: Callable[[Builder, Instruction], None]) -> list[Node]:
    """The values of instructions and labels that reach an effect, since tuples of registers are read whole, with what
    was in them by chance. lower(builder, instruction) reads and writes."""
    builder = Builder(_blocks(lines), lower)
    live = reached(builder.effects, lambda each: each.args)
    return link([node for node in builder.nodes if node in live])


# ---------------------------------------------------------------- words

# Operations by the words of the graph, for both machines; what is not here keeps its own name.
_WORDS = {
    r"and\.b|[vs]_and_b": "and",
    r"or\.b|[vs]_or_b": "or",
    r"add\.[su]|v_add_u32|v_add_nc_u32|s_add_[iu]32": "iadd",
    r"shr\.[bu]|s_lshr_b32|v_lshrrev_b32": "shr",
    r"shl\.b|s_lshl_b32|v_lshlrev_b32": "shl",
    r"bfe\.u32|v_bfe_u32": "bfe",
    r"selp\.|v_cndmask_b32": "select",
    r"v_perm_b32": "bytes",
    r"setp\.|v_cmp_": "cmp",
    r"prmt\.b32": "prmt",
    r"v_bfi_b32": "bfi",
    r"fma\.|mad\.\w*\.?f\d|v_(pk_)?(fma|mad|mac|fmac|fmaak|fmamk|fma_mix\w*)_(f\d|bf16)|v_dot2\w*": "fma",
    r"mul\..*f32|v_(pk_)?mul_f32": "fmul",
    r"add\..*f32|v_(pk_)?add_f32": "fadd",
    r"sub\..*f32|v_sub_f32|v_subrev_f32": "fsub",
    r"div\..*f32|v_div_fixup": "fdiv",
    r"sqrt\.|v_sqrt": "fsqrt",
    r"rsqrt\.|v_rsq": "frsqrt",
}
# The order in which a word has an instruction's operands, where that is another: a condition first, what is shifted
# first, and for `bytes` what bytes 0 to 3 are.
_ORDERS = {"selp": (2, 0, 1), "v_cndmask_b32": (2, 1, 0), "v_perm_b32": (1, 0, 2)}
_ORDERS |= dict.fromkeys(("v_lshrrev_b32", "v_lshlrev_b32"), (1, 0))


@cache
def word_of(op: str) -> str:
    narrow = narrowing(op)
    if narrow and narrow.converts:
        return "cvt"
    if widens(op):
        return "widened"
    word = next((word for pattern, word in _WORDS.items() if re.match(pattern, op)), op)
    return "narrow_arithmetic" if narrow and word != "fma" else word
