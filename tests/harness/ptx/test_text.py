"""PTX that cannot be run says why and where, and what is parsed of its text."""

import re

import pytest
import torch
from ptx_support import THREADS, run

from castpoint.harness.ptx.numbers import Unsupported
from castpoint.harness.ptx.program import Address, parse


@pytest.mark.parametrize(
    ("body", "error", "reason"),
    [
        ("ld.global.b32 %r5, [%rd1 + 4];", IndexError, "1 threads reach beyond the tensors"),
        ("st.global.b32 [%rd1 + -4], %r1;", IndexError, "1 threads reach beyond the tensors"),
        ("ld.global.v2.b32 {%r5, %r6}, [%rd1];", IndexError, "8 bytes at an address that is no multiple of 8"),
        ("ld.shared.b32 %r5, [%r1];", IndexError, "4 bytes at an address that is no multiple of 4"),
        (
            "shl.b32 %r5, %r1, 2; st.shared.b32 [%r5 + 4], %r1;",
            IndexError,
            "an address outside of 256 bytes of shared memory",
        ),
        ("mov.u32 %r5, %cluster_ctarank;", Unsupported, "%cluster_ctarank, in k"),
        (
            "setp.lt.u32 %p1, %r1, 9; @%p1 bra $L__a; bar.sync 0; $L__a:",
            Unsupported,
            "a barrier that not all threads",
        ),
        ("setp.lt.u32 %p1, %r1, 9; @%p1 bar.sync 0;", Unsupported, "a barrier that not all threads"),
        ("ld.param.b32 %r5, [other];", Unsupported, "other bits than the first of a parameter"),
        (
            "setp.lt.u32 %p1, %r1, 9; @%p1 shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;",
            Unsupported,
            "a part of a warp",
        ),
        ("shfl.sync.down.b32 %r5, %r1, 1, 31, -1;", Unsupported, "shfl.sync.down.b32 is not known here, in k"),
        ("add.rz.f32 %r5, %r1, %r1;", Unsupported, "add.rz.f32 is not known"),
        ("cvt.rna.tf32.f32 %r5, %r1;", Unsupported, "cvt.rna.tf32.f32 is not known"),
        ("cos.approx.f32 %r5, %r1;", Unsupported, "cos.approx.f32 is not known"),
        ("popc.b32 %r5, %r1;", Unsupported, "popc.b32 is not known"),
        ("add.f64 %rd5, %rd1, %rd1;", Unsupported, "add.f64 is not known"),
        ("ld.local.b32 %r5, [%r1];", Unsupported, "ld.local.b32 is not known"),
        ("mbarrier.init.shared::cta.b64 [%r1], 1;", Unsupported, "mbarrier"),
        ("atom.global.gpu.relaxed.max.u32 %r5, [%rd1], %r1;", Unsupported, "max.u32 is not known"),
        ("cp.async.bulk.shared::cluster.global [%r1], [%rd1], 16, [%r1];", Unsupported, "cluster.global is not known"),
        ("add.sat.s32 %r5, %r1, %r1;", Unsupported, "add.sat.s32 is not known"),
        ("fma.rn.relu.bf16x2 %r5, %r1, %r1, %r1;", Unsupported, "fma.rn.relu.bf16x2 is not known"),
        ("mad.hi.u32 %r5, %r1, %r1, %r1;", Unsupported, "mad.hi.u32 is not known"),
        ("max.f32 %r5, %r1, %r1, %r1;", Unsupported, "max.f32 with other operands"),
        ("shfl.sync.bfly.b32 %r5, %r1, 1, 7, -1;", Unsupported, "shfl within parts of a warp"),
        ("shl.b32 %r5, %r1, 2; ld.shared.b32 %r6, [%r5 + -8];", IndexError, "an address outside of 256 bytes"),
        ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r1];", IndexError, "16 bytes at an address that is no"),
        ("mov.b32 %r5, 0; cp.async.ca.shared.global [%r5], [%rd1 + 2], 4;", IndexError, "4 bytes at an address that"),
        (
            "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1,%r1,%r1,%r1}, %rd1, %rd1, 1, 1, 1, 0, 1;",
            Unsupported,
            "wgmma of a transposed matrix",
        ),
        (
            "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1,%r1,%r1,%r1}, %rd1, %rd1, 1, -1, 1, 0, 0;",
            Unsupported,
            "wgmma with signs",
        ),
        (
            "setp.lt.u32 %p1, %r1, 9; "
            "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1,%r1,%r1,%r1}, %rd1, %rd1, %p1, 1, 1;",
            Unsupported,
            "a product to which not all threads add",
        ),
    ],
)
def test_what_cannot_be_run_says_where(body: str, error: type[Exception], reason: str):
    out = torch.zeros(THREADS, dtype=torch.int32)
    with pytest.raises(error, match=re.escape(reason)) as caught:
        run(
            body,
            torch.cat([out, out])[:THREADS] if "wgmma" in body else out,
            shared=256,
            threads=128 if "wgmma" in body else THREADS,
        )
    assert ", in k: " in str(caught.value) and "\n" not in str(caught.value)


def test_parsed_text():
    text = """
    .visible .entry name(
        .param .u64 .ptr .global .align 1 name_param_0,
        .param .f32 name_param_1
    )
    .reqntid 128
    {
        .reg .pred %p<2>;
        .loc 1 20 30 // file.py:20:30
    $L__BB0_1:  // a label
        @!%p1 ld.global.v2.b32 { %r1, %r2 }, [ %rd1 + 16 ];
        // begin inline asm
        { .reg .b16 %t; mov.u32 %r3, 0x10; mov.b32 %r4, 0f3F800000; }
        // end inline asm
        st.shared.b32 [%r4+-8], -1;
        ret;
    $L__end:
    }
    \t.section\t.debug_info
    {
        mov.b32 %never, 0;
    }
    """
    program = parse(text)
    assert program.name == "name" and program.parameters == (("name_param_0", "u64"), ("name_param_1", "f32"))
    assert program.labels == {"$L__BB0_1": 0, "$L__end": 5}
    assert [i.words for i in program.instructions] == [
        ("ld", "global", "v2", "b32"), ("mov", "u32"), ("mov", "b32"), ("st", "shared", "b32"), ("ret",),
    ]  # fmt: skip
    assert [i.operands for i in program.instructions] == [
        (("%r1", "%r2"), Address("%rd1", 16)), ("%r3", 16), ("%r4", 0x3F800000), (Address("%r4", -8), -1), (),
    ]  # fmt: skip
    assert (program.instructions[0].guard, program.instructions[0].unless) == ("%p1", True)


def test_text_that_is_no_kernel():
    with pytest.raises(ValueError, match="no kernel in this PTX"):
        parse(".version 8.0")
    with pytest.raises(ValueError, match="k has a parameter that is neither a number nor a pointer"):
        parse(".entry k(.param .align 64 .b8 k_param_0[128])\n{\nret;\n}")
