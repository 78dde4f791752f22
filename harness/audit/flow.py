"""TTIR of a kernel as named values of the chain, and the roundings on every way from one to the next.

A value is named by what it was computed from, never by what the kernel calls it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from castpoint.harness.audit.graph import Node, origins, reached
from castpoint.harness.audit.instructions import FORMATS, holds
from castpoint.harness.audit.roundings import BF16, TF32, Rounding, rounded_bits, rounding_operations
from castpoint.harness.audit.ttir import converted, pointer_name, ttir_graph, types_of

PASSED = re.compile(
    r"phi|select|tt\.(splat|expand_dims|broadcast|reshape|trans|cat|join|split)|ttg?\.convert_layout"
    r"|arith\.(extf|negf)|math\.absf"
)
READERS = re.compile(
    r"arith\.(add|sub|mul|div|rem|max\w*|min\w*)f|math\.\w+|tt\.(precise_\w+|dot\w*|reduce|scan|store|atomic_\w+|clampf"
    r"|descriptor_store|extern_elementwise|elementwise_inline_asm|call|reduce\.return)"
)
# Exact in any type, or a sum of many, whose steps are not roundings of a value.
EXACT = re.compile(r"tt\.(reduce|scan|dot\w*|clampf)|arith\.(max|min)\w*f|math\.(floor|ceil|trunc|round\w*)")
NOT_FOLLOWED = re.compile(
    r"tt\.(extern_elementwise|elementwise_inline_asm|call|atomic_\w+|scan|dot_scaled|gather)|scf\.while|cf\.\w+"
)
ON_BITS = ("and", "or", "iadd", "shr", "shl", "select", "arith.trunci", "arith.extui", "arith.xori")
LOADS = ("tt.load", "tt.descriptor_load")
ROWS = {"x_ptr", "residual_ptr"}  # behind which the rows are of which a kernel before stored rstd
Paths = tuple[tuple[Node, tuple[Rounding, ...]], ...]


@dataclass(frozen=True)
class Edge:
    """A value on its way to an operation that reads it."""

    source: Node
    role: str  # of the source, see Flow
    sink: Node
    sink_role: str  # or the pointer stored to
    operand: int
    roundings: tuple[Rounding, ...]  # in order


class Flow:
    """TTIR of one kernel as named values and the roundings between them.

    Roles are the values of the chain (statistics, variance, rstd, normed, hidden, proj, head_*, unrotated, cos_sin,
    products, out), their steps (sum, shifted: variance + eps, root, offset: 1 + w, remainder: what tf32 cut off,
    weight: d * n of a block), `load`, `product` of two loads where there is no matmul, `scalar`, and `` for anything
    else. Statistics of a matrix product, or of a load that `given` calls proj, are those of the head.

    Memory: `given` is the role of what another kernel stored behind a pointer. What is loaded from `workspace` is what
    this kernel stores behind the same pointer, whatever the address, with the roundings before the store. hidden: a
    product of two loads is hidden, as it is before a matmul. What a head's norm returns is out, but unrotated where the
    kernel loads what `given` calls cos_sin.
    """

    def __init__(
        self, ttir: str, given: dict[str, str] | None = None, workspace: Iterable[str] = (), hidden: bool = False
    ) -> None:
        self.nodes, self.given = ttir_graph(ttir), given or {}
        self.scaled = "hidden" if hidden or any(node.op == "tt.dot" for node in self.nodes) else "product"
        loaded = {self.given.get(pointer_name(node)) for node in self.nodes if node.op in LOADS}
        self.weighted = "unrotated" if "cos_sin" in loaded else "out"
        self.stored: dict[str, list[Node | int]] = {name: [] for name in workspace}
        for node in self.nodes:
            for name in pointer_name(node).split(" or ") if node.op.endswith("store") else ():
                self.stored.get(name, []).append(node.args[1])
        self._roles: dict[Node, str] = {}
        self._paths: dict[Node, Paths] = {}
        self.edges = list(self._edges())
        self.rounded: dict[Rounding, list[Edge]] = defaultdict(list)  # the edges on which each rounding is
        for edge in self.edges:
            for rounding in edge.roundings:
                self.rounded[rounding].append(edge)

    def paths(self, node: Node) -> Paths:
        """The values that node holds, by way of every branch, each with the roundings on that way."""
        return self._walk(node, frozenset())[0]

    def _walk(self, node: Node, above: frozenset[Node]) -> tuple[Paths, bool]:
        """(its paths but for those through a node above, whether these are all): a loop is gone through once."""
        if node in self._paths:
            return self._paths[node], True
        came_from, rounding = self._step(node)
        after = (rounding,) if rounding else ()
        found, whole = [] if came_from else [(node, after)], True
        for arg in (each for each in came_from if isinstance(each, Node)):
            if arg is node or arg in above:
                whole = False
                continue
            paths, all_ = self._walk(arg, above | {node})
            found += [(source, before + after) for source, before in paths]
            whole &= all_
        found = tuple(dict.fromkeys(found))
        if whole or not above:
            self._paths[node] = found
        return found, whole

    def _step(self, node: Node) -> tuple[list[Node | int], Rounding | None]:
        """Where a value that is only passed on comes from, and the rounding it gets here."""
        if PASSED.fullmatch(node.op):
            return node.args[1:] if node.op == "select" else node.args, None
        if node.op in LOADS:
            return self.stored.get(pointer_name(node), []), None
        before, after = types_of(node)
        if node.op == "arith.addf" and after == "f32" and any(is_zero(arg) for arg in node.args):
            return [arg for arg in node.args if not is_zero(arg)], None  # exact, but for the sign of a zero
        if node.op in ("arith.truncf", "tt.fp_to_fp") and (kind := rounds(node)):
            return node.args, Rounding(kind, node.args[0], node, frozenset({node.place}))
        if node.op in ("tt.fp_to_fp", "tt.bitcast", "arith.bitcast"):
            return self._bits(node, before, after)
        if READERS.fullmatch(node.op) and after in ("bf16", "fp16") and not EXACT.fullmatch(node.op):
            return [], Rounding(f"{after}-rne", node, node, frozenset({node.place}))
        return [], None

    def _bits(self, node: Node, before: str, after: str) -> tuple[list[Node | int], Rounding | None]:
        """The same for a bit cast: widened, narrowed, or rounded in between (kernels/rounding.py)."""
        bits, mask, steps = node.args[0], 0xFFFFFFFF, {node}
        if after[0] == "i" or before[0] != "i":  # to bits, or between floats
            return node.args, None
        if after in ("bf16", "fp16") and is_op(bits, "arith.trunci") and is_op(bits.args[0], "shr", 16):
            steps |= {bits, bits.args[0]}
            bits, mask = bits.args[0].args[0], BF16
        if is_op(bits, "shl", 16) and is_op(bits.args[0], "arith.extui"):
            return bits.args[0].args, None
        if is_op(bits, "and") and isinstance(bits.args[1], int):
            steps.add(bits)
            bits, mask = bits.args[0], mask & bits.args[1]
        mode, value, _ = rounded_bits(bits) or ("rtz without NaN", bits, False)
        if is_op(value, "tt.bitcast") and bits is value:
            if mask == 0xFFFFFFFF or mask == BF16 and self.holds_bf16(value):
                return value.args, None
        elif is_op(value, "tt.bitcast"):
            steps |= rounding_operations(bits, value)
        places = frozenset(each.place for each in steps)
        if is_op(value, "tt.bitcast") and mask in (BF16, TF32):
            kind = f"{'tf32' if mask == TF32 else 'bf16'}-{mode}"
            return value.args, Rounding(kind, value.args[0], node, places)
        casts = [each for each in origins(node.args[0], ON_BITS) if each.op == "tt.bitcast"]
        floats = {each.args[0] for each in casts if types_of(each)[0][0] in "fbe"}
        rounding = Rounding("unknown arithmetic on bits", min(floats, key=id), node, places) if floats else None
        return list(floats), rounding

    def holds_bf16(self, node: Node) -> bool:
        """Whether every value that comes here was rounded to bf16 last, or was bf16 from the start."""
        return all(
            source.op == "arith.constant"
            or (roundings[-1].kind.startswith("bf16") if roundings else types_of(source)[1] == "bf16")
            for source, roundings in self.paths(node)
        )

    def _edges(self) -> Iterator[Edge]:
        for sink in self.nodes:
            if not READERS.fullmatch(sink.op):
                continue
            stores = sink.op.endswith("store")
            for operand, arg in enumerate(sink.args):
                if not isinstance(arg, Node) or stores and operand != 1:
                    continue
                for source, roundings in self.paths(arg):
                    if self.role(source) not in ("scalar", "address"):
                        role = pointer_name(sink) if stores else self.role(sink)
                        yield Edge(source, self.role(source), sink, role, operand, roundings)

    def roles(self, node: Node | int) -> frozenset[str]:
        """Roles of the values that node holds; the constant a loop starts from counts only alone."""
        found = {self.role(source) for source, _ in self.paths(node)} if isinstance(node, Node) else {"scalar"}
        return frozenset(found - {"", "scalar"} or found & {"scalar"} if found != {"", "scalar"} else ())

    def role(self, node: Node) -> str:
        if node not in self._roles:
            self._roles[node] = ""  # what a loop carries is named by what it starts from or is added to
            self._roles[node] = self._role(node)
        return self._roles[node]

    def _role(self, node: Node) -> str:
        if node.op in LOADS:
            return self.given.get(pointer_name(node), "load")
        if node.op in ("arith.constant", "arg", "arith.sitofp", "arith.uitofp"):
            return "scalar"
        if not READERS.fullmatch(node.op):
            return "" if types_of(node)[1] in ("f32", "f64", *FORMATS) and types_of(node)[1] != "i1" else "address"
        if node.op == "tt.dot":
            return "proj"
        first, second = (self.roles(arg) for arg in (*node.args, 0, 0)[:2])
        if node.op == "tt.reduce":
            return renamed(first, statistics="sum") if "arith.addf" in node.text else ""
        if root := re.search(r"r?sqrt", node.op + "".join(re.findall(r'symbol = "(\w+)"', node.text))):
            to = "rstd" if root[0] == "rsqrt" else "root"
            return renamed(first, shifted=to, variance=to)
        if node.op == "arith.mulf":
            return self._product(node, first, second)
        if node.op == "arith.addf":
            return added(first, second) or added(second, first) or rotated(first, second)
        if node.op == "arith.subf":
            return "remainder" if first == second == {"hidden"} else rotated(first, second)
        if node.op in ("arith.divf", "tt.precise_divf"):
            if "scalar" in second:
                return renamed(first, sum="variance")
            return renamed(second, root="rstd" if "scalar" in first else "normed")
        return ""

    def _product(self, node: Node, first: frozenset[str], second: frozenset[str]) -> str:
        left, right = ({source for source, _ in self.paths(arg)} for arg in node.args)
        if left == right:
            return "head_statistics" if first == {"proj"} else "statistics" if first <= {"load", "x"} else ""
        for one, other, index in ((first, second, 0), (second, first, 1)):
            if "rstd" in one and "proj" in other:
                return "proj"
            if named := renamed(one, rstd="normed"):  # where what is scaled is what was squared, not its weight
                scaled, rstd = self._pointers(node.args[1 - index]), self._pointers(node.args[index])
                return named if scaled <= rstd or "proj" in other else "weighted rstd"
            if "normed" in one or "weighted rstd" in one:
                return "hidden"
            if "head_normed" in one:
                return self.weighted
            if "cos_sin" in one:
                return "products"
            if "scalar" in other and (named := renamed(one, sum="variance")):
                return named
            if one == {"load"} and other == {"scalar"} and self._is_whole(node.args[1 - index]):
                return "weight"
        return self.scaled if first | second <= {"load", "x", "offset"} else ""

    def _is_whole(self, node: Node | int) -> bool:
        """Whether what comes here was an integer: the number that a block's scale is multiplied by."""
        sources = [source for source, _ in self.paths(node)] if isinstance(node, Node) else []
        return bool(sources) and all(source.op == "arith.sitofp" for source in sources)

    def _pointers(self, node: Node | int) -> set[str]:
        """Names of the pointers from which a value was loaded, however long ago."""
        come_from = reached(
            [node], lambda each: self.stored.get(pointer_name(each), []) if each.op in LOADS else each.args
        )
        names = {pointer_name(each) for each in come_from if each.op in LOADS} - self.stored.keys()
        rstd = {name for name in names if self.given.get(name) == "rstd"}
        return names - rstd | (ROWS if rstd else set())


def added(one: frozenset[str], other: frozenset[str]) -> str:
    """Role of a sum, by the roles of its operands; called for both orders."""
    if named := renamed(one, sum="sum") or ("scalar" in other and renamed(one, variance="shifted")):
        return named
    if "proj" in one:
        return "proj"
    if one == {"load"} and other == {"scalar"}:
        return "offset"
    return "x" if one <= {"load", "x"} and other <= {"load", "x"} and one and other else ""


def rotated(one: frozenset[str], other: frozenset[str]) -> str:
    """Role of a sum or difference as RoPE has them, by the roles of its operands."""
    return "out" if one == other == {"products"} else ""


def renamed(roles: frozenset[str], **names: str) -> str:
    """The new name for the one of these roles that is there, for the chain or its head; `` where none is."""
    for old, new in names.items():
        if old in roles:
            return new
        if f"head_{old}" in roles:
            return f"head_{new}"
    return ""


def rounds(node: Node) -> str | None:
    """Kind of what a conversion to a float rounds; None where the new type holds all of the old, or there is none."""
    types = converted(node)
    if types is None or holds(types[1], types[0]):
        return None
    return f"{types[1]}-{'rtz' if 'rounding = rtz' in node.text else 'rne'}"


def is_zero(node: Node | int) -> bool:
    """Whether this is the constant 0.0, of any shape."""
    while isinstance(node, Node) and node.op in ("tt.splat", "tt.broadcast", "tt.expand_dims"):
        node = node.args[0]
    return is_op(node, "arith.constant") and bool(re.match(r" *(dense<)?0\.0+e[+]00\b", node.text))


def is_op(node: Node | int, op: str, constant: int | None = None) -> bool:
    return isinstance(node, Node) and node.op == op and (constant is None or node.args[1] == constant)
