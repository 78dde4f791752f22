"""The audit of other people's kernels, which have no plan: what they round, and what their compiler made of it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from typing import Any

import triton
from triton.compiler import ASTSource

from castpoint.harness.audit.amd import amdgcn_graph
from castpoint.harness.audit.flow import Flow
from castpoint.harness.audit.graph import Node, origins, spot
from castpoint.harness.audit.kernels import COLUMNS, Row, check_target, examine, reason
from castpoint.harness.audit.machine import compare_machine, fused, sites_of
from castpoint.harness.audit.ptx import ptx_graph
from castpoint.harness.audit.roundings import Rounding, machine_roundings
from castpoint.harness.compiled.compile import TARGETS, Compiled, check_compilable, resources
from castpoint.harness.compiled.loading import Fault, load
from castpoint.harness.runs.errors import UserError

TYPE = re.compile(r"\*?(i1|[iu](8|16|32|64)|fp(16|32|64)|bf16|fp8(e5|e4nv|e4b15|e4b8|e5b16))(:16)?")
OPTIONS = ("num_warps", "num_stages")
ASSEMBLY = "tt.elementwise_inline_asm"
INSTRUCTIONS = re.compile(rf'{re.escape(ASSEMBLY)} "[^"]*" \{{.*? pure = \w+\}} ')  # before its operands
NOT_JUDGED = "inline assembly is not followed: what it computes or rounds is not held to TTIR"


def audit_foreign(
    module_function: str, target: str, signature: str, constants: Iterable[str] = (), *, fp_fusion: bool = True
) -> Row:
    """What a kernel without a plan rounds, and what its compiler made of it: the columns of audit_case.

    module_function   `MODULE:FUNCTION`, a @triton.jit kernel, also under triton.autotune or triton.heuristics;
                      importing the module runs it
    signature         types of the arguments that are no constants, in order: `*bf16,*bf16,i32,fp32`; `:16` behind one
                      says that it is divisible by 16
    constants         `NAME=VALUE` for tl.constexpr arguments without default, for other arguments that are always the
                      same (`bias_ptr=None`), and for num_warps and num_stages
    fp_fusion         as the kernel is launched; True is Triton's default up to 3.9

    Here a rounding is named by what is rounded, and that by what it was computed from (see Flow): `unclassified` where
    it is nothing of the chain. status is `reported`, or `red` where the machine code lacks a rounding of TTIR, or has
    another; fused multiply-adds alone make no row red, where fp_fusion asks for them. Nor does inline assembly, which
    is not followed: reason says so, and what it computes or rounds itself is not held to TTIR.

    Raises UserError with one sentence for what does not fit, RuntimeError for an interpreted kernel.
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
    flow = Flow(INSTRUCTIONS.sub(f"{ASSEMBLY} ", asm["ttir"]))
    found, faults = examine(compiled, flow, {}, fp_fusion)
    status, said = "red" if faults else "reported", faults
    if any(node.op == ASSEMBLY for node in flow.nodes):
        faults = faults_beside_assembly(asm, flow, fp_fusion)
        status, said = "red" if faults else "reported", [*faults, NOT_JUDGED]
    return row | found | {"status": status, "reason": "; ".join(said), "declared": ""}


def faults_beside_assembly(asm: dict[str, str], flow: Flow, fp_fusion: bool) -> list[str]:
    """The faults that examine finds, but for roundings and multiply-adds inside inline assembly, and roundings of what
    it computes: which instructions assembly has is its own business, and TTIR knows the type of its result alone."""
    nodes = ptx_graph(asm["ptx"]) if "ptx" in asm else amdgcn_graph(asm["amdgcn"])
    inside = {node.place for node in flow.nodes if node.op == ASSEMBLY}
    blind, sites = set(inside), []
    for site in sites_of(flow, {}):
        if any(source.op == ASSEMBLY for source in site.sources):
            blind |= site.places
        else:
            sites.append(site)

    def is_judged(rounding: Rounding) -> bool:
        values = origins(rounding.value) if isinstance(rounding.value, Node) else set()
        return not rounding.places & blind and not any(value.place in inside for value in values)

    _, faults = compare_machine(sites, nodes, [each for each in machine_roundings(nodes) if is_judged(each)])
    extra = [node for node in fused(flow, nodes)[0] if node.place not in inside]
    if extra and not fp_fusion:
        where = spot(max(node.place for node in extra))
        faults.append(f"machine code: multiply-adds fused that TTIR has apart: {len(extra)}, {where}")
    return faults


def imported(module_function: str) -> triton.JITFunction:
    """The kernel of that name. Raises UserError where there is none, RuntimeError where it is interpreted."""
    try:
        found = load(module_function)
    except Fault as fault:
        if not isinstance(fault.found, triton.runtime.Autotuner | triton.runtime.Heuristics):
            raise
        return imported(f"{module_function}.fn")  # what triton.autotune or triton.heuristics was put on
    if type(found).__module__.startswith("triton.runtime.interpreter"):
        check_compilable(found)
    if not isinstance(found, triton.JITFunction):
        raise UserError(f"{module_function} is a {type(found).__name__}, not a function under @triton.jit")
    return found


def foreign_source(
    fn: triton.JITFunction, signature: str, constants: Iterable[str]
) -> tuple[ASTSource, dict[str, int]]:
    """The kernel with its types and constants, and the options among these. Raises UserError as audit_foreign does."""
    values = dict(parsed_constant(each) for each in constants)
    options = {name: values.pop(name) for name in OPTIONS if name in values}
    if unknown := sorted(values.keys() - set(fn.arg_names)):
        raise UserError(f"{fn.__name__} has no argument {', '.join(unknown)}: it has {', '.join(fn.arg_names)}")
    values = {p.name: p.default for p in fn.params if p.is_constexpr and p.has_default} | values
    if missing := [p.name for p in fn.params if p.is_constexpr and p.name not in values]:
        raise UserError(f"{fn.__name__} needs a value for {', '.join(missing)}: give {missing[0]}=VALUE")
    names = [name for name in fn.arg_names if name not in values]
    types = [each.strip() for each in signature.split(",")] if signature.strip() else []
    if len(types) != len(names):
        raise UserError(f"{fn.__name__} needs {len(names)} types, for {', '.join(names)}; {len(types)} are given")
    if wrong := [each for each in types if not TYPE.fullmatch(each)]:
        raise UserError(
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
        raise UserError(f"a constant is written NAME=VALUE, not {text!r}")
    try:
        return name.strip(), ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name.strip(), value  # a word
