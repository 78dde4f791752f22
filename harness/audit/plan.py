"""A compiled kernel against its plan: roundings and products of TTIR, matrix instructions, and a target's resources."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from castpoint.harness.audit.flow import LOADS, Edge, Flow
from castpoint.harness.audit.words import dot_precisions, listed, titled
from castpoint.harness.compiled.compile import SHARED, Compiled
from castpoint.kernels.plan import BOUNDARIES, KEEP, RNE, ROPE_BOUNDARIES, CastPlan

# ---------------------------------------------------------------- parts of the chain


@dataclass(frozen=True)
class Part:
    """What of the chain a compiled kernel has to do, as it was asked for (compilers of compiled.compile)."""

    kernel: str  # norm_qkv, quantised, split_k, rms_norm or head_norm
    head_norm: str = "fused"
    prepass: str = "none"
    block_m: int = 64
    stores: str = "hidden"
    packed: bool = False
    rope: bool = False
    weight: str = RNE  # of quantised

    @property
    def multiplies(self) -> bool:
        return self.kernel in ("norm_qkv", "quantised", "split_k")

    @property
    def rotates(self) -> bool:
        return self.rope and self.head_norm != "later"


def part_of(kernel: str, keywords: dict[str, Any]) -> Part:
    """That kernel's part, as a compiler of compiled.compile was asked for it with these keywords."""
    asked = {name: keywords[name] for name in ("head_norm", "stores", "packed", "rope", "weight") if name in keywords}
    if config := keywords.get("config"):
        asked |= {"prepass": config.prepass, "block_m": config.block_m}
    return Part(kernel, **asked)


def flow_of(ttir: str, plan: CastPlan, part: Part) -> Flow:
    """TTIR of that part. What kernels before it stored is taken at its word, since their own rows prove it."""
    given = {"cos_sin_ptr": "cos_sin"} | ({"proj_ptr": "proj"} if part.kernel == "head_norm" else {})
    given |= {"rstd_ptr": "rstd"} if part.prepass != "none" else {}
    given |= {"x_ptr": "hidden"} if part.prepass == "hidden" and plan.scale != "folded" else {}
    workspace = ("sums_ptr", "squares_ptr") if part.kernel == "split_k" else ()
    return Flow(ttir, given, workspace, hidden=part.kernel == "rms_norm")


def stored_roles(plan: CastPlan, part: Part) -> dict[str, set[str]]:
    """The values of which one is due behind each pointer that the kernel stores to."""
    if part.kernel == "head_norm":
        return dict.fromkeys(("out_ptr", "k_out_ptr") if part.packed else ("out_ptr",), {"out"})
    if part.kernel == "rms_norm":
        hidden = {"load", "x"} if plan.scale == "folded" else {"hidden"}
        due = {"rstd_ptr": {"rstd"}, "hidden_ptr": hidden}
        return {name: roles for name, roles in due.items() if part.stores in (name.removesuffix("_ptr"), "both")}
    qk = "out" if part.head_norm == "fused" or part.rotates else "proj"
    due = dict.fromkeys(("q_ptr", "k_ptr"), {qk}) | {"v_ptr": {"proj"}}
    due |= {"sums_ptr": {"proj"}} if part.kernel == "split_k" else {}
    squares = part.kernel == "split_k" and part.prepass == "none" and plan.scale != "prologue"
    return due | ({"squares_ptr": {"sum"}} if squares else {})


# ---------------------------------------------------------------- roundings

BOUNDARY_OF = {name: name for name in BOUNDARIES} | {"head_statistics": "statistics", "head_variance": "variance"}


def declared(plan: CastPlan, part: Part, edge: Edge) -> list[tuple[str, str]]:
    """(boundary, kind) of every rounding that the plan puts on that edge, in order."""
    if edge.source.op in LOADS and edge.role != "cos_sin":  # rounded by who stored it
        return []

    def kept_as(*names: str) -> list[tuple[str, str]]:
        return [(name, getattr(plan, name)) for name in names if getattr(plan, name) != KEEP]

    if edge.role == "proj":
        if edge.sink_role in ("proj", "sums_ptr"):  # sums, rstd and the bias; shares of a sum
            return []
        if edge.sink_role == "products":  # q and k without a head norm
            return kept_as("proj", "unrotated")
        last = edge.sink_role == "v_ptr" or edge.sink.op == "tt.store" and part.head_norm == "none"
        return kept_as("proj", "out") if last else kept_as("proj")
    if edge.role in ("hidden", "remainder"):
        cut = edge.sink_role == "proj" or edge.sink_role == "remainder" and edge.operand == 1
        tf32 = [(edge.role, "tf32-rtz")] if cut and plan.matmul.startswith("tf32") else []
        return (kept_as("hidden") if edge.role == "hidden" else []) + tf32
    if edge.role == "weight":
        return [("weight", part.weight)] if part.weight != KEEP else []
    if edge.role == "offset":
        return [("offset", RNE)] if plan.weight_offset == RNE else []
    return kept_as(BOUNDARY_OF[edge.role]) if edge.role in BOUNDARY_OF else []


def expected_roles(plan: CastPlan, part: Part) -> set[str]:
    """The values that must be found in TTIR, computed there or loaded."""
    head = {"head_statistics", "head_sum", "head_variance", "head_rstd", "head_normed", "out"}
    turned = {"cos_sin", "products", "out"} if part.rotates else set()
    head |= turned | {"unrotated"} if part.rotates else set()
    offset = {"offset"} if plan.weight_offset != "none" else set()
    if part.kernel == "head_norm":
        return head | offset
    rstd = {"statistics", "sum", "variance", "rstd"} if part.prepass == "none" else set()
    hidden = {"hidden"} | offset if plan.scale != "folded" else set()
    hidden |= {"normed"} if plan.scale == "prologue" else set()
    if part.kernel == "rms_norm":
        return rstd | (hidden if part.stores != "rstd" else set())
    if part.prepass == "hidden":
        hidden &= {"hidden"}
    rstd |= {"rstd"} if part.prepass == "rstd" or plan.scale != "prologue" else set()
    found = {"proj"} | rstd | hidden | turned | (head | offset if part.head_norm == "fused" else set())
    found |= {"weight"} if part.kernel == "quantised" else set()
    return found | ({"remainder"} if plan.matmul == "tf32x3" else set())


def strangers(part: Part) -> set[str]:
    """The values of the first norm that must not be found in TTIR, since the kernel before it made them."""
    if part.prepass == "none":
        return set()
    return {"statistics", "sum", "variance"} | ({"normed"} if part.prepass == "hidden" else set())


def compare_ttir(flow: Flow, plan: CastPlan, part: Part) -> list[str]:
    """What TTIR does otherwise than the plan, one sentence each."""
    faults, roles = [], {edge.role for edge in flow.edges}
    faults += [f"TTIR: {titled(role)} was not found" for role in sorted(expected_roles(plan, part) - roles)]
    faults += [f"TTIR: {titled(role)} is computed again" for role in sorted(strangers(part) & roles)]
    unasked = roles.intersection(() if part.rotates else ROPE_BOUNDARIES)
    faults += [f"TTIR: {role} is there, where nothing is to be rotated" for role in sorted(unasked)]
    faults += compare_stores(flow, plan, part)
    for edge in flow.edges:
        wanted, found = [kind for _, kind in declared(plan, part, edge)], [r.kind for r in edge.roundings]
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
    if part.multiplies:
        operands = {"bf16": "bf16", "fp32": "ieee", "tf32": "tf32", "tf32x3": "tf32"}[plan.matmul]
        faults += [f"TTIR: the matmul is {p}, the plan says {operands}" for p in dot_precisions(flow) if p != operands]
    return list(dict.fromkeys(faults))


def compare_stores(flow: Flow, plan: CastPlan, part: Part) -> list[str]:
    """What is stored elsewhere than is due, or not at all, one sentence each."""
    faults, due = [], stored_roles(plan, part)
    stores = [(name, e.role) for e in flow.edges if e.sink.op.endswith("store") for name in e.sink_role.split(" or ")]
    for name, role in stores:
        if role not in due.get(name, ()):
            wanted = ", ".join(sorted(due.get(name, ["nothing"])))
            faults.append(f"TTIR: {titled(role)} is stored to {name}, due is {wanted}")
    faults += [f"TTIR: nothing is stored to {name}" for name in due if name not in {name for name, _ in stores}]
    return faults


# ---------------------------------------------------------------- instructions and resources

# Bytes of registers a thread may spill with bf16 operands: eight, not an accumulator.
SPILLS = 32
# The matrix instruction that a target has for those operands; fp32 products are not exact on NVIDIA's.
WARP_BF16, WARP_TF32 = r"mma\.sync\..*\.bf16\.bf16\.f32", r"mma\.sync\..*\.tf32\.tf32\.f32"
WIDE_BF16 = {"sm_80": WARP_BF16, "sm_90": r"wgmma\..*\.bf16\.bf16", "sm_100": r"tcgen05\.mma\..*kind::f16"}
MFMA = {"bf16": r"v_mfma_f32_\w+_bf16", "tf32": r"v_mfma_f32_\w+_xf32", "fp32": r"v_mfma_f32_\d+x\d+x\d+_f32"}


def matrix_instruction(target: str, matmul: str, block_m: int = 64) -> str | None:
    """Pattern of the only matrix instruction allowed there; None: no matrix instruction at all.

    The same for one token as for many: another instruction would sum otherwise, and bits would change with the batch.
    The wide ones of sm_90 and sm_100 take 64 rows at least; tiles of fewer, for few tokens alone, have a warp's.
    """
    operand = "tf32" if matmul == "tf32x3" else matmul
    if target == "gfx942":
        return MFMA[operand]
    if operand == "bf16":
        return WIDE_BF16[target] if block_m >= 64 else WARP_BF16
    return WARP_TF32 if operand == "tf32" else None


def resource_faults(compiled: Compiled, plan: CastPlan, part: Part) -> list[str]:
    """Too much shared memory or spilling, or another matrix instruction than the plan's matmul has there."""
    faults, found = [], compiled.matrix_instructions()
    if compiled.shared > SHARED[compiled.target]:
        faults.append(f"{compiled.shared} bytes of shared memory, {compiled.target} has {SHARED[compiled.target]}")
    if (compiled.spills or 0) > SPILLS and (plan.matmul == "bf16" or not part.multiplies):
        faults.append(f"{compiled.spills} bytes of registers spilled, at most {SPILLS} are allowed")
    pattern = matrix_instruction(compiled.target, plan.matmul, part.block_m) if part.multiplies else None
    if pattern is None and found or pattern and not (found and all(re.fullmatch(f"{pattern}.*", i) for i in found)):
        faults.append(f"matrix instructions {listed(found) or 'none'} where {pattern or 'none'} is due")
    return faults
