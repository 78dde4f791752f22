"""What five reports said, and what was found of it: a verdict a claim, with the figures that it follows from."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from castpoint.harness.report.markdown import markdown, paragraphs
from castpoint.harness.report.story import story
from castpoint.harness.report.style import BLUE, GREEN, GREY, RC, RED, plt, save
from castpoint.harness.runs.frames import latest, load_table
from castpoint.harness.runs.records import load_runs
from castpoint.harness.runs.words import Judged

HEADING = "The claims of five reports"
ROWS, MANY = 11, 7  # causes of a panel, the nearest to what was said; so many make two
WITHIN, OUTSIDE, SAID = GREEN, GREY, RED


def frames(folder: Path) -> tuple[str, pd.DataFrame, pd.DataFrame] | None:
    """run_id, claims and their figures of the newest run that judged any."""
    found = latest(folder, "claims")
    return found and (found[0], found[1].fillna({"decides": ""}), load_table(folder, found[0], "claim_figures"))


def headline(folder: Path) -> str:
    """`5 of 16 claims judged: 4 explained otherwise, 1 reproduced.`"""
    found = frames(folder)
    if found is None:
        return ""
    return f"{len(found[1])} claims judged: {verdicts(found[1])}."


def verdicts(claims: pd.DataFrame) -> str:
    """`4 explained otherwise, 1 reproduced`."""
    counts = claims["verdict"].value_counts()
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in Judged if verdict in counts)


def page(folder: Path) -> str:
    """A row a claim, a picture, and under it every claim with its figures."""
    found = frames(folder)
    if found is None:
        return ""
    run_id, claims, figures = found
    rows = pd.DataFrame(
        {
            "claim": [f"[{claim}](#{claim.lower()})" for claim in claims["claim"]],
            "report": claims["source"],
            "said": claims["said"],
            "found": claims["figure"],
            "verdict": [f"**{verdict}**" for verdict in claims["verdict"]],
        }
    )
    picture = ""
    if len(shown := _panels(claims, figures)):
        _draw(folder, run_id, shown, figures)
        picture = (
            "![measured beside what was said](../plots/claims.png)\n\nA figure or two of each claim, with every cause "
            "it was measured for: least to greatest over prompts and draws, a dot at the median, what was said. Green: "
            "what was said lies within. An arrow: 0."
        )
    parts = [_section(row, figures[figures["claim"] == row["claim"]]) for row in claims.to_dict("records")]
    head = f"# {HEADING}\n\n{headline(folder)} Run {run_id}."
    return paragraphs(head, story(figures), picture, markdown(rows), *parts)


def _section(row: dict[str, Any], figures: pd.DataFrame) -> str:
    """One claim: how it was measured, on what, what would decide it, and all figures."""
    decides = f"Decided by: `{row['decides']}`." if row["decides"] else ""
    said = f"**{row['verdict']}**: {row['figure']}."
    lines = (
        f"Report {row['source']} said: {row['said']}.\n\n{said}\n\nMeasured: {row['how']}.\n\nOn: {row['conditions']}"
    )
    return paragraphs(f"## {row['claim']}\n\n{lines}", decides, _table(figures))


def _table(figures: pd.DataFrame) -> str:
    if not len(figures):
        return ""
    unit = ["" if pd.isna(unit) or not unit else f", {unit}" for unit in figures["unit"]]
    cells = {
        "figure": [what + u for what, u in zip(figures["what"], unit, strict=True)],
        "cause": figures["cause"],
        "said": [_ends(low, high) for low, high in zip(figures["claimed"], figures["claimed_high"], strict=True)],
        "median": [_number(value) for value in figures["measured"]],
        "least to greatest": [
            _ends(*ends) for ends in zip(figures["measured_low"], figures["measured_high"], strict=True)
        ],
        "samples": [f"{count:.0f}" for count in figures["samples"]],
        "said lies within": [_answer(row) for row in figures.itertuples()],
    }
    return markdown(pd.DataFrame(cells), right=("said", "median", "least to greatest", "samples"))


def _within(row: Any) -> bool:
    """What was said lies in the measured range: the value, or both ends."""
    high = row.claimed if pd.isna(row.claimed_high) else row.claimed_high
    return bool(row.measured_low <= row.claimed and high <= row.measured_high)


def _answer(row: Any) -> str:
    return "" if pd.isna(row.claimed) else "yes" if _within(row) else "no"


def _number(value: float) -> str:
    """To five significant digits, plain."""
    return "–" if pd.isna(value) else f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.5g}"


def _ends(low: float, high: float) -> str:
    return _number(low) if pd.isna(high) or low == high else f"{_number(low)} to {_number(high)}"


# ---------------------------------------------------------------- picture


def _panels(claims: pd.DataFrame, figures: pd.DataFrame) -> list[tuple[str, str]]:
    """Of each claim the figure with a value said above 0 that was measured for most causes; of several the last, and
    where MANY causes stand beside each other the first too."""
    shown = []
    for claim in claims["claim"]:
        rows = figures[(figures["claim"] == claim) & (figures["claimed"] > 0)]
        if len(rows):
            counts = rows.groupby("what", sort=False)["cause"].count()
            most = list(counts.index[counts == counts.max()])
            ends = (most[0], most[-1]) if counts.max() >= MANY else most[-1:]
            shown += [(claim, what) for what in dict.fromkeys(ends)]
    return shown


def _draw(folder: Path, run_id: str, shown: list[tuple[str, str]], figures: pd.DataFrame) -> None:
    """A panel a claim, two side by side, each on its own logarithmic axis."""
    parts = [_rows(figures, claim, what) for claim, what in shown]
    lines = [parts[at : at + 2] for at in range(0, len(parts), 2)]
    heights = [0.24 * max(len(rows) for rows in line) + 1.15 for line in lines]
    with plt.rc_context(RC | {"font.size": 9}):
        figure = plt.figure(figsize=(14, sum(heights) + 0.75))
        top = 0.45
        for line, height in zip(lines, heights, strict=True):
            for side, rows in enumerate(line):
                whole = figure.get_figheight()
                box = (0.2 + 0.5 * side, 1 - (top + height - 0.72) / whole, 0.27, (height - 1.0) / whole)
                _panel(figure.add_axes(box), rows)
            top += height
        legend = [
            Line2D([], [], color=SAID, linewidth=2, label="said"),
            Line2D([], [], color=WITHIN, marker="o", linewidth=3, label="measured, what was said within"),
            Line2D([], [], color=OUTSIDE, marker="o", linewidth=3, label="measured, elsewhere"),
        ]
        figure.legend(handles=legend, loc="upper left", ncols=3, frameon=False, fontsize=10)
        run = load_runs(folder)[run_id]["environment"]
        path = folder / "plots" / "claims.png"
        path.parent.mkdir(exist_ok=True)
        save(figure, path, f"run {run_id}, commit {run.get('commit', '')}")


def _rows(figures: pd.DataFrame, claim: str, what: str) -> pd.DataFrame:
    """The causes of that figure, the nearest to what was said first."""
    rows = figures[(figures["claim"] == claim) & (figures["what"] == what) & (figures["claimed"] > 0)]
    distance = [
        0.0 if _within(row) else abs(math.log(max(row.measured, 1e-300) / row.claimed)) for row in rows.itertuples()
    ]
    return rows.assign(distance=distance).sort_values("distance", kind="stable").head(ROWS)


def _panel(axes: Axes, rows: pd.DataFrame) -> None:
    first = rows.iloc[0]
    high = first["claimed"] if pd.isna(first["claimed_high"]) else first["claimed_high"]
    positive = pd.concat([rows[name] for name in ("measured_low", "measured_high", "measured")])
    positive = positive[positive > 0]
    left, right = (10 ** f(math.log10(v)) for f, v in (
        (math.floor, min([first["claimed"], *positive]) / 1.5), (math.ceil, max([high, *positive]) * 1.5)))  # fmt: skip
    axes.set(xscale="log", xlim=(left, right), ylim=(len(rows) - 0.4, -0.6), yticks=range(len(rows)))
    axes.set_yticklabels([textwrap.shorten(cause, 44, placeholder=" …") for cause in rows["cause"]], fontsize=8.5)
    axes.axvspan(first["claimed"], high, color=SAID, alpha=0.2)
    for value in {first["claimed"], high}:
        axes.axvline(value, color=SAID, linewidth=2)
    for place, row in enumerate(rows.itertuples()):
        shade = WITHIN if _within(row) else OUTSIDE
        if row.measured_high <= 0:
            axes.plot([left], [place], marker="<", color=shade, clip_on=False, markersize=7)
            continue
        axes.plot([max(row.measured_low, left), row.measured_high], [place, place], color=shade, linewidth=3)
        axes.plot([max(row.measured, left)], [place], marker="o", color=shade, markersize=6)
    axes.grid(axis="x", color=BLUE, alpha=0.12)
    unit = "" if pd.isna(first["unit"]) or not first["unit"] else f" {first['unit']}"
    what = textwrap.shorten(first["what"], 48, placeholder=" …")
    title = f"{first['claim']}: {what}, said {_ends(first['claimed'], high)}{unit}"
    axes.set_title(title, loc="left", fontsize=9.5, x=-0.6)
