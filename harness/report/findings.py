"""What the records say, in a few lines, each written from its numbers and linked to its section of report.md."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from castpoint.harness.report import claims, k_norms, model, systems
from castpoint.harness.report.fingerprints import answer_words
from castpoint.harness.report.markdown import percent
from castpoint.harness.report.paired import LEVEL, interval
from castpoint.harness.runs.frames import Frames, differing, latest
from castpoint.harness.runs.words import Backend, KNorms


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
    of_bench = [*_noise(frames["eager"]), *_amplified(folder, frames["k_norms"])]
    return [*of_bench, *_compiled(folder), *_seen(folder), *_noticed(folder), *_judged(folder)]


NOISE, AMPLIFIED, IMPLEMENTATIONS = "Noise floor", "What the K-norm weights amplify", "What public implementations do"
TOLERANCES = "What other people's tests let pass"


def _noise(eager: pd.DataFrame) -> Iterator[Finding]:
    itself, one = (differing(eager, *of) for of in ((Backend.EAGER_BATCH_OF_1,), (Backend.SPEC, "one-rounding")))
    if itself and one:
        yield Finding(
            f"**One rounding a norm instead of two** changes {percent(*one, 2)} of K's elements; eager read token by token changes "
            f"{percent(*itself, 2)} of its own (over layers and the instruction sets that this CPU plays).",
            NOISE,
        )


def _amplified(folder: Path, drawn: pd.DataFrame) -> Iterator[Finding]:
    """On the bench's draws; and on every model with real weights, the median of its layers."""
    if not k_norms.measured(drawn):
        return
    largest = k_norms.arm(drawn, KNorms.OWN)["k_norm_there"].iloc[0]
    error, relative = (
        "{:.3g} to {:.3g}".format(*k_norms.middle_and_ends(k_norms.multiples(drawn, column, KNorms.OWN))[::2])
        for column in ("logit_rms_error", "logit_rel_error")
    )
    said = (
        "**K-norm weights multiply logits and their errors about alike**: those drawn for the first layer, "
        f"{largest:g} among them, the logits' rms error by {error}, their relative error by {relative} (four fifths of draws), "
        "against weights near one"
    )
    for study in model.studies(folder):
        rows = study.frames["k_norms"]
        if study.drawn or not k_norms.measured(rows):
            continue
        own, without = (
            f"{k_norms.middle_and_ends(k_norms.multiples(rows, 'logit_rms_error', k_norm))[1]:.2g}"
            for k_norm in (KNorms.OWN, KNorms.WITHOUT_LARGEST)
        )
        rest = "with and without" if own == without else f"{without} without"
        said += f"; {study.model}'s own by {own}, {rest} each layer's largest (median of layers)"
    yield Finding(f"{said}.", AMPLIFIED)


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


def _seen(folder: Path) -> Iterator[Finding]:
    """Planted faults before the lab's own checks, and before others' tolerances that refuse no right kernel."""
    if not (found := latest(folder, "tolerances")):
        return
    rows = found[1].assign(share=found[1]["chain_passed"] / found[1]["chain_faults"])
    peers = rows.query("url != '' and right_refused == 0")
    own = rows[rows["url"] == ""][-1:]  # all of the lab's checks together
    if not len(peers) or not len(own):
        return
    faults, passed = own["chain_faults"].item(), own["chain_passed"].item()
    yield Finding(
        f"**Of {faults:.0f} planted faults** the lab's checks see {faults - passed:.0f}; "
        f"tolerances of {peers['peer'].nunique()} other projects' tests let "
        f"{percent(peers['share'].min(), peers['share'].max(), 2)} pass.",
        TOLERANCES,
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


def _judged(folder: Path) -> Iterator[Finding]:
    if found := claims.frames(folder):
        said = f"**{len(found[1])} claims of public reports**, measured again: {claims.verdicts(found[1])}."
        yield Finding(said, systems.SECTION)
