"""What PTX's arithmetic instructions compute, on numpy arrays of their types.

Every one is of isa.TABLE. Approximate instructions are rounded correctly here, ex2, lg2 and rsqrt as far as float64
tells; a GPU may be off by the error that the PTX ISA states for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

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
INTEGER: dict[str, np.ufunc] = {**MODULAR, "min": np.minimum, "max": np.maximum}
WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@functools.cache
def operation(words: tuple[str, ...]) -> Callable[..., Array]:
    """What an opcode makes of its sources' bits, in their order: bits, or a predicate. Predicates are bool."""
    name, kind = words[0], words[-1]
    integer = kind[0] in "bus" and kind[1:].isdigit()
    if kind == "pred":
        return {"mov": _truth, "not": lambda a: ~_truth(a)}.get(name) or functools.partial(_of_truths, LOGIC[name])
    if name == "setp":
        order = COMPARE.get(UNSIGNED_ORDER.get(words[1], words[1]))
        found = functools.partial(_of_words, order, kind) if integer else functools.partial(_compared, words, kind)
        return (lambda a, b, more: LOGIC[words[2]](found(a, b), _truth(more))) if words[2] in LOGIC else found
    if name == "selp":
        return functools.partial(_selected, f"b{width(kind)}")
    if name == "mov":
        return functools.partial(read, kind=f"b{width(kind)}")
    if name == "cvt":
        return functools.partial(_converted, words, kind, words[-2])
    if name == "mad" and "wide" in words:
        product = operation(("mul", "wide", kind))
        return lambda a, b, c: product(a, b) + read(c, "u64")
    if name in SINGLE and kind == "f32" and "ftz" not in words:
        return functools.partial(_of_singles, SINGLE[name])
    if name in MODULAR and integer and not {"wide", "hi"} & set(words):
        return functools.partial(_of_words, MODULAR[name], f"b{width(kind)}")
    return lambda *operands: _arithmetic(words, kind, operands)


def _truth(bits: Array) -> Array:
    """A predicate, which may be a number."""
    return bits.astype(bool, copy=False)


def _of_truths(function: Binary, a: Array, b: Array) -> Array:
    return function(_truth(a), _truth(b))


def _of_words(function: Binary, kind: str, a: Array, b: Array) -> Array:
    return function(read(a, kind), read(b, kind))


def _of_singles(function: Binary, a: Array, b: Array) -> Array:
    return bits_of(function(read(a, "f32"), read(b, "f32")), "f32")


def _selected(kind: str, a: Array, b: Array, chosen: Array) -> Array:
    return np.where(chosen, read(a, kind), read(b, kind))


def _arithmetic(words: Sequence[str], kind: str, operands: Sequence[Array]) -> Array:
    """Bits of add, mul, fma, ... of operands, bits of that type (`bf16x2`: two of them)."""
    if kind.endswith("x2"):
        half = kind.removesuffix("x2")
        shift = np.uint32(width(half))
        halves = [[bits.astype(np.uint32) >> shift * np.uint32(n) for bits in operands] for n in (0, 1)]
        low, high = (_arithmetic(words, half, each) for each in halves)
        return low.astype(np.uint32) | high.astype(np.uint32) << shift
    if kind in ("f32", "bf16"):
        return _of_floats(words, kind, operands)
    return _of_integers(words, kind, operands)


def _of_floats(words: Sequence[str], kind: str, operands: Sequence[Array]) -> Array:
    ftz, name = "ftz" in words, words[0]
    if name in ("neg", "abs", "copysign"):  # of bits: a NaN keeps its own
        bits = _signed(name, kind, operands)
        return _flushed_bits(bits) if ftz else bits
    values = [flushed(value) if ftz else value for value in (read(bits, kind) for bits in operands)]
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


def _signed(name: str, kind: str, operands: Sequence[Array]) -> Array:
    word = UNSIGNED[width(kind)]
    sign = word(1 << width(kind) - 1)
    bits = operands[0].astype(word)
    if name == "copysign":  # the sign of the first, all else of the second
        return bits & sign | operands[1].astype(word) & ~sign
    return bits ^ sign if name == "neg" else bits & ~sign


def _extreme(words: Sequence[str], a: Array, b: Array) -> Array:
    """max and min: of two zeros the positive one is larger; .xorsign.abs: of sizes, with the sign of the product."""
    if "xorsign" in words:
        sign = np.where(np.signbit(a) ^ np.signbit(b), np.float32(-1), np.float32(1))
        return sign * _extreme([word for word in words if word not in ("xorsign", "abs")], np.abs(a), np.abs(b))
    larger, smaller = (np.maximum, np.minimum) if "NaN" in words else (np.fmax, np.fmin)
    negative = (np.logical_and if words[0] == "max" else np.logical_or)(np.signbit(a), np.signbit(b))
    zero = np.where(negative, np.float32(-0.0), np.float32(0))
    return np.where((a == 0) & (b == 0), zero, (larger if words[0] == "max" else smaller)(a, b))


def _of_integers(words: Sequence[str], kind: str, operands: Sequence[Array]) -> Array:
    name, bits = words[0], width(kind)
    if name in ("shl", "shr"):
        return _shifted(name, read(operands[0], kind), read(operands[1], "u32"), bits)
    if name == "bfe":
        start, count = (read(operand, "u8") for operand in operands[1:])
        return _field(read(operands[0], kind), start, count).astype(UNSIGNED[bits])
    values = [read(operand, kind) for operand in operands]
    a = values[0]
    if "wide" in words or "hi" in words:
        result = _long_product(words, bits, *values)
    elif name == "prmt":
        result = _permuted(*values)
    elif name == "lop3":
        result = _table(*values)
    elif name in ("div", "rem"):
        result = _divided(name, *values)
    elif name == "mad":
        result = a * values[1] + values[2]
    elif name in ("not", "neg", "abs"):
        result = {"not": np.invert, "neg": np.negative, "abs": np.abs}[name](a)
    else:
        result = INTEGER[name](*values)
    return np.asarray(result) if "wide" in words else np.asarray(result).astype(UNSIGNED[bits], copy=False)


def _long_product(words: Sequence[str], bits: int, a: Array, b: Array) -> Array:
    """mul.wide and mul.hi."""
    if bits == 64:
        exact = a.astype(object) * b.astype(object) >> 64 & (1 << 64) - 1
        return np.asarray(exact).astype(np.uint64)
    long = (SIGNED if a.dtype.kind == "i" else UNSIGNED)[64]
    product = a.astype(long) * b.astype(long)
    return product.view(np.uint64) if "wide" in words else product >> long(bits)


def _divided(name: str, a: Array, b: Array) -> Array:
    """div, rounded towards zero, and what it leaves."""
    if a.dtype.kind == "i":
        a, b = a.astype(np.int64), b.astype(np.int64)
    sizes = np.abs(a).astype(np.uint64), np.abs(b).astype(np.uint64)  # 2^63 too
    quotient = sizes[0] // sizes[1]
    quotient = np.where((a < 0) ^ (b < 0), np.negative(quotient), quotient)
    return quotient if name == "div" else a.astype(np.uint64) - quotient * b.astype(np.uint64)


def _shifted(name: str, a: Array, by: Array, bits: int) -> Array:
    """Shifts by the type's width or more give zeros, or copies of the sign."""
    if by.ndim == 0 and by < bits:
        one = a.dtype.type(by)
        return (a << one if name == "shl" else a >> one).astype(UNSIGNED[bits], copy=False)
    most = np.minimum(by, np.uint32(bits - 1)).astype(a.dtype)
    moved = np.left_shift(a, most) if name == "shl" else np.right_shift(a, most)
    kept = name == "shr" and a.dtype.kind == "i"
    return (moved if kept else np.where(by >= bits, a.dtype.type(0), moved)).astype(UNSIGNED[bits])


def _field(a: Array, start: Array, count: Array) -> Array:
    """bfe: so many bits from that one on, of a with its sign, or zeros, before it."""
    if start.ndim == count.ndim == 0 and a.dtype.kind == "u" and start < 8 * a.itemsize and count < 8 * a.itemsize:
        return a >> a.dtype.type(start) & a.dtype.type((1 << int(count)) - 1)
    wide = a.astype((SIGNED if a.dtype.kind == "i" else UNSIGNED)[64])
    word = wide.dtype.type
    first, size = np.minimum(start, 63).astype(word), np.minimum(count, 64).astype(word)
    moved = wide >> first if a.dtype.kind == "i" else np.where(start > 63, word(0), wide >> first)
    left = np.minimum(word(64) - size, word(63))
    return np.where(size == 0, word(0), moved << left >> left)


def _permuted(a: Array, b: Array, choice: Array) -> Array:
    """prmt: four bytes of a and b, or copies of their signs."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.uint32(0)
    for n in range(4):
        nibble = choice >> np.uint32(4 * n) & np.uint32(15)
        if choice.ndim == 0 and nibble < 8:
            byte = (b if nibble & 4 else a) >> np.uint32(8 * (nibble & 3)) & np.uint32(255)
            result = result | byte << np.uint32(8 * n)
            continue
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


def _converted(words: Sequence[str], of: str, to: str, *operands: Array) -> Array:
    """cvt; integers keep their sign in a wider register. Of two operands the first becomes the upper half."""
    if to.endswith("x2"):
        high, low = (_converted(words, of, to.removesuffix("x2"), bits).astype(np.uint32) for bits in operands)
        return low | high << np.uint32(16)
    (bits,) = operands
    values = read(bits, of)
    if values.dtype.kind in "iu":
        if to[0] in "us":
            return extended(extended(bits, of), to)
        return bits_of(values.astype(np.float64 if to == "bf16" else np.float32), to)
    values = flushed(values) if "ftz" in words else values
    whole = [WHOLE[word] for word in words if word in WHOLE]
    values = whole[0](values) if whole else values
    if to[0] in "us":
        return _whole_number(values.astype(np.float64), to)
    if "sat" in words:  # NaN, and zeros of both signs, become 0
        values = np.where(values > 0, np.minimum(values, np.float32(1)), np.float32(0))
    if "rz" in words:
        return np.where(np.isnan(values), NAN, values.view(np.uint32)).astype(np.uint32) >> np.uint32(16)
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


def _compared(words: Sequence[str], kind: str, a: Array, b: Array) -> Array:
    """setp's first word on floats. Ordered relations are false of a NaN, unordered ones (`ltu`) true."""
    relation, a, b = words[1], read(a, kind), read(b, kind)
    if "ftz" in words:
        a, b = flushed(a), flushed(b)
    unordered = np.isnan(a) | np.isnan(b)
    if relation in ("nan", "num"):
        return unordered if relation == "nan" else ~unordered
    if relation in COMPARE:
        return COMPARE[relation](a, b) & ~unordered
    return COMPARE[relation.removesuffix("u")](a, b) | unordered
