"""Error of an output [T, H, Dh] against a reference, as every table of the lab reports it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ErrorStats:
    """Errors of one output against one reference. Empty outputs give zeros and share_equal 1.

    An error where the reference is 0 is no number of ulps: the three in ulps leave it out, and are NaN where no element
    is left. mean_ulp is a trimmed mean: over all elements it has no limit, since |error| / |reference| follows the few
    smallest references (it grows with the logarithm of the number of elements). So the last 1 % of elements, NaN among
    them, count in max_ulp alone.
    """

    max_abs: float  # largest |actual - reference|
    mean_abs: float
    rms: float
    rel_rms: float  # rms over heads of (rms of the head's error / rms of the head's reference)
    max_ulp: float  # in units of the bf16 spacing at the reference
    p99_ulp: float
    mean_ulp: float  # of the elements up to p99_ulp
    share_equal: float  # elements equal to the reference, rounded once to bf16
    signed_mean: float  # mean error along the reference's sign / mean |reference|: below 0 shrinks, above 0 grows
    at_token: int  # where max_abs lies
    at_head: int
    at_channel: int

    def row(self) -> dict[str, float | int]:
        return dataclasses.asdict(self)


def bf16_ulp(value: Tensor) -> Tensor:
    """Spacing of bf16 numbers at |value|, float64: 2^(floor(log2 |value|) - 7), that of the subnormals below 2^-126."""
    exponent = torch.frexp(value.to(torch.float64)).exponent - 1
    exponent = torch.where(value == 0, -126, exponent).clamp(min=-126)
    return ((exponent.to(torch.int64) - 7 + 1023) << 52).view(torch.float64)  # 2^(exponent - 7), assembled from bits


def nearest_bf16(value: Tensor) -> Tensor:
    """float64 rounded once to bf16, ties to even, in float64. A cast rounds twice, by way of float32: of random values
    about one in 2^17 lies so near a tie of bf16 that it comes out an ulp off."""
    ulp = bf16_ulp(value.nan_to_num())
    return ((value / ulp).round() * ulp).to(torch.bfloat16).to(torch.float64)  # the cast makes infinities alone


def error_stats(*, actual: Tensor, reference: Tensor) -> ErrorStats:
    """Compares two tensors [T, H, Dh] of any floating type, in float64.

    NaN against NaN and infinity against the same infinity count as equal; NaN or infinity on one side only makes
    the errors NaN or infinite. Raises ValueError if the shapes differ.
    """
    if actual.shape != reference.shape:
        raise ValueError(f"actual has shape {list(actual.shape)}, reference {list(reference.shape)}")
    if actual.numel() == 0:
        return ErrorStats(*[0.0] * 7, 1.0, 0.0, -1, -1, -1)
    actual, reference = actual.to(torch.float64), reference.to(torch.float64)
    same = (actual == reference) | (actual.isnan() & reference.isnan())
    error = torch.where(same, 0.0, actual - reference)
    size = error.abs()
    ulps = torch.where(same, 0.0, size / bf16_ulp(reference.nan_to_num()))[same | (reference != 0)]
    p99_ulp = _quantile(ulps, 0.99)
    stored = nearest_bf16(reference)
    equal = (actual == stored) | (actual.isnan() & stored.isnan())
    head_error = error.square().mean(-1).sqrt()
    head_size = reference.nan_to_num().square().mean(-1).sqrt()
    relative = torch.where(head_error == 0, 0.0, head_error / head_size)
    magnitude = reference.nan_to_num().abs().mean()
    at = torch.unravel_index(size.nan_to_num(nan=math.inf).argmax(), size.shape)
    return ErrorStats(
        max_abs=size.max().item(),
        mean_abs=size.mean().item(),
        rms=error.square().mean().sqrt().item(),
        rel_rms=relative.square().mean().sqrt().item(),
        max_ulp=ulps.max().item() if len(ulps) else math.nan,
        p99_ulp=p99_ulp,
        mean_ulp=ulps[ulps <= p99_ulp].mean().item(),
        share_equal=equal.double().mean().item(),
        signed_mean=((error * reference.sign()).mean() / magnitude).item() if magnitude else 0.0,
        at_token=int(at[0]),
        at_head=int(at[1]),
        at_channel=int(at[2]),
    )


def ulp_histogram(*, actual: Tensor, reference: Tensor) -> list[tuple[float, float, float]]:
    """(from, to, share) of |actual - reference| in bf16 ulps of the reference, in quarters up to 4, then the rest."""
    quarters = itertools.pairwise([*(i / 4 for i in range(17)), math.inf])
    actual, reference = actual.to(torch.float64), reference.to(torch.float64)
    ulps = (actual - reference).abs() / bf16_ulp(reference)
    return [(low, high, ((low <= ulps) & (ulps < high)).double().mean().item()) for low, high in quarters]


def _quantile(values: Tensor, q: float) -> float:
    """The q-quantile of values [n] by rank, NaN of none; torch.quantile refuses more than 2^24 elements."""
    return values.kthvalue(max(1, math.ceil(q * len(values)))).values.item() if len(values) else math.nan
