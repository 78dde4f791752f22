"""Every instruction of registers in isa.TABLE against exact rationals: all values of 16 bits where one operand has no
more, else numbers at every edge with each other, and drawn ones."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from ptx_isa import FLOATS, REGISTERS, Definition, definition, width
from ptx_support import run

from castpoint.harness.ptx import isa

ELSEWHERE = {  # names whose tests are in test_memory and test_warps
    "ld", "st", "cp", "atom", "red", "bra", "ret", "exit", "bar", "barrier", "fence", "membar", "griddepcontrol",
    "prefetch", "applypriority", "createpolicy", "shfl", "redux", "ldmatrix", "stmatrix", "mma", "wgmma",
}  # fmt: skip
EDGES = {
    # zeros, subnormals, the least normal, 1 and its neighbours, halves, bounds of integers, the largest, infinity, NaN
    "f32": [
        0, 1, 0x3FFFFF, 0x7FFFFF, 0x800000, 0x800001, 0x33800000, 0x3F000000, 0x3F000001, 0x3F7FFFFF, 0x3F800000,
        0x3F800001, 0x3FC00000, 0x40200000, 0x42FE0000, 0x42FF0000, 0x43000000, 0x437F8000, 0x43800000, 0x46FFFF00,
        0x47000000,
        0x477FFF80, 0x4B000001, 0x4EFFFFFF, 0x4F000000, 0x4F7FFFFF, 0x4F800000, 0x5EFFFFFF, 0x5F000000, 0x5F7FFFFF,
        0x5F800000, 0x7E800000, 0x7E800001, 0x7F000000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF,
    ],
    "bf16": [
        0, 1, 0x3F, 0x7F, 0x80, 0x81, 0x3F7F, 0x3F80, 0x3F81, 0x4000, 0x7F00, 0x7F7F, 0x7F80, 0x7F81, 0x7FC0, 0x7FFF,
    ],
}  # fmt: skip
FEW = [0, 1, 0x7FFFFF, 0x800000, 0x33800000, 0x3F800000, 0x3F800001, 0x7F7FFFFF, 0x7F800000, 0x7F800001]
SHIFTS = [0, 1, 2, 5, 7, 15, 16, 17, 31, 32, 33, 48, 62, 63, 64, 65, 100, 200, 255, 256, 263, 0x80000000, 0xFFFFFFFF]


def edges(kind: str, few: bool = False) -> list[int]:
    bits = width(kind)
    if kind.endswith("x2"):
        return [v | v << 16 for v in edges(kind[:-2])]
    if kind in EDGES:
        values = FEW if few and kind == "f32" else EDGES[kind]
        return values + [v | 1 << bits - 1 for v in values]
    sizes = {0, 1, 2, 3, 7, 10, 1 << bits // 2, (1 << bits // 2) - 1, 1 << bits - 2, (1 << bits - 1) - 1}
    return sorted({v & (1 << bits) - 1 for size in sizes for v in (size, -size, ~size, size ^ 1)})


def drawn(kind: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """Bits of every size; of floats half are near 1 and have few bits, so that sums and quotients are ties."""
    if width(kind) > 32:
        return rng.integers(0, 1 << 64, count, np.uint64) >> rng.integers(0, 64, count, np.uint64)
    found = rng.integers(0, 1 << width(kind), count, np.uint64)
    if kind == "f32":
        near = (rng.integers(-4096, 4096, count) * 2.0 ** rng.integers(-14, 8, count)).astype(np.float32)
        found[::2] = near.view(np.uint32)[::2]
    if kind == "bf16x2":
        found[::2] = (found[::2] & 0x8FFF8FFF) | 0x30003000
    if kind == "bf16":
        found[::2] = (found[::2] & 0x8FFF) | 0x3000
    return found


def inputs(name: str, takes: Sequence[str], gives: str) -> list[np.ndarray]:
    """Operands, an array of 64 bits each."""
    rng = np.random.default_rng(len(takes))
    if len(takes) == 1 and width(takes[0]) <= 16:  # of 8 bits with others above them, which do not count
        numbers = np.arange(1 << width(takes[0]), dtype=np.uint64)
        more = [numbers | np.uint64(n << 8) for n in (1, 0x80, 0xFFFFFF)] if width(takes[0]) == 8 else []
        return [np.concatenate([numbers, *more])]
    if gives.startswith("bf16") and takes[0] == "f32":  # every upper half; lower ones that are ties, and beside them
        upper = np.arange(1 << 16, dtype=np.uint64).repeat(2) << 16
        lower = np.stack([np.full(1 << 16, 0x8000), rng.choice([0, 1, 0x7FFF, 0x8001, 0xFFFF], 1 << 16)], 1)
        whole = upper | lower.reshape(-1).astype(np.uint64)
        return [whole, rng.permutation(whole)][: len(takes)]
    select = name in ("setp", "selp", "mov")
    lists = [edges(kind, few=select or len(takes) == 3) if kind != "pred" else [0, 1] for kind in takes]
    if name in ("shl", "shr", "bfe"):
        lists[1:] = [SHIFTS] * (len(takes) - 1)
    pairs = np.array(list(itertools.product(*lists)), np.uint64)
    pairs = rng.permutation(pairs)[: 500 if select else 6000]
    more = np.stack([drawn(kind, 100 if select else 1500, rng) for kind in takes], 1)
    whole = np.concatenate([pairs, more])
    if takes[0] == "bf16" and not select:  # every value of one, beside drawn ones
        each = np.stack([rng.permutation(1 << 16).astype(np.uint64) for _ in takes], 1)
        whole = np.concatenate([whole, each])
    return list(whole.T)


def outcome(opcode: str, defined: Definition, operands: Sequence[np.ndarray], fixed: str = "") -> np.ndarray:
    """Bits that the instruction leaves, an element a thread: in a register of 32 bits where the type has 8."""
    loads, names = "", []
    for n, kind in enumerate(kind for kind in defined.takes if kind != "#"):
        bits = max(32 if width(kind) in (1, 8) else width(kind), 16)
        name = {16: f"%rs{n + 1}", 32: f"%r{n + 5}", 64: f"%rd{n + 10}"}[bits]
        loads += f"add.s64 %rd{n + 1}, %rd{n + 1}, %rd9; ld.global.b{bits} {name}, [%rd{n + 1}];\n"
        if kind == "pred":
            loads += f"setp.ne.b32 %p{n + 1}, {name}, 0;\n"
        names.append(f"%p{n + 1}" if kind == "pred" else name)
    bits = 32 if width(defined.gives) in (1, 8) else width(defined.gives)
    to = "%p7" if defined.gives == "pred" else {16: "%rs7", 32: "%r8", 64: "%rd15"}[bits]
    last = len(operands) + 1
    body = f"mul.wide.u32 %rd9, %r4, 4; {loads} {opcode} {', '.join([to, *names])}{fixed};\n"
    body += "selp.b32 %r8, 1, 0, %p7;\n" if defined.gives == "pred" else ""
    body += f"add.s64 %rd{last}, %rd{last}, %rd9; st.global.b{bits} [%rd{last}], {'%r8' if to == '%p7' else to};"
    programs = -(-len(operands[0]) // 64)
    padded = np.ones((last, programs * 64), np.uint64)
    padded[:-1, : len(operands[0])] = operands
    tensors = [torch.from_numpy(row.view(np.int64)) for row in padded]
    run(body, *tensors, programs=programs)
    return padded[-1, : len(operands[0])] & np.uint64((1 << bits) - 1)


def differences(opcode: str) -> Iterator[str]:
    defined = definition(opcode)
    if defined is None:
        yield f"{opcode} has no definition"
        return
    takes = [kind for kind in defined.takes if kind != "#"]
    operands = inputs(opcode.split(".")[0], takes, defined.gives)
    if opcode.startswith(("div", "rem")) and takes[0] not in FLOATS:
        operands = [each[operands[1] & ((1 << width(takes[0])) - 1) != 0] for each in operands]
    bits = 32 if width(defined.gives) == 8 else width(defined.gives)
    for number in range(256) if "#" in defined.takes else [None]:
        given = operands if number is None else [each[: 1 << 9] for each in drawn_words()]
        fixed = [] if number is None else [number]
        found = outcome(opcode, defined, given, "".join(f", {n}" for n in fixed)).tolist()
        for *values, result in zip(*(each.tolist() for each in given), found, strict=True):
            if (expected := defined.of(*values, *fixed) & (1 << bits) - 1) != result:
                shown = ", ".join(f"{v:#x}" for v in (*values, *fixed))
                yield f"{opcode} of {shown}: {result:#x}, not {expected:#x}"


def drawn_words() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 1 << 32, (3, 8), np.uint64))


@pytest.mark.parametrize("name", REGISTERS)
def test_an_instruction_is_what_the_isa_says(name: str):
    opcodes = sorted({opcode for opcode in isa.opcodes() if opcode.split(".")[0] == name})
    assert opcodes
    for opcode in opcodes:
        assert not list(itertools.islice(differences(opcode), 3))


def test_every_instruction_is_compared_somewhere():
    assert {opcode.split(".")[0] for opcode in isa.opcodes()} == set(REGISTERS) | ELSEWHERE
