"""The report's section on a run of `make gpu`: one table, one plot (gpu_plots), the checks.

Of a point (a model, a number of tokens, a regime of weights) one row of each kind counts, the fastest; HOW_TO_READ says
which kinds there are. Our plans are different numerical functions, so that the plan is named wherever its time is.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from castpoint.harness.problems import grid
from castpoint.harness.report.failures import BAD
from castpoint.harness.report.markdown import markdown, paragraphs, under
from castpoint.harness.runs.frames import Frames, latest, load
from castpoint.harness.runs.records import load_runs
from castpoint.harness.runs.schema import Check, Kind
from castpoint.variants.catalogue import PLANS

EXACT, DEFERRED, FOLDED = GROUPS = ("exact", "deferred", "folded")
P1, P2, P4, LOOP = "P1", "P2", "P4", "own loop"
WIN, LOSS, NOISE = VERDICTS = ("win", "loss", "noise")
POINT = ["model", "tokens", "regime"]
HEADING = "On a GPU"


@dataclass(frozen=True)
class Run:
    """One run of `make gpu`: its entry of environment.json, its records. speed: of times; best: see best_rows."""

    run_id: str
    facts: dict[str, Any]
    frames: Frames
    speed: pd.DataFrame
    best: pd.DataFrame

    @property
    def gpu(self) -> str:
        return self.facts["environment"].get("gpu", {}).get("name", "unknown GPU")


def newest(folder: Path) -> Run | None:
    """The newest finished run with times of a GPU, or None."""
    if not (found := latest(folder, "gpu_speed")):
        return None
    run_id, speed = found
    speed = speed.assign(what=[*map(what_of, speed["kind"], speed["arm"])])
    return Run(run_id, load_runs(folder)[run_id], load(folder, run_id), speed, best_rows(speed))


def section(folder: Path) -> str:
    """Of report.md, on the newest finished GPU run of the folder, with the plot where it was drawn before; empty where
    there is none."""
    if not (run := newest(folder)):
        return ""
    table, said = speed_table(run), f"### Checks\n\n{HOW_CHECKED}"
    drawn = (folder / "plots" / "gpu_speedup.png").exists()
    plot = "![speed-up over the best separate chain](plots/gpu_speedup.png)" if drawn else ""
    checks = under(said, check_table(run.frames["gpu_checks"])) or f"{said}\n\nNot measured in this run."
    words = f"## {HEADING}\n\n{conditions(run, len(table))}\n\n{HOW_TO_READ}"
    return paragraphs(words, markdown(table), untried(run), plot, checks)


# ---------------------------------------------------------------- judging


def what_of(kind: str, arm: str) -> str:
    """What an arm is compared as: P1, P2, P4, LOOP or one of GROUPS; empty for all else (other parts, eager, plans with
    operands wider than bf16, which are no match for a bf16 matmul)."""
    if kind == Kind.OWN and arm in PLANS and PLANS[arm].plan.matmul == "bf16":
        return {"prologue": EXACT, "epilogue": DEFERRED, "folded": FOLDED}[PLANS[arm].plan.scale]
    return {Kind.CHAIN: P1, Kind.COMPILED: P2, Kind.MATMUL: P4, Kind.LOOP: LOOP}.get(kind, "")


def best_rows(speed: pd.DataFrame) -> pd.DataFrame:
    """The fastest row of each point and `what`, by its median, indexed by (model, tokens, regime, what), with its
    verdict; p1_arm, p1_p10_us …, p4_p50_us: of the point's P1 and P4.

    speed: rows of gpu_speed with the column `what`.
    """
    timed = speed[(speed["status"] == "ok") & speed["p50_us"].notna() & (speed["what"] != "")]
    timed = timed.assign(other=timed["arm"] != timed["p1"])  # of chains that tie the one that speed-ups are over
    best = timed.sort_values(["p50_us", "other"], kind="stable").drop_duplicates([*POINT, "what"])
    for what in (P1, P4):
        beside = best[best["what"] == what].set_index(POINT)[["arm", "p10_us", "p50_us", "p90_us"]]
        best = best.join(beside.add_prefix(f"{what.lower()}_"), on=POINT)
    best["verdict"] = [verdict(row) for _, row in best.iterrows()]
    return best.set_index([*POINT, "what"], drop=False).sort_index().rename_axis([None] * 4)


def verdict(row: pd.Series) -> str:
    """win, loss or noise; else why the speed-up cannot be judged, beginning with `not judged`.

    noise: the median lies within p10 to p90 of two graphs of the same call, or between them and 1. A median ratio that
    both arms' p10 and p90 do not allow does not belong to these times (1e-5: six digits are recorded).
    """
    speedup = row["speedup_p1_p50"]
    if row["p1"] != row["p1_arm"]:
        return "not judged: no P1" if pd.isna(row["p1_arm"]) else "not judged: not over the best P1"
    if not row["p1_p10_us"] / row["p90_us"] < speedup * (1 + 1e-5) < row["p1_p90_us"] / row["p10_us"] * (1 + 2e-5):
        return "not judged: the speed-up contradicts the times"
    if pd.isna(row["noise_p10"]) or pd.isna(row["noise_p90"]):
        return "not judged: no noise floor"
    if speedup > max(row["noise_p90"], 1):
        return WIN
    return LOSS if speedup < min(row["noise_p10"], 1) else NOISE


def judged(run: Run, model: str, what: str) -> pd.DataFrame:
    """Best rows of that kind over tokens, weights from memory, whose speed-up counts."""
    rows = run.best.query("model == @model and what == @what and regime == 'cold' and cold")
    return rows[rows["verdict"].isin(VERDICTS)].sort_values("tokens")


# ---------------------------------------------------------------- times


HOW_TO_READ = (
    "P1: the fastest chain of separate kernels, norm + matmul + head norm. P4: the fastest bare matmul, norms for "
    "free. P2: torch.compile with all its tuning. Own loop: our kernel's main loop with nothing before and behind; "
    "where it is slower than P1, no fusion around it pays. exact, deferred, folded: our fastest plan of several that "
    "apply rstd before the matmul, after it, or after it with the norm's weight folded in; `separate` is no fused "
    "kernel. All are CUDA graphs, timed in turns; a speed-up is the median over rounds of P1's time over the arm's in "
    "the same round (p10–p90). **win** and **loss** lie outside the noise, the same ratio of two graphs of one call "
    "(p10 to p90, widened to 1), **noise** inside. Roofline: least bytes or FLOPs at the limits above. Weights: "
    "`cold` rotate over three times the L2, `rope` the same with q and k rotated, `hot` are one, `layers` a model's, "
    "one after the other."
)
COLUMNS = {P1: "P1: best separate chain", P4: "P4: bare matmul", P2: "P2: torch.compile", LOOP: LOOP}
COLUMNS |= {group: group for group in GROUPS}
ORDER = {word: place for place, word in enumerate((grid.COLD, grid.ROPE, grid.HOT, grid.LAYERS, *grid.MODELS))}


def speed_table(run: Run) -> pd.DataFrame:
    """One row a point that was tried: of each kind the best row; else why it has no time, or a dash."""
    cells = {key: cell(row) for key, row in run.best.iterrows()}
    rows = pd.concat([run.speed, run.frames["gpu_points"].assign(what="point")])
    for _, row in rows[rows["status"] != "ok"].iterrows():
        said = textwrap.shorten(f"{row['status']}: {row['reason']}", 80, placeholder=" …")
        cells.setdefault((*row[POINT], row["what"]), said)
    warm = set(run.speed[~run.speed["cold"]][POINT].itertuples(index=False, name=None))
    order = {
        "by": ["regime", "model", "tokens"],
        "key": lambda column: column if column.name == "tokens" else column.map(ORDER),
    }
    lines = []
    for point in rows[POINT].drop_duplicates().sort_values(**order).itertuples(index=False, name=None):
        model, tokens, regime = point
        weights = f"{regime} (not cold)" if regime != grid.HOT and point in warm else regime
        found = {head: cells.get((*point, what), cells.get((*point, "point"), "–")) for what, head in COLUMNS.items()}
        lines.append({"weights": weights, "model": model, "tokens": f"{tokens:.0f}", **found})
    return pd.DataFrame(lines)


def cell(row: pd.Series) -> str:
    """A best row in a few words: its time, over P1, over P4, of the roofline, and what it is."""
    what, arm = row["what"], row["arm"]
    said = [f"{row['p50_us']:,.0f} µs" if row["p50_us"] >= 1000 else f"{row['p50_us']:.3g} µs"]
    if what in (P2, *GROUPS):
        low, middle, high = (times(row[f"speedup_p1_{name}"]) for name in ("p10", "p50", "p90"))
        judgement = row["verdict"]
        said.append(f"{middle} × ({low}–{high}) **{judgement}**" if judgement in VERDICTS else judgement)
    if what in (LOOP, *GROUPS) and pd.notna(row["p4_p50_us"]):
        said.append(f"{times(row['p50_us'] / row['p4_p50_us'])} of P4")
    if what in GROUPS:
        said.append(f"roofline {row['roofline_share']:.0%}")
        arm += f", {row['kernel']}" + (f" after {row['prepass']}" if row["prepass"] not in ("", "none") else "")
    return f"{', '.join(said)}; {arm if what in GROUPS else arm.removeprefix(what).strip()}"


def times(value: float) -> str:
    """Three decimals near 1, where two would hide which side it is on."""
    return f"{value:.3f}" if abs(value - 1) < 0.1 else f"{value:.2f}"


def untried(run: Run) -> str:
    """Arms without a time that did not fail, where there are any; what failed is listed with all else that failed."""
    rows = run.speed[~run.speed["status"].isin(["ok", *BAD])]
    counted = rows.groupby(["arm", "status", "reason"], sort=False).size()
    said = [f"{arm} ({status} at {count} points: {reason})" for (arm, status, reason), count in counted.items()]
    return f"Without a time: {'; '.join(said)}." if said else ""


# ---------------------------------------------------------------- conditions

# Of timing.limits, what was measured of the GPU itself: words, where it stands, scale and unit.
LIMITS = (
    ("copy", "", "copy_bytes_per_s", 1e-12, "TB/s"),
    ("reading", "read", "bytes_per_s", 1e-12, "TB/s"),
    ("bf16 matmul", "", "bf16_flops_per_s", 1e-12, "TFLOP/s"),
    ("an empty kernel in a graph", "launch", "per_kernel_s", 1e6, "µs"),
    ("replaying a graph", "launch", "per_replay_s", 1e6, "µs"),
)
STATE = {"sm_mhz": "MHz", "watts": "W", "celsius": "°C"}


def conditions(run: Run, tried: int) -> str:
    """GPU, versions, how many points of the grid were tried, what the GPU can do at most, and what state it was in."""
    e, speed = run.facts["environment"], run.speed
    gpu, limits = e.get("gpu", {}), run.facts.get("limits", {})
    measured = []
    for name, part, column, scale, unit in LIMITS:
        found = limits.get(part, {}) if part else limits
        value, why = found.get(column), found.get("unknown") or found.get("reason") or "not tried"
        measured.append(f"{name} not measured ({why})" if value is None else f"{name} {value * scale:.3g} {unit}")
    ranges = {unit: speed[name].dropna() for name, unit in STATE.items()}
    state = [f"{seen.min():.0f} to {seen.max():.0f} {unit}" for unit, seen in ranges.items() if len(seen)]
    reasons = speed["slowed_by"].value_counts().drop("none", errors="ignore")
    slowed = [f"{count} rows {'by ' + reason if reason else 'do not say'}" for reason, count in reasons.items()]
    above = int((speed["roofline_share"] > 1).sum())
    too_low = f" **{above} rows are faster than this roofline**: its limits were measured too low." if above else ""
    return (
        f"{run.gpu}: {gpu.get('multiprocessors', '?')} processors, L2 {gpu.get('l2_bytes', 0) / 1e6:.0f} MB, driver "
        f"{gpu.get('driver', 'not recorded')}, CUDA {gpu.get('cuda', '?')}, torch {e['versions']['torch']}, triton "
        f"{e['versions']['triton']}, commit {e.get('commit', 'unknown')}, run {run.run_id}. Of the grid's "
        f"{len(grid.points())} points {tried} were tried. Limits, measured in the same run: {', '.join(measured)}. The "
        f"roofline takes the faster of copying and reading. Under load: {', '.join(state) or 'clocks not recorded'}; "
        f"slowed down: {', '.join(slowed) or 'none'}.{too_low}"
    )


# ---------------------------------------------------------------- checks


HOW_CHECKED = (
    "What had to hold before a time counted: each plan as every config that a launch may take, and our own loop, equal "
    "to its spec in every bit on inputs whose sums are exact (`exact`), inside its `envelope` on drawn ones. Beside "
    "them what the GPU's own arithmetic does: `eager` against the spec of `hf`, by what cuBLAS may do with partial "
    "sums, and compiled kernels against the `interpreter`, where only the order of sums differs."
)


def check_table(checks: pd.DataFrame) -> pd.DataFrame:
    """Each check of each plan by what it found; configs that found the same together, of many `ok` the first."""
    found = checks["status"].where(checks["status"] == "ok", checks["status"] + ": " + checks["reason"])
    equal = [f"{row.share_equal:.4%} of bits equal, at most {row.max_ulp:.4g} ulp" for row in checks.itertuples()]
    found = found.where((found != "ok") | checks["check"].isin([Check.EXACT, Check.ENVELOPE]), equal)
    more = checks["rope"].map({True: ", RoPE", False: ""}) + checks["tokens"].map({1: ", 1 token"}).fillna("")
    groups = checks.assign(configs=checks["config"] + more, found=found).groupby(["check", "plan", "found"], sort=False)
    named = groups["configs"].agg(list).reset_index()
    many = (named["found"] == "ok") & (named["configs"].str.len() > 2)
    short = [f"{configs[0]} and {len(configs) - 1} others" for configs in named["configs"]]
    named["configs"] = named["configs"].str.join("; ").mask(many, short)
    return named[["check", "plan", "configs", "found"]]
