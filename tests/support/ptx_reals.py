"""Floats of PTX as signs and fractions: what sums, products, quotients and powers of them are, rounded once.

Nothing of the lab is imported, no float is added: a value is its bits.
"""

from __future__ import annotations

import functools
import math
from decimal import Context, Decimal
from fractions import Fraction

FLOATS = {"f32": (24, 8), "bf16": (8, 8), "f16": (11, 5)}  # significant bits, bits of the exponent
INFINITE, NAN = "infinite", "nan"
LARGE = Fraction(2) ** 200  # than any number
Size = Fraction | str
Real = tuple[int, Size]  # whether it is negative, and its size
DIGITS = Context(prec=60, Emax=10**6, Emin=-(10**6))


@functools.lru_cache(1 << 17)
def real(bits: int, kind: str) -> Real:
    digits, exponents = FLOATS[kind]
    negative, exponent = bits >> digits + exponents - 1 & 1, bits >> digits - 1 & (1 << exponents) - 1
    fraction = bits & (1 << digits - 1) - 1
    if exponent == (1 << exponents) - 1:
        return negative, NAN if fraction else INFINITE
    whole = fraction + (1 << digits - 1 if exponent else 0)
    place = max(exponent, 1) - (1 << exponents - 1) + 2 - digits
    return negative, Fraction(whole << place) if place > 0 else Fraction(whole, 1 << -place)


def stored(value: Real, kind: str, mode: str = "rn") -> int:
    """Bits of a value, to nearest even, or with `rz` towards zero. NaN is canonical."""
    (negative, size), (digits, exponents) = value, FLOATS[kind]
    top = (1 << exponents) - 1 << digits - 1  # of infinity
    if size == NAN:
        return (1 << digits + exponents - 1) - 1
    sign = negative << digits + exponents - 1
    if size == INFINITE:
        return sign | top
    n, d = size.numerator, size.denominator
    if not n:
        return sign
    exponent = n.bit_length() - d.bit_length()
    exponent -= n << max(-exponent, 0) < d << max(exponent, 0)  # 2^exponent <= size < 2^(exponent + 1)
    least = 2 - (1 << exponents - 1)
    place = max(exponent, least) - digits + 1
    whole, rest = divmod(n << max(-place, 0), d << max(place, 0))
    half = 2 * rest - (d << max(place, 0))
    whole += mode == "rn" and (half > 0 or half == 0 and whole & 1)
    found = whole + (max(exponent, least) - least << digits - 1)  # a carry goes into the exponent
    return sign | min(found, top if mode == "rn" else top - 1)


def signed(value: Fraction, zero: int = 0) -> Real:
    return (int(value < 0) if value else zero), abs(value)


def number(value: Real) -> Fraction:
    return -value[1] if value[0] else value[1]


def added(a: Real, b: Real) -> Real:
    if NAN in (a[1], b[1]) or a[1] == b[1] == INFINITE and a[0] != b[0]:
        return 0, NAN
    if INFINITE in (a[1], b[1]):
        return a if a[1] == INFINITE else b
    return signed(number(a) + number(b), a[0] & b[0])


def multiplied(a: Real, b: Real) -> Real:
    if NAN in (a[1], b[1]) or INFINITE in (a[1], b[1]) and 0 in (a[1], b[1]):
        return 0, NAN
    return a[0] ^ b[0], INFINITE if INFINITE in (a[1], b[1]) else a[1] * b[1]


def inverse(a: Real) -> Real:
    if a[1] == NAN:
        return a
    return a[0], Fraction(0) if a[1] == INFINITE else 1 / a[1] if a[1] else INFINITE


def roughly_divided(a: Real, b: Real) -> Real:
    """div.approx: a divisor beyond 2^126 counts as infinite."""
    large = b[1] not in (NAN, INFINITE) and b[1] > Fraction(2) ** 126
    return multiplied(a, inverse((b[0], INFINITE) if large else b))


def root(a: Real) -> Real:
    """Between the neighbours of so many bits that rounding it is rounding the root."""
    if a[1] == NAN or a[0] and a[1]:
        return 0, NAN
    if a[1] == INFINITE or not a[1]:
        return a
    scaled, rest = divmod(a[1].numerator << 400, a[1].denominator)
    whole = math.isqrt(scaled)
    return 0, Fraction(2 * whole + bool(rest or whole * whole != scaled), 1 << 201)


def power(a: Real) -> Real:
    if a[1] == NAN:
        return a
    if a[1] == INFINITE or a[1] > 1000:
        return 0, Fraction(0) if a[0] else INFINITE
    if a[1] < Fraction(1, 1 << 60):  # the exponential is nearer to 1 than any digits here tell
        return 0, 1 + number(a) / 2
    exponent = DIGITS.divide(Decimal(number(a).numerator), Decimal(a[1].denominator))
    return 0, Fraction(DIGITS.power(Decimal(2), exponent))


def logarithm(a: Real) -> Real:
    if a[1] == NAN or a[0] and a[1]:
        return 0, NAN
    if not a[1] or a[1] == INFINITE:
        return int(not a[1]), INFINITE
    exponent = a[1].numerator.bit_length() - a[1].denominator.bit_length()
    if a[1] == Fraction(2) ** exponent:
        return signed(Fraction(exponent))
    size = DIGITS.divide(Decimal(a[1].numerator), Decimal(a[1].denominator))
    return signed(Fraction(DIGITS.divide(DIGITS.ln(size), DIGITS.ln(Decimal(2)))))


def extreme(words: list[str], larger: bool, a: Real, b: Real) -> Real:
    sign = a[0] ^ b[0]
    if "abs" in words:
        a, b = (0, a[1]), (0, b[1])
    if NAN in (a[1], b[1]):
        either = b if a[1] == NAN else a
        found = (0, NAN) if "NaN" in words else either
    else:
        ordered = sorted((a, b), key=lambda v: (order(v), -v[0]))  # -0 is less than +0
        found = ordered[larger]
    return (sign, found[1]) if "xorsign" in words and found[1] != NAN else found


def order(a: Real) -> Fraction:
    size = LARGE if a[1] == INFINITE else a[1]
    return -size if a[0] else size


def flushed(bits: int) -> int:
    return bits if bits >> 23 & 0xFF else bits & 0x80000000
