"""Plots of one run, each drawn from its records alone, plans named where they are drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib.axis
import matplotlib.pyplot as plt
import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D

from castpoint.harness.report import model
from castpoint.harness.report.budget_plot import budget_bars
from castpoint.harness.report.failures import note
from castpoint.harness.report.gpu_plots import speedups
from castpoint.harness.report.gpu_runs import newest
from castpoint.harness.report.markdown import percent
from castpoint.harness.report.model_plot import model_plots
from castpoint.harness.report.rope_positions import error_over_positions
from castpoint.harness.report.style import BLUE, GREY, KINDS, RC, ROUNDING, colour, kind, label_ends, panels, save
from castpoint.harness.runs.frames import Frames, best_backend, differing, latest, load, over_layers
from castpoint.harness.runs.records import load_runs
from castpoint.harness.runs.words import Backend
from castpoint.variants.catalogue import PLANS

BASELINES = {"eager": "--", "torch.compile": ":"}  # what is timed beside plans, and its line


def draw(folder: Path, run_id: str) -> list[Path]:
    """Draws every plot the run has data for, the newest error budget, RoPE over positions, GPU times and models into
    folder/plots; returns the PNGs."""
    runs, frames = load_runs(folder), load(folder, run_id)
    plots: dict[str, Callable[[Frames], Figure | None]] = {
        "plans": error_per_plan,
        "layers": error_per_layer,
        "gain": gain_per_channel,
        "ulps": ulp_histogram,
        "time": time_against_tokens,
    }
    (folder / "plots").mkdir(exist_ok=True)
    with plt.rc_context(RC):
        figures = {name: (plot(frames), run_id) for name, plot in plots.items()}
        if budget := latest(folder, "budget"):
            figures["budget"] = (budget_bars(budget[1]), budget[0])
        if turned := latest(folder, "rope_positions"):
            figures["rope_positions"] = (error_over_positions(turned[1]), turned[0])
        if timed := newest(folder):
            figures["gpu_speedup"] = (speedups(timed), timed.run_id)
        for study in model.studies(folder):
            for name, plot in model_plots(study.frames).items():
                figures[f"model-{study.model}-{name}"] = (plot, study.run_id)
        return [
            save(figure, folder / "plots" / f"{name}.png", _label(runs[of_run], name) + note(folder, of_run))
            for name, (figure, of_run) in figures.items()
            if figure is not None
        ]


def _label(run: dict, name: str) -> str:
    """Model, weights, number of tokens (where the plot does not say it), machine, of the plot of that name."""
    s, e = run["settings"], run["environment"]
    where = f"{e['gpu']['name'] if 'gpu' in e else e['processor']}; torch {e['versions']['torch']}"
    if name == "gpu_speedup":
        return f"cold weights, CUDA graphs; {where}, triton {e['versions']['triton']}"
    drawn = "calibrated weights, not the checkpoint" if s["model"] == "qwen3-0.6b" else "random weights"
    weights = s.get("weights") or s.get("checkpoint") or drawn
    more = " and 32 that eager wrote" if s.get("command") == "model" else ""
    count = "" if name in ("time", "rope_positions") else f"{s['tokens']} tokens{more}; "
    return f"{s['model']}, {weights}; {count}{where}"


def error_per_plan(frames: Frames) -> Figure | None:
    """Distance to the truth and distance to eager, and what eager changes in itself."""
    errors = frames["errors"]
    truth = over_layers(errors, "truth", "rel_rms").sort_values(ascending=False) / ROUNDING
    if not len(truth):
        return None
    eager = 1 - over_layers(errors, "eager", "share_equal")
    rows = errors.query("output == 'k' and reference == 'truth' and backend == 'spec'")
    low, high = (rows.groupby("plan")["rel_rms"].agg(end) / ROUNDING for end in ("min", "max"))
    height = 0.29 * len(truth) + 2  # inches: a row a plan, 1.15 above and 0.85 below
    title = "Every plan's K at two distances: from float64, and from the PyTorch bf16 path"
    edges = (0.17, 0.97, 0.85, 1.15)
    figure, (left, right) = panels((1, 2), (10, height), edges, title, sharey=True, width_ratios=[3, 2])
    for place, plan in enumerate(truth.index):
        left.plot([low[plan], high[plan]], [place, place], color=colour(plan), linewidth=1.5, alpha=0.5)
        left.scatter(truth[plan], place, color=colour(plan), s=40, zorder=3)
        right.scatter(eager[plan] * 100, place, color=colour(plan), s=40, zorder=3, clip_on=False)
        right.annotate(f"{eager[plan] * 100:.2g} %", (eager[plan] * 100, place), (7, 0), textcoords="offset points",
                       va="center", fontsize=8, color=GREY)  # fmt: skip
    left.axvline(1, color=GREY, linestyle="--", linewidth=1)
    left.text(1, 1, " one rounding, at the store", fontsize=8, color=GREY, va="bottom",
              transform=left.get_xaxis_transform())  # fmt: skip
    unit = "in units of one rounding to bf16,\nrelative rms (dot: all layers; bar: smallest to largest layer)"
    left.set(yticks=range(len(truth)), yticklabels=truth.index, ylim=(-0.6, len(truth) - 0.4), xlim=(0, None))
    left.set_xlabel(f"K's error against float64 {unit}")
    noise = differing(frames["eager"], Backend.EAGER_BATCH_OF_1)
    floor = f"\n(eager token by token: {percent(*noise, 2)})" if noise else ""
    right.set(xlim=(0, 100), xlabel=f"K elements that differ from eager bf16{floor}")
    right.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    for axes, words in ((left, "the truth"), (right, "the PyTorch bf16 path")):
        axes.tick_params(axis="y", length=0)
        axes.set_title(f"distance to {words}", loc="left", pad=14)
    _kinds(figure, list(truth.index), 1 - 0.42 / height)
    return figure


def _kinds(figure: Figure, plans: list[str], top: float) -> None:
    """A legend of the colours in one line: every kind with the shades of these plans."""
    dots: dict[str, tuple[Line2D, ...]] = dict.fromkeys(KINDS, ())
    for plan in plans:
        dots[kind(plan)] += (Line2D([], [], color=colour(plan), marker="o", linestyle=""),)
    present = {name: shades for name, shades in dots.items() if shades}
    figure.legend(present.values(), present, handler_map={tuple: HandlerTuple(None, pad=-0.3)}, loc="upper left",
                  bbox_to_anchor=(0.0, top), ncol=len(present), fontsize=9, frameon=False, handletextpad=0.6,
                  columnspacing=1.8)  # fmt: skip


def error_per_layer(frames: Frames) -> Figure | None:
    """K's error in every layer, absolute and relative, above the layer's largest K-norm weight."""
    amplified = frames["amplification"]
    if not len(amplified):
        return None
    plans = [p for p in ("truncating", "hf", "bf16-operand", "fp32") if p in set(amplified["plan"])]
    title = "K's error per layer: absolute (top), relative to the head (middle); K-norm weight (bottom)"
    figure, axes = panels((3, 1), (9, 7.6), (0.11, 0.82, 0.7, 0.55), title, sharex=True, height_ratios=[3, 3, 2])
    weights = amplified.groupby("layer")["k_norm_max"].first()
    axes[2].bar(weights.index, weights, color=GREY, width=0.7)
    for layer in weights.nlargest(3).index:
        axes[2].text(layer, weights[layer], f"{weights[layer]:g}", ha="center", va="bottom", fontsize=8)
    axes[2].set(xlabel="layer", ylabel="largest K-norm\nweight")
    axes[2].xaxis.get_major_locator().set_params(integer=True)
    shown = {"k_max_abs_after": "max |error| of K", "k_rel_rms_after": "relative rms error of K"}
    for panel, (column, label) in zip(axes, shown.items(), strict=False):
        ends = {}
        for plan in plans:
            rows = amplified[amplified["plan"] == plan].sort_values("layer")
            panel.plot(rows["layer"], rows[column], color=colour(plan), marker="o", markersize=3, linewidth=1.3)
            ends[plan] = rows[column].iloc[-1]
        panel.set(yscale="log", ylabel=label)
        _plain_ticks(panel.yaxis)
        label_ends(panel, amplified["layer"].max(), ends, colour)
    return figure


def gain_per_channel(frames: Frames) -> Figure | None:
    """Measured gain of every K channel against |w| / rms(k)."""
    channels = frames["channels"]
    if not len(channels):
        return None
    title = f"Gain of every K channel through the K norm\n(layer {channels['layer'].iloc[0]:.0f}, plan hf)"
    figure, axes = panels((1, 1), (6.6, 6), (0.11, 0.97, 0.78, 0.78), title)
    x, y = channels["gain_predicted"].to_numpy(), channels["gain_measured"].to_numpy()
    ends = np.array([min(x.min(), y.min()) * 0.8, max(x.max(), y.max()) * 1.25])
    axes.plot(ends, ends, color=GREY, linewidth=1)
    axes.text(0.55, 0.45, "line: measured = predicted", fontsize=8, color=GREY, transform=axes.transAxes)
    axes.scatter(x, y, color=BLUE, s=18, zorder=3)
    for row in channels.nlargest(1, "gain_predicted").itertuples():
        axes.annotate(f"channel {row.channel}\nweight {row.k_norm_weight:g}", (row.gain_predicted, row.gain_measured),
                      textcoords="offset points", xytext=(-8, 2), ha="right", fontsize=8)  # fmt: skip
    axes.set(xscale="log", yscale="log", aspect="equal", xlabel="predicted gain |w| / rms(k) of a K channel")
    axes.set_ylabel("measured gain: K error after the norm / before")
    return figure


def ulp_histogram(frames: Frames) -> Figure | None:
    """Share of K elements by their error in bf16 ulps, one small panel a plan."""
    ulps = frames["ulps"]
    plans = [name for name in PLANS if name in set(ulps["plan"])]
    if not plans:
        return None
    columns = min(5, len(plans))
    lines = -(-len(plans) // columns)
    width, height = max(7.5, 2.3 * columns + 0.4), 1.8 * lines + 1.5  # inches
    title = "K's error against float64 in bf16 ulps, first layer; left of the line: correctly rounded"
    edges = (0.8 / width, 0.99, 0.8, 0.85)  # 0.8 inches beside and below, 0.85 above
    figure, grid = panels((lines, columns), (width, height), edges, title, sharex=True, sharey=True, squeeze=False)
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
        axes.set_ylabel("share of K [%]")
    for axes in grid[-1]:
        axes.set(xlabel="|error| [bf16 ulp]", xticks=[0, 1, 2, 3, 4.125], xticklabels=["0", "1", "2", "3", ">4"])
    return figure


def time_against_tokens(frames: Frames) -> Figure | None:
    """Time of a call over the number of tokens, one line a plan, eager and torch.compile among them."""
    speed = frames["speed"].query("status == 'ok'")
    if not len(speed):
        return None
    backend = best_backend(speed)
    timed = "CPU time through Inductor" if backend == "inductor" else "Triton's time"
    title = f"{timed} over tokens; eager dashed, torch.compile dotted"
    figure, axes = panels((1, 1), (9.5, 5.6), (0.11, 0.68, 0.73, 0.5), title)
    ends = {}
    for (plan, ran), rows in speed[speed["backend"].isin([backend, *BASELINES])].groupby(["plan", "backend"]):
        rows = rows.sort_values("tokens")
        shade, style = ("black", BASELINES[ran]) if ran in BASELINES else (colour(plan), "-")
        ms = rows["p50_us"] / 1e3
        axes.plot(rows["tokens"], ms, color=shade, linestyle=style, marker="o", markersize=3, linewidth=1.2)
        ends[ran if ran in BASELINES else plan] = ms.iloc[-1]
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="time of one layer's call, median [ms]")
    tokens = sorted(speed["tokens"].unique())
    axes.set_xticks(tokens, [f"{t:g}" for t in tokens])
    axes.minorticks_off()
    _plain_ticks(axes.yaxis)
    label_ends(axes, max(tokens), ends, lambda name: "black" if name in BASELINES else colour(name), within=0.04)
    return figure


def _plain_ticks(axis: matplotlib.axis.Axis) -> None:
    """Ticks at 1, 2, 3, 5, 7 in plain numbers: logarithmic axes of less than a decade are unreadable otherwise."""
    axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 3, 5, 7)))
    axis.set_major_formatter(lambda value, _: f"{value:g}" if value >= 1e-3 else f"{value:.0e}".replace("e-0", "e-"))
    axis.set_minor_formatter(matplotlib.ticker.NullFormatter())
