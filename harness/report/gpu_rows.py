"""What `make gpu` measured: one row a point and kind, judged against P1, and the words for them.

Of a point (a model, a number of tokens, a regime of weights) one row each counts: the fastest separate chain, P1; the
fastest of torch.compile, P2; the fastest bare matmul, P4; the fastest tile of our own loop, the same matmul; and our
fastest plan of each group. The groups are different numerical functions (`exact` applies rstd before the matmul, as
models do; `deferred` and `folded` after it), so that the plan is named wherever its time is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from castpoint.harness.problems import grid
from castpoint.harness.runs.frames import latest, load
from castpoint.harness.runs.records import load_runs
from castpoint.harness.runs.schema import Kind
from castpoint.variants.catalogue import PLANS

EXACT, DEFERRED, FOLDED = GROUPS = ("exact", "deferred", "folded")
P1, P2, P4, LOOP = "P1", "P2", "P4", "own loop"
WIN, LOSS, NOISE = "win", "loss", "noise"
POINT = ["model", "tokens", "regime"]


@dataclass(frozen=True)
class Run:
    """One run of `make gpu`: its entry of environment.json, and its rows. best: see best_rows."""

    run_id: str
    facts: dict[str, Any]
    speed: pd.DataFrame
    points: pd.DataFrame
    checks: pd.DataFrame
    best: pd.DataFrame

    @property
    def gpu(self) -> str:
        return self.facts["environment"].get("gpu", {}).get("name", "unknown GPU")

    def at(self, model: str, tokens: int, regime: str, what: str) -> pd.Series | None:
        """The best row of that kind, or None."""
        key = (model, tokens, regime, what)
        return self.best.loc[key] if key in self.best.index else None


def newest(folder: Path) -> Run | None:
    """The newest finished run with times of a GPU, or None."""
    found = latest(folder, "gpu_speed")
    return run_of(folder, found[0]) if found else None


def run_of(folder: Path, run_id: str) -> Run:
    """The run of that id. Raises KeyError where the folder has none."""
    frames = load(folder, run_id)
    speed = frames["gpu_speed"]
    speed = speed.assign(what=[what_of(kind, arm) for kind, arm in zip(speed["kind"], speed["arm"], strict=True)])
    facts = load_runs(folder)[run_id]
    return Run(run_id, facts, speed, frames["gpu_points"], frames["gpu_checks"], best_rows(judged_rows(speed)))


# ---------------------------------------------------------------- judging


def what_of(kind: str, arm: str) -> str:
    """What an arm is compared as: P1, P2, P4, LOOP or one of GROUPS; empty for all else (other parts, eager, wider
    operands)."""
    if kind == Kind.OWN:
        return group_of(arm)
    return {Kind.CHAIN: P1, Kind.COMPILED: P2, Kind.MATMUL: P4, Kind.LOOP: LOOP}.get(kind, "")


def group_of(plan: str) -> str:
    """The plan's group; empty for plans with operands wider than bf16, which are no match for a bf16 matmul."""
    if plan not in PLANS or PLANS[plan].plan.matmul != "bf16":
        return ""
    return {"prologue": EXACT, "epilogue": DEFERRED, "folded": FOLDED}[PLANS[plan].plan.scale]


def judged_rows(speed: pd.DataFrame) -> pd.DataFrame:
    """Every row with a time, the fastest first, with against_p4, its time over P4's, and its verdict.

    speed: rows of gpu_speed with the column `what`.
    """
    timed = speed[(speed["status"] == "ok") & speed["p50_us"].notna()].sort_values("p50_us", kind="stable")
    fastest: dict[tuple, float] = {}
    chains: dict[tuple, Any] = {}
    for row in timed[[*POINT, "what", "arm", "p10_us", "p50_us", "p90_us"]].itertuples(index=False):
        fastest.setdefault((*row[:3], row.what), row.p50_us)
        chains[(*row[:3], row.arm)] = row
    p4, verdicts = [], []
    for _, row in timed.iterrows():
        point = tuple(row[POINT])
        p4.append(row["p50_us"] / fastest.get((*point, P4), math.nan))
        verdicts.append(verdict(row, chains.get((*point, row["p1"])), fastest.get((*point, P1))))
    return timed.assign(against_p4=p4, verdict=verdicts)


def best_rows(timed: pd.DataFrame) -> pd.DataFrame:
    """The fastest row of each point and `what`, by its median, indexed by (model, tokens, regime, what)."""
    key = [*POINT, "what"]
    best = timed[timed["what"] != ""].drop_duplicates(key)
    return best.set_index(key, drop=False).sort_index().rename_axis([None] * len(key))


def verdict(row: pd.Series, p1: Any, best_us: float | None) -> str:
    """win, loss or noise; else why the speed-up cannot be judged, beginning with `not judged`.

    noise: the median lies within p10 to p90 of two graphs of the same call, or between them and 1.
    p1: the row that the speed-up is over, if it has a time; best_us: the fastest P1.

    At least 80 % of rounds lie within p10 to p90 of an arm, so 60 % of their ratios within the interval that the
    borders make: a median ratio outside it does not belong to these times (1e-5: six digits are recorded).
    """
    if best_us is None or pd.isna(row["speedup_p1_p50"]):
        return "not judged: no P1"
    if p1 is None:
        return "not judged: its P1 has no valid time"
    if p1.p50_us > best_us:
        return "not judged: another P1 was faster"
    low, high = p1.p10_us / row["p90_us"], p1.p90_us / row["p10_us"]
    if not low * (1 - 1e-5) <= row["speedup_p1_p50"] <= high * (1 + 1e-5):
        return "not judged: the speed-up contradicts the times"
    if pd.isna(row["noise_p10"]) or pd.isna(row["noise_p90"]):
        return "not judged: no noise floor"
    if row["speedup_p1_p50"] > max(row["noise_p90"], 1):
        return WIN
    return LOSS if row["speedup_p1_p50"] < min(row["noise_p10"], 1) else NOISE


def judged(rows: pd.DataFrame) -> pd.DataFrame:
    """Those whose speed-up counts."""
    return rows[rows["verdict"].isin([WIN, LOSS, NOISE])]


def cold(run: Run, model: str, what: str) -> pd.DataFrame:
    """Best rows of that kind over tokens, weights from memory."""
    rows = run.best[(run.best["model"] == model) & (run.best["what"] == what) & (run.best["regime"] == grid.COLD)]
    return rows[rows["cold"]].sort_values("tokens")


# ---------------------------------------------------------------- words


def launch_words(row: pd.Series) -> str:
    """`fused after hidden`: the config without its tile."""
    return row["kernel"] + ("" if row["prepass"] in ("", "none") else f" after {row['prepass']}")


def plain(text: str) -> str:
    """Without the bars that would end a table's cell."""
    return text.replace(" | ", " + ").replace("|", "/")


def micros(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def times(value: float) -> str:
    """Three decimals near 1, where two would hide which side it is on."""
    return f"{value:.3f}" if abs(value - 1) < 0.1 else f"{value:.2f}"


def speedup(row: pd.Series) -> str:
    """`1.45 × (1.43–1.47) **win**`."""
    low, middle, high = (times(row[f"speedup_p1_{name}"]) for name in ("p10", "p50", "p90"))
    return f"{middle} × ({low}–{high}) **{row['verdict']}**" if row["verdict"] in (WIN, LOSS, NOISE) else row["verdict"]
