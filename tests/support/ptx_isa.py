"""What PTX instructions compute, written from the PTX ISA (9.1, chapter 9.7) on Python's integers and fractions.

Nothing of the lab is imported, no float is added: a value is its bits. `definition` knows what an opcode takes and
gives. Where the ISA leaves a result open, it says what the lab chose: a NaN that loses its sign keeps its other bits,
one that is converted is canonical, .sat makes zeros positive, and approximate instructions are rounded correctly.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from ptx_reals import (
    FLOATS,
    INFINITE,
    NAN,
    Real,
    added,
    extreme,
    flushed,
    inverse,
    logarithm,
    multiplied,
    number,
    order,
    power,
    real,
    root,
    roughly_divided,
    signed,
    stored,
)


@dataclass(frozen=True)
class Definition:
    """takes, gives: types, `s32`, `pred`; `#` a number in the text. of: bits of the operands -> bits of the result."""

    takes: tuple[str, ...]
    gives: str
    of: Callable[..., int]


def width(kind: str) -> int:
    return 1 if kind == "pred" else 32 if kind.endswith("x2") else int(kind.lstrip("bsuf"))


# ---------------------------------------------------------------- floats


OF_FLOATS: dict[str, Callable[..., Real]] = {
    "add": added,
    "sub": lambda a, b: added(a, (1 - b[0], b[1])),
    "mul": multiplied,
    "fma": lambda a, b, c: added(multiplied(a, b), c),
    "div": lambda a, b: multiplied(a, inverse(b)),
    "rcp": inverse,
    "sqrt": root,
    "rsqrt": lambda a: inverse(root(a)),
    "ex2": power,
    "lg2": logarithm,
}
COUNT = {"fma": 3} | dict.fromkeys(("add", "sub", "mul", "div", "max", "min", "copysign"), 2)


def of_floats(name: str, words: list[str], kind: str) -> Definition | None:
    if kind.endswith("x2"):
        one = of_floats(name, words, kind[:-2])
        return one and Definition(tuple(each + "x2" for each in one.takes), kind, functools.partial(_pairs, one.of))
    top, takes = 1 << width(kind) - 1, (kind,) * COUNT.get(name, 1)
    ftz = flushed if "ftz" in words else lambda bits: bits
    if name in ("neg", "abs"):
        return Definition(takes, kind, lambda a: ftz(a ^ top if name == "neg" else a & ~top))
    if name == "copysign":
        return Definition(takes, kind, lambda a, b: a & top | b & ~top)
    exact = OF_FLOATS.get(name)
    if name in ("max", "min"):
        exact = functools.partial(extreme, words, name == "max")
    if name == "div" and "approx" in words:
        exact = roughly_divided
    return exact and Definition(takes, kind, lambda *v: ftz(stored(exact(*(real(ftz(x), kind) for x in v)), kind)))


def _pairs(one: Callable[..., int], *operands: int) -> int:
    low, high = (one(*(bits >> shift & 0xFFFF for bits in operands)) for shift in (0, 16))
    return low | high << 16


# ---------------------------------------------------------------- integers


def _halves(one: Definition, *operands: int) -> int:
    low, high = (one.of(*(bits >> shift & 0xFFFF for bits in operands)) & 0xFFFF for shift in (0, 16))
    return low | high << 16


def whole(bits: int, kind: str) -> int:
    bits &= (1 << width(kind)) - 1
    return bits - (1 << width(kind)) if kind[0] == "s" and bits >> width(kind) - 1 else bits


def towards_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def shift(name: str, kind: str, a: int, by: int) -> int:
    return whole(a, kind) << min(by, 64) if name == "shl" else whole(a, kind) >> min(by, 64)


def field(kind: str, a: int, start: int, count: int) -> int:
    """bfe, bit by bit as the ISA writes it."""
    last, start, count = width(kind) - 1, start & 255, count & 255
    sign = a >> min(start + count - 1, last) & 1 if kind[0] == "s" and count else 0
    bits = [a >> start + i & 1 if i < count and start + i <= last else sign for i in range(last + 1)]
    return sum(bit << i for i, bit in enumerate(bits))


def permuted(a: int, b: int, control: int) -> int:
    both, found = (b << 32 | a).to_bytes(8, "little"), []
    for n in range(4):
        chosen = control >> 4 * n & 15
        byte = both[chosen & 7]
        found.append((255 if byte & 128 else 0) if chosen & 8 else byte)
    return int.from_bytes(bytes(found), "little")


def looked_up(a: int, b: int, c: int, table: int) -> int:
    return sum((table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i for i in range(32))


OF_INTEGERS: dict[str, Callable[..., int]] = {
    "add": operator.add, "sub": operator.sub, "min": min, "max": max, "and": operator.and_, "or": operator.or_,
    "xor": operator.xor, "not": operator.invert, "neg": operator.neg, "abs": abs, "div": towards_zero,
    "rem": lambda a, b: a - towards_zero(a, b) * b,
}  # fmt: skip
ONE = ("not", "neg", "abs")


def of_integers(name: str, words: list[str], kind: str) -> Definition | None:
    if kind.endswith("x2"):
        one = of_integers(name, words, kind[:-2])
        return one and Definition(tuple(each + "x2" for each in one.takes), kind, functools.partial(_halves, one))
    wide = "wide" in words
    gives = f"{kind[0]}{2 * width(kind)}" if wide else kind
    if name == "mul":
        down = width(kind) if "hi" in words else 0
        return Definition((kind,) * 2, gives, lambda a, b: whole(a, kind) * whole(b, kind) >> down)
    if name == "mad":
        return Definition((kind, kind, gives), gives, lambda a, b, c: whole(a, kind) * whole(b, kind) + c)
    if name in ("shl", "shr"):
        return Definition((kind, "u32"), kind, functools.partial(shift, name, kind))
    if name == "bfe":
        return Definition((kind, "u32", "u32"), kind, functools.partial(field, kind))
    if name == "prmt":
        return Definition(("b32",) * 3, kind, permuted)
    if name == "lop3":
        return Definition(("b32", "b32", "b32", "#"), kind, looked_up)
    exact = OF_INTEGERS.get(name)
    takes = (kind,) * (1 if name in ONE else 2)
    return exact and Definition(takes, kind, lambda *values: exact(*(whole(v, kind) for v in values)))


# ---------------------------------------------------------------- comparisons, conversions


RELATIONS = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge,
}  # fmt: skip
LOGIC = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


def related(relation: str, kind: str, ftz: bool, a: int, b: int) -> bool:
    if kind not in FLOATS:
        return RELATIONS[relation](whole(a, kind), whole(b, kind))
    one, other = (real(flushed(bits) if ftz else bits, kind) for bits in (a, b))
    none = NAN in (one[1], other[1])
    if relation in ("num", "nan"):
        return none == (relation == "nan")
    if none:
        return relation.endswith("u") and relation != "u"
    return RELATIONS[relation if relation in RELATIONS else relation[:-1]](order(one), order(other))


def compared(words: list[str], kind: str) -> Definition:
    found = functools.partial(related, words[0], kind, "ftz" in words)
    combined = [LOGIC[word] for word in words if word in LOGIC]
    if not combined:
        return Definition((kind, kind), "pred", lambda a, b: int(found(a, b)))
    return Definition((kind, kind, "pred"), "pred", lambda a, b, c: combined[0](int(found(a, b)), c))


WHOLE = {
    "rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil,
}  # fmt: skip


def converted(words: list[str], to: str, of: str) -> Definition | None:
    if to == "bf16x2":
        one = converted(words, "bf16", of)
        return one and Definition((of, of), to, lambda a, b: one.of(a) << 16 | one.of(b))
    if of not in FLOATS and to not in FLOATS:
        return Definition((of,), to, lambda a: whole(whole(a, of), to))
    if of not in FLOATS:
        return Definition((of,), to, lambda a: stored(signed(Fraction(whole(a, of))), to))
    ftz = flushed if "ftz" in words else lambda bits: bits
    how = next((WHOLE[word] for word in words if word in WHOLE), None)
    if to not in FLOATS:
        return Definition((of,), to, lambda a: _integer(how, real(ftz(a), of), to))
    mode = "rz" if "rz" in words else "rn"
    return Definition((of,), to, lambda a: ftz(stored(_in_range(how, "sat" in words, real(ftz(a), of)), to, mode)))


def _integer(how: Callable[[Fraction], int], value: Real, to: str) -> int:
    bits, least = width(to), -(1 << width(to) - 1) if to[0] == "s" else 0
    if value[1] == NAN:
        return 1 << 63 if bits == 64 else 0
    most = least + (1 << bits) - 1
    if value[1] == INFINITE:
        return least if value[0] else most
    return max(least, min(how(number(value)), most))


def _in_range(how: Callable[[Fraction], int] | None, sat: bool, value: Real) -> Real:
    if sat:
        if value[1] == NAN or value[0]:
            return 0, Fraction(0)
        return 0, Fraction(1) if value[1] == INFINITE else min(value[1], Fraction(1))
    if how and value[1] not in (NAN, INFINITE):
        return signed(Fraction(how(number(value))), value[0])
    return value


# ---------------------------------------------------------------- all of them


REGISTERS = (
    "neg abs copysign add sub mul fma max min div rcp sqrt rsqrt ex2 lg2 rem mad and or xor not shl shr bfe prmt lop3 "
    "setp selp mov cvt"
).split()

# Words that a definition accounts for: of floats, and of integers. With any other an opcode is not defined.
OF_F = {"add": "rn", "sub": "rn", "mul": "rn", "fma": "rn", "max": "NaN xorsign abs", "min": "NaN xorsign abs"}
OF_F |= {"div": "rn full approx", "rcp": "rn approx", "sqrt": "rn approx", "rsqrt": "approx", "ex2": "approx"}
OF_F |= {"lg2": "approx", "setp": " ".join(LOGIC)}
EVER = ("mov", "selp", "copysign")  # that compute nothing
OF_I = {"mul": "lo hi wide", "mad": "lo wide", "setp": " ".join(LOGIC)}


def _understood(name: str, words: list[str], kind: str) -> bool:
    if name == "cvt":
        to, of = words[-2:]
        how = " ".join(WHOLE) if of in FLOATS and not to.startswith("bf16") else ""
        how += " rn" * (of not in FLOATS and to in FLOATS) + " rn rz" * (of == "f32" and to.startswith("bf16"))
        how += " ftz" * (of == "f32" and not to.startswith("bf16")) + " sat" * (of == to == "f32")
        return set(words[:-2]) <= set((how if (to, of) not in (("f32", "bf16"), ("f32", "f16")) else "").split())
    floats = kind.startswith(("f32", "bf16"))
    known = set((OF_F if floats else OF_I).get(name, "").split()) | (
        {"ftz"} if kind == "f32" and name not in EVER else set()
    )
    return set(words[name == "setp" : -1]) <= known


def definition(opcode: str) -> Definition | None:
    """What an instruction of registers computes; None for one that is not defined here."""
    name, *words = opcode.split(".")
    kind = words[-1]
    if not _understood(name, words, kind):
        return None
    if name == "mov":
        return Definition((kind,), kind, lambda a: a)
    if name == "selp":
        return Definition((kind, kind, "pred"), kind, lambda a, b, c: a if c else b)
    if name == "setp":
        return compared(words, kind)
    if name == "cvt":
        return converted(words[:-2], *words[-2:])
    if kind == "pred":
        takes = ("pred",) * (1 if name == "not" else 2)
        return Definition(takes, kind, lambda *v: 1 - v[0] if name == "not" else LOGIC[name](*v))
    return (of_floats if kind.startswith(("f32", "bf16")) else of_integers)(name, words[:-1], kind)
