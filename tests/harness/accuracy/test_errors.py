"""Error statistics against values worked out by hand, and their behaviour on NaN, infinity and planted faults."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from castpoint.harness.accuracy.errors import bf16_ulp, error_stats, ulp_histogram


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
