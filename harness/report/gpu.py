"""The report's section on a GPU run: one table, one plot (gpu_plots), the checks, the counters.

Which run that is and which of its rows count says gpu_runs. Our plans are different numerical functions, so that the
plan is named wherever its time is.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import pandas as pd

from castpoint.harness.problems import grid
from castpoint.harness.report.failures import BAD
from castpoint.harness.report.gpu_runs import (
    GROUPS,
    LAUNCHES,
    LOOP,
    P1,
    P2,
    P4,
    POINT,
    VERDICTS,
    Run,
    newest,
    of_p4,
    times,
)
from castpoint.harness.report.markdown import paragraphs, under
from castpoint.harness.runs.words import Check, Step

HEADING = "On a GPU"


def section(folder: Path) -> str:
    """Of report.md, on the newest GPU run of the folder, finished or not, with the plot where it was drawn before;
    empty where there is none."""
    if not (run := newest(folder)):
        return ""
    table, drawn = speed_table(run), (folder / "plots" / "gpu_speedup.png").exists()
    plot = "![speed-up over the best separate chain](plots/gpu_speedup.png)" if drawn else ""
    said = f"### Checks\n\n{HOW_CHECKED}"
    return paragraphs(
        f"## {HEADING}\n\n{conditions(run)}",
        under(HOW_TO_READ, table) or "No time was measured.",
        untried(run),
        plot,
        under(said, check_table(run.frames["gpu_checks"])) or f"{said}\n\nNot measured in this run.",
        counters(run.frames["gpu_counters"]),
    )


# ---------------------------------------------------------------- times


HOW_TO_READ = (
    "P1: the fastest chain of separate kernels, norm + matmul + head norm. P4: the fastest bare matmul, norms for "
    "free; and with as many empty kernels behind it as a chain has norms, so that launches are not. P2: torch.compile"
    " with all its tuning. Own loop: our kernel's main loop with nothing before and behind; where it is slower than "
    "P1, no fusion around it pays. exact, deferred, folded: our fastest plan of several that apply rstd before the "
    "matmul, after it, or after it with the norm's weight folded in; `separate` is no fused kernel. All are CUDA "
    "graphs, timed in turns; a speed-up is the median over rounds of P1's time over the arm's in the same round "
    "(p10–p90), and `of P4` that of the arm's over P4's. **win** and **loss** lie outside the noise, the same ratio "
    "of two graphs of one call (p10 to p90, widened to 1), with 1 outside their own p10 to p90; else it is **noise**."
    " Roofline: least bytes or FLOPs at the limits above. Weights: `cold` rotate over three times the L2, `rope` the "
    "same with q and k rotated, `hot` are one, `layers` a model's, one after the other."
)
COLUMNS = {P1: "P1: best separate chain", P4: "P4: bare matmul", P2: "P2: torch.compile", LOOP: LOOP}
COLUMNS |= {group: group for group in GROUPS}
ORDER = {word: place for place, word in enumerate((grid.COLD, grid.ROPE, grid.HOT, grid.LAYERS, *grid.MODELS))}


FILLED = {  # step -> the columns that stay without a time where it fails
    Step.PARTS: (P4, LOOP), Step.CHAINS: (P1, P4, *GROUPS), Step.PLANS: GROUPS, Step.COMPILED: (P2,),
}  # fmt: skip


def speed_table(run: Run) -> pd.DataFrame:
    """One row a point that was tried: of each kind the best row; else why it has no time, or a dash."""
    cells = {key: cell(row) for key, row in run.best.iterrows()}
    steps = run.frames["gpu_steps"]
    tried = [run.speed, *(steps[steps["step"] == step].assign(what=what) for step in FILLED for what in FILLED[step])]
    rows = pd.concat([rows[[*POINT, "what", "status", "reason"]] for rows in tried if len(rows)] or [run.speed])
    for _, row in rows[rows["status"] != "ok"].iterrows():
        said = textwrap.shorten(f"{row['status']}: {row['reason']}", 80, placeholder=" …")
        cells.setdefault((*row[POINT], row["what"]), said)
    warm = set(run.speed[~run.speed["cold"]][POINT].itertuples(index=False, name=None))
    order = {
        "by": ["regime", "model", "tokens"],
        "key": lambda column: column if column.name == "tokens" else column.map(ORDER),
    }
    lines, launches = [], {key[:3]: with_launches(row) for key, row in run.best.iterrows() if key[3] == LAUNCHES}
    for point in rows[POINT].drop_duplicates().sort_values(**order).itertuples(index=False, name=None):
        model, tokens, regime = point
        weights = f"{regime} (not cold)" if regime != grid.HOT and point in warm else regime
        found = {head: cells.get((*point, what), "–") for what, head in COLUMNS.items()}
        found[COLUMNS[P4]] += launches.get(point, "")
        lines.append({"weights": weights, "model": model, "tokens": f"{tokens:.0f}", **found})
    return pd.DataFrame(lines)


def cell(row: pd.Series) -> str:
    """A best row in a few words: its time, over P1, over P4, of the roofline, and what it is."""
    what, arm = row["what"], row["arm"]
    said = [microseconds(row)]
    if what in (P2, *GROUPS):
        low, middle, high = (times(row[f"speedup_p1_{name}"]) for name in ("p10", "p50", "p90"))
        judgement = row["verdict"]
        said.append(f"{middle} × ({low}–{high}) **{judgement}**" if judgement in VERDICTS else judgement)
    if what in (LOOP, *GROUPS) and (over := of_p4(row)):
        said.append(over)
    if what in GROUPS:
        said.append(f"roofline {row['roofline_share']:.0%}")
        arm += f", {row['kernel']}" + (f" after {row['prepass']}" if row["prepass"] not in ("", "none") else "")
    return f"{', '.join(said)}; {arm if what in GROUPS else arm.removeprefix(what).strip()}"


def microseconds(row: pd.Series) -> str:
    return f"{row['p50_us']:,.0f} µs" if row["p50_us"] >= 1000 else f"{row['p50_us']:.3g} µs"


def with_launches(row: pd.Series) -> str:
    """What stands behind the bare matmul's time: ` + 2 empty kernels 5.1 µs, 1.28 of P4`, the P4 of its own step."""
    said = [microseconds(row), *filter(None, [of_p4(row)])]
    return f" + {row['arm'].rpartition(' + ')[2]} {', '.join(said)}"


def untried(run: Run) -> str:
    """Arms without a time that did not fail, where there are any; what failed is listed with all else that failed."""
    rows = run.speed[~run.speed["status"].isin(["ok", *BAD])]
    counted = rows.groupby(["arm", "status", "reason"], sort=False).size()
    said = [f"{arm} ({status} at {count} points: {reason})" for (arm, status, reason), count in counted.items()]
    return f"Without a time: {'; '.join(said)}." if said else ""


# ---------------------------------------------------------------- conditions

LIMITS = ("copy", "read", "bf16 matmul", "an empty kernel in a graph", "replaying a graph")
UNITS = {"B/s": (1e-12, "TB/s"), "FLOP/s": (1e-12, "TFLOP/s"), "s": (1e6, "µs")}  # recorded -> scale, shown
STATE = {"sm_mhz": "MHz", "watts": "W", "celsius": "°C"}


def conditions(run: Run) -> str:
    """GPU, versions, how many points of the grid were tried, what the GPU can do at most, and what state it was in."""
    e, speed = run.facts["environment"], run.speed
    gpu, versions = e.get("gpu", {}), e.get("versions", {})
    code = f"commit {e.get('commit', 'unknown')}, sources {e.get('sources', 'not recorded')}"
    state = f"**cut off: {run.reached}**" if run.cut_off else f"{run.reached}"
    ranges = {unit: speed[name].dropna() for name, unit in STATE.items()}
    load = [f"{seen.min():.0f} to {seen.max():.0f} {unit}" for unit, seen in ranges.items() if len(seen)]
    reasons = speed["slowed_by"].value_counts().drop("none", errors="ignore")
    slowed = [f"{count} rows {'by ' + reason if reason else 'do not say'}" for reason, count in reasons.items()]
    above = int((speed["roofline_share"] > 1).sum())
    too_low = f" **{above} rows are faster than this roofline**: its limits were measured too low." if above else ""
    return (
        f"{run.gpu}, {state}: {gpu.get('multiprocessors', '?')} processors, L2 {gpu.get('l2_bytes', 0) / 1e6:.0f} MB, "
        f"driver {gpu.get('driver', 'not recorded')}, CUDA {gpu.get('cuda', '?')}, torch {versions.get('torch')}, "
        f"triton {versions.get('triton')}, {code}, run {run.run_id}.{continued(run)} Limits, measured in the same run: "
        f"{limits(run.frames['gpu_limits'])}. The roofline takes the faster of copying and reading. Under load: "
        f"{', '.join(load) or 'clocks not recorded'}; slowed down: {', '.join(slowed) or 'none'}.{too_low}"
    )


def limits(frame: pd.DataFrame) -> str:
    """What the GPU can do at most, and what a launch costs; what was not measured, and why."""
    rows = {row["limit"]: row for _, row in frame.iterrows()}
    said = []
    for name in dict.fromkeys([*LIMITS, *rows]):
        row = rows.get(name)
        if row is None or row["status"] != "ok":
            said.append(f"{name} not measured ({'not tried' if row is None else row['reason']})")
        else:
            scale, unit = UNITS.get(row["unit"], (1, row["unit"]))
            said.append(f"{name} {row['value'] * scale:.3g} {unit}")
    return ", ".join(said)


def continued(run: Run) -> str:
    """In which facts the machines differ on which the run went on, where it did."""
    e, others = run.facts["environment"], run.facts.get("continued_on", [])
    names = dict.fromkeys(n for other in others for n in {**e, **other} if e.get(n) != other.get(n))
    where = f"{len(others)} other machine{'s' if len(others) > 1 else ''}"
    return f" Continued on {where}; what differs: {', '.join(names)}." if others else ""


# ---------------------------------------------------------------- checks


HOW_CHECKED = (
    "What had to hold before a time counted: each plan as every config that a launch may take, and our own loop, equal "
    "to its spec in every bit on inputs whose sums are exact (`exact`), inside its `envelope` on drawn ones. Beside "
    "them what the GPU's own arithmetic does: `eager` against the spec of `hf`, by what cuBLAS may do with partial "
    "sums; compiled kernels against the `interpreter` and against their `ptx` run on a CPU, where only the order of "
    "sums and the last bits of approximate instructions differ; and a `tensor core`'s sums against their published "
    "model."
)


def check_table(checks: pd.DataFrame) -> pd.DataFrame:
    """Each check of each plan by what it found; configs that found the same together, of many `ok` the first."""
    found = checks["status"].where(checks["status"] == "ok", checks["status"] + ": " + checks["reason"])
    share = checks["share_equal"].map("{:.4%} of bits equal".format)
    equal = share + checks["max_ulp"].map(", at most {:.4g} ulp".format).where(checks["max_ulp"].notna(), "")
    found = found.where((found != "ok") | checks["check"].isin([Check.EXACT, Check.ENVELOPE]), equal)
    more = checks["rope"].map({True: ", RoPE", False: ""}) + checks["tokens"].map({1: ", 1 token"}).fillna("")
    groups = checks.assign(configs=checks["config"] + more, found=found).groupby(["check", "plan", "found"], sort=False)
    named = groups["configs"].agg(list).reset_index()
    many = (named["found"] == "ok") & (named["configs"].str.len() > 2)
    short = [f"{configs[0]} and {len(configs) - 1} others" for configs in named["configs"]]
    named["configs"] = named["configs"].str.join("; ").mask(many, short)
    return named[["check", "plan", "configs", "found"]]


# ---------------------------------------------------------------- counters


DERIVED = {"bytes_per_clock_and_sm": "from L2 into an SM, bytes a clock", "issue_share": "share of issue slots used"}


def counters(frame: pd.DataFrame) -> str:
    """What follows from Nsight Compute's counters of each kernel, or why nothing; empty where it was not tried."""
    failed = [
        f"{row.kernel}, {row.counter} ({row.status}: {row.reason})"
        for row in frame[frame["status"] != "ok"].itertuples()
    ]
    rows = frame[(frame["status"] == "ok") & frame["counter"].isin(DERIVED)]
    table = rows.pivot(index="kernel", columns="counter", values="value").reindex(columns=list(DERIVED))
    said = (
        "### Counters\n\nOf one launch each, caches cold. Issue slots: of the cycles in which a scheduler had a warp, "
        "those in which it issued an instruction. The counters that this follows from are in `gpu_counters.csv`."
    )
    none = f"Not counted: {'; '.join(failed)}." if failed else ""
    found = under(said, table.rename(columns=DERIVED).reset_index())
    return paragraphs(found or ("### Counters" if failed else ""), none)
