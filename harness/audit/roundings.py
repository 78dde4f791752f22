"""Roundings found in a graph: by integers on the bits of a value, or by a conversion.

What is not the whole idiom of kernels/rounding.py is no rounding of that kind, and is named for what it lacks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from castpoint.harness.audit.graph import MERGES, NOWHERE, Node, Place, origins, reached
from castpoint.harness.audit.instructions import holds, narrowing, opcode, widens
from castpoint.harness.compiled.compile import MATRIX_INSTRUCTION

QUIET, HALF_ULP, INFINITY, ABSOLUTE = 0x00400000, 0x7FFF, 0x7F800000, 0x7FFFFFFF
BF16, TF32 = 0xFFFF0000, 0xFFFFE000  # the bits that stay
NANS = (0x7FFF0000, 0x7FFF, 0x7FC00000, 0x7FC0)  # that a compiler may put for any NaN, in fp32 or in its upper half
MINUS_ZEROS = (0x80000000, 0x8000, 0xFFFF8000, 0x80008000)  # fp32, 16 bits, two of these
ONES = (0x3F800000, 0xBF800000, 0x3F80, 0xBF80, 0xFFFFBF80, 0x3F803F80, 0xBF80BF80)  # and -1, the same and fp16's
ONES += (0x3C00, 0xBC00, 0xFFFFBC00, 0x3C003C00, 0xBC00BC00)
FLOAT = ("fmul", "fadd", "fsub", "fdiv", "fsqrt", "frsqrt", "fma")
MATRIX_RESULT = re.compile(rf"{MATRIX_INSTRUCTION.pattern}|tcgen05\.ld")


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
    for quiet, other, when in ((*node.args[1:3], True), (node.args[2], node.args[1], False)):
        value, half = _with_constant(quiet, "or", QUIET), False
        if value is None and (upper := _upper(_with_constant(quiet, "or", QUIET >> 16))):
            value, other, half = upper, _upper(other), True
        elif value is None and quiet in NANS:
            other, half = _with_constant(other, "and", BF16) or _upper(other), True
            value = _nearest(other)
        if isinstance(value, Node) and _is_nan(node.args[0], value) is when:
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
    if text.startswith("setp.ne") and right == 0 and _with_constant(left, "and", 1) is not None:
        return _is_nan(bit_of(left, 0), value)
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


def bit_of(word: Node | int | None, index: int) -> Node | int | None:
    """The comparison that is that bit of a word, or 0 or 1; None where it is anything else.

    LLVM packs comparisons of up to sixteen elements into one word and takes single bits of it again.
    """
    if not isinstance(word, Node):
        return None if word is None else word >> index & 1
    if index >= (16 if re.match(r"\w+\.[bsu]16\b", word.text) else 32):
        return 0
    if word.op == "select" and isinstance(word.args[1], int) and isinstance(word.args[2], int):
        one, other = (bit_of(arg, index) for arg in word.args[1:])
        return one if one == other else word.args[0] if one else None
    if word.op in ("shl", "shr") and isinstance(word.args[1], int):
        index += word.args[1] if word.op == "shr" else -word.args[1]
        return bit_of(word.args[0], index) if index >= 0 else 0
    if word.op in ("and", "or"):
        passing = int(word.op == "and")
        one, other = (bit_of(arg, index) for arg in word.args)
        if 1 - passing in (one, other):
            return 1 - passing
        return one if other == passing else other if one == passing else None
    return None


def cut(node: Node, user: Node) -> str | None:
    """`bf16` or `tf32` where that user reads only as many upper bits of node, else None."""
    mask = next((arg for arg in user.args if isinstance(arg, int)), 1)
    if user.op == "and":
        return "bf16" if _is_upper(mask) else "tf32" if mask | 1 << 31 == TF32 else None
    if user.op == "shr":
        return "bf16" if user.args[1] == 16 else None
    if user.op == "bfi" and isinstance(user.args[0], int):
        kept = user.args[0] if user.args[1] is node else user.args[0] ^ 0xFFFFFFFF
        return "bf16" if _is_upper(kept) else None
    if user.op == "bytes" and isinstance(user.args[2], int):
        chosen = [user.args[2] >> 8 * index & 0xFF for index in range(4)]
        return "bf16" if all(e >= 8 or e % 4 > 1 for e in chosen if e >= 8 or user.args[e // 4] is node) else None
    return None


def _is_upper(mask: int) -> bool:
    """Whether a mask leaves fp32's upper bits, at most bf16's and some behind the point: not its sign or exponent."""
    lower = ~(mask | 1 << 31) & 0xFFFFFFFF
    return 0xFFFF <= lower < 1 << 22 and not lower & lower + 1


_ADDRESS = re.compile(r"v_(add_lshl|lshl_add|mul_lo|mul_hi|mad_\w*u)|mul\.(lo|wide)|mad\.(lo|wide)")


def _cuts(node: Node) -> set[str | None]:
    """To what the bits of node are cut, each way they go: through merges, and past a second test for NaN.

    Addresses are no way: where AMD's registers are reused, a merge has arms that are never taken together.
    """

    def passes(user: Node) -> bool:
        return user.op in (*MERGES, "select") or user.op == "or" and QUIET in user.args

    ways = reached([node], lambda each: filter(passes, each.users))
    ends = [(each, user) for each in ways for user in each.users if not passes(user) and not _ADDRESS.match(user.op)]
    return {cut(each, user) for each, user in ends}


def machine_roundings(nodes: list[Node]) -> list[Rounding]:
    """Every rounding in machine code, one an element. One of a value that is rounded already is left out."""
    cores, inner, found = {}, set(), []
    for op in ("select", "iadd"):  # the sums that no select ends
        cores |= {n: core for n in nodes if n.op == op and n not in inner and (core := rounded_bits(n))}
        steps = {node: rounding_operations(node, core[1]) for node, core in cores.items()}
        inner = set().union(*steps.values())
    for node, (mode, value, half) in cores.items():
        if not _is_cut(value, cores, set()):
            cuts = {"bf16"} if half else _cuts(node)
            kind = f"{cuts.pop()}-{mode}" if len(cuts) == 1 and None not in cuts else f"{mode} with lower bits kept"
            found.append(Rounding(kind, value, node, frozenset(each.place for each in steps[node]) - {NOWHERE}))
    for node in nodes:
        found += _instruction_roundings(node)
        for user in node.users:
            if user not in inner and (type_ := cut(node, user)) and node not in cores and is_float(node):
                found.append(Rounding(f"{type_}-rtz without NaN", node, user, frozenset({user.place})))
    return found


def rounding_operations(node: Node, value: Node) -> set[Node]:
    """The operations of a rounding of that value, from the select or sum that ends it."""
    ops = ("or", "iadd", "cmp", "arith.cmpf", "shr", "and", "bfe")

    def steps(each: Node) -> list[Node]:
        return [arg for arg in each.args if isinstance(arg, Node) and arg.op in ops and arg is not value]

    return reached([node], steps)


def _is_cut(value: Node | int, cores: dict[Node, object], seen: set[Node]) -> bool:
    """Whether a value holds a narrower type already: masked, shifted up, rounded, or merged of such."""
    if not isinstance(value, Node) or value in seen:
        return True
    if value.op == "phi":
        return bool(value.args) and all(_is_cut(arg, cores, seen | {value}) for arg in value.args)
    masked = value.op == "and" and any(isinstance(arg, int) and not arg & 0xFFFF for arg in value.args)
    return masked or value in cores or value.op == "shl" and value.args[1] == 16


def is_fused(node: Node) -> bool:
    """Whether a multiply-add has a product and a sum: sm_80, which lacks both in bf16, adds -0 or multiplies by 1 or,
    for a difference, -1."""
    return node.op == "fma" and not (node.args[2] in MINUS_ZEROS or any(arg in ONES for arg in node.args[:2]))


def is_float(node: Node) -> bool:
    """Whether machine code computed this as fp32: arithmetic, a matrix instruction, a merge of such alone."""
    made = origins(node)
    narrow = any(each.op == "fma" and narrowing(opcode(each.text)) for each in made)
    return not narrow and all(each.op in FLOAT or MATRIX_RESULT.match(each.op) for each in made)


def _instruction_roundings(node: Node) -> list[Rounding]:
    """What one instruction rounds, by the tables: what it converts, but for values of the type already, or results."""
    if node.op not in ("cvt", "narrow_arithmetic", "fma") or not (narrow := narrowing(opcode(node.text))):
        return []
    if narrow.converts:
        values = node.args[:1] * narrow.count if narrow.packed else node.args[: narrow.count]
        values = [value for value in values if isinstance(value, Node) and not _is_of(narrow.type, value, set())]
    else:
        values = [node] * narrow.count
    return [Rounding(narrow.kind, value, node, frozenset({node.place})) for value in values]


def _is_of(type_: str, value: Node | int, seen: set[Node]) -> bool:
    """Whether that type of FORMATS holds a value as it is, since it was made of a type that goes into it."""
    if not isinstance(value, Node) or value in seen:
        return True
    made = origins(value, (*MERGES, "and", "shr"))
    return bool(made) and all(
        narrow is not None and narrow.converts and holds(type_, narrow.type)
        if (narrow := narrowing(opcode(each.text)))
        else each.op == "widened"
        and (holds(type_, widens(opcode(each.text))) or _is_of(type_, each.args[0], seen | {value}))
        for each in made
    )
