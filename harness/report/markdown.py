"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pandas as pd


def markdown(frame: pd.DataFrame, right: Collection[str] = ()) -> str:
    """A Markdown table; numbers to three significant digits, shares in percent. Words lose the bars that would end a
    cell. right: columns of words that are set like numbers."""

    def text(column: str, value: Any) -> str:
        if isinstance(value, str):
            return value.replace(" | ", " + ").replace("|", "/")
        if pd.isna(value):
            return "–"
        if any(word in column for word in ("equal", "rounded", "share", "flips")):
            return f"{100 * value:.4g} %"
        if "bias" in column:
            return f"{value:+.1e}"
        if column == "against eager":
            return f"{value:.2f} ×"
        if "µs" in column:
            return f"{value:,.0f}"
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    rows = [[text(column, value) for column, value in row.items()] for _, row in frame.iterrows()]
    rule = ["--:" if frame[name].dtype.kind in "fi" or name in right else "---" for name in frame.columns]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [list(frame.columns), rule, *rows])


def percent(low: float, high: float, digits: int = 3) -> str:
    """`0.013 to 0.031 %` of two shares; one number where they print alike."""
    least, most = (f"{100 * share:.{digits}g}" for share in (low, high))
    return f"{least} %" if least == most else f"{least} to {most} %"


def under(words: str, frame: pd.DataFrame) -> str:
    """Words and a table; empty where it has no rows."""
    return f"{words}\n\n{markdown(frame)}" if len(frame) else ""


def paragraphs(*parts: str) -> str:
    """All that are not empty, one under the other."""
    return "\n\n".join(filter(None, parts))
