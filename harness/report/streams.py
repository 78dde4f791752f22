"""Massive tokens as a table: every headline figure on drawn streams and on such of published sizes."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from castpoint.harness.report.markdown import markdown
from castpoint.harness.report.style import ROUNDING
from castpoint.harness.runs.schema import Backend

SHOWN = "hf one-rounding bf16-operand deferred cast-after-matmul fp32 bf16-statistics truncating".split()
COLUMNS = {  # (of published sizes, part): heading
    (False, "all tokens"): "drawn stream",
    (True, "all tokens"): "published sizes",
    (False, "other tokens"): "drawn: others",
    (True, "other tokens"): "published: others",
    (False, "first token"): "drawn: first token",
    (True, "first token"): "published: first token",
}
HEADING = "Massive tokens"


def section(frame: pd.DataFrame) -> str:
    """Of report.md."""
    rows = frame[frame["status"].isin(["ok", "red"])]
    rows = rows.assign(published=rows["weights"].str.contains("published"))
    table = stream_table(rows)
    where = ", ".join(
        f"{model} (layers {', '.join(map(str, sorted(part['layer'].unique())))})"
        for model, part in rows[rows["backend"] == Backend.SPEC].groupby("model", sort=False)
    )
    return (
        f"## {HEADING}\n\n{where}; weights drawn, two key heads and their query heads, {rows['seed'].nunique()} draws. "
        "Published sizes: the first token holds the largest and the smallest value of that layer, all others have its "
        "median (arXiv 2605.15572). The drawn stream is that of every other table: its first token has a massive "
        "activation of another size, its others differ from the published ones by one factor, which the norm removes. "
        "Behind the input norm a massive token is nearly one channel, and its K nearly one column of W: what rounds "
        "before the matmul is nearly one factor of all K, which the K norm divides out. V has no norm behind it. "
        "Kernels: the first of these layers. PyTorch and eager are this CPU's. Median (least to greatest) over layers, "
        "draws and "
        f"models.\n\n{markdown(table, right=table.columns[1:])}"
    )


def stream_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a figure, a column for each of COLUMNS. rows: with a column `published`."""
    found = {
        "largest value over the token's median": _cells(rows.query("plan == 'hf'"), "largest_over_median", _number)
    }
    spec = rows[rows["backend"] == Backend.SPEC]
    plans = [name for name in SHOWN if name in set(spec["plan"])]
    by_plan: dict[str, tuple[str, Callable[[float], str]]] = {
        "K's error, in roundings": ("k_rel_rms", lambda value: f"{value / ROUNDING:.2f}"),
        "K equal to PyTorch's": ("k_equal_eager", _percent),
        "K correctly rounded": ("k_equal", _percent),
        "V's error, in roundings": ("v_rel_rms", lambda value: f"{value / ROUNDING:.2f}"),
    }
    for words, (column, text) in by_plan.items():
        for plan in plans:
            found[f"{words}: {plan}"] = _cells(spec[spec["plan"] == plan], column, text)
    hf = spec[spec["plan"] == "hf"]
    found["part of K's squared error made before the matmul: hf"] = _cells(hf, "before_matmul", _percent)
    found["logits' rms error, times that with K-norm weights of 1: hf"] = _cells(hf, "k_norm_multiple", _number)
    alone = rows[rows["backend"] == Backend.EAGER_BATCH_OF_1]
    found["K that eager changes one token at a time"] = _cells(
        alone.assign(changed=1 - alone["k_equal_eager"]), "changed", _percent
    )
    kernels = rows[rows["backend"] == Backend.TRITON]
    if len(kernels):
        count = f"{len(kernels[['model', 'plan']].drop_duplicates())} kernels"
        found[f"elements of {count} outside their envelope"] = {
            heading: f"{part['outside'].sum():.0f} of {part['elements'].sum():,.0f}"
            for heading, part in _parts(kernels)
        }
        found[f"elements of {count} equal to their spec"] = _cells(kernels, "equal_spec", _percent)
    return pd.DataFrame(found).T[list(COLUMNS.values())].reset_index(names="figure")


def _parts(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [
        (heading, rows[(rows["published"] == published) & (rows["part"] == part)])
        for (published, part), heading in COLUMNS.items()
    ]


def _cells(rows: pd.DataFrame, column: str, text: Callable[[float], str]) -> dict[str, str]:
    """`2.3 (2.2 to 2.4)`: median, least and greatest of each column; a dash where there is none."""
    cells = {}
    for heading, part in _parts(rows):
        low, middle, high = (
            part[column].dropna().quantile([0, 0.5, 1]).map(text) if part[column].notna().any() else "–––"
        )
        cells[heading] = middle if low == high else f"{middle} ({low} to {high})"
    return cells


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
