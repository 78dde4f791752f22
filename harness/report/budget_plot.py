"""The error budget as a plot: for every plan, which rounding makes how much of its squared error."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from castpoint.harness.report.budget import LABELS, OUT, mean_shares, root_totals
from castpoint.harness.report.style import GREY, panels
from castpoint.harness.report.style import colour as colour_of
from castpoint.harness.runs.words import FP32, MEASURES

# Tol's light colours for roundings, so that none is taken for a plan's; grey for the store, which every plan with bf16
# outputs has. Hatched: the rarer rounding of two at the same step (operand: hidden, folded weight, tf32; weights and
# residual; the mean of squares).
PINK, OLIVE, YELLOW, ORANGE, BLUE, CYAN, MINT = "#FFAABB #AAAA00 #EEDD88 #EE8866 #77AADD #99DDFF #44BB99".split()
STYLES = {
    "x": (PINK, "//"),
    "weight_offset": (PINK, ""),
    "statistics": (OLIVE, "//"),
    "variance": (OLIVE, ""),
    "rstd": ("#BBCC33", ""),
    "normed": (YELLOW, ""),
    "hidden": (ORANGE, ""),
    "scale": (ORANGE, "//"),
    "matmul": (ORANGE, "xx"),
    "proj": (BLUE, ""),
    "head_rstd": (CYAN, ""),
    "head_normed": (MINT, ""),
    "out": ("#DDDDDD", ""),
}
VISIBLE = 0.003  # of a bar: about one pixel


def budget_bars(frame: pd.DataFrame) -> Figure | None:
    """Two panels of stacked bars, K and logits, from the rows of accuracy.budget; None where there are none.

    One bar a plan, in falling order of K's error; parts below zero to the left of zero.
    """
    shares = {measure: mean_shares(frame, measure) for measure in MEASURES}
    plans = list(shares[MEASURES[0]].index)[::-1]
    if not plans:
        return None
    height = 0.36 * len(plans) + 2.1  # inches: the bars, 0.85 above and 1.25 below
    title = "Which rounding makes a plan's error: Shapley shares of the squared error against float64"
    figure, axes = panels((1, 2), (13, height), (0.115, 0.955, 1.25, 0.85), title, sharey=True, wspace=0.16)
    for panel, (measure, name) in zip(axes, zip(MEASURES, ("K", "attention logits"), strict=True), strict=True):
        _bars(panel, shares[measure].reindex(plans))
        _totals(panel, root_totals(frame, measure).reindex(plans), "relative rms" if measure == MEASURES[0] else "rms")
        panel.set_title(name, loc="left", fontsize=11)
    axes[0].set_yticks(range(len(plans)), plans)
    for tick, plan in zip(axes[0].get_yticklabels(), plans, strict=True):
        tick.set_color(colour_of(plan))
    largest = pd.concat(shares).abs().max()
    drawn = [player for player in largest.index if largest[player] > VISIBLE]
    names = LABELS | OUT
    looks = {names.get(player, player): STYLES[player] for player in drawn}
    handles = [Patch(facecolor=shade, hatch=h, edgecolor="white", label=name) for name, (shade, h) in looks.items()]
    figure.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.535, 0.45 / height), ncol=len(handles),
                  fontsize=8, frameon=False, handlelength=1.2, columnspacing=1.2)  # fmt: skip
    return figure


def _bars(axes: Axes, shares: pd.DataFrame) -> None:
    for place, (_, row) in enumerate(shares.iterrows()):
        left = right = 0.0
        for player, share in row.drop(FP32).dropna().items():  # fp32 arithmetic makes 1e-8 of a bar
            start = right if share > 0 else left + share
            left, right = (left, right + share) if share > 0 else (start, right)
            colour, hatch = STYLES[player]
            axes.barh(place, abs(share), 0.8, start, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5)
            texts = (f"{LABELS.get(player, player)} {share:.0%}", f"{share:.0%}", "")
            text = next(t for t in texts if len(t) <= 70 * abs(share))  # so many characters fill a bar
            box = {"facecolor": colour, "edgecolor": "none", "pad": 1} if hatch and text else None
            axes.text(start + abs(share) / 2, place, text, ha="center", va="center", fontsize=7, bbox=box)
    low, high = shares.clip(upper=0).sum(axis=1).min(), shares.clip(lower=0).sum(axis=1).max()
    axes.set(xlim=(low, max(1, high)), xlabel="share of the plan's squared error")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.tick_params(axis="y", length=0)


def _totals(axes: Axes, totals: pd.Series, heading: str) -> None:
    """The whole error in the right margin."""
    style = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 8}
    axes.text(1.01, len(totals) - 0.3, heading, color=GREY, **style)
    for place, total in enumerate(totals):
        axes.text(1.01, place, f"{total:.2g}", **style)
