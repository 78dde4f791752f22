"""The report's section on a run of `make gpu`, and the README's table: what has no time is there with its reason."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from castpoint.harness.gpu import arms
from castpoint.harness.problems import grid
from castpoint.harness.report.gpu_goals import PREFILL, break_even, goals
from castpoint.harness.report.gpu_rows import (
    EXACT,
    GROUPS,
    P1,
    P2,
    P4,
    POINT,
    Run,
    counts,
    group_of,
    in_order,
    launch_words,
    micros,
    newest,
    plain,
    runs_of,
    speedup,
    times,
    together,
    what_of,
)
from castpoint.harness.report.markdown import markdown
from castpoint.harness.runs.schema import Check
from castpoint.variants.catalogue import PLANS

REGIMES = {
    grid.COLD: "Cold weights",
    grid.ROPE: "Cold weights, q and k rotated",
    grid.HOT: "Hot weights",
    grid.LAYERS: "A model's layers, one after the other",
}
NOT_MEASURED = "Not measured on a GPU yet: `make gpu`, on a machine with an NVIDIA H200, fills this table."


def regime_table(run: Run, regime: str) -> pd.DataFrame:
    """One row a point that was measured or tried."""
    columns = {"P1: best separate chain": P1, "P4: bare matmul": P4, "P2: torch.compile": P2}
    columns |= {group: group for group in GROUPS}
    tried = pd.concat([run.speed[POINT], run.points[POINT]])
    tried = tried[tried["regime"] == regime].drop_duplicates()
    lines = []
    for model in in_order(tried["model"]):
        for tokens in sorted(tried[tried["model"] == model]["tokens"]):
            rows = run.speed[_is(run.speed, model, tokens, regime)]
            warm = " (weights not cold)" if regime != grid.HOT and not rows["cold"].all() else ""
            cells = {heading: cell(run, model, tokens, regime, what) for heading, what in columns.items()}
            lines.append({"model": model, "tokens": f"{tokens:.0f}{warm}", **cells})
    table = pd.DataFrame(lines)
    return table.loc[:, [not (table[heading] == "–").all() for heading in table]]


def cell(run: Run, model: str, tokens: int, regime: str, what: str) -> str:
    """A best row in a few words, or why there is none; a dash for what the grid does not ask for."""
    row = run.at(model, tokens, regime, what)
    if row is None:
        return _missing(run, model, tokens, regime, what)
    us = f"{micros(row['p50_us'])} µs"
    if what in (P1, P4):
        return f"{us}: {plain(row['arm'].removeprefix(what).strip())}"
    if what == P2:
        return f"{us}, {speedup(row)}"
    p4 = "" if pd.isna(row["against_p4"]) else f", {times(row['against_p4'])} of P4"
    return f"{us}, {speedup(row)}{p4}, roofline {row['roofline_share']:.0%}; {row['arm']}, {launch_words(row)}"


def _missing(run: Run, model: str, tokens: int, regime: str, what: str) -> str:
    rows = run.speed[_is(run.speed, model, tokens, regime) & (run.speed["what"] == what)]
    if len(rows):
        return textwrap.shorten(f"{rows['status'].iloc[0]}: {plain(rows['reason'].iloc[0])}", 80, placeholder=" …")
    points = run.points[_is(run.points, model, tokens, regime) & (run.points["status"] != "ok")]
    if len(points):
        return textwrap.shorten(f"{points['status'].iloc[0]}: {plain(points['reason'].iloc[0])}", 80, placeholder=" …")
    asked = {what_of(row.kind, row.arm) for row in arms.rows(grid.Point(model, int(tokens), regime))}
    return "not measured" if what in asked else "–"


def _is(frame: pd.DataFrame, model: str, tokens: float, regime: str) -> pd.Series:
    return (frame["model"] == model) & (frame["tokens"] == tokens) & (frame["regime"] == regime)


def never_measured(run: Run, regime: str) -> str:
    """Points of the grid that the run did not try, in one sentence; empty where it tried all."""
    tried = {tuple(row) for frame in (run.speed, run.points) for row in frame[POINT].itertuples(False)}
    missing: dict[str, list[int]] = {}
    asked: dict[str, list[int]] = {}
    for point in grid.points():
        if point.regime == regime:
            asked.setdefault(point.model, []).append(point.tokens)
            if (point.model, point.tokens, regime) not in tried:
                missing.setdefault(point.model, []).append(point.tokens)
    words = together(
        {model: f"at {runs_of(missing[model], sorted(asked[model]))} tokens" for model in in_order(missing)}
    )
    return f"Not measured in this run: {words}." if words else ""


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


# ---------------------------------------------------------------- checks


def kernel_checks(checks: pd.DataFrame) -> pd.DataFrame:
    """Each plan's configs by what the two checks found; configs that passed both are counted together."""
    rows = checks[checks["check"].isin([Check.EXACT, Check.ENVELOPE])]
    one = np.where((rows["tokens"] == 1), ", 1 token", "")
    rows = rows.assign(config=rows["config"] + np.where(rows["rope"], ", RoPE", "") + one)
    found: dict[tuple[str, str, str], list[str]] = {}
    for (plan, config), group in rows.groupby(["plan", "config"], sort=False):
        said = {check: "not measured" for check in (Check.EXACT, Check.ENVELOPE)}
        for row in group.itertuples():
            said[row.check] = row.status if row.status == "ok" else f"{row.status}: {plain(row.reason)}"
        found.setdefault((plan, said[Check.EXACT], said[Check.ENVELOPE]), []).append(plain(config))
    lines = []
    for (plan, exact, drawn), configs in found.items():
        named = "; ".join(configs)
        if exact == drawn == "ok" and len(configs) > 2:
            named = f"{configs[0]} and {len(configs) - 1} others"
        lines.append({"plan": plan, "configs": named, "exact inputs": exact, "drawn inputs": drawn})
    return pd.DataFrame(lines)


def compared(checks: pd.DataFrame, check: str, heading: str, column: str) -> pd.DataFrame:
    """Share of equal bits and largest difference, one row a plan or setting; a reason where there is neither."""
    rows = checks[checks["check"] == check]
    lines = [
        {
            heading: getattr(row, column),
            "bits equal": f"{row.share_equal:.4%}" if row.status == "ok" else f"{row.status}: {plain(row.reason)}",
            "largest difference, ulp": f"{row.max_ulp:.4g}" if row.status == "ok" else "–",
        }
        for row in rows.itertuples()
    ]
    return pd.DataFrame(lines)


# ---------------------------------------------------------------- the report's section and the README's table


def section(folder: Path) -> str:
    """The section of report.md on the newest finished GPU run, with the plots that were drawn before; empty where there
    is none."""
    run = newest(folder)
    if run is None:
        return ""
    rows = run.best[run.best["what"].isin(GROUPS)]
    parts = [f"## On a GPU\n\n{conditions(run)}", HOW_TO_READ]
    for regime, heading in REGIMES.items():
        table = regime_table(run, regime)
        of_regime = rows[rows["regime"] == regime]
        missing = never_measured(run, regime)
        body = [f"Here, {counts(of_regime)}.", markdown(table)] if len(table) else []
        parts += [f"### {heading}", *body, *([missing] if missing else [])]
        if regime == grid.COLD:
            drawn = [name for name in PLOTS if (folder / "plots" / f"{name}.png").exists()]
            parts += [f"![{PLOTS[name]}](plots/{name}.png)" for name in drawn]
    lost = without_time(run)
    parts += ["### Without a time", markdown(lost) if len(lost) else "Nothing: every arm that was tried has a time."]
    table = break_even(run)
    parts += [f"### Can fusion pay at {PREFILL} tokens?", BREAK_EVEN_IS, markdown(table)] if len(table) else []
    parts += ["### Goals", GOALS_ARE, markdown(goals(run)), *_check_parts(run)]
    return "\n\n".join(parts)


HOW_TO_READ = (
    "P1: the fastest chain of separate kernels, norm + matmul + head norm. P2: torch.compile with all its tuning. P4: "
    "the fastest bare matmul, norms for free; timed among P1's parts, before the chains, so that a ratio to it is one "
    "of two medians. exact, deferred, folded: our fastest plan that applies rstd before the matmul (of "
    f"{sum(group_of(plan) == EXACT for plan in PLANS)} with cold weights: to be the fastest of several flatters), "
    "after it, or after it with the norm's weight folded in; `separate` is no fused kernel. All are CUDA graphs, timed "
    "in turns; a speed-up is the median over rounds of P1's time over the arm's in the same round (p10–p90). **win** "
    "and **loss** lie outside the noise, the same ratio of two graphs of one call (p10 to p90, widened to 1), "
    "**noise** inside. Roofline: least bytes or FLOPs at the limits above."
)
PLOTS = {
    "gpu_speedup": "speed-up over the best separate chain",
    "gpu_roofline": "share of roofline",
    "gpu_speed_error": "time and error of every plan",
}
BREAK_EVEN_IS = (
    "Own loop: the fused kernel's main loop alone, hidden @ W^T with nothing before and behind, the fastest of its "
    "tiles, timed in turns with P4. Break-even: the share of P4's speed at which a fused kernel takes P1's time if all "
    "but its loop were free, P4's time over P1's. A fused kernel does more than its loop: `can win` is no win yet, "
    "`cannot win` is final for this loop. `within noise`: p10 to p90 of loop and P1 overlap, "
    "or two graphs of one call differ by as much."
)
GOALS_ARE = (
    "Set before anything was measured; cold weights. What was reached is the worst of its points, by our fastest plan "
    "of any group unless one is named. `open`: points are missing that could decide it. No arm has 4-bit weights."
)


def conditions(run: Run) -> str:
    """GPU, versions, what it can do at most, and what state it was in."""
    e, limits = run.facts["environment"], run.facts.get("limits", {})
    gpu, versions = e.get("gpu", {}), e.get("versions", {})
    facts = [
        f"{gpu.get('multiprocessors', '?')} processors",
        f"L2 {gpu.get('l2_bytes', 0) / 1e6:.0f} MB",
        f"driver {gpu.get('driver', 'not recorded')}",
        f"CUDA {gpu.get('cuda', '?')}",
        *(f"{name} {versions[name]}" for name in ("torch", "triton") if versions.get(name)),
        f"commit {e.get('commit', 'unknown')}",
        f"run {run.run_id}",
    ]
    return f"{run.gpu}: {', '.join(facts)}. {_limits(limits)} {_state(run.speed)}"


def _limits(limits: dict[str, Any]) -> str:
    """What was measured of the GPU itself; the reason where it was not."""
    read, launch = limits.get("read", {}), limits.get("launch", {})

    def said(value: float | None, scale: float, unit: str, why: str) -> str:
        return f"not measured{f' ({why})' if why else ''}" if value is None else f"{value * scale:.3g} {unit}"

    reason = limits.get("reason", "")
    graphs = sorted(launch.get("graph_s", {}).items(), key=lambda item: int(item[0]))
    listed = "; graphs of " + ", ".join(f"{k}: {s * 1e6:.3g} µs" for k, s in graphs) if graphs else ""
    return (
        "Limits, measured in the same run: "
        f"copy {said(limits.get('copy_bytes_per_s'), 1e-12, 'TB/s', reason)}, "
        f"reading {said(read.get('bytes_per_s'), 1e-12, 'TB/s', read.get('unknown', ''))}, "
        f"bf16 matmul {said(limits.get('bf16_flops_per_s'), 1e-12, 'TFLOP/s', reason)}; "
        f"an empty kernel in a graph {said(launch.get('per_kernel_s'), 1e6, 'µs', launch.get('unknown', ''))}, "
        f"replaying a graph {said(launch.get('per_replay_s'), 1e6, 'µs', launch.get('unknown', ''))}{listed}. "
        "The roofline takes the faster of copying and reading."
    )


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


def _check_parts(run: Run) -> list[str]:
    """What had to hold before a time counted, and what the GPU's own arithmetic does."""
    tables = {
        "Each plan as every config that a launch may take, against its spec: bit for bit on inputs whose sums are "
        "exact, within its envelope on drawn ones; our own loop likewise. What is red gets no "
        "time.": kernel_checks(run.checks),
        "Eager against the spec of its plan `hf`, by what cuBLAS may do with partial sums (PyTorch's default may store "
        "and add them in bf16).": compared(run.checks, Check.EAGER, "partial sums", "config"),
        "Compiled kernels against the same kernels interpreted on a CPU: sums in another order, and nothing "
        "else.": compared(run.checks, Check.INTERPRETER, "plan", "plan"),
    }
    parts = ["### Checks"]
    for words, table in tables.items():
        parts += [words, markdown(table) if len(table) else "Not measured in this run."]
    return parts


def speed_table(folder: Path) -> str:
    """The README's table: goal models and tokens, cold weights; one sentence where nothing was measured."""
    run = newest(folder)
    if run is None:
        return NOT_MEASURED
    lines = [_speed_row(run, model, tokens) for model in grid.GOAL_MODELS for tokens in grid.GOAL_TOKENS]
    return (
        f"{run.gpu}, torch {run.facts['environment']['versions']['torch']}, run {run.run_id}; cold weights, CUDA "
        "graphs. P1: the best separate chain; ours: our fastest plan; P4: the bare matmul, norms for free. Medians, of "
        "the speed-up with p10–p90; **noise**: no more than two graphs of one call differ.\n\n"
        f"{markdown(pd.DataFrame(lines))}"
    )


def _speed_row(run: Run, model: str, tokens: int) -> dict[str, str]:
    point = (model, tokens, grid.COLD)
    beside = {what: run.at(*point, what) for what in (P1, P4)}
    took = {w: cell(run, *point, w) if row is None else micros(row["p50_us"]) for w, row in beside.items()}
    own = run.own(model, tokens)
    if own is None:
        ours, against, share = cell(run, *point, EXACT), "–", "–"
    else:
        warm = "" if own["cold"] else "; weights not cold"
        ours = f"{micros(own['p50_us'])} ({own['arm']}, {launch_words(own)}{warm})"
        against, share = speedup(own), f"{own['roofline_share']:.0%}"
    return {
        "model": model, "tokens": str(tokens), "P1, µs": took[P1], "ours, µs": ours, "against P1": against,
        "P4, µs": took[P4], "share of roofline": share,
    }  # fmt: skip
