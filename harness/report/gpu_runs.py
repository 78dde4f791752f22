"""The GPU run that a report shows, and what its times are worth against one another.

Of a point (a model, a number of tokens, a regime of weights) one row of each kind counts, the fastest. Arms that were
timed in turns, in one step at one point, are comparable, and no others: P1 and P4 are those of the row's own step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from castpoint.harness.problems import grid
from castpoint.harness.runs.frames import Frames, load, newest_gpu_run
from castpoint.harness.runs.records import load_runs
from castpoint.harness.runs.words import Kind, Step
from castpoint.variants.catalogue import PLANS

EXACT, DEFERRED, FOLDED = GROUPS = ("exact", "deferred", "folded")
P1, P2, P4, LOOP = "P1", "P2", "P4", "own loop"
LAUNCHES = "P4 and empty kernels"
WIN, LOSS, NOISE = VERDICTS = ("win", "loss", "noise")
POINT = ["model", "tokens", "regime"]
MEASURED = [*POINT, "step"]  # what is timed in turns


@dataclass(frozen=True)
class Run:
    """One GPU run: its entry of environment.json, its records. speed: of times; best: see best_rows."""

    run_id: str
    facts: dict[str, Any]
    frames: Frames
    speed: pd.DataFrame
    best: pd.DataFrame

    @property
    def gpu(self) -> str:
        return self.facts["environment"].get("gpu", {}).get("name", "unknown GPU")

    @property
    def cut_off(self) -> bool:
        return "finished" not in self.facts

    @property
    def reached(self) -> str:
        """`31 of 152 points`: those of the grid whose chains were timed, or tried."""
        chains = self.speed[self.speed["step"] == Step.CHAINS]
        return f"{len(chains[POINT].drop_duplicates())} of {len(grid.points())} points"


def newest(folder: Path) -> Run | None:
    """The folder's newest run with times of a GPU, finished or not; without any, with other rows of one; or None."""
    if not (run_id := newest_gpu_run(folder)):
        return None
    frames = load(folder, run_id)
    speed = frames["gpu_speed"]
    functions = speed["function"].where(speed["function"] != "", speed["arm"])
    speed = speed.assign(what=[*map(what_of, speed["kind"], functions)])
    return Run(run_id, load_runs(folder)[run_id], frames, speed, best_rows(speed))


def what_of(kind: str, function: str) -> str:
    """What an arm is compared as: P1, P2, P4, LAUNCHES, LOOP or one of GROUPS; empty for all else (other parts, eager,
    plans with operands wider than bf16, which are no match for a bf16 matmul)."""
    if kind == Kind.OWN and function in PLANS and PLANS[function].plan.matmul == "bf16":
        return {"prologue": EXACT, "epilogue": DEFERRED, "folded": FOLDED}[PLANS[function].plan.scale]
    shown = {Kind.CHAIN: P1, Kind.COMPILED: P2, Kind.MATMUL: P4, Kind.LAUNCHES: LAUNCHES, Kind.LOOP: LOOP}
    return shown.get(kind, "")


def best_rows(speed: pd.DataFrame) -> pd.DataFrame:
    """The fastest row of each point and `what`, by its median, indexed by (model, tokens, regime, what), with its
    verdict; p1_arm, p1_p10_us …, p4_p90_us: of the fastest P1 and P4 in the row's step.

    speed: rows of gpu_speed with the column `what`.
    """
    timed = speed[(speed["status"] == "ok") & speed["p50_us"].notna() & (speed["what"] != "")]
    for what, named in ((P1, "p1"), (P4, "p4")):
        first = _fastest(timed[timed["what"] == what], MEASURED, named).set_index(MEASURED)
        beside = first[["arm", "p10_us", "p50_us", "p90_us"]].add_prefix(f"{named}_")
        timed = timed.merge(beside.reset_index(), on=MEASURED, how="left")
    best = _fastest(timed, [*POINT, "what"], "p1")
    best["verdict"] = [verdict(row) for _, row in best.iterrows()]
    return best.set_index([*POINT, "what"], drop=False).sort_index().rename_axis([None] * 4)


def _fastest(rows: pd.DataFrame, of: list[str], named: str) -> pd.DataFrame:
    """The fastest row of each group; of arms that tie the one that ratios in that column are over."""
    rows = rows.assign(other=rows["arm"] != rows[named]).sort_values(["p50_us", "other"], kind="stable")
    return rows.drop_duplicates(of).drop(columns="other")


def verdict(row: pd.Series) -> str:
    """win, loss or noise; else why the speed-up cannot be judged, beginning with `not judged`.

    noise: the median lies within p10 to p90 of two graphs of the same call, or between them and 1; or its own p10 to
    p90 holds 1. By one of the two alone, some of many arms that are all alike would win or lose.
    """
    speedup = row["speedup_p1_p50"]
    if row["p1"] != row["p1_arm"]:
        return "not judged: no P1" if pd.isna(row["p1_arm"]) else "not judged: not over the best P1"
    if not _allowed(speedup, row[["p1_p10_us", "p1_p90_us"]], row[["p10_us", "p90_us"]]):
        return "not judged: the speed-up contradicts the times"
    if pd.isna(row["noise_p10"]) or pd.isna(row["noise_p90"]):
        return "not judged: no noise floor"
    if speedup > max(row["noise_p90"], 1) and row["speedup_p1_p10"] > 1:
        return WIN
    return LOSS if speedup < min(row["noise_p10"], 1) and row["speedup_p1_p90"] < 1 else NOISE


def of_p4(row: pd.Series) -> str:
    """The arm's time over the best bare matmul's, in words; empty where it was not measured beside one."""
    if pd.isna(row["over_p4_p50"]):
        return ""
    if row["p4"] != row["p4_arm"]:
        return "not over the best P4"
    if not _allowed(row["over_p4_p50"], row[["p10_us", "p90_us"]], row[["p4_p10_us", "p4_p90_us"]]):
        return "time over P4's contradicts the times"
    return f"{times(row['over_p4_p50'])} of P4"


def _allowed(ratio: float, over: pd.Series, under: pd.Series) -> bool:
    """Whether the median of ratios belongs to times with these p10 and p90 (1e-5: six digits are recorded)."""
    (low, high), (least, most) = over, under
    return low / most < ratio * (1 + 1e-5) < high / least * (1 + 2e-5)


def times(value: float) -> str:
    """Three decimals near 1, where two would hide which side it is on."""
    return f"{value:.3f}" if abs(value - 1) < 0.1 else f"{value:.2f}"


def judged(run: Run, model: str, what: str) -> pd.DataFrame:
    """Best rows of that kind over tokens, weights from memory, whose speed-up counts."""
    rows = run.best.query("model == @model and what == @what and regime == 'cold' and cold")
    return rows[rows["verdict"].isin(VERDICTS)].sort_values("tokens")
