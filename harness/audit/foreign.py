"""The audit of other people's kernels, which have no plan: what they round, and what their compiler made of it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from typing import Any

import triton
from triton.compiler import ASTSource

from castpoint.harness.audit.flow import Flow
from castpoint.harness.audit.kernels import Row, check_target, examine, reason
from castpoint.harness.audit.machine import ASSEMBLY
from castpoint.harness.compiled.compile import check_compilable, compile_source
from castpoint.harness.compiled.loading import load
from castpoint.harness.runs.errors import UserError

TYPE = re.compile(r"\*?(i1|[iu](8|16|32|64)|fp(16|32|64)|bf16|fp8(e5|e4nv|e4b15|e4b8|e5b16))(:16)?")
OPTIONS = ("num_warps", "num_stages")
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
    row = {"target": target, "kernel": module_function, "plan": "", "keywords": " ".join([signature, *constants])}
    try:
        compiled = compile_source(module_function, target, source, {**options, "enable_fp_fusion": fp_fusion})
    except Exception as error:  # a compiler fails in its own ways
        return row | {"status": "failed", "reason": reason(error)}
    flow = Flow(INSTRUCTIONS.sub(f"{ASSEMBLY} ", compiled.asm["ttir"]))
    found, faults = examine(compiled, flow, {}, fp_fusion)
    said = [*faults, NOT_JUDGED] if any(node.op == ASSEMBLY for node in flow.nodes) else faults
    return row | {"status": "red" if faults else "reported", "reason": "; ".join(said)} | found


def imported(module_function: str) -> triton.JITFunction:
    """The kernel of that name. Raises UserError where there is none, RuntimeError where it is interpreted."""
    found: object = load(module_function)
    while isinstance(found, triton.runtime.Autotuner | triton.runtime.Heuristics):
        found = found.fn  # what triton.autotune or triton.heuristics was put on
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
        like = "*bf16, *fp32, i32, fp32, with :16 for divisible"
        raise UserError(f"unknown type {wrong[0]!r}: types are written like {like}")
    kinds = dict.fromkeys(fn.arg_names, "constexpr") | dict(zip(names, types, strict=True))
    attrs = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds.values()) if kind.endswith(":16")}
    signature_of = {name: kind.removesuffix(":16") for name, kind in kinds.items()}
    return ASTSource(fn, signature_of, values, attrs), options


def parsed_constant(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign or not name.strip():
        raise UserError(f"a constant is written NAME=VALUE, not {text!r}")
    try:
        return name.strip(), ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name.strip(), value  # a word
