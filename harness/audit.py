"""The static audit: compiled kernels hold the roundings their plan declares, where it declares them, and no other.

TTIR proves where. It is a graph of values: each product, sum and root is named by what it was computed from (a product
with 1/sqrt of a mean of squares is `normed`), and every way from one of them to the next must hold the roundings that
the plan declares for it: none lost, doubled, truncating or moved, whatever the kernel calls its variables.

PTX and AMD assembly prove that the compiler kept them. Every rounding there is followed in its bits, element by
element, and belongs to the rounding of TTIR that the compiler's line table gives the same line and call; where the
table lost it, to one that rounds the same kind of operation. A rounding that TTIR lacks, has of another kind or has
and the machine code has not is a fault; so is an element of an always rounded value that is not, or that arithmetic
reads before, and a fused multiply-add that no division, root or matrix product of TTIR expands to. What machine code
does not show is which value comes out of memory again (shared memory above all), so which of two roundings on one
line comes first is known from TTIR alone. Rounding what is rounded already changes nothing and may be removed; what is
left of it is not looked at.
"""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import triton
from triton.compiler import ASTSource

from harness.aot import (
    MATRIX_INSTRUCTION,
    TARGETS,
    Compiled,
    cases,
    check_compilable,
    compile_head_norm,
    compile_norm_qkv,
    norm_qkv_kernel,
    resources,
)
from harness.audit_text import (
    BF16,
    FLOAT,
    NOWHERE,
    TF32,
    Node,
    Place,
    Rounding,
    amdgcn_graph,
    is_fused,
    machine_roundings,
    origins,
    ptx_graph,
    rounded_bits,
    rounding_operations,
    ttir_graph,
)
from harness.blackbox import load
from kernels.checks import KEEP, RNE
from variants.catalogue import plan_named
from variants.plan import CastPlan

# Bytes of shared memory a block may ask for. CUDA C++ Programming Guide, Technical Specifications per Compute
# Capability; CDNA3 ISA reference guide, local data share.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# Bytes of registers a thread may spill with bf16 operands: eight, not an accumulator.
SPILLS = 32
# The matrix instruction that a target has for those operands; fp32 products are not exact on NVIDIA's.
WARP_BF16, WARP_TF32 = r"mma\.sync\..*\.bf16\.bf16\.f32", r"mma\.sync\..*\.tf32\.tf32\.f32"
WIDE_BF16 = {"sm_80": WARP_BF16, "sm_90": r"wgmma\..*\.bf16\.bf16", "sm_100": r"tcgen05\.mma\..*kind::f16"}
MFMA = {"bf16": r"v_mfma_f32_\w+_bf16", "tf32": r"v_mfma_f32_\w+_xf32", "fp32": r"v_mfma_f32_\d+x\d+x\d+_f32"}


def matrix_instruction(target: str, matmul: str) -> str | None:
    """Pattern of the only matrix instruction allowed there; None: no matrix instruction at all.

    The same for one token as for many: another instruction would sum otherwise, and bits would change with the batch.
    """
    operand = "tf32" if matmul == "tf32x3" else matmul
    if target == "gfx942":
        return MFMA[operand]
    if operand == "bf16":
        return WIDE_BF16[target]
    return WARP_TF32 if operand == "tf32" else None


# ---------------------------------------------------------------- TTIR


@dataclass(frozen=True)
class Edge:
    """A value on its way to an operation that reads it."""

    source: Node
    role: str  # of the source, see Flow
    sink: Node
    sink_role: str  # or the pointer stored to
    operand: int
    roundings: tuple[Rounding, ...]  # in order


PASSED = re.compile(
    r"phi|select|tt\.(splat|expand_dims|broadcast|reshape|trans|cat|join|split)|ttg?\.convert_layout"
    r"|arith\.(extf|negf)|math\.absf"
)
READERS = re.compile(
    r"arith\.(add|sub|mul|div|rem|max\w*|min\w*)f|math\.\w+|tt\.(precise_\w+|dot\w*|reduce|scan|store|atomic_\w+|clampf"
    r"|descriptor_store|extern_elementwise|elementwise_inline_asm|call|reduce\.return)"
)
NOT_FOLLOWED = re.compile(
    r"tt\.(extern_elementwise|elementwise_inline_asm|call|atomic_\w+|scan|dot_scaled|gather)|scf\.while|cf\.\w+"
)
LOADS = ("tt.load", "tt.descriptor_load")
Paths = tuple[tuple[Node, tuple[Rounding, ...]], ...]


class Flow:
    """TTIR of one kernel as named values and the roundings between them.

    Roles are the values of the chain (statistics, variance, rstd, normed, hidden, proj, head_*, out), their steps (sum,
    shifted: variance + eps, root, offset: 1 + w, remainder: what tf32 cut off), `load`, `product` of two loads where
    there is no matmul, `scalar`, and `` for anything else. Statistics of a matrix product, or of a load that `given`
    calls proj, are those of the head.
    """

    def __init__(self, ttir: str, given: dict[str, str] | None = None) -> None:
        self.nodes, self.given = ttir_graph(ttir), given or {}
        self.scaled = "hidden" if any(node.op == "tt.dot" for node in self.nodes) else "product"
        self._roles: dict[Node, str] = {}
        self._paths: dict[Node, Paths] = {}
        self.edges = list(self._edges())

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
        before, after = types_of(node)
        if node.op in ("arith.truncf", "tt.fp_to_fp") and width(after) < width(before):
            mode = "rtz" if "rounding = rtz" in node.text else "rne"
            return node.args, Rounding(f"{after}-{mode}", node.args[0], node, frozenset({node.place}))
        if node.op in ("tt.fp_to_fp", "tt.bitcast", "arith.bitcast"):
            return self._bits(node, before, after)
        if READERS.fullmatch(node.op) and after in ("bf16", "fp16") and node.op != "tt.reduce":
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
        floats = {each.args[0] for each in cone_of_bits(node.args[0])}
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
            return "" if types_of(node)[1] in ("f32", "bf16", "fp16") else "address"
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
            return added(first, second) or added(second, first)
        if node.op == "arith.subf":
            return "remainder" if first == second == {"hidden"} else ""
        if node.op in ("arith.divf", "tt.precise_divf"):
            if "scalar" in second:
                return renamed(first, sum="variance")
            if "scalar" in first:
                return renamed(second, root="rstd")
            return renamed(second, root="normed")
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
                return "out"
            if "scalar" in other and (named := renamed(one, sum="variance")):
                return named
        return self.scaled if first | second <= {"load", "x", "offset"} else ""

    def _pointers(self, node: Node | int) -> set[str]:
        """Names of the pointers from which a value was loaded, however long ago."""
        found, seen, todo = set(), set(), [node]
        while todo:
            each = todo.pop()
            if isinstance(each, Node) and each not in seen:
                seen.add(each)
                if each.op in LOADS:
                    found.add(pointer_name(each))
                else:
                    todo += each.args
        return found


def added(one: frozenset[str], other: frozenset[str]) -> str:
    """Role of a sum, by the roles of its operands; called for both orders."""
    if named := renamed(one, sum="sum") or ("scalar" in other and renamed(one, variance="shifted")):
        return named
    if "proj" in one:
        return "proj"
    if one == {"load"} and other == {"scalar"}:
        return "offset"
    return "x" if one <= {"load", "x"} and other <= {"load", "x"} and one and other else ""


def renamed(roles: frozenset[str], **names: str) -> str:
    """The new name for the one of these roles that is there, for the chain or its head; `` where none is."""
    for old, new in names.items():
        if old in roles:
            return new
        if f"head_{old}" in roles:
            return f"head_{new}"
    return ""


def cone_of_bits(node: Node | int) -> set[Node]:
    """The bit casts of floats from which integers were computed."""
    if not isinstance(node, Node):
        return set()
    if node.op == "tt.bitcast":
        return {node} if types_of(node)[0][0] in "fb" else set()
    if node.op not in ("and", "or", "iadd", "shr", "shl", "select", "arith.trunci", "arith.extui", "arith.xori"):
        return set()
    return set().union(*(cone_of_bits(arg) for arg in node.args))


def is_op(node: Node | int, op: str, constant: int | None = None) -> bool:
    return isinstance(node, Node) and node.op == op and (constant is None or node.args[1] == constant)


def types_of(node: Node) -> tuple[str, str]:
    """Element types of the first operand and of the result, in TTIR's words but for fp16 and fp8."""
    found = re.findall(r"(?:\b|(?<=x))(bf16|f16|f32|f64|f8\w+|i\d+)\b", node.text.rpartition(" : ")[2]) or ["?"]
    first, last = (re.sub(r"^f8\w+", "fp8", re.sub(r"^f16", "fp16", each)) for each in (found[0], found[-1]))
    return first, last


def width(type_: str) -> int:
    return int((re.findall(r"\d+", type_) or ["0"])[0])


def pointer_name(node: Node) -> str:
    """The argument behind a load's or a store's pointer."""
    each = node.args[0]
    while isinstance(each, Node) and each.op != "arg" and each.args:
        each = each.args[0]
    return each.text.split()[0] if isinstance(each, Node) and each.op == "arg" else "?"


# ---------------------------------------------------------------- plan against TTIR

BOUNDARY_OF = {
    **{name: name for name in ("x", "statistics", "variance", "rstd", "normed", "hidden", "head_rstd", "head_normed")},
    **{"out": "out", "head_statistics": "statistics", "head_variance": "variance"},
}
TITLES = {
    "offset": "weight_offset (1 + w)",
    "remainder": "the remainder of tf32",
    "": "a value outside the chain",
    "product": "a product",
}


def declared(plan: CastPlan, head_norm: str, edge: Edge) -> list[tuple[str, str]]:
    """(boundary, kind) of every rounding that the plan puts on that edge, in order."""

    def kept_as(name: str) -> list[tuple[str, str]]:
        return [(name, getattr(plan, name))] if getattr(plan, name) != KEEP else []

    if edge.role == "proj":
        if edge.source.op in LOADS or edge.sink_role == "proj":  # a store of another kernel; sums, rstd and the bias
            return []
        last = edge.sink_role == "v_ptr" or edge.sink.op == "tt.store" and head_norm == "none"
        return kept_as("proj") + (kept_as("out") if last else [])
    if edge.role in ("hidden", "remainder"):
        cut = edge.sink_role == "proj" or edge.sink_role == "remainder" and edge.operand == 1
        tf32 = [(edge.role, "tf32-rtz")] if cut and plan.matmul.startswith("tf32") else []
        return (kept_as("hidden") if edge.role == "hidden" else []) + tf32
    if edge.role == "offset":
        return [("offset", RNE)] if plan.weight_offset == RNE else []
    return kept_as(BOUNDARY_OF[edge.role]) if edge.role in BOUNDARY_OF else []


def expected_roles(plan: CastPlan, kernel: str, head_norm: str) -> set[str]:
    """The values that must be found in TTIR."""
    head = {"head_statistics", "head_sum", "head_variance", "head_rstd", "head_normed", "out"}
    offset = {"offset"} if plan.weight_offset != "none" else set()
    if kernel == "head_norm":
        return head | offset
    found = {"statistics", "sum", "variance", "rstd", "proj"} | (head if head_norm == "fused" else set())
    found |= {"normed"} if plan.scale == "prologue" else set()
    found |= {"hidden"} | offset if plan.scale != "folded" else offset if head_norm == "fused" else set()
    return found | ({"remainder"} if plan.matmul == "tf32x3" else set())


def titled(role: str) -> str:
    return TITLES.get(role, role)


def compare_ttir(flow: Flow, plan: CastPlan, kernel: str, head_norm: str) -> list[str]:
    """What TTIR does otherwise than the plan, one sentence each."""
    faults = []
    for role in sorted(expected_roles(plan, kernel, head_norm) - {edge.role for edge in flow.edges}):
        faults.append(f"TTIR: {titled(role)} was not found")
    for edge in flow.edges:
        wanted, found = [kind for _, kind in declared(plan, head_norm, edge)], [r.kind for r in edge.roundings]
        if wanted == found:
            continue
        way = f"on its way to {edge.sink_role or edge.sink.op}"
        if not found:
            what = f"is not rounded {way}, the plan says {', '.join(wanted)}"
        elif not wanted:
            what = f"is rounded ({', '.join(found)}) {way}, the plan keeps it"
        else:
            times = ({1: "once ", 2: "twice "} | {len(wanted): ""}).get(len(found), f"{len(found)} times ")
            what = f"is rounded {times}({', '.join(found)}) {way}, the plan says {', '.join(wanted)}"
        faults.append(f"TTIR: {titled(edge.role)} {what}")
    if kernel == "norm_qkv":
        operands = {"bf16": "bf16", "fp32": "ieee", "tf32": "tf32", "tf32x3": "tf32"}[plan.matmul]
        faults += [f"TTIR: the matmul is {p}, the plan says {operands}" for p in dot_precisions(flow) if p != operands]
    return list(dict.fromkeys(faults))


def dot_precisions(flow: Flow) -> list[str]:
    """Operand precision of every matrix product: bf16, fp16, or for fp32 operands ieee, tf32 and so on."""
    found = []
    for node in flow.nodes:
        if node.op.startswith("tt.dot"):
            operand, precision = types_of(node)[0], re.search(r"inputPrecision = (\w+)", node.text)
            found.append((precision[1] if precision else "ieee") if operand == "f32" else operand)
    return found


# ---------------------------------------------------------------- TTIR against machine code


@dataclass(frozen=True)
class Site:
    """One rounding of TTIR, to be found again."""

    boundary: str
    kind: str
    places: frozenset[Place]
    source: Node
    role: str
    always: bool  # nothing reads the source unrounded
    redundant: bool  # what comes in is rounded already
    spared: str  # what a conversion of Triton's own may leave out


WORDS = {"arith.mulf": {"fmul"}, "arith.addf": {"fadd"}, "arith.subf": {"fsub", "fadd"}}
WORDS |= {"arith.divf": {"fdiv", "fmul"}, "tt.precise_divf": {"fdiv"}}  # the former by the reciprocal of a constant
MATRIX_RESULT = re.compile(rf"{MATRIX_INSTRUCTION.pattern}|tcgen05\.ld")
READ = re.compile(rf"({'|'.join(FLOAT)}|bfe|iadd|and|or|shr|select|bytes|cmp|bfi)$")  # as a number or its bits
ROOTED = ("arith.divf", "tt.precise_divf")
EXPANDED = re.compile(r"tt\.(dot|precise_\w+|extern_elementwise)|arith\.(divf|remf)|math\.\w+")


def sites_of(flow: Flow, names: dict[Rounding, str]) -> list[Site]:
    """Every rounding of TTIR, with its boundary by names (else the role of what is rounded)."""
    edges_of: dict[Node, list[Edge]] = defaultdict(list)
    uses: dict[Rounding, list[tuple[Edge, int]]] = defaultdict(list)
    for edge in flow.edges:
        if not (edge.sink.op == "tt.dot" and edge.operand == 2):  # a sum that goes on is no reader of it
            edges_of[edge.source].append(edge)
        for index, rounding in enumerate(edge.roundings):
            uses[rounding].append((edge, index))
    sites = []
    for rounding, used in uses.items():
        edge = used[0][0]
        always = all(each.roundings for each in edges_of[edge.source]) and all(index == 0 for _, index in used)
        redundant = all(index and each.roundings[index - 1].kind.startswith("bf16") for each, index in used)
        boundary = names.get(rounding, edge.role)
        spared = "without NaN" if rounding.node.op == "tt.fp_to_fp" else ""
        sites.append(Site(boundary, rounding.kind, rounding.places, edge.source, edge.role, always, redundant, spared))
    return sites


def compare_machine(sites: list[Site], nodes: list[Node], found: list[Rounding]) -> tuple[Counter, list[str]]:
    """(elements rounded at each boundary in machine code, what it does otherwise than TTIR, one sentence each)."""
    counts, faults, matched = Counter(), [], defaultdict(list)
    for rounding in sorted(found, key=lambda each: not each.places):  # those that lost their place in a move come last
        if rounding.places:
            here = [site for site in sites if site.places & rounding.places]
        else:
            alike = [site for site in sites if shape(site.source) & shape(rounding.value)]
            here = [site for site in alike if not matched[site]] or alike
        same = [site for site in here if rounding.kind == site.kind or rounding.kind == f"{site.kind} {site.spared}"]
        for site in same:  # the line table does not tell two calls from one another that one helper makes
            matched[site].append(rounding)
        if same:
            counts[same[0].boundary] += 1
        elif here:
            faults.append(
                f"machine code: {titled(here[0].boundary)} is rounded {rounding.kind}, TTIR says {here[0].kind}"
            )
        else:
            where = spot(max(rounding.places, default=NOWHERE))
            faults.append(f"machine code: a value is rounded {rounding.kind} where TTIR does not, {where}")
    for site in sites:
        elusive = "unknown" in site.kind or site.kind.endswith(
            "rtz without NaN"
        )  # a shift, after memory none of a float
        if not matched[site] and not site.redundant and not elusive:
            faults.append(f"machine code: {titled(site.boundary)} is not rounded, TTIR says {site.kind}")
        elif site.always:
            rounded = [each for other in sites if other.source is site.source for each in matched[other]]
            faults += unrounded(site, nodes, rounded)
    return counts, [f"{fault} ({n} times)" if n > 1 else fault for fault, n in Counter(faults).items()]


def spot(place: Place) -> str:
    """File and line of a place."""
    return f"at {place[0].rpartition(':')[0]}" if place[0] else "its place lost"


def shape(node: Node) -> set[tuple[str, bool, bool]]:
    """Operations that compute a value, in words of machine code: each with whether it squares and divides by a root."""
    found = set()
    for each in origins(node):
        squares = len(each.args) > 1 and each.args[0] is each.args[1]
        found |= {(word, squares, divides_by_root(each)) for word in WORDS.get(each.op, {each.op})}
    return found


def divides_by_root(node: Node) -> bool:
    """Whether a quotient comes from a root, with nothing between but what AMD expands the two into."""
    seen, todo = set(), [node] if node.op in ("fdiv", *ROOTED) else []
    while todo:
        for arg in todo.pop().args:
            if isinstance(arg, Node) and arg not in seen:
                if "sqrt" in arg.op:
                    return True
                seen.add(arg)
                todo += [arg] if arg.op not in ("fadd", "phi", "arith.addf") and len(seen) < 100 else []
    return False


def unrounded(site: Site, nodes: list[Node], rounded: list[Rounding]) -> list[str]:
    """Elements of a value, which TTIR always rounds, that machine code computes and does not round, or reads before."""
    inputs = {origin for rounding in rounded for origin in origins(rounding.value)}
    if site.source.op == "tt.dot":  # and there is one in a kernel, or its results are added up
        values = {rounding.value for rounding in rounded}
        lost = [n for n in nodes if is_product(n) and n not in values and any(READ.match(u.op) for u in n.users)]
        inputs |= {node for node in nodes if MATRIX_RESULT.match(node.op)}
    else:
        words = WORDS.get(site.source.op, ())
        computed = {node for node in nodes if node.op in words and node.place == site.source.place != NOWHERE}
        lost = [
            n for n in computed - inputs if any(user.place != n.place for user in readers(n))
        ]  # no step of a quotient
    faults = [f"machine code: elements of {titled(site.role)} left unrounded: {len(lost)}"] if lost else []
    inputs -= {rounding.node for rounding in rounded}  # arithmetic in a narrow type
    early = [n for n in inputs if any(user.op in FLOAT and user.place != n.place for user in readers(n))]
    if early:
        faults.append(f"machine code: elements of {titled(site.role)} read before they are rounded: {len(early)}")
    return faults


def is_product(node: Node) -> bool:
    """Whether this is one element of what matrix instructions return."""
    found = origins(node) if node.op in ("phi", "part") else ()
    return bool(found) and all(MATRIX_RESULT.match(each.op) for each in found)


def readers(node: Node) -> set[Node]:
    """What reads a value, through merges and packing."""
    found, seen, todo = set(), {node}, [node]
    while todo:
        for user in todo.pop().users:
            if user.op not in ("phi", "pack", "part"):
                found.add(user)
            elif user not in seen:
                seen.add(user)
                todo.append(user)
    return found


def fused(flow: Flow, nodes: list[Node]) -> tuple[list[Node], int]:
    """(fused multiply-adds that TTIR does not ask for, the number of those it does: products, quotients, roots)."""
    asked = {node.place for node in flow.nodes if EXPANDED.fullmatch(node.op)} - {NOWHERE}
    all_ = [node for node in nodes if is_fused(node)]
    extra = [node for node in all_ if node.place not in asked]
    return extra, len(all_) - len(extra)


# ---------------------------------------------------------------- rows

Row = dict[str, str | int | None]
COLUMNS = (
    *("target", "kernel", "plan", "keywords", "status", "reason", "declared", "ttir", "machine", "roundings", "matmul"),
    *("not_followed", "fused", "expanded", "matrix", "registers", "spills", "shared"),
)


def examine(
    compiled: Compiled, flow: Flow, names: dict[Rounding, str], fp_fusion: bool = False
) -> tuple[Row, list[str]]:
    """(columns that need no plan, faults of the machine code against TTIR, one sentence each).

    names: boundaries of roundings, where a plan gives them. fp_fusion: multiply-adds may be fused.
    Raises ValueError where the kernel was compiled without a line table.
    """
    if all(node.place == NOWHERE for node in flow.nodes):
        raise ValueError("the kernel was compiled without line numbers: unset TRITON_DISABLE_LINE_INFO")
    nodes = ptx_graph(compiled.asm["ptx"]) if "ptx" in compiled.asm else amdgcn_graph(compiled.asm["amdgcn"])
    sites = sites_of(flow, names)
    counts, faults = compare_machine(sites, nodes, machine_roundings(nodes))
    extra, asked = fused(flow, nodes)
    if extra and not fp_fusion:
        where = spot(max(node.place for node in extra))
        faults.append(f"machine code: multiply-adds fused that TTIR has apart: {len(extra)}, {where}")
    row = {
        "ttir": listed(f"{site.boundary or 'unclassified'} {site.kind}" for site in sites),
        "machine": listed(f"{name or 'unclassified'} {count}" for name, count in counts.items()),
        "roundings": "; ".join(described(flow)),
        "matmul": listed(dot_precisions(flow)),
        "not_followed": ", ".join(not_followed(flow)),
        "fused": len(extra),
        "expanded": asked,
        "matrix": listed(compiled.matrix_instructions()),
        "registers": compiled.registers,
        "spills": compiled.spills,
        "shared": compiled.shared,
    }
    return row, faults


def audit_compiled(compiled: Compiled, plan: CastPlan, keywords: dict[str, Any]) -> Row:
    """The findings about one compiled kernel of this repository: the columns of audit_case from status on."""
    kernel = compiled.kernel.removesuffix("_kernel")
    head_norm = keywords.get("head_norm", "fused")
    flow = Flow(compiled.asm["ttir"], {"proj_ptr": "proj"} if kernel == "head_norm" else {})
    wanted = {edge: declared(plan, head_norm, edge) for edge in flow.edges}
    names = {
        rounding: name
        for edge, pairs in wanted.items()
        for rounding, (name, _) in zip(edge.roundings, pairs, strict=False)
    }
    row, faults = examine(compiled, flow, names)
    faults = compare_ttir(flow, plan, kernel, head_norm) + faults + resource_faults(compiled, plan, kernel)
    if row["not_followed"]:
        faults.append(f"TTIR: the audit does not see through {row['not_followed']}")
    words = listed(dict.fromkeys(f"{name} {kind}" for pairs in wanted.values() for name, kind in pairs).keys())
    return {"status": "red" if faults else "ok", "reason": "; ".join(faults), "declared": words, **row}


def listed(words: Iterable[str]) -> str:
    """The words once each, with how often where it is more, in the order in which they come."""
    return ", ".join(word if count == 1 else f"{count} x {word}" for word, count in Counter(words).items())


def resource_faults(compiled: Compiled, plan: CastPlan, kernel: str) -> list[str]:
    """Too much shared memory or spilling, or another matrix instruction than the plan's matmul has there."""
    faults, found = [], compiled.matrix_instructions()
    if compiled.shared > SHARED[compiled.target]:
        faults.append(f"{compiled.shared} bytes of shared memory, {compiled.target} has {SHARED[compiled.target]}")
    if (compiled.spills or 0) > SPILLS and (plan.matmul == "bf16" or kernel == "head_norm"):
        faults.append(f"{compiled.spills} bytes of registers spilled, at most {SPILLS} are allowed")
    pattern = matrix_instruction(compiled.target, plan.matmul) if kernel == "norm_qkv" else None
    if pattern is None and found or pattern and not (found and all(re.fullmatch(f"{pattern}.*", i) for i in found)):
        faults.append(f"matrix instructions {listed(found) or 'none'} where {pattern or 'none'} is due")
    return faults


def audit_case(target: str, kernel: str, plan_name: str, keywords: dict[str, Any]) -> Row:
    """A case of harness.aot.cases() compiled for one target and audited: COLUMNS, text or numbers.

    target, kernel, plan   as given; keywords as text
    status        `ok`, `red` (reason says what is wrong), or `failed` (it does not compile; what follows is None)
    declared      roundings of the plan that the kernel has to make, `boundary kind`
    ttir          roundings found in TTIR, the same words; a boundary comes twice where branches have one each
    machine       elements a thread rounds at each boundary in PTX or AMD assembly, all copies of loops included
    roundings     of each rounding in TTIR what is rounded and what reads it; matmul: operand types of its products
    not_followed  operations of TTIR that the audit cannot see through
    fused         multiply-adds that TTIR has apart; expanded: those that are its products, quotients and roots
    matrix        matrix instructions
    registers     a thread; spills: bytes a thread (both None without disassembler); shared: bytes a block

    Raises KeyError for an unknown plan, ValueError for another unknown name, RuntimeError where the kernels were
    imported interpreted.
    """
    check_target(target)
    compilers = {"norm_qkv": compile_norm_qkv, "head_norm": compile_head_norm}
    if kernel not in compilers:
        raise ValueError(f"unknown kernel {kernel!r}: kernels are {', '.join(compilers)}")
    plan = plan_named(plan_name)
    check_compilable(norm_qkv_kernel)
    words = " ".join(f"{name}={value}" for name, value in keywords.items())
    row = {**dict.fromkeys(COLUMNS), "target": target, "kernel": kernel, "plan": plan_name, "keywords": words}
    try:
        compiled = compilers[kernel](plan, target, **keywords)
    except Exception as error:  # a compiler fails in its own ways, and the other cases go on
        return row | {"status": "failed", "reason": reason(error)}
    return row | audit_compiled(compiled, plan, keywords)


def check_target(target: str) -> None:
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}: targets are {', '.join(TARGETS)}")


def audit_all(targets: Iterable[str] = tuple(TARGETS)) -> Iterator[Row]:
    """Every case of harness.aot.cases() for each of these targets, as rows; raises as audit_case does."""
    for target in targets:
        for kernel, name, keywords in cases():
            yield audit_case(target, kernel, name, keywords)


# ---------------------------------------------------------------- other people's kernels

TYPE = re.compile(r"\*?(i1|[iu](8|16|32|64)|fp(16|32|64)|bf16|fp8(e5|e4nv|e4b15|e4b8|e5b16))(:16)?")
OPTIONS = ("num_warps", "num_stages")


def audit_foreign(
    module_function: str, target: str, signature: str, constants: Iterable[str] = (), *, fp_fusion: bool = True
) -> Row:
    """What a kernel without a plan rounds, and what its compiler made of it: the columns of audit_case.

    module_function   `MODULE:FUNCTION`, a @triton.jit kernel; importing the module runs it
    signature         types of the arguments that are no constants, in order: `*bf16,*bf16,i32,fp32`; `:16` behind one
                      says that it is divisible by 16
    constants         `NAME=VALUE` for tl.constexpr arguments without default, for other arguments that are always the
                      same (`bias_ptr=None`), and for num_warps and num_stages
    fp_fusion         as the kernel is launched; True is Triton's default up to 3.9

    Here a rounding is named by what is rounded, and that by what it was computed from (see Flow): `unclassified` where
    it is nothing of the chain. status is `reported`, or `red` where the machine code lacks a rounding of TTIR, or has
    another; fused multiply-adds alone make no row red, where fp_fusion asks for them.

    Raises ValueError with one sentence for what does not fit, RuntimeError for an interpreted kernel.
    """
    check_target(target)
    constants = list(constants)
    source, options = foreign_source(imported(module_function), signature, constants)
    names = {"target": target, "kernel": module_function, "plan": "", "keywords": " ".join([signature, *constants])}
    row = dict.fromkeys(COLUMNS) | names
    try:
        built = triton.compile(source, target=TARGETS[target], options={**options, "enable_fp_fusion": fp_fusion})
    except Exception as error:  # a compiler fails in its own ways
        return row | {"status": "failed", "reason": reason(error)}
    asm = {stage: text for stage, text in built.asm.items() if isinstance(text, str)}
    binary = next(built.asm[stage] for stage in ("cubin", "hsaco") if stage in built.asm)
    compiled = Compiled(module_function, target, asm, binary, built.metadata.shared, *resources(asm, binary))
    found, faults = examine(compiled, Flow(asm["ttir"]), {}, fp_fusion)
    return row | found | {"status": "red" if faults else "reported", "reason": "; ".join(faults), "declared": ""}


def imported(module_function: str) -> triton.JITFunction:
    """The kernel of that name. Raises ValueError where there is none, RuntimeError where it is interpreted."""
    found = load(module_function)
    while not isinstance(found, triton.JITFunction) and type(found).__module__.startswith("triton.runtime.auto"):
        found = found.fn  # under triton.autotune and triton.heuristics
    if type(found).__module__.startswith("triton.runtime.interpreter"):
        check_compilable(found)
    if not isinstance(found, triton.JITFunction):
        raise ValueError(f"{module_function} is a {type(found).__name__}, not a function under @triton.jit")
    return found


def foreign_source(
    fn: triton.JITFunction, signature: str, constants: Iterable[str]
) -> tuple[ASTSource, dict[str, int]]:
    """The kernel with its types and constants, and the options among these. Raises ValueError as audit_foreign does."""
    values = dict(parsed_constant(each) for each in constants)
    options = {name: values.pop(name) for name in OPTIONS if name in values}
    if unknown := sorted(values.keys() - set(fn.arg_names)):
        raise ValueError(f"{fn.__name__} has no argument {', '.join(unknown)}: it has {', '.join(fn.arg_names)}")
    values = {p.name: p.default for p in fn.params if p.is_constexpr and p.has_default} | values
    if missing := [p.name for p in fn.params if p.is_constexpr and p.name not in values]:
        raise ValueError(f"{fn.__name__} needs a value for {', '.join(missing)}: give {missing[0]}=VALUE")
    names = [name for name in fn.arg_names if name not in values]
    types = [each.strip() for each in signature.split(",")] if signature.strip() else []
    if len(types) != len(names):
        raise ValueError(f"{fn.__name__} needs {len(names)} types, for {', '.join(names)}; {len(types)} are given")
    if wrong := [each for each in types if not TYPE.fullmatch(each)]:
        raise ValueError(
            f"unknown type {wrong[0]!r}: types are written like *bf16, *fp32, i32, fp32, with :16 for divisible"
        )
    kinds = dict(zip(names, (each.removesuffix(":16") for each in types), strict=True))
    divisible = {name for name, each in zip(names, types, strict=True) if each.endswith(":16")}
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(fn.arg_names) if name in divisible}
    source = ASTSource(fn, {name: kinds.get(name, "constexpr") for name in fn.arg_names}, values, attrs)
    return source, options


def parsed_constant(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign or not name.strip():
        raise ValueError(f"a constant is written NAME=VALUE, not {text!r}")
    try:
        return name.strip(), ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name.strip(), value  # a word


def described(flow: Flow) -> list[str]:
    """What is rounded, how, and what reads it then; one phrase for each rounding of TTIR."""
    readers_of: dict[Rounding, list[Edge]] = defaultdict(list)
    for edge in flow.edges:
        for rounding in edge.roundings:
            readers_of[rounding].append(edge)
    phrases = []
    for rounding, edges in readers_of.items():
        source = edges[0].source
        what = titled(edges[0].role) if edges[0].role else f"unclassified {source.op}"
        what += f" {pointer_name(source)}" if source.op in LOADS else ""
        to = listed(list(dict.fromkeys(titled(e.sink_role) if e.sink_role else e.sink.op for e in edges)))
        phrases.append(f"{rounding.kind} of {what} for {to}, {spot(max(rounding.places))}")
    return phrases


def not_followed(flow: Flow) -> list[str]:
    """Operations of TTIR that this audit cannot see through, and roundings that a loop carries around."""
    operations = {id(node.args): node.op for node in flow.nodes}  # one for each, however many results it has
    found = Counter(op for op in operations.values() if NOT_FOLLOWED.fullmatch(op))
    words = [op if count == 1 else f"{count} x {op}" for op, count in found.items()]
    carried = [
        e
        for e in flow.edges
        if e.roundings and e.source in (s for s, _ in flow.paths(e.roundings[-1].node)) and e.sink is e.source
    ]
    return words + [f"a rounding that a loop carries around, of {e.role or e.source.op}" for e in carried]


def reason(error: BaseException) -> str:
    """The last line of what went wrong at the bottom: Triton puts the reason below the place."""
    while error.__cause__:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".strip().splitlines()[-1][-500:]
