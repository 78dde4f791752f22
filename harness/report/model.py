"""Whole-model studies as tables, from the records of model.study."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from castpoint.harness.report import k_norms
from castpoint.harness.report.markdown import markdown, paragraphs, under
from castpoint.harness.report.paired import LEVEL, differences, given_depth, interval, least_chance
from castpoint.harness.runs.frames import Frames, load
from castpoint.harness.runs.records import load_runs
from castpoint.variants.catalogue import PLANS

YARDSTICKS = ("eager, token by token", "one ulp on K", "float32", "4-bit weights")
LAYER_COLUMNS = {
    "k_max_abs": "K, max abs error",
    "attention_logit_rms": "attention logits, rms error",
    "k_rel_rms": "K, relative rms error",
    "k_p99_ulp": "K, p99 error in ulps",
    "rel_rms": "hidden state, relative rms error",
    "one_minus_cosine": "hidden state, 1 − cosine",
}


@dataclass(frozen=True)
class Study:
    """One run of `model`: its name, its entry of environment.json, its records."""

    model: str
    run_id: str
    run: dict[str, Any]
    frames: Frames

    @property
    def drawn(self) -> bool:
        return self.run["settings"]["weights"] == "calibrated"


def studies(folder: Path) -> list[Study]:
    """The newest finished study of every model; real weights before drawn ones."""
    runs = {run_id: run for run_id, run in load_runs(folder).items() if run.get("command") == "model"}
    newest = {run["settings"]["model"]: run_id for run_id, run in runs.items() if "finished" in run}
    return sorted((study_of(folder, run_id) for run_id in newest.values()), key=lambda study: study.drawn)


def study_of(folder: Path, run_id: str) -> Study:
    """The study of that run."""
    run = load_runs(folder)[run_id]
    return Study(run["settings"]["model"], run_id, run, load(folder, run_id))


def truth_name(frames: Frames) -> str:
    """float64, or float32 where that was all that fitted, or no arm was measured at all."""
    return next((name for name in frames["model_tokens"]["reference"].unique() if name != "eager"), "float64")


def read_texts(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of the prompts that were given, or of the fixed passages where none were."""
    own = frame[frame["text"] == "prompts"]
    return own if len(own) else frame[frame["text"] == "passages"]


def against(frame: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Rows of measured arms against that reference."""
    return read_texts(frame).query("reference == @reference and status == 'ok'")


def arms_of(frames: Frames) -> list[str]:
    """Arms in the order in which they ran."""
    return list(dict.fromkeys(frames["model_tokens"]["arm"]))


def plans_of(frames: Frames) -> list[str]:
    return [arm for arm in arms_of(frames) if arm in PLANS]


def layer_errors(frames: Frames) -> pd.Series:
    """Arm and layer -> relative rms error of the hidden state behind it against the truth, rms over texts."""
    rows = against(frames["model_layers"], truth_name(frames))
    return rows.groupby(["arm", "layer"])["rel_rms"].apply(lambda v: math.sqrt((v**2).mean()))


def _of_passages(frames: Frames) -> pd.DataFrame:
    return frames["model_tokens"].query("text == 'passages' and reference == 'eager' and status == 'ok'")


def parted(frames: Frames) -> pd.DataFrame:
    """Arm -> continuations that part from eager's (`parted`), of how many (`of`), and the first token at which one does."""
    rows = against(frames["model_tokens"], "eager")
    length = rows["parts_at"].max()
    table = rows.groupby("arm")["parts_at"].agg(parted=lambda v: int((v < length).sum()), of="size", first="min")
    return table.reindex([arm for arm in arms_of(frames) if arm in table.index])


def arm_table(frames: Frames) -> pd.DataFrame:
    """One row an arm: distance to the truth, distance to eager, what it says; means over texts, see plus_minus."""
    truth = truth_name(frames)
    to_truth, to_eager = (against(frames["model_tokens"], reference).groupby("arm") for reference in (truth, "eager"))
    behind = against(frames["model_layers"], truth).query("layer == layer.max()").groupby("arm")["rel_rms"]
    partings = parted(frames)
    columns = {
        f"last hidden state, relative rms to {truth}": behind.apply(lambda v: plus_minus(v**2, np.sqrt)),
        f"KL to {truth}, 10⁻³ nats": to_truth["kl_mean"].apply(lambda v: plus_minus(1000 * v)),
        "KL to eager, 10⁻³ nats": to_eager["kl_mean"].apply(lambda v: plus_minus(1000 * v)),
        "top-1 equal to eager, %": to_eager["top1"].apply(lambda v: plus_minus(100 * v)),
        "top-5 of eager's, %": to_eager["top5"].apply(lambda v: plus_minus(100 * v)),
        "Δ log p, p50 of a text": to_eager["dlogp_p50"].apply(plus_minus),
        "Δ log p, p99 of a text": to_eager["dlogp_p99"].apply(plus_minus),
        "Δ log p, max": to_eager["dlogp_max"].max(),
        "greedy: parted": partings["parted"].astype(str) + " of " + partings["of"].astype(str),
        "perplexity": _of_passages(frames).groupby("arm")["nll"].apply(between),
    }
    return pd.DataFrame(columns, index=pd.Index(arms_of(frames), name="arm")).reset_index()


def plus_minus(values: pd.Series, to: Callable[[Any], Any] = float) -> str:
    """`to` of the mean over texts, and half of its 95 % interval: `1.72 ± 0.4`; one number where all texts agree."""
    low, high = (to(max(end, 0.0)) for end in interval(values.to_numpy(float)))  # no figure here is below 0
    half = "" if values.nunique() == 1 < len(values) else f" ± {figure((high - low) / 2, 1)}"
    return f"{to(values.mean()):.3g}{half}"


def between(values: pd.Series) -> str:
    """exp of the mean over texts, and of the ends of its 95 % interval."""
    low, high = (figure(math.exp(end), 2) for end in interval(values.to_numpy(float)))
    return f"{math.exp(values.mean()):.3f} ({low} to {high})"


def figure(value: float, digits: int, sign: str = "") -> str:
    return f"{float(f'{value:.{digits}g}'):{sign}g}".replace("inf", "∞")


def layer_table(frames: Frames) -> pd.DataFrame:
    """One row a layer, eager against the truth: the K norm's largest weight, and what goes with it."""
    rows = against(frames["model_layers"], truth_name(frames)).query("arm == 'eager'")
    means = rows.groupby("layer").mean(numeric_only=True).reset_index()
    names = {"layer": "layer", "k_norm_max": "largest K-norm weight", **LAYER_COLUMNS}
    return means[list(names)].rename(columns=names)


def eager_measured(frames: Frames) -> bool:
    """Whether eager, against which every arm is measured, has a figure at all."""
    return len(frames["model_tokens"].query("arm == 'eager' and status == 'ok'")) > 0


def layers_known_to(frames: Frames) -> dict[str, float]:
    """Of every column of layer_table the widest 95 % interval over texts: half of it over the layer's mean."""
    rows = against(frames["model_layers"], truth_name(frames)).query("arm == 'eager'")
    widths: dict[str, float] = {}
    for _, texts in rows.groupby("layer"):
        for column, name in LAYER_COLUMNS.items():
            low, high = interval(texts[column].to_numpy(float))
            widths[name] = max(widths.get(name, 0.0), (high - low) / 2 / abs(texts[column].mean()))
    return widths


def paired_table(frames: Frames) -> pd.DataFrame:
    """One row an arm: by how much it is off eager, text by text, with an interval that holds at 95 % for all plans of a
    column together, whether it is told apart (0 lies outside), and from which true difference on that was to be expected.

    Plans are taken together, and so are float32 and 4-bit weights. Log perplexity is that of the passages. Empty where
    eager has no figure.
    """
    if not eager_measured(frames):
        return pd.DataFrame()
    truth, tokens = truth_name(frames), frames["model_tokens"]
    table: dict[str, dict[str, str]] = {}
    kl = (f"KL to {truth}, less eager's", against(tokens, truth), "kl_mean")
    for name, rows, column in (kl, ("log perplexity, less eager's", _of_passages(frames), "nll")):
        for group in (plans_of(frames), ["float32", "4-bit weights"]):
            for arm, d in differences(rows.assign(**{column: 1000 * rows[column]}), column, group).items():
                mean, low, high = (figure(value, 2, "+") for value in (d.mean, d.low, d.high))
                said = f"{mean} ({low} to {high}){', told apart' if d.apart else ''}"
                same, none = d.low == d.high == 0, math.isnan(d.mean)
                cells = ("the same" if same else "–", "–") if same or none else (said, figure(d.seen_from, 2))
                table[arm] = table.get(arm, {}) | {name: cells[0], f"{name.split(',')[0]}: seen from": cells[1]}
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("arm").reset_index()


def depth_table(layers: pd.DataFrame) -> pd.DataFrame:
    """Rank correlation of eager's errors with the largest K-norm weight, the layer's number held fixed, since errors
    grow with it, each with an interval that holds at 95 % for all four together; empty where there is none: no K norms,
    or too few layers. layers: layer_table(...)."""
    names = ("K, max abs error", "attention logits, rms error", "K, relative rms error", "K, p99 error in ulps")
    if len(layers) < 3 or layers["largest K-norm weight"].isna().any():
        return pd.DataFrame()
    cells = {}
    for name in names:
        found, low, high = given_depth(layers, name, LEVEL / len(names))
        said = f"{found:+.2f} ({low:+.2f} to {high:+.2f}{', may be 0' if low < 0 < high else ''})"
        cells[name] = "–" if math.isnan(found) else said  # undefined where a rank follows depth alone
    return pd.DataFrame([cells])


# ---------------------------------------------------------------- the report's section


def texts_of(frames: Frames) -> int:
    return len(read_texts(frames["model_tokens"])[["text", "prompt"]].drop_duplicates())


def conditions(study: Study) -> str:
    settings = study.run["settings"]
    return (
        f"{settings['weights']}; {texts_of(study.frames)} texts of up to {settings['tokens']} tokens and the continuation that eager "
        f"wrote; commit {study.run['environment']['commit']}, run {study.run_id}"
    )


def paired_words(frames: Frames) -> str:
    """Above paired_table: how to read it, and what so many texts can show at all."""
    count, plans = texts_of(frames), len(plans_of(frames))
    least = least_chance(count)
    able = "so that all can be told apart" if least * plans < LEVEL else "so that none can be told apart"
    return (
        "Text by text against eager, 10⁻³ nats a token: the mean, and in brackets what a sign-flip test at 5 % for all plans of a "
        f"column together leaves of it; told apart: not 0. The least p of {count} texts is {figure(least, 1)}, times {plans} plans "
        f"{figure(least * plans, 1)}, {able}. Seen from: the true mean difference that would be told apart in 80 % of such samples; what is "
        "not told apart may be as large."
    )


def layer_words(frames: Frames) -> str:
    """Above the table of layers."""
    known = layers_known_to(frames)
    said = "; ".join(f"{name}: {figure(100 * width, 2)} %" for name, width in known.items())
    return (
        f"Eager against {truth_name(frames)}, layer by layer; attention logits without positions, hidden states before the final "
        f"norm. Means over texts. Half of a layer's 95 % interval, over its mean, of the layer where that is widest: {said}."
    )


def section(study: Study) -> str:
    """Of report.md, on one model."""
    frames, model, truth = study.frames, study.model, truth_name(study.frames)
    lost = frames["model_tokens"].query("status != 'ok'").groupby(["arm", "status", "reason"], sort=False)
    layers, arms = layer_table(frames), arm_table(frames)
    return paragraphs(
        f"## In a whole model: {model}",
        f"{conditions(study)}. Eager is transformers' bf16, uncompiled, attention by SDPA, and of this machine, as is all against it. The truth: "
        f"the same bf16 weights, all arithmetic in {truth} but the float32 table of rotary angles. Every arm reads the same tokens; a "
        "continuation parts at the first token that the arm would not have chosen. Δ log p is the absolute change of a token's "
        "log probability against eager, nats; quantiles are of one text, and all figures means over texts, ± half of the 95 % "
        "interval of each by itself: texts differ by more than arms do, whose differences are below. Perplexity is that of the "
        "passages, in brackets its interval. 4-bit weights: Q4_0 of every layer's matrices, on top of what the weights had been through: an upper mark.",
        *(f"`{arm}` {said} in {count} texts: {why}" for (arm, said, why), count in lost.size().items()),
        markdown(arms, right=arms.columns[1:]),
        under(paired_words(frames), paired_table(frames)),
        f"![error of each layer](plots/model-{model}-layers.png)",
        f"![change of log p](plots/model-{model}-tokens.png)",
        f"![where greedy text parts](plots/model-{model}-parting.png)",
        layer_words(frames),
        markdown(layers),
        under(
            "Rank correlation over layers with the largest K-norm weight, depth held fixed; in brackets what 95 % for all four "
            "together leaves, as if layers were independent draws.",
            depth_table(layers),
        ),
        _k_norms(frames["k_norms"]),
    )


def _k_norms(rows: pd.DataFrame) -> str:
    found = k_norms.explained(rows)
    return found and (
        "### Its K-norm weights\n\nEvery layer by itself, on the stream of eager bf16 that enters it: with its own K-norm "
        f"weights, and with others in their place. Attention is causal, without positions. {found}"
    )
