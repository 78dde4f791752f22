"""How a value is held: the words of a plan, and those that an answer can have besides. In 8 bits: to nearest with ties
to even, int8 also with ties away from zero or truncated; what is too large is the largest."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from castpoint.harness.compiled.loading import Fault
from castpoint.kernels.plan import KEEP, RTZ, STORAGE
from castpoint.variants import spec

# To nearest as RNE, but for ties, which go away from zero (IEEE 754 roundTiesToAway, PTX's .rna) or toward it. No plan
# of the lab has them: an answer can.
RNA, RNZ = "bf16-rna", "bf16-rnz"
EIGHT_BITS = {
    torch.float8_e4m3fn: ("e4m3-rne",),
    torch.float8_e5m2: ("e5m2-rne",),
    torch.int8: ("int8-rne", "int8-rna", "int8-rtz"),
}
ENDS = {"e4m3": 464.0, "e5m2": 61440.0, "int8": 127.5}  # beyond which nearest is none of theirs
MOST = {"e4m3": 448.0, "e5m2": 57344.0, "int8": 127.0}  # which they hold, of int8 on both sides
_INTEGERS = {"rne": torch.round, "rna": lambda v: (v.abs() + 0.5).floor().copysign(v), "rtz": torch.trunc}


def storages(narrow: str) -> tuple[str, str, str]:
    """The words of a boundary where `bf16`, or `fp16`, is what values are rounded to: kept, to nearest, truncated."""
    return KEEP, f"{narrow}-rne", f"{narrow}-rtz"


def round_to(value: Tensor, storage: str) -> Tensor:
    """fp32 value as that storage holds it, in fp32; ties away or toward zero, and fp16, besides those of a plan."""
    if storage in (*STORAGE, "fp16-rne", "fp16-rtz"):
        return spec.round_to(value, storage)
    if storage.startswith("fp16"):
        return _half(value, storage == "fp16-rna")
    if storage.startswith("int8"):
        return _INTEGERS[storage[-3:]](value).clamp(-128, 127)
    if storage[0] == "e":
        dtype = torch.float8_e4m3fn if storage == "e4m3-rne" else torch.float8_e5m2
        most = torch.finfo(dtype).max
        return value.clamp(-most, most).to(dtype).float()
    half = 0x8000 if storage == RNA else 0x7FFF
    return spec.round_to((value.view(torch.int32) + half).view(torch.float32), RTZ)


def _half(value: Tensor, away: bool) -> Tensor:
    """To the nearest of fp16, with ties away from zero or toward it."""
    exponent = torch.frexp(value).exponent.clamp(min=-13)  # subnormals are multiples of 2^-24
    unit = torch.ldexp(torch.ones_like(value), exponent - 11).double()
    steps = value.double().abs() / unit
    rounded = ((steps + 0.5).floor() if away else (steps - 0.5).ceil()) * unit
    rounded = torch.where(rounded > 65504, math.inf, rounded).copysign(value.double())
    return rounded.float().where(value.isfinite(), value)


def ulp(size: Tensor, storage: str) -> Tensor:
    """Of numbers of that size, float64, in the storage; of bf16 where that is only `bf16`."""
    if storage.startswith("int8"):
        return torch.ones_like(size)
    bits, least = {"fp32": (24, 2.0**-149), "fp16": (11, 2.0**-24), "e4m3": (4, 2.0**-9), "e5m2": (3, 2.0**-16)}.get(
        storage[:4], (8, 2.0**-133)
    )
    return torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent - bits).clamp(min=least)


def same(a: Any, b: Any) -> bool:
    """Whether both are tensors of the same numbers, NaN where that is."""
    alike = isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype
    return alike and torch.equal(*(value.nan_to_num(nan=7e37) for value in (a, b)))


def spread(scales: object, shape: list[int], size: int = 0) -> Tensor:
    """What each element of that shape was divided by, fp32: one number, one a row, or one for each equal part of a
    row, or for each of that size, the last one cut short; ones where nothing was returned. Raises Fault for anything
    else."""
    if scales is None:
        return torch.ones(shape)
    rows, width = math.prod(shape[:-1]), shape[-1]
    count = scales.numel() if isinstance(scales, Tensor) and scales.dtype == torch.float32 else 0
    if count == 1:
        return scales.reshape(1).expand(shape)
    parts = count // rows
    size = size if size and -(-width // size) == parts else max(width // max(parts, 1), 1)
    if not count or count % rows or -(-width // size) != parts:
        what = f"a tensor {list(scales.shape)} of {scales.dtype}" if isinstance(scales, Tensor) else str(scales)
        raise Fault(
            f"beside {shape} in 8 bits the callable returned {what}: expected scales in fp32: one for all, [T, 1] or "
            "[T, groups]"
        )
    scales = torch.where(scales == 0, 1, scales)  # of rows of zeros
    return scales.reshape(rows, -1).repeat_interleave(size, -1)[:, :width].reshape(shape)
