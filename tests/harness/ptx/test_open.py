"""What is not in the table, and what the PTX ISA leaves open, is refused, not guessed; and faults that were found."""

import numpy as np
import pytest
import torch
from ptx_isa import definition
from ptx_support import THREADS, computed, run

from castpoint.harness.ptx.numbers import Unsupported

VALUES = np.float32([1.5, -2.5, 300, np.nan])


@pytest.mark.parametrize(
    "instruction",
    [
        "cvt.rz.f32.s32 %r8, %r5", "cvt.rm.f32.s32 %r8, %r5", "cvt.f32.s32 %r8, %r5", "cvt.rn.f32.f32 %r8, %r5",
        "cvt.sat.s32.f32 %r8, %r5", "cvt.sat.u8.s32 %r8, %r5", "cvt.s32.f32 %r8, %r5", "cvt.rn.relu.bf16.f32 %rs1, %r5",
        "cvt.rn.bf16.s64 %rs1, %rd1", "cvt.rzi.ftz.s32.bf16 %r8, %rs1", "redux.sync.add.s32 %r8, %r5, 15",
        "div.f32 %r8, %r5, %r5",
        "add.rz.f32 %r8, %r5, %r5", "mul.sat.f32 %r8, %r5, %r5", "add.ftz.s32 %r8, %r5, %r5",
        "add.lo.s32 %r8, %r5, %r5",
        "add.ftz.bf16x2 %r8, %r5, %r5", "fma.f32 %r8, %r5, %r5, %r5", "max.abs.f32 %r8, %r5, %r5",
        "mul.s32 %r8, %r5, %r5", "mul.hi.f32 %r8, %r5, %r5", "rsqrt.rn.f32 %r8, %r5", "prmt.b32.f4e %r8, %r5, %r5, 0",
        "lop3.or.b32 %r8|%p1, %r5, %r5, %r5, 1, %p2", "setp.lt.b32 %p1, %r5, %r5", "setp.lo.s32 %p1, %r5, %r5",
        "setp.ltu.s32 %p1, %r5, %r5", "setp.lt.s32 %p1|%p2, %r5, %r5", "setp.lt.and.s32 %p1, %r5, %r5",
        "setp.lt.s32 %p1, %r5, %r5, %p2", "selp.b32 %r8, %r5, %r5, %r5", "redux.sync.sub.s32 %r8, %r5, -1",
        "redux.sync.min.f32 %r8, %r5, -1", "bar.red.popc.u32 %r8, 0, %p1", "bar.arrive 0, 64", "bar.sync 0, 64",
        "barrier.cluster.arrive", "mov.u32 %r8, %envreg0", "mov.u64 %rd8, %clock64", "ld.b32 %r8, [%rd1]",
        "ld.global.v2.b32 %r8, [%rd1]", "ld.global.b32 %r8, [%rd1], %rd1", "ld.param.v2.b32 {%r7, %r8}, [k_param_0]",
        "ld.param.b32 %r8, [k_param_0 + 4]", "cp.async.cg.shared.global [%r5], [%rd1], 16, %p1",
        "mov.u32 %r8, !%r5", "mov.u32 %r8, !global_smem",
        "ld.global.b32 %r8, [!%rd1]", "ld.shared.b32 %r8, [!%p1]",
        "atom.global.add.f32 %r8, %rd1, %r5", "shfl.sync.bfly.b32 %r8, %r5, 1, 31, 15",
    ],
)  # fmt: skip
def test_what_is_not_in_the_table_is_refused(instruction: str):
    start = "mov.b32 %r8, 0; mov.b16 %rs1, 0; setp.eq.b32 %p2, %r5, 0; setp.eq.b32 %p1, %r5, 0;"
    with pytest.raises(Unsupported, match=", in k: "):
        computed(f"{start} {instruction}", VALUES)


def test_what_is_not_reached_need_not_be_known():
    run("bra $L__end; bar.red.popc.u32 %r8, 0, %p1; $L__end:", torch.zeros(1))
    run("setp.gt.u32 %p1, %r1, 99; @%p1 bar.red.popc.u32 %r8, 0, %p1; @%p1 bar.sync 0;", torch.zeros(1))
    run("setp.gt.u32 %p1, %r2, 1; @%p1 bar.sync 0;", torch.zeros(64 * 4), programs=4)


def test_not_a_number_is_0_or_the_top_bit_of_64():
    none = np.float32([np.nan])
    for kind in ("s64", "u64"):
        text = f"cvt.rzi.{kind}.f32 %rd8, %r5; shr.u64 %rd8, %rd8, 32; cvt.u32.u64 %r8, %rd8"
        assert computed(text, none).tolist() == [0x80000000]
    assert computed("cvt.rzi.s32.f32 %r8, %r5", none).tolist() == [0]


@pytest.mark.parametrize("word", ["atom", "red"])
def test_sums_in_global_memory_flush_subnormals(word: str):
    """One thread adds to each number: of what is there, of what is added, and of the sum, to a zero of its sign."""
    there = np.uint32([0x00000001, 0x80000001, 0x3F800000, 0x00800000, 0x7F800000, 0x7F800001])
    more = np.uint32([0x80000002, 0x80000000, 0x00000001, 0x80800001, 0xFF800000, 0x3F800000])
    memory, others = (torch.from_numpy(each.view(np.int32).copy()) for each in (there, more))
    first = "%r6, " if word == "atom" else ""
    run(f"ld.global.b32 %r5, [%rd2]; {word}.global.gpu.relaxed.add.f32 {first}[%rd1], %r5;", memory, others, threads=6)
    exact = definition("add.ftz.f32").of
    expected = [exact(a, b) for a, b in zip(there.tolist(), more.tolist(), strict=True)]
    assert memory.numpy().view(np.uint32).tolist() == expected


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_a_division_by_zero_is_refused(kind: str):
    registers = {"16": "%rs1, %rs1, %rs2", "32": "%r5, %r5, %r6", "64": "%rd5, %rd5, %rd6"}[kind[1:]]
    start = "cvt.u16.u32 %rs1, %r1; mov.b16 %rs2, 0; mov.b32 %r5, 7; mov.b32 %r6, 0; mov.b64 %rd5, 7; mov.b64 %rd6, 0;"
    for name in ("div", "rem"):
        with pytest.raises(Unsupported, match="a division by zero"):
            run(f"{start} {name}.{kind} {registers};", torch.zeros(1))
    run(f"{start} setp.gt.u32 %p1, %r1, 99; @%p1 div.{kind} {registers};", torch.zeros(1))


# ---------------------------------------------------------------- registers that were never written


@pytest.mark.parametrize(
    "body",
    [
        "st.global.b32 [%rd1], %r7;",
        "add.s32 %r5, %r7, 1; and.b32 %r5, %r5, 0x10000; st.global.b32 [%rd1], %r5;",
        "setp.lt.u32 %p1, %r1, 9; @%p1 mov.b32 %r7, 3; st.global.b32 [%rd1], %r7;",
        "setp.lt.u32 %p1, %r1, 9; @%p1 mov.b32 %r7, 3; add.s32 %r5, %r7, 1; st.global.b32 [%rd1], %r5;",
        "@%p3 st.global.b32 [%rd1], %r1;",
        "@!%p3 st.global.b32 [%rd1], %r1;",
        "selp.b32 %r5, 1, 2, %p3; st.global.b32 [%rd1], %r5;",
        "max.f32 %r5, %r7, 0f00000000; st.global.b32 [%rd1], %r5;",
        "setp.lt.u32 %p1, %r1, 9; @%p1 bra $L__a; mov.b32 %r7, 3; $L__a: st.global.b32 [%rd1], %r7;",
    ],
)
def test_a_result_that_depends_on_an_unwritten_register_is_refused(body: str):
    with pytest.raises(Unsupported, match=r"k depends on %(r7|p3), read before it is written"):
        run(body, torch.zeros(THREADS, dtype=torch.int32))


@pytest.mark.parametrize(
    "body",
    [
        "selp.b32 %r5, %r1, %r7, 1; st.global.b32 [%rd1], %r5;",
        "and.b32 %r5, %r7, 0; add.s32 %r5, %r5, %r1; st.global.b32 [%rd1], %r5;",
        "setp.lt.u32 %p1, %r1, 9; @%p1 mov.b32 %r7, %r1; selp.b32 %r5, %r7, %r1, %p1; st.global.b32 [%rd1], %r5;",
        "setp.lt.u32 %p1, %r1, 9; @%p1 mov.b32 %r7, %r1; @!%p1 mov.b32 %r7, %r1; st.global.b32 [%rd1], %r7;",
    ],
)
def test_an_unwritten_register_may_be_read_where_it_does_not_matter(body: str):
    """The sum in memory is formed once, whether the kernel ran once or more often."""
    out, count = torch.zeros(THREADS, dtype=torch.int32), torch.zeros(THREADS, dtype=torch.int32)
    run(f"{body} red.global.gpu.relaxed.add.u32 [%rd2], 1;", out, count)
    assert out.tolist() == list(range(THREADS)) and count.tolist() == [1] * THREADS
