"""The field's cases: verdicts follow from the numbers, and planted faults change them."""

import dataclasses
import math
import re

import pytest
import torch
from case_support import case

import castpoint.harness.cases.run as cases
from castpoint.harness.cases.case import Way, printed, verdict
from castpoint.harness.cases.figures import share, share_by_row
from castpoint.harness.cases.run import CASES, run_cases, verdict_of
from castpoint.kernels.plan import KEEP, RTZ, CastPlan
from castpoint.variants.catalogue import HF, ONE_ROUNDING

NUMBERS = ("measured", "measured_low", "measured_high", "claimed", "claimed_low", "claimed_high")
NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return list(run_cases())


def by_hand(row: dict) -> str:
    """The rule, written a second time and differently, from the words of its docstring."""
    measured, low, high, claimed, claimed_low, claimed_high = (row[name] for name in NUMBERS)
    if claimed_low == "":
        return "cannot be decided here"
    if max(low, claimed_low) > min(high, claimed_high):
        return "does not fit"
    if claimed == "":
        inside = claimed_low < low <= high < claimed_high
        return "same direction" if inside else "cannot be decided here"
    ratio = measured / claimed if claimed else (1 if measured == 0 else INF)
    if claimed_low <= measured <= claimed_high or 1 / 1.5 <= ratio <= 1.5:
        return "fits"
    return "cannot be decided here"


# ---------------------------------------------------------------- rows


def test_at_least_fifteen_cases_are_measured_against_a_claim(rows: list[dict]) -> None:
    assert [row["status"] for row in rows] == ["ok"] * len(CASES), [row["reason"] for row in rows if row["reason"]]
    decided = {row["case"] for row in rows if row["verdict"] != "cannot be decided here"}
    with_figures = {row["case"] for row in rows if row["verdict"] in ("fits", "does not fit") and row["claimed"] != ""}
    assert len(decided) >= 15 and len(with_figures) >= 15


def test_every_verdict_follows_from_the_numbers_of_its_row(rows: list[dict]) -> None:
    for row in rows:
        assert row["verdict"] == by_hand(row) == verdict_of(row), row["measure"]
    assert {row["verdict"] for row in rows} == {"fits", "does not fit", "same direction", "cannot be decided here"}


def test_cells_are_numbers_words_or_empty(rows: list[dict]) -> None:
    for row in rows:
        assert list(row) == list(rows[0])
        for name, cell in row.items():
            assert isinstance(cell, str | int | float) and not (isinstance(cell, float) and math.isnan(cell)), name
        assert row["measured_low"] <= row["measured"] <= row["measured_high"], row["measure"]
        assert row["source"] and row["before"] != row["after"] and row["why"] and row["claimed_text"]
        assert len(row["why"]) > 30 and "\n" not in row["why"]


def test_a_second_seed_gives_the_same_verdicts(rows: list[dict]) -> None:
    second = list(run_cases(seed=1))
    assert [row["verdict"] for row in second] == [row["verdict"] for row in rows]
    drawn = [a["measured"] != b["measured"] for a, b in zip(rows, second, strict=True)]
    assert sum(drawn) > len(CASES) / 2, "the seed is not used"


def test_measuring_leaves_the_threads_as_they_were(two_threads: None) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    c = case("error of the scale 1 + w")
    dataclasses.replace(c, draw=lambda rng: [seen.append(torch.get_num_threads()), *c.draw(rng)][1:]).measure()
    assert seen == [1] and torch.get_num_threads() == before


def test_the_same_seed_gives_the_same_figures(rows: list[dict]) -> None:
    quantity = "elements that differ in one row of 4,096"
    row = next(row for row in rows if row["measure"] == quantity)
    assert case(quantity).measure(0).value == row["measured"]


def test_sides_are_different_functions(rows: list[dict]) -> None:
    for c, row in zip(CASES, rows, strict=True):
        before, after = c.before, c.after
        assert before != after
        if isinstance(before, CastPlan) and isinstance(after, CastPlan):
            assert before.choices() != after.choices()
        if row["share_differ"] != "":
            assert row["share_differ"] > 0, f"{c.quantity}: the two sides return the same"


def test_a_case_that_raises_is_a_row_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such sum")

    good = case("error of the scale 1 + w")
    bad = dataclasses.replace(
        good, before=Way("a", broken), after=Way("b", broken), run=lambda side, inputs: side.run(1)
    )
    monkeypatch.setattr(cases, "CASES", (bad, good))
    first, second = run_cases()
    assert (first["status"], first["reason"], first["verdict"]) == ("failed", "RuntimeError: no such sum", "")
    assert first["measured"] == "" and first["claimed"] == 0.003
    assert (second["status"], second["verdict"]) == ("ok", "fits")


# ---------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((0.26, 0.25, 0.27, 0.26, 0.255, 0.265), "fits"),
        ((0.26, 0.08, 0.44, 0.295, 0.295, 0.295), "fits"),  # one row's count, within the spread of rows
        ((0.26, 0.25, 0.27, 0.295, 0.295, 0.295), "does not fit"),  # the same count, had its elements been independent
        ((0.05, 0.01, 0.30, 0.295, 0.295, 0.295), "cannot be decided here"),  # meets it only by being wide
        ((-1.53e-3, -1.54e-3, -1.52e-3, -1.53e-3, -1.535e-3, -1.525e-3), "fits"),
        ((1.53e-3, 1.52e-3, 1.54e-3, -1.53e-3, -1.535e-3, -1.525e-3), "does not fit"),  # the other sign
        ((1.0, 1.0, 1.0, 1.0, 0.0, 1.0), "fits"),  # at most 1
        ((0.1, 0.1, 0.1, 1.0, 0.0, 1.0), "fits"),
        ((3.0, 3.0, 3.0, 1.0, 0.0, 1.0), "does not fit"),
        ((0.0, 0.0, 0.0, 0.0, 0.0, 0.0), "fits"),  # nothing claimed, nothing found
        ((0.2, 0.1, 0.3, 0.0, 0.0, 0.0), "does not fit"),
        ((1.2, 1.1, 1.3, NAN, 1.0, INF), "same direction"),
        ((1.2, 0.9, 1.3, NAN, 1.0, INF), "cannot be decided here"),
        ((0.2, 0.1, 0.3, NAN, 1.0, INF), "does not fit"),
        ((0.0, 0.0, 0.0, NAN, 0.0, 1.0), "cannot be decided here"),  # no effect has no direction
        ((0.2, 0.1, 0.3, NAN, NAN, NAN), "cannot be decided here"),
    ],
)
def test_rule(numbers: tuple[float, ...], expected: str) -> None:
    assert verdict(*numbers) == expected


def test_three_times_a_figure_that_fits_does_not(rows: list[dict]) -> None:
    fitting = [row for row in rows if row["verdict"] == "fits"]
    assert len(fitting) >= 15
    for row in fitting:
        low, high = sorted(abs(row[name]) for name in NUMBERS[4:])
        width = high / low if low else 1.0  # "a few in millions" is ten times as wide as narrow
        wrong = row | {name: 3 * width * row[name] for name in NUMBERS[:3]}
        assert verdict_of(wrong) != "fits", row["measure"]


def test_the_range_of_a_claim_holds_what_prints_as_it() -> None:
    claim = printed("", 0.41, 0.01)
    assert f"{claim.low + 1e-9:.2f}" == f"{claim.high - 1e-9:.2f}" == "0.41"
    assert f"{claim.low - 1e-9:.2f}" == "0.40" and f"{claim.high + 1e-9:.2f}" == "0.42"
    for c in CASES:
        low, value, high = c.claim.low, c.claim.value, c.claim.high
        assert math.isnan(value) or low <= value <= high, c.claim.text
        assert math.isnan(low) == math.isnan(high), c.claim.text


def test_claimed_figures_are_those_of_their_text() -> None:
    """Some number of the text is the figure: as a share where it has a percent sign, or its complement, or negative."""
    checked = 0
    for c in CASES:
        text = c.claim.text.replace(",", "")
        found = [
            float(number) / (100 if percent else 1)
            for number, percent in re.findall(r"(\d+\.?\d*(?:e-\d+)?)( %)?", text)
        ]
        if not found or not c.claim.value or math.isnan(c.claim.value):
            continue  # a law in words, or nothing beyond a limit
        checked += 1
        found += [1 - number for number in found] + [-number for number in found]
        found += [a / b for a, b in zip(found, found[1:], strict=False) if b]
        assert any(c.claim.low <= number <= c.claim.high for number in found), f"{c.claim.text}: {c.claim.value}"
    assert checked >= 20


# ---------------------------------------------------------------- planted faults


def test_swapped_sides_flip_what_is_signed() -> None:
    for quantity in (
        "mean change of the magnitude",
        "change of the residual's mean magnitude",
        "what rounding rstd adds",
    ):
        c = case(quantity)
        right, wrong = c.measure(), dataclasses.replace(c, before=c.after, after=c.before).measure()
        assert right.value * wrong.value < 0, quantity
        if c.outputs:
            assert right.signed_bias < 0 < wrong.signed_bias, quantity
    c = case("mean change")
    claim, swapped = c.claim, dataclasses.replace(c, before=c.after, after=c.before).measure()
    numbers = (swapped.value, swapped.low, swapped.high, claim.value, claim.low, claim.high)
    assert verdict(*numbers) == "does not fit"


@pytest.mark.parametrize("side", [0, 1])
def test_the_same_side_twice_has_no_effect_and_does_not_fit(side: int) -> None:
    seen = 0
    for c in CASES:
        if c.pick not in (share, share_by_row) or not c.claim.value > 0:
            continue
        seen += 1
        same = (c.before, c.after)[side]
        m = dataclasses.replace(c, before=same, after=same, draws=1).measure()
        assert m.value == m.high == m.share_differ == m.max_ulp == m.signed_bias == 0, c.quantity
        assert verdict(m.value, m.low, m.high, c.claim.value, c.claim.low, c.claim.high) == "does not fit"
    assert seen >= 8


def test_a_figure_that_is_no_number_fails_instead_of_being_judged() -> None:
    c = case("of the outputs that differ")
    with pytest.raises(ValueError, match="not a finite number"):
        dataclasses.replace(c, after=c.before).measure()


def test_a_boundary_moved_elsewhere_does_not_fit(rows: list[dict]) -> None:
    """The rows whose claims hold are not held by any other plan that comes along."""
    c = case("elements that differ in one row of 4,096")
    truncated = dataclasses.replace(c, before=HF, after=HF.replace(hidden=RTZ)).measure()
    assert truncated.value > 1.5 * c.claim.value
    c = case("mean change of the magnitude")
    kept = dataclasses.replace(c, before=ONE_ROUNDING.replace(x=KEEP)).measure()  # against no rounding
    assert verdict(kept.value, kept.low, kept.high, c.claim.value, c.claim.low, c.claim.high) == "does not fit"
