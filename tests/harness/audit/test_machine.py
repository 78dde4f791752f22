"""Machine code changed as a compiler could have: the audit of machine code notices. Needs no GPU."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import triton
from audit_support import ADDEND, AMD, NVIDIA, changed, in_process, other_addend, replace_one

from castpoint.harness.audit.assembly import ptx_graph
from castpoint.harness.audit.kernels import audit_case, audit_compiled
from castpoint.harness.audit.roundings import machine_roundings
from castpoint.harness.compiled.compile import compile_head_norm, compile_norm_qkv, compile_rms_norm
from castpoint.kernels.config import Config
from castpoint.variants.catalogue import PLANS

# ---------------------------------------------------------------- near misses

IDIOM = """\
	mul.rn.f32 	%r2, %r1, %r1;
	bfe.u32 	%r3, %r2, 16, 1;
	add.s32 	%r4, %r2, %r3;
	add.s32 	%r5, %r4, 32767;
	and.b32 	%r6, %r2, 2147483647;
	setp.gt.u32 	%p1, %r6, 2139095040;
	or.b32 	%r7, %r2, 4194304;
	selp.b32 	%r8, %r7, %r5, %p1;
	and.b32 	%r9, %r8, -65536;
	st.global.b32 	[%rd1], %r9;
"""
TEST = "setp.gt.u32 	%p1, %r6, 2139095040"
PACKED_TEST = """\
setp.gt.u32 	%p2, %r6, 2139095040;
	setp.gt.u32 	%p3, %r1, 2139095040;
	selp.b16 	%rs1, -1, 0, %p2;
	selp.b16 	%rs2, 1, 0, %p3;
	shl.b16 	%rs3, %rs1, 3;
	and.b16 	%rs4, %rs3, 15;
	or.b16 	%rs5, %rs4, %rs2;
	cvt.u32.u16 	%r10, %rs5;
	shr.u32 	%r11, %r10, 3;
	and.b32 	%r12, %r11, 1;
	setp.ne.b32 	%p1, %r12, 0"""
NEAR_MISSES = {
    "": ("", "", ["bf16-rne"]),
    "the upper half taken": ("and.b32 	%r9, %r8, -65536", "shr.u32 	%r9, %r8, 16", ["bf16-rne"]),
    "selected the other way": ("%r7, %r5, %p1", "%r5, %r7, %p1", ["bf16-rne without NaN"]),
    "another bit": ("%r2, 16, 1", "%r2, 15, 1", []),
    "the bit of another value": ("bfe.u32 	%r3, %r2", "bfe.u32 	%r3, %r1", []),
    "half an ulp more": ("32767", "32768", []),
    "no addend": ("%r7, %r5, %p1", "%r7, %r2, %p1", ["bf16-rtz"]),
    "infinity taken for NaN": ("2139095040", "2139095039", ["bf16-rne without NaN"]),
    "the sign tested too": ("%r6, %r2, 2147483647", "%r6, %r2, -1", ["bf16-rne without NaN"]),
    "lower bits kept": ("%r9, %r8, -65536", "%r9, %r8, -32768", ["rne with lower bits kept"]),
    "tests packed": (TEST, PACKED_TEST, ["bf16-rne"]),
    "tests packed, another bit": (TEST, PACKED_TEST.replace("r10, 3", "r10, 2"), ["bf16-rne without NaN"]),
    "tests packed, the bit masked": (TEST, PACKED_TEST.replace("15;", "7;"), ["bf16-rne without NaN"]),
    "tests packed, the other element": (TEST, PACKED_TEST.replace("r10, 3", "r10, 0"), ["bf16-rne without NaN"]),
    "tests packed, inverted": (TEST, PACKED_TEST.replace("setp.ne", "setp.eq"), ["bf16-rne without NaN"]),
    "tests packed, beyond the word": (
        TEST,
        PACKED_TEST.replace("rs1, 3", "rs1, 16").replace("r10, 3", "r10, 16"),
        ["bf16-rne without NaN"],
    ),
    "not cut off": ("[%rd1], %r9", "[%rd1], %r8", ["rne with lower bits kept"]),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_only_the_whole_idiom_is_a_rounding(name: str):
    old, new, kinds = NEAR_MISSES[name]
    assert IDIOM.count(old) == 1 or not name
    graph = ptx_graph(IDIOM.replace(old, new) if name else IDIOM)
    assert [rounding.kind for rounding in machine_roundings(graph)] == kinds


# ---------------------------------------------------------------- faults of a compiler


def unselected(text: str) -> str:
    """PTX with one rounding bypassed: what is rounded goes on in place of the result."""
    quieted, value = re.search(r"or\.b32 +\t(%r\d+), (%r\d+), 4194304;", text).groups()
    return re.sub(rf"selp\.b32 +\t(%r\d+), {quieted}, .*;", rf"mov.b32 \t\1, {value};", text, count=1)


# Small tiles, with which LLVM takes a quarter of the time.
FEW = {"head_dim": 32, "config": Config("fused", "none", 16, 32, 4, 2)}
SHARES = {"head_dim": 32, "config": Config("split-k", "none", 16, 32, 4, 2), "tokens": 1}
ONE_ELEMENT = "elements of head_normed left unrounded: 1"
BROKEN = {  # target, change of the machine code of head_norm under `hf`, pattern of what the audit must say
    "other addend": (NVIDIA, other_addend(), ONE_ELEMENT),
    "other tie": (NVIDIA, replace_one(r"(bfe\.u32 .*), 16, 1;", r"\1, 17, 1;"), ONE_ELEMENT),
    "shorter cut": (
        NVIDIA,
        replace_one(r"(and\.b32 +\t%r\d+, %r\d+, )-65536;", r"\1-32768;", -1),
        "machine code: head_normed is rounded rne with lower bits kept, TTIR says bf16-rne",
    ),
    "bypassed": (NVIDIA, unselected, "machine code: .*bf16-rtz without NaN"),
    "fused": (
        NVIDIA,
        replace_one(r"add\.rn\.f32 +\t(%r\d+), (%r\d+), (%r\d+);", r"fma.rn.f32 \1, \2, \2, \3;"),
        "multiply-adds fused that TTIR has apart: 1, at standard.py",
    ),
    "added": (
        NVIDIA,
        replace_one(r"sqrt\.rn\.f32 +\t(%r\d+), (%r\d+);", r"and.b32 \2, \2, -65536;\n\tsqrt.rn.f32 \1, \2;"),
        "a value is rounded bf16-rtz without NaN where TTIR does not",
    ),
    "converted": (
        NVIDIA,
        replace_one(r"sqrt\.rn\.f32 +\t(%r\d+), (%r\d+);", r"cvt.rn.bf16.f32 %rs99, \2;\n\tsqrt.rn.f32 \1, %rs99;"),
        "a value is rounded bf16-rne where TTIR does not",
    ),
    "AMD: other addend": (
        AMD, replace_one(r"v_add3_u32 (v\d+), (v\d+), (v\d+), s\d+", r"v_add3_u32 \1, \2, \3, 0x8000"), ONE_ELEMENT
    ),
    "AMD: fused": (
        AMD,
        replace_one(r"v_add_f32_e32 (v\d+), (v\d+), (v\d+)$", r"v_fma_f32 \1, \2, \2, \3"),
        "multiply-adds fused that TTIR has apart: 1",
    ),
    "AMD: shorter cut": (
        AMD, replace_one(r"(v_and_b32_e32 v\d+, )0xffff0000(, v\d+)", r"\g<1>0xffff8000\2", -1), "lower bits kept"
    ),
}  # fmt: skip


def other_matrix(text: str) -> str:
    return text.replace("wgmma.mma_async", "mma.sync").replace("v_mfma_f32_32x32x8_bf16", "v_mfma_f32_32x32x8_f16")


SAYS = {name: (target, says) for name, (target, _change, says) in BROKEN.items()}
SAYS |= {f"matrix of {target}": (target, r"^matrix instructions \S+ where \S+ is due") for target in (NVIDIA, AMD)}
SAYS |= {
    f"resources of {target}": (target, r"^1000000 bytes of shared memory, \w+ has \d+; 100 bytes of registers spilled")
    for target in (NVIDIA, AMD)
}
SAYS |= dict.fromkeys(
    ("rms_norm", "split_k"), (NVIDIA, r"^machine code: elements of (normed|hidden) left unrounded: 1( .2 times.)?$")
)


def broken(target: str) -> Iterator[dict]:
    """The machine code of a right kernel, changed as a compiler could have, and what takes too much."""
    plan = PLANS["hf"].plan
    head, fused = compile_head_norm(plan, target), compile_norm_qkv(plan, target)
    yield {"fault": "", **audit_compiled(head, plan, {})}
    for name, (where, change, _) in BROKEN.items():
        if where == target:
            yield changed(name, head, change, {})
    much = dataclasses.replace(head, shared=10**6, spills=100)
    yield {"fault": f"resources of {target}", **audit_compiled(much, plan, {})}
    yield changed(f"matrix of {target}", fused, other_matrix, {})
    if target == NVIDIA:
        for which in range(0, len(re.findall(ADDEND + "32767;", fused.asm["ptx"])), 17):  # of every boundary
            yield changed("one element", fused, other_addend(which), {})
        both = {"stores": "both"}
        yield changed("rms_norm", compile_rms_norm(plan, target, **both), other_addend(), both)
        yield changed("split_k", compile_norm_qkv(plan, target, **SHARES), other_addend(), SHARES)


@pytest.mark.parametrize("target", [NVIDIA, AMD])
def test_faults_of_a_compiler_turn_red(target: str, tmp_path: Path):
    rows = in_process(broken, target, cache=tmp_path)
    assert [row["fault"] for row in rows if row["status"] == "ok"] == [""]
    elements = [row["reason"] for row in rows if row["fault"] == "one element"]
    reasons = {row["fault"]: row["reason"] for row in rows if row["fault"] not in ("", "one element")}
    assert reasons.keys() == {fault for fault, (where, _) in SAYS.items() if where == target}
    for fault, reason in reasons.items():
        assert re.search(SAYS[fault][1], reason), f"{fault}: {reason}"
    if target == NVIDIA:
        found = [re.fullmatch(r"machine code: elements of (\w+) left unrounded: 1", reason)[1] for reason in elements]
        assert set(found) == {"normed", "hidden", "proj", "head_normed", "out"} and len(found) == 16


# ---------------------------------------------------------------- fusion


def fusing(target: str) -> Iterator[dict]:
    """Kernels of this repository, compiled with the fusion that they turn off."""
    compile_ = triton.compile
    triton.compile = lambda source, target, options: compile_(source, target, {**options, "enable_fp_fusion": True})
    for kernel, plan in (("norm_qkv", "hf"), ("norm_qkv", "bf16-statistics"), ("norm_qkv", "fp32-tf32x3")):
        yield audit_case(target, kernel, plan, FEW)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_roundings_by_integers_survive_fusion(target: str, tmp_path: Path):
    """What is fused then are products that no plan rounds: squares into their sum, and with tf32x3 hidden, of whose
    remainder fma(normed, w, -high) is another value."""
    fused, rounded, tf32x3 = in_process(fusing, target, cache=tmp_path)
    for row in (fused, rounded, tf32x3):
        assert {word.split()[-2] for word in row["declared"].split(", ")} == {
            word.split()[0] for word in row["machine"].split(", ")
        }
    assert fused["fused"] and tf32x3["fused"] and not rounded["fused"]
    for row in (fused, tf32x3):
        assert re.fullmatch(r"machine code: multiply-adds fused that TTIR has apart: \d+, at [\w.]+:\d+", row["reason"])
    assert rounded["status"] == "ok"
