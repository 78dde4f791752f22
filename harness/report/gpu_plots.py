"""GPU times as plots, each drawn from the records of one run: PNG and SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from castpoint.harness.problems import grid
from castpoint.harness.report.gpu_rows import (
    DEFERRED,
    EXACT,
    FOLDED,
    GROUPS,
    LOSS,
    NOISE,
    P1,
    P2,
    P4,
    WIN,
    Run,
    fused,
    run_of,
)
from castpoint.harness.report.plots import BLUE, GREEN, GREY, ORANGE, RED, _plain_ticks, colour
from castpoint.harness.runs.frames import latest, over_layers
from castpoint.harness.runs.schema import Kind
from castpoint.variants.catalogue import PLANS

# Colour, line and marker of what is compared, from wide to narrow, so that lines on top of one another stay in sight.
STYLES: dict[str, dict[str, Any]] = {
    EXACT: {"color": BLUE, "linestyle": "-", "linewidth": 2.6, "marker": "o", "markersize": 6},
    DEFERRED: {"color": ORANGE, "linestyle": "--", "linewidth": 1.4, "marker": "s", "markersize": 3.5},
    FOLDED: {"color": GREEN, "linestyle": ":", "linewidth": 1.4, "marker": "^", "markersize": 3.5},
    P2: {"color": RED, "linestyle": "", "marker": "x", "markersize": 5},
}
OURS = {"color": BLUE, "linestyle": "-", "linewidth": 1.6, "marker": "o", "markersize": 4.5}
RATIOS = (0.1, 0.2, 0.5, 0.7, 0.8, 0.9, 1, 1.2, 1.5, 2, 3, 5)  # ticks of speed-ups
LIMITS = {P1: {"color": "black", "linestyle": "--"}, P4: {"color": GREY, "linestyle": ":"}}
ERROR_MODEL = "qwen3-0.6b"
ERROR_TOKENS = {1: ("black", "o"), 256: ("#777777", "s"), 4096: ("#bbbbbb", "^")}
NAMES = {P1: "P1, best separate chain", P2: "P2, torch.compile", P4: "P4, bare matmul"}


def draw(folder: Path, run_id: str) -> list[Path]:
    """Draws every plot the run has data for into folder/plots, as PNG and SVG; returns the PNGs."""
    run = run_of(folder, run_id)
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "castpoint"}
    drawn = []
    (folder / "plots").mkdir(exist_ok=True)
    with plt.rc_context(style):
        errors = latest(folder, "errors")
        figures = {
            "gpu_speedup": speedups(run),
            "gpu_roofline": rooflines(run),
            "gpu_speed_error": speed_error(run, errors[1] if errors else None),
        }
        for name, figure in figures.items():
            if figure is None:
                continue
            figure.text(0.005, 0.005, _label(run), fontsize=7, color=GREY)
            for suffix, options in (("png", {"dpi": 110}), ("svg", {"metadata": {"Date": None}})):
                figure.savefig(folder / "plots" / f"{name}.{suffix}", **options)
            plt.close(figure)
            drawn.append(folder / "plots" / f"{name}.png")
    return drawn


def _label(run: Run) -> str:
    e = run.facts["environment"]
    versions = ", ".join(f"{name} {e['versions'][name]}" for name in ("torch", "triton") if e["versions"].get(name))
    return f"{run.gpu}; {versions}; commit {e['commit']}, run {run.run_id}; cold weights, CUDA graphs"


def cold(run: Run, model: str, what: str) -> pd.DataFrame:
    """Best rows of that kind over tokens, weights from memory."""
    best = run.best
    rows = best[(best["model"] == model) & (best["what"] == what) & (best["regime"] == grid.COLD)]
    return rows[rows["cold"]].sort_values("tokens")


def judged(rows: pd.DataFrame) -> pd.DataFrame:
    """Those whose speed-up counts."""
    return rows[rows["verdict"].isin([WIN, LOSS, NOISE])]


# ---------------------------------------------------------------- speed-up


def speedups(run: Run) -> Figure | None:
    """Speed-up over the best separate chain over tokens, one panel a model."""
    if not len(judged(run.counted())):
        return None
    figure, panels = _panels("Speed-up over the best separate chain (P1), cold weights; above the line we are faster")
    for axes, model in zip(panels, grid.MODELS, strict=True):
        axes.axhline(1, color="black", linewidth=1)
        for what, style in STYLES.items():
            rows = judged(cold(run, model, what))
            _line(axes, rows, rows["speedup_p1_p50"], style)
            if what != P2:
                low, high = rows["speedup_p1_p10"], rows["speedup_p1_p90"]
                axes.fill_between(rows["tokens"], low, high, color=style["color"], alpha=0.2, linewidth=0)
        noise = judged(run.counted()[lambda rows, model=model: rows["model"] == model]).drop_duplicates("tokens")
        noise = noise.sort_values("tokens")
        axes.fill_between(noise["tokens"], noise["noise_p10"].clip(upper=1), noise["noise_p90"].clip(lower=1),
                          color=GREY, alpha=0.35, linewidth=0)  # fmt: skip
        if not len(noise):
            _empty(axes)
    panels[0].set_yscale("log")
    panels[0].set_yticks(RATIOS, [f"{ratio:g}" for ratio in RATIOS])
    panels[0].minorticks_off()
    _keep_within(panels[0], [y for axes in panels for line in axes.lines for y in line.get_ydata()])
    for axes in panels[::4]:
        axes.set_ylabel("P1's time / this time")
    handles = [Line2D([], [], label=NAMES.get(what, f"ours, {what}"), **style) for what, style in STYLES.items()]
    handles += [Patch(color=GREY, alpha=0.35, label="noise (A/A)"), _hollow()]
    _legend(figure, handles)
    return figure


def rooflines(run: Run) -> Figure | None:
    """Share of the roofline over tokens, one panel a model: our fastest plan, P1 and P4, each of its own work."""
    if not len(run.counted()):
        return None
    figure, panels = _panels(
        "Share of the roofline, cold weights: our fastest plan, the separate chain, the matmul alone"
    )
    for axes, model in zip(panels, grid.MODELS, strict=True):
        ours = pd.concat([cold(run, model, group) for group in GROUPS])
        ours = ours.sort_values("p50_us", kind="stable").drop_duplicates("tokens").sort_values("tokens")
        for what, style in LIMITS.items():
            rows = cold(run, model, what)
            axes.plot(rows["tokens"], rows["roofline_share"], linewidth=1.3, **style)
        _line(axes, ours, ours["roofline_share"], OURS)
        if not len(ours):
            _empty(axes)
    panels[0].set_ylim(bottom=0)
    panels[0].yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    for axes in panels[::4]:
        axes.set_ylabel("share of the roofline")
    handles = [Line2D([], [], label="ours, the fastest plan", **OURS)]
    handles += [Line2D([], [], label=NAMES[what], **style) for what, style in LIMITS.items()]
    _legend(figure, [*handles, _hollow()])
    return figure


def _panels(title: str) -> tuple[Figure, list[Axes]]:
    """A panel a model of the grid, axes shared; tokens to the base of two."""
    columns = 4
    lines = -(-len(grid.MODELS) // columns)
    figure, panels = plt.subplots(lines, columns, figsize=(12, 2.9 * lines + 1), sharex=True, sharey=True)
    figure.subplots_adjust(left=0.06, right=0.985, bottom=0.18, top=0.9, hspace=0.2, wspace=0.08)
    figure.suptitle(title, x=0.005, y=0.985, ha="left")
    flat = list(panels.flat)
    for axes, model in zip(flat, grid.MODELS, strict=False):
        axes.set_title(model, loc="left", fontsize=10)
    flat[0].set_xscale("log", base=2)
    flat[0].set_xticks([1, 8, 64, 512, 4096], ["1", "8", "64", "512", "4096"])
    flat[0].set_xlim(0.8, 5200)
    for axes in flat[-columns:]:
        axes.set_xlabel("tokens")
    return figure, flat


def _keep_within(axes: Axes, values: list[float]) -> None:
    """Limits of a logarithmic axis from the values, since ticks that are set widen them."""
    axes.set_ylim(min(values) / 1.06, max(values) * 1.06)


def _line(axes: Axes, rows: pd.DataFrame, values: pd.Series, style: dict[str, Any]) -> None:
    """A line of medians; markers are hollow where norm, cuBLAS and head norm ran instead of a fused kernel."""
    axes.plot(rows["tokens"], values, **style | {"marker": ""})
    whole = np.array([row["kind"] != Kind.OWN or fused(row) for _, row in rows.iterrows()], dtype=bool)
    for chosen, face in ((whole, style["color"]), (~whole, "white")):
        if chosen.any():
            dots = style | {"linestyle": "", "markerfacecolor": face}
            axes.plot(rows["tokens"][chosen], values[chosen], **dots)


def _hollow() -> Line2D:
    return Line2D([], [], color=GREY, linestyle="", marker="o", markerfacecolor="white", label="hollow: not fused")


def _legend(figure: Figure, handles: list[Any]) -> None:
    figure.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 0.03), ncol=len(handles), frameon=False)


def _empty(axes: Axes) -> None:
    axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color=GREY)


# ---------------------------------------------------------------- time against error


def speed_error(run: Run, errors: pd.DataFrame | None) -> Figure | None:
    """Every plan's K error beside its time over P1's, at three numbers of tokens; None without errors.

    One row a plan: many plans take the same time to within 1 %, so that dots of time against error would hide one
    another. errors: rows of the errors table, of which those of the same model count.
    """
    if errors is None:
        return None
    error = over_layers(errors[errors["model"] == ERROR_MODEL], "truth", "rel_rms").sort_values(ascending=False)
    points = {tokens: _ratios(run, tokens, error) for tokens in ERROR_TOKENS}
    timed = {plan for rows in points.values() for plan in rows.index}
    if not timed:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 5.6), sharey=True, width_ratios=[2, 3])
    figure.subplots_adjust(left=0.17, right=0.97, bottom=0.2, top=0.86, wspace=0.06)
    figure.suptitle(f"What every plan's K is off by, and what it takes: {ERROR_MODEL}, cold weights", x=0.01, ha="left")
    places = {plan: place for place, plan in enumerate(error.index)}
    left.scatter(error, list(places.values()), c=[colour(plan) for plan in places], s=40, zorder=3)
    left.set_yticks(list(places.values()), list(places))
    left.set(xscale="log", xlabel="K relative rms error against float64, all layers", ylim=(-0.7, len(places) - 0.3))
    left.set_title("distance to the truth", loc="left", fontsize=10)
    for (tokens, rows), below in zip(points.items(), (-0.22, 0, 0.22), strict=True):  # side by side, in sight
        shade, marker = ERROR_TOKENS[tokens]
        name = "1 token" if tokens == 1 else f"{tokens} tokens"
        at = [places[plan] - below for plan in rows.index]
        spread = np.abs(rows[["p10", "p90"]].to_numpy().T - rows["p50"].to_numpy())
        right.errorbar(rows["p50"], at, xerr=spread, fmt=marker, color=shade, markersize=5, elinewidth=1, label=name)
    right.axvline(1, color="black", linewidth=1)
    right.set(xscale="log", xlabel="time over that of the best separate chain (P1)")
    right.set_title("time; left of the line: faster than P1", loc="left", fontsize=10)
    for axes in (left, right):
        _plain_ticks(axes.xaxis)
        axes.grid(axis="y", color="#eeeeee", zorder=0)
        axes.tick_params(axis="y", length=0)
    for plan in set(places) - timed:
        right.text(1, places[plan], " no time", fontsize=8, color=GREY, va="center")
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncol=len(points), frameon=False)
    return figure


def _ratios(run: Run, tokens: int, error: pd.Series) -> pd.DataFrame:
    """Plan -> p10, p50 and p90 of its time over P1's: of plans that have both a time and an error."""
    rows = judged(run.timed)
    rows = rows[(rows["model"] == ERROR_MODEL) & (rows["tokens"] == tokens) & (rows["regime"] == grid.COLD)]
    rows = rows[(rows["kind"] == Kind.OWN) & rows["cold"]].set_index("arm")
    rows = rows.loc[[plan for plan in PLANS if plan in rows.index and plan in error.index]]
    turned = {"p10": "p90", "p50": "p50", "p90": "p10"}  # 1 / a speed-up
    return pd.DataFrame({name: 1 / rows[f"speedup_p1_{of}"] for name, of in turned.items()})
