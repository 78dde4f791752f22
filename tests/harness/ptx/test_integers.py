"""Instructions on integers, conversions and comparisons: each against Python's integers."""

from fractions import Fraction

import numpy as np
import pytest
from ptx_support import bf16, computed, f32, signed

U = np.array([0, 1, 2, 5, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x12345678, 0xDEADBEEF], np.uint32)
V = np.array([3, 7, 0xFFFFFFFF, 2, 4, 31, 40, 0x10000, 3, 2, 0x9ABCDEF0, 0x1234], np.uint32)


def sign_byte(value: int, byte: int) -> int:
    return 255 if value >> (8 * byte + 7) & 1 else 0


def towards_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


@pytest.mark.parametrize(
    ("instruction", "exact"),
    [
        ("add.s32 %r8, %r5, %r6", lambda a, b: a + b),
        ("sub.s32 %r8, %r5, %r6", lambda a, b: a - b),
        ("mul.lo.s32 %r8, %r5, %r6", lambda a, b: a * b),
        ("mul.hi.u32 %r8, %r5, %r6", lambda a, b: a * b >> 32),
        ("mul.hi.s32 %r8, %r5, %r6", lambda a, b: signed(a) * signed(b) >> 32),
        ("mad.lo.s32 %r8, %r5, %r6, %r5", lambda a, b: a * b + a),
        ("div.u32 %r8, %r5, %r6", lambda a, b: a // b),
        ("div.s32 %r8, %r5, %r6", lambda a, b: towards_zero(signed(a), signed(b))),
        ("rem.s32 %r8, %r5, %r6", lambda a, b: signed(a) - towards_zero(signed(a), signed(b)) * signed(b)),
        ("min.s32 %r8, %r5, %r6", lambda a, b: min(signed(a), signed(b))),
        ("max.u32 %r8, %r5, %r6", lambda a, b: max(a, b)),
        ("and.b32 %r8, %r5, %r6", lambda a, b: a & b),
        ("or.b32 %r8, %r5, %r6", lambda a, b: a | b),
        ("xor.b32 %r8, %r5, %r6", lambda a, b: a ^ b),
        ("not.b32 %r8, %r5", lambda a, b: ~a),
        ("neg.s32 %r8, %r5", lambda a, b: -a),
        ("shl.b32 %r8, %r5, %r6", lambda a, b: a << b if b < 32 else 0),
        ("shr.u32 %r8, %r5, %r6", lambda a, b: a >> b if b < 32 else 0),
        ("shr.s32 %r8, %r5, %r6", lambda a, b: signed(a) >> min(b, 31)),
        ("bfe.u32 %r8, %r5, 3, 7", lambda a, b: a >> 3 & 127),
        ("bfe.s32 %r8, %r5, 4, 1", lambda a, b: -(a >> 4 & 1)),
        ("prmt.b32 %r8, %r5, %r6, 0x7632U", lambda a, b: a >> 16 | (b >> 16) << 16),
        ("prmt.b32 %r8, %r5, %r6, 0x5410", lambda a, b: a & 0xFFFF | (b & 0xFFFF) << 16),
        ("lop3.b32 %r8, %r5, %r6, %r5, 0x3C", lambda a, b: a ^ b),
        ("lop3.b32 %r8, %r5, %r6, %r6, 0x80", lambda a, b: a & b),
        (
            "mul.wide.s32 %rd8, %r5, %r6; shr.u64 %rd8, %rd8, 31; cvt.u32.u64 %r8, %rd8",
            lambda a, b: signed(a) * signed(b) >> 31,
        ),
        ("mad.wide.u32 %rd8, %r5, %r6, %rd1; sub.s64 %rd8, %rd8, %rd1; cvt.u32.u64 %r8, %rd8", lambda a, b: a * b),
        ("cvt.s64.s32 %rd8, %r5; shr.s64 %rd8, %rd8, 4; cvt.u32.u64 %r8, %rd8", lambda a, b: signed(a) >> 4),
        ("cvt.u64.u32 %rd8, %r5; shr.u64 %rd8, %rd8, 4; cvt.u32.u64 %r8, %rd8", lambda a, b: a >> 4),
        ("cvt.s32.s8 %r8, %r5", lambda a, b: signed(a & 255, 8)),
        ("cvt.s8.s32 %r7, %r5; cvt.s64.s32 %rd8, %r7; cvt.u32.u64 %r8, %rd8", lambda a, b: signed(a & 255, 8)),
        ("cvt.u16.u32 %r8, %r5", lambda a, b: a & 0xFFFF),
        (
            "cvt.u64.u32 %rd7, %r5; shl.b64 %rd7, %rd7, 33; cvt.u32.u64 %r7, %rd7; shr.u64 %rd8, %rd7, 32; "
            "cvt.u32.u64 %r8, %rd8",
            lambda a, b: a << 1,
        ),
        (
            "mov.b64 %rd7, {%r5, %r6}; mov.b32 %r7, {%rs1, %rs1}; mov.b32 {%rs2, %rs3}, %r5; cvt.u32.u16 %r8, %rs3",
            lambda a, b: a >> 16,
        ),
        (
            "mul.wide.u32 %rd7, %r5, %r6; mul.wide.u32 %rd8, %r6, %r6; mul.hi.u64 %rd8, %rd7, %rd8; "
            "cvt.u32.u64 %r8, %rd8",
            lambda a, b: (a * b) * (b * b) >> 64,
        ),
        ("abs.s32 %r8, %r5", lambda a, b: abs(signed(a))),
        (
            "prmt.b32 %r8, %r5, %r6, 0xb4a9",
            lambda a, b: sign_byte(a, 1) | sign_byte(a, 2) << 8 | (b & 255) << 16 | sign_byte(a, 3) << 24,
        ),
        (
            "setp.eq.s32 %p2, %r5, 5; setp.ge.or.u32 %p1, %r5, %r6, %p2; selp.b32 %r8, 1, 0, %p1",
            lambda a, b: a == 5 or a >= b,
        ),
        ("setp.hs.u32 %p1, %r5, %r5; selp.b32 %r8, 1, 0, %p1", lambda a, b: 1),
        ("setp.hi.u32 %p1, %r5, %r5; selp.b32 %r8, 1, 0, %p1", lambda a, b: 0),
        ("mov.b32 {%rs1, %rs2}, %r5; mov.b32 %r8, {%rs2, %rs1}", lambda a, b: a >> 16 | (a & 0xFFFF) << 16),
        ("mov.b64 %rd8, {%r5, %r6}; shr.u64 %rd8, %rd8, 16; cvt.u32.u64 %r8, %rd8", lambda a, b: a >> 16 | b << 16),
        ("setp.lt.s32 %p1, %r5, %r6; selp.b32 %r8, %r5, %r6, %p1", lambda a, b: min(signed(a), signed(b))),
        ("setp.gt.u32 %p1, %r5, %r6; selp.b32 %r8, %r5, %r6, %p1", lambda a, b: max(a, b)),
        (
            "setp.eq.s32 %p2, %r5, 5; setp.ge.and.u32 %p1, %r5, %r6, %p2; selp.b32 %r8, 1, 0, %p1",
            lambda a, b: a == 5 and a >= b,
        ),
        (
            "setp.ne.s32 %p1, %r5, 0; not.pred %p2, %p1; xor.pred %p3, %p1, %p2; selp.b32 %r8, %r5, 9, !%p2",
            lambda a, b: a or 9,
        ),
        ("mov.b32 %r8, 7; setp.lo.u32 %p1, %r5, %r6; @%p1 mov.b32 %r8, %r5", lambda a, b: a if a < b else 7),
        ("mov.b32 %r8, 7; setp.hs.u32 %p1, %r5, %r6; @!%p1 mov.b32 %r8, %r5", lambda a, b: a if a < b else 7),
    ],
)
def test_integers(instruction: str, exact):
    found = computed(instruction, U, V)
    assert found.tolist() == [exact(int(a), int(b)) & 0xFFFFFFFF for a, b in zip(U, V, strict=True)]


def test_whole_numbers_of_floats():
    values = np.float32([2.5, 3.5, -2.5, 2.7, -2.7, np.inf])
    for how, expected in {
        "rni": [2, 4, -2, 3, -3], "rzi": [2, 3, -2, 2, -2], "rmi": [2, 3, -3, 2, -3], "rpi": [3, 4, -2, 3, -2],
    }.items():  # fmt: skip
        assert computed(f"cvt.{how}.f32.f32 %r8, %r5", values).view(np.float32).tolist() == [*expected, np.inf]
        found = computed(f"cvt.{how}.s32.f32 %r8, %r5", values).view(np.int32).tolist()
        assert found == [*expected, 2**31 - 1]
    far = computed(
        "cvt.rzi.s64.f32 %rd8, %r5; shr.s64 %rd8, %rd8, 32; cvt.u32.u64 %r8, %rd8", np.float32([1e30, -1e30, 2.0**40])
    )
    assert far.tolist() == [0x7FFFFFFF, 0x80000000, 256]
    assert computed("cvt.sat.f32.f32 %r8, %r5", np.float32([-1, 0.25, 3, np.nan])).view(np.float32).tolist() == [
        0,
        0.25,
        1,
        0,
    ]
    whole = np.array([0x01008001, 0x00FF7FFF, 5], np.uint32)
    stored = computed("cvt.rn.bf16.s32 %rs1, %r5; cvt.f32.bf16 %r8, %rs1", whole).view(np.float32)
    assert stored.tolist() == [bf16(Fraction(int(v))) for v in whole]
    cut = computed("cvt.rz.bf16.f32 %rs1, %r5; cvt.u32.u16 %r8, %rs1", np.float32([1.9999, -1.9999, np.nan, np.inf]))
    assert cut.tolist() == [0x3FFF, 0xBFFF, 0x7FFF, 0x7F80]


def test_floats_and_integers():
    values = np.float32([0.5, 1.5, -2.5, -0.7, 3e9, -3e9, np.nan, 7])
    assert computed("cvt.rni.s32.f32 %r8, %r5", values).view(np.int32).tolist() == [
        0,
        2,
        -2,
        -1,
        2**31 - 1,
        -(2**31),
        0,
        7,
    ]
    assert computed("cvt.rzi.u32.f32 %r8, %r5", values).tolist() == [0, 1, 0, 0, 3_000_000_000, 0, 0, 7]
    assert computed("cvt.rn.f32.s32 %r8, %r5", U).view(np.float32).tolist() == [
        f32(Fraction(signed(int(u)))) for u in U
    ]


@pytest.mark.parametrize(
    ("relation", "expected"),
    [
        ("eq", [1, 0, 0]),
        ("ne", [0, 1, 0]),
        ("neu", [0, 1, 1]),
        ("lt", [0, 1, 0]),
        ("ltu", [0, 1, 1]),
        ("nan", [0, 0, 1]),
        ("num", [1, 1, 0]),
    ],
)
def test_comparisons_with_not_a_number(relation: str, expected: list[int]):
    a, b = np.float32([1, 1, 1]), np.float32([1, 2, np.nan])
    found = computed(f"setp.{relation}.f32 %p1, %r5, %r6; selp.b32 %r8, 1, 0, %p1", a, b)
    assert found.tolist() == expected
