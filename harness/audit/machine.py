"""Machine code against TTIR: each rounding is found again, none is added, none comes too late, and nothing is fused.

sites says which of TTIR's roundings one of machine code is; where the place is lost, the kind of operation that is
rounded does.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict

from castpoint.harness.audit.flow import LOADS, Flow
from castpoint.harness.audit.graph import MERGES, NOWHERE, Node, Place, origins, reached, spot
from castpoint.harness.audit.roundings import FLOAT, MATRIX_RESULT, Rounding, is_fused
from castpoint.harness.audit.sites import INTEGER, UNPACKS, Site, computes, is_kind, is_moved, is_step
from castpoint.harness.audit.ttir import types_of
from castpoint.harness.audit.words import titled

WORDS = {"arith.mulf": {"fmul"}, "arith.addf": {"fadd"}, "arith.subf": {"fsub", "fadd"}}
WORDS |= {"arith.divf": {"fdiv", "fmul"}, "tt.precise_divf": {"fdiv"}}  # the former by the reciprocal of a constant
READ = re.compile(rf"({'|'.join(FLOAT)}|bfe|iadd|and|or|shr|select|bytes|cmp|bfi)$")  # as a number or its bits
CUTS = (*MERGES, "and", "shl", "shr", "bytes")  # what makes a value of others' upper halves
LOAD = re.compile(r"ld\.global|(buffer|global|flat)_load")
ROOTED = ("arith.divf", "tt.precise_divf")
EXPANDED = re.compile(r"tt\.(dot|precise_\w+|extern_elementwise)|arith\.(divf|remf)|math\.\w+")
MOVES = ("arith.divf", "arith.remf")
ASSEMBLY = "tt.elementwise_inline_asm"


def compare_machine(sites: list[Site], nodes: list[Node], found: list[Rounding]) -> tuple[Counter, list[str]]:
    """(elements rounded at each boundary in machine code, what it does otherwise than TTIR, one sentence each)."""
    counts, faults, matched = Counter(), [], defaultdict(list)
    unfollowed = made_of_integers(sites, nodes)
    found = [rounding for rounding in found if not any(is_step(rounding, site) for site in unfollowed)]

    def at_place(rounding: Rounding) -> list[Site]:  # `a * b + c` is two operations at one place
        here = [site for site in sites if site.places & rounding.places]
        computed = [site for site in here if computes(rounding, site)]
        return computed if computed or is_fused(rounding.node) else here

    for rounding in sorted(found, key=lambda each: (not each.places, not at_place(each))):  # moved ones come last
        if rounding.places:
            here = at_place(rounding) or [site for site in sites if is_moved(rounding, site, matched[site])]
        else:
            alike = [site for site in sites if any(shape(each) & shape(rounding.value) for each in site.sources)]
            here = [site for site in alike if not matched[site]] or alike
        same = [site for site in here if is_kind(rounding, site)]
        for site in same:  # the line table does not tell two calls from one another that one helper makes
            matched[site].append(rounding)
        if same:
            counts[same[0].boundary] += 1
        elif here:
            what = titled(here[0].boundary)
            faults.append(f"machine code: {what} is rounded {rounding.kind}, TTIR says {here[0].kind}")
        else:
            where = spot(max(rounding.places, default=NOWHERE))
            faults.append(f"machine code: a value is rounded {rounding.kind} where TTIR does not, {where}")
    for site in sites:
        # a shift, after memory none of a float
        elusive = "unknown" in site.kind or site.kind.endswith("rtz without NaN") or site in unfollowed
        if not matched[site] and not site.redundant and not elusive:
            alike = [each for each in sites if (each.boundary, each.kind) == (site.boundary, site.kind)]
            if not moved(alike, nodes, [rounding for each in alike for rounding in matched[each]]):
                faults.append(f"machine code: {titled(site.boundary)} is not rounded, TTIR says {site.kind}")
        elif site.always and site not in unfollowed:
            related = [other for other in sites if set(other.sources) & set(site.sources)]
            faults += unrounded(site, nodes, [rounding for other in related for rounding in matched[other]])
    return counts, [f"{fault} ({n} times)" if n > 1 else fault for fault, n in Counter(faults).items()]


def made_of_integers(sites: list[Site], nodes: list[Node]) -> list[Site]:
    """Those whose target has no such conversion, and makes it of integers: it is not followed."""
    return [s for s in sites if s.by_integers and any(n.op in INTEGER and n.place in s.places for n in nodes)]


def moved(alike: list[Site], nodes: list[Node], rounded: list[Rounding]) -> bool:
    """Whether the roundings of some of these sites stand at places of the others, where LLVM moves two alike that it
    makes one vector operation: then whatever reads any site's result reads these roundings alone, and all of them."""
    places = {sink.place for site in alike for sink in site.sinks}
    words = set().union(*(WORDS.get(sink.op, ()) for site in alike for sink in site.sinks))
    results, read = {rounding.node for rounding in rounded}, set()
    for node in nodes:
        if node.op in words and node.place in places:
            found = [origins(arg, CUTS) for arg in node.args]
            if not all(each and each <= results for each in found):
                return False
            read |= set().union(*found)
    return bool(read) and read == results


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
    ops, places = ({getattr(each, name) for each in site.sources} for name in ("op", "place"))
    words = set().union(*(WORDS.get(op, ()) for op in ops))
    computed = {node for node in nodes if node.op in words and node.place in places - {NOWHERE}}
    lost = [n for n in computed - inputs if any(user.place != n.place for user in readers(n))]  # no step of a quotient
    made = set()  # what has several elements
    if (
        "tt.dot" in ops and types_of(site.sources[0])[1] != "fp16"
    ):  # and there is one in a kernel, or its results are added up
        made = {node for node in nodes if MATRIX_RESULT.match(node.op)}
        inputs |= made
    elif ops & set(LOADS) and types_of(site.sources[0])[1] not in ("f32", "f64"):
        lost += unpacked(site, nodes, places)
    elif ops & set(LOADS):
        made = {node for node in nodes if LOAD.match(node.op) and node.place in places - {NOWHERE}}
    values = {rounding.value for rounding in rounded}
    of_these = [node for node in nodes if made and node not in values and is_element(node, made)]
    lost += [node for node in of_these if any(READ.match(user.op) for user in node.users)]
    faults = [f"machine code: elements of {titled(site.role)} left unrounded: {len(lost)}"] if lost else []
    inputs -= {rounding.node for rounding in rounded}  # arithmetic in a narrow type
    early = [n for n in inputs if any(user.op in FLOAT and user.place != n.place for user in readers(n))]
    if early:
        faults.append(f"machine code: elements of {titled(site.role)} read before they are rounded: {len(early)}")
    return faults


def unpacked(site: Site, nodes: list[Node], places: set[Place]) -> list[Node]:
    """Loads of several narrow elements that arithmetic reads elsewhere than where they are rounded."""
    loads = [node for node in nodes if LOAD.match(node.op) and node.place in places - {NOWHERE}]
    found = []
    for load in loads:
        ways = reached([load], lambda each: [user for user in each.users if user.op in UNPACKS])
        readers_ = {user for way in ways for user in way.users if user.op in FLOAT}
        found += [load] if any(user.place not in site.places for user in readers_) else []
    return found


def is_element(node: Node, made: set[Node]) -> bool:
    """Whether this is one element of what these instructions return, or of several of them."""
    found = origins(node) if node.op in ("phi", "part") or node in made else set()
    return bool(found) and found <= made


def readers(node: Node) -> set[Node]:
    """What reads a value, through merges and packing."""
    passed = reached([node], lambda each: [user for user in each.users if user.op in MERGES])
    return {user for each in passed for user in each.users if user.op not in MERGES}


def fused(flow: Flow, nodes: list[Node]) -> tuple[list[Node], int]:
    """(fused multiply-adds that TTIR does not ask for, the number of those it does: products, quotients, roots)."""
    asked = {node.place for node in flow.nodes if EXPANDED.fullmatch(node.op)} - {NOWHERE}
    apart = {node.place for node in flow.nodes if node.op in ("arith.mulf", "arith.addf", "arith.subf")}
    moves = any(node.op in MOVES for node in flow.nodes)  # LLVM gives steps of several elements another place
    all_ = [node for node in nodes if is_fused(node)]
    extra = [node for node in all_ if node.place not in asked and (node.place in apart or not moves)]
    return extra, len(all_) - len(extra)


def beside_assembly(inside: set[Place], sites: list[Site], found: list[Rounding]) -> tuple[list[Site], list[Rounding]]:
    """The sites and roundings but for those inside inline assembly, at these places, and of what it computes: which
    instructions assembly has is its own business, and TTIR knows the type of its result alone."""
    blind = [site for site in sites if any(source.op == ASSEMBLY for source in site.sources)]
    places = inside.union(*(site.places for site in blind))
    elsewhere = [each for each in found if not each.places & places]
    judged = [each for each in elsewhere if not any(value.place in inside for value in origins(each.value))]
    return [site for site in sites if site not in blind], judged


def fusion_faults(extra: list[Node]) -> list[str]:
    """One sentence where there are fused multiply-adds that TTIR does not ask for."""
    where = spot(max((node.place for node in extra), default=NOWHERE))
    return [f"machine code: multiply-adds fused that TTIR has apart: {len(extra)}, {where}"] if extra else []
