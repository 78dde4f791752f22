"""RoPE's phase once more in NumPy: what reports of engines say of it, and K's error over positions."""

import csv
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from plain_chain import TRUTH, Rounding, chain, cut, phases, relative_rms
from test_published import agree, inputs

from castpoint.harness.accuracy.rope_positions import POSITIONS, near_1, position_rows
from castpoint.harness.problems.drawn import synthetic_problem
from castpoint.variants import rope

PUBLISHED = Path(__file__).parents[2] / "results" / "cpu" / "rope_positions.csv"
TOKENS, LAYER = 64, 0
BOUNDARIES = ("none", "inv_freq", "position", "phase", "cos_sin")


# ---------------------------------------------------------------- what reports say


@pytest.mark.parametrize(
    ("position", "held"), [(256, 256), (257, 256), (512, 512), (4000, 4000), (4095, 4096), (131_071, 131_072)]
)
def test_positions_that_bf16_holds_and_does_not(position, held):
    assert cut(np.float64(position), 8, np.rint) == held


def test_a_position_of_candle():
    """#3520: 15,962 became 15,936. The other figure there, 15,968, has nine significant bits: no bf16 holds it."""
    near, below = (cut(np.array([15_962.0]), 8, whole)[0] for whole in (np.rint, np.trunc))
    assert near == below == 15_936 and cut(np.float64(15_968), 8, np.rint) != 15_968


def largest_phase_error(positions, words, theta, wrapped=False):
    given = np.array(positions), theta, 128
    error = phases(*given, Rounding(words)) - phases(*given, Rounding(TRUTH))
    return np.abs((error + np.pi) % (2 * np.pi) - np.pi if wrapped else error).max()


def test_phase_errors_of_modalities():
    """#462: 0.62 rad at position 512, 2.5 at 2,048, about pi, the most that an angle can be off, at 4,096."""
    assert largest_phase_error([512], {"inv_freq"}, 1e4) == pytest.approx(0.62, abs=0.01)
    assert largest_phase_error([2048], {"inv_freq"}, 1e4) == pytest.approx(2.5, abs=0.01)
    assert largest_phase_error([4096], {"inv_freq"}, 1e4) == pytest.approx(5.0, abs=0.02)  # beyond half a turn
    assert 2.5 < largest_phase_error([4096], {"inv_freq"}, 1e4, wrapped=True) < np.pi
    assert largest_phase_error([131_071], set(), 1e4) == pytest.approx(2.7e-3, abs=1e-4)


def test_a_position_off_by_one_turns_the_first_pair_by_a_radian():
    assert largest_phase_error([4095], {"position"}, 1e6) == pytest.approx(1, abs=1e-12)


# ---------------------------------------------------------------- K over positions


@cache
def made(position, boundary):
    """K of the drawn layer with all tokens there; with that boundary in bf16 and all else in fp32."""
    given = inputs(LAYER, False, TOKENS) | {"positions": np.full(TOKENS, position), "theta": 1e6}
    given |= {"k_norm_weight": np.full(128, 129 / 128)}
    return chain(given, TRUTH if boundary == "truth" else {boundary} - {"none"})["k"]


def check(row):
    """That row's figures, to the six digits that are printed."""
    position, boundary = int(row["position"]), row["boundary"]
    k, words = made(position, boundary), {boundary} - {"none"}
    assert agree(row["k_vs_truth"], relative_rms(k, made(position, "truth"))), (position, boundary)
    assert agree(row["k_vs_fp32"], relative_rms(k, made(position, "none"))), (position, boundary)
    assert agree(row["phase_max_error"], largest_phase_error([position], words, 1e6)), (position, boundary)


def measured(position):
    return [vars(row) for row in position_rows(near_1(synthetic_problem(layer=LAYER, tokens=TOKENS)), position)]


@pytest.mark.parametrize("position", (0, 257, 4000, 15_962, 131_071))
def test_rows_of_a_position(position):
    rows = measured(position)
    assert tuple(row["boundary"] for row in rows) == BOUNDARIES
    for row in rows:
        check(row)


def test_published_rows():
    """None before a run that measures them; then all."""
    rows = list(csv.DictReader(PUBLISHED.open(newline=""))) if PUBLISHED.exists() else []
    newest = [row for row in rows if row["run_id"] == max(each["run_id"] for each in rows)]
    assert {int(row["position"]) for row in newest} in (set(), set(POSITIONS))
    for row in newest:
        check(row)


def test_frequencies_in_bf16_move_k_by_two_fifths_at_position_4000():
    moved = relative_rms(made(4000, "inv_freq"), made(4000, "none"))
    held, exact = (phases(np.array([4000]), 1e6, 128, Rounding(words)) for words in ({"inv_freq"}, TRUTH))
    by_angles = np.sqrt(np.mean(2 - 2 * np.cos(held - exact)))  # of pairs of one size, turned by a wrong angle
    assert by_angles == pytest.approx(0.446, abs=0.001) and moved == pytest.approx(by_angles, rel=0.01)
    assert relative_rms(made(4000, "inv_freq"), made(4000, "truth")) == pytest.approx(moved, rel=1e-3), "and it shows"
    assert relative_rms(made(4000, "none"), made(4000, "truth")) < 5e-5


@pytest.mark.parametrize("ignored", ("inv_freq", "position", "phase"))
def test_a_spec_that_ignores_a_word_is_noticed(ignored, monkeypatch):
    right = rope.phase

    def phase(plan, *given):
        return right(plan.replace(**{ignored: "fp32"}), *given)

    monkeypatch.setattr(rope, "phase", phase)
    for row in measured(15_962):
        if row["boundary"] != ignored:
            check(row)
            continue
        with pytest.raises(AssertionError, match=ignored):
            check(row)
