"""Whole-model studies as tables, from the records of model.study."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from castpoint.harness.report import k_norms
from castpoint.harness.report.markdown import markdown, paragraphs, under
from castpoint.harness.report.paired import difference, given_depth, told_apart
from castpoint.harness.runs.frames import Frames, load
from castpoint.harness.runs.records import load_runs
from castpoint.variants.catalogue import PLANS

YARDSTICKS = ("eager, token by token", "one ulp on K", "float32", "4-bit weights")


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


def perplexity(frames: Frames) -> pd.Series:
    """Arm -> perplexity on the fixed passages, every token of which counts the same."""
    return _of_passages(frames).groupby("arm")["nll"].mean().map(math.exp)


def _of_passages(frames: Frames) -> pd.DataFrame:
    return frames["model_tokens"].query("text == 'passages' and reference == 'eager' and status == 'ok'")


def parted(frames: Frames) -> pd.DataFrame:
    """Arm -> continuations that part from eager's (`parted`), of how many (`of`), and the first token at which one does."""
    rows = against(frames["model_tokens"], "eager")
    length = rows["parts_at"].max()
    table = rows.groupby("arm")["parts_at"].agg(parted=lambda v: int((v < length).sum()), of="size", first="min")
    return table.reindex([arm for arm in arms_of(frames) if arm in table.index])


def arm_table(frames: Frames) -> pd.DataFrame:
    """One row an arm: distance to the truth, distance to eager, what it says."""
    truth, partings = truth_name(frames), parted(frames)
    to_truth, to_eager = (against(frames["model_tokens"], reference).groupby("arm") for reference in (truth, "eager"))
    means = to_eager.mean(numeric_only=True)
    columns = {
        f"last hidden state, relative rms to {truth}": layer_errors(frames).groupby("arm").last(),
        f"KL to {truth}, nats": to_truth["kl_mean"].mean(),
        "KL to eager, nats": means["kl_mean"],
        "top-1 equal to eager": means["top1"],
        "top-5 share of eager's": means["top5"],
        "Δ log p, p50 of a text": means["dlogp_p50"],
        "Δ log p, p99 of a text": means["dlogp_p99"],
        "Δ log p, max": to_eager["dlogp_max"].max(),
        "greedy: parted": partings["parted"].astype(str) + " of " + partings["of"].astype(str),
        "perplexity": perplexity(frames).map("{:.3f}".format),
    }
    return pd.DataFrame(columns, index=pd.Index(arms_of(frames), name="arm")).reset_index()


def layer_table(frames: Frames) -> pd.DataFrame:
    """One row a layer, eager against the truth: the K norm's largest weight, and what goes with it."""
    rows = against(frames["model_layers"], truth_name(frames)).query("arm == 'eager'")
    means = rows.groupby("layer").mean(numeric_only=True).reset_index()
    names = {
        "layer": "layer",
        "k_norm_max": "largest K-norm weight",
        "k_max_abs": "K, max abs error",
        "attention_logit_rms": "attention logits, rms error",
        "k_rel_rms": "K, relative rms error",
        "k_p99_ulp": "K, p99 error in ulps",
        "rel_rms": "hidden state, relative rms error",
        "one_minus_cosine": "hidden state, 1 − cosine",
    }
    return means[list(names)].rename(columns=names)


def eager_measured(frames: Frames) -> bool:
    """Whether eager, against which every arm is measured, has a figure at all."""
    return len(frames["model_tokens"].query("arm == 'eager' and status == 'ok'")) > 0


def paired_table(frames: Frames) -> pd.DataFrame:
    """One row an arm: by how much it is off eager, text by text, with the standard error, and whether it is told apart.

    Plans are tested together, and so are float32 and 4-bit weights, at the level of 5 % each. Log perplexity is that of
    the passages, nats a token. Empty where eager has no figure.
    """
    if not eager_measured(frames):
        return pd.DataFrame()
    truth, tokens = truth_name(frames), frames["model_tokens"]
    table: dict[str, dict[str, str]] = {}
    kl = (f"KL to {truth}, less eager's", against(tokens, truth), "kl_mean")
    for name, rows, column in (kl, ("log perplexity, less eager's", _of_passages(frames), "nll")):
        for group in (plans_of(frames), ["float32", "4-bit weights"]):
            found = {arm: difference(rows, column, arm) for arm in group if arm in set(rows["arm"])}
            apart = told_apart(found)
            for arm, d in found.items():
                more = ", told apart" if arm in apart else ""
                table.setdefault(arm, {})[name] = f"{d.mean:+.2g} ± {d.error:.1g}{more}" if d.mean else "the same"
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("arm").reset_index()


def depth_table(layers: pd.DataFrame) -> pd.DataFrame:
    """Rank correlation of eager's errors with the largest K-norm weight, the layer's number held fixed, since errors
    grow with it; empty where there is none: no K norms, or too few layers. layers: layer_table(...)."""
    names = ("K, max abs error", "attention logits, rms error", "K, relative rms error", "K, p99 error in ulps")
    if len(layers) < 3 or layers["largest K-norm weight"].isna().any():
        return pd.DataFrame()
    found = {name: given_depth(layers, name) for name in names}  # undefined where a rank follows depth alone
    return pd.DataFrame([{name: "–" if math.isnan(value) else f"{value:+.2f}" for name, value in found.items()}])


# ---------------------------------------------------------------- the report's section


def conditions(study: Study) -> str:
    settings = study.run["settings"]
    count = len(read_texts(study.frames["model_tokens"])[["text", "prompt"]].drop_duplicates())
    return (
        f"{settings['weights']}; {count} texts of up to {settings['tokens']} tokens and the continuation that eager wrote; commit "
        f"{study.run['environment']['commit']}, run {study.run_id}"
    )


def section(study: Study) -> str:
    """Of report.md, on one model."""
    frames, model, truth = study.frames, study.model, truth_name(study.frames)
    lost = frames["model_tokens"].query("status != 'ok'").groupby(["arm", "status", "reason"], sort=False)
    layers = layer_table(frames)
    return paragraphs(
        f"## In a whole model: {model}",
        f"{conditions(study)}. Eager is transformers' bf16, uncompiled, attention by SDPA, and of this machine, as is all against it. The truth: "
        f"the same bf16 weights, all arithmetic in {truth} but the float32 table of rotary angles. Every arm reads the same tokens; a "
        "continuation parts at the first token that the arm would not have chosen. Δ log p is the absolute change of a token's "
        "log probability against eager, nats; quantiles are of one text, and all figures means over texts. Perplexity is that of "
        "the passages. 4-bit weights: Q4_0 of every layer's matrices, on top of what the weights had been through: an upper mark.",
        *(f"`{arm}` {said} in {count} texts: {why}" for (arm, said, why), count in lost.size().items()),
        markdown(arm_table(frames)),
        under(
            "Text by text against eager, mean ± standard error; told apart at 5 % for all plans together, by a sign-flip test.",
            paired_table(frames),
        ),
        f"![error of each layer](plots/model-{model}-layers.png)",
        f"![change of log p](plots/model-{model}-tokens.png)",
        f"![where greedy text parts](plots/model-{model}-parting.png)",
        f"Eager against {truth}, layer by layer; attention logits without positions, hidden states before the final norm.",
        markdown(layers),
        under("Rank correlation over layers with the largest K-norm weight, depth held fixed.", depth_table(layers)),
        _k_norms(frames["k_norms"]),
    )


def _k_norms(rows: pd.DataFrame) -> str:
    found = k_norms.explained(rows)
    return found and (
        "### Its K-norm weights\n\nEvery layer by itself, on the stream of eager bf16 that enters it: with its own K-norm "
        f"weights, and with others in their place. Attention is causal, without positions. {found}"
    )
