"""Page of the tensor-parallel decoder: what each all-reduce and dtype change by layer, and what the tree costs."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from castpoint.harness.report.markdown import paragraphs, under
from castpoint.harness.report.style import BLUE, GREEN, GREY, ORANGE, panels, save
from castpoint.harness.runs.frames import latest, load_table

HEADING = "Tensor parallel"
ONE, PLAIN = "one process", "plain decoder"
REDUCES = {"bf16": ORANGE, "fp32": BLUE, "tree": GREEN}
MARK = 1e-3  # of the issue: what a right implementation stays within, in fp32
SAID = """\
Q, K and V in one matmul of each rank's own heads, with biases where the model has them; output projection and MLP
row-parallel; embedding and head by rows of the vocabulary; a KV cache; each rank reads its own rows and columns of the
file. Processes under torchrun, gloo.

**All-reduce.** `bf16`: each rank's sum is rounded to bf16 and added in bf16. `fp32`: it stays in float32 until all are
added. `tree`: every sum is cut into tiles that no rank count moves (a query head, an eighth of the MLP's channels); the
tiles' float32 sums are added by one binary tree, of which each rank holds a subtree; matmuls by columns are made a head
or an eighth at a time (after arXiv 2511.17826). One process reduces nothing: there `bf16` and `fp32` differ only where
the model is bf16, by the order of sums.

**Heads.** Query heads are halved from the top, so that 14 of them are 4, 3, 4 and 3 on four ranks and no rank reads
two halves of different key heads; ranks beyond the key heads hold copies. Counts that leave a rank without a head, that
neither divide the key heads nor are divided by them, or that are no power of two, are refused."""


def page(folder: Path) -> str:
    """In Markdown, of the newest run; draws plots/parallel.png. Empty where no run has rows."""
    if not (found := _frames(folder)):
        return ""
    run_id, rows, cost = found
    (folder / "plots").mkdir(exist_ok=True)
    of = ", ".join(rows["model"].unique())
    save(_figure(rows), folder / "plots" / "parallel.png", f"{of}; run {run_id}")
    return paragraphs(
        f"# {HEADING}\n\n{headline(folder)}",
        "![Difference by layer for each all-reduce and dtype](../plots/parallel.png)",
        SAID,
        under("## Against one process with the same all-reduce", against(rows, ONE)),
        under(
            "## Against the plain decoder\n\nOne process, separate matmuls, all tokens at once, those decoded too. "
            "Of one rank and of the most.",
            against(rows, PLAIN),
        ),
        under(
            "## What it costs\n\nPrefill and one decoded token, milliseconds on this CPU: median (least to greatest). "
            "Ranks beyond its cores take turns, so that these times say what the tree costs, and "
            "nothing of what ranks buy. Sent: bytes a rank sends in a prefill, counted: an all-reduce as the ring of 2 "
            "(R - 1) / R of its tensor, the tree as log2(R) whole tensors; both with the gathered logits.",
            costs(cost),
        ),
    )


def headline(folder: Path) -> str:
    """What the tree keeps, and what fp32 reaches."""
    found = _frames(folder)
    if not found:
        return ""
    rows = found[1]
    one = rows[(rows["reference"] == ONE) & (rows["ranks"] > 1)]
    tree, others = one[one["reduce"] == "tree"], one[one["reduce"] == "fp32"]
    k, same = tree[tree["stage"] == "k"], tree[tree["stage"].isin(["k", "logits"])]["max_abs"] == 0
    counts = " and ".join(str(n) for n in sorted(one["ranks"].unique()))
    least_k = f"K equals one process in {k['share_equal'].min():.4%}"
    kept = "K and logits equal one process in every bit" if same.all() else least_k
    least = others[others["stage"] == "k"]["share_equal"].min()
    fp32 = one[(one["dtype"] == "fp32") & (one["reduce"] == "fp32") & (one["stage"] == "logits")]["max_abs"].max()
    within = "within" if fp32 <= MARK else "beyond"
    return (
        f"With fixed tiles and a tree, {kept} on {counts} ranks; with an all-reduce in fp32 K of some layer "
        f"equals in as little as {least:.1%}. In an fp32 model logits then differ by at most {fp32:.2g}, "
        f"{within} {MARK:g}."
    )


def against(rows: pd.DataFrame, reference: str) -> pd.DataFrame:
    """One row a model, dtype, all-reduce and rank count; against the plain decoder, of one rank and of the most."""
    part = rows[rows["reference"] == reference]
    part = part[part["ranks"] > 1] if reference == ONE else part[part["ranks"].isin([1, part["ranks"].max()])]
    lines = []
    for (model, dtype, reduce, ranks), of in part.groupby(["model", "dtype", "reduce", "ranks"], sort=False):
        k, hidden, logits = (of[of["stage"] == stage] for stage in ("k", "hidden", "logits"))
        read, decoded = (logits[logits["part"] == name].iloc[0] for name in ("prefill", "decode"))
        copies = of[of["stage"] == "copies of k"]["share_equal"]
        lines.append(
            {
                "model": model,
                "dtype": dtype,
                "all-reduce": reduce,
                "ranks": ranks,
                "K equal, first layer": k[k["layer"] == 0]["share_equal"].iloc[0],
                "K equal, least of a layer": k["share_equal"].min(),
                "K's copies equal": copies.iloc[0] if len(copies) else None,
                "hidden state, largest difference": hidden["max_abs"].max(),
                "relative to its rms, last layer": hidden["rel_rms"].iloc[-1],
                "logits, largest difference": read["max_abs"],
                "of decoded tokens": decoded["max_abs"],
                "logits equal": read["share_equal"],
                "first choice equal": read["first_equal"],
            }
        )
    return pd.DataFrame(lines)


def costs(cost: pd.DataFrame) -> pd.DataFrame:
    lines = []
    for (model, dtype, ranks), of in cost.groupby(["model", "dtype", "ranks"], sort=False):
        base = of[of["reduce"] == "fp32"]
        for row in of.itertuples():
            over = row.prefill_ms / base["prefill_ms"].iloc[0] if len(base) else None
            lines.append(
                {
                    "model": model,
                    "dtype": dtype,
                    "ranks": ranks,
                    "all-reduce": row.reduce,
                    "tokens": row.tokens,
                    "prefill, ms": f"{row.prefill_ms:,.0f} ({row.prefill_low_ms:,.0f} to {row.prefill_high_ms:,.0f})",
                    "passes": row.repeats,
                    "over fp32's": over,
                    "decoded token, ms": float(row.decode_ms),
                    "sent, MB": row.sent_bytes / 1e6,
                    "read, million weights": row.read_elements / 1e6,
                }
            )
    return pd.DataFrame(lines)


def _frames(folder: Path) -> tuple[str, pd.DataFrame, pd.DataFrame] | None:
    if not (newest := latest(folder, "parallel")):
        return None
    return newest[0], newest[1], load_table(folder, newest[0], "parallel_cost")


def _figure(rows: pd.DataFrame) -> Figure:
    """Relative difference of the hidden state behind each layer, a line of panels a model, one a dtype."""
    hidden = rows[rows["stage"] == "hidden"]
    models = list(hidden["model"].unique())
    title = "Hidden state behind each layer: rms of the difference from one process, over the state's own rms"
    figure, grid = panels(
        (len(models), 2), (11, 0.9 + 3.6 * len(models)), (0.08, 0.98, 0.75, 0.75), title, squeeze=False, sharex="row"
    )  # fmt: skip
    for line, model in zip(grid, models, strict=True):
        for axes, dtype in zip(line, ("fp32", "bf16"), strict=True):
            of = hidden[(hidden["model"] == model) & (hidden["dtype"] == dtype)]
            equal = []
            for reduce, shade in REDUCES.items():
                for ranks, dash in ((2, "--"), (4, "-")):
                    drawn = of[(of["reduce"] == reduce) & (of["ranks"] == ranks) & (of["reference"] == ONE)]
                    if len(drawn) and (drawn["rel_rms"] > 0).any():
                        values = drawn["rel_rms"].where(drawn["rel_rms"] > 0)
                        axes.plot(drawn["layer"], values, dash, color=shade, label=f"{reduce}, {ranks} ranks")
                    elif len(drawn):
                        equal.append(f"{reduce}, {ranks} ranks")
            plain = of[(of["reduce"] == "tree") & (of["ranks"] == 1) & (of["reference"] == PLAIN)]
            if (plain["rel_rms"] > 0).any():
                values = plain["rel_rms"].where(plain["rel_rms"] > 0)
                axes.plot(plain["layer"], values, ":", color=GREY, label="tree, from the plain decoder")
            said = f"{model}, {dtype}" + (f"\nno bit differs: {'; '.join(equal)}" if equal else "")
            axes.set_title(said, fontsize=10, loc="left")
            if axes.lines:
                axes.set_yscale("log")
                axes.margins(y=0.35)
                axes.legend(fontsize=8, ncol=2, frameon=False, loc="lower right")
            axes.set_xlabel("layer")
            axes.xaxis.get_major_locator().set_params(integer=True)
    return figure
