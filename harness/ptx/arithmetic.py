"""What PTX's arithmetic instructions compute, on numpy arrays of their types.

Every one is of isa.TABLE. Approximate instructions are rounded correctly here, ex2, lg2 and rsqrt as far as float64
tells; a GPU may be off by the error that the PTX ISA states for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from castpoint.harness.ptx.numbers import (
    NAN,
    SIGNED,
    UNSIGNED,
    Array,
    bits_of,
    extended,
    flushed,
    fma,
    read,
    width,
)

Binary = Callable[[Array, Array], Array]
COMPARE: dict[str, Binary] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
UNSIGNED_ORDER = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
LOGIC: dict[str, Binary] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
UNARY: dict[str, Callable[[Array], Array]] = {  # of floats
    "sqrt": np.sqrt,  # of float32, correctly rounded
    "rcp": lambda a: np.float32(1) / a,
    "rsqrt": lambda a: 1 / np.sqrt(a.astype(np.float64)),
    "ex2": lambda a: np.exp2(a.astype(np.float64)),
    "lg2": lambda a: np.log2(a.astype(np.float64)),
}
SINGLE: dict[str, np.ufunc] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}  # of float32, correctly rounded
# of integers, whether they have a sign or not
MODULAR: dict[str, np.ufunc] = {**LOGIC, "add": np.add, "sub": np.subtract, "mul": np.multiply}
INTEGER: dict[str, np.ufunc] = {**MODULAR, "min": np.minimum, "max": np.maximum, "abs": np.absolute}
WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


class Operation(NamedTuple):
    """function: of its sources' values, which numbers.read makes of their bits and of these kinds, one a source, and
    some left over. result: what it gives, `pred` or the kind of bits that a register holds then."""

    function: Callable[..., Array]
    kinds: tuple[str, ...]
    result: str


def operation(words: tuple[str, ...]) -> Callable[..., Array]:
    """What an opcode makes of its sources' bits, in their order: bits, or a predicate. Predicates are bool."""
    function, kinds, _ = of_values(words)
    return lambda *sources: function(*map(read, sources, kinds))


@functools.cache
def of_values(words: tuple[str, ...]) -> Operation:
    """An opcode of isa.TABLE."""
    name, kind = words[0], words[-1]
    if name == "setp":
        return _comparison(words, kind)
    if name == "cvt":
        to = words[-2]
        result = "b64" if to[0] == "s" else f"b{32 if to.endswith('x2') else width(to)}"
        return Operation(functools.partial(_converted, words, kind, to), (kind, kind), result)
    if kind == "pred":
        return Operation({"mov": _same, "not": np.logical_not}.get(name) or LOGIC[name], ("pred", "pred"), "pred")
    if kind.endswith("x2"):
        half = operation((*words[:-1], kind.removesuffix("x2")))
        return Operation(functools.partial(_by_halves, half), ("b32",) * 3, "b32")
    bits = f"b{width(kind)}"
    if name == "mov":
        return Operation(_same, (bits,), bits)
    if name == "selp":
        return Operation(lambda a, b, chosen: np.where(chosen, a, b), (bits, bits, "pred"), bits)
    if kind[0] in "bus" and kind != "bf16":
        return _of_integers(words, kind, bits)
    if name in ("neg", "abs", "copysign"):  # of bits: a NaN keeps its own
        return Operation(functools.partial(_signed, words, width(kind)), (bits,) * 2, bits)
    if name in SINGLE and kind == "f32" and "ftz" not in words:
        exact = SINGLE[name]
        return Operation(lambda a, b: bits_of(exact(a, b), "f32"), (kind,) * 2, bits)
    return Operation(lambda *values: _of_floats(words, kind, values), (kind,) * 3, bits)


def _comparison(words: Sequence[str], kind: str) -> Operation:
    found: Binary = functools.partial(_compared, words)
    if kind[0] in "bus" and kind != "bf16":
        found = COMPARE[UNSIGNED_ORDER.get(words[1], words[1])]
    if (logic := LOGIC.get(words[2])) is None:
        return Operation(found, (kind, kind), "pred")
    return Operation(lambda a, b, more: logic(found(a, b), more), (kind, kind, "pred"), "pred")


def _of_integers(words: Sequence[str], kind: str, bits: str) -> Operation:
    """bits: the kind of as many without a type."""
    name, word = words[0], UNSIGNED[width(kind)]
    if "wide" in words or "hi" in words:
        product = functools.partial(_long_product, words, width(kind))
        if name == "mad":
            return Operation(lambda a, b, c: product(a, b) + c, (kind, kind, "u64"), "b64")
        return Operation(product, (kind, kind), "b64" if "wide" in words else bits)
    if name in MODULAR:
        return Operation(MODULAR[name], (bits, bits), bits)
    if name in ("shl", "shr"):
        return Operation(functools.partial(_shifted, name, width(kind)), (kind, "u32"), bits)
    if name == "bfe":
        return Operation(functools.partial(_field, word), (kind, "u8", "u8"), bits)
    function: Callable[..., Array] = {
        "mad": lambda a, b, c: a * b + c, "not": np.invert, "neg": np.negative, "prmt": _permuted, "lop3": _table,
    }.get(name)  # fmt: skip
    if function:
        return Operation(function, (bits,) * 4, bits)
    signed = functools.partial(_divided, name) if name in ("div", "rem") else INTEGER[name]
    return Operation(lambda *values: np.asarray(signed(*values)).astype(word, copy=False), (kind, kind), bits)


def _same(bits: Array) -> Array:
    return bits


def _by_halves(half: Callable[..., Array], *operands: Array) -> Array:
    """An instruction of 16 bits on both halves of registers."""
    low, high = (half(*(bits >> np.uint32(shift) for bits in operands)) for shift in (0, 16))
    return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)


def _of_floats(words: Sequence[str], kind: str, values: Sequence[Array]) -> Array:
    ftz, name = "ftz" in words, words[0]
    if ftz:
        values = [flushed(value) for value in values]
    if name in UNARY:
        result = UNARY[name](*values)
    elif name == "fma":
        result = fma(*values)
    elif kind == "f32" and name in SINGLE:
        result = SINGLE[name](*values)
    elif name in ("add", "sub"):
        result = fma(values[0], np.float32(1), values[1] if name == "add" else -values[1])
    elif name == "mul":
        result = fma(*values, np.float32(-0.0))
    elif name == "div":
        result = _ratio(*values) if "approx" in words else np.divide(*values)
    else:
        result = _extreme(words, *values)
    bits = bits_of(result, kind)
    return _flushed_bits(bits) if ftz else bits


def _ratio(a: Array, b: Array) -> Array:
    """div.approx: a times the reciprocal of b, which is 0 for the largest."""
    large = (np.abs(b) > np.float32(2.0**126)) & np.isfinite(b)
    return np.where(large, a * np.copysign(np.float32(0), b), a / b)


def _flushed_bits(bits: Array) -> Array:
    return np.where(bits & np.uint32(0x7F800000) == 0, bits & np.uint32(0x80000000), bits)


def _signed(words: Sequence[str], size: int, a: Array, b: Array | None = None) -> Array:
    name, word = words[0], UNSIGNED[size]
    sign = word(1 << size - 1)
    if b is not None:  # copysign: the sign of the first, all else of the second
        return a & sign | b & ~sign
    bits = a ^ sign if name == "neg" else a & ~sign
    return _flushed_bits(bits) if "ftz" in words else bits


def _extreme(words: Sequence[str], a: Array, b: Array) -> Array:
    """max and min: of two zeros the positive one is larger; .xorsign.abs: of sizes, with the sign of the product."""
    if "xorsign" in words:
        sign = np.where(np.signbit(a) ^ np.signbit(b), np.float32(-1), np.float32(1))
        return sign * _extreme([word for word in words if word not in ("xorsign", "abs")], np.abs(a), np.abs(b))
    larger, smaller = (np.maximum, np.minimum) if "NaN" in words else (np.fmax, np.fmin)
    negative = (np.logical_and if words[0] == "max" else np.logical_or)(np.signbit(a), np.signbit(b))
    zero = np.where(negative, np.float32(-0.0), np.float32(0))
    return np.where((a == 0) & (b == 0), zero, (larger if words[0] == "max" else smaller)(a, b))


def _long_product(words: Sequence[str], bits: int, a: Array, b: Array) -> Array:
    """mul.wide and mul.hi."""
    if bits == 64:
        exact = a.astype(object) * b.astype(object) >> 64 & (1 << 64) - 1
        return np.asarray(exact).astype(np.uint64)
    long = (SIGNED if a.dtype.kind == "i" else UNSIGNED)[64]
    product = a.astype(long) * b.astype(long)
    return product.view(np.uint64) if "wide" in words else (product >> long(bits)).astype(UNSIGNED[bits])


def _divided(name: str, a: Array, b: Array) -> Array:
    """div, rounded towards zero, and what it leaves."""
    if a.dtype.kind == "i":
        a, b = a.astype(np.int64), b.astype(np.int64)
    sizes = np.abs(a).astype(np.uint64), np.abs(b).astype(np.uint64)  # 2^63 too
    quotient = sizes[0] // sizes[1]
    quotient = np.where((a < 0) ^ (b < 0), np.negative(quotient), quotient)
    return quotient if name == "div" else a.astype(np.uint64) - quotient * b.astype(np.uint64)


def _shifted(name: str, bits: int, a: Array, by: Array) -> Array:
    """Shifts by the type's width or more give zeros, or copies of the sign."""
    most = np.minimum(by, np.uint32(bits - 1)).astype(a.dtype)
    moved = np.left_shift(a, most) if name == "shl" else np.right_shift(a, most)
    kept = name == "shr" and a.dtype.kind == "i"
    return (moved if kept else np.where(by >= bits, a.dtype.type(0), moved)).astype(UNSIGNED[bits])


def _field(word: type[np.generic], a: Array, start: Array, count: Array) -> Array:
    """bfe, as that word: so many bits from that one on, of a with its sign, or zeros, before it."""
    wide = a.astype((SIGNED if a.dtype.kind == "i" else UNSIGNED)[64])
    long = wide.dtype.type
    first, size = np.minimum(start, 63).astype(long), np.minimum(count, 64).astype(long)
    moved = wide >> first if a.dtype.kind == "i" else np.where(start > 63, long(0), wide >> first)
    left = np.minimum(long(64) - size, long(63))
    return np.where(size == 0, long(0), moved << left >> left).astype(word)


def _permuted(a: Array, b: Array, choice: Array) -> Array:
    """prmt: four bytes of a and b, or copies of their signs."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.uint32(0)
    for n in range(4):
        nibble = choice >> np.uint32(4 * n) & np.uint32(15)
        byte = (both >> (nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8) & np.uint64(255)).astype(np.uint32)
        signs = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        result = result | np.where(nibble & np.uint32(8), signs, byte) << np.uint32(8 * n)
    return result


def _table(a: Array, b: Array, c: Array, table: Array) -> Array:
    """lop3: the logical function of three bits whose results are the table's bits."""
    result = np.uint32(0)
    for n in range(8):
        if int(table) >> n & 1:
            result = result | ((a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c))
    return result


def _converted(words: Sequence[str], of: str, to: str, values: Array, low: Array | None = None) -> Array:
    """cvt; integers keep their sign in a wider register. Of two operands the first becomes the upper half."""
    if low is not None:
        both = [_converted(words, of, to.removesuffix("x2"), each).astype(np.uint32) for each in (values, low)]
        return both[1] | both[0] << np.uint32(16)
    if values.dtype.kind in "iu":
        if to[0] in "us":
            return extended(values.astype(np.int64).view(np.uint64) if values.dtype.kind == "i" else values, to)
        return bits_of(values.astype(np.float64 if to == "bf16" else np.float32), to)
    values = flushed(values) if "ftz" in words else values
    whole = [WHOLE[word] for word in words if word in WHOLE]
    values = whole[0](values) if whole else values
    if to[0] in "us":
        return _whole_number(values.astype(np.float64), to)
    if "sat" in words:  # NaN, and zeros of both signs, become 0
        values = np.where(values > 0, np.minimum(values, np.float32(1)), np.float32(0))
    if "rz" in words:
        return (np.where(np.isnan(values), NAN, values.view(np.uint32)) >> np.uint32(16)).astype(np.uint16)
    return bits_of(values, to)


def _whole_number(values: Array, to: str) -> Array:
    """float64 that hold whole numbers as an integer type: the nearest there is; for NaN 0, or the top bit of 64."""
    limits = np.iinfo((SIGNED if to[0] == "s" else UNSIGNED)[width(to)])
    inside = (values > float(limits.min)) & (values < float(limits.max))
    found = np.where(inside, values, 0).astype(limits.dtype)
    found = np.where(values >= float(limits.max), limits.max, found)
    found = np.where(values <= float(limits.min), limits.min, found).astype(limits.dtype).view(UNSIGNED[width(to)])
    none = UNSIGNED[width(to)](1 << 63 if width(to) == 64 else 0)
    return extended(np.where(np.isnan(values), none, found), to)


def _compared(words: Sequence[str], a: Array, b: Array) -> Array:
    """setp's first word on floats. Ordered relations are false of a NaN, unordered ones (`ltu`) true."""
    relation = words[1]
    if "ftz" in words:
        a, b = flushed(a), flushed(b)
    unordered = np.isnan(a) | np.isnan(b)
    if relation in ("nan", "num"):
        return unordered if relation == "nan" else ~unordered
    if relation in COMPARE:
        return COMPARE[relation](a, b) & ~unordered
    return COMPARE[relation.removesuffix("u")](a, b) | unordered
