"""K's error over positions as rows, and as a reader sees them: measured once, made up, cut off, or none.

The figures once more in NumPy: tests/independent/test_rope_positions.py.
"""

from pathlib import Path

import matplotlib
import pandas as pd
import pytest

from castpoint.harness.accuracy import rope_positions as study
from castpoint.harness.accuracy.rope_positions import POSITIONS, ROUNDED, near_1, position_rows, sweep_rope_positions
from castpoint.harness.problems.drawn import synthetic_problem
from castpoint.harness.report.plots import draw
from castpoint.harness.report.rope_positions import IN_FP32, error_over_positions, section
from castpoint.harness.report.studies import study_sections
from castpoint.harness.runs.frames import latest
from castpoint.harness.runs.records import Records, Settings
from castpoint.harness.runs.schema import TABLES

SETTINGS = Settings(layers=(3,), tokens=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    records = Records(folder, vars(SETTINGS), {})
    sweep_rope_positions(SETTINGS, records)
    sweep_rope_positions(SETTINGS, records)  # which finds all there
    records.finish()
    return folder


@pytest.fixture(scope="module")
def frame(folder: Path) -> pd.DataFrame:
    return latest(folder, "rope_positions")[1]


def test_every_position_and_boundary_has_one_row(frame: pd.DataFrame) -> None:
    wanted = [(position, boundary) for position in POSITIONS for boundary in ROUNDED]
    assert list(zip(frame["position"], frame["boundary"], strict=True)) == wanted
    assert POSITIONS[0] == 0 and POSITIONS[-1] == 2**17 - 1
    assert set(frame["layer"]) == {3} and set(frame["tokens"]) == {4} and set(frame["status"]) == {"ok"}


def test_only_what_is_made_before_cos_and_sin_grows(frame: pd.DataFrame) -> None:
    by = frame.set_index(["boundary", "position"])["k_vs_truth"]
    assert (by["inv_freq"][[16, 512, 4000, 15_962]].diff().dropna() > 0.05).all()
    assert by["none"].max() == by["none"][131_071] < 1e-3
    assert by["cos_sin"][1:].max() < 4 * by["cos_sin"][1:].min() and by["cos_sin"].max() < 2e-3
    assert by["position"][4000] == by["none"][4000] and by["position"][4095] > 0.1


def test_no_largest_weight_decides() -> None:
    """Other draws of a layer give the same figure; with their own K-norm weights they do not."""

    def at_4000(problem: object) -> float:
        return next(r.k_vs_truth for r in position_rows(problem, 4000) if r.boundary == "inv_freq")

    drawn = [synthetic_problem(layer=0, tokens=8, seed=seed) for seed in range(3)]
    alike, own = [at_4000(near_1(p)) for p in drawn], [at_4000(p) for p in drawn]
    assert max(alike) / min(alike) < 1.1 and max(own) / min(own) > 1.5


@pytest.mark.parametrize("model", ["gemma-3-270m", "qwen2.5-0.5b"])
def test_norms_stored_as_offsets_and_no_head_norm(model: str) -> None:
    rows = list(position_rows(near_1(synthetic_problem(model, 0, 2)), 512))
    assert [row.boundary for row in rows] == list(ROUNDED) and rows[0].k_vs_truth < 1e-5 < 0.01 < rows[1].k_vs_truth


def test_a_position_that_fails_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = position_rows

    def fails_at_512(problem: object, position: int) -> object:
        if position == 512:
            raise ValueError("no such turn")
        return right(problem, position)

    monkeypatch.setattr(study, "position_rows", fails_at_512)
    records = Records(tmp_path, vars(SETTINGS), {})
    sweep_rope_positions(SETTINGS, records)
    (row,) = [row for row in records.rows("rope_positions") if row["status"] != "ok"]
    assert (row["position"], row["status"], row["reason"]) == ("512", "failed", "ValueError: no such turn")
    assert len(records.rows("rope_positions")) == (len(POSITIONS) - 1) * len(ROUNDED) + 1


# ---------------------------------------------------------------- what a reader sees


def test_the_section_says_what_the_rows_say(frame: pd.DataFrame, folder: Path) -> None:
    text, by = section(frame), frame.set_index(["boundary", "position"])["k_vs_truth"]
    assert study_sections(folder) == [text]
    assert f"| position | {IN_FP32} | inv_freq in bf16 | position in bf16 | phase in bf16 | cos_sin in bf16 |" in text
    assert f"| 15,962 | {by['none', 15_962]:.3g} | {by['inv_freq', 15_962]:.3g} | " in text
    assert text.count("\n| ") == len(POSITIONS) + 2
    firsts = {name: min(p for p in POSITIONS if by[name, p] > 0.1) for name in ("inv_freq", "position", "phase")}
    assert firsts == {"inv_freq": 512, "position": 257, "phase": 257}
    assert "at position 512 (`inv_freq`), 257 (`position`), 257 (`phase`)" in text
    assert f"all in fp32 by {by['none', 131_071]:.1g} at 131,071" in text


def test_the_plot_draws_the_rows(frame: pd.DataFrame, folder: Path) -> None:
    figure = error_over_positions(frame)
    (axes,) = figure.axes
    lines = [line for line in axes.lines if len(line.get_xdata()) == len(POSITIONS) - 1]
    by = frame.set_index(["boundary", "position"])["k_vs_truth"]
    assert [list(line.get_ydata()) for line in lines] == [list(by[name][1:]) for name in ROUNDED]
    assert {text.get_text() for text in axes.texts} >= {IN_FP32, "cos_sin in bf16"}
    matplotlib.pyplot.close(figure)


def test_without_rows_there_is_neither(tmp_path: Path) -> None:
    empty = pd.DataFrame([], columns=list(TABLES["rope_positions"]))
    assert section(empty) == "" and error_over_positions(empty) is None
    failed = pd.DataFrame([dict.fromkeys(TABLES["rope_positions"]) | {"status": "failed", "boundary": "cos_sin"}])
    assert section(failed) == "" and error_over_positions(failed) is None


def test_a_run_without_them_is_drawn_without(tmp_path: Path) -> None:
    """As published runs are that were made before."""
    environment = {"processor": "a CPU", "versions": {"torch": "2"}}
    records = Records(tmp_path, {"model": "qwen3-0.6b", "tokens": 4}, environment)
    records.finish()
    assert draw(tmp_path, records.run_id) == [] and study_sections(tmp_path) == []
