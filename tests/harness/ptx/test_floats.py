"""Instructions on floats: each against exact arithmetic, rounded once."""

import math
from fractions import Fraction

import numpy as np
import pytest
from ptx_support import bf16, computed, drawn, f32

from castpoint.harness.ptx import numbers

A, B, C = (drawn(seed) for seed in range(3))


@pytest.mark.parametrize(
    ("instruction", "exact"),
    [
        ("add.rn.f32 %r8, %r5, %r6", lambda a, b, c: a + b),
        ("sub.f32 %r8, %r5, %r6", lambda a, b, c: a - b),
        ("mul.rn.f32 %r8, %r5, %r6", lambda a, b, c: a * b),
        ("fma.rn.f32 %r8, %r5, %r6, %r7", lambda a, b, c: a * b + c),
        ("neg.f32 %r8, %r5", lambda a, b, c: -a),
        ("abs.f32 %r8, %r5", lambda a, b, c: abs(a)),
        ("max.f32 %r8, %r5, %r6", lambda a, b, c: max(a, b)),
        ("min.f32 %r8, %r5, %r6", lambda a, b, c: min(a, b)),
        ("div.rn.f32 %r8, %r5, %r6", lambda a, b, c: a / b if b else None),
        ("div.full.f32 %r8, %r5, %r6", lambda a, b, c: a / b if b else None),
        ("rcp.rn.f32 %r8, %r5", lambda a, b, c: 1 / a if abs(a) > 2**-100 else None),
    ],
)
def test_floats_are_rounded_once(instruction: str, exact):
    inputs = [A, B, C][: instruction.count("%r") - 1]
    found = computed(instruction, *inputs).view(np.float32)
    expected = [exact(*(Fraction(float(v)) for v in values)) for values in zip(A, B, C, strict=True)]
    checked = [n for n, value in enumerate(expected) if value is not None]
    assert len(checked) > 900
    assert all(found[n] == f32(expected[n]) for n in checked)


def test_a_fused_product_is_not_rounded_twice():
    """a b + c lies 2^-54 below the middle of two float32: float64 rounds it to that middle, and then to even, up."""
    a, b, c = (
        np.float32([2.0**-12 * (1 + 2.0**-15)]),
        np.float32([2.0**-12 * (1 - 2.0**-15)]),
        np.float32([1 + 2.0**-23]),
    )
    twice = np.float32(a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64))
    assert twice == 1 + 2.0**-22
    assert computed("fma.rn.f32 %r8, %r5, %r6, %r7", a, b, c).view(np.float32) == 1 + 2.0**-23


def squared_between(found: np.float32, square: Fraction) -> bool:
    """Whether found is the float32 nearest to the root of square: the root lies between the middles on both sides."""
    here, *beside = (Fraction(float(v)) for v in (found, *np.nextafter(found, np.float32([0, np.inf]))))
    low, high = ((here + other) / 2 for other in beside)
    return low**2 <= square <= high**2


def test_square_roots():
    values = np.abs(A) + np.float32(1e-30)
    root = computed("sqrt.rn.f32 %r8, %r5", values).view(np.float32)
    for value, found in zip(values, root, strict=True):  # isqrt of the value in units of 2^-300
        exact = Fraction(math.isqrt(int(Fraction(float(value)) * 2**400)), 2**200)
        assert found == f32(exact)
    near = computed("rsqrt.approx.ftz.f32 %r8, %r5", values).view(np.float32)
    assert all(squared_between(found, 1 / Fraction(float(value))) for value, found in zip(values, near, strict=True))
    exponents = np.float32([-3, -0.5, 0, 0.5, 2, 10.5])  # halves, so that the squares are whole powers
    powers = computed("ex2.approx.f32 %r8, %r5", exponents).view(np.float32)
    assert all(squared_between(found, Fraction(2) ** int(2 * e)) for e, found in zip(exponents, powers, strict=True))
    assert not squared_between(np.nextafter(near[0], np.float32(0)), 1 / Fraction(float(values[0])))


def test_not_a_number_and_infinity():
    """Every result that is none has the bits that the PTX ISA names, whatever came in; neg keeps what it gets."""
    a, b = np.float32([np.inf, np.nan, 1, np.nan]), np.float32([-np.inf, 1, np.nan, np.nan])
    for instruction in ("add.f32 %r8, %r5, %r6", "fma.rn.f32 %r8, %r5, %r6, %r6", "max.NaN.f32 %r8, %r5, %r6"):
        found = computed(instruction, a, b)
        assert found[1:].tolist() == [0x7FFFFFFF] * 3
    assert computed("add.f32 %r8, %r5, %r6", a, b)[0] == 0x7FFFFFFF
    assert computed("max.f32 %r8, %r5, %r6", a, b).view(np.float32)[:3].tolist() == [np.inf, 1, 1]
    assert computed("fma.rn.f32 %r8, %r5, %r6, %r6", np.float32([3e38]), np.float32([2])).view(np.float32)[0] == np.inf
    signalling = np.array([0x7F800001], np.uint32)
    assert computed("neg.f32 %r8, %r5", signalling).tolist() == [0xFF800001]
    assert computed("copysign.f32 %r8, %r5, %r6", np.float32([-1]), np.float32([3])).view(np.float32).tolist() == [-3]


def test_extremes():
    zeros, other = np.float32([-0.0, 0.0, -0.0]), np.float32([0.0, -0.0, -0.0])
    assert np.signbit(computed("max.f32 %r8, %r5, %r6", zeros, other).view(np.float32)).tolist() == [False, False, True]
    assert np.signbit(computed("min.f32 %r8, %r5, %r6", zeros, other).view(np.float32)).tolist() == [True, True, True]
    clamped = computed("min.xorsign.abs.f32 %r8, %r5, %r6", np.float32([-5, 5, -1]), np.float32([2, 2, 2])).view(
        np.float32
    )
    assert clamped.tolist() == [-2, 2, -1]


def test_flushed_subnormals():
    a = np.float32([1e-40, -1e-40, 2.0**-126, 1.5 * 2.0**-126])
    one = np.ones(4, np.float32)
    assert computed("mul.ftz.f32 %r8, %r5, %r6", a, one).view(np.float32).tolist() == [0, 0, a[2], a[3]]
    assert computed("mul.f32 %r8, %r5, %r6", a, one).view(np.float32).tolist() == a.tolist()
    halves = computed("mul.ftz.f32 %r8, %r5, %r6", a, one / 2)
    assert halves.tolist() == [0, 1 << 31, 0, 0]  # a result is flushed too, and keeps its sign
    assert computed("mul.ftz.f32 %r8, %r5, %r6", a, one * 2.0**30).view(np.float32)[0] == 0  # and so is an operand
    assert computed("cvt.ftz.f32.f32 %r8, %r5", a).view(np.float32).tolist() == [0, 0, a[2], a[3]]
    assert computed("setp.gt.ftz.f32 %p1, %r5, 0f00000000; selp.b32 %r8, 1, 0, %p1", a).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("instruction", "exact"),
    [
        ("add.rn.bf16x2 %r8, %r5, %r6", lambda a, b, c: a + b),
        ("sub.rn.bf16x2 %r8, %r5, %r6", lambda a, b, c: a - b),
        ("mul.rn.bf16x2 %r8, %r5, %r6", lambda a, b, c: a * b),
        ("fma.rn.bf16x2 %r8, %r5, %r6, %r7", lambda a, b, c: a * b + c),
    ],
)
def test_pairs_of_bf16(instruction: str, exact):
    inputs = [value.view(np.uint32) & np.uint32(0x7FFFFFFF) for value in (A, B, C)]
    found = computed(instruction, *inputs[: instruction.count("%r") - 1])
    for shift in (0, 16):
        halves = [((value >> shift) << 16 & 0xFFFF0000).astype(np.uint32).view(np.float32) for value in inputs]
        finite = np.isfinite(halves).all(0)
        results = ((found >> shift) << 16).astype(np.uint32).view(np.float32)
        for *values, result in zip(*halves, results, strict=True):
            if all(map(np.isfinite, values)) and np.isfinite(result):
                assert result == bf16(exact(*(Fraction(float(v)) for v in values)))
        assert finite.sum() > 900


def test_conversions_to_bf16_round_to_nearest_even():
    high, low = (
        computed("cvt.rn.bf16x2.f32 %r8, %r5, %r6", A, B) >> 16,
        computed("cvt.rn.bf16x2.f32 %r8, %r5, %r6", A, B),
    )
    for half, values in ((high, A), (low & 0xFFFF, B)):
        stored = (half << 16).astype(np.uint32).view(np.float32)
        assert all(one == bf16(Fraction(float(value))) for one, value in zip(stored, values, strict=True))
        assert len(set(half.tolist())) > 300
    wide = computed("cvt.rn.bf16.f32 %rs1, %r5; cvt.f32.bf16 %r8, %rs1", A).view(np.float32)
    assert all(one == bf16(Fraction(float(value))) for one, value in zip(wide, A, strict=True))
    assert computed("cvt.rn.bf16.f32 %rs1, %r5; cvt.u32.u16 %r8, %rs1", np.float32([np.nan])).tolist() == [0x7FFF]


def test_float32_of_float64_rounds_to_odd():
    values = np.array([1 + 2.0**-23, 1 + 2.0**-25, 1 + 2.0**-23 + 2.0**-30, 1.0, -(1 + 2.0**-25), 2.0**-150, np.inf])
    expected = [1 + 2.0**-23, 1 + 2.0**-23, 1 + 2.0**-23, 1.0, -(1 + 2.0**-23), 2.0**-149, np.inf]
    assert numbers.odd_f32(values).tolist() == expected
