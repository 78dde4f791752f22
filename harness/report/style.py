"""What all plots share: a unit of error, one colour a plan (the hue says its kind, the shade which it is), how a figure
is written."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from castpoint.variants.catalogue import PLANS

# The relative rms error of one rounding to bf16, 1.66e-3, of values as likely in every part of a binade's logarithm.
ROUNDING = 2**-7 / math.sqrt(32 * math.log(2))
RC = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}

# Okabe and Ito's colours, told apart by every common kind of colour vision.
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#666666"

# Kind: its shades, handed out in the order of the catalogue; where plans outnumber them they start again.
KINDS = {
    "Hugging Face's order": (BLUE,),
    "bf16 operands": (ORANGE, "#7A5300", "#B87A00", "#C9A400", "#9C8A5A"),
    "fp32 or tf32 operands": ("#5E9C2B", "#1B5E3B", "#2E9CA6", GREEN),
    "roundings that engines removed": ("#C2455E", "#8C2D04", RED),
    "Gemma's 1 + w": (PURPLE, "#7B3F6E"),
}


def kind(plan: str) -> str:
    """The entry of KINDS a plan of the catalogue belongs to."""
    if plan == "hf":
        return "Hugging Face's order"
    if plan in ("rstd-rounded", "bf16-statistics", "truncating"):
        return "roundings that engines removed"
    if plan.startswith("gemma"):
        return "Gemma's 1 + w"
    return "bf16 operands" if PLANS[plan].plan.matmul == "bf16" else "fp32 or tf32 operands"


def colour(plan: str) -> str:
    """The colour of a plan of the catalogue, the same whichever other plans are drawn."""
    shades = KINDS[kind(plan)]
    alike = [name for name in PLANS if kind(name) == kind(plan)]
    return shades[alike.index(plan) % len(shades)]


def panels(
    shape: Sequence[int], size: Sequence[float], edges: Sequence[float], title: str, wspace: float = 0.1, **more: Any
) -> Any:
    """A figure with a title at its top left, and its axes. shape: lines and columns. size: width and height, inches.
    edges: where axes begin and end, parts of the width; margins below and above, inches. more: for plt.subplots."""
    (left, right, below, above), height = edges, size[1]
    grid = {"left": left, "right": right, "bottom": below / height, "top": 1 - above / height}
    grid |= {"wspace": wspace, "hspace": 0.3}
    figure, axes = plt.subplots(*shape, figsize=size, gridspec_kw=grid, **more)
    figure.suptitle(title, x=0.01, y=1 - 0.1 / height, ha="left", va="top")
    return figure, axes


def save(figure: Figure, path: Path, label: str) -> Path:
    """Writes the figure as PNG, with a small line at its foot on what was measured where; two on a narrow figure."""
    lines = textwrap.wrap(label, int(16 * figure.get_figwidth()), max_lines=2, placeholder=" …")  # letters an inch
    figure.text(0.005, 0.005, "\n".join(lines), fontsize=7, color=GREY)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def label_ends(axes: Axes, x: float, ends: dict[str, float], shade: Callable[[str], str], within: float = 0) -> None:
    """Names in the right margin of lines that end at x, spread so that none covers another, each tied to its end by a
    thin line. Lines that end within that part of a neighbour share a label: none could point at one of them."""
    bundles: list[list[str]] = []
    for name in sorted(ends, key=ends.__getitem__):  # the lowest first
        if bundles and ends[name] <= (1 + within) * ends[bundles[-1][-1]]:
            bundles[-1].append(name)
        else:
            bundles.append([name])
    axes.figure.canvas.draw()
    to_axes = axes.transData + axes.transAxes.inverted()
    points = to_axes.transform([(x, np.mean([ends[name] for name in bundle])) for bundle in bundles])
    labels = [_label(bundle, ends, within) for bundle in bundles]
    line = 13 / (axes.get_window_extent().height * 72 / axes.figure.dpi)  # of text, as a part of the axes
    half = np.array([line * (label.count("\n") + 1) / 2 for label in labels])
    places = points[:, 1].copy()
    for _ in range(300):  # push neighbours apart until every gap fits their lines of text, within the axes
        for i in range(len(places) - 1):
            overlap = max(0, half[i] + half[i + 1] - (places[i + 1] - places[i]))
            places[i : i + 2] += -overlap / 2, overlap / 2
        places = places.clip(half - 0.03, 1 - half)
    for place, label, bundle, (end, height) in zip(places, labels, bundles, points, strict=True):
        look = {"transform": axes.transAxes, "color": shade(bundle[0]) if len(bundle) == 1 else "black"}
        axes.plot([end, 1.02], [height, place], linewidth=0.5, alpha=0.6, clip_on=False, **look)
        axes.text(1.025, place, label, fontsize=9, va="center", **look)


def _label(bundle: list[str], ends: dict[str, float], within: float) -> str:
    names = textwrap.fill((", " if within else " = ").join(bundle), 34, break_on_hyphens=False)
    if not within or len(bundle) == 1:
        return names
    return f"{len(bundle)} lines end within {ends[bundle[-1]] / ends[bundle[0]] - 1:.0%}:\n{names}"
