"""Whole-model studies as plots: error of each layer, change of log probabilities, where greedy text parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from castpoint.harness.report.model import against, arms_of, eager_measured, layer_errors, parted, plans_of, truth_name
from castpoint.harness.report.style import GREY, colour, label_ends, panels
from castpoint.harness.runs.frames import Frames
from castpoint.harness.runs.words import BINS

DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))


def model_plots(frames: Frames) -> dict[str, Figure]:
    """layers, tokens and parting; none where eager, against which all is drawn, has no figure."""
    if not eager_measured(frames):
        return {}
    return {"layers": layers(frames), "tokens": tokens(frames), "parting": parting(frames)}


def style(frames: Frames, arm: str) -> dict[str, object]:
    """Colour and line of an arm: plans have their own colours, yardsticks are grey and dashed."""
    plans = plans_of(frames)
    if arm in plans:
        return {"color": colour(arm), "linestyle": "-", "linewidth": 1.6}
    yardsticks = [name for name in arms_of(frames) if name not in plans]
    return {"color": GREY, "linestyle": DASHES[yardsticks.index(arm) % len(DASHES)], "linewidth": 1.3}


def layers(frames: Frames) -> Figure:
    """Relative error of the hidden state behind every layer against the truth, and the same over eager's."""
    errors = layer_errors(frames)
    drawn = [arm for arm in arms_of(frames) if arm in errors.index]
    lost = ", ".join(arm for arm in arms_of(frames) if arm not in drawn)
    title = f"Error behind every layer (left), and as a multiple of eager's (right){lost and f'; failed: {lost}'}"
    figure, (left, right) = panels((1, 2), (12, 5.2), (0.07, 0.76, 0.78, 0.5), title, width_ratios=[2, 3], wspace=0.22)
    beside = [arm for arm in drawn if 0.3 < (errors[arm] / errors["eager"]).median() < 3]
    together = errors.loc[beside].unstack("arm")
    left.fill_between(together.index, together.min(axis=1), together.max(axis=1), color="black", linewidth=1)
    left.annotate(f"eager and {len(beside) - 1} arms beside it (right)", (together.index[-1], together.min(axis=None)),
                  (0, -6), textcoords="offset points", fontsize=8, ha="right", va="top")  # fmt: skip
    for arm in beside:
        right.plot(errors[arm].index, errors[arm] / errors["eager"], **style(frames, arm))
    left.set(yscale="log", ylabel=f"hidden state: relative rms error to {truth_name(frames)}")
    for axes in (left, right):
        axes.set_xlabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
    for arm in (arm for arm in drawn if arm not in beside):
        left.plot(errors[arm].index, errors[arm], **style(frames, arm))
        left.text(errors[arm].index[-1], errors[arm].iloc[-1], arm, fontsize=8, color=GREY, ha="right", va="bottom")
    ends = {arm: (errors[arm] / errors["eager"]).iloc[-1] for arm in beside}
    label_ends(right, together.index[-1], ends, lambda arm: style(frames, arm)["color"])
    return figure


def tokens(frames: Frames) -> Figure:
    """Distribution of the change of a token's log probability against eager, all texts together, a row an arm."""
    counts = against(frames["model_dlogp"], "eager").groupby(["arm", "above"])["tokens"].sum()
    arms = [arm for arm in arms_of(frames) if arm != "eager"]
    title = "How far a token's log probability is from eager's"
    figure, axes, places = _rows(arms, counts.index.levels[0], title)
    for arm, place in places.items():
        shade = style(frames, arm)["color"]
        low, quarter, middle, most, top = quantiles(counts[arm], (0.1, 0.25, 0.5, 0.75, 0.99))
        if top:
            axes.plot([low, top], [place, place], color=shade, linewidth=1)
            axes.plot([quarter, most], [place, place], color=shade, linewidth=5, alpha=0.5, solid_capstyle="butt")
            axes.scatter(middle, place, color=shade, s=50, zorder=3)
        _say(axes, place, f"{middle:.2g}" if top else "no change", shade)
    words = "|Δ log p|, nats (dot and number: median; bar: middle half of tokens; line: 10 % to 99 %)"
    axes.set(xscale="log", xlabel=words)
    return figure


def quantiles(counts: pd.Series, shares: Sequence[float]) -> list[float]:
    """Of a histogram: counts by the lower edge of each bin (runs.words.BINS; 0: below the first), even in
    the logarithm within a bin."""
    edges, ends = counts.index.to_numpy(float), counts.cumsum().to_numpy(float)
    found = []
    for wanted in np.multiply(shares, ends[-1]):
        place = int(np.searchsorted(ends, wanted))
        inside = (wanted - (ends[place - 1] if place else 0.0)) / counts.iloc[place]
        found.append(edges[place] * (BINS[1] / BINS[0]) ** inside)
    return found


def _rows(arms: list[str], measured: Iterable[str], title: str) -> tuple[Figure, Axes, dict[str, int]]:
    """A row an arm, named on the left, the first on top, with a margin for a figure on the right, where those that were
    not measured are said to have failed; the rows of the others."""
    places = {arm: place for place, arm in enumerate(reversed(arms))}
    figure, axes = panels((1, 1), (9.5, 0.36 * len(arms) + 1.6), (0.2, 0.87, 0.9, 0.7), title)
    axes.set(yticks=range(len(arms)), yticklabels=places, ylim=(-0.6, len(arms) - 0.4))
    for arm in sorted(set(arms) - set(measured)):
        _say(axes, places.pop(arm), "failed")
    return figure, axes, places


def _say(axes: Axes, place: int, words: str, shade: object = GREY) -> None:
    """Behind the end of that row."""
    axes.text(1.02, place, words, transform=axes.get_yaxis_transform(), va="center", fontsize=9, color=shade)


def parting(frames: Frames) -> Figure:
    """One dot a continuation: tokens until the arm would choose another than eager."""
    rows = against(frames["model_tokens"], "eager")
    length, by_arm = rows["parts_at"].max(), rows.sort_values("prompt").groupby("arm")["parts_at"]
    title = "Where greedy text parts from eager's"
    count = parted(frames)["parted"].get("eager", 0)
    if count:  # eager chose the text token by token and reads it here in one pass: near ties fall otherwise
        title += f"\neager parts from its own in {count:.0f}, read in one pass: counts like that say nothing of a plan"
    figure, axes, places = _rows(arms_of(frames), by_arm.groups, title)
    for arm, place in places.items():
        shade = style(frames, arm)["color"]
        at = by_arm.get_group(arm).to_numpy()
        spread = np.linspace(-0.28, 0.28, len(at)) if len(at) > 1 else np.zeros(1)
        stays = at == length
        axes.scatter(at[~stays], place + spread[~stays], color=shade, s=26)
        axes.scatter(at[stays], place + spread[stays], facecolors="none", edgecolors=shade, s=26)
        _say(axes, place, f"{int((~stays).sum())} of {len(at)} part", shade)
    words = f"tokens before the arm chooses another than eager (hollow: none in {length:.0f})"
    axes.set(xlim=(-0.5, length + 0.8), xlabel=words)
    return figure
