"""Error statistics against values worked out by hand, and their behaviour on NaN, infinity and planted faults."""

import math
import struct
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from castpoint.harness.accuracy.errors import bf16_ulp, error_stats, nearest_bf16, ulp_histogram


@pytest.mark.parametrize(
    ("value", "ulp"),
    [
        (1.0, 2**-7),
        (1.99, 2**-7),
        (2.0, 2**-6),
        (-3.0, 2**-6),
        (0.75, 2**-8),
        (0.0, 2**-133),
        (2**-126, 2**-133),
        (2**-130, 2**-133),
    ],
)
def test_ulp(value: float, ulp: float) -> None:
    assert bf16_ulp(torch.tensor([value], dtype=torch.float64)).item() == ulp


@given(st.floats(min_value=2.0**-100, max_value=2.0**100, width=32))
@settings(max_examples=200, deadline=None)
def test_ulp_is_the_distance_to_the_next_bf16(value: float) -> None:
    stored = torch.tensor([value]).to(torch.bfloat16)
    following = (stored.view(torch.int16) + 1).view(torch.bfloat16)
    assert (following.double() - stored.double()).item() == bf16_ulp(stored.double()).item()


def test_by_hand() -> None:
    reference = torch.tensor([[[1.0, -2.0], [4.0, 4.0]]])  # [1, 2, 2]
    actual = reference + torch.tensor([[[0.0, 2**-6], [0.0, 2**-4]]])
    stats = error_stats(actual=actual, reference=reference)
    assert stats.max_abs == 2**-4 and stats.mean_abs == (2**-6 + 2**-4) / 4
    assert stats.max_ulp == 2 and stats.mean_ulp == (1 + 2) / 4 and stats.share_equal == 0.5
    assert stats.rms == math.sqrt((2**-12 + 2**-8) / 4)
    heads = [math.sqrt(2**-12 / 2) / math.sqrt(2.5), math.sqrt(2**-8 / 2) / 4]
    assert stats.rel_rms == pytest.approx(math.sqrt(sum(h * h for h in heads) / 2), rel=1e-12)
    assert stats.signed_mean == (-(2**-6) + 2**-4) / 4 / 2.75
    assert (stats.at_token, stats.at_head, stats.at_channel) == (0, 1, 1)


def test_equal_means_equal_to_the_rounded_reference() -> None:
    reference = torch.tensor([[[1.001, 3.0]]], dtype=torch.float64)
    assert error_stats(actual=reference.to(torch.bfloat16), reference=reference).share_equal == 1


def test_the_reference_is_rounded_once() -> None:
    """By way of float32 the first falls on the tie between 1 and 1 + 2^-7, and from there to the even neighbour."""
    above, below = 1 + 2**-8 + 2**-40, 1 + 3 * 2**-8 - 2**-40
    value = torch.tensor([[[above, below, -above, 1.0]]], dtype=torch.float64)
    assert value.to(torch.bfloat16).flatten().tolist() == [1, 1 + 2**-6, -1, 1], "a cast rounds twice"
    once = torch.tensor([[[1 + 2**-7, 1 + 2**-7, -1 - 2**-7, 1]]], dtype=torch.float64)
    assert nearest_bf16(value).equal(once) and error_stats(actual=once, reference=value).share_equal == 1


@given(st.integers(0, 2**16 - 1), st.sampled_from([0, 1, 2**20, 2**44 - 1, 2**44, 2**44 + 1, 2**45 - 1]))
@settings(max_examples=300, deadline=None)
def test_rounding_once_is_the_nearest_by_exact_fractions(word: int, behind: int) -> None:
    """Any bf16 and any float64 that begins with its bits: nearest of the two beside it, ties to the even word."""
    sign, exponent, mantissa = word >> 15, word >> 7 & 255, word & 127
    if exponent in (0, 255):
        return  # subnormal to float64 in other bits; infinite
    bits = (sign << 63) | ((exponent - 127 + 1023) << 52) | (mantissa << 45) | behind
    value = struct.unpack("<d", struct.pack("<Q", bits))[0]
    low, step = (
        (-1) ** sign * Fraction(128 + mantissa) * Fraction(2) ** (exponent - 134),
        Fraction(2) ** (exponent - 134),
    )
    part = abs(Fraction(value) - low) / step
    up = part > Fraction(1, 2) or (part == Fraction(1, 2) and mantissa % 2 == 1)
    expected = abs(low) + (step if up else 0)
    found = nearest_bf16(torch.tensor([value], dtype=torch.float64)).item()
    assert math.copysign(1, found) == (-1) ** sign
    assert found == (-1) ** sign * (math.inf if expected >= Fraction(2) ** 128 else float(expected))


def test_rounding_once_at_the_ends_of_the_range() -> None:
    largest, tie = 2.0**127 * (2 - 2**-7), 2.0**127 * (2 - 2**-8)
    values = [0.0, -0.0, 1e-300, 2**-134, 2**-134 * 1.001, 3 * 2**-134, 2**-126 * (1 - 2**-9)]
    values += [math.nextafter(tie, 0), tie, 1e300, math.inf, -math.inf]
    found = nearest_bf16(torch.tensor(values, dtype=torch.float64)).tolist()
    assert found[:7] == [0, 0, 0, 0, 2**-133, 2**-132, 2**-126]
    assert found[7:] == [largest, math.inf, math.inf, math.inf, -math.inf]
    assert math.copysign(1, found[1]) == -1
    assert nearest_bf16(torch.tensor([math.nan], dtype=torch.float64)).isnan().all()


def test_an_error_at_a_reference_of_zero_is_no_number_of_ulps() -> None:
    reference = torch.tensor([[[0.0, 0.0, 1.0, -2.0]]], dtype=torch.float64)
    actual = reference + torch.tensor([0.0, 1.0, 2**-7, 0.0], dtype=torch.float64)
    stats = error_stats(actual=actual, reference=reference)
    assert (stats.max_ulp, stats.p99_ulp, stats.mean_ulp) == (1, 1, 1 / 3)
    assert stats.max_abs == 1 and stats.share_equal == 0.5 and stats.at_channel == 1, "it counts everywhere else"
    nothing, zeros = error_stats(actual=actual + 1, reference=reference * 0), torch.zeros(1, 1, 4)
    assert math.isnan(nothing.max_ulp) and math.isnan(nothing.p99_ulp) and math.isnan(nothing.mean_ulp)
    assert nothing.max_abs == 2 + 2**-7 and nothing.share_equal == 0
    same = error_stats(actual=zeros, reference=zeros)
    assert (same.max_ulp, same.p99_ulp, same.mean_ulp, same.share_equal) == (0, 0, 0, 1)


def test_the_mean_of_ulps_does_not_follow_the_smallest_references() -> None:
    """Errors of one absolute size, and references of which one in a thousand is next to nothing; and 2 % NaN."""
    reference = 1 + torch.rand(1, 1, 10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    actual = reference + 2**-7
    small = reference.clone()
    small[..., ::1000] = 2.0**-120
    near = error_stats(actual=torch.where(small == reference, actual, small + 2**-7), reference=small)
    assert near.mean_ulp == error_stats(actual=actual, reference=reference).mean_ulp == 1
    assert near.max_ulp == 2.0**120 and near.p99_ulp == 1
    actual[..., :9] = math.nan
    lost = error_stats(actual=actual, reference=reference)
    assert math.isnan(lost.max_ulp) and math.isnan(lost.mean_abs) and lost.mean_ulp == 1
    actual[..., :200] = math.nan
    assert math.isnan(error_stats(actual=actual, reference=reference).mean_ulp)


def test_truncation_shows_as_a_negative_bias_and_noise_does_not() -> None:
    value = torch.randn(16, 8, 128, generator=torch.Generator().manual_seed(0))
    truncated = (value.view(torch.int32) & -(1 << 16)).view(torch.float32)
    nearest = value.to(torch.bfloat16)
    bias = error_stats(actual=truncated, reference=value).signed_mean
    assert -(2**-7) < bias < -(2**-10)
    assert abs(error_stats(actual=nearest, reference=value).signed_mean) < abs(bias) / 50


def test_nan_and_infinity() -> None:
    reference = torch.tensor([[[math.nan, math.inf, 1.0, 2.0]]])
    same = error_stats(actual=reference, reference=reference)
    assert same.max_abs == 0 and same.share_equal == 1
    one_sided = error_stats(actual=torch.tensor([[[math.nan, math.inf, math.nan, 2.0]]]), reference=reference)
    assert math.isnan(one_sided.max_abs) and one_sided.share_equal == 0.75 and one_sided.at_channel == 2


def test_empty_and_mismatched() -> None:
    assert error_stats(actual=torch.empty(0, 2, 4), reference=torch.empty(0, 2, 4)).share_equal == 1
    with pytest.raises(ValueError, match=r"\[1, 2, 4\], reference \[1, 2, 3\]"):
        error_stats(actual=torch.empty(1, 2, 4), reference=torch.empty(1, 2, 3))


def test_p99_is_the_value_that_99_percent_do_not_exceed() -> None:
    reference = torch.ones(1, 1, 1000, dtype=torch.float64)
    error = torch.arange(1000, dtype=torch.float64) * 2**-7
    assert error_stats(actual=reference + error, reference=reference).p99_ulp == 989


def test_histogram_shares_add_up() -> None:
    reference = torch.ones(1, 1, 4, dtype=torch.float64)
    actual = reference + torch.tensor([0, 0.3, 0.3, 9.0], dtype=torch.float64) * 2**-7
    shares = {low: share for low, _, share in ulp_histogram(actual=actual, reference=reference)}
    assert shares[0.0] == 0.25 and shares[0.25] == 0.5 and shares[4.0] == 0.25 and sum(shares.values()) == 1
