"""Whole-model studies as tables and sentences, from the records of harness.impact."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from harness.frames import Frames, load
from harness.markdown import markdown
from harness.records import load_runs
from variants.catalogue import PLANS

CASTS = ("one-rounding", "cast-after-matmul")  # cast before the matmul, and after it


def studies(folder: Path) -> dict[str, tuple[str, Frames]]:
    """Model -> run_id and frames of its newest finished study; real weights before drawn ones."""
    found: dict[str, tuple[str, Frames]] = {}
    for run_id, run in load_runs(folder).items():
        if "finished" in run and run.get("command") == "model":
            frames = load(folder, run_id)
            if len(frames["model_tokens"]):
                found[run["settings"]["model"]] = (run_id, frames)
    return dict(sorted(found.items(), key=lambda item: _weights(item[1][1]) == "calibrated"))


def _weights(frames: Frames) -> str:
    return frames["model_tokens"]["weights"].iloc[0]


def truth_name(frames: Frames) -> str:
    """float64, or float32 where that was all that fitted."""
    return next(name for name in frames["model_tokens"]["reference"].unique() if name != "eager")


def read_texts(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of the prompts that were given, or of the fixed passages where none were."""
    own = frame[frame["text"] == "prompts"]
    return own if len(own) else frame[frame["text"] == "passages"]


def against(frame: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Rows of measured arms against that reference."""
    return read_texts(frame)[lambda rows: (rows["reference"] == reference) & (rows["status"] == "ok")]


def arms_of(frames: Frames) -> list[str]:
    """Arms in the order in which they ran."""
    return list(dict.fromkeys(frames["model_tokens"]["arm"]))


def plans_of(frames: Frames) -> list[str]:
    return [arm for arm in arms_of(frames) if arm in PLANS]


def last_layer(frames: Frames, reference: str) -> pd.Series:
    """Arm -> relative rms error of the hidden state behind the last layer, rms over texts."""
    rows = against(frames["model_layers"], reference)
    rows = rows[rows["layer"] == rows["layer"].max()]
    return rows.groupby("arm")["rel_rms"].apply(lambda v: math.sqrt((v**2).mean()))


def perplexity(frames: Frames) -> pd.Series:
    """Arm -> perplexity on the fixed passages, every token of which counts the same."""
    rows = frames["model_tokens"]
    rows = rows[(rows["text"] == "passages") & (rows["reference"] == "eager") & (rows["status"] == "ok")]
    return rows.groupby("arm")["nll"].mean().map(math.exp)


def parted(frames: Frames) -> pd.DataFrame:
    """Arm -> continuations that part from eager's (`parted`), of how many (`of`), and the first token at which one does."""
    rows = against(frames["model_tokens"], "eager")
    length = rows["parts_at"].max()
    table = rows.groupby("arm")["parts_at"].agg(parted=lambda v: int((v < length).sum()), of="size", first="min")
    return table.reindex(arms_of(frames)).dropna()


def arm_table(frames: Frames) -> pd.DataFrame:
    """One row an arm: distance to the truth, distance to eager, what it says."""
    truth = truth_name(frames)
    to_truth = against(frames["model_tokens"], truth).groupby("arm").mean(numeric_only=True)
    to_eager = against(frames["model_tokens"], "eager").groupby("arm").mean(numeric_only=True)
    largest = against(frames["model_tokens"], "eager").groupby("arm")["dlogp_max"].max()
    partings = parted(frames)
    names = pd.Series(arms_of(frames))
    table = pd.DataFrame({"arm": names})
    table[f"last hidden state, relative rms to {truth}"] = names.map(last_layer(frames, truth))
    table[f"KL to {truth}, nats"] = names.map(to_truth["kl_mean"])
    table["KL to eager, nats"] = names.map(to_eager["kl_mean"])
    table["top-1 equal to eager"] = names.map(to_eager["top1"])
    table["top-5 share of eager's"] = names.map(to_eager["top5"])
    for column in ("p50", "p99"):
        table[f"Δ log p to eager, {column}"] = names.map(to_eager[f"dlogp_{column}"])
    table["Δ log p, max"] = names.map(largest)
    table["greedy: parted"] = names.map(partings["parted"].astype(str) + " of " + partings["of"].astype(str))
    table["perplexity"] = names.map(perplexity(frames).map("{:.3f}".format))
    table["pass, s"] = names.map(to_eager["seconds"])
    return table


def layer_table(frames: Frames) -> pd.DataFrame:
    """One row a layer, eager against the truth: the K norm's largest weight, and what goes with it."""
    rows = against(frames["model_layers"], truth_name(frames))
    means = rows[rows["arm"] == "eager"].groupby("layer").mean(numeric_only=True).reset_index()
    names = {
        "layer": "layer",
        "k_norm_max": "largest K-norm weight",
        "k_max_abs": "K, max abs error",
        "attention_logit_rms": "attention logits, rms error",
        "k_rel_rms": "K, relative rms error",
        "k_p99_ulp": "K, p99 error in ulps",
        "rel_rms": "hidden state, relative rms error",
        "cosine": "hidden state, cosine",
    }
    return means[list(names)].rename(columns=names)


# ---------------------------------------------------------------- sentences


def sentences(folder: Path) -> list[str]:
    """Five sentences on each real model that was studied. What drawn weights say means nothing: they get a table only."""
    writers = (_notice, _closest, _greedy, _perplexity, _amplified)
    real = [(model, frames) for model, (_, frames) in studies(folder).items() if _weights(frames) != "calibrated"]
    return [line for model, frames in real for write in writers if (line := write(model, frames))]


def _said(row: pd.Series) -> str:
    return f"{row['dlogp_p50']:.2g} (p99 {row['dlogp_p99']:.2g})"


def _notice(model: str, frames: Frames) -> str:
    rows = against(frames["model_tokens"], "eager").groupby("arm").mean(numeric_only=True)
    yardsticks = [arm for arm in ("eager, token by token", "one ulp on K", "4-bit weights") if arm in rows.index]
    casts = [arm for arm in CASTS if arm in rows.index]
    if not casts:
        return ""
    plans = "; ".join(
        f"`{arm}` {_said(rows.loc[arm])}, other first choice at {1 - rows.loc[arm, 'top1']:.1%} of positions"
        for arm in casts
    )
    others = ", ".join(f"{arm} {_said(rows.loc[arm])}" for arm in yardsticks)
    return (
        f"**{model}: cast before or after the matmul?** Median change of a token's log probability against eager, nats: "
        f"{plans}. Yardsticks: {others}."
    )


def _closest(model: str, frames: Frames) -> str:
    truth = truth_name(frames)
    hidden, kl = last_layer(frames, truth), against(frames["model_tokens"], truth).groupby("arm")["kl_mean"].mean()
    to_eager = against(frames["model_tokens"], "eager").groupby("arm")["kl_mean"].mean()
    plans = [plan for plan in plans_of(frames) if plan in hidden.index]
    if not plans or "eager" not in hidden.index:
        return ""
    best, likest = kl[plans].idxmin(), to_eager[plans].idxmin()
    seconds = against(frames["model_tokens"], "eager").groupby("arm")["seconds"].median()
    by_text = against(frames["model_tokens"], truth).pivot(index=["text", "prompt"], columns="arm", values="kl_mean")
    closer = int((by_text[best] < by_text["eager"]).sum())
    return (
        f"**{model}: closest to {truth}** is `{best}`: KL {kl[best]:.2g} nats, eager {kl['eager']:.2g} (nearer than eager on {closer} of {len(by_text)} texts), of the plans tried "
        f"`{kl[plans].idxmax()}` most with {kl[plans].max():.2g}; last hidden state {hidden[best]:.2g} of its size off, eager "
        f"{hidden['eager']:.2g}. Closest to eager is `{likest}`, KL {to_eager[likest]:.2g}. A pass with them takes "
        f"{seconds[best] / seconds['eager']:.2f} and {seconds[likest] / seconds['eager']:.2f} of eager's time, unfused in PyTorch "
        "on this machine."
    )


def _greedy(model: str, frames: Frames) -> str:
    table = parted(frames)
    plans = [plan for plan in plans_of(frames) if plan in table.index]
    if not plans:
        return ""
    listed = ", ".join(f"`{plan}` {table.loc[plan, 'parted']:.0f}" for plan in plans)
    others = [
        a for a in ("eager", "eager, token by token", "one ulp on K", "float32", "4-bit weights") if a in table.index
    ]
    beside = ", ".join(f"{arm} {table.loc[arm, 'parted']:.0f}" for arm in others)
    length = int(against(frames["model_tokens"], "eager")["parts_at"].max())
    return (
        f"**{model}: greedy text.** Of {table['of'].max():.0f} continuations of {length} tokens that eager wrote, so many part: "
        f"{listed}; beside them {beside}."
    )


def _perplexity(model: str, frames: Frames) -> str:
    found = perplexity(frames)
    plans = found.reindex(plans_of(frames)).dropna()
    if not len(plans) or "float32" not in found:
        return ""
    four = f", 4-bit weights {found['4-bit weights']:.2f}" if "4-bit weights" in found else ""
    return (
        f"**{model}: perplexity** on the passages: float32 {found['float32']:.3f}, eager {found['eager']:.3f}, plans "
        f"{plans.min():.3f} (`{plans.idxmin()}`) to {plans.max():.3f} (`{plans.idxmax()}`){four}."
    )


def _amplified(model: str, frames: Frames) -> str:
    table = layer_table(frames)
    weights = table["largest K-norm weight"]
    if weights.isna().all():
        return ""
    rank = table.rank().corr()["largest K-norm weight"]
    lowest, highest = (table.loc[at] for at in (weights.idxmin(), weights.idxmax()))
    return (
        f"**{model}: what its K norms amplify.** Largest weights from {weights.min():.3g} to {weights.max():.3g} over "
        f"{len(table)} layers. Rank correlation with eager's error, which depth adds to as well: K absolute {rank['K, max abs error']:+.2f}, attention logits "
        f"{rank['attention logits, rms error']:+.2f}; K relative {rank['K, relative rms error']:+.2f}, in ulps "
        f"{rank['K, p99 error in ulps']:+.2f}. Between the layers of the smallest and the largest weight: K absolute "
        f"{lowest['K, max abs error']:.2g} and {highest['K, max abs error']:.2g}, relative "
        f"{lowest['K, relative rms error']:.2g} and {highest['K, relative rms error']:.2g}."
    )


# ---------------------------------------------------------------- the report's section


def sections(folder: Path) -> list[str]:
    """A section of report.md for each model."""
    return [section(model, frames) for model, (_, frames) in studies(folder).items()]


def section(model: str, frames: Frames) -> str:
    tokens = frames["model_tokens"]
    texts, arms = tokens[["text", "prompt"]].drop_duplicates(), arms_of(frames)
    failed = tokens[tokens["status"] != "ok"]
    reasons = "".join(f"\n\n`{row.arm}` {row.status}: {row.reason}" for row in failed.itertuples())
    return (
        f"## In a whole model: {model} ({_weights(frames)})\n\nEvery arm reads the same {len(texts)} texts and, behind each, the "
        "greedy continuation that eager chose, in one pass. A continuation parts at the first token that the arm would not have "
        f"chosen. Means over texts; the truth is the same model in {truth_name(frames)}; Δ log p is the absolute change of a "
        f"token's log probability, nats. {len(arms)} arms.{reasons}\n\n{markdown(arm_table(frames))}\n\n"
        f"![error of each layer](plots/model-{model}-layers.png)\n\n![change of log p](plots/model-{model}-tokens.png)\n\n"
        f"![where greedy text parts](plots/model-{model}-parting.png)\n\nEager against {truth_name(frames)}, layer by layer; "
        f"attention logits without positions.\n\n{markdown(layer_table(frames))}"
    )
