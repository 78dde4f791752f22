"""K-norm weights as a reader sees them, from rows whose figures are known: by draw or by layer, without what failed."""

from pathlib import Path

import pandas as pd
import pytest

from castpoint.harness.report import model
from castpoint.harness.report.findings import findings
from castpoint.harness.report.k_norms import (
    explained,
    k_norm_table,
    measured,
    multiples,
    of_what,
    together,
    what_it_goes_with,
)
from castpoint.harness.report.model import Study
from castpoint.harness.runs.schema import TABLES
from castpoint.harness.runs.words import KNorms

SIZE = {"own": 8.0, "near 1": 2.0, "all the largest": 16.0, "largest alone": 6.0, "without the largest": 4.0}
MEASURES = [name for name in TABLES["k_norms"][10:] if name not in ("status", "reason")]


def made(layers: int, samples: int, plan: str = "hf") -> pd.DataFrame:
    """Every measure of an arm is its size times (1 + the sample), own's times (1 + the layer) too."""
    rows = []
    for layer in range(layers):
        for sample in range(samples):
            for q_norm, k_norm in [*(("own", k) for k in SIZE), ("near 1", "own"), ("near 1", "near 1")]:
                size = SIZE[k_norm] * (1 + sample) ** (2 if k_norm == "own" else 1) * (1 + layer * (k_norm == "own"))
                same = {"run_id": "r", "model": "m", "weights": "w", "layer": layer, "tokens": 8, "sample": sample}
                same |= {"plan": plan, "q_norm": q_norm, "k_norm": k_norm, "status": "ok", "reason": ""}
                rows.append(same | dict.fromkeys(MEASURES, size))
    return pd.DataFrame(rows).reindex(columns=list(TABLES["k_norms"]))


def test_a_multiple_is_of_the_same_draw_and_q_weights() -> None:
    rows = made(1, 3)
    assert multiples(rows, "k_max_abs", KNorms.OWN).tolist() == [4, 8, 12]
    halved = rows.assign(k_max_abs=rows["k_max_abs"].where(rows["q_norm"] == "own", rows["sample"] + 1.0))
    assert multiples(halved, "k_max_abs", KNorms.OWN, KNorms.NEAR_1).tolist() == [1, 1, 1]


def test_the_table_of_draws() -> None:
    table = k_norm_table(made(1, 11)).set_index("measure; K-norm weights:")
    assert list(table) == [*SIZE, "own, and q's near 1"] and len(table) == 12
    assert table.loc["logits, rms error: multiple"].tolist() == ["24 (8 to 40)", "1", "8", "3", "2", "24 (8 to 40)"]
    assert table.loc["K, p99 error in ulps", "near 1"] == "12 (4 to 20)"
    assert table.loc["most attended key flips, %", "near 1"] == "1200 (400 to 2000)"
    assert of_what(made(1, 11)) == "median, 10th and 90th percentile of 11 draws"


def test_of_layers_medians_over_texts_are_taken() -> None:
    """Two layers, three texts: multiples of 4, 8, 12 and of 8, 16, 24."""
    rows = made(2, 3)
    table = k_norm_table(rows).set_index("measure; K-norm weights:")
    assert table.loc["logits, rms error: multiple", "own"] == "12 (8 to 16)"
    assert of_what(rows) == "median, least and greatest of 2 layers, of each the median of 3 texts"


def test_without_a_control_nothing_is_said(tmp_path: Path) -> None:
    rows = made(1, 2)
    failed = rows.assign(status=["failed" if k == "near 1" else "ok" for k in rows["k_norm"]])
    for none in (failed, rows[:0]):
        frames = {"eager": pd.DataFrame(columns=list(TABLES["eager"])), "k_norms": none}
        assert not measured(none) and explained(none) == "" and findings(tmp_path, frames) == []
    one = rows.assign(status=["failed" if sample else "ok" for sample in rows["sample"]])
    assert multiples(one, "k_max_abs", KNorms.OWN).tolist() == [4], "another draw's control was taken"


@pytest.mark.parametrize(("factor", "said"), [(1.0, "with and without"), (0.5, "4 without")])
def test_the_finding_speaks_of_draws_and_of_real_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float, said: str
) -> None:
    """Real layers' own weights make 4 and 8 times the error; those without the largest as much, or half of it."""
    real = made(2, 1)
    own = real["k_norm"].isin(["own", "without the largest"]) & (real["q_norm"] == "own")
    real.loc[own, "logit_rms_error"] = 2.0 * (4 + 4 * real["layer"])
    real.loc[own & (real["k_norm"] != "own"), "logit_rms_error"] *= factor
    drawn = made(1, 11)
    drawn["logit_rel_error"] = drawn["sample"] + (drawn["k_norm"] == "near 1") + 1.0
    frames = {"eager": pd.DataFrame(columns=list(TABLES["eager"])), "k_norms": drawn}
    studies = [
        Study(name, "r", {"settings": {"model": name, "weights": weights}}, {"k_norms": real})
        for name, weights in (("real", "checkpoint"), ("drawn", "calibrated"))
    ]
    monkeypatch.setattr(model, "studies", lambda folder: studies)
    monkeypatch.setattr("castpoint.harness.report.findings._noticed", lambda folder: iter(()))
    (finding,) = findings(tmp_path, frames)
    first = (
        "8 among them, the logits' rms error by 8 to 40, their relative error by 0.667 to 0.909 (four fifths of "
        "draws), against weights near one"
    )
    last = f"real's own by 6, {said.replace('4', '3')} each layer's largest (median of layers)."
    assert finding.text.split("drawn for the first layer, ")[1] == f"{first}; {last}"


def test_words_name_plan_control_and_prediction() -> None:
    rows = made(1, 4, plan="gemma")
    text = explained(rows.assign(weights_rank=-0.5))
    assert text.startswith("Plan `gemma`; median, 10th and 90th") and "129/128" in text and "nan" not in text
    said = what_it_goes_with(rows.assign(logit_terms=rows["logit_terms"] / (1 + rows["sample"]), weights_rank=-0.5))
    assert "measured over what the products predict: 1 (1 to 1, least and greatest of all 4)" in said
    assert said.endswith(
        "over channels: -0.5. Without K's largest weight the logits' rms error is 0.208 (0.138 to 0.425) "
        "times that with it."
    )


def test_a_correlation_is_of_draws_or_of_the_medians_of_layers() -> None:
    """By hand: r = 0.8 of five pairs lies between tanh(1.0986 -+ 1.96 / sqrt(2))."""
    draws = pd.MultiIndex.from_product([[0], range(5)], names=["layer", "sample"])
    a, b = pd.Series([1.0, 2, 3, 4, 5], draws), pd.Series([2.0, 1, 4, 3, 5], draws)
    assert together(a, b) == "0.8 (-0.28 to 0.986)"
    layers = pd.MultiIndex.from_product([range(4), range(3)], names=["layer", "sample"])
    of_layers = pd.Series([0.0, 1, 9, 0, 2, 9, 0, 3, 9, 0, 4, 9], layers)  # medians 1, 2, 3, 4
    assert together(of_layers, of_layers).startswith("1 (1 to 1")
    assert together(of_layers[:9], of_layers[:9]) == "1 (-1 to 1)", "three layers say nothing"
