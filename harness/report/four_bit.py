"""Weights of few bits beside cast plans: K and attention logits of a layer, and a whole model in llama.cpp's own list."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes

from castpoint.harness.report import four_bit_arithmetic
from castpoint.harness.report.markdown import markdown, paragraphs
from castpoint.harness.report.style import GREY, ORANGE, RC, RED, ROUNDING, colour, panels, plt, save
from castpoint.harness.runs.frames import latest, load_table
from castpoint.variants.catalogue import PLANS

HEADING = "4-bit weights beside cast plans"
SHOWN = ("eager", "hf", "fp32", "Q8_0 of QKV", "Q4_0 of QKV", "Q4_0 of all matrices", "Q8_0 of QKV and norms")
GRID = (
    "In a layer all but the weights is float64 and every figure is of that layer alone; in a whole model quantised weights "
    "are computed with in float32, plans in bf16, both against the model in float32. Q4_K is only where a matrix has a multiple of 256 "
    "columns: llama.cpp stores another type elsewhere. **The real models' q and k come from a GGUF file, so they lie on a "
    "grid of 5 bits already**: quantised again they err otherwise than weights that no grid has touched, as the drawn ones."
)


def frames(folder: Path) -> tuple[str, pd.DataFrame, pd.DataFrame] | None:
    """run_id, layers and statistics of the newest run."""
    found = latest(folder, "four_bit")
    return found and (found[0], found[1], load_table(folder, found[0], "kl_statistics"))


def per_arm(layers: pd.DataFrame, column: str) -> pd.DataFrame:
    """Median of a figure over layers: a row an arm, a column a model."""
    rows = layers[layers["status"] == "ok"]
    drawn = rows["weights"].eq("calibrated").map({True: ", drawn", False: ""})
    rows = rows.assign(model=rows["model"] + drawn)
    return rows.groupby(["arm", "model"], sort=False)[column].median().unstack("model").reindex(rows["arm"].unique())


def statistic(rows: pd.DataFrame, what: str) -> pd.DataFrame:
    rows = rows[(rows["status"] == "ok") & (rows["statistic"] == what)]
    return rows.set_index(["arm", "model"])["value"].unstack("model").reindex(rows["arm"].unique())


def headline(folder: Path) -> str:
    """How many times as far as the worst plan 4-bit weights move K, and what a quantised norm does to a model."""
    found = frames(folder)
    if found is None:
        return ""
    k = per_arm(found[1], "k_rel_rms")
    worst = k[k.index.isin(PLANS)].max()
    kl = statistic(found[2], "Mean KLD")
    if "Q4_0" not in k.index or not {"Q4_0 of QKV", "Q8_0 of QKV and norms", "eager"} <= set(kl.index):
        return ""
    times = (k.loc["Q4_0"] / worst).dropna()
    said = "; ".join(
        f"in {model} the mean KL is {kl.at['Q4_0 of QKV', model]:.2g} nats with 4-bit QKV, "
        f"{kl.at['Q8_0 of QKV and norms', model]:.2g} with QKV and norms in 8 bits, {kl.at['eager', model]:.2g} in eager bf16"
        for model in kl.columns
    )
    return f"Q4_0 moves K {times.min():.0f} to {times.max():.0f} times as far as the worst cast plan; {said}."


def page(folder: Path) -> str:
    """Tables of layers and models, a picture, and llama.cpp's list."""
    found = frames(folder)
    if found is None:
        return ""
    run_id, layers, statistics = found
    with plt.rc_context(RC):
        _draw(folder, layers, statistics, run_id)
    k, logits = per_arm(layers, "k_rel_rms") / ROUNDING, per_arm(layers, "logit_rel_rms")
    table = k.add_prefix("K, roundings: ").join(logits.add_prefix("attention logits: ")).reset_index()
    lists = [
        f"## {model}, {rows['tokens'].max():.0f} tokens\n\nIn the words and by the definitions of `llama-perplexity "
        f"--kl-divergence`, against float32; ± a standard error.\n\n{_list(rows)}"
        for model, rows in statistics[statistics["status"] == "ok"].groupby("model", sort=False)
    ]
    left = statistics[statistics["status"] != "ok"].drop_duplicates(["model", "reason"])
    missing = "\n".join(f"- {row.model}, {row.arm}: {row.reason}" for row in left.itertuples())
    return paragraphs(
        f"# {HEADING}\n\n{headline(folder)} Run {run_id}.",
        "![K, attention logits and KL of plans and of weight types](../plots/four-bit.png)",
        GRID,
        f"## In a layer\n\nMedian of layers. K's error in units of what rounding to bf16 once costs; attention logits' "
        f"relative to their rms.\n\n{markdown(table)}",
        *lists,
        f"Not applicable:\n\n{missing}" if missing else "",
        f"## What 4 bits can buy\n\nOf the kernel that reads blocks in the chain. {four_bit_arithmetic.words()}",
    )


def _list(rows: pd.DataFrame) -> str:
    def cell(row: pd.Series) -> str:
        unit = " %" if any(word in row["statistic"] for word in ("Δp", "Same", "Cor")) else ""
        error = "" if pd.isna(row["standard_error"]) else f" ± {row['standard_error']:.2g}"
        return f"{row['value']:.4g}{error}{unit}"

    arms = [arm for arm in SHOWN if arm in set(rows["arm"])]
    rows = rows[rows["arm"].isin(arms)]
    table = rows.assign(cell=rows.apply(cell, axis=1)).pivot(index="statistic", columns="arm", values="cell")
    return markdown(table.loc[rows["statistic"].unique(), arms].reset_index(), right=arms)


# ---------------------------------------------------------------- picture


def _draw(folder: Path, layers: pd.DataFrame, statistics: pd.DataFrame, run_id: str) -> None:
    """Three logarithmic axes side by side, a row an arm: plans above, weight types below."""
    k, logits = per_arm(layers, "k_rel_rms"), per_arm(layers, "logit_rel_rms")
    kl = statistic(statistics, "Mean KLD")
    kl.index = pd.Index([arm.removesuffix(" of QKV").replace(" of QKV and norms", ", norms too") for arm in kl.index])
    arms = list(dict.fromkeys(["eager", *k.index, *kl.index]))
    models = dict(zip(dict.fromkeys([*k.columns, *kl.columns]), "os^D", strict=False))
    title = "What rounding costs (above) and what few bits cost (below)"
    shape = {"sharey": True, "wspace": 0.08}
    figure, axes = panels((1, 3), (13, 0.24 * len(arms) + 1.6), (0.17, 0.98, 0.75, 0.45), title, **shape)
    names = ("K, relative error", "attention logits, relative error", "mean KL from float32, nats")
    for axis, frame, name in zip(axes, (k, logits, kl), names, strict=True):
        _dots(axis, frame, arms, models)
        axis.set(xscale="log", xlabel=name)
        axis.grid(axis="x", color="0.9")
    axes[0].set_yticks(range(len(arms)), arms, fontsize=8)
    axes[0].set_ylim(len(arms) - 0.5, -0.5)
    for model, mark in models.items():
        axes[0].plot([], [], mark, color=GREY, label=model)
    axes[0].legend(fontsize=7, loc="upper right")
    folder.joinpath("plots").mkdir(parents=True, exist_ok=True)
    save(
        figure,
        folder / "plots" / "four-bit.png",
        f"run {run_id}; K and attention logits: median of layers, by themselves; KL: a whole model; Q8 orange, Q4 red",
    )


def _dots(axis: Axes, frame: pd.DataFrame, arms: list[str], marks: dict[str, str]) -> None:
    for model in frame.columns:
        values = frame[model].dropna()
        shades = [
            colour(a) if a in PLANS else GREY if a == "eager" else ORANGE if "Q8" in a else RED for a in values.index
        ]
        axis.scatter(values, [arms.index(a) for a in values.index], c=shades, marker=marks[model], s=26)
