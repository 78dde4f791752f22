"""Every load, store, copy and sum in memory of isa.TABLE, and what orders them, against Python's bytes and integers."""

import numpy as np
import pytest
import torch
from ptx_isa import REGISTERS, definition, whole, width
from ptx_support import ints, run, words

from castpoint.harness.ptx import accesses, isa

BYTES = np.random.default_rng(3).integers(0, 256, (8, 32), np.uint8)  # a row a thread
LISTS = {"v2": 2, "v4": 4}


def opcodes(*names: str) -> list[str]:
    return sorted({opcode for opcode in isa.opcodes() if opcode.split(".")[0] in names})


def shape(opcode: str) -> tuple[str, int, int, str]:
    """Type, bytes of one, number, and a cache policy's operand."""
    words = opcode.split(".")
    count = next((LISTS[word] for word in words if word in LISTS), 1)
    return words[-1], width(words[-1]) // 8, count, ", %rd7" * ("L2_cache_hint" in words)


def written(opcode: str) -> str:
    return opcode.replace("shared_cta", "shared::cta").replace("L1_", "L1::").replace("L2_", "L2::")


def registers(kind: str, count: int) -> list[str]:
    return [f"%rd{10 + n}" if width(kind) == 64 else f"%r{5 + n}" for n in range(count)]


def braced(names: list[str]) -> str:
    return f"{{{', '.join(names)}}}" if len(names) > 1 else names[0]


# A thread's 32 bytes: at %rd1 and %rd2 in global memory, at %r3 in shared memory.
START = "mov.b64 %rd7, 0; shl.b32 %r3, %r1, 5; mul.wide.u32 %rd3, %r1, 28; "
START += "add.s64 %rd1, %rd1, %rd3; add.s64 %rd2, %rd2, %rd3;"
TO_SHARED = "".join(f"ld.global.b64 %rd8, [%rd1 + {n}]; st.shared.b64 [%r3 + {n}], %rd8;" for n in range(0, 32, 8))
TO_GLOBAL = "".join(f"ld.shared.b64 %rd8, [%r3 + {n}]; st.global.b64 [%rd2 + {n}], %rd8;" for n in range(0, 32, 8))


def of_bytes(rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(rows.copy())


@pytest.mark.parametrize("name", ["ld", "st"])
def test_loads_and_stores(name: str):
    """A load's value in a register of 32 or 64 bits has its sign; a store writes its bytes and no other."""
    for opcode in opcodes(name):
        if "param" in opcode:
            continue
        kind, size, count, policy = shape(opcode)
        names, offset = registers(kind, count), 0 if size * count > 8 else 8
        place = f"[{'%rd1' if 'global' in opcode else '%r3'} + {offset}]"
        body, long = START + TO_SHARED, 8 if width(kind) == 64 else 4
        out = np.zeros((8, 32), np.uint8)
        expected = np.zeros((8, 32), np.uint8)
        if name == "ld":
            body += f"{written(opcode)} {braced(names)}, {place}{policy};"
            body += "".join(f"st.global.b{8 * long} [%rd2 + {long * n}], {each};" for n, each in enumerate(names))
            for row, to in zip(BYTES, expected, strict=True):
                parts = [row[offset + size * n : offset + size * (n + 1)].tobytes() for n in range(count)]
                values = (int.from_bytes(part, "little", signed=kind[0] == "s") for part in parts)
                whole_row = b"".join((value & (1 << 8 * long) - 1).to_bytes(long, "little") for value in values)
                to[: len(whole_row)] = list(whole_row)
        else:
            body += "".join(f"ld.global.b{8 * long} {each}, [%rd1 + {long * n}];" for n, each in enumerate(names))
            body += f"{written(opcode)} {place.replace('%rd1', '%rd2')}, {braced(names)}{policy};"
            body += "" if "global" in opcode else TO_GLOBAL
            expected[:] = 0 if "global" in opcode else BYTES
            for n in range(count):
                expected[:, offset + size * n : offset + size * (n + 1)] = BYTES[:, long * n : long * n + size]
        found = of_bytes(out)
        run(body, of_bytes(BYTES), found, threads=8, shared=256)
        assert np.array_equal(found.numpy(), expected), opcode


def test_parameters():
    """The first bytes of an address, since parameters are addresses here."""
    for opcode in opcodes("ld"):
        if "param" not in opcode:
            continue
        kind = opcode.split(".")[-1]
        out = torch.zeros(1, dtype=torch.int64)
        name = registers(kind, 1)[0]
        to64 = "mov.b64" if width(kind) == 64 else "cvt.s64.s32" if kind[0] == "s" else "cvt.u64.u32"
        body = f"{opcode} {name}, [k_param_0]; {to64} %rd9, {name}; st.global.b64 [%rd1], %rd9;"
        run(body, out, threads=1)
        assert out.item() & (1 << 64) - 1 == whole(out.data_ptr(), kind) & (1 << 64) - 1, opcode


@pytest.mark.parametrize(
    "size, given", [(16, None), (16, 0), (16, 4), (16, 12), (16, 16), (8, None), (8, 4), (4, None), (4, 0), (4, 4)]
)
def test_copies(size: int, given: int | None):
    """The first bytes are the source's, the others zeros; waiting for them changes nothing."""
    for opcode in opcodes("cp"):
        if "wait" in opcode or "commit" in opcode:
            continue
        count = "" if given is None else ", %r5"
        policy = ", %rd7" * ("L2_cache_hint" in opcode)
        out = of_bytes(np.zeros((8, 32), np.uint8))
        copy = f"{written(opcode)} [%r3], [%rd1 + 16], {size}{count}{policy};"
        body = f"{START} {TO_SHARED} mov.b32 %r5, {given or 0}; {copy}"
        body += f"cp.async.commit_group; cp.async.wait_group 0; cp.async.wait_all; {TO_GLOBAL}"
        run(body, of_bytes(BYTES), out, threads=8, shared=256)
        expected, copied = BYTES.copy(), size if given is None else given
        expected[:, :size] = 0
        expected[:, :copied] = BYTES[:, 16 : 16 + copied]
        assert np.array_equal(out.numpy(), expected), opcode


def test_shared_memory_is_where_the_register_says_each_time(monkeypatch: pytest.MonkeyPatch):
    """In a loop that changes it now and then, copies more each time, and which some threads leave: as if nothing were
    remembered of the time before."""
    body = f"""
        {START} {TO_SHARED} mov.b32 %r4, %r3; mov.b32 %r20, 0; mov.b32 %r21, 1; bar.sync 0;
    $L__in:
        and.b32 %r22, %r20, 2; setp.eq.b32 %p1, %r22, 0; @%p1 xor.b32 %r3, %r3, 8;
        ld.shared.v2.b32 {{%r23, %r24}}, [%r3]; mad.lo.s32 %r21, %r21, 3, %r23; add.s32 %r21, %r21, %r24;
        st.shared.v2.b32 [%r3 + 16], {{%r21, %r20}};
        mul.lo.s32 %r25, %r20, 8; min.s32 %r25, %r25, 16; cp.async.cg.shared.global [%r4], [%rd1 + 16], 16, %r25;
        add.s32 %r20, %r20, 1; setp.lt.u32 %p2, %r20, 4; setp.lt.u32 %p3, %r1, 5; or.pred %p2, %p2, %p3;
        setp.lt.u32 %p3, %r20, 8; and.pred %p2, %p2, %p3; @%p2 bra $L__in; {TO_GLOBAL}"""

    def result() -> np.ndarray:
        out = of_bytes(np.zeros((8, 32), np.uint8))
        run(f".reg .b32 %r<30>; {body}", of_bytes(BYTES), out, threads=8, shared=256)
        return out.numpy()

    remembered = result()
    monkeypatch.setattr(accesses, "REMEMBERED", 0)
    assert np.array_equal(remembered, result())
    assert len(np.unique(remembered[:, 16:20])) > 8


@pytest.mark.parametrize(
    "access, size",
    [
        ("ld.shared.b32 %r5, [%r3 + 2];", 4),
        ("ld.global.v2.b32 {%r5, %r6}, [%rd1 + 4];", 8),
        ("st.shared.b32 [%r3 + 2], %r1;", 4),
        ("st.shared.v2.b32 [%r3 + 4], {%r1, %r1};", 8),
        ("st.global.b32 [%rd2 + 2], %r1;", 4),
        ("cp.async.cg.shared.global [%r3 + 8], [%rd1], 16;", 16),
        ("cp.async.cg.shared.global [%r3], [%rd1 + 8], 16;", 16),
    ],
)
def test_what_is_not_aligned_is_refused(access: str, size: int):
    with pytest.raises(IndexError, match=f"{size} bytes at an address that is no multiple of {size}"):
        run(f"{START} {access}", of_bytes(BYTES), of_bytes(BYTES), threads=8, shared=256)


def test_sums_in_memory():
    """Four threads at one place: each is told what was there before, the last sum stays."""
    for opcode in opcodes("atom", "red"):
        kind = opcode.split(".")[-1]
        whole = [0x80000001, 0x7FFFFFFF, 5, 0xFFFFFFFF]
        more = [0x00000009, 0x3F800000, 0x33800001, 0xBF7FFFFF] if kind == "f32" else whole
        memory, given, told = ints([7]), ints(more), ints([0] * 4)
        result = "%r6, " if opcode.startswith("atom") else ""
        body = "mov.b32 %r6, 0; ld.param.b64 %rd4, [k_param_0]; ld.global.b32 %r5, [%rd2];"
        run(f"{body} {opcode} {result}[%rd4], %r5; st.global.b32 [%rd3], %r6;", memory, given, told, threads=4)
        add = definition("add.ftz.f32" if kind == "f32" else f"add.{kind}").of
        sums = [7]
        for value in more:
            sums.append(add(sums[-1], value) & 0xFFFFFFFF)
        assert words(memory).tolist() == sums[-1:], opcode
        assert words(told).tolist() == (sums[:-1] if result else [0] * 4), opcode


NOTHING = {
    "bar.sync": "0", "barrier.sync": "1", "barrier.sync.aligned": "1", "bar.warp.sync": "-1", "prefetch": "[%rd1]",
    "applypriority": "[%rd1], 128", "createpolicy": "%rd7, 1.0", "cp.async.wait_group": "0", "wgmma.wait_group": "0",
}  # fmt: skip


def test_what_only_orders_changes_nothing():
    found = opcodes("bar", "barrier", "fence", "membar", "griddepcontrol", "prefetch", "applypriority", "createpolicy")
    words = ("wait", "commit", "fence")
    found += [opcode for opcode in opcodes("cp", "wgmma") if any(word in opcode for word in words)]
    for opcode in found:
        operands = NOTHING.get(opcode) or next((NOTHING[key] for key in NOTHING if opcode.startswith(key + ".")), "")
        out = torch.zeros(64, dtype=torch.int32)
        run(f"mov.b32 %r5, %r1; {written(opcode)} {operands}; st.global.b32 [%rd1], %r5;", out)
        assert out.tolist() == list(range(64)), opcode


@pytest.mark.parametrize("end", ["ret", "ret.uni", "exit"])
def test_ends_and_branches(end: str):
    """Even threads write 1 and go, odd ones write 2; a branch that all take is one whether it says so or not."""
    assert {end, "bra", "bra.uni"} <= set(opcodes("bra", "ret", "exit"))
    out = torch.zeros(64, dtype=torch.int32)
    body = f"""
        and.b32 %r5, %r1, 1; setp.eq.b32 %p1, %r5, 0; mov.b32 %r6, 2;
        bra.uni $L__on; mov.b32 %r6, 9;
    $L__on:
        @!%p1 bra $L__odd; mov.b32 %r6, 1; st.global.b32 [%rd1], %r6; {end};
    $L__odd:
        st.global.b32 [%rd1], %r6;
    """
    run(body, out)
    assert out.tolist() == [1, 2] * 32


# Words of the opcodes that are tested here and in test_warps: one that is new there needs a test of what it means.
MEANT = (
    "L1 L1_evict_first L1_evict_last L2 L2_cache_hint L2_evict_first L2_evict_last L2_evict_normal "
    "L2_evict_unchanged acq_rel acquire add aligned and async b16 b32 b64 b8 bf16 bfly ca cg cluster col "
    "commit_group cs cta cv f32 fence fractional gl global gpu idx launch_dependents m16n8k16 m16n8k8 m8n8 "
    "max min mma_async nc or param proxy relaxed release row s16 s32 s64 s8 sc shared shared_cta sync sys "
    "tf32 trans u16 u32 u64 u8 uni up v2 v4 volatile wait wait_all wait_group warp wb wt x1 x2 x4 xor"
).split()


def test_no_word_is_new():
    others = [opcode.split(".") for opcode in isa.opcodes() if opcode.split(".")[0] not in REGISTERS]
    assert {word for words in others for word in words[1:] if not word.startswith("m64n")} == set(MEANT)
