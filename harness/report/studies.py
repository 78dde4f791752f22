"""Sections of report.md on the studies beside the bench, each from the newest finished run of a results folder that has
such rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from castpoint.harness.report import budget, gates, gpu, model, rope_positions, streams, systems
from castpoint.harness.report.fingerprints import captures_section, confusion_section, implementations_section
from castpoint.harness.report.markdown import markdown
from castpoint.harness.runs.frames import latest
from castpoint.harness.runs.records import load_runs
from castpoint.harness.runs.words import Check


def case_table(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a case: measured beside claimed."""
    numbers = frame[["measured", "measured_low", "measured_high"]].map(lambda v: "–" if pd.isna(v) else f"{v:.3g}")
    middle, low, high = (numbers[column] for column in numbers)
    table = frame.assign(measured=middle + " (" + low + " to " + high + ") " + frame["unit"])
    names = {"source": "case", "where": "boundary", "before": "before", "after": "after", "measure": "quantity"}
    names |= {"measured": "measured (range over draws)", "claimed_text": "claimed", "verdict": "verdict"}
    names |= {"share_differ": "share of elements that differ", "why": "why"}
    return table[list(names)].rename(columns=names)


def counted(words: pd.Series) -> str:
    """`24 fits, 11 does not fit; 35 in all`: how many rows there are of each word."""
    return ", ".join(f"{count} {word}" for word, count in words.value_counts().items()) + f"; {len(words)} in all"


def _cases(frame: pd.DataFrame) -> str:
    return (
        "## Cases of the field\n\n`before` is what the thread holds up as right, `after` what it complains of. A claim fits "
        "if the measured range (95 % of draws) meets it and the figure is within a factor of 1.5; it does not fit if the "
        f"ranges are apart. Claims: {counted(frame['verdict'])}.\n\n{markdown(case_table(frame))}"
    )


def audit_table(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a kernel and target."""
    kernel = frame["kernel"] + frame["keywords"].where(frame["keywords"] == "", " " + frame["keywords"])
    status = frame["status"] + frame["reason"].where(frame["reason"] == "", ": " + frame["reason"])
    columns = "target kernel plan declared machine fused matrix registers spills shared status".split()
    names = {"machine": "found in machine code, elements a thread", "matrix": "matrix instructions"}
    names |= {"spills": "spills, bytes", "shared": "SMEM, bytes"}
    return frame.assign(kernel=kernel, status=status)[columns].rename(columns=names)


def _audit(frame: pd.DataFrame) -> str:
    return (
        "## Static audit\n\nEvery kernel compiled ahead of time (`castpoint audit`). `declared`: the roundings that the plan "
        "asks of this kernel. An `ok` says that each was found in TTIR where it belongs and followed into the machine code, and "
        f"that there is no other. Kernels: {counted(frame['status'])}. Fused multiply-adds that the source does not have: "
        f"{int(frame['fused'].sum())}.\n\n{markdown(audit_table(frame))}"
    )


def executed_table(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a target and plan."""
    is_exact = frame["check"] == Check.EXACT
    columns = {
        "kernels": _kernels(frame), "ok": frame["status"] == "ok", "exact": frame["elements"].where(is_exact),
        "equal": frame["share_equal"].where(is_exact), "drawn": frame["elements"].where(~is_exact),
    }  # fmt: skip
    found = frame.assign(**columns).groupby(["target", "plan"], sort=False).agg(
        kernels=("kernels", "nunique"), checks=("ok", "size"), ok=("ok", "sum"), exact=("exact", "sum"),
        equal=("equal", "min"), drawn=("drawn", "sum"),
    )  # fmt: skip
    found = found.astype({"exact": int, "drawn": int})
    names = {"exact": "elements, exact inputs", "equal": "least share equal to the spec there"}
    return found.rename(columns=names | {"drawn": "elements, drawn inputs"}).reset_index()


def _kernels(frame: pd.DataFrame) -> pd.Series:
    """A word for the kernel of each row: its plan, and what makes another binary."""
    return frame[["target", "plan", "config", "rope", "tokens"]].astype(str).agg(" ".join, axis=1)


def executed_words(frame: pd.DataFrame) -> str:
    """What was compared, counted."""
    exact, drawn = (frame[frame["check"] == check] for check in (Check.EXACT, Check.ENVELOPE))
    equal = (exact["share_equal"] * exact["elements"]).sum()
    return (
        f"{_kernels(frame).nunique()} kernels. Exact inputs, {_kernels(exact).nunique()} kernels: {equal:,.0f} of "
        f"{exact['elements'].sum():,.0f} elements equal their spec in every bit, half of these elements with one product a "
        f"dot product, half with many. Drawn inputs, {_kernels(drawn).nunique()} kernels: {drawn['elements'].sum():,.0f} "
        f"elements, all inside their envelope in {(drawn['status'] == 'ok').sum()} kernels."
    )


def _executed(frame: pd.DataFrame) -> str:
    return (
        "## Compiled kernels, run on a CPU\n\nEvery kernel as a launch compiles it, its PTX run instruction by instruction "
        "(`castpoint audit --run`): what Triton's compiler made of it, without ptxas and without a GPU's order of sums. "
        "Tiles of tuning are run for a plan of each place of rstd. "
        f"{executed_words(frame)}\n\n{markdown(executed_table(frame))}"
    )


def configs_section(frame: pd.DataFrame) -> str:
    """Of report.md: one row a binary, a column a target."""
    found = [f"{row.registers:.0f} / {row.spills:.0f} / {row.shared / 1024:.1f}" for row in frame.itertuples()]
    cells = frame["status"].where(frame["status"] != "ok", found)
    binary = ["kernel", "plan", "keywords"]
    table = frame.assign(cell=cells).pivot_table("cell", binary, "target", aggfunc="first", sort=False)
    return (
        "## Configs\n\nEvery tile that `norm_qkv` may be launched with, and its main loop by itself (`matmul`), "
        "compiled ahead of time: registers a thread / bytes spilled a thread / KiB of "
        "shared memory a block. Nothing is timed by this: `castpoint gpu` does that on a GPU."
        f"\n\n{markdown(table.reset_index())}"
    )


SECTIONS: dict[str, Callable[[pd.DataFrame], str]] = {
    "implementations": implementations_section,
    "fingerprints": confusion_section,
    "captures": captures_section,
    "budget": budget.section,
    "rope_positions": rope_positions.section,
    "streams": streams.section,
    "cases": _cases,
    "audit": _audit,
    "executed": _executed,
    "configs": configs_section,
    "gates": gates.section,
    "tolerances": gates.tolerances_section,
}


def study_sections(folder: Path, beside: str = "") -> list[str]:
    """Sections of report.md, for the studies that the folder has. beside: the commit of the bench that they stand beside;
    a study of another says of which."""
    runs, sections = load_runs(folder), []
    for table, write in SECTIONS.items():
        if found := latest(folder, table):
            commit = runs[found[0]]["environment"].get("commit")
            sections.append(write(found[1]) + (f"\n\nCommit {commit}." if beside and commit != beside else ""))
    sections += [*map(model.section, model.studies(folder)), gpu.section(folder)]
    return list(filter(None, [*sections, systems.section(folder)]))
