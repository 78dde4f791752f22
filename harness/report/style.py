"""What all plots share: a unit of error, one colour a plan (the hue says its kind, the shade which it is), how a figure
is written."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
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


def save(figure: Figure, path: Path, label: str) -> Path:
    """Writes the figure as PNG, with a small line at its foot on what was measured where."""
    figure.text(0.005, 0.005, label, fontsize=7, color=GREY)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
