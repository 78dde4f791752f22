"""Whole-model studies as plots: error of each layer, change of log probabilities, where greedy text parts."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.frames import Frames
from harness.impact_report import against, arms_of, plans_of, truth_name

# Okabe and Ito's colours for plans; yardsticks are grey and dashed.
COLOURS = "#0072B2 #E69F00 #009E73 #D55E00 #CC79A7 #56B4E9 #000000".split()
GREY = "#666666"
DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))


def model_plots(frames: Frames) -> dict[str, Figure]:
    """layers, tokens and parting."""
    return {"layers": layers(frames), "tokens": tokens(frames), "parting": parting(frames)}


def style(frames: Frames, arm: str) -> dict[str, object]:
    """Colour and line of an arm."""
    plans = plans_of(frames)
    if arm in plans:
        return {"color": COLOURS[plans.index(arm) % len(COLOURS)], "linestyle": "-", "linewidth": 1.6}
    yardsticks = [name for name in arms_of(frames) if name not in plans]
    return {"color": GREY, "linestyle": DASHES[yardsticks.index(arm) % len(DASHES)], "linewidth": 1.3}


def layers(frames: Frames) -> Figure:
    """Relative error of the hidden state behind every layer against the truth, and the same over eager's."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2))
    figure.subplots_adjust(left=0.06, right=0.78, bottom=0.15, top=0.9, wspace=0.18)
    rows = against(frames["model_layers"], truth_name(frames))
    errors = rows.groupby(["arm", "layer"])["rel_rms"].apply(lambda v: math.sqrt((v**2).mean()))
    drawn = [arm for arm in arms_of(frames) if arm in errors.index]
    beside = [arm for arm in drawn if 0.3 < (errors[arm] / errors["eager"]).median() < 3]
    for arm in drawn:
        left.plot(errors[arm].index, errors[arm], **style(frames, arm))
    for arm in beside:
        right.plot(errors[arm].index, errors[arm] / errors["eager"], **style(frames, arm))
    left.set_yscale("log")
    left.set_ylabel(f"hidden state: relative rms error to {truth_name(frames)}")
    left.set_title("How far from the truth behind every layer", loc="left")
    right.set_title("… as a multiple of eager's error", loc="left")
    for axes in (left, right):
        axes.set_xlabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
    for arm in (arm for arm in drawn if arm not in beside):
        left.text(errors[arm].index[-1], errors[arm].iloc[-1], arm, fontsize=8, color=GREY, ha="right", va="bottom")
    _labels(right, frames, {arm: (errors[arm] / errors["eager"]).iloc[-1] for arm in beside})
    return figure


def tokens(frames: Frames) -> Figure:
    """Share of tokens whose log probability changes by more than so many nats, against eager."""
    figure, axes = plt.subplots(figsize=(11, 5.2))
    figure.subplots_adjust(left=0.08, right=0.76, bottom=0.15, top=0.9)
    rows = against(frames["model_dlogp"], "eager")
    for arm in arms_of(frames):
        counts = rows[rows["arm"] == arm].groupby("above")["tokens"].sum()
        if len(counts) and counts.index.max() > 0:
            edges = counts.index.to_numpy()
            share = counts[::-1].cumsum()[::-1] / counts.sum()
            axes.plot(edges[edges > 0], share[edges > 0], label=arm, **style(frames, arm))
    equal = [arm for arm in arms_of(frames) if arm != "eager" and set(rows[rows["arm"] == arm]["above"]) == {0.0}]
    axes.set_xscale("log")
    axes.set_xlim(left=1e-4)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("change of a token's log probability against eager [nats]")
    axes.set_ylabel("tokens that change by more")
    axes.set_title("What the model says otherwise: left and below is closer to eager", loc="left")
    title = "equal to eager in every token:\n" + "\n".join(equal) + "\n" if equal else None
    axes.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), title=title, title_fontsize=9)
    return figure


def parting(frames: Frames) -> Figure:
    """One dot a continuation: tokens until the arm would choose another than eager."""
    rows = against(frames["model_tokens"], "eager")
    arms = [arm for arm in arms_of(frames) if arm in set(rows["arm"])][::-1]
    length = rows["parts_at"].max()
    height = 0.36 * len(arms) + 1.3  # inches: a row an arm, 0.4 above and 0.9 below
    figure, axes = plt.subplots(figsize=(9.5, height))
    figure.subplots_adjust(left=0.2, right=0.87, bottom=0.9 / height, top=1 - 0.4 / height)
    for place, arm in enumerate(arms):
        at = rows[rows["arm"] == arm].sort_values("prompt")["parts_at"].to_numpy()
        spread = np.linspace(-0.28, 0.28, len(at)) if len(at) > 1 else np.zeros(1)
        colour = style(frames, arm)["color"]
        stays = at == length
        axes.scatter(at[~stays], place + spread[~stays], color=colour, s=26)
        axes.scatter(at[stays], place + spread[stays], facecolors="none", edgecolors=colour, s=26)
        axes.text(1.02, place, f"{int((~stays).sum())} of {len(at)} part", transform=axes.get_yaxis_transform(),
                  va="center", fontsize=9, color=colour)  # fmt: skip
    axes.set_yticks(range(len(arms)), arms)
    axes.set_xlim(-0.5, length + 0.8)
    axes.set_xlabel(f"tokens before the arm chooses another than eager (hollow: none in {length:.0f})")
    axes.set_title("Where greedy text parts from eager's", loc="left")
    return figure


def _labels(axes: Axes, frames: Frames, ends: dict[str, float]) -> None:
    """Arms' names at the right end of their lines, spread so that none covers another; equal ends share a line."""
    low, high = axes.get_ylim()
    groups: dict[float, list[str]] = {}
    for arm, end in ends.items():
        groups.setdefault(round(end, 4), []).append(arm)
    places, previous = {}, -1.0
    for end in sorted(groups):
        previous = max((end - low) / (high - low), previous + 0.05)
        places[end] = previous
    over = max(0.0, previous - 0.98)
    for end, place in places.items():
        colour = style(frames, groups[end][-1])["color"]
        axes.text(1.02, place - over, " = ".join(groups[end]), transform=axes.transAxes, fontsize=8, va="center",
                  color=colour)  # fmt: skip
