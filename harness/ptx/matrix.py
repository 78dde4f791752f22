"""PTX's instructions of whole warps: shuffles, matrices in shared memory, and products of matrices.

Fragments lie as the PTX ISA draws them (ldmatrix, mma.m16n8k16, wgmma.m64nNk16): in a warp, thread 4 g + t holds rows g
and g + 8, and columns 2 t and 2 t + 1 of each eight. A product is added to its accumulator in float64 and rounded
once: exact where the sums are. A tensor core truncates instead (conformance/tensor_model.py has the published model).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from castpoint.harness.ptx.memory import Shared, check_aligned
from castpoint.harness.ptx.numbers import Array, Unsupported, bits_of, read

LANE = np.arange(32)
G, T = LANE // 4, LANE % 4


def shuffle(values: Array, lanes: Array, mode: str) -> tuple[Array, Array]:
    """[W, 32] values of other threads, and whether there is one: `idx` of the one that lanes name, `bfly` of the
    exclusive or with lanes, `up` of the one so many before; a thread without one keeps its own. lanes: [W, 32], or
    one for all."""
    lanes = lanes.astype(np.int64) & 31
    source = {"idx": lanes, "bfly": LANE ^ lanes, "up": LANE - lanes}[mode]
    there = (source >= 0) & (source < 32)
    source = np.where(there, source, LANE)
    return (values[:, source] if source.ndim == 1 else np.take_along_axis(values, source, 1)), there


# ---------------------------------------------------------------- ldmatrix, stmatrix


def load(shared: Shared, starts: Array, addresses: Array, count: int, transposed: bool) -> list[Array]:
    """ldmatrix: count matrices of 8 x 8 halves, a register [W, 32] each. starts, addresses: [W, 32]; threads 8 n to
    8 n + 7 name the rows of the n-th."""
    check_aligned(addresses[:, : 8 * count], 16)
    matrices = addresses.reshape(-1, 4, 8).swapaxes(0, 1)[:count]
    if not transposed:
        return list(shared.load(starts, matrices[..., G] + 4 * T, 32))
    places = [matrices[..., row] + 2 * column for row, column in _halves(transposed=True)]
    low, high = (shared.load(starts, place, 16).astype(np.uint32) for place in places)
    return list(low | high << np.uint32(16))


def store(shared: Shared, starts: Array, addresses: Array, words: Sequence[Array], transposed: bool) -> None:
    """stmatrix: the reverse of load."""
    check_aligned(addresses[:, : 8 * len(words)], 16)
    for n, word in enumerate(words):
        for half, (row, column) in enumerate(_halves(transposed)):
            bits = (word >> np.uint32(16 * half)).astype(np.uint16)
            shared.store(starts, addresses[:, 8 * n + row] + 2 * column, bits, 16)


def _halves(transposed: bool) -> list[tuple[Array, Array]]:
    """Row and column, [32] each, of the lower and of the upper half of a thread's register."""
    return [(2 * T + half, G) if transposed else (G, 2 * T + half) for half in (0, 1)]


# ---------------------------------------------------------------- products


def mma(kind: str, a: Array, b: Array, c: Array) -> Array:
    """Accumulators [4, W, 32] of m16n8k16 in bf16 or m16n8k8 in tf32, A [4, W, 32] by rows and B [2, W, 32] by columns,
    and what they were; float32."""
    values_of, warps = (pairs if kind == "bf16" else tf32), c.shape[1]
    right = values_of(b).reshape(2, warps, 8, 4, -1).transpose(1, 2, 0, 3, 4).reshape(warps, 8, -1)
    total = left_of(values_of(a)) @ right.swapaxes(1, 2)
    parts = total.reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, warps, 32)
    return bits_of(c + parts, "f32")


def wgmma(a: Array, b: Array, c: Array | None, columns: int) -> Array:
    """Accumulators [groups, 128] of a [groups, 64, 16], b [groups, columns, 16] and what they were, float32 [columns /
    2, groups, 128]; c None: they start at zero."""
    total = (a @ b.swapaxes(1, 2)).reshape(len(a), 4, 2, 8, columns // 8, 4, 2)  # a warp holds 16 rows
    parts = total.transpose(4, 2, 6, 0, 1, 3, 5).reshape(columns // 2, -1, 128)
    return bits_of(parts + np.float32(0) if c is None else c + parts, "f32")


def left_of(values: Array) -> Array:
    """A [W, 16, columns] of the values [4, W, 32, v] in its four registers; 128 threads are four warps."""
    values = values.reshape(2, 2, -1, 8, 4, values.shape[-1])
    return values.transpose(2, 1, 3, 0, 4, 5).reshape(values.shape[2], 16, -1)


def described(shared: Shared, starts: Array, descriptors: Array, rows: int) -> Array:
    """[groups, rows, 16] of bf16 that matrix descriptors [groups] name, each row contiguous."""
    addresses = np.stack([_addresses(descriptor, rows) for descriptor in descriptors.tolist()])
    words = shared.load(starts[:, None, None], addresses, 64)
    return read(words.view(np.uint16), "bf16").astype(np.float64)


@functools.lru_cache(512)
def _addresses(descriptor: int, rows: int) -> Array:
    """[rows, 4] of each eight bytes of a matrix.

    Bits 0 to 13: address / 16. 32 to 45: bytes / 16 from eight rows to the next eight. 62 and 63: rows of 128, 64 or 32
    bytes, whose parts of 16 bytes are exchanged by the address bits three above their number.
    """
    if not descriptor >> 62 or descriptor >> 49 & 7:
        raise Unsupported("a matrix descriptor without swizzle, or with a base offset")
    line = 256 >> (descriptor >> 62)
    row, byte = np.arange(rows)[:, None], 8 * np.arange(4)
    address = 16 * (descriptor & 0x3FFF) + row // 8 * 16 * (descriptor >> 32 & 0x3FFF) + row % 8 * line + byte
    return address ^ (address >> 7 & line // 16 - 1) << 4


def pairs(words: Array) -> Array:
    """The two bf16 values of each register, the lower half's first, as float64."""
    return read(words.view(np.uint16), "bf16").astype(np.float64).reshape(*words.shape, 2)


def tf32(words: Array) -> Array:
    """The one tf32 value of each register, as float64: its low 13 bits are not read."""
    return read(words.view(np.uint32) & np.uint32(0xFFFFE000), "f32").astype(np.float64)[..., None]
