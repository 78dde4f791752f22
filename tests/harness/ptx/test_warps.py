"""Every instruction of whole warps in isa.TABLE: against the ISA's loops over lanes, and products of whole numbers."""

import functools

import numpy as np
import pytest
from ptx_isa import definition
from ptx_support import ints, run, words

from castpoint.harness.ptx import isa

WORDS = np.random.default_rng(5).integers(0, 1 << 32, 64).astype(np.uint32)


def opcodes(name: str) -> list[str]:
    return sorted({opcode for opcode in isa.opcodes() if opcode.split(".")[0] == name})


def lane_of(mode: str, lane: int, by: int) -> tuple[int, bool]:
    """The lane read, and whether there is one."""
    by &= 31
    source = {"up": lane - by, "bfly": lane ^ by, "idx": by}[mode]
    there = source >= 0 if mode == "up" else source <= 31
    return (source if there else lane), there


@pytest.mark.parametrize("pair", [True, False])
def test_shuffles(pair: bool):
    for opcode in opcodes("shfl"):
        mode = opcode.split(".")[2]
        for by in (*range(33), 63, 0xFFFFFFFF):
            body = f"ld.global.b32 %r5, [%rd1]; mov.b32 %r7, {by}; setp.eq.b32 %p1, %r1, %r1;"
            body += f"{opcode} %r6{'|%p1' * pair}, %r5, %r7, {0 if mode == 'up' else 31}, 0xffffffff;"
            body += "selp.b32 %r8, 1, 0, %p1;"
            values, found, told = ints(WORDS), ints([0] * 64), ints([0] * 64)
            run(f"{body} st.global.b32 [%rd2], %r6; st.global.b32 [%rd3], %r8;", values, found, told)
            expected = [lane_of(mode, n % 32, by) for n in range(64)]
            assert words(found).tolist() == [WORDS[n // 32 * 32 + source] for n, (source, _) in enumerate(expected)], by
            assert words(told).tolist() == [int(there or not pair) for _, there in expected], (opcode, by)


@pytest.mark.parametrize("values", [WORDS, WORDS >> 31, WORDS | 0xFF, np.arange(64) - 40], ids=range(4))
def test_reductions(values: np.ndarray):
    for opcode in opcodes("redux"):
        _, _, name, kind = opcode.split(".")
        values, found = values.astype(np.uint32), ints([0] * 64)
        run(f"ld.global.b32 %r5, [%rd1]; {opcode} %r6, %r5, -1; st.global.b32 [%rd2], %r6;", ints(values), found)
        step = definition(f"{name}.{kind}").of
        for n in (0, 32):
            expected = functools.reduce(lambda a, b: step(a, b) & 0xFFFFFFFF, values[n : n + 32].tolist())
            assert set(words(found)[n : n + 32].tolist()) == {expected}, opcode


def written(opcode: str) -> str:
    return opcode.replace("shared_cta", "shared::cta")


@pytest.mark.parametrize("name", ["ldmatrix", "stmatrix"])
def test_matrices_in_shared_memory(name: str):
    """Thread 4 g + t holds elements 2 t and 2 t + 1 of row g, transposed those of column g; threads 8 n ... 8 n + 7
    name the rows of matrix n, whose 16 bytes are at any place: here the thread's number, times 5, modulo 32."""
    for opcode in opcodes(name):
        count, transposed = int(opcode.split("m8n8.x")[1][0]), "trans" in opcode
        halves = np.random.default_rng(count).integers(0, 1 << 16, (4, 8, 8))
        placed, held = np.zeros((32, 8), np.uint16), np.zeros((32, 4), np.uint32)
        for lane in range(32):
            placed[lane * 5 % 32] = halves[lane // 8, lane % 8]
            for n in range(count):
                g, t = lane // 4, lane % 4
                low, high = ((halves[n, 2 * t + k, g] if transposed else halves[n, g, 2 * t + k]) for k in (0, 1))
                held[lane, n] = low | high << 16
        rows = "mul.wide.u32 %rd8, %r1, 12; add.s64 %rd1, %rd1, %rd8; add.s64 %rd2, %rd2, %rd8; shl.b32 %r2, %r1, 4;"
        place = "mul.lo.s32 %r3, %r1, 5; and.b32 %r3, %r3, 31; shl.b32 %r3, %r3, 4;"
        four, listed = "{%r5, %r6, %r7, %r8}", f"{{{', '.join(f'%r{5 + n}' for n in range(count))}}}"
        zeros = "".join(f"mov.b32 %r{5 + n}, 0;" for n in range(4))
        if name == "ldmatrix":
            given, expected = placed.view(np.uint32), held
            body = f"ld.global.v4.b32 {four}, [%rd1]; st.shared.v4.b32 [%r2], {four}; bar.sync 0; {zeros}"
            body += f"{written(opcode)} {listed}, [%r3]; st.global.v4.b32 [%rd2], {four};"
        else:
            given, expected = held, placed.view(np.uint32).copy()
            expected[[lane * 5 % 32 for lane in range(8 * count, 32)]] = 0
            body = f"{zeros} st.shared.v4.b32 [%r2], {four}; bar.sync 0; ld.global.v4.b32 {four}, [%rd1];"
            body += f"{written(opcode)} [%r3], {listed};"
            body += f"ld.shared.v4.b32 {four}, [%r2]; st.global.v4.b32 [%rd2], {four};"
        out = ints([0] * 128)
        run(f"{rows} {place} {body}", ints(given.reshape(-1)), out, threads=32, shared=512)
        assert np.array_equal(words(out).reshape(32, 4), expected), opcode


# ---------------------------------------------------------------- products


def bf16_bits(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint32)


def whole_numbers(rows: int, columns: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-8, 9, (rows, columns))


def added(products: np.ndarray, start: np.ndarray) -> np.ndarray:
    return (products + start).astype(np.float32).view(np.uint32)


@pytest.mark.parametrize("kind", ["bf16", "tf32"])
def test_products_of_warps(kind: str):
    """mma: thread 4 g + t holds rows g and g + 8 of A, column g of B, a register at columns 2 t and 2 t + 1 of each
    eight in bf16, t of each four in tf32, whose low 13 bits are not read. Of three warps the first is elsewhere."""
    (opcode,) = [each for each in opcodes("mma") if kind in each]
    depth = 16 if kind == "bf16" else 8
    problems = [(whole_numbers(16, depth, n), whole_numbers(depth, 8, n + 3), whole_numbers(16, 8, n + 6))
                for n in range(3)]  # fmt: skip
    held = np.zeros((96, 12), np.uint32)
    for thread in range(96):
        g, t, (a, b, start) = thread % 32 // 4, thread % 4, problems[thread // 32]
        for n in range(4):
            row, block = g + 8 * (n % 2), n // 2
            held[thread, n] = word(kind, a[row], block, t)
            held[thread, 6 + n] = np.float32(start[g + 8 * (n // 2), 2 * t + n % 2]).view(np.uint32)
        held[thread, 4:6] = [word(kind, b[:, g], block, t) for block in (0, 1)]
    loads = "".join(f"ld.global.b32 %q{n}, [%rd1 + {4 * n}];" for n in range(12))
    body = f".reg .b32 %q<12>; mul.wide.u32 %rd8, %r1, 44; add.s64 %rd1, %rd1, %rd8; {loads}"
    c = "{%q6, %q7, %q8, %q9}"
    body += "setp.lt.u32 %p1, %r1, 32; @%p1 bra $L__end;"
    body += f"{opcode} {c}, {{%q0, %q1, %q2, %q3}}, {{%q4, %q5}}, {c}; $L__end:"
    body += "".join(f"st.global.b32 [%rd1 + {4 * n}], %q{6 + n};" for n in range(4))
    memory = ints(held.reshape(-1))
    run(body, memory, threads=96)
    products = [np.zeros((16, 8)), *(a @ b for a, b, _ in problems[1:])]
    for thread, found in enumerate(words(memory).reshape(96, 12)[:, :4]):
        g, t, expected = thread % 32 // 4, thread % 4, added(products[thread // 32], problems[thread // 32][2])
        assert found.tolist() == [expected[g + 8 * (n // 2), 2 * t + n % 2] for n in range(4)]


def word(kind: str, row: np.ndarray, block: int, t: int) -> int:
    if kind == "tf32":
        return int(np.float32(row[4 * block + t]).view(np.uint32)) | 0x1ABC
    low, high = bf16_bits(row[8 * block + 2 * t : 8 * block + 2 * t + 2]).tolist()
    return low | high << 16


@pytest.mark.parametrize(("registers", "keep"), [(False, "1"), (True, "%p1"), (False, "%p2")])
def test_products_of_warp_groups(registers: bool, keep: str):
    """wgmma of every width, A in registers or, as B, in shared memory in rows of 32 bytes, whose halves are exchanged
    in the second four of each eight. Warp w holds rows 16 w ... of the accumulators, as mma's fragments, eight columns
    after eight."""
    for opcode in opcodes("wgmma"):
        if "mma_async" not in opcode:
            continue
        columns = int(opcode.split("m64n")[1].split("k16")[0])
        a, b = whole_numbers(64, 16, 4), whole_numbers(columns, 16, 5)
        rows = np.concatenate([bf16_bits(b), bf16_bits(a)]).astype(np.uint16).reshape(-1, 2, 8)
        rows[4::8], rows[5::8], rows[6::8], rows[7::8] = (rows[n::8, ::-1].copy() for n in (4, 5, 6, 7))
        source = ints(np.concatenate([rows.reshape(-1).view(np.uint32), left_registers(a).reshape(-1)]))
        count, out = columns // 2, ints([0] * 128 * (columns // 2))
        names = [f"%q{n}" for n in range(count)]
        body = ".reg .b32 %q<128>; .reg .b64 %d<2>; ld.param.b64 %rd1, [k_param_0]; mov.b32 %r5, 0;"
        body += copied(len(rows) * 32)
        body += "".join(f"cvt.rn.f32.s32 {name}, {n + 1};" for n, name in enumerate(names))
        # address / 16, and 256 / 16 bytes from eight rows to the next, rows of 32 bytes
        body += f"mov.b64 %d0, {16 << 32 | 3 << 62}; mov.b64 %d1, {columns * 2 | 16 << 32 | 3 << 62};"
        body += f"mad.wide.u32 %rd8, %r1, 16, %rd1; ld.global.v4.b32 {{%r5, %r6, %r7, %r8}}, [%rd8 + {len(rows) * 32}];"
        left, signs = ("{%r5, %r6, %r7, %r8}", "1, 1, 0") if registers else ("%d1", "1, 1, 0, 0")
        body += "setp.eq.b32 %p1, %r1, %r1; not.pred %p2, %p1;"
        body += f"wgmma.fence.sync.aligned; {opcode} {{{', '.join(names)}}}, {left}, %d0, {keep}, {signs};"
        body += f"ld.param.b64 %rd2, [k_param_1]; mul.lo.s32 %r5, %r1, {4 * count}; cvt.u64.u32 %rd8, %r5;"
        body += "add.s64 %rd2, %rd2, %rd8;"
        body += "".join(f"st.global.b32 [%rd2 + {4 * n}], {name};" for n, name in enumerate(names))
        run(body, source, out, threads=128, shared=len(rows) * 32)
        products, found = a @ b.T, words(out).reshape(128, count).view(np.float32)
        thread, n = np.ogrid[:128, :count]
        row = thread // 32 * 16 + thread % 32 // 4 + 8 * (n // 2 % 2)
        column = 8 * (n // 4) + thread % 4 * 2 + n % 2
        assert np.array_equal(found, products[row, column] + (n + 1) * (keep != "%p2")), opcode


def copied(size: int) -> str:
    """Thread i copies bytes 16 i ... of every 2,048 to shared memory."""
    one = "@%p1 ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%rd8]; @%p1 st.shared.v4.b32 [%r3], {%r5, %r6, %r7, %r8};"
    steps = "mov.b32 %r6, 0; mov.b32 %r7, 0; mov.b32 %r8, 0; shl.b32 %r3, %r1, 4; mad.wide.u32 %rd8, %r1, 16, %rd1;"
    for _ in range(0, size, 2048):
        steps += f"setp.lt.u32 %p1, %r3, {size}; {one} add.s32 %r3, %r3, 2048; add.s64 %rd8, %rd8, 2048;"
    return steps + "bar.sync 0;"


def left_registers(a: np.ndarray) -> np.ndarray:
    """A's four registers of each of 128 threads."""
    held = np.zeros((128, 4), np.uint32)
    for thread, n in np.ndindex(128, 4):
        row = thread // 32 * 16 + thread % 32 // 4 + 8 * (n % 2)
        held[thread, n] = word("bf16", a[row], n // 2, thread % 4)
    return held
