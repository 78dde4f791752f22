"""The roundings of TTIR as sites at which those of machine code are looked for.

One belongs to the site whose place the line table gives it. LLVM gives a place up, for that of an operand or of the
store, where it makes one instruction of two elements or moves one: then what is rounded, and was computed where the
site's values are, tells. Where TTIR converts a type that goes into the new one, code may convert as it likes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

from castpoint.harness.audit.flow import EXACT, READERS, Edge, Flow, rounds
from castpoint.harness.audit.graph import MERGES, NOWHERE, Node, Place, origins
from castpoint.harness.audit.instructions import FORMATS, holds, opcode
from castpoint.harness.audit.roundings import MATRIX_RESULT, MINUS_ZEROS, ONES, Rounding, is_fused
from castpoint.harness.audit.ttir import converted, types_of

LACKING = {  # targets without an instruction: PTX ISA, cvt; CDNA3 ISA, vector ALU
    "e4m3": ("sm_80", "gfx942"),
    "e5m2": ("sm_80", "gfx942"),
    "e4m3b11fnuz": ("sm_80", "sm_90", "sm_100", "gfx942"),
    "bf16 of fp64": ("sm_80", "gfx942"),
    "fp16 of fp64": ("gfx942",),
}
NO_RESULT = re.compile(r"store$|return$")
INTEGER = ("and", "or", "iadd", "shr", "shl", "select", "bytes")
SUMS = {"arith.mulf": {"fmul"}, "arith.addf": {"fadd", "fsub"}, "arith.subf": {"fsub", "fadd"}}
UNPACKS = (*MERGES, "and", "shr", "shl", "bytes", "widened")  # what takes narrow elements out of a word


@dataclass(frozen=True)
class Site:
    """One rounding of TTIR, to be found again."""

    boundary: str
    kind: str
    places: frozenset[Place]
    sources: tuple[Node, ...]
    sinks: tuple[Node, ...]
    role: str
    always: bool  # nothing reads the source unrounded
    redundant: bool  # what comes in is rounded already
    spared: str  # what a conversion of Triton's own, or of fp64, may leave out
    of: str  # the format that is converted, of FORMATS; `` where arithmetic in a narrow type rounds
    operands: frozenset[Place]  # of what computes the sources
    by_integers: bool  # the target has no such conversion: one of integers is not followed


def sites_of(flow: Flow, names: dict[Rounding, str], target: str) -> list[Site]:
    """Every rounding of TTIR, with its boundary by names (else the role of what is rounded), for that target."""
    edges_of: dict[Node, list[Edge]] = defaultdict(list)
    for edge in flow.edges:
        if not (edge.sink.op == "tt.dot" and edge.operand == 2):  # a sum that goes on is no reader of it
            edges_of[edge.source].append(edge)
    sites = []
    for rounding, edges in flow.rounded.items():
        sources, sinks = (tuple(dict.fromkeys(getattr(e, end) for e in edges)) for end in ("source", "sink"))
        before = [edge.roundings[: edge.roundings.index(rounding)] for edge in edges]
        always = all(each.roundings for source in sources for each in edges_of[source]) and not any(before)
        redundant = all(those and loses_nothing(rounding, those[-1]) for those in before)
        role = edges[0].role
        boundary = names.get(rounding, f"stored {role}" if role and for_store_alone(edges, edges_of) else role)
        of = (converted(rounding.node) or ("", ""))[0]
        spared = "without NaN" if rounding.node.op == "tt.fp_to_fp" or of == "fp64" else ""
        about = (boundary, rounding.kind, rounding.places, sources, sinks, role)
        read = (each for source in sources for arg in source.args if isinstance(arg, Node) for each in flow.paths(arg))
        operands = frozenset(source.place for source, _ in read)
        type_ = rounding.kind.partition("-")[0]
        by_integers = target in LACKING.get(type_, ()) or target in LACKING.get(f"{type_} of {of}", ())
        sites.append(Site(*about, always, redundant, spared, of, operands, by_integers))
    return sites


def loses_nothing(rounding: Rounding, before: Rounding) -> bool:
    """Whether the type that this rounds to holds all of that to which its values were rounded before."""
    new, old = (each.kind.partition("-")[0] for each in (rounding, before))
    return new in FORMATS and old in FORMATS and holds(new, old)


def for_store_alone(edges: list[Edge], edges_of: dict[Node, list[Edge]]) -> bool:
    """Whether only stores read what was rounded, and arithmetic the same values as they were before: the rounding of a
    residual that goes on in fp32 is none of the chain's."""
    others = [each for source in {edge.source for edge in edges} for each in edges_of[source] if not each.roundings]
    return all(edge.sink.op.endswith("store") for edge in edges) and any(
        not each.sink.op.endswith("store") for each in others
    )


def without_exact(flow: Flow, sites: list[Site], found: list[Rounding]) -> list[Rounding]:
    """The roundings but for those where TTIR converts a type that goes into theirs, of which no bit is lost, and those
    of constants, arguments and integers that TTIR has too, of which no value of the chain is made."""
    exact: dict[Place, list[str]] = defaultdict(list)
    asked = set()
    for node in flow.nodes:
        types, after = converted(node), types_of(node)[1]
        if types or EXACT.fullmatch(node.op) and after in FORMATS:
            exact[node.place].append(types[0] if types else after)
        kind = rounds(node) if types else f"{after}-rne"
        if types or READERS.fullmatch(node.op) and after in ("bf16", "fp16") and not NO_RESULT.search(node.op):
            asked |= {(node.place, kind), (node.place, f"{kind} without NaN")}
    of_chain = {place for site in sites for place in site.places}

    halves = any(node.op == "tt.dot" and types_of(node)[1] == "fp16" for node in flow.nodes)

    def counts(rounding: Rounding) -> bool:
        if halves and all(MATRIX_RESULT.match(each.op) for each in origins(rounding.value)) and "rtz" in rounding.kind:
            return False  # the upper one of two fp16
        type_ = rounding.kind.partition("-")[0]
        places = rounding.places - {NOWHERE}
        if any(site.kind.startswith(f"{type_}-") and site.places & places for site in sites):  # `.to(bf16).to(fp32)`
            return True
        if any(is_moved(rounding, site, []) for site in sites):
            return True
        if any(holds(type_, each) for place in places for each in exact[place] if type_ in FORMATS):
            return False
        made = {each.place for each in origins(rounding.value)}
        return not any((place, rounding.kind) in asked for place in (places | made) - of_chain)

    return [rounding for rounding in found if counts(rounding)]


def is_step(rounding: Rounding, site: Site) -> bool:
    """Whether a rounding is a step of a conversion by integers that loses nothing: of bf16 to fp16 on the way to eight
    bits (what fp16 cannot hold is 0 or beyond them), or of fp64 to fp32, whose last bit is made odd then, or of fp32
    with a bit that stands for all that are cut off."""
    if not rounding.places & site.places:
        return False
    if rounding.kind == "fp32-rne":
        return site.of == "fp64"
    if rounding.kind == "fp16-rtz":
        return rounding.value.place in site.places
    return rounding.kind == "fp16-rne" and site.of in ("bf16", "fp16") and site.kind.startswith("e5m2-")


def is_kind(rounding: Rounding, site: Site) -> bool:
    """Whether it is that site's kind; without NaN also where Triton or LLVM may leave that out."""
    if rounding.kind == site.kind or site.spared and rounding.kind == f"{site.kind} {site.spared}":
        return True
    number = re.match(r"v_(pk_)?(max|min|med3)_", rounding.value.op)  # the other one of a NaN and a number
    return bool(number) and rounding.kind == f"{site.kind} without NaN"


def is_moved(rounding: Rounding, site: Site, matched: list[Rounding]) -> bool:
    """Whether a rounding is that site's, whose place LLVM gave up for that of its operand or its store: what it rounds
    was made where the site's values are, or, of a remainder, where it is stored: all its steps go there. Where values
    are read unrounded too, only if no rounding kept its place."""
    if not is_kind(rounding, site):
        return False
    if not site.always and any(each.places & site.places for each in matched):
        return False
    if rounding.node is rounding.value:  # arithmetic, of two elements at once
        made = {each.place for arg in rounding.node.args for each in origins(arg, UNPACKS)} - {NOWHERE}
        made -= {rounding.node.place}  # what is moved with it
        return bool(made) and made <= site.operands and computes(rounding, site)
    made = {each.place for each in origins(rounding.value, (*MERGES, "widened"))} - {NOWHERE}
    moved = [sink.place for sink in site.sinks if any(source.op == "arith.remf" for source in site.sources)]
    return bool(made) and made <= {source.place for source in site.sources} | site.places | {*moved}


def computes(rounding: Rounding, site: Site) -> bool:
    """Whether what is rounded is computed as the site's sources are; what is neither product nor sum may be."""
    if any(source.op not in SUMS for source in site.sources):
        return not is_fused(rounding.node) or any(source.op == "math.fma" for source in site.sources)
    due = set().union(*(SUMS[source.op] for source in site.sources))
    found = [words_of(each) for each in origins(rounding.value)]
    return any(not words or words & due for words in found)


def words_of(node: Node) -> set[str]:
    """Whether a value is a product or a sum, narrow ones too: sm_80 has multiply-adds for all of these."""
    if node.op == "fma":
        product = node.args[2] in MINUS_ZEROS and not any(arg in ONES for arg in node.args[:2])
        return {"fmul"} if product else {"fadd", "fsub"}
    found = re.match(r"(?:f|v_(?:pk_)?)?(add|sub|mul)\b", node.op if node.op[0] == "f" else opcode(node.text))
    return {f"f{found[1]}"} if found else set()
