"""The report's section on a run of `make gpu`: one table, one plot, the checks. What has no time is there with its
reason."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pandas as pd

from castpoint.harness.problems import grid
from castpoint.harness.report import gpu_rows
from castpoint.harness.report.gpu_rows import GROUPS, LOOP, P1, P2, P4, POINT, Run, plain, speedup, times
from castpoint.harness.report.markdown import markdown
from castpoint.harness.runs.schema import Check

COLUMNS = {P1: "P1: best separate chain", P4: "P4: bare matmul", P2: "P2: torch.compile", LOOP: LOOP}
REGIMES = (grid.COLD, grid.ROPE, grid.HOT, grid.LAYERS)
HEADING = "On a GPU"


def section(folder: Path) -> str:
    """Of report.md, on the newest finished GPU run of the folder, with the plot where it was drawn before; empty where
    there is none."""
    run = gpu_rows.newest(folder)
    if run is None:
        return ""
    lost = without_time(run)
    parts = [f"## {HEADING}\n\n{conditions(run)}", HOW_TO_READ, markdown(speed_table(run))]
    if (folder / "plots" / "gpu_speedup.png").exists():
        parts.append("![speed-up over the best separate chain](plots/gpu_speedup.png)")
    parts += ["### Without a time", markdown(lost) if len(lost) else "Nothing: every arm that was tried has a time."]
    checks = markdown(check_table(run.checks)) if len(run.checks) else "Not measured in this run."
    return "\n\n".join([*parts, "### Checks", HOW_CHECKED, checks])


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


def speed_table(run: Run) -> pd.DataFrame:
    """One row a point that was measured or tried, in the order of the grid."""
    tried = pd.concat([run.speed[POINT], run.points[POINT]]).drop_duplicates()
    models = [*grid.MODELS, *sorted(set(tried["model"]) - set(grid.MODELS))]
    points = sorted(tried.itertuples(index=False), key=lambda p: (REGIMES.index(p[2]), models.index(p[0]), p[1]))
    lines = []
    for point in points:
        rows = _at(run.speed, *point)
        warm = " (not cold)" if point[2] != grid.HOT and not rows["cold"].all() else ""
        cells = {COLUMNS.get(what, what): cell(run, *point, what) for what in (*COLUMNS, *GROUPS)}
        lines.append({"weights": f"{point[2]}{warm}", "model": point[0], "tokens": f"{point[1]:.0f}", **cells})
    return pd.DataFrame(lines)


def cell(run: Run, model: str, tokens: float, regime: str, what: str) -> str:
    """A best row in a few words, or why there is none; a dash for what has no row."""
    row = run.at(model, tokens, regime, what)
    if row is None:
        return _missing(run, model, tokens, regime, what)
    us = f"{gpu_rows.micros(row['p50_us'])} µs"
    if what in (P1, P4):
        return f"{us}: {plain(row['arm'].removeprefix(what).strip())}"
    p4 = "" if pd.isna(row["against_p4"]) else f", {times(row['against_p4'])} of P4"
    if what == LOOP:
        return f"{us}{p4}; {row['arm'].removeprefix(LOOP).strip()}"
    if what == P2:
        return f"{us}, {speedup(row)}"
    return f"{us}, {speedup(row)}{p4}, roofline {row['roofline_share']:.0%}; {row['arm']}, {gpu_rows.launch_words(row)}"


def _missing(run: Run, model: str, tokens: float, regime: str, what: str) -> str:
    rows = _at(run.speed, model, tokens, regime)
    points = _at(run.points, model, tokens, regime)
    for failed in (rows[rows["what"] == what], points[points["status"] != "ok"]):
        if len(failed):
            said = f"{failed['status'].iloc[0]}: {plain(failed['reason'].iloc[0])}"
            return textwrap.shorten(said, 80, placeholder=" …")
    return "–"


def _at(frame: pd.DataFrame, model: str, tokens: float, regime: str) -> pd.DataFrame:
    return frame[(frame["model"] == model) & (frame["tokens"] == tokens) & (frame["regime"] == regime)]


def without_time(run: Run) -> pd.DataFrame:
    """Every arm that has no time, its status and reason, and at how many points."""
    rows = run.speed[run.speed["status"] != "ok"]
    points = run.points[run.points["status"] != "ok"].assign(arm="the whole point")
    lines = []
    for (arm, status, reason), group in pd.concat([rows, points]).groupby(["arm", "status", "reason"], sort=False):
        first = [f"{r.model} {r.tokens:.0f} {r.regime}" for r in group[POINT].head(3).itertuples()]
        where = ", ".join(first) + (f" and {len(group) - 3} more" if len(group) > 3 else "")
        lines.append({"arm": plain(arm), "status": status, "reason": plain(reason), "at": where})
    return pd.DataFrame(lines)


# ---------------------------------------------------------------- conditions


def conditions(run: Run) -> str:
    """GPU, versions, how much of the grid was tried, what the GPU can do at most, and what state it was in."""
    e = run.facts["environment"]
    gpu, versions = e.get("gpu", {}), e.get("versions", {})
    tried = len(pd.concat([run.speed[POINT], run.points[POINT]]).drop_duplicates())
    facts = [
        f"{gpu.get('multiprocessors', '?')} processors",
        f"L2 {gpu.get('l2_bytes', 0) / 1e6:.0f} MB",
        f"driver {gpu.get('driver', 'not recorded')}",
        f"CUDA {gpu.get('cuda', '?')}",
        *(f"{name} {versions[name]}" for name in ("torch", "triton") if versions.get(name)),
        f"commit {e.get('commit', 'unknown')}",
        f"run {run.run_id}",
    ]
    return (
        f"{run.gpu}: {', '.join(facts)}. Of the grid's {len(grid.points())} points {tried} were tried. "
        f"{_limits(run.facts.get('limits', {}))} {_state(run.speed)}"
    )


def _limits(limits: dict[str, Any]) -> str:
    """What was measured of the GPU itself; the reason where it was not."""
    read, launch, reason = limits.get("read", {}), limits.get("launch", {}), limits.get("reason")
    measured = (
        ("copy", limits.get("copy_bytes_per_s"), 1e-12, "TB/s", reason),
        ("reading", read.get("bytes_per_s"), 1e-12, "TB/s", read.get("unknown")),
        ("bf16 matmul", limits.get("bf16_flops_per_s"), 1e-12, "TFLOP/s", reason),
        ("an empty kernel in a graph", launch.get("per_kernel_s"), 1e6, "µs", launch.get("unknown")),
        ("replaying a graph", launch.get("per_replay_s"), 1e6, "µs", launch.get("unknown")),
    )
    said = [
        f"{name} not measured ({why or 'not tried'})" if value is None else f"{name} {value * scale:.3g} {unit}"
        for name, value, scale, unit, why in measured
    ]
    return f"Limits, measured in the same run: {', '.join(said)}. The roofline takes the faster of copying and reading."


def _state(speed: pd.DataFrame) -> str:
    """Clocks, power and throttling over all rows; rows faster than the roofline, whose limits then were too low."""
    said = []
    for column, unit in (("sm_mhz", "MHz"), ("watts", "W"), ("celsius", "°C")):
        values = speed[column].dropna()
        if len(values):
            said.append(f"{values.min():.0f} to {values.max():.0f} {unit}")
    slowed = speed[~speed["slowed_by"].isin(["", "none"])]["slowed_by"].value_counts()
    reasons = ", ".join(f"{count} rows by {reason}" for reason, count in slowed.items()) or "none"
    unknown = int((speed["slowed_by"] == "").sum())
    reasons += f" ({unknown} of {len(speed)} rows do not say)" if unknown else ""
    above = int((speed["roofline_share"] > 1).sum())
    too_low = f" **{above} rows are faster than this roofline**: its limits were measured too low." if above else ""
    return f"Under load: {', '.join(said) or 'clocks not recorded'}; slowed down: {reasons}.{too_low}"


# ---------------------------------------------------------------- checks


HOW_CHECKED = (
    "What had to hold before a time counted: each plan as every config that a launch may take, and our own loop, equal "
    "to its spec in every bit on inputs whose sums are exact (`exact`), inside its `envelope` on drawn ones. Beside "
    "them what the GPU's own arithmetic does: `eager` against the spec of `hf`, by what cuBLAS may do with partial "
    "sums, and compiled kernels against the `interpreter`, where only the order of sums differs."
)


def check_table(checks: pd.DataFrame) -> pd.DataFrame:
    """Each check of each plan by what it found; configs that found the same are counted together."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in checks.itertuples():
        said = row.status if row.status == "ok" else f"{row.status}: {plain(row.reason)}"
        if row.status == "ok" and row.check not in (Check.EXACT, Check.ENVELOPE):
            said = f"{row.share_equal:.4%} of bits equal, at most {row.max_ulp:.4g} ulp"
        more = ", RoPE" * bool(row.rope) + ", 1 token" * (row.tokens == 1)
        found.setdefault((row.check, row.plan, said), []).append(plain(row.config) + more)
    lines = []
    for (check, plan, said), configs in found.items():
        many = said == "ok" and len(configs) > 2
        named = f"{configs[0]} and {len(configs) - 1} others" if many else "; ".join(configs)
        lines.append({"check": check, "plan": plan, "configs": named, "found": said})
    return pd.DataFrame(lines)
