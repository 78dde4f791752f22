"""K's error over positions, with one boundary of RoPE's angles in bf16: words, a table and a plot, from the rows of
accuracy.rope_positions."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from castpoint.harness.report.markdown import markdown, paragraphs
from castpoint.harness.report.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, ROUNDING, label_ends, panels
from castpoint.harness.runs.words import NO_BOUNDARY
from castpoint.kernels.plan import PHASE_BOUNDARIES

LINES = {NO_BOUNDARY: BLUE, "inv_freq": RED, "position": ORANGE, "phase": PURPLE, "cos_sin": GREEN}
IN_FP32, TENTH = "all in fp32", 0.1


def errors(frame: pd.DataFrame, column: str = "k_vs_truth") -> pd.DataFrame:
    """Position x boundary: that column. Empty where nothing was measured."""
    rows = frame[frame["status"] == "ok"]
    table = rows.pivot_table(index="position", columns="boundary", values=column)
    return table.reindex(columns=[name for name in LINES if name in table.columns])


def section(frame: pd.DataFrame) -> str:
    """Of report.md; empty where not every boundary was measured."""
    found = errors(frame)
    if set(found) != set(LINES):
        return ""
    row = frame.iloc[0]
    table = found.rename(columns={name: f"{name} in bf16" for name in found} | {NO_BOUNDARY: IN_FP32})
    radians = errors(frame, "phase_max_error")
    table["largest phase error in fp32, rad"] = radians[NO_BOUNDARY]
    table["with inv_freq in bf16, rad"] = radians["inv_freq"]
    table = table.rename_axis("position").reset_index()
    table["position"] = table["position"].map("{:,.0f}".format)
    return paragraphs(
        "## RoPE's phase over positions",
        f"K's rms error against float64, relative to its head: layer {row['layer']}, {row['tokens']} tokens, all at "
        f"one position, K-norm weights near one, all but one boundary in fp32. {seen(found)}",
        markdown(table, right=["position"]),
        "![K's error over positions](plots/rope_positions.png)",
    )


def seen(found: pd.DataFrame) -> str:
    """The sentence that says what a reader should see."""
    last, turned = found.index.max(), found["cos_sin"][found.index > 0]
    first = {name: found.index[found[name] > TENTH].min() for name in PHASE_BOUNDARIES}
    said = [f"{at:,.0f} (`{name}`)" for name, at in first.items() if not pd.isna(at)]
    return (
        f"The error of `cos_sin` in bf16 does not grow with position ({turned.min():.2g} to {turned.max():.2g}), that "
        f"of what is made before it does: in bf16 K is first off by more than a tenth of its head at position "
        f"{', '.join(said) or 'none'}, all in fp32 by {found.loc[last, NO_BOUNDARY]:.1g} at {last:,}. Where bf16 holds "
        "a position (512; 4,000) it costs nothing."
    )


def error_over_positions(frame: pd.DataFrame) -> Figure | None:
    """One line a boundary; None where nothing was measured. Position 0, which a logarithmic axis has not, is left out:
    nothing turns there."""
    found = errors(frame)
    found = found[found.index > 0]
    if not len(found):
        return None
    row = frame.iloc[0]
    where = f"(layer {row['layer']}, {row['tokens']} tokens)"
    title = f"K's error over positions, one boundary of RoPE's angles in bf16\n{where}"
    figure, axes = panels((1, 1), (9, 5.4), (0.1, 0.76, 0.75, 0.75), title)
    for name in found:
        style = ":" if name == "position" else "-"  # bf16 holds some positions, and nothing is known between two
        axes.plot(found.index, found[name], style, color=LINES[name], marker="o", markersize=3.5, linewidth=1.4)
    axes.axhline(ROUNDING, color=GREY, linestyle="--", linewidth=0.9)
    words = {"fontsize": 8, "color": GREY, "va": "bottom", "ha": "right"}
    axes.text(found.index.max(), ROUNDING, "one rounding to bf16, at the store", **words)
    axes.set(xscale="log", yscale="log", xlabel="position of the token")
    axes.set_ylabel("K's rms error against float64, relative to its head")
    named = {IN_FP32 if name == NO_BOUNDARY else f"{name} in bf16": name for name in found}
    ends = {label: found[name].iloc[-1] for label, name in named.items()}
    label_ends(axes, found.index.max(), ends, lambda label: LINES[named[label]])
    return figure
