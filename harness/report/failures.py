"""What failed or is red in the records that a report shows, with its reason: no arm is left out without a word."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from castpoint.harness.report import model
from castpoint.harness.report.markdown import under
from castpoint.harness.runs.frames import GPU_TABLES, latest, load, load_table, newest_gpu_run

BAD = ("failed", "red")
OF_A_BENCH = ("errors", "eager", "amplification", "k_norms", "ulps", "channels", "speed")
# Columns that say what a row is of, as far as its table has them.
NAMES = "model source implementation kernel counter limit arm step plan config backend how target kind check".split()
NAMES += ["isa", "measure", "fault", "gate"]


def bad_rows(frame: pd.DataFrame, table: str) -> pd.DataFrame:
    """One row for each thing that failed and each reason: table, what (of a GPU's points the first), status, reason,
    and how many rows say so."""
    rows = frame[frame["status"].isin(BAD)]
    names = [name for name in NAMES if name in rows.columns]
    what = [", ".join(dict.fromkeys(str(cell) for cell in row if cell not in ("", None))) for row in rows[names].values]
    named = pd.DataFrame({"table": table, "what": what, "status": rows["status"], "reason": rows["reason"], "at": ""})
    if table in ("gpu_speed", "gpu_steps"):
        points = zip(rows["tokens"], rows["regime"], strict=True)
        named["at"] = [f", {tokens:.0f} tokens {regime}" if regime else "" for tokens, regime in points]
    found = named.groupby(["table", "what", "status", "reason"], sort=False)["at"].agg(rows="size", at="first")
    found = found.reset_index()
    return found.assign(what=found["what"] + found.pop("at"))[["table", "what", "status", "reason", "rows"]]


def failures(folder: Path, run_id: str) -> pd.DataFrame:
    """bad_rows of a bench, of the GPU run that is shown, and of the newest finished run of each study and model."""
    frames = load(folder, run_id)
    found = [bad_rows(frames[table], table) for table in OF_A_BENCH]
    of_a_model = ("model_tokens", "k_norms")
    found += [bad_rows(study.frames[table], table) for study in model.studies(folder) for table in of_a_model]
    on_a_gpu = newest_gpu_run(folder)
    found += [bad_rows(load_table(folder, on_a_gpu, table), table) for table in GPU_TABLES if on_a_gpu]
    for table in frames:
        if table not in (*OF_A_BENCH, *GPU_TABLES) and not table.startswith("model_"):
            found += [bad_rows(newest[1], table) for newest in [latest(folder, table)] if newest]
    return pd.concat(found, ignore_index=True)


def section(rows: pd.DataFrame) -> str:
    """Of report.md; empty where nothing failed."""
    return under("## What failed\n\nRows without a figure, or with one that a check refuses.", rows)


def note(folder: Path, run_id: str) -> str:
    """For the foot of a plot of that run: what failed in it, in short."""
    rows = pd.concat([bad_rows(frame, table) for table, frame in load(folder, run_id).items()])
    names = list(dict.fromkeys(rows["what"]))
    return f"; failed: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}" if names else ""
