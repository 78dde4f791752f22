"""GPU times as a plot, drawn from the records of one run."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from castpoint.harness.problems import grid
from castpoint.harness.report.gpu_runs import DEFERRED, EXACT, FOLDED, GROUPS, P2, Run, judged
from castpoint.harness.report.style import BLUE, GREEN, GREY, ORANGE, RED, panels
from castpoint.harness.runs.words import Kind

# Colour, line and marker of what is compared, from wide to narrow, so that lines on top of one another stay in sight.
STYLES: dict[str, dict[str, Any]] = {
    EXACT: {"color": BLUE, "linestyle": "-", "linewidth": 2.6, "marker": "o", "markersize": 6},
    DEFERRED: {"color": ORANGE, "linestyle": "--", "linewidth": 1.4, "marker": "s", "markersize": 3.5},
    FOLDED: {"color": GREEN, "linestyle": ":", "linewidth": 1.4, "marker": "^", "markersize": 3.5},
    P2: {"color": RED, "linestyle": "", "marker": "x", "markersize": 5},
}
TOKENS = (1, 8, 64, 512, 4096)  # ticks
RATIOS = (0.1, 0.2, 0.5, 0.7, 0.8, 0.9, 1, 1.2, 1.5, 2, 3, 5)  # ticks of speed-ups
COLUMNS = 4  # panels side by side
WIDEST, NARROWEST = 12, 7  # inches
SPAN = 1.15  # the least factor on either side of the line
BEYOND = 1.15


def speedups(run: Run) -> Figure | None:
    """Speed-up over the best separate chain over tokens, one panel a model that has any; None where none counts."""
    every = {model: {what: judged(run, model, what) for what in STYLES} for model in grid.MODELS}
    found = {model: of for model, of in every.items() if any(len(of[what]) for what in GROUPS)}
    if not found:
        return None
    columns = min(COLUMNS, len(found))
    lines = -(-len(found) // columns)
    title = "Speed-up over the best separate chain (P1), cold weights\nabove the line we are faster"
    title += f"; CUT OFF: {run.reached}" if run.cut_off else ""
    size, left = (max(WIDEST * columns / COLUMNS, NARROWEST), 2.9 * lines + 1.75), 0.06 if columns > 2 else 0.1
    edges = (left, 0.985, 1.5, 0.95)
    figure, grids = panels((lines, columns), size, edges, title, squeeze=False, sharex=True, sharey=True)
    if missing := [model for model in grid.MODELS if model not in found]:
        figure.text(0.005, 0.38 / size[1], f"without a time: {', '.join(missing)}", fontsize=7, color=GREY)
    for axes, (model, of) in zip(grids.flat, found.items(), strict=False):
        axes.set_title(model, loc="left", fontsize=10)
        axes.axhline(1, color="black", linewidth=1)
        for what, rows in of.items():
            _line(axes, rows, STYLES[what])
        noise = pd.concat([of[what] for what in GROUPS]).drop_duplicates("tokens").sort_values("tokens")
        _band(axes, noise["tokens"], noise["noise_p10"].clip(upper=1), noise["noise_p90"].clip(lower=1), GREY, 0.35)
    for axes in grids.flat[len(found) :]:
        axes.set_visible(False)
    first = grids.flat[0]
    first.set(xscale="log", yscale="log")
    for axis, ticks in ((first.xaxis, TOKENS), (first.yaxis, RATIOS)):
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    first.minorticks_off()
    values = [y for axes in grids.flat for line in axes.lines for y in line.get_ydata()]
    values += [1 / SPAN, SPAN]
    first.set(xlim=(0.8, 5200), ylim=(min(values) / 1.06, max(values) * 1.06))  # ticks that are set widen the limits
    for axes in grids[:, 0]:
        axes.set_ylabel("P1's time / this time")
    for place, axes in enumerate(grids.flat[: len(found)]):
        if place + columns >= len(found):  # nothing below it
            axes.set_xlabel("tokens")
            axes.tick_params(labelbottom=True)
    drawn = {what: style for what, style in STYLES.items() if any(len(of[what]) for of in found.values())}
    handles = [Line2D([], [], label="P2, torch.compile" if w == P2 else f"ours, {w}", **s) for w, s in drawn.items()]
    hollow = {"linestyle": "", "marker": "o", "markerfacecolor": "white", "label": "hollow: not fused"}
    handles += [Patch(color=GREY, alpha=0.35, label="noise (A/A)"), Line2D([], [], color=GREY, **hollow)]
    ncol = len(handles) if columns > 2 else 3
    figure.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 0.5 / size[1]), ncol=ncol, frameon=False)
    return figure


def _line(axes: Axes, rows: pd.DataFrame, style: dict[str, Any]) -> None:
    """A line of medians, of our own with p10 to p90; markers are hollow where norm, cuBLAS and head norm ran instead of
    a fused kernel."""
    axes.plot(rows["tokens"], rows["speedup_p1_p50"], **style | {"marker": ""})
    whole = ((rows["kind"] != Kind.OWN) | (rows["kernel"] != "separate")).to_numpy(bool)
    for chosen, face in ((rows[whole], style["color"]), (rows[~whole], "white")):
        axes.plot(chosen["tokens"], chosen["speedup_p1_p50"], **style | {"linestyle": "", "markerfacecolor": face})
    if style["linestyle"]:
        _band(axes, rows["tokens"], rows["speedup_p1_p10"], rows["speedup_p1_p90"], style["color"], 0.2)


def _band(axes: Axes, x: pd.Series, low: pd.Series, high: pd.Series, shade: str, alpha: float) -> None:
    """A band that reaches a little beyond its ends, so that one of a single point is seen."""
    if len(x):
        ends = [x.iloc[0] / BEYOND, *x, x.iloc[-1] * BEYOND]
        low, high = ([v.iloc[0], *v, v.iloc[-1]] for v in (low, high))
        axes.fill_between(ends, low, high, color=shade, alpha=alpha, linewidth=0)
