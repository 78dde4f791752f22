"""Other people's kernels, and what cannot be audited. Needs no GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import triton
import triton.language as tl
from audit_support import in_process

from castpoint.harness.audit.foreign import NOT_JUDGED, audit_foreign
from castpoint.harness.audit.kernels import audit_case


@triton.jit
def product_and_sum(a_ptr, b_ptr, c_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(a_ptr + offs, mask=offs < n).to(tl.float32)
    b = tl.load(b_ptr + offs, mask=offs < n).to(tl.float32)
    c = tl.load(c_ptr + offs, mask=offs < n).to(tl.float32)
    product = (a * b).to(tl.bfloat16).to(tl.float32)
    tl.store(out_ptr + offs, (product + c).to(tl.bfloat16), mask=offs < n)


@triton.jit
def rms_norm(x_ptr, w_ptr, out_ptr, eps, D: tl.constexpr, BLOCK: tl.constexpr = 1024):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < D, other=0.0).to(tl.float32)
    normed = (x * tl.rsqrt(tl.sum(x * x) / D + eps)).to(tl.bfloat16)
    tl.store(out_ptr + offs, normed * tl.load(w_ptr + offs, mask=offs < D), mask=offs < D)


@triton.jit
def product(a_ptr, b_ptr, out_ptr, K, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(0, K, BLOCK):
        a = tl.load(a_ptr + offs[:, None] * K + k + offs[None, :])
        b = tl.load(b_ptr + (k + offs[:, None]) * BLOCK + offs[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(out_ptr + offs[:, None] * BLOCK + offs[None, :], acc.to(tl.bfloat16, fp_downcast_rounding="rtz"))


@triton.jit
def opaque(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(n):
        total = (total + x).to(tl.bfloat16).to(tl.float32)
    doubled = tl.inline_asm_elementwise("add.f32 $0, $1, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    while n > 0:
        doubled *= 2.0
        n -= 1
    tl.atomic_add(out_ptr + offs, total * doubled)
    bits = (x.to(tl.uint32, bitcast=True) + 0x8000) & 0xFFFF0000
    tl.store(out_ptr + BLOCK + offs, bits.to(tl.float32, bitcast=True))


@triton.autotune(configs=[triton.Config({"BLOCK": 128})], key=["n"])
@triton.heuristics({"D": lambda arguments: 100})
@triton.autotune(configs=[triton.Config({}, num_warps=4)], key=["n"])
@triton.jit
def wrapped(x_ptr, out_ptr, n, D: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, (tl.load(x_ptr + offs) * 3.0).to(tl.bfloat16), mask=(offs < D) & (offs < n))


no_kernel = 3


@triton.jit
def moves_bits(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Assembly that rounds nothing returns bf16, and reads a value that was rounded before."""
    offs = tl.arange(0, BLOCK)
    x = (tl.load(x_ptr + offs) * 3.0).to(tl.bfloat16)
    y = tl.inline_asm_elementwise("mov.b32 $0, $1; // a : b", "=r,r", [x], tl.bfloat16, is_pure=True, pack=2)
    tl.store(out_ptr + offs, y)


@triton.jit
def truncates(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Assembly rounds in its own way, and adds in bf16."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs) * 3.0
    y = tl.inline_asm_elementwise("cvt.rz.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], tl.bfloat16, is_pure=True, pack=2)
    z = tl.inline_asm_elementwise("add.rn.bf16x2 $0, $1, $1;", "=r,r", [y], tl.bfloat16, is_pure=True, pack=2)
    tl.store(out_ptr + offs, z)


@triton.jit
def multiplies_and_adds(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    y = tl.inline_asm_elementwise("fma.rn.f32 $0, $1, $1, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    tl.store(out_ptr + offs, y.to(tl.bfloat16))


@triton.jit
def loses_a_rounding(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Fused, product_and_sum's product loses its rounding; the assembly beside it is no excuse."""
    offs = tl.arange(0, BLOCK)
    a = tl.load(x_ptr + offs).to(tl.bfloat16).to(tl.float32)
    b = tl.load(x_ptr + BLOCK + offs).to(tl.bfloat16).to(tl.float32)
    c = tl.load(x_ptr + 2 * BLOCK + offs).to(tl.bfloat16).to(tl.float32)
    y = tl.inline_asm_elementwise("ex2.approx.f32 $0, $1;", "=f,f", [c], tl.float32, is_pure=True, pack=1)
    tl.store(out_ptr + offs, ((a * b).to(tl.bfloat16).to(tl.float32) + c).to(tl.bfloat16))
    tl.store(out_ptr + BLOCK + offs, y.to(tl.bfloat16))


THREE = "*bf16,*bf16,*bf16,*bf16,i32"


def foreign(target: str) -> Iterator[dict]:
    for fusion in (True, False):
        yield audit_foreign(f"{__name__}:product_and_sum", target, THREE, ["BLOCK=1024"], fp_fusion=fusion)
    yield audit_foreign(f"{__name__}:rms_norm", target, "*bf16:16,*bf16:16,*bf16:16,fp32", ["D=1000"], fp_fusion=False)
    yield audit_foreign(f"{__name__}:product", target, "*fp32:16,*fp32:16,*bf16:16,i32:16", ["BLOCK=64", "num_warps=8"])
    yield audit_foreign(f"{__name__}:opaque", target, "*fp32,*fp32,i32", ["BLOCK=128"])


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_foreign_kernels(target: str, tmp_path: Path):
    fused, apart, norm, matmul, blind = in_process(foreign, target, cache=tmp_path)
    for row in (fused, apart):
        assert row["ttir"] == "product bf16-rne, unclassified bf16-rne"
        assert re.match(
            r"bf16-rne of a product for arith.addf, at test_foreign.py:\d+; bf16-rne of unclass", row["roundings"]
        )
    if target == "gfx942":  # which has no multiply-add in bf16
        assert (fused["status"], fused["fused"], fused["machine"]) == ("reported", 0, apart["machine"])
    else:
        assert (fused["status"], fused["fused"], fused["machine"]) == ("red", 8, "unclassified 8")
        assert fused["reason"] == "machine code: a product is not rounded, TTIR says bf16-rne"
        assert apart["machine"] == "product 8, unclassified 8"
    assert (apart["status"], apart["fused"], apart["reason"]) == ("reported", 0, "")

    assert (norm["status"], norm["ttir"]) == ("reported", "normed bf16-rne, hidden bf16-rne")
    assert re.fullmatch(r"normed (\d), hidden \1", norm["machine"])
    assert "bf16-rne of normed for hidden, at test_foreign.py" in norm["roundings"]

    assert (matmul["status"], matmul["ttir"], matmul["matmul"]) == ("reported", "proj bf16-rtz", "tf32")
    assert re.search("tf32|xf32", matmul["matrix"]) and matmul["machine"].startswith("proj ")
    assert blind["not_followed"] == (
        "tt.elementwise_inline_asm, scf.while, tt.atomic_rmw, a rounding that a loop carries around, of arith.addf"
    )
    assert "unknown arithmetic on bits of load x_ptr for out_ptr" in blind["roundings"]


# ---------------------------------------------------------------- under decorators, and inline assembly


def decorated() -> Iterator[dict]:
    for module in (__name__, str(Path(__file__))):
        yield audit_foreign(f"{module}:wrapped", "sm_90", "*fp32,*bf16,i32", ["D=100", "BLOCK=128"])


def test_a_kernel_under_autotune_and_heuristics_is_found(tmp_path: Path):
    for row in in_process(decorated, cache=tmp_path):
        assert (row["status"], row["ttir"], row["machine"]) == ("reported", "unclassified bf16-rne", "unclassified 1")


ASSEMBLED = ("moves_bits", "truncates", "multiplies_and_adds", "loses_a_rounding")


def assembled() -> Iterator[dict]:
    for name in ASSEMBLED:
        for fusion in (True, False):
            row = audit_foreign(f"{__name__}:{name}", "sm_90", "*fp32,*bf16", ["BLOCK=128"], fp_fusion=fusion)
            yield {"name": name, "fusion": fusion, **row}


def test_inline_assembly_is_not_followed_and_makes_no_row_red(tmp_path: Path):
    rows = {(row["name"], row["fusion"]): row for row in in_process(assembled, cache=tmp_path)}
    lost = rows.pop(("loses_a_rounding", True))
    assert lost["status"] == "red"
    assert lost["reason"] == f"machine code: a product is not rounded, TTIR says bf16-rne; {NOT_JUDGED}"
    for key, row in rows.items():
        assert (row["status"], row["reason"]) == ("reported", NOT_JUDGED), f"{key}: {row['status']} {row['reason']}"
        assert row["not_followed"].endswith("tt.elementwise_inline_asm")
    assert "bf16-rne of unclassified arith.mulf for tt.elementwise_inline_asm" in rows["moves_bits", True]["roundings"]


# ---------------------------------------------------------------- what does not fit


REFUSED = {  # arguments of audit_foreign, and the sentence
    "no target": (("a:b", "sm_70", "", []), "unknown target 'sm_70': targets are sm_80, sm_90, sm_100, gfx942"),
    "no function": (("test_foreign", "sm_90", "", []), "'test_foreign' is not MODULE:FUNCTION, such as .*"),
    "no module": (("nowhere:f", "sm_90", "", []), "nowhere:f cannot be imported: .*No module named 'nowhere'"),
    "no name": (
        (f"{__name__}:nothing", "sm_90", "", []),
        f"{__name__}:nothing cannot be imported: AttributeError.*nothing.*",
    ),
    "no kernel": (
        (f"{__name__}:refused", "sm_90", "", []),
        f"{__name__}:refused is a function, not a function under @triton.jit",
    ),
    "no function at all": (
        (f"{__name__}:no_kernel", "sm_90", "", []),
        f"{__name__}:no_kernel is of type int, which cannot be called",
    ),
    "no constant": ((f"{__name__}:rms_norm", "sm_90", "*bf16", []), "rms_norm needs a value for D: give D=VALUE"),
    "no value": ((f"{__name__}:rms_norm", "sm_90", "*bf16", ["D"]), "a constant is written NAME=VALUE, not 'D'"),
    "no argument": (
        (f"{__name__}:rms_norm", "sm_90", "", ["D=8", "E=1"]),
        "rms_norm has no argument E: it has x_ptr, .*",
    ),
    "too few types": (
        (f"{__name__}:rms_norm", "sm_90", "*bf16,*bf16", ["D=8"]),
        "rms_norm needs 4 types, for x_ptr, w_ptr, out_ptr, eps; 2 are given",
    ),
    "no type": (
        (f"{__name__}:rms_norm", "sm_90", "*bf16,*bfloat16,*bf16,fp32", ["D=8"]),
        "unknown type '\\*bfloat16': types are written like .*",
    ),
}


def refused() -> Iterator[dict]:
    for name, (arguments, _) in REFUSED.items():
        try:
            audit_foreign(*arguments)
        except ValueError as error:
            yield {"name": name, "says": str(error)}
    for arguments in (("sm_70", "norm_qkv", "hf", {}), ("sm_90", "rope", "hf", {})):
        try:
            audit_case(*arguments)
        except ValueError as error:
            yield {"name": arguments[1], "says": str(error)}


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path):
    says = {row["name"]: row["says"] for row in in_process(refused, cache=tmp_path)}
    wanted = {name: sentence for name, (_, sentence) in REFUSED.items()}
    wanted |= {
        "norm_qkv": "unknown target 'sm_70': .*",
        "rope": "unknown kernel 'rope': kernels are norm_qkv, rms_norm, head_norm, quantised",
    }
    assert says.keys() == wanted.keys()
    for name, sentence in wanted.items():
        assert re.fullmatch(sentence, says[name]), says[name]


def unnumbered() -> Iterator[dict]:
    try:
        audit_case("sm_90", "head_norm", "hf", {})
    except ValueError as error:
        yield {"says": str(error)}


def test_kernels_without_line_numbers_are_refused(tmp_path: Path):
    (row,) = in_process(unnumbered, cache=tmp_path, TRITON_DISABLE_LINE_INFO="1")
    assert row["says"] == "the kernel was compiled without line numbers: unset TRITON_DISABLE_LINE_INFO"


def test_interpreted_kernels_are_refused():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 cannot be compiled"):
        audit_case("sm_90", "norm_qkv", "hf", {})
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 cannot be compiled"):
        audit_foreign("castpoint.kernels.head_norm:head_norm_kernel", "sm_90", "")
