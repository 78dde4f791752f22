"""Threads that part and meet, and where memory lies: each against what the PTX ISA says in words."""

import numpy as np
import pytest
import torch
from ptx_support import THREADS, ints, run, words

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


def test_a_scan_of_a_warp():
    out = torch.zeros(THREADS, dtype=torch.int32)
    steps = "".join(
        f"shfl.sync.up.b32 %r6|%p1, %r5, {step}, 0, -1; @%p1 add.s32 %r5, %r5, %r6;" for step in (1, 2, 4, 8, 16)
    )
    run(f"mov.b32 %r5, %r1; {steps} st.global.b32 [%rd1], %r5;", out)
    assert out.tolist() == [n * (n + 1) // 2 - n // 32 * 496 for n in range(THREADS)]


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
