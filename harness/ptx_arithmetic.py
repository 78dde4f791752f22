"""What PTX's arithmetic instructions compute, on numpy arrays of their types.

Approximate instructions (rsqrt.approx, div.full, ex2.approx, ...) are rounded correctly here; a GPU may be off by the
error that the PTX ISA states for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from harness.ptx_numbers import SIGNED, UNSIGNED, Array, bits_of, flushed, fma, read, width

Binary = Callable[[Array, Array], Array]
COMPARE: dict[str, Binary] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
LOGIC: dict[str, Binary] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
UNARY: dict[str, Callable[[Array], Array]] = {  # of floats
    "neg": np.negative,
    "abs": np.abs,
    "sqrt": np.sqrt,  # of float32, correctly rounded
    "rcp": lambda a: np.float32(1) / a,
    "rsqrt": lambda a: 1 / np.sqrt(a.astype(np.float64)),
    "ex2": lambda a: np.exp2(a.astype(np.float64)),
}
INTEGER: dict[str, np.ufunc] = {
    **LOGIC, "add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.minimum, "max": np.maximum,
}  # fmt: skip


def arithmetic(words: Sequence[str], kind: str, operands: Sequence[Array]) -> Array:
    """Bits of add, mul, fma, ... of operands, bits of that type (`bf16x2`: two of them). Raises NotImplementedError
    for what no kernel here has needed yet."""
    if kind.endswith("x2"):
        half = kind.removesuffix("x2")
        shift = np.uint32(width(half))
        low, high = (arithmetic(words, half, [bits >> shift * np.uint32(n) for bits in operands]) for n in (0, 1))
        return low.astype(np.uint32) | high.astype(np.uint32) << shift
    values = [read(bits, kind) for bits in operands]
    if kind in ("f32", "bf16"):
        return _of_floats(words, kind, values)
    return _of_integers(words, width(kind), values)


def _of_floats(words: Sequence[str], kind: str, values: list[Array]) -> Array:
    if not {"rz", "rm", "rp", "sat", "xorsign"}.isdisjoint(words):
        raise NotImplementedError("this rounding")
    ftz, name = "ftz" in words, words[0]
    values = [flushed(value) for value in values] if ftz else values
    if name in UNARY:
        result = UNARY[name](values[0])
    elif name == "fma":
        result = fma(*values)
    elif name in ("add", "sub"):
        result = fma(values[0], np.float32(1), values[1] if name == "add" else -values[1])
    elif name == "mul":
        result = fma(*values, np.float32(-0.0))
    elif name == "div":
        result = values[0] / values[1]
    elif name in ("max", "min"):
        larger, smaller = (np.maximum, np.minimum) if "NaN" in words else (np.fmax, np.fmin)
        result = (larger if name == "max" else smaller)(*values)
    else:
        raise NotImplementedError(name)
    bits = bits_of(result, kind)
    return flushed(bits.view(np.float32)).view(np.uint32) if ftz else bits


def _of_integers(words: Sequence[str], bits: int, values: list[Array]) -> Array:
    name, a = words[0], values[0]
    if "wide" in words or "hi" in words:
        return _long_product(words, bits, values)
    if name in ("shl", "shr"):
        result = _shifted(name, bits, *values)
    elif name == "bfe":
        result = _field(bits, *values)
    elif name == "prmt":
        result = _permuted(*values)
    elif name == "lop3":
        result = _table(*values)
    elif name in ("div", "rem"):
        a, b = (value.astype(np.int64) if value.dtype.kind == "i" else value for value in values)
        quotient = np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))  # towards zero
        result = quotient if name == "div" else a - quotient * b
    elif name == "mad":
        result = a * values[1] + values[2]
    elif name in ("not", "neg"):
        result = ~a if name == "not" else np.negative(a)
    elif name in INTEGER:
        result = INTEGER[name](*values)
    else:
        raise NotImplementedError(name)
    return np.asarray(result).astype(UNSIGNED[bits])


def _long_product(words: Sequence[str], bits: int, values: list[Array]) -> Array:
    """mul.wide and mul.hi of 16 or 32 bits."""
    if bits > 32:
        raise NotImplementedError("a product of 128 bits")
    long = (SIGNED if values[0].dtype.kind == "i" else UNSIGNED)[64]
    product = values[0].astype(long) * values[1].astype(long)
    return product.view(np.uint64) if "wide" in words else (product >> long(bits)).astype(UNSIGNED[bits])


def _shifted(name: str, bits: int, a: Array, by: Array) -> Array:
    """Shifts by the type's width or more give zeros, or copies of the sign."""
    by = by.view(UNSIGNED[bits])
    most = np.minimum(by, UNSIGNED[bits](bits - 1)).view(a.dtype)
    moved = np.left_shift(a, most) if name == "shl" else np.right_shift(a, most)
    return moved if name == "shr" and a.dtype.kind == "i" else np.where(by >= bits, a.dtype.type(0), moved)


def _field(bits: int, a: Array, start: Array, count: Array) -> Array:
    """bfe of a field that lies inside of the register, with its sign."""
    first, size = int(np.unique(start).item()) & 255, int(np.unique(count).item()) & 255
    if not 0 < size <= bits - first:
        raise NotImplementedError("a bit field that reaches out of its register")
    kind = a.dtype.type
    return a << kind(bits - first - size) >> kind(bits - size)


def _permuted(a: Array, b: Array, choice: Array) -> Array:
    """prmt: four bytes of a and b."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.uint32(0)
    for n in range(4):
        nibble = choice >> np.uint32(4 * n) & np.uint32(15)
        if (nibble & np.uint32(8)).any():
            raise NotImplementedError("prmt that copies a sign")
        byte = both >> nibble.astype(np.uint64) * np.uint64(8) & np.uint64(255)
        result = result | byte.astype(np.uint32) << np.uint32(8 * n)
    return result


def _table(a: Array, b: Array, c: Array, table: Array) -> Array:
    """lop3: the logical function of three bits whose results are the table's bits."""
    result = np.uint32(0)
    for n in range(8):
        if int(table) >> n & 1:
            result = result | ((a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c))
    return result


def converted(words: Sequence[str], values: Array, to: str) -> Array:
    """cvt of values of one type to bits of another; integers keep their sign in a wider register."""
    rounding = [word for word in words[1:-2] if word not in ("rn", "ftz", "rni", "rzi", "rmi", "rpi")]
    if rounding:
        raise NotImplementedError("this conversion")
    values = flushed(values) if "ftz" in words and values.dtype.kind == "f" else values
    if to[0] not in "us":
        exact = values.dtype.kind in "iu" and to == "bf16"
        return bits_of(values.astype(np.float64) if exact else values, to)
    if values.dtype.kind != "f":
        return extended_from(values)
    how = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    whole = how[next(word for word in words if word in how)](values).astype(np.float64)
    if width(to) > 32:
        raise NotImplementedError("a float as an integer of 64 bits")
    limits = np.iinfo((SIGNED if to[0] == "s" else UNSIGNED)[width(to)])
    return extended_from(np.where(np.isnan(whole), 0, np.clip(whole, limits.min, limits.max)).astype(np.int64))


def extended_from(values: Array) -> Array:
    return values.astype(np.int64).view(np.uint64) if values.dtype.kind == "i" else values


def compared(words: Sequence[str], a: Array, b: Array) -> Array:
    """setp's first word on floats or integers. Ordered relations are false of a NaN, unordered ones (`ltu`) true."""
    relation = words[1]
    if "ftz" in words:
        a, b = flushed(a), flushed(b)
    if a.dtype.kind != "f":
        relation = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(relation, relation)
        return COMPARE[relation](a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if relation in ("nan", "num"):
        return unordered if relation == "nan" else ~unordered
    if relation in COMPARE:
        return COMPARE[relation](a, b) & ~unordered
    return COMPARE[relation.removesuffix("u")](a, b) | unordered
