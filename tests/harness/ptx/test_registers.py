"""Parts and wholes of registers, predicates and guards; and floats that are rounded once on their way."""

import numpy as np
import pytest
from ptx_isa import definition
from ptx_support import computed

from castpoint.harness.ptx import isa, numbers

U = np.array([0, 1, 2, 5, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x12345678, 0xDEADBEEF], np.uint32)
V = np.array([3, 7, 0xFFFFFFFF, 2, 4, 31, 40, 0x10000, 3, 2, 0x9ABCDEF0, 0x1234], np.uint32)
PAIR = "mov.b64 %rd7, {%r5, %r6};"


@pytest.mark.parametrize(
    ("instructions", "exact"),
    [
        ("mov.b32 {%rs1, %rs2}, %r5; mov.b32 %r8, {%rs2, %rs1}", lambda a, b: a >> 16 | (a & 0xFFFF) << 16),
        ("mov.b32 {_, %rs2}, %r5; cvt.u32.u16 %r8, %rs2", lambda a, b: a >> 16),
        (f"{PAIR} mov.b64 {{%r7, %r8}}, %rd7", lambda a, b: b),
        (f"{PAIR} shr.u64 %rd8, %rd7, 16; cvt.u32.u64 %r8, %rd8", lambda a, b: a >> 16 | b << 16),
        (
            f"{PAIR} mov.b64 {{%rs1, %rs2, %rs3, %rs4}}, %rd7; mov.b32 %r8, {{%rs4, %rs2}}",
            lambda a, b: b >> 16 | a & ~0xFFFF,
        ),
        (
            "mov.b32 {%rs1, %rs2}, %r5; mov.b64 %rd7, {%rs2, 7, %rs1, %rs2}; mov.b64 {%r7, %r8}, %rd7; "
            "add.s32 %r8, %r8, %r7",
            lambda a, b: a + (a >> 16 | 7 << 16),
        ),
        ("cvt.s8.s32 %r7, %r5; cvt.s64.s32 %rd8, %r7; cvt.u32.u64 %r8, %rd8", lambda a, b: (a & 255 ^ 128) - 128),
        ("setp.ne.s32 %p1, %r5, 0; not.pred %p2, %p1; selp.b32 %r8, %r5, 9, !%p2", lambda a, b: a or 9),
        ("setp.ne.s32 %p1, %r5, 0; xor.pred %p3, %p1, !%p1; selp.b32 %r8, %r5, 9, %p3", lambda a, b: a),
        ("mov.pred %p1, -1; mov.pred %p2, 0; and.pred %p3, %p1, !%p2; selp.b32 %r8, %r5, 9, %p3", lambda a, b: a),
        ("mov.b32 %r8, 7; setp.lo.u32 %p1, %r5, %r6; @%p1 mov.b32 %r8, %r5", lambda a, b: a if a < b else 7),
        ("mov.b32 %r8, 7; setp.hs.u32 %p1, %r5, %r6; @!%p1 mov.b32 %r8, %r5", lambda a, b: a if a < b else 7),
        ("mad.wide.u32 %rd7, %r5, %r6, 0x300000000; mov.b64 {%r7, %r8}, %rd7", lambda a, b: (a * b >> 32) + 3),
        ("add.s64 %rd7, 0, -2; mov.b64 {%r7, %r8}, %rd7", lambda a, b: -1),
        ("cvt.u64.u32 %rd7, %r5; shl.b64 %rd7, %rd7, 33; mov.b64 {%r7, %r8}, %rd7", lambda a, b: 2 * a),
        ("cvt.u16.u32 %rs1, %r5; shl.b16 %rs2, %rs1, 0x10000; cvt.u32.u16 %r8, %rs2", lambda a, b: 0),
        ("cvt.u16.u32 %rs1, %r5; shr.u16 %rs2, %rs1, 65537; cvt.u32.u16 %r8, %rs2", lambda a, b: 0),
        ("mad.wide.s32 %rd7, %r5, 0, -2; mov.b64 {%r7, %r8}, %rd7", lambda a, b: -1),
        ("selp.b16 %rs2, 1, 2, 0x10000; cvt.u32.u16 %r8, %rs2", lambda a, b: 1),
        ("setp.lt.or.u32 %p1, %r5, %r6, !%p0; selp.b32 %r8, 1, 0, %p1", lambda a, b: int(a < b or a != b)),
    ],
)  # fmt: skip
def test_parts_wholes_and_guards(instructions: str, exact):
    found = computed(f"setp.eq.b32 %p0, %r5, %r6; {instructions}", U, V)
    assert found.tolist() == [exact(int(a), int(b)) & 0xFFFFFFFF for a, b in zip(U, V, strict=True)]


def test_every_move_of_lists_is_above():
    lists = [row.split(None, 1) for row in isa.TABLE.splitlines() if row.startswith("mov") and "{" in row]
    assert lists == [[f"mov.b{bits}", operands] for bits, operands in (
        (32, "r {2"), (32, "{2 r"), (64, "r {2"), (64, "{2 r"), (64, "r {4"), (64, "{4 r"),
    )]  # fmt: skip


def test_a_fused_product_is_not_rounded_twice():
    """a b + c lies 2^-54 below the middle of two float32: float64 rounds it to that middle, and then to even, up."""
    values = [2.0**-12 * (1 + 2.0**-15), 2.0**-12 * (1 - 2.0**-15), 1 + 2.0**-23]
    a, b, c = (np.float32([value]) for value in values)
    twice = np.float32(a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64))
    bits = definition("fma.rn.f32").of(*(int(each.view(np.uint32)[0]) for each in (a, b, c)))
    assert twice == 1 + 2.0**-22 and np.uint32(bits).view(np.float32) == 1 + 2.0**-23
    assert computed("fma.rn.f32 %r8, %r5, %r6, %r7", a, b, c).tolist() == [bits]


def test_float32_of_float64_rounds_to_odd():
    values = np.array([1 + 2.0**-23, 1 + 2.0**-25, 1 + 2.0**-23 + 2.0**-30, 1.0, -(1 + 2.0**-25), 2.0**-150, np.inf])
    expected = [1 + 2.0**-23, 1 + 2.0**-23, 1 + 2.0**-23, 1.0, -(1 + 2.0**-23), 2.0**-149, np.inf]
    assert numbers.odd_f32(values).tolist() == expected
