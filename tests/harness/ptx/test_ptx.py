"""PTX instructions run on a CPU: each against exact arithmetic, or against what the PTX ISA says in words."""

import functools
import itertools
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from castpoint.harness.ptx import matrix, numbers
from castpoint.harness.ptx.machine import launch
from castpoint.harness.ptx.memory import Shared
from castpoint.harness.ptx.numbers import Unsupported
from castpoint.harness.ptx.program import Address, parse

THREADS = 64
REGISTERS = ".reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .b16 %rs<9>; .reg .pred %p<9>;"


def kernel(body: str, parameters: int = 4) -> str:
    """A kernel whose thread i has the address of its four bytes of each tensor in %rd1 ..., its number in %r1."""
    names = [f"k_param_{n}" for n in range(parameters)]
    declared = ",\n".join(f"\t.param .u64 .ptr .global .align 1 {name}" for name in names)
    start = "mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ntid.x; mad.lo.s32 %r4, %r2, %r3, %r1;"
    for n, name in enumerate(names, 1):
        start += f"ld.param.b64 %rd{n}, [{name}]; mad.wide.u32 %rd{n}, %r4, 4, %rd{n};\n"
    return f".visible .entry k(\n{declared}\n)\n{{\n{REGISTERS}\n{start}{body}\nret;\n}}"


def run(body: str, *tensors: torch.Tensor, programs: int = 1, threads: int = THREADS, shared: int = 0) -> None:
    launch(parse(kernel(body, len(tensors))), (programs, 1, 1), threads, shared, tensors)


def ints(values) -> torch.Tensor:
    return torch.tensor(np.asarray(values, np.uint32).view(np.int32))


def words(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy().view(np.uint32)


def computed(instruction: str, *inputs: np.ndarray) -> np.ndarray:
    """Bits that `add.f32 %r8, %r5, %r6` and the like leave in %r8, for inputs of up to three registers."""
    loads = "".join(f"ld.global.b32 %r{5 + n}, [%rd{1 + n}];" for n in range(len(inputs)))
    out = torch.zeros(len(inputs[0]), dtype=torch.int32)
    tensors = [ints(value.view(np.uint32)) for value in inputs]
    body = f"{loads} {instruction}; st.global.b32 [%rd{len(inputs) + 1}], %r8;"
    run(body, *tensors, out, threads=len(inputs[0]))
    return words(out)


# ---------------------------------------------------------------- floats


def rounded(value: Fraction, bits: int, least: int) -> Fraction:
    """To nearest even, in that many bits, with no bit below 2^least."""
    if not value:
        return value
    size = abs(value)
    exponent = (size.numerator.bit_length() - size.denominator.bit_length()) - bits - 1
    while Fraction(2) ** (exponent + bits) <= size:
        exponent += 1
    unit = Fraction(2) ** max(exponent, least)
    return round(value / unit) * unit  # Fraction rounds ties to even


def f32(value: Fraction) -> float:
    return float(rounded(value, 24, -149))


def bf16(value: Fraction) -> float:
    return float(rounded(value, 8, -133))


def drawn(seed: int, low: int = -20, high: int = 20) -> np.ndarray:
    """float32 of many sizes, a third of them with few bits, so that sums are ties, and some subnormal."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(960) * 2.0 ** rng.integers(low, high, 960)
    values[:320] = rng.integers(-255, 256, 320) * 2.0 ** rng.integers(-12, 12, 320)
    values[320:340] *= 2.0**-130
    return values.astype(np.float32)


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


def test_square_roots():
    values = np.abs(A) + np.float32(1e-30)
    root = computed("sqrt.rn.f32 %r8, %r5", values).view(np.float32)
    for value, found in zip(values, root, strict=True):  # isqrt of the value in units of 2^-300
        exact = Fraction(math.isqrt(int(Fraction(float(value)) * 2**400)), 2**200)
        assert found == f32(exact)
    near = computed("rsqrt.approx.ftz.f32 %r8, %r5", values).view(np.float32)
    assert np.allclose(near, 1 / np.sqrt(values.astype(np.float64)), rtol=2.0**-24, atol=0)
    exponents = np.float32([-3, -0.5, 0, 0.5, 2, 10])
    assert np.allclose(computed("ex2.approx.f32 %r8, %r5", exponents).view(np.float32), 2.0**exponents, rtol=2.0**-23)


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


# ---------------------------------------------------------------- integers

U = np.array([0, 1, 2, 5, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x12345678, 0xDEADBEEF], np.uint32)
V = np.array([3, 7, 0xFFFFFFFF, 2, 4, 31, 40, 0x10000, 3, 2, 0x9ABCDEF0, 0x1234], np.uint32)


def signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


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


# ---------------------------------------------------------------- memory, threads


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
    found = matrix.mma("m16n8k8", ("row", "col", "f32", "tf32", "tf32", "f32"), left, right, start)
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


# ---------------------------------------------------------------- what is wrong


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
        (
            "setp.lt.u32 %p1, %r1, 9; @%p1 shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;",
            Unsupported,
            "a part of a warp",
        ),
        ("shfl.sync.down.b32 %r5, %r1, 1, 31, -1;", Unsupported, "shfl.sync.down, in k"),
        ("add.rz.f32 %r5, %r1, %r1;", Unsupported, "add with .rz"),
        ("cvt.rna.tf32.f32 %r5, %r1;", Unsupported, "cvt with .tf32"),
        ("cos.approx.f32 %r5, %r1;", Unsupported, "cos, in k"),
        ("popc.b32 %r5, %r1;", Unsupported, "popc, in k"),
        ("add.f64 %rd5, %rd1, %rd1;", Unsupported, "type f64"),
        ("ld.local.b32 %r5, [%r1];", Unsupported, "this memory"),
        ("mbarrier.init.shared::cta.b64 [%r1], 1;", Unsupported, "mbarrier"),
        ("atom.global.gpu.relaxed.max.u32 %r5, [%rd1], %r1;", Unsupported, "this atomic operation"),
        ("cp.async.bulk.shared::cluster.global [%r1], [%rd1], 16, [%r1];", Unsupported, "this copy"),
        ("bfe.u32 %r5, %r1, %r1, 3;", Unsupported, "bfe of a field that differs by thread"),
        ("add.sat.s32 %r5, %r1, %r1;", Unsupported, "add with .sat"),
        ("fma.rn.relu.bf16x2 %r5, %r1, %r1, %r1;", Unsupported, "fma with .relu"),
        ("mad.hi.u32 %r5, %r1, %r1, %r1;", Unsupported, "mad with .hi"),
        ("max.f32 %r5, %r1, %r1, %r1;", Unsupported, "max, in k"),
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
            "or with signs",
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
