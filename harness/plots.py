"""Plots of one run, each drawn from its records alone: PNG and SVG, plans named where they are drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness import impact_report
from harness.budget_plot import budget_bars
from harness.frames import Frames, best_backend, latest, load, noise_floor, over_layers, own
from harness.impact_plot import model_plots
from harness.records import load_runs
from variants.catalogue import PLANS

# Okabe and Ito's colours, told apart by every common kind of colour vision. One colour a kind of plan.
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#666666"
ONE_ROUNDING = 1.66e-3  # rms relative error of one rounding to bf16 of values spread evenly over a binade


def colour(plan: str) -> str:
    """Blue: as Hugging Face. Green: fp32 operands. Red: roundings that engines removed as bugs. Purple: Gemma's."""
    if plan in ("hf",):
        return BLUE
    if plan in ("rstd-rounded", "bf16-statistics", "truncating"):
        return RED
    if plan.startswith("gemma"):
        return PURPLE
    return GREEN if PLANS[plan].plan.matmul != "bf16" else ORANGE


def draw(folder: Path, run_id: str) -> list[Path]:
    """Draws every plot the run has data for, and the newest error budget, into folder/plots; returns the PNGs."""
    runs, frames = load_runs(folder), load(folder, run_id)
    plots: dict[str, Callable[[Frames], Figure | None]] = {
        "pareto": pareto,
        "plans": error_per_plan,
        "layers": error_per_layer,
        "gain": gain_per_channel,
        "ulps": ulp_histogram,
        "time": time_against_tokens,
    }
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "castpoint"}
    drawn = []
    (folder / "plots").mkdir(exist_ok=True)
    with plt.rc_context(style):
        figures = {name: (plot(frames), run_id) for name, plot in plots.items()}
        budget = latest(folder, "budget")
        if budget is not None:
            figures["budget"] = (budget_bars(budget[1]), budget[0])
        for study in impact_report.studies(folder):
            for name, plot in model_plots(study.frames).items():
                figures[f"model-{study.model}-{name}"] = (plot, study.run_id)
        for name, (figure, of_run) in figures.items():
            if figure is None:
                continue
            figure.text(0.005, 0.005, _label(runs[of_run]), fontsize=7, color=GREY)
            for suffix, options in (("png", {"dpi": 110}), ("svg", {"metadata": {"Date": None}})):
                figure.savefig(folder / "plots" / f"{name}.{suffix}", **options)
            plt.close(figure)
            drawn.append(folder / "plots" / f"{name}.png")
    return drawn


def _label(run: dict) -> str:
    s, e = run["settings"], run["environment"]
    drawn = "calibrated weights, not the checkpoint" if s["model"] == "qwen3-0.6b" else "random weights"
    weights = s.get("weights") or s.get("checkpoint") or drawn
    where = e["gpu"]["name"] if "gpu" in e else e["processor"]
    more = " and 32 that eager wrote" if s.get("command") == "model" else ""
    return f"{s['model']}, {weights}; {s['tokens']} tokens{more}; {where}; torch {e['versions']['torch']}"


def pareto(frames: Frames) -> Figure | None:
    """Time against K's error, one point a plan; lower left is better."""
    speed = frames["speed"]
    speed = speed[speed["status"] == "ok"]
    if not len(speed):
        return None
    tokens, backend = int(speed["tokens"].max()), best_backend(speed)
    times = speed[(speed["tokens"] == tokens) & (speed["backend"] == backend)].set_index("plan")
    error = over_layers(frames["errors"], "truth", "rel_rms")
    plans = [name for name in PLANS if name in times.index and name in error.index]
    figure, axes = _figure(9, 5.4, right=0.74)
    x, y = error[plans].to_numpy(), times.loc[plans, "p50_us"].to_numpy() / 1e3
    spread = times.loc[plans, ["p10_us", "p90_us"]].to_numpy().T / 1e3
    axes.errorbar(x, y, yerr=np.abs(spread - y), fmt="none", ecolor="#bbbbbb", elinewidth=1)
    axes.scatter(x, y, c=[colour(p) for p in plans], s=45, zorder=3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain_ticks(axes.yaxis)
    _plain_ticks(axes.xaxis)
    for name, style in (("eager", "--"), ("torch.compile", ":")):
        rows = speed[(speed["tokens"] == tokens) & (speed["backend"] == name)]
        if len(rows):
            axes.axhline(rows["p50_us"].iloc[0] / 1e3, color=GREY, linestyle=style, linewidth=1)
            axes.text(x.min(), rows["p50_us"].iloc[0] / 1e3, f"{name} ", fontsize=8, color=GREY,
                      va="bottom" if name == "eager" else "top")  # fmt: skip
    _margin_labels(axes, x, y, plans)
    axes.set_xlabel("K error against float64: relative rms, all layers")
    axes.set_ylabel(f"time of one layer's call at {tokens} tokens [ms]")
    axes.set_title(f"Cost and gain of every cast plan ({_ran(backend)}); lower left is better", loc="left")
    return figure


def error_per_plan(frames: Frames) -> Figure | None:
    """Distance to the truth and distance to eager, with the noise floor of each."""
    errors = frames["errors"]
    truth = over_layers(errors, "truth", "rel_rms").sort_values(ascending=False)
    if not len(truth):
        return None
    eager = 1 - over_layers(errors, "eager", "share_equal")
    rows = own(errors)
    rows = rows[(rows["output"] == "k") & (rows["reference"] == "truth") & (rows["backend"] == "spec")]
    low, high = (rows.groupby("plan")["rel_rms"].agg(kind) for kind in ("min", "max"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 5.6), sharey=True)
    figure.subplots_adjust(left=0.17, right=0.97, bottom=0.15, top=0.86, wspace=0.08)
    for place, plan in enumerate(truth.index):
        left.plot([low[plan], high[plan]], [place, place], color=colour(plan), linewidth=1.5, alpha=0.5)
        left.scatter(truth[plan], place, color=colour(plan), s=40, zorder=3)
        right.scatter(max(eager[plan], 1e-6) * 100, place, color=colour(plan), s=40, zorder=3)
    left.set_yticks(range(len(truth)), truth.index)
    left.axvline(ONE_ROUNDING, color=GREY, linestyle="--", linewidth=1)
    left.text(ONE_ROUNDING * 1.01, len(truth) - 0.4, "one rounding to bf16", fontsize=8, color=GREY)
    left.set_xscale("log")
    _plain_ticks(left.xaxis)
    left.set_xlabel("K relative rms error against float64\n(dot: all layers; bar: smallest to largest layer)")
    left.set_title("distance to the truth", loc="left")
    noise = noise_floor(errors)
    if noise is not None:
        at = max(noise * 100, 1e-4)
        right.axvline(at, color=GREY, linestyle="--", linewidth=1)
        note = "eager against itself,\none token at a time"
        right.text(at * 1.15, len(truth) - 0.4, note, fontsize=8, color=GREY, va="top")
    right.set_xscale("log")
    right.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    right.set_xlabel("K elements that differ from eager bf16 [share]")
    right.set_title("distance to the PyTorch bf16 path", loc="left")
    figure.suptitle("Every plan's K at two distances: from float64, and from the PyTorch bf16 path", x=0.01, ha="left")
    return figure


def error_per_layer(frames: Frames) -> Figure | None:
    """K's error in every layer, absolute and relative, above the layer's largest K-norm weight."""
    amplified = own(frames["amplification"])
    if not len(amplified):
        return None
    plans = [p for p in ("truncating", "hf", "bf16-operand", "fp32") if p in set(amplified["plan"])]
    figure, axes = plt.subplots(3, 1, figsize=(9, 7.6), sharex=True, height_ratios=[3, 3, 2])
    figure.subplots_adjust(left=0.11, right=0.85, bottom=0.09, top=0.93, hspace=0.28)
    panels = ((axes[0], "k_max_abs_after", "max |error| of K"), (axes[1], "k_rel_rms_after", "relative rms error of K"))
    for panel, column, label in panels:
        ends = []
        for plan in plans:
            rows = amplified[amplified["plan"] == plan].sort_values("layer")
            panel.plot(rows["layer"], rows[column], color=colour(plan), marker="o", markersize=3, linewidth=1.3)
            ends.append(rows[column].iloc[-1])
        panel.set_yscale("log")
        _plain_ticks(panel.yaxis)
        panel.set_ylabel(label)
        _margin_labels(panel, np.full(len(plans), amplified["layer"].max()), np.array(ends), plans)
    axes[0].set_title("K's error per layer, absolute (top) and relative to the head (middle)", loc="left")
    weights = amplified.groupby("layer")["k_norm_max"].first()
    axes[2].bar(weights.index, weights, color=GREY, width=0.7)
    for layer in weights.nlargest(3).index:
        axes[2].text(layer, weights[layer], f"{weights[layer]:g}", ha="center", va="bottom", fontsize=8)
    axes[2].set_ylabel("largest K-norm\nweight")
    axes[2].set_xlabel("layer")
    return figure


def gain_per_channel(frames: Frames) -> Figure | None:
    """Measured gain of every K channel against |w| / rms(k)."""
    channels = frames["channels"]
    if not len(channels):
        return None
    figure, axes = _figure(6.6, 6)
    x, y = channels["gain_predicted"].to_numpy(), channels["gain_measured"].to_numpy()
    ends = np.array([min(x.min(), y.min()) * 0.8, max(x.max(), y.max()) * 1.25])
    axes.plot(ends, ends, color=GREY, linewidth=1)
    axes.text(0.55, 0.45, "line: measured = predicted", fontsize=8, color=GREY, transform=axes.transAxes)
    axes.scatter(x, y, color=BLUE, s=18, zorder=3)
    for row in channels.nlargest(1, "gain_predicted").itertuples():
        axes.annotate(f"channel {row.channel}\nweight {row.k_norm_weight:g}", (row.gain_predicted, row.gain_measured),
                      textcoords="offset points", xytext=(-8, 2), ha="right", fontsize=8)  # fmt: skip
    axes.set(xscale="log", yscale="log", aspect="equal")
    axes.set_xlabel("predicted gain |w| / rms(k) of a K channel")
    axes.set_ylabel("measured gain: K error after the norm / before")
    axes.set_title(
        f"Gain of every K channel through the K norm\n(layer {int(channels['layer'].iloc[0])}, plan hf)", loc="left"
    )
    return figure


def ulp_histogram(frames: Frames) -> Figure | None:
    """Share of K elements by their error in bf16 ulps, one small panel a plan."""
    ulps = frames["ulps"]
    plans = [name for name in PLANS if name in set(ulps["plan"])]
    if not plans:
        return None
    columns = min(5, len(plans))
    lines = -(-len(plans) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(2.3 * columns + 0.4, 1.9 * lines + 1), sharex=True, sharey=True, squeeze=False
    )
    figure.subplots_adjust(left=0.07, right=0.99, bottom=0.13, top=0.86, hspace=0.38, wspace=0.1)
    for axes, plan in zip(grid.flat, plans, strict=False):
        rows = ulps[ulps["plan"] == plan].sort_values("ulp_from")
        axes.bar(rows["ulp_from"], rows["share"] * 100, width=0.25, align="edge", color=colour(plan))
        axes.axvline(0.5, color=GREY, linewidth=0.8, linestyle="--")
        axes.set_title(plan, fontsize=9, loc="left")
        beyond = rows[rows["ulp_from"] == 4]["share"].sum()
        axes.text(0.98, 0.5, f"over 4: {beyond:.1%}", fontsize=7, ha="right", color=GREY, transform=axes.transAxes)
    for axes in list(grid.flat)[len(plans) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("share [%]")
    for axes in grid[-1]:
        axes.set_xlabel("|error| [bf16 ulp]")
    figure.suptitle(
        "K's error against float64 in bf16 ulps, first layer; left of the line: correctly rounded", x=0.01, ha="left"
    )
    return figure


def time_against_tokens(frames: Frames) -> Figure | None:
    """Time of a call over the number of tokens, one line a plan, eager and torch.compile among them."""
    speed = frames["speed"]
    speed = speed[speed["status"] == "ok"]
    if not len(speed):
        return None
    backend = best_backend(speed)
    figure, axes = _figure(9, 6.2, right=0.74)
    names, ends = [], []
    for name, rows in speed[speed["backend"].isin([backend, "eager", "torch.compile"])].groupby(["plan", "backend"]):
        rows = rows.sort_values("tokens")
        baseline = name[1] != backend
        shade = "black" if baseline else colour(name[0])
        style = {"eager": "--", "torch.compile": ":"}.get(name[1], "-")
        axes.plot(
            rows["tokens"], rows["p50_us"] / 1e3, color=shade, linestyle=style, marker="o", markersize=3, linewidth=1.2
        )
        names.append(name[1] if baseline else name[0])
        ends.append(rows["p50_us"].iloc[-1] / 1e3)
    axes.set(xscale="log", yscale="log")
    tokens = sorted(speed["tokens"].unique())
    axes.set_xticks(tokens, [f"{t:g}" for t in tokens])
    axes.minorticks_off()
    _plain_ticks(axes.yaxis)
    colours = ["black" if n in ("eager", "torch.compile") else colour(n) for n in names]
    _margin_labels(axes, np.full(len(names), max(tokens)), np.array(ends), names, colours)
    axes.set_xlabel("tokens")
    axes.set_ylabel("time of one layer's call, median [ms]")
    axes.set_title(f"Time against tokens ({_ran(backend)}); eager and torch.compile in black", loc="left")
    return figure


def _ran(backend: str) -> str:
    return "PyTorch through Inductor" if backend == "inductor" else "Triton"


def _figure(width: float, height: float, right: float = 0.97) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(width, height))
    figure.subplots_adjust(left=0.11, right=right, bottom=0.13, top=0.9)
    return figure, axes


def _plain_ticks(axis: matplotlib.axis.Axis) -> None:
    """Ticks at 1, 2, 3, 5, 7 in plain numbers: logarithmic axes of less than a decade are unreadable otherwise."""
    axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 3, 5, 7)))
    axis.set_major_formatter(lambda value, _: f"{value:g}" if value >= 1e-3 else f"{value:.0e}".replace("e-0", "e-"))
    axis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def _margin_labels(
    axes: Axes, x: np.ndarray, y: np.ndarray, names: list[str], colours: list[str] | None = None
) -> None:
    """Names in the right margin, spread so that none covers another, each tied to its point by a thin line."""
    axes.figure.canvas.draw()
    to_axes = axes.transData + axes.transAxes.inverted()
    points = to_axes.transform(np.column_stack([x, y]))
    height = 13 / (axes.get_window_extent().height * 72 / axes.figure.dpi)
    order = np.argsort(points[:, 1])
    places = points[order, 1].copy()
    for _ in range(300):  # push neighbours apart until every gap fits a line of text, within the axes
        for i in range(len(places) - 1):
            overlap = height - (places[i + 1] - places[i])
            if overlap > 1e-6:
                places[i] -= overlap / 2
                places[i + 1] += overlap / 2
        places = places.clip(0.0, 0.97)
    for place, at in zip(places, order, strict=True):
        shade = (colours or [colour(n) for n in names])[at]
        axes.plot([points[at, 0], 1.02], [points[at, 1], place], transform=axes.transAxes, color=shade, linewidth=0.5,
                  alpha=0.6, clip_on=False)  # fmt: skip
        axes.text(1.025, place, names[at], transform=axes.transAxes, color=shade, fontsize=9, va="center")
