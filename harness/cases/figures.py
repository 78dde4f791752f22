"""What is measured of the two outputs of a case, before and after, [..., D] float64: one number, or one a row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from castpoint.harness.accuracy.errors import bf16_ulp


def share(before: Tensor, after: Tensor) -> Tensor:
    return (after != before).double().mean()


def share_by_row(before: Tensor, after: Tensor) -> Tensor:
    return (after != before).double().mean(-1)


def largest(before: Tensor, after: Tensor) -> Tensor:
    return (after - before).abs().max()


def relative(before: Tensor, after: Tensor) -> Tensor:
    """|after - before| / |before|, where before is not 0."""
    return ((after - before).abs() / before.abs())[before != 0]


def ulps(before: Tensor, after: Tensor) -> Tensor:
    """|after - before| in bf16 ulps of before, where before is not 0."""
    return ((after - before).abs() / bf16_ulp(before))[before != 0]


def beyond_ulps(limit: float, before: Tensor, after: Tensor) -> Tensor:
    """Of the elements that differ, the share that moves by more than `limit` ulps."""
    moved = ulps(before, after)
    return (moved[moved > 0] > limit).double().mean()


def magnitude_bias(before: Tensor, after: Tensor) -> Tensor:
    return ((after.abs() - before.abs()) / before.abs())[before != 0].mean()


def relative_l1(before: Tensor, after: Tensor) -> Tensor:
    return (after - before).abs().mean() / before.abs().mean()


def outside(before: Tensor, after: Tensor) -> Tensor:
    """Share outside rtol = atol = 1e-3, the test of the kernel that met the truncating multiply."""
    return ((after - before).abs() > 1e-3 + 1e-3 * before.abs()).double().mean()


def exponent(errors: Tensor) -> float:
    """Slope of log(errors) against log(1, 2, 3, …), the first two left out: 1 is linear, 0.5 a square root."""
    log_n = torch.arange(1, len(errors) + 1, dtype=torch.float64).log()[2:]
    log_e = errors.log()[2:]
    log_n = log_n - log_n.mean()
    return ((log_n * (log_e - log_e.mean())).sum() / log_n.square().sum()).item()


def changes(before: Tensor, after: Tensor) -> dict[str, float]:
    """The columns share_differ, max_ulp and signed_bias, see cases.case.Measured."""
    moved = ulps(before, after)
    size = before.abs().mean()
    return {
        "share_differ": share(before, after).item(),
        "max_ulp": moved.max().item() if len(moved) else 0.0,
        "signed_bias": ((after - before) * before.sign()).mean().item() / size.item() if size else math.nan,
    }
