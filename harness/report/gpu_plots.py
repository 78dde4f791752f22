"""GPU times as a plot, drawn from the records of one run."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from castpoint.harness.problems import grid
from castpoint.harness.report.gpu import DEFERRED, EXACT, FOLDED, GROUPS, P2, Run, judged
from castpoint.harness.report.style import BLUE, GREEN, GREY, ORANGE, RED, panels
from castpoint.harness.runs.schema import Kind

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


def speedups(run: Run) -> Figure | None:
    """Speed-up over the best separate chain over tokens, one panel a model of the grid; None where none counts."""
    found = {model: {what: judged(run, model, what) for what in STYLES} for model in grid.MODELS}
    ours = {model: pd.concat([of[what] for what in GROUPS]) for model, of in found.items()}
    if not any(map(len, ours.values())):
        return None
    lines = -(-len(found) // COLUMNS)
    title = "Speed-up over the best separate chain (P1), cold weights; above the line we are faster"
    size, edges = (12, 2.9 * lines + 1), (0.06, 0.985, 1.2, 0.7)
    figure, grids = panels((lines, COLUMNS), size, edges, title, sharex=True, sharey=True)
    for axes, model in zip(grids.flat, found, strict=False):
        axes.set_title(model, loc="left", fontsize=10)
        axes.axhline(1, color="black", linewidth=1)
        for what, rows in found[model].items():
            _line(axes, rows, STYLES[what])
        noise = ours[model].drop_duplicates("tokens").sort_values("tokens")
        axes.fill_between(noise["tokens"], noise["noise_p10"].clip(upper=1), noise["noise_p90"].clip(lower=1),
                          color=GREY, alpha=0.35, linewidth=0)  # fmt: skip
        if not len(noise):
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color=GREY)
    first = grids.flat[0]
    first.set(xscale="log", yscale="log")
    for axis, ticks in ((first.xaxis, TOKENS), (first.yaxis, RATIOS)):
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    first.minorticks_off()
    values = [y for axes in grids.flat for line in axes.lines for y in line.get_ydata()]
    first.set(xlim=(0.8, 5200), ylim=(min(values) / 1.06, max(values) * 1.06))  # ticks that are set widen the limits
    for axes in grids[:, 0]:
        axes.set_ylabel("P1's time / this time")
    for axes in grids[-1]:
        axes.set_xlabel("tokens")
    handles = [Line2D([], [], label="P2, torch.compile" if w == P2 else f"ours, {w}", **s) for w, s in STYLES.items()]
    hollow = {"linestyle": "", "marker": "o", "markerfacecolor": "white", "label": "hollow: not fused"}
    handles += [Patch(color=GREY, alpha=0.35, label="noise (A/A)"), Line2D([], [], color=GREY, **hollow)]
    figure.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 0.03), ncol=len(handles), frameon=False)
    return figure


def _line(axes: Axes, rows: pd.DataFrame, style: dict[str, Any]) -> None:
    """A line of medians, of our own with p10 to p90; markers are hollow where norm, cuBLAS and head norm ran instead of
    a fused kernel."""
    axes.plot(rows["tokens"], rows["speedup_p1_p50"], **style | {"marker": ""})
    whole = ((rows["kind"] != Kind.OWN) | (rows["kernel"] != "separate")).to_numpy(bool)
    for chosen, face in ((rows[whole], style["color"]), (rows[~whole], "white")):
        axes.plot(chosen["tokens"], chosen["speedup_p1_p50"], **style | {"linestyle": "", "markerfacecolor": face})
    if style["linestyle"]:
        low, high = rows["speedup_p1_p10"], rows["speedup_p1_p90"]
        axes.fill_between(rows["tokens"], low, high, color=style["color"], alpha=0.2, linewidth=0)
