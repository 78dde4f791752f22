"""Differences from eager by text: intervals against exact enumeration, their coverage and power by simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest

import castpoint.harness.__main__ as cli
from castpoint.harness.report.paired import LEVEL, Difference, differences, given_depth, interval, least_chance
from castpoint.variants.catalogue import PLANS


def frame(**arms: list[float]) -> pd.DataFrame:
    """Rows of x, of eager and of arms that differ from it by so much; eager's grows with the text."""
    count = max(map(len, arms.values()))
    rows = [{"text": "t", "prompt": n, "arm": "eager", "x": 10.0 * n} for n in range(count)]
    rows += [
        {"text": "t", "prompt": n, "arm": arm, "x": 10.0 * n + v} for arm, vs in arms.items() for n, v in enumerate(vs)
    ]
    return pd.DataFrame(rows)


def chance(values: list[float]) -> float:
    """p of the sign-flip test: all ways to choose the signs whose sum is as far from 0."""
    ways = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    return sum(way >= abs(sum(values)) for way in ways) / len(ways)


def test_eight_texts_never_tell_seven_plans_apart_and_those_of_a_study_tell_all() -> None:
    assert least_chance(8) == chance([1.0] * 8) and least_chance(8) * 7 > LEVEL > least_chance(8) * 6
    assert least_chance(cli.MODEL_PASSAGES) * len(PLANS) < LEVEL
    alike = {f"p{n}": [1.0 + v for v in range(8)] for n in range(7)}
    assert not any(d.apart for d in differences(frame(**alike), "x", alike).values())
    assert all(d.apart for d in differences(frame(**alike), "x", list(alike)[:6]).values())
    more = {arm: values * 4 for arm, values in alike.items()}
    assert all(d.apart for d in differences(frame(**more), "x", more).values())


@pytest.mark.parametrize("seed", range(20))
def test_zero_lies_outside_where_the_sign_flip_test_rejects(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = [*(rng.integers(-30, 100, 9) + rng.random(9)).tolist()]
    p = chance(values)
    for level in (0.999 * p, p, 1.001 * p):
        low, high = interval(np.array(values), level=level)
        assert (low > 0 or high < 0) == (p <= level), (p, level)


def test_differences_are_those_of_the_same_text() -> None:
    found = differences(
        frame(a=[1.0, 2, 3, 4, 5, 6, 7, 8], same=[0.0] * 8, none=[]), "x", ["a", "same", "none", "absent"]
    )
    assert found["same"] == Difference(0.0, 0.0, 0.0, 0.0) and list(found) == ["a", "same"]
    assert found["a"].mean == 4.5 and found["a"].error == pytest.approx(math.sqrt(6 / 8))
    assert (found["a"].low, found["a"].high) == interval(np.arange(1.0, 9)), "what is the same is not counted"
    assert differences(frame(a=[3.0]), "x", ["a"])["a"] == Difference(3.0, math.inf, -math.inf, math.inf)
    lost = frame(a=[3.0, 4.0]).query("arm == 'a' and prompt == 0 or arm == 'eager' and prompt == 1")
    assert math.isnan(differences(lost, "x", ["a"])["a"].mean) and not differences(lost, "x", ["a"])["a"].apart


@pytest.mark.parametrize("count", [16, 32])  # all sets, and a sample of them
def test_an_interval_holds_as_often_as_it_says(count: int) -> None:
    """Symmetric draws with heavy tails; a binomial count of 300 at 95 % lies above 273 but once in 2,000."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        low, high = interval(rng.standard_t(3, count))
        held += low <= 0 <= high
    assert 273 < held < 300


def test_a_ratio_has_an_interval() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        over = rng.uniform(1, 3, 32)
        low, high = interval(1.2 * over + 0.3 * rng.standard_normal(32), over)
        held += low <= 1.2 <= high
    assert 180 < held < 200
    assert interval(np.arange(1.0, 9) * 2, np.arange(1.0, 9)) == (2, 2)


def test_a_difference_as_large_as_it_says_is_seen() -> None:
    """Of 32 texts and two plans, planted in fresh draws: in 80 % or so of them, half of it far more seldom."""
    rng = np.random.default_rng(0)

    def drawn(shift: float) -> Difference:
        two = {arm: (rng.standard_normal(32) + shift).tolist() for arm in ("a", "b")}
        return differences(frame(**two), "x", two)["a"]

    seen_from = float(np.median([drawn(0.0).seen_from for _ in range(20)]))
    seen = [sum(drawn(part * seen_from).apart for _ in range(60)) for part in (0.5, 1.0, 1.5)]
    assert seen[0] < 28 and 38 < seen[1] < 57 <= seen[2], seen


def test_a_correlation_that_is_depth_alone_is_none() -> None:
    """Two columns that each follow depth, and otherwise nothing that they share."""
    depth = pd.Series(range(16), dtype=float)
    one = pd.Series([1, 1, -1, -1] * 4) * 1.6
    other = pd.Series([1, -1, -1, 1] * 4) * 1.6
    table = pd.DataFrame({"layer": depth, "largest K-norm weight": depth + one, "goes with depth": depth + other})
    table["goes with weight"] = table["largest K-norm weight"] * 3
    assert given_depth(table, "goes with weight") == pytest.approx((1.0, 1.0, 1.0))
    assert table["goes with depth"].corr(table["largest K-norm weight"]) > 0.8
    found, low, high = given_depth(table, "goes with depth")
    assert abs(found) < 0.2 and low < -0.3 and high > 0.3
    assert given_depth(table[:4], "goes with depth")[1:] == (-1, 1)


@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_a_rank_correlation_lies_in_its_interval_as_often_as_it_says(rho: float) -> None:
    """Of 18 layers, both grown with depth; the rank correlation of two normal variables is 6 / pi asin(rho / 2)."""
    rng, held, depth = np.random.default_rng(0), 0, np.arange(18.0)
    for _ in range(300):
        x, y = rng.standard_normal((2, 18))
        y = rho * x + math.sqrt(1 - rho**2) * y
        table = pd.DataFrame({"layer": depth, "largest K-norm weight": x + 0.15 * depth, "y": y + 0.15 * depth})
        _, low, high = given_depth(table, "y")
        held += low <= 6 / math.pi * math.asin(rho / 2) <= high
    assert 270 < held < 298
