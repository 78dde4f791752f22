"""Whole-model studies as a reader sees them: the command, tables, finding and plots, from a tiny model's records
and from records whose figures are known."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from pathlib import Path

import matplotlib.pyplot
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from tiny_models import saved

import castpoint.harness.__main__ as cli
from castpoint.harness.report import model as impact_report
from castpoint.harness.report.findings import findings
from castpoint.harness.report.model import (
    Study,
    arm_table,
    conditions,
    depth_table,
    layer_errors,
    layer_table,
    layers_known_to,
    paired_table,
    paired_words,
    parted,
    section,
    studies,
    truth_name,
)
from castpoint.harness.report.model_plot import model_plots, quantiles
from castpoint.harness.report.style import colour
from castpoint.harness.runs.frames import load
from castpoint.harness.runs.schema import TABLES
from castpoint.harness.runs.words import BINS
from castpoint.variants import catalogue

PLANS = ("hf", "one-rounding")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `model` writes for a tiny model in the dress of a checkpoint."""
    where = tmp_path_factory.mktemp("study")
    model = saved(where / "tiny", "llama")
    arguments = ["--plans", ",".join(PLANS), "--tokens", "6", "--passages", "2", "--results", str(where / "records")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["harness", "model", str(model), *arguments])
        with pytest.raises(SystemExit) as status:
            cli.main()
    assert status.value.code in (0, None)
    return where / "records"


def test_the_command_writes_every_arm_and_finds_its_study(folder: Path) -> None:
    (study,) = studies(folder)
    frames = study.frames
    assert study.run["narrowed_by"] == {"plans": ",".join(PLANS), "tokens": "6", "passages": "2"}
    assert study.model == "tiny" and truth_name(frames) == "float64"
    assert list(arm_table(frames)["arm"])[-2:] == list(PLANS) and len(arm_table(frames)) == 8
    assert set(frames["model_tokens"]["status"]) <= {"ok", "failed"}
    assert load(folder, study.run_id)["model_tokens"].equals(frames["model_tokens"])


def test_the_section_shows_what_the_records_hold(folder: Path) -> None:
    (study,) = studies(folder)
    text = section(study)
    for arm in ("eager", "one ulp on K", *PLANS):
        assert f"| {arm} |" in text
    assert "in float64" in text and "| 0 |" in text.split("layer by layer")[1]


def test_plots_are_drawn(folder: Path) -> None:
    plots = model_plots(studies(folder)[0].frames)
    assert set(plots) == {"layers", "tokens", "parting"}
    assert all(isinstance(plot, Figure) and plot.axes[0].has_data() for plot in plots.values())


# ---------------------------------------------------------------- known figures

ARMS = ("eager", "one ulp on K", "float32", "4-bit weights", *PLANS)


@pytest.fixture
def known() -> Study:
    """Two passages of every arm; figures of an arm grow with its place, and of the second passage they are larger."""
    tokens, layers, dlogp = [], [], []
    for place, arm in enumerate(ARMS):
        for prompt in (0, 1):
            for reference in ("float64", "eager"):
                same = {"run_id": "r", "model": "m", "weights": "checkpoint", "text": "passages", "prompt": prompt}
                same |= {"arm": arm, "backend": "eager", "reference": reference, "status": "ok", "reason": ""}
                size = 0.0 if (arm, reference) == ("eager", "eager") else place + 1 + prompt
                row = dict.fromkeys("logit_max kl_mean kl_max dlogp_p50 dlogp_p99 dlogp_max".split(), size)
                parts = [32, 5][prompt] if arm in PLANS else 32
                row |= {
                    "top1": 1 - size / 10,
                    "top5": 1.0,
                    "parts_at": parts,
                    "nll": prompt + place / 10,
                    "seconds": place + 1,
                }
                tokens.append(same | row | {"tokens": 40})
                dlogp.append(same | {"above": 0.0 if size == 0 else 0.1 * size, "tokens": 39})
                for layer, weight in enumerate((10.0, 30.0, 20.0)):
                    found = {"max_abs": 1.0, "rms": 1.0, "one_minus_cosine": 0.0, "rel_rms": size * 3 + prompt}
                    found |= {"k_max_abs": weight, "k_rel_rms": -weight, "k_p99_ulp": 1 / weight, "k_norm_max": weight}
                    layers.append(same | found | {"layer": layer, "attention_logit_rms": [1, 2, 3][layer]})
    frames = {"model_tokens": tokens, "model_layers": layers, "model_dlogp": dlogp, "k_norms": []}
    tables = {name: pd.DataFrame(rows).reindex(columns=list(TABLES[name])) for name, rows in frames.items()}
    settings = {"model": "m", "weights": "checkpoint", "tokens": 8}
    return Study("m", "r1", {"settings": settings, "environment": {"commit": "c0ffee"}}, tables)


def test_what_is_taken_over_texts(known: Study) -> None:
    frames = known.frames
    assert layer_errors(frames)["eager"].iloc[-1] == pytest.approx(math.sqrt((3**2 + 7**2) / 2))
    table = parted(frames)
    assert table.loc["hf"].tolist() == [1, 2, 5] and table.loc["eager", "parted"] == 0
    arms = arm_table(frames).set_index("arm")
    assert (
        arms.loc["one-rounding", "KL to eager, 10⁻³ nats"] == "6.5e+03 ± ∞"
        and arms.loc["hf", "greedy: parted"] == "1 of 2"
    )
    assert arms.loc["one-rounding", "Δ log p, max"] == 7
    assert layer_table(frames)["K, max abs error"].tolist() == [10, 30, 20]


def test_quantiles_of_a_histogram() -> None:
    """Tokens between 0.001 and 0.1, even in the logarithm, and as many again that do not change."""
    edges = [edge for edge in BINS if 0.00099 < edge < 0.099]
    even = pd.Series(5, index=edges)
    assert quantiles(even, (0.25, 0.5, 0.75)) == pytest.approx([10**-2.5, 0.01, 10**-1.5])
    half = pd.concat([pd.Series([5 * len(edges)], index=[0.0]), even])
    assert quantiles(half, (0.25, 0.75)) == pytest.approx([0.0, 0.01])


def test_a_plan_has_one_colour_of_its_own() -> None:
    assert len({colour(plan) for plan in catalogue.PLANS}) == len(catalogue.PLANS)


def test_tables_of_pairs_and_of_depth_say_those_figures(known: Study) -> None:
    table = paired_table(known.frames).set_index("arm")
    assert list(table.index) == [*PLANS, "float32", "4-bit weights"]
    assert table.columns.str.replace(" to float64", "").tolist() == [
        "KL, less eager's", "KL: seen from", "log perplexity, less eager's", "log perplexity: seen from"
    ]  # fmt: skip
    assert table.loc["hf"].tolist() == ["+4000 (-∞ to +∞)", "∞", "+400 (-∞ to +∞)", "∞"], "two texts say nothing"
    assert "so that none can be told apart" in paired_words(known.frames)
    table = paired_table(repeated(known, 8).frames).set_index("arm")
    assert table.loc["hf"].tolist()[:2] == ["+4000 (+4000 to +4000), told apart", "0"]
    assert "The least p of 16 texts is 3e-05, times 2 plans 6e-05, so that all" in paired_words(
        repeated(known, 8).frames
    )
    same = known.frames["model_tokens"].assign(kl_mean=1.0)
    assert paired_table(known.frames | {"model_tokens": same}).set_index("arm").loc["hf"].tolist()[:2] == [
        "the same",
        "–",
    ]
    table = depth_table(layer_table(known.frames))
    assert table.iloc[0].tolist()[0] == "+1.00 (-1.00 to +1.00, may be 0)", "three layers say nothing"
    assert not len(depth_table(layer_table(known.frames).assign(**{"largest K-norm weight": math.nan})))


def repeated(study: Study, times: int) -> Study:
    """The study with so many copies of each of its two texts."""
    copies = {
        name: pd.concat([rows.assign(prompt=rows["prompt"] + 2 * n) for n in range(times)], ignore_index=True)
        for name, rows in study.frames.items()
        if "prompt" in rows
    }
    return dataclasses.replace(study, frames=study.frames | copies)


def test_what_is_taken_over_texts_has_an_interval(known: Study) -> None:
    """Texts of 1 and of 2, eight of each: the mean of 1.5 is known to 0.3."""
    table = arm_table(repeated(known, 8).frames).set_index("arm")
    found = table.loc["eager"]
    assert found["KL to float64, 10⁻³ nats"] == "1.5e+03 ± 300" and found["KL to eager, 10⁻³ nats"] == "0"
    assert table.loc["one ulp on K", "top-1 equal to eager, %"] == "75 ± 3"
    assert found["perplexity"] == "1.649 (1.2 to 2.2)", "exp of 0.5, 0.2 and 0.8"
    assert arm_table(known.frames).set_index("arm").loc["eager", "KL to float64, 10⁻³ nats"] == "1.5e+03 ± ∞"
    widths = layers_known_to(repeated(known, 8).frames)
    assert (
        widths["hidden state, relative rms error"] == pytest.approx(0.2, abs=0.1) and widths["K, max abs error"] < 1e-12
    )
    assert re.search(r"hidden state, relative rms error: 2\d %; hidden state", section(repeated(known, 8)))


def noticed(folder: Path, study: Study, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The findings of a folder that holds this study alone."""
    monkeypatch.setattr(impact_report, "studies", lambda folder: [study])
    frames = {name: pd.DataFrame(columns=list(columns)) for name, columns in TABLES.items()}
    return [finding.text for finding in findings(folder, frames)]


def test_plans_are_measured_by_what_eager_does_to_itself(
    known: Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert noticed(tmp_path, known, monkeypatch) == []  # eager was not read token by token
    tokens = known.frames["model_tokens"].replace({"arm": {"one ulp on K": "eager, token by token"}})
    study = dataclasses.replace(known, frames={**known.frames, "model_tokens": tokens})
    (said,) = noticed(tmp_path, study, monkeypatch)  # 5.5 and 6.5 of 2.5; 4.5 of 2.5
    assert "by 2.2 to 2.6 times (0.0 to ∞ with all intervals) what eager changes in itself" in said, "two texts"
    (said,) = noticed(tmp_path, repeated(study, 8), monkeypatch)  # of a text: 6 / 2 and 5 / 3, 7 / 2 and 6 / 3 ...
    low, high = map(float, re.search(r"2.2 to 2.6 times \((.*) to (.*) with all intervals\)", said).groups())
    assert 5 / 3 < low < 2.2 and 2.6 < high < 7 / 2 and re.search(r"4-bit weights by 2 \(\d to \d\) times that", said)
    assert said.endswith("(medians; 95 % over 16 texts).")
    same = tokens.assign(logit_max=tokens["logit_max"].where(tokens["arm"] != "one-rounding", 0.0))
    study = dataclasses.replace(known, frames={**known.frames, "model_tokens": same})
    assert "by 2.2 to 2.2 times (" in noticed(tmp_path, study, monkeypatch)[0], "the same bits are no change"


def test_drawn_weights_are_no_finding(known: Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tokens = known.frames["model_tokens"].replace({"arm": {"one ulp on K": "eager, token by token"}})
    run = {**known.run, "settings": {**known.run["settings"], "weights": "calibrated"}}
    study = dataclasses.replace(known, run=run, frames={**known.frames, "model_tokens": tokens})
    assert noticed(tmp_path, study, monkeypatch) == []


def test_prompts_count_where_there_are_any_and_perplexity_stays_with_the_passages(known: Study) -> None:
    tokens = known.frames["model_tokens"]
    asked = tokens[tokens["prompt"] == 0].assign(text="prompts", kl_mean=77.0, nll=9.0)
    both = {**known.frames, "model_tokens": pd.concat([tokens, asked], ignore_index=True)}
    table = arm_table(both).set_index("arm")
    assert table.loc["hf", "KL to eager, 10⁻³ nats"] == "7.7e+04 ± ∞"
    assert table.loc["hf", "perplexity"].startswith(f"{math.exp(0.9):.3f} (")
    assert "1 texts of up to" in conditions(dataclasses.replace(known, frames=both))


# ---------------------------------------------------------------- arms that failed


def without(study: Study, arms: tuple[str, ...], texts: tuple[int, ...] = (0, 1)) -> Study:
    """The study as its records are where these arms failed on these texts: one row each, with the reason."""
    frames = dict(study.frames)
    for name in ("model_tokens", "model_layers", "model_dlogp"):
        rows = study.frames[name]
        lost = rows["arm"].isin(arms) & rows["prompt"].isin(texts)
        failed = rows[lost & (rows["reference"] == "eager")] if name == "model_tokens" else rows[:0]
        measures = [column for column in rows.columns if rows[column].dtype.kind == "f" and column != "prompt"]
        blank = failed.assign(status="failed", reason="no kernel", **dict.fromkeys(measures, math.nan))
        frames[name] = pd.concat([rows[~lost], blank], ignore_index=True)
    return dataclasses.replace(study, frames=frames)


@pytest.mark.parametrize("texts", [(0, 1), (1,)], ids=["all texts", "one text"])
@pytest.mark.parametrize("arms", [*((arm,) for arm in ARMS), PLANS, ARMS[1:], ARMS], ids=" ".join)
def test_every_section_and_plot_says_which_arm_failed(
    known: Study, arms: tuple[str, ...], texts: tuple[int, ...]
) -> None:
    study = without(known, arms, texts)
    text = section(study)
    for arm in arms:
        assert f"failed in {len(texts)} texts" in text
        assert f"`{arm}` failed in {len(texts)} texts: no kernel" in text
    plots = model_plots(study.frames)
    assert plots or "eager" in arms
    for plot in plots.values():
        plot.canvas.draw()
        words = [text.get_text() for text in plot.findobj(Text)]
        lost = [arm for arm in arms if len(texts) == 2]
        assert not lost or any("failed" in word for word in words)
        matplotlib.pyplot.close(plot)


def test_counts_are_whole_where_an_arm_failed(known: Study) -> None:
    table = arm_table(without(known, ("float32",)).frames).set_index("arm")["greedy: parted"]
    assert table["hf"] == "1 of 2" and table.isna().tolist() == [arm == "float32" for arm in table.index]
