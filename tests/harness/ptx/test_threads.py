"""Memory, threads that part, whole warps, products of matrices: each against what the PTX ISA says in words."""

import functools
import itertools

import numpy as np
import pytest
import torch
from ptx_support import THREADS, computed, ints, run, signed, words

from castpoint.harness.ptx import matrix
from castpoint.harness.ptx.memory import Shared
from castpoint.harness.ptx.numbers import Unsupported


def test_threads_that_part_in_a_loop_join_again():
    """Thread i adds i + (i - 1) + ... + 1, then all of a warp add up: a sum of 32 threads that came at other times."""
    out = torch.zeros(3 * THREADS, dtype=torch.int32)
    body = """
        and.b32 %r5, %r4, 63; mov.b32 %r6, 0;
        setp.eq.s32 %p1, %r5, 0;
        @%p1 bra $L__done;
    $L__loop:
        add.s32 %r6, %r6, %r5; add.s32 %r5, %r5, -1;
        setp.ne.s32 %p1, %r5, 0;
        @%p1 bra $L__loop;
    $L__done:
        shfl.sync.bfly.b32 %r7, %r6, 16, 31, -1;
        bar.sync 0;
        st.global.b32 [%rd1], %r7;
    """
    run(body, out, programs=3)
    triangle = np.arange(64) * (np.arange(64) + 1) // 2
    assert out.tolist() == np.tile(triangle[np.arange(64) ^ 16], 3).tolist()


def test_threads_that_end_early_write_nothing_more():
    out = torch.zeros(THREADS, dtype=torch.int32)
    run("setp.gt.u32 %p1, %r1, 9; @%p1 ret; add.s32 %r5, %r1, 1; st.global.b32 [%rd1], %r5;", out)
    assert out.tolist() == [*range(1, 11), *[0] * 54]


def test_shared_memory_belongs_to_a_program_and_starts_as_nan():
    out, other = (torch.zeros(4 * THREADS, dtype=torch.int32) for _ in range(2))
    body = """
        shl.b32 %r5, %r1, 2; mov.b32 %r8, global_smem; add.s32 %r5, %r5, %r8;
        ld.shared.b32 %r6, [%r5]; st.global.b32 [%rd1], %r6;
        st.shared.b32 [%r5], %r4; bar.sync 0;
        xor.b32 %r5, %r5, 4; ld.shared.b32 %r6, [%r5]; st.global.b32 [%rd2], %r6;
    """
    run(body, out, other, programs=4, shared=4 * THREADS)
    assert (out == -1).all() and other.tolist() == [n ^ 1 for n in range(4 * THREADS)]


def test_parts_of_memory():
    values = ints(np.arange(128, 128 + 4 * 16) * 0x01010101)
    out = torch.zeros(4 * 16, dtype=torch.int32)
    body = """
        mul.wide.u32 %rd3, %r1, 12; add.s64 %rd1, %rd1, %rd3; add.s64 %rd2, %rd2, %rd3;
        ld.global.L1::evict_last.v2.b32 {%r5, %r6}, [%rd1 + 8];
        createpolicy.fractional.L2::evict_last.b64 %rd4, 1.0;
        ld.global.L2::cache_hint.b16 {%rs1}, [%rd1], %rd4; ld.global.s8 %r7, [%rd1 + 3];
        cvt.u32.u16 %r8, %rs1;
        st.global.v4.b32 [%rd2], {%r6, %r5, %r8, %r7};
    """
    run(body, values, out, threads=16)
    rows = (np.arange(128, 192) * 0x01010101).reshape(16, 4)
    expected = np.stack([rows[:, 3], rows[:, 2], rows[:, 0] & 0xFFFF, rows[:, 0] >> 24 | 0xFFFFFF00], 1)
    assert words(out).tolist() == expected.reshape(-1).tolist()


def test_a_copy_fills_up_with_zeros():
    source, out = ints(np.arange(1, 4 * 32 + 1)), torch.zeros(4 * 32, dtype=torch.int32)
    body = """
        mul.wide.u32 %rd3, %r1, 12; add.s64 %rd1, %rd1, %rd3; add.s64 %rd2, %rd2, %rd3; shl.b32 %r5, %r1, 4;
        setp.lt.u32 %p1, %r1, 8; selp.b32 %r6, 8, 16, %p1;
        cp.async.cg.shared.global [%r5 + 0], [%rd1 + 0], 0x10, %r6; cp.async.commit_group; cp.async.wait_group 0;
        ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [%r5]; st.global.v4.b32 [%rd2], {%r5, %r6, %r7, %r8};
    """
    run(body, source, out, threads=32, shared=512)
    expected = np.arange(1, 129).reshape(32, 4)
    expected[:8, 2:] = 0
    assert out.tolist() == expected.reshape(-1).tolist()


def test_tensors_that_overlap_or_begin_between_words():
    """A storage whose first byte is not at a multiple of four, and two of one array."""
    raw = bytearray(4096)
    start = 2 - (torch.frombuffer(raw, dtype=torch.uint8).data_ptr() % 4)
    whole = torch.frombuffer(raw, dtype=torch.int16, offset=start % 4, count=1001)
    assert whole.untyped_storage().data_ptr() % 4 == 2
    inside = whole[1:]
    np.frombuffer(raw, np.int32, count=500, offset=start % 4 + 2)[:] = np.arange(500)
    array = np.zeros(THREADS, np.int32)
    out, same = torch.from_numpy(array), torch.from_numpy(array[THREADS // 2 :])
    run("ld.global.b32 %r5, [%rd1]; add.s32 %r5, %r5, 7; st.global.b32 [%rd2], %r5;", inside, out, same)
    assert out.tolist() == list(range(7, 7 + THREADS))


def test_atomic_sums_tell_each_thread_what_was_there():
    count, out = torch.full([1], 5, dtype=torch.int32), torch.zeros(2 * THREADS, dtype=torch.int32)
    body = """
        ld.param.b64 %rd1, [k_param_0]; setp.eq.u32 %p1, %r1, 3;
        mov.b32 %r5, 0; @%p1 atom.global.gpu.acq_rel.add.u32 %r5, [%rd1], 2; st.global.b32 [%rd2], %r5;
    """
    run(body, count, out, programs=2)
    assert count.item() == 9 and out[3] == 5 and out[THREADS + 3] == 7 and out.count_nonzero() == 2


def test_sums_of_floats_in_memory():
    total = torch.full([1], 0.5)
    run("ld.param.b64 %rd1, [k_param_0]; red.global.gpu.relaxed.add.f32 [%rd1], 0f3E800000;", total)
    assert total.item() == 0.5 + THREADS / 4


def test_a_scan_of_a_warp():
    out = torch.zeros(THREADS, dtype=torch.int32)
    steps = "".join(
        f"shfl.sync.up.b32 %r6|%p1, %r5, {step}, 0, -1; @%p1 add.s32 %r5, %r5, %r6;" for step in (1, 2, 4, 8, 16)
    )
    run(f"mov.b32 %r5, %r1; {steps} st.global.b32 [%rd1], %r5;", out)
    assert out.tolist() == [n * (n + 1) // 2 - n // 32 * 496 for n in range(THREADS)]


def test_shuffles_from_a_thread():
    out = torch.zeros(THREADS, dtype=torch.int32)
    run("xor.b32 %r5, %r1, 5; shfl.sync.idx.b32 %r6|%p1, %r1, %r5, 31, -1; st.global.b32 [%rd1], %r6;", out)
    assert out.tolist() == [n // 32 * 32 + (n % 32 ^ 5) for n in range(THREADS)]


@pytest.mark.parametrize(
    ("operation", "exact"),
    [
        ("add.s32", lambda v: sum(v)), ("min.s32", lambda v: min(map(signed, v))), ("max.u32", max),
        ("or.b32", lambda v: functools.reduce(int.__or__, v)), ("xor.b32", lambda v: functools.reduce(int.__xor__, v)),
    ],
)  # fmt: skip
def test_reductions_of_a_warp(operation: str, exact):
    values = np.random.default_rng(0).integers(0, 2**32, 64).astype(np.uint32)
    found = computed(f"redux.sync.{operation} %r8, %r5, -1", values).reshape(2, 32)
    for warp, row in zip(found, values.reshape(2, 32), strict=True):
        assert set(warp.tolist()) == {exact([int(v) for v in row]) & 0xFFFFFFFF}


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_go_to_shared_memory_and_back(transposed: bool):
    """Thread 4 g + t of a warp holds elements 2 t and 2 t + 1 of row g, or of column g."""
    out = torch.zeros(4 * 32, dtype=torch.int32)
    trans = ".trans" * transposed
    body = f"""
        mul.wide.u32 %rd3, %r1, 12; add.s64 %rd1, %rd1, %rd3; shl.b32 %r5, %r1, 4;
        shl.b32 %r6, %r1, 3; shl.b32 %r7, %r6, 16; or.b32 %r6, %r6, %r7; add.s32 %r6, %r6, 0x00010000;
        add.s32 %r7, %r6, 0x00020002; add.s32 %r8, %r6, 0x00040004; add.s32 %r2, %r6, 0x00060006;
        st.shared.v4.b32 [%r5], {{%r6, %r7, %r8, %r2}}; bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r6, %r7, %r8, %r2}}, [%r5];
        stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r5], {{%r6, %r7, %r8, %r2}};
        st.global.v4.b32 [%rd1], {{%r6, %r7, %r8, %r2}};
    """
    run(body, out, threads=32, shared=512)
    halves = np.arange(256).reshape(4, 8, 8)  # row n of 16 bytes holds 8 n ... 8 n + 7
    matrices = halves.swapaxes(1, 2) if transposed else halves
    for lane, registers in enumerate(words(out).reshape(32, 4)):
        for n, word in enumerate(registers.tolist()):
            assert [word & 0xFFFF, word >> 16] == matrices[n, lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2].tolist()


# ---------------------------------------------------------------- products of matrices


def test_products_of_tf32_do_not_read_the_low_bits():
    """Thread 4 g + t holds A's rows g and g + 8 at columns t and t + 4, B's column g at rows t and t + 4."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-8, 9, shape).astype(np.float32) for shape in ((16, 8), (8, 8)))
    g, t = np.arange(32) // 4, np.arange(32) % 4
    low = np.uint32(0x1FFF)
    left = [
        (a[row, column].view(np.uint32) | low)[None] for row, column in ((g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4))
    ]
    right = [(b[t + 4 * n, g].view(np.uint32) | low)[None] for n in (0, 1)]
    start = [np.full((1, 32), n, np.float32).view(np.uint32) for n in range(4)]
    found = matrix.mma("tf32", left, right, start)
    for n, (row, column) in enumerate(((g, 2 * t), (g, 2 * t + 1), (g + 8, 2 * t), (g + 8, 2 * t + 1))):
        assert found[n].view(np.float32)[0].tolist() == ((a @ b)[row, column] + n).tolist()


@pytest.mark.parametrize("line", [128, 64, 32])
def test_a_descriptor_names_rows_in_parts_that_are_exchanged(line: int):
    """8 rows of so many bytes, and the next 8 rows elsewhere: the part of 16 bytes lies at its number, exclusive or the
    number of the row (of each 128 bytes)."""
    values = (np.arange(64 * 16) % 251).reshape(64, 16).astype(np.float32)
    shared, stride, start = Shared(1, 1 << 15), 8 * line + 1024, 2048
    for row in range(64):
        for column in range(16):
            place = start + row // 8 * stride + row % 8 * line + 2 * column
            place ^= (place // 128 % (line // 16)) * 16
            shared.store(
                np.array([0]),
                np.array([place]),
                (values[row, column : column + 1].view(np.uint32) >> 16).astype(np.uint16),
                16,
            )
    swizzle = {128: 1, 64: 2, 32: 3}[line]
    descriptor = np.array([start // 16 | stride // 16 << 32 | swizzle << 62], np.uint64)
    assert matrix.described(shared, np.array([0]), descriptor, 64)[0].tolist() == values.tolist()
    for wrong in (descriptor & np.uint64((1 << 62) - 1), descriptor | np.uint64(1 << 49)):
        with pytest.raises(Unsupported, match="a matrix descriptor without swizzle, or with a base offset"):
            matrix.described(shared, np.array([0]), wrong, 64)


@pytest.mark.parametrize("keep", [True, False])
def test_products_of_warp_groups(keep: bool):
    rng = np.random.default_rng(1)
    a, b = (rng.integers(-8, 9, (1, rows, 16)).astype(np.float64) for rows in (64, 24))
    start = np.arange(12 * 128, dtype=np.float32).reshape(12, 1, 128)
    found = matrix.wgmma(a, b, list(start.view(np.uint32)) if keep else None, 24)
    for n, thread in itertools.product(range(12), range(128)):
        row = thread // 32 * 16 + thread % 32 // 4 + 8 * (n // 2 % 2)
        column = 8 * (n // 4) + thread % 4 * 2 + n % 2
        assert found[n].view(np.float32)[0, thread] == a[0, row] @ b[0, column] + (start[n, 0, thread] if keep else 0)
