"""Massive tokens as a table: every headline figure on drawn streams and on such of published sizes."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from castpoint.harness.report.markdown import markdown
from castpoint.harness.report.style import ROUNDING
from castpoint.harness.runs.words import Backend

SHOWN = "hf one-rounding bf16-operand deferred cast-after-matmul fp32 bf16-statistics truncating".split()
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
        "before the matmul is nearly one factor of all K, which the K norm divides out. A second large channel has a "
        "factor of its own, which the norm keeps. V has no norm behind it. What is made before the matmul is of the "
        "first 16 tokens of each part. Kernels: the first of these layers. PyTorch and eager are this CPU's. Median "
        "(least to greatest) over models, layers and draws.\n\n"
        f"{markdown(table, right=table.columns[1:])}"
    )


def columns(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Heading -> the rows it is of. rows: with a column `published`."""
    drawn, published = rows[~rows["published"]], rows[rows["published"]]
    found = {"drawn stream": drawn, "published sizes": published}
    found = {heading: part[part["part"] == "all tokens"] for heading, part in found.items()}
    first = {"drawn, first token": drawn}
    first |= {f"published, first token, {m}": published[published["model"] == m] for m in rows["model"].unique()}
    return found | {heading: part[part["part"] == "first token"] for heading, part in first.items()}


def stream_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a figure, a column each of columns(rows)."""
    spec = rows[rows["backend"] == Backend.SPEC]
    hf = spec[spec["plan"] == "hf"]
    found = {
        "largest value of x": _cells(hf, "x_max", _number),
        "smallest value of x": _cells(hf, "x_min", _number),
        "median of |x|": _cells(hf, "x_abs_median", _number),
    }
    for words, (column, text) in BY_PLAN.items():
        for plan in (name for name in SHOWN if name in set(spec["plan"])):
            found[f"{words}: {plan}"] = _cells(spec[spec["plan"] == plan], column, text)
    found["part of K's squared error made before the matmul: hf"] = _cells(hf, "before_matmul", _percent)
    found["logits' rms error, times that with K-norm weights near 1: hf"] = _cells(hf, "k_norm_multiple", _number)
    alone = rows[rows["backend"] == Backend.EAGER_BATCH_OF_1]
    changed = alone.assign(changed=1 - alone["k_equal_eager"])
    found["K that eager changes one token at a time"] = _cells(changed, "changed", _percent)
    kernels = rows[rows["backend"] == Backend.TRITON]
    if len(kernels):
        found["elements of all plans' kernels outside their envelope"] = {
            heading: f"{part['outside'].sum():.0f} of {part['elements'].sum():,.0f}"
            for heading, part in columns(kernels).items()
        }
        found["elements of a kernel equal to its spec"] = _cells(kernels, "equal_spec", _percent)
    return pd.DataFrame(found).T.reset_index(names="figure")


def _cells(rows: pd.DataFrame, column: str, text: Callable[[float], str]) -> dict[str, str]:
    """`2.3 (2.2 to 2.4)`: median, least and greatest of each column; a dash where there is none."""
    cells = {}
    for heading, part in columns(rows).items():
        values = part[column].dropna()
        low, middle, high = map(text, values.quantile([0, 0.5, 1])) if len(values) else "–––"
        cells[heading] = middle if low == high else f"{middle} ({low} to {high})"
    return cells


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _roundings(value: float) -> str:
    return f"{value / ROUNDING:.2f}"


BY_PLAN: dict[str, tuple[str, Callable[[float], str]]] = {
    "K's error, in roundings": ("k_rel_rms", _roundings),
    "K equal to PyTorch's": ("k_equal_eager", _percent),
    "K correctly rounded": ("k_equal", _percent),
    "V's error, in roundings": ("v_rel_rms", _roundings),
}
