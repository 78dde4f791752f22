"""The device functions of kernels/rounding.py and the spec's roundings, against PyTorch and against sorted tables.

Bits, not closeness: all 65,536 bf16 values, and 2^20 fp32 patterns that hold every tie between bf16 values.
"""

from __future__ import annotations

import pytest
import torch
from rounding_net import (
    ROUNDINGS,
    applied,
    assert_same_patterns,
    check_rounding,
    every_bf16,
    fp32_patterns,
    rounded_by_table,
)
from support import DEVICE, KERNELS, assert_bit_equal

from castpoint.kernels import rounding
from castpoint.variants import spec

PATTERNS = 2**20


def test_patterns_hold_what_they_should():
    """The tests below are as good as their patterns."""
    value = fp32_patterns()
    bits = value.view(torch.int32)
    assert len(value) == PATTERNS
    assert len(bits[bits % 2**16 == 2**15].unique()) == 2**16  # every tie between two bf16 values
    magnitude = bits & 0x7FFFFFFF
    assert ((magnitude > 0) & (magnitude < 0x00800000)).sum() > 10_000  # subnormals
    assert (value == torch.inf).any() and (value == -torch.inf).any()
    assert ((magnitude > 0x7F800000) & (magnitude < 0x7FC00000)).any() and (magnitude >= 0x7FC00000).any()  # NaN
    assert (value.isfinite() & ~value.to(torch.bfloat16).isfinite()).any()  # overflow


def test_the_table_of_nearest_values_is_pytorchs_rounding():
    """Two definitions of rounding to nearest even that share nothing."""
    assert_bit_equal(actual=rounded_by_table("bf16-rne"), expected=fp32_patterns().to(torch.bfloat16).float())


@pytest.mark.parametrize("word", ROUNDINGS)
def test_device_rounding(word: str):
    check_rounding(KERNELS, word)


def test_device_round_to_nearest_is_pytorchs():
    value = fp32_patterns()
    actual = applied(rounding.round_to, value.to(DEVICE), "bf16-rne")
    assert_bit_equal(actual=actual, expected=value.to(torch.bfloat16).float())


def test_device_round_to_fp32_keeps_every_pattern():
    value = fp32_patterns()
    assert_same_patterns(actual=applied(rounding.round_to, value.to(DEVICE), "fp32"), expected=value)


@pytest.mark.parametrize("word", ROUNDINGS)
def test_nan_stays_nan_and_nothing_else_becomes_nan(word: str):
    value = fp32_patterns()
    name = "truncate_tf32" if word == "tf32" else "round_to"
    actual = applied(getattr(rounding, name), value.to(DEVICE), "" if word == "tf32" else word)
    assert torch.equal(actual.cpu().isnan(), value.isnan())


def test_overflow_goes_to_infinity_or_to_the_largest_value():
    largest_fp32 = torch.full((16,), torch.finfo(torch.float32).max, device=DEVICE)
    assert (applied(rounding.round_to, largest_fp32, "bf16-rne") == torch.inf).all()
    assert (applied(rounding.round_to, largest_fp32, "bf16-rtz") == torch.finfo(torch.bfloat16).max).all()


def test_widen_is_exact_for_every_bf16_pattern():
    value = every_bf16()
    shifted = (value.view(torch.int16).int() << 16).view(torch.float32)
    actual = applied(rounding.widen, value.to(DEVICE))
    assert_same_patterns(actual=actual, expected=shifted)
    assert_bit_equal(actual=actual, expected=value.float())  # PyTorch's own, which may quieten NaN


def test_widen_passes_fp32():
    assert_same_patterns(actual=applied(rounding.widen, fp32_patterns().to(DEVICE)), expected=fp32_patterns())


def test_narrow_undoes_widen_for_every_bf16_pattern():
    value = every_bf16()
    wide = applied(rounding.widen, value.to(DEVICE))
    assert_same_patterns(actual=applied(rounding.narrow, wide, narrow=True), expected=value)


@pytest.mark.parametrize("word", ROUNDINGS)
def test_a_rounded_value_stays_as_it_is(word: str):
    once = rounded_by_table(word)
    name = "truncate_tf32" if word == "tf32" else "round_to"
    twice = applied(getattr(rounding, name), once.to(DEVICE), "" if word == "tf32" else word)
    assert_same_patterns(actual=twice, expected=once)


@pytest.mark.parametrize("word", ["none", "fp32", "bf16-rne"])
def test_applied_weight(word: str):
    weight = every_bf16()
    expected = weight.float()
    if word != "none":
        expected = 1 + expected
    if word == "bf16-rne":
        expected = expected.to(torch.bfloat16).float()
    assert_bit_equal(actual=applied(rounding.applied_weight, weight.to(DEVICE), word), expected=expected)


@pytest.mark.parametrize("word", ROUNDINGS)
def test_the_specs_rounding(word: str):
    value = fp32_patterns()
    actual = spec.truncate_tf32(value) if word == "tf32" else spec.round_to(value, word)
    assert_bit_equal(actual=actual, expected=rounded_by_table(word))


def test_the_spec_keeps_fp32():
    assert_same_patterns(actual=spec.round_to(fp32_patterns(), "fp32"), expected=fp32_patterns())
