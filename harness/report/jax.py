"""JAX beside PyTorch as a page: every stage alone and end to end, and the parts that say why they differ."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from castpoint.harness.report.markdown import paragraphs, under
from castpoint.harness.report.style import BLUE, GREY, ORANGE, panels, save
from castpoint.harness.runs.frames import latest

HEADING = "JAX beside PyTorch"
ALONE, WHOLE, OP_BY_OP = "alone", "end to end", "op by op"
MARK = {"omegalax's fp32 logits, Qwen3-0.6B, CPUs": 8.77e-5}  # reported by its authors
CAUSES = """\
JAX op by op, PyTorch's own input, all layers, one passage: share of equal bits where only that part of a stage is
JAX's. Where nothing but products is JAX's and all bits are equal, the parts below it are all that differs. *Matmul,
exact sums*: on whole numbers whose sums no order rounds, and on rows of one term; where all are equal, terms and result
are rounded alike, and what differs is how fp32 adds: in which order, with products rounded before or not. Softmax: rows
that an exp within an ulp of JAX's and one sum within 8 explain, by either way to divide, but for subnormal weights,
which XLA makes 0; in bf16 that asks little."""
DRAWN = """\
Weights of qwen3-0.6b and of qwen2.5-7b's layer are drawn to published statistics; `castpoint study jax --model
Qwen/Qwen3-0.6B` compares the checkpoint's with what was reported of it."""
SIDES = ((ALONE, BLUE, -0.14), (WHOLE, ORANGE, 0.14))  # reading, colour, beside the stage's place


def page(folder: Path) -> str:
    """Markdown of the newest run, with its picture; empty where no model was run to its logits."""
    if not (stages := _rows(folder, "jax_stages")) or "logits" not in set(stages[1]["stage"]):
        return ""
    run_id, rows = stages
    parts, causes = _rows(folder, "jax_parts"), _rows(folder, "jax_causes")
    model = pictured(rows)
    (folder / "plots").mkdir(exist_ok=True)
    save(
        picture(rows[rows["model"] == model]), folder / "plots" / "jax.png", f"{model}, JAX op by op on a CPU, {run_id}"
    )
    return paragraphs(
        f"# {HEADING}",
        "The whole decoder in plain JAX, the same weights, against PyTorch's eager attention on the same CPU. *Alone*: "
        "the stage is given PyTorch's own input. *End to end*: its own, so that what differs before is in it.",
        headline(folder),
        "![Relative difference of every stage](../plots/jax.png)",
        under(paragraphs("## At the logits", DRAWN if "qwen3-0.6b" in set(rows["model"]) else ""), logits(rows)),
        under(f"## Every stage alone, {OP_BY_OP}, over layers: PyTorch's own input", by_stage(rows, ALONE)),
        under(f"## Every stage end to end, {OP_BY_OP}, over layers", by_stage(rows, WHOLE)),
        under("## Compiled, every stage alone: share of equal bits, least over layers", compiled(rows)),
        under(f"## Why, stage by stage\n\n{CAUSES} {others(rows, causes[1])}", by_cause(causes[1])) if causes else "",
        under("## The functions behind it", why(parts[1])) if parts else "",
    )


def headline(folder: Path) -> str:
    """The logits' largest difference in fp32 and in bf16."""
    found = _rows(folder, "jax_stages")
    if found is None:
        return ""
    rows = found[1]
    end = rows[(rows["stage"] == "logits") & (rows["reading"] == WHOLE) & (rows["how"] == OP_BY_OP)]
    said = [
        f"{of['max_abs'].min():.2g} to {of['max_abs'].max():.2g} in {dtype}" if len(of) > 1 else
        f"{of['max_abs'].max():.2g} in {dtype}"
        for dtype, of in end.groupby("dtype", sort=False)
    ]  # fmt: skip
    alone = rows[(rows["reading"] == ALONE) & (rows["how"] == OP_BY_OP) & (rows["dtype"] == "bf16")]
    alone = alone[~alone["stage"].isin(["angles", "embedding"])]
    equal = alone["share_equal"] @ alone["elements"] / alone["elements"].sum() if len(alone) else float("nan")
    return (
        f"JAX's logits are at most {', '.join(said)} from PyTorch's, by model; fed the same input, "
        f"{100 * equal:.2f} % of all stages' elements are equal in bf16."
    )


def _rows(folder: Path, table: str) -> tuple[str, pd.DataFrame] | None:
    found = latest(folder, table)
    return found and (found[0], found[1][found[1]["status"] == "ok"])


def pictured(rows: pd.DataFrame) -> str:
    """Of those run in most ways the one with most layers."""
    ways = rows.groupby("model", sort=False)["how"].nunique()
    return str(rows[rows["model"].isin(ways.index[ways == ways.max()])].groupby("model")["layer"].max().idxmax())


def logits(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a model, dtype and way to run JAX, and what others reported."""
    end = rows[(rows["stage"] == "logits") & (rows["reading"] == WHOLE)]
    alone = rows[(rows["stage"] == "logits") & (rows["reading"] == ALONE)].set_index(["model", "dtype", "how"])
    keys = list(zip(end["model"], end["dtype"], end["how"], strict=True))
    table = pd.DataFrame(
        {
            "model": end["model"],
            "dtype": end["dtype"],
            "JAX": end["how"],
            "largest difference": end["max_abs"],
            "99.9 %": end["p999"],
            "ulps of the largest logit": end["ulps_of_largest"],
            "relative rms": end["rel_rms"],
            "equal": end["share_equal"],
            "of it, the head alone": [alone["max_abs"].get(key) for key in keys],
        }
    )  # fmt: skip
    other = pd.DataFrame({"model": MARK.keys(), "dtype": "fp32", "JAX": "–", "largest difference": MARK.values()})
    return pd.concat([table, other], ignore_index=True).fillna({"JAX": "–"})


def by_stage(rows: pd.DataFrame, reading: str) -> pd.DataFrame:
    """A row a stage of each model and dtype: least share of equal bits and largest differences over layers."""
    kept = rows[(rows["reading"] == reading) & (rows["how"] == OP_BY_OP)]
    groups = kept.groupby(["model", "dtype", "stage"], sort=False)
    return pd.DataFrame(
        {
            "equal, all": groups.apply(lambda g: g["share_equal"] @ g["elements"] / g["elements"].sum()),
            "equal, least layer": groups["share_equal"].min(),
            "largest difference": groups["max_abs"].max(),
            "ulps of the largest value": groups["ulps_of_largest"].max(),
            "ulps of the value itself": groups["max_ulp"].max(),
            "relative rms": groups["rel_rms"].max(),
        }
    ).reset_index()


def compiled(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a stage: each way to run JAX, where it was run in more than one."""
    kept = rows[(rows["reading"] == ALONE) & rows["dtype"].isin(["fp32", "bf16"])]
    table = kept.pivot_table(
        index=["model", "dtype", "stage"], columns="how", values="share_equal", aggfunc="min", sort=False
    )
    table = table[table.notna().sum(axis=1) > 1].map(lambda share: "–" if pd.isna(share) else f"{100 * share:.4g} %")
    return table.reset_index()


def by_cause(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a stage and cause: share of equal bits where that alone is JAX's, over layers, of each model and dtype."""
    of = rows.assign(
        of=rows["model"] + ", " + rows["dtype"],
        equal=[equal(row.elements, row.differ) for row in rows.itertuples()],
    )
    table = of.pivot_table(index=["stage", "by_jax"], columns="of", values="equal", aggfunc="first", sort=False)
    return table.fillna("–").reset_index().rename(columns={"by_jax": "JAX's is", "of": ""})


def equal(elements: int, differ: int) -> str:
    """`all` only where none differs."""
    share = f"{100 * (1 - differ / elements):.4g} %"
    return "all" if not differ else f"{share}, but {differ:,}" if share == "100 %" else share


def others(rows: pd.DataFrame, causes: pd.DataFrame) -> str:
    """What of the stages that have no cause here: equal bits, or that they have none."""
    of = rows[(rows["reading"] == ALONE) & (rows["how"] == OP_BY_OP) & rows["model"].isin(causes["model"])]
    of = of[of["dtype"].isin(causes["dtype"])].groupby(["stage", "model", "dtype"], sort=False)["max_abs"].max()
    known = pd.MultiIndex.from_frame(causes[["stage", "model", "dtype"]])
    of = of[~of.index.isin(known)]
    same = [stage for stage, largest in of.groupby("stage", sort=False).max().items() if largest == 0]
    open_ = [", ".join(key) for key, largest in of.items() if largest > 0]
    return (f"Where a stage has no figure here, its bits are all equal: {', '.join(same)}." if same else "") + (
        f" **Without a cause: {'; '.join(open_)}.**" if open_ else ""
    )


def why(parts: pd.DataFrame) -> pd.DataFrame:
    named = {"part": "compared", "how": "JAX", "inputs": "inputs", "says": "what it says"}
    table = parts[[*named, "elements", "share_equal", "max_ulp"]].rename(columns=named)
    return table.rename(columns={"share_equal": "equal", "max_ulp": "most ulps"})


def picture(rows: pd.DataFrame) -> Figure:
    """Relative rms difference of every stage, alone and end to end: median over layers and its range."""
    rows = rows[(rows["how"] == OP_BY_OP) & (rows["stage"] != "angles")]
    stages = list(dict.fromkeys(rows.loc[rows["reading"] == ALONE, "stage"]))
    title = "How far JAX is from PyTorch at every stage: dot, median over layers; line, least to greatest"
    figure, axes = panels((1, 2), (12, 5), (0.075, 0.99, 1.2, 0.75), title, wspace=0.16)
    for place, (axis, dtype) in enumerate(zip(axes, ("fp32", "bf16"), strict=True)):
        of = rows[rows["dtype"] == dtype]
        above = of.loc[of["rel_rms"] > 0, "rel_rms"]
        least = max(above.min() / 8, 1e-10) if len(above) else 2.0**-24  # all bits equal: any place will do
        for reading, shade, beside in SIDES:
            for at, stage in enumerate(stages):
                values = of.loc[(of["reading"] == reading) & (of["stage"] == stage), "rel_rms"]
                if not len(values):
                    continue
                low, middle, high = values.clip(lower=least).quantile([0, 0.5, 1])
                axis.plot([at + beside] * 2, [low, high], color=shade, linewidth=3, alpha=0.4)
                hollow = {"facecolors": "none"} if values.median() == 0 else {"facecolors": shade}
                axis.scatter(at + beside, middle, s=26, edgecolors=shade, zorder=3, **hollow)
            axis.scatter([], [], color=shade, label=reading if reading == WHOLE else "alone, on PyTorch's input")
        axis.axhline(least, color=GREY, linewidth=0.6)
        axis.set(yscale="log", title=f"{dtype} (hollow, at the grey line: equal bits)")
        axis.set_xticks(range(len(stages)), stages, rotation=60, ha="right", fontsize=9)
        if not place:
            axis.set_ylabel("difference, relative rms")
            axis.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 0.1))
    return figure
