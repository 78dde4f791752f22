"""The records of one run as data frames, and the figures that more than one table or plot takes from them."""

from __future__ import annotations

import io
from pathlib import Path

import pandas as pd

from castpoint.harness.runs.errors import mistakes
from castpoint.harness.runs.records import check_table, load_runs, whole_lines
from castpoint.harness.runs.schema import TABLES, flags_of, words_of
from castpoint.harness.runs.words import Backend

Frames = dict[str, pd.DataFrame]
# What a GPU run writes, each row whole by itself, so that a run that was cut off counts.
GPU_TABLES = ("gpu_speed", "gpu_steps", "gpu_checks", "gpu_limits", "gpu_counters", "tuning")


def load(folder: Path, run_id: str) -> Frames:
    """The run's rows of every table. Raises UserError if a table has other columns than this version writes."""
    return {table: load_table(folder, run_id, table) for table in TABLES}


def load_table(folder: Path, run_id: str, table: str) -> pd.DataFrame:
    """The run's rows of one table. Raises UserError if it is damaged or has other columns than this version writes."""
    path, columns = folder / f"{table}.csv", TABLES[table]
    check_table(path, columns)
    words, flags = words_of(table), flags_of(table)
    frame = pd.DataFrame(columns=list(columns))
    with mistakes(ValueError, about=f"{path} is damaged"):
        if lines := whole_lines(path):
            frame = pd.read_csv(io.StringIO(lines), keep_default_na=False, dtype=dict.fromkeys([*words, *flags], str))
    frame = frame[frame["run_id"] == run_id]
    numbers = [column for column in columns if column not in (*words, *flags)]
    return frame.assign(
        **{column: pd.to_numeric(frame[column], errors="coerce") for column in numbers},
        **{column: frame[column] == "True" for column in flags},
    )


def latest(folder: Path, table: str, cut_off: bool = False) -> tuple[str, pd.DataFrame] | None:
    """run_id and rows of the newest finished run that has rows in that table, or of one that was cut off if those count
    too; None if there is none."""
    runs = [run_id for run_id, run in load_runs(folder).items() if cut_off or "finished" in run]
    for run_id in reversed(runs):
        if len(frame := load_table(folder, run_id, table)):
            return run_id, frame
    return None


def newest_gpu_run(folder: Path) -> str | None:
    """The newest run with times of a GPU, finished or not; where there are none, with any rows of a GPU."""
    found = (latest(folder, table, cut_off=True) for table in GPU_TABLES)
    return next((run_id for run_id, _ in filter(None, found)), None)


def over_layers(errors: pd.DataFrame, reference: str, column: str) -> pd.Series:
    """Plan -> a column of K's errors (of the plan's spec) over all layers: the rms of an rms, the mean of all else."""
    by_plan = _of_k(errors, reference).groupby("plan")[column]
    return by_plan.apply(lambda v: (v**2).mean() ** 0.5) if column.endswith("rms") else by_plan.mean()


def of_one_layer(errors: pd.DataFrame, reference: str, column: str) -> pd.DataFrame:
    """Plan -> min and max of the same over layers."""
    return _of_k(errors, reference).groupby("plan")[column].agg(["min", "max"])


def _of_k(errors: pd.DataFrame, reference: str) -> pd.DataFrame:
    of_spec = (errors["reference"] == reference) & (errors["backend"] == Backend.SPEC)
    return errors[of_spec & (errors["output"] == "k")]


def differing(eager: pd.DataFrame, backend: str, plan: str = "") -> tuple[float, float] | None:
    """Least and greatest share of K's elements in which that backend (a plan's spec, if one is named) differs from
    eager, over layers and the instruction sets that the CPU played; None without such rows."""
    rows = eager[(eager["backend"] == backend) & (eager["status"] == "ok")]
    shares = 1 - rows[rows["plan"] == plan if plan else rows["plan"] != ""]["share_equal"]
    return (shares.min(), shares.max()) if len(shares) else None


def between_machines(eager: pd.DataFrame) -> pd.Series:
    """Plan -> by how much the share of K's elements that equal eager's, mean over layers, moves with the instruction
    set."""
    rows = eager[(eager["backend"] == Backend.SPEC) & (eager["status"] == "ok")]
    by_isa = rows.groupby(["plan", "isa"])["share_equal"].mean().groupby("plan")
    return by_isa.max() - by_isa.min()


def instruction_sets(eager: pd.DataFrame) -> list[str]:
    """Those that the CPU played."""
    return sorted(set(eager.loc[eager["status"] == "ok", "isa"]))


def best_backend(speed: pd.DataFrame) -> str:
    """What runs a plan in tables of times: compiled Triton where it was timed, else Inductor."""
    return Backend.TRITON if (speed["backend"] == Backend.TRITON).any() else Backend.INDUCTOR
