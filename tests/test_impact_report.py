"""Whole-model studies as a reader sees them: the command, its tables, sentences and plots, from a tiny model's records
and from records whose figures are known."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure
from test_language_model import saved

from harness import __main__ as cli
from harness import impact_report
from harness.frames import Frames, load
from harness.impact_plot import model_plots
from harness.impact_report import (
    arm_table,
    last_layer,
    layer_table,
    parted,
    perplexity,
    section,
    sentences,
    studies,
    truth_name,
)
from harness.records import TABLES

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
    ((model, (run_id, frames)),) = studies(folder).items()
    assert model == "tiny" and truth_name(frames) == "float64"
    assert list(arm_table(frames)["arm"])[-2:] == list(PLANS) and len(arm_table(frames)) == 8
    assert set(frames["model_tokens"]["status"]) <= {"ok", "failed"}
    assert load(folder, run_id)["model_tokens"].equals(frames["model_tokens"])


def test_the_section_shows_what_the_records_hold(folder: Path) -> None:
    ((model, (_, frames)),) = studies(folder).items()
    text = section(model, frames)
    for arm in ("eager", "one ulp on K", *PLANS):
        assert f"| {arm} |" in text
    assert "in float64" in text and "| 0 |" in text.split("layer by layer")[1]


def test_plots_are_drawn(folder: Path) -> None:
    (_, frames) = studies(folder)["tiny"]
    plots = model_plots(frames)
    assert set(plots) == {"layers", "tokens", "parting"}
    assert all(isinstance(plot, Figure) and plot.axes[0].has_data() for plot in plots.values())


# ---------------------------------------------------------------- known figures

ARMS = ("eager", "one ulp on K", "float32", "4-bit weights", *PLANS)


@pytest.fixture
def known() -> Frames:
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
                    found = {"max_abs": 1.0, "rms": 1.0, "cosine": 1.0, "rel_rms": size * 3 + prompt}
                    found |= {"k_max_abs": weight, "k_rel_rms": -weight, "k_p99_ulp": 1 / weight, "k_norm_max": weight}
                    layers.append(same | found | {"layer": layer, "attention_logit_rms": [1, 2, 3][layer]})
    frames = {"model_tokens": tokens, "model_layers": layers, "model_dlogp": dlogp}
    return {name: pd.DataFrame(rows).reindex(columns=list(TABLES[name])) for name, rows in frames.items()}


def test_what_is_taken_over_texts(known: Frames) -> None:
    assert last_layer(known, "float64")["eager"] == pytest.approx(math.sqrt((3**2 + 7**2) / 2))
    assert perplexity(known)["float32"] == pytest.approx(math.exp(0.7))
    table = parted(known)
    assert table.loc["hf"].tolist() == [1, 2, 5] and table.loc["eager", "parted"] == 0
    arms = arm_table(known).set_index("arm")
    assert arms.loc["one-rounding", "KL to eager, nats"] == 6.5 and arms.loc["hf", "greedy: parted"] == "1 of 2"
    assert arms.loc["one-rounding", "Δ log p, max"] == 7 and layer_table(known)["K, max abs error"].tolist() == [
        10,
        30,
        20,
    ]


def test_sentences_say_those_figures(known: Frames, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(impact_report, "studies", lambda folder: {"m": ("r", known)})
    notice, closest, greedy, surprise, amplified = sentences(tmp_path)
    assert "`one-rounding` 6.5 (p99 6.5), other first choice at 65.0% of positions" in notice
    assert "one ulp on K 2.5 (p99 2.5), 4-bit weights 4.5 (p99 4.5)" in notice
    assert "is `hf`: KL 5.5 nats, eager 1.5" in closest and "takes 5.00 and 5.00 of eager's time" in closest
    assert (
        "`hf` 1, `one-rounding` 1; beside them eager 0, one ulp on K 0" in greedy
        and "Of 2 continuations of 32" in greedy
    )
    assert "float32 2.014, eager 1.649" in surprise
    assert "K absolute +1.00, attention logits +0.50; K relative -1.00, in ulps -1.00" in amplified
    assert "K absolute 10 and 30" in amplified


def test_drawn_weights_get_no_sentence(known: Frames, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn = {name: frame.assign(weights="calibrated") for name, frame in known.items()}
    monkeypatch.setattr(impact_report, "studies", lambda folder: {"m": ("r", drawn)})
    assert sentences(tmp_path) == []


def test_prompts_count_where_there_are_any_and_perplexity_stays_with_the_passages(known: Frames) -> None:
    tokens = known["model_tokens"]
    asked = tokens.assign(text="prompts", kl_mean=77.0, nll=9.0)
    both = {**known, "model_tokens": pd.concat([tokens, asked], ignore_index=True)}
    table = arm_table(both).set_index("arm")
    assert table.loc["hf", "KL to eager, nats"] == 77 and table.loc["hf", "perplexity"] == f"{math.exp(0.9):.3f}"
