"""What the records say, in four lines, each written from its numbers and linked to its section of report.md."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from castpoint.harness.report import model
from castpoint.harness.report.fingerprints import answer_words
from castpoint.harness.report.paired import LEVEL, interval
from castpoint.harness.runs.frames import Frames, first_layer, latest, noise_floor, over_layers


@dataclass(frozen=True)
class Finding:
    """A line of Markdown, and the heading of the section that it is taken from."""

    text: str
    heading: str

    def line(self, report: str = "") -> str:
        """report: where the sections are, if not on the same page."""
        return f"- {self.text} [More]({report}#{anchor(self.heading)})"


def anchor(heading: str) -> str:
    """The fragment under which GitHub shows a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def findings(folder: Path, frames: Frames) -> list[Finding]:
    """frames: of a bench; studies are the folder's newest. Without the rows for one of them there is no such line."""
    return [*_noise(frames["errors"]), *_amplified(frames["draws"]), *_compiled(folder), *_noticed(folder)]


NOISE, AMPLIFIED, IMPLEMENTATIONS = "Noise floor", "What the K-norm weights amplify", "What public implementations do"


def _noise(errors: pd.DataFrame) -> Iterator[Finding]:
    noise, equal = noise_floor(errors), over_layers(first_layer(errors), "eager", "share_equal").get("one-rounding")
    if noise is not None and equal is not None:
        yield Finding(
            f"**One rounding a norm instead of two** changes {1 - equal:.0%} of K's elements; eager run one token at a time "
            f"changes {noise:.3%} of its own (first layer).",
            NOISE,
        )


def _amplified(draws: pd.DataFrame) -> Iterator[Finding]:
    if controls := _controls(draws):
        own, ones, _ = controls
        ratios = own["logit_rms_error"] / ones["logit_rms_error"]
        yield Finding(
            f"**A K-norm weight of {own['k_norm_max'].iloc[0]:g}** multiplies the logits' rms error by {_spread(ratios)}, "
            f"against weights of one in the same layer (`{own['plan'].iloc[0]}`; median and range over draws).",
            AMPLIFIED,
        )


def draw_table(draws: pd.DataFrame) -> pd.DataFrame:
    """From the draws of the first layer: measures over those of K-norm weights of 1 and of the same seed, their median,
    least and greatest. A column each for the drawn weights, weights of 1, and another weight in every channel; empty where
    one of them was not measured."""
    measures = {
        "K max abs error, after: multiple": "k_max_abs_after",
        "logit rms error: multiple": "logit_rms_error",
        "softmax total variation, mean: multiple": "softmax_tv_mean",
    }
    controls = _controls(draws)
    table = {"measure; largest K-norm weight:": [*measures, "most attended key flips, %"] if controls else []}
    for rows in controls:
        cells = [_spread(rows[column] / controls[1][column]) for column in measures.values()]
        head = f"{rows['weights'].iloc[0]}: {rows['k_norm_max'].iloc[0]:g}"
        table[head] = [*cells, _spread(100 * rows["top_key_flips"])]
    return pd.DataFrame(table)


def _controls(draws: pd.DataFrame) -> list[pd.DataFrame]:
    """By seed: the drawn K-norm weights, 1, and another weight in every channel; none where one was not measured."""
    draws = draws[draws["status"] == "ok"]
    uniform = draws["uniform_k_norm"]
    found = [draws[rows].set_index("seed") for rows in (uniform.isna(), uniform == 1, uniform > 1)]
    return found if all(map(len, found)) else []


def _spread(values: pd.Series) -> str:
    """`81 (57 to 123)`: the median, the least and the greatest; one number where they agree."""
    low, middle, high = (f"{v:.2g}" if v < 100 else f"{v:.0f}" for v in values.quantile([0, 0.5, 1]))
    return middle if low == high else f"{middle} ({low} to {high})"


def _compiled(folder: Path) -> Iterator[Finding]:
    """What the compiler changes: implementations whose answer depends on how they are run."""
    if not (found := latest(folder, "implementations")):
        return
    rows = found[1].query("kind == 'rmsnorm' and how in ['eager', 'torch.compile']")
    plans = rows.pivot(index="implementation", columns="how", values="plan").dropna()
    moved = plans[plans["eager"] != plans["torch.compile"]] if len(plans.columns) == 2 else plans[:0]
    if len(moved):
        eager, compiled = (answer_words(moved[how].iloc[0]) for how in ("eager", "torch.compile"))
        yield Finding(
            f"**torch.compile moves a boundary** in {len(moved)} of {len(plans)} public implementations: eager rounds "
            f"`{eager}`, compiled `{compiled}`.",
            IMPLEMENTATIONS,
        )


def _noticed(folder: Path) -> Iterator[Finding]:
    """One line a model with real weights: the plans beside what eager changes in itself. Drawn weights say nothing."""
    for study in model.studies(folder):
        rows = model.against(study.frames["model_tokens"], "eager")
        by_text = rows.pivot(index=["text", "prompt"], columns="arm", values="dlogp_p50")
        moved = set(rows.loc[rows["logit_max"] > 0, "arm"])
        plans = [plan for plan in model.plans_of(study.frames) if plan in moved]
        if study.drawn or model.YARDSTICKS[0] not in moved or not plans:
            continue
        times = _times(by_text, plans)
        marks = _times(by_text, [mark for mark in model.YARDSTICKS[3:] if mark in by_text])
        beside = "".join(
            f", {at} by {x:.0f} ({low:.0f} to {high:.0f}) times that" for at, x, low, high in marks.itertuples()
        )
        text = (
            f"**In {study.model}** plans change a token's log probability by {times['times'].min():.1f} to "
            f"{times['times'].max():.1f} times ({times['low'].min():.1f} to {times['high'].max():.1f} with all intervals) what eager "
            f"changes in itself, read token by token{beside} (medians; 95 % over {len(by_text)} texts)."
        )
        yield Finding(
            text.replace("inf ", "∞ ").replace("inf)", "∞)"),
            f"In a whole model: {study.model}",
        )


def _times(by_text: pd.DataFrame, arms: list[str]) -> pd.DataFrame:
    """Arm -> times: its mean over texts as a multiple of that of eager, read token by token; low, high: where that may
    lie, at 95 % for all these arms together. by_text: a row a text, a column an arm; failed ones are left out."""
    found = {}
    for arm in arms:
        values, over = by_text[[arm, model.YARDSTICKS[0]]].dropna().to_numpy(float).T
        low, high = interval(values, over, LEVEL / len(arms))
        found[arm] = (values.mean() / over.mean(), max(low, 0.0), high)
    return pd.DataFrame.from_dict(found, orient="index", columns=["times", "low", "high"])
