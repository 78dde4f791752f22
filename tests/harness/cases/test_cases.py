"""The field's cases: verdicts follow from the numbers, and planted faults change them."""

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from case_support import case

import castpoint.harness.cases.run as cases
from castpoint.harness.cases.case import CLAIMS, Measured, Way, claims_of, verdict
from castpoint.harness.cases.elementwise import ELEMENTWISE
from castpoint.harness.cases.figures import share, share_by_row
from castpoint.harness.cases.norm import NORM
from castpoint.harness.cases.run import CASES, run_cases
from castpoint.harness.cases.stack import STACK
from castpoint.kernels.plan import KEEP, RTZ, CastPlan
from castpoint.variants.catalogue import HF, ONE_ROUNDING

NUMBERS = ("measured", "measured_low", "measured_high", "claimed", "claimed_low", "claimed_high")
NAN, INF = math.nan, math.inf
TABLE = (Path(cases.__file__).parent / "data/claims.csv").read_text().splitlines()


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return list(run_cases())


def judged(*numbers: float | str) -> str:
    """The verdict of these NUMBERS; an empty cell counts as NaN."""
    measured, low, high, *claimed = (NAN if number == "" else number for number in numbers)
    claim = dataclasses.replace(CASES[0].claim, **dict(zip(NUMBERS[3:], claimed, strict=True)))
    return verdict(Measured(measured, low, high), claim)


def verdict_of(row: dict) -> str:
    return judged(*(row[name] for name in NUMBERS))


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
    assert case(quantity).measure(0).measured == row["measured"]


def test_sides_are_different_functions(rows: list[dict]) -> None:
    for c, row in zip(CASES, rows, strict=True):
        before, after = c.before, c.after
        assert before != after
        if isinstance(before, CastPlan) and isinstance(after, CastPlan):
            assert before.choices() != after.choices()
        if row["share_differ"] != "":
            assert row["share_differ"] > 0, f"{c.claim.measure}: the two sides return the same"


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


# ---------------------------------------------------------------- the table of claims


def test_every_claim_is_measured_once_and_every_case_claimed() -> None:
    keys = [line.split(",")[0] for line in TABLE[1:]]
    assert sorted(keys) == sorted(c.claim.key for c in (*NORM, *ELEMENTWISE, *STACK))
    assert len(set(keys)) == len(keys) and [c.claim.key for c in CASES] == keys
    numbers = [c.claim.case for c in CASES]
    assert numbers == sorted(numbers)


@pytest.mark.parametrize("spoil", [lambda row: f"{row},", lambda row: row.replace(",", " ", 1)])
def test_a_row_of_the_table_with_another_number_of_cells_is_refused(spoil: Callable[[str], str]) -> None:
    claims_of(TABLE)
    with pytest.raises(ValueError, match="argument 2 is"):
        claims_of([*TABLE[:3], spoil(TABLE[3]), *TABLE[4:]])


def test_a_claim_is_what_its_row_says() -> None:
    claim = CLAIMS["row-of-128"]  # a share counted once is exact
    assert (claim.case, claim.unit, claim.claimed) == (7, "share", 33 / 128)
    assert claim.claimed == claim.claimed_low == claim.claimed_high
    assert (CLAIMS["sum-order"].claimed_low, CLAIMS["sum-order"].claimed_high) == (1e-6, 1e-5)
    assert math.isnan(CLAIMS["fp8-codes"].claimed) and math.isnan(CLAIMS["fp8-codes"].claimed_low)


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
    assert judged(*numbers) == expected


def test_three_times_a_figure_that_fits_does_not(rows: list[dict]) -> None:
    fitting = [row for row in rows if row["verdict"] == "fits"]
    assert len(fitting) >= 15
    for row in fitting:
        low, high = sorted(abs(row[name]) for name in NUMBERS[4:])
        width = high / low if low else 1.0  # "a few in millions" is ten times as wide as narrow
        wrong = row | {name: 3 * width * row[name] for name in NUMBERS[:3]}
        assert verdict_of(wrong) != "fits", row["measure"]


def test_the_range_of_a_claim_holds_what_prints_as_it() -> None:
    claim = CLAIMS["rope-truncated"]  # 41 %
    low, high = claim.claimed_low, claim.claimed_high
    assert f"{low + 1e-9:.2f}" == f"{high - 1e-9:.2f}" == "0.41"
    assert f"{low - 1e-9:.2f}" == "0.40" and f"{high + 1e-9:.2f}" == "0.42"
    for c in CASES:
        low, value, high = c.claim.claimed_low, c.claim.claimed, c.claim.claimed_high
        assert math.isnan(value) or low <= value <= high, c.claim.claimed_text
        assert math.isnan(low) == math.isnan(high), c.claim.claimed_text


def test_claimed_figures_are_those_of_their_text() -> None:
    """Some number of the text is the figure: as a share where it has a percent sign, or its complement, or negative."""
    checked = 0
    for c in CASES:
        text = c.claim.claimed_text.replace(",", "")
        found = [
            float(number) / (100 if percent else 1)
            for number, percent in re.findall(r"(\d+\.?\d*(?:e-\d+)?)( %)?", text)
        ]
        if not found or not c.claim.claimed or math.isnan(c.claim.claimed):
            continue  # a law in words, or nothing beyond a limit
        checked += 1
        found += [1 - number for number in found] + [-number for number in found]
        found += [a / b for a, b in zip(found, found[1:], strict=False) if b]
        assert any(c.claim.claimed_low <= number <= c.claim.claimed_high for number in found), (
            f"{c.claim.claimed_text}: {c.claim.claimed}"
        )
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
        assert right.measured * wrong.measured < 0, quantity
        if c.outputs:
            assert right.signed_bias < 0 < wrong.signed_bias, quantity
    c = case("mean change")
    swapped = dataclasses.replace(c, before=c.after, after=c.before).measure()
    assert verdict(swapped, c.claim) == "does not fit"


@pytest.mark.parametrize("side", [0, 1])
def test_the_same_side_twice_has_no_effect_and_does_not_fit(side: int) -> None:
    seen = 0
    for c in CASES:
        if c.pick not in (share, share_by_row) or not c.claim.claimed > 0:
            continue
        seen += 1
        same = (c.before, c.after)[side]
        m = dataclasses.replace(c, before=same, after=same, draws=1).measure()
        assert m.measured == m.measured_high == m.share_differ == m.max_ulp == m.signed_bias == 0, c.claim.measure
        assert verdict(m, c.claim) == "does not fit"
    assert seen >= 8


def test_a_figure_that_is_no_number_fails_instead_of_being_judged() -> None:
    c = case("of the outputs that differ")
    with pytest.raises(ValueError, match="not a finite number"):
        dataclasses.replace(c, after=c.before).measure()


def test_a_boundary_moved_elsewhere_does_not_fit(rows: list[dict]) -> None:
    """The rows whose claims hold are not held by any other plan that comes along."""
    c = case("elements that differ in one row of 4,096")
    truncated = dataclasses.replace(c, before=HF, after=HF.replace(hidden=RTZ)).measure()
    assert truncated.measured > 1.5 * c.claim.claimed
    c = case("mean change of the magnitude")
    kept = dataclasses.replace(c, before=ONE_ROUNDING.replace(x=KEEP)).measure()  # against no rounding
    assert verdict(kept, c.claim) == "does not fit"
