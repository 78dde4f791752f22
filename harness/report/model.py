"""Whole-model studies as tables and sentences, from the records of model.study."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from castpoint.harness.report.markdown import markdown
from castpoint.harness.report.paired import difference, given_depth, told_apart
from castpoint.harness.runs.frames import Frames, best_backend, load
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
    found: dict[str, Study] = {}
    for run_id, run in load_runs(folder).items():
        if "finished" in run and run.get("command") == "model":
            found[run["settings"]["model"]] = study_of(folder, run_id)
    return sorted(found.values(), key=lambda study: study.drawn)


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
        table[f"Δ log p, {column} of a text"] = names.map(to_eager[f"dlogp_{column}"])
    table["Δ log p, max"] = names.map(largest)
    table["greedy: parted"] = names.map(partings["parted"].astype(str) + " of " + partings["of"].astype(str))
    table["perplexity"] = names.map(perplexity(frames).map("{:.3f}".format))
    lost = failed(frames)
    if lost:
        table["status"] = [f"failed in {lost[arm]} texts" if arm in lost else "ok" for arm in names]
    return table


def failed(frames: Frames) -> dict[str, int]:
    """Arm -> in how many texts it failed, of those that did."""
    rows = frames["model_tokens"]
    return rows[rows["status"] != "ok"].groupby("arm", sort=False).size().to_dict()


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
        "one_minus_cosine": "hidden state, 1 − cosine",
    }
    return means[list(names)].rename(columns=names)


# ---------------------------------------------------------------- sentences


def sentences(folder: Path, speed: pd.DataFrame) -> list[str]:
    """Five sentences on each real model that was studied, and a sixth where an arm failed. What drawn weights say means
    nothing: they get a table only. speed: times of a bench, or none."""
    lines = []
    for study in studies(folder):
        if study.drawn:
            continue
        lines.append(_failed(study))
        if eager_measured(study.frames):
            lines += [
                _notice(study),
                _closest(study, _times(speed)),
                _greedy(study),
                _perplexity(study),
                _amplified(study),
            ]
    return [line for line in lines if line]


def eager_measured(frames: Frames) -> bool:
    """Whether eager, against which every arm is measured, has a figure at all."""
    rows = frames["model_tokens"]
    return bool(((rows["arm"] == "eager") & (rows["status"] == "ok")).any())


def _failed(study: Study) -> str:
    lost = failed(study.frames)
    listed = ", ".join(f"`{arm}` in {count} texts" for arm, count in lost.items())
    return f"**{study.model}, failed:** {listed} (reasons: report). Nothing below counts them." if lost else ""


def conditions(study: Study) -> str:
    settings, tokens = study.run["settings"], study.frames["model_tokens"]
    count = len(read_texts(tokens)[["text", "prompt"]].drop_duplicates())
    return (
        f"{settings['weights']}; {count} texts of up to {settings['tokens']} tokens and the continuation that eager wrote; commit "
        f"{study.run['environment']['commit']}, run {study.run_id}"
    )


def _notice(study: Study) -> str:
    rows = against(study.frames["model_tokens"], "eager").groupby("arm").mean(numeric_only=True)

    def said(arm: str) -> str:
        return (
            f"{rows.loc[arm, 'dlogp_p50']:.2g} (p99 {rows.loc[arm, 'dlogp_p99']:.2g}, {1 - rows.loc[arm, 'top1']:.1%})"
        )

    plans = [plan for plan in plans_of(study.frames) if plan in rows.index]
    equal = [plan for plan in plans if rows.loc[plan, "logit_max"] == 0]
    moved = ", ".join(f"`{plan}` {said(plan)}" for plan in plans if plan not in equal)
    beside = ", ".join(f"{arm} {said(arm)}" for arm in YARDSTICKS if arm in rows.index)
    same = f"; {', '.join(f'`{plan}`' for plan in equal)}: what eager does, the same bits" if equal else ""
    noise = rows["dlogp_p50"].get(YARDSTICKS[0], 0.0)
    times = [rows.loc[plan, "dlogp_p50"] / noise for plan in plans if plan not in equal and noise]
    ratio = (
        f" The plans' medians are {min(times):.1f} to {max(times):.1f} times what eager changes in itself, token by token."
        if times
        else ""
    )
    return (
        f"**Does {study.model} notice?** ({conditions(study)}.) Change of a token's log probability against eager, nats: median "
        f"(p99, share of other first choices), each a mean over texts. Plans: {moved}{same}. Yardsticks: {beside}.{ratio}"
    )


def _closest(study: Study, times: dict[str, float]) -> str:
    frames, truth = study.frames, truth_name(study.frames)
    rows, hidden = against(frames["model_tokens"], truth), last_layer(frames, truth)
    plans = [plan for plan in plans_of(frames) if plan in hidden.index]
    if not plans:
        return ""
    kl = {plan: difference(rows, "kl_mean", plan) for plan in plans}
    listed = ", ".join(f"`{plan}` {d.mean:+.1e} ± {d.error:.0e}" for plan, d in kl.items() if d.mean)
    told = [f"`{plan}` {'farther' if kl[plan].mean > 0 else 'nearer'}" for plan in told_apart(kl)]
    near = ", ".join(f"`{plan}` {hidden[plan]:.3g}" for plan in plans)
    took = ", ".join(f"`{plan}` {times[plan]:.2f}" for plan in plans if plan in times)
    return (
        f"**{study.model}, distance to {truth}:** KL of eager {rows[rows['arm'] == 'eager']['kl_mean'].mean():.2g} nats; of plans more or "
        f"less than that, ± standard error over texts: {listed}. Told apart from eager (sign-flip test, 5 % for all plans together): {', '.join(told) or 'none'}. Last "
        f"layer's hidden state, relative error: eager {hidden['eager']:.3g}, {near}."
        + (f" Time of one layer's chain over eager's in the table above (another model's): {took}." if took else "")
    )


def _times(speed: pd.DataFrame) -> dict[str, float]:
    """Plan -> its time over eager's in that bench, at the most tokens."""
    if not len(speed):
        return {}
    rows = speed[(speed["tokens"] == speed["tokens"].max()) & (speed["backend"] == best_backend(speed))]
    return (1 / rows.set_index("plan")["speedup_vs_eager"]).dropna().to_dict()


def _greedy(study: Study) -> str:
    table = parted(study.frames)
    plans = [plan for plan in plans_of(study.frames) if plan in table.index]
    if not plans:
        return ""
    listed = ", ".join(f"`{plan}` {table.loc[plan, 'parted']:.0f}" for plan in plans)
    beside = ", ".join(f"{arm} {table.loc[arm, 'parted']:.0f}" for arm in YARDSTICKS if arm in table.index)
    length = int(against(study.frames["model_tokens"], "eager")["parts_at"].max())
    return (
        f"**{study.model}, greedy text:** of {table['of'].max():.0f} continuations of {length} tokens that eager wrote, so many part: "
        f"{listed}; {beside}. Eager itself, reading in one pass what it wrote token by token, parts in "
        f"{table.loc['eager', 'parted']:.0f}: counts like that say nothing of a plan."
    )


def _perplexity(study: Study) -> str:
    found, tokens = perplexity(study.frames), study.frames["model_tokens"]
    rows = tokens[(tokens["text"] == "passages") & (tokens["reference"] == "eager") & (tokens["status"] == "ok")]
    arms = [arm for arm in [*plans_of(study.frames), "float32", "4-bit weights"] if arm in found.index]
    if not arms:
        return ""
    pairs = {arm: difference(rows, "nll", arm) for arm in arms}
    plain = {arm: pairs[arm] for arm in plans_of(study.frames) if arm in pairs}
    yardsticks = {arm: pairs[arm] for arm in pairs if arm not in plain}
    told = [
        f"{arm} {pairs[arm].mean:+.2g} ± {pairs[arm].error:.1g}"
        for arm in [*told_apart(plain), *told_apart(yardsticks)]
    ]
    plans = found.reindex(plans_of(study.frames)).dropna()
    float32 = f", float32 {found['float32']:.2f}" if "float32" in found.index else ""
    return (
        f"**{study.model}, perplexity** on the passages, known ones that a model may recite: eager {found['eager']:.2f}{float32}"
        f"{f', plans {plans.min():.2f} to {plans.max():.2f}' if len(plans) else ''}. Told apart from eager, nats a token: "
        f"{', '.join(told) or 'none'}."
    )


def _amplified(study: Study) -> str:
    table = layer_table(study.frames)
    weights = table["largest K-norm weight"]
    if weights.isna().all():
        return ""
    names = ("K, max abs error", "attention logits, rms error", "K, relative rms error", "K, p99 error in ulps")
    k, logits, relative, ulps = (given_depth(table, name) for name in names)
    return (
        f"**{study.model}, what its K norms amplify:** largest weights from {weights.min():.3g} to {weights.max():.3g} over "
        f"{len(table)} layers. Rank correlation with eager's error, depth held fixed (errors grow with it): K absolute {k:+.2f}, "
        f"attention logits {logits:+.2f}, K relative {relative:+.2f}, in ulps {ulps:+.2f}."
    )


# ---------------------------------------------------------------- the report's section


def sections(folder: Path) -> list[str]:
    """A section of report.md for each model."""
    return [section(study) for study in studies(folder)]


def section(study: Study) -> str:
    frames, model, truth = study.frames, study.model, truth_name(study.frames)
    lost = frames["model_tokens"][lambda rows: rows["status"] != "ok"]
    counted = lost.groupby(["arm", "status", "reason"], sort=False).size()
    reasons = "".join(f"\n\n`{arm}` {said} in {n} texts: {why}" for (arm, said, why), n in counted.items())
    return (
        f"## In a whole model: {model}\n\n{conditions(study)}. Eager is transformers' bf16, uncompiled, attention by SDPA. The truth: "
        f"the same bf16 weights, all arithmetic in {truth} but the float32 table of rotary angles. Every arm reads the same tokens; a "
        "continuation parts at the first token that the arm would not have chosen. Δ log p is the absolute change of a token's "
        "log probability against eager, nats; quantiles are of one text, and all figures means over texts. Perplexity is that of "
        "the passages. 4-bit weights: Q4_0 of every layer's matrices, on top of what the weights had been through: an upper mark."
        f"{reasons}\n\n{markdown(arm_table(frames))}\n\n"
        f"![error of each layer](plots/model-{model}-layers.png)\n\n![change of log p](plots/model-{model}-tokens.png)\n\n"
        f"![where greedy text parts](plots/model-{model}-parting.png)\n\nEager against {truth}, layer by layer; attention logits "
        f"without positions, hidden states before the final norm.\n\n{markdown(layer_table(frames))}"
    )
