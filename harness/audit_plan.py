"""A compiled kernel against its plan: roundings and products of TTIR, matrix instructions, and a target's resources."""

from __future__ import annotations

import re

from harness.aot import Compiled
from harness.audit_flow import LOADS, Edge, Flow
from harness.audit_words import dot_precisions, listed, titled
from kernels.checks import KEEP, RNE
from variants.plan import CastPlan

# ---------------------------------------------------------------- roundings

BOUNDARY_OF = {
    **{name: name for name in ("x", "statistics", "variance", "rstd", "normed", "hidden", "head_rstd", "head_normed")},
    **{"out": "out", "head_statistics": "statistics", "head_variance": "variance"},
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


# ---------------------------------------------------------------- instructions and resources

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
