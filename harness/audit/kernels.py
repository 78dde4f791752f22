"""The static audit: compiled kernels hold the roundings their plan declares, where it declares them, and no other.

TTIR proves where. It is a graph of values: each product, sum and root is named by what it was computed from (a product
with 1/sqrt of a mean of squares is `normed`), and every way from one of them to the next must hold the roundings that
the plan declares for it: none lost, doubled, truncating or moved, whatever the kernel calls its variables.

PTX and AMD assembly prove that the compiler kept them. Every rounding there is followed in its bits, element by
element, and belongs to the rounding of TTIR that the compiler's line table gives the same line and call; where the
table lost it, to one that rounds the same kind of operation. LLVM makes one vector operation of two alike ones and
gives both the place of one (RoPE's products): then whatever reads them must read such roundings alone. A rounding that
TTIR lacks, has of another kind or has and the machine code has not is a fault; so is an element of an always rounded
value that is not, or that arithmetic reads before, and a fused multiply-add that no division, root or matrix product of
TTIR expands to. What machine code does not show is which value comes out of memory again (shared memory above all), so
which of two roundings on one line comes first is known from TTIR alone. Rounding what is rounded already changes
nothing and may be removed; what is left of it is not looked at.

Memory joins kernels. What another kernel stored (rstd, hidden, proj) is taken at its word where it is loaded: the row
of the kernel that stores it proves it, and no rounding may follow. Workspace, which holds split-K's sums, is followed
within its kernel: what is loaded is whatever the kernel stores behind the same pointer. That addresses, the order of
programs and the counter of those that arrived are right, no row says, nor which of cos and sin meets which half.

Texts become graphs in ttir and assembly (of graph's nodes); roundings finds the roundings in one, by the tables of
instructions or by the idiom; flow names the values of TTIR, sites says where they are rounded. plan then holds TTIR to
the plan, machine the machine code to TTIR. Here both become rows, in foreign those of kernels without a plan, and in
listing those of PTX alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from castpoint.harness.audit.assembly import machine_graph
from castpoint.harness.audit.flow import Flow
from castpoint.harness.audit.graph import NOWHERE
from castpoint.harness.audit.instructions import is_unknown, opcode
from castpoint.harness.audit.machine import (
    ASSEMBLY,
    beside_assembly,
    compare_machine,
    fused,
    fusion_faults,
    made_of_integers,
)
from castpoint.harness.audit.plan import compare_ttir, declared, flow_of, part_of, resource_faults
from castpoint.harness.audit.roundings import Rounding, machine_roundings
from castpoint.harness.audit.sites import sites_of, without_exact
from castpoint.harness.audit.words import described, dot_precisions, listed, not_followed
from castpoint.harness.compiled.compile import COMPILERS, TARGETS, Compiled, binaries, check_compilable
from castpoint.harness.runs.errors import UserError
from castpoint.kernels.norm_qkv import norm_qkv_kernel
from castpoint.kernels.plan import CastPlan
from castpoint.variants.catalogue import plan_named

Row = dict[str, Any]  # of runs.schema.AuditRow's fields


def examine(
    compiled: Compiled, flow: Flow, names: dict[Rounding, str], fp_fusion: bool = False
) -> tuple[Row, list[str]]:
    """(columns that need no plan, faults of the machine code against TTIR, one sentence each).

    names: boundaries of roundings, where a plan gives them. fp_fusion: multiply-adds may be fused. What inline assembly
    computes or rounds is counted, but no fault.
    Raises UserError where the kernel was compiled without a line table.
    """
    if all(node.place == NOWHERE for node in flow.nodes):
        raise UserError("the kernel was compiled without line numbers: unset TRITON_DISABLE_LINE_INFO")
    nodes = machine_graph(compiled.asm)
    sites = sites_of(flow, names, compiled.target)
    found = without_exact(flow, sites, machine_roundings(nodes))
    unseen = dict.fromkeys(op for node in nodes if is_unknown(op := opcode(node.text)))
    unseen |= dict.fromkeys(f"{site.kind} made of integers" for site in made_of_integers(sites, nodes))
    counts, faults = compare_machine(sites, nodes, found)
    extra, asked = fused(flow, nodes)
    inside = {node.place for node in flow.nodes if node.op == ASSEMBLY}
    if inside:
        sites_beside, found = beside_assembly(inside, sites, found)
        _, beside = compare_machine(sites_beside, nodes, found)
        faults = [fault for fault in beside if fault in faults or "not rounded" not in fault]  # it may be inside
    faults += [] if fp_fusion else fusion_faults([node for node in extra if node.place not in inside])
    row = {
        "ttir": listed(f"{site.boundary or 'unclassified'} {site.kind}" for site in sites),
        "machine": listed(f"{name or 'unclassified'} {count}" for name, count in counts.items()),
        "roundings": "; ".join(described(flow)),
        "matmul": listed(dot_precisions(flow)),
        "not_followed": ", ".join([*not_followed(flow), *unseen]),
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
    part = part_of(compiled.kernel.removesuffix("_kernel"), keywords)
    flow = flow_of(compiled.asm["ttir"], plan, part)
    wanted = {edge: declared(plan, part, edge) for edge in flow.edges}
    pairs_of = [pair for edge, pairs in wanted.items() for pair in zip(edge.roundings, pairs, strict=False)]
    names = {rounding: name for rounding, (name, _) in pairs_of}
    row, faults = examine(compiled, flow, names)
    faults = compare_ttir(flow, plan, part) + faults + resource_faults(compiled, plan, part)
    if row["not_followed"]:
        faults.append(f"TTIR: the audit does not see through {row['not_followed']}")
    words = ", ".join(dict.fromkeys(f"{name} {kind}" for pairs in wanted.values() for name, kind in pairs))
    return {"status": "red" if faults else "ok", "reason": "; ".join(faults), "declared": words, **row}


def audit_case(target: str, kernel: str, plan_name: str, keywords: dict[str, Any]) -> Row:
    """One of compiled.compile.binaries(), compiled for one target and audited: text or numbers.

    target, kernel, plan   as given; keywords as text
    status        `ok`, `red` (reason says what is wrong), or `failed` (it does not compile; nothing follows)
    declared      roundings of the plan that the kernel has to make, `boundary kind`
    ttir          roundings found in TTIR, the same words; a boundary comes twice where branches have one each
    machine       elements a thread rounds at each boundary in PTX or AMD assembly, all copies of loops included
    roundings     of each rounding in TTIR what is rounded and what reads it; matmul: operand types of its products
    not_followed  operations of TTIR that the audit cannot see through, and of machine code narrow arithmetic that it
                  does not know, or makes of integers
    fused         multiply-adds that TTIR has apart; expanded: those that are its products, quotients and roots
    matrix        matrix instructions
    registers     a thread; spills: bytes a thread (both None without disassembler); shared: bytes a block

    Raises KeyError for an unknown plan, ValueError for another unknown name, RuntimeError where the kernels were
    imported interpreted.
    """
    check_target(target)
    if kernel not in COMPILERS:
        raise ValueError(f"unknown kernel {kernel!r}: kernels are {', '.join(COMPILERS)}")
    plan = plan_named(plan_name)
    check_compilable(norm_qkv_kernel)
    words = " ".join(f"{name}={value}" for name, value in keywords.items())
    row = {"target": target, "kernel": kernel, "plan": plan_name, "keywords": words}
    try:
        compiled = COMPILERS[kernel](plan, target, **keywords)
    except Exception as error:  # a compiler fails in its own ways, and the other cases go on
        return row | {"status": "failed", "reason": reason(error)}
    return row | audit_compiled(compiled, plan, keywords)


def check_target(target: str) -> None:
    """Raises UserError unless kernels are compiled for that target."""
    if target not in TARGETS:
        raise UserError(f"unknown target {target!r}: targets are {', '.join(TARGETS)}")


def audit_all(targets: Iterable[str] = tuple(TARGETS)) -> Iterator[Row]:
    """All of compiled.compile.binaries() for each of these targets, as rows; raises as audit_case does."""
    for target in targets:
        for kernel, name, keywords in binaries(target):
            yield audit_case(target, kernel, name, keywords)


def reason(error: BaseException) -> str:
    """The last line of what went wrong at the bottom: Triton puts the reason below the place."""
    while error.__cause__:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".strip().splitlines()[-1][-500:]
