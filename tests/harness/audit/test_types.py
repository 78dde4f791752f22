"""Other people's kernels of every type: what is right is not red, on any target, and what lost a rounding is.

Each kernel is compiled for every target; none is run (test_execution runs those that this CPU can). Needs no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import triton
import triton.language as tl
from audit_support import in_process
from audit_triton import linear, named, narrow, norm

from castpoint.harness.audit.foreign import audit_foreign
from castpoint.harness.compiled.compile import TARGETS


@triton.jit
def convert(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs).to(out_ptr.dtype.element_ty))


@triton.jit
def mixed(a_ptr, b_ptr, c_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    """One operand fp32, the other narrow: sm_100 has instructions for that."""
    offs = tl.arange(0, BLOCK)
    a, b = tl.load(a_ptr + offs).to(tl.float32), tl.load(b_ptr + offs).to(tl.float32)
    c = tl.load(c_ptr + offs)
    r = a + c if OP == "add" else a - c if OP == "sub" else tl.fma(a, b, c) if OP == "fma" else a * b + c
    tl.store(out_ptr + offs, r)


@triton.jit
def adds_in_memory(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr + offs, (tl.load(x_ptr + offs) * 3).to(out_ptr.dtype.element_ty))


@triton.jit
def adds_up_in_fp16(a_ptr, b_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    a = tl.load(a_ptr + offs[:, None] * BLOCK + offs[None, :])
    b = tl.load(b_ptr + offs[:, None] * BLOCK + offs[None, :])
    acc = tl.dot(a, b, out_dtype=tl.float16)
    tl.store(out_ptr + offs[:, None] * BLOCK + offs[None, :], acc.to(out_ptr.dtype.element_ty))


@triton.jit
def quantises(x_ptr, w_ptr, out_ptr, s_ptr, eps, D: tl.constexpr, BLOCK: tl.constexpr = 1024):
    """A norm as Hugging Face has it, stored in eight bits with a scale."""
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * D + offs, mask=offs < D, other=0.0).to(tl.float32)
    normed = (x * tl.rsqrt(tl.sum(x * x) / D + eps)).to(tl.bfloat16)
    y = (normed * tl.load(w_ptr + offs, mask=offs < D, other=0.0)).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(y)), 1e-10) / 448.0
    tl.store(s_ptr + row, scale)
    tl.store(out_ptr + row * D + offs, (y / scale).to(out_ptr.dtype.element_ty), mask=offs < D)


@triton.jit
def scaled(x_ptr, out_ptr, scale, BLOCK: tl.constexpr):
    """A number of the launch is rounded, and an integer."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, x * scale.to(x.dtype) + offs.to(x.dtype))


@triton.jit
def drops_an_eight_bit_rounding(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, (tl.load(x_ptr + offs) * 3.0).to(tl.float8e4nv).to(tl.float32) + 1.0)


# ---------------------------------------------------------------- right ones

HELD = {  # what goes into what without a rounding
    "bf16": ("fp8e4nv", "fp8e5", "fp8e4b8", "fp8e5b16", "i8"),
    "fp16": ("fp8e4nv", "fp8e5", "fp8e4b8", "fp8e5b16", "i8"),
    "fp32": ("fp8e4nv", "fp8e5", "fp8e4b8", "fp8e5b16", "i8", "i16", "fp16", "bf16"),
}
KINDS = {"fp8e4nv": "e4m3", "fp8e5": "e5m2", "fp8e4b8": "e4m3fnuz", "fp8e5b16": "e5m2fnuz"}  # by Triton's names
INTEGERS = ("i8", "i16", "i32")
NO_REST = "rest_ptr=None"


def conversions() -> Iterator[tuple[triton.JITFunction, str, list[str], str]]:
    """(kernel, signature, constants, what TTIR rounds)."""
    floats, eight = ("fp64", "fp32", "fp16", "bf16"), tuple(KINDS)
    pairs = [(a, b) for a in (*floats, *INTEGERS) for b in (*floats[1:], *eight)] + [
        (a, b) for a in eight for b in HELD
    ]
    for of, to in pairs:
        if of != to and not (of in ("fp64", *INTEGERS) and to in eight):  # Triton has none
            quiet = of in HELD.get(to, ()) or of in INTEGERS
            kind = "" if quiet else f"load {KINDS.get(to, to)}-rne"
            yield convert, f"*{of}:16,*{to}:16", ["BLOCK=512"], kind


def arithmetic() -> Iterator[tuple[triton.JITFunction, str, list[str], str | None]]:
    for t in ("bf16", "fp16"):
        for op in ("add", "sub", "fma", "both"):
            yield mixed, f"*fp32:16,*{t}:16,*{t}:16,*fp32:16", [f"OP={op}", "BLOCK=512"], ""
            yield mixed, f"*{t}:16,*{t}:16,*fp32:16,*fp32:16", [f"OP={op}", "BLOCK=512"], ""
        for op in ("add", "sub", "mul", "div", "mod", "max", "clamp", "muladd", "fma", "sum", "cumsum", "where"):
            yield narrow, ",".join([f"*{t}:16"] * 4), [f"OP={op}", "BLOCK=512"], None
        yield adds_in_memory, f"*fp32:16,*{t}:16", ["BLOCK=512"], None
        yield scaled, f"*{t}:16,*{t}:16,fp32", ["BLOCK=512"], None


def chains() -> Iterator[tuple[triton.JITFunction, str, list[str], str | None]]:
    for bias, out in (("bf16", "bf16"), ("fp32", "bf16"), ("fp32", "fp8e4nv"), ("fp32", "fp16")):
        for act in ("none", "relu", "silu", "gelu", "rest"):
            if act != "rest" or out == "bf16":
                types = f"*bf16:16,*bf16:16,*{bias}:16,*{out}:16,i32:16" + ",*bf16:16" * (act == "rest")
                constants = [f"ACT={act}", "BLOCK=64", *([] if act == "rest" else [NO_REST])]
                yield linear, types, constants, None
    for b in ("i8", "fp8e4nv", "fp8e5", "fp16"):
        yield linear, f"*bf16:16,*{b}:16,*fp32:16,*bf16:16,i32:16", ["ACT=none", "BLOCK=64", NO_REST], None
    yield linear, "*bf16:16,*bf16:16,*fp32:16,*bf16:16,i32:16", ["ACT=none", "BLOCK=16", NO_REST], None
    for out in ("fp16", "bf16", "fp32"):
        yield adds_up_in_fp16, f"*fp16:16,*fp16:16,*{out}:16", ["BLOCK=64"], None
    for out in KINDS:
        rounds = f"normed bf16-rne, hidden bf16-rne, unclassified {KINDS[out]}-rne"
        yield quantises, f"*bf16:16,*bf16:16,*{out}:16,*fp32,fp32", ["D=1024"], rounds
    rounds = "stored x bf16-rne, hidden bf16-rne"
    yield norm, ",".join(["*bf16:16"] * 5) + ",fp32", ["D=1000", "ADDS=1", "ROUNDS=", "BLOCK=1024"], rounds


RIGHT = {"conversions": conversions, "arithmetic": arithmetic, "chains": chains}


def audited(target: str, group: str) -> Iterator[dict]:
    for kernel, signature, constants, rounds in RIGHT[group]():
        row = audit_foreign(named(kernel), target, signature, constants, fp_fusion=False)
        yield {**row, "due": rounds}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("group", RIGHT)
def test_no_right_kernel_is_red(group: str, target: str, tmp_path: Path):
    rows = in_process(audited, target, group, cache=tmp_path)
    compiled = [row for row in rows if row["status"] != "failed"]
    assert all("not supported in this architecture" in row["reason"] for row in rows if row not in compiled)
    assert len(compiled) >= {"conversions": 24, "arithmetic": 44, "chains": 23}[group]
    for row in compiled:
        assert (row["status"], row["reason"]) == ("reported", ""), row
        assert row["due"] in (None, row["ttir"]), row
        if row["ttir"] and not row["not_followed"] and row["due"] is not None:  # and each is seen in machine code
            kinds = [each.split()[-1] for each in row["ttir"].split(", ")]
            assert row["machine"] or not all(kind.startswith(("bf16", "fp16", "fp32")) for kind in kinds), row


# ---------------------------------------------------------------- and wrong ones


def fused() -> Iterator[dict]:
    """A product and a sum in a narrow type, with the fusion that loses the product's rounding."""
    for target in TARGETS:
        for t in ("bf16", "fp16"):
            types, constants = ",".join([f"*{t}:16"] * 4), ["OP=muladd", "BLOCK=512"]
            yield {**audit_foreign(named(narrow), target, types, constants), "type": t}


def test_a_rounding_that_fusion_loses_is_red_though_both_stand_at_one_place(tmp_path: Path):
    for row in in_process(fused, cache=tmp_path):
        if row["target"] == "gfx942" and row["type"] == "bf16":  # which has no such instruction
            assert row["status"] == "reported", row
        else:
            assert row["status"] == "red" and f"a product is not rounded, TTIR says {row['type']}-rne" in row["reason"]


def without_eight_bits() -> Iterator[dict]:
    """A kernel that rounds to eight bits, and one of machine code in which that is lost or of another kind."""
    import castpoint.harness.audit.foreign as auditing

    compile_ = auditing.compile_source
    edits = {
        "": lambda text: text,
        "another type": lambda text: text.replace("e4m3x2.f32", "e5m2x2.f32").replace("f16x2.e4m3x2", "f16x2.e5m2x2"),
        "no conversion": lambda text: text.replace("cvt.rn.satfinite.e4m3x2.f32", "min.f32"),
        "another mode": lambda text: text.replace("cvt.rn.satfinite.e4m3x2.f32", "cvt.rz.satfinite.ue8m0x2.f32"),
    }
    for fault, edit in edits.items():

        def broken(kernel, target, source, options, edit=edit):
            built = compile_(kernel, target, source, options)
            built.asm["ptx"] = edit(built.asm["ptx"])
            return built

        auditing.compile_source = broken
        name = named(drops_an_eight_bit_rounding)
        yield {"fault": fault, **audit_foreign(name, "sm_90", "*fp32:16,*fp32:16", ["BLOCK=512"])}


def test_a_lost_rounding_to_eight_bits_is_red(tmp_path: Path):
    rows = {row["fault"]: row for row in in_process(without_eight_bits, cache=tmp_path)}
    assert rows.pop("")["status"] == "reported"
    assert [row["status"] for row in rows.values()] == ["red"] * 3, rows
