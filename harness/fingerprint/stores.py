"""How a value is held: the words of a plan, and those that an answer can have besides."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from castpoint.kernels.plan import KEEP, RTZ, STORAGE
from castpoint.variants import spec

# To nearest as RNE, but for ties, which go away from zero (IEEE 754 roundTiesToAway, PTX's .rna) or toward it. No plan
# of the lab has them: an answer can.
RNA, RNZ = "bf16-rna", "bf16-rnz"


def storages(narrow: str) -> tuple[str, str, str]:
    """The words of a boundary where `bf16`, or `fp16`, is what values are rounded to: kept, to nearest, truncated."""
    return KEEP, f"{narrow}-rne", f"{narrow}-rtz"


def round_to(value: Tensor, storage: str) -> Tensor:
    """fp32 value as that storage holds it, in fp32; ties away or toward zero, and fp16, besides those of a plan."""
    if storage in STORAGE:
        return spec.round_to(value, storage)
    if storage.startswith("fp16"):
        return _half(value, storage)
    half = 0x8000 if storage == RNA else 0x7FFF
    return spec.round_to((value.view(torch.int32) + half).view(torch.float32), RTZ)


def _half(value: Tensor, storage: str) -> Tensor:
    if storage == "fp16-rne":
        return value.half().float()
    exponent = torch.frexp(value).exponent.clamp(min=-13)  # subnormals are multiples of 2^-24
    unit = torch.ldexp(torch.ones_like(value), exponent - 11).double()
    steps = value.double().abs() / unit
    steps = {"rtz": steps.floor(), "rna": (steps + 0.5).floor(), "rnz": (steps - 0.5).ceil()}[storage[-3:]]
    rounded = (steps * unit).copysign(value.double())
    most = 65504.0 if storage.endswith("rtz") else math.inf  # the largest of fp16
    return torch.where(rounded.abs() > 65504, rounded.sign() * most, rounded).float().where(value.isfinite(), value)
