"""Which config is fastest where: the separate command that writes kernels/dispatch.csv.

At each point of the grid every candidate is timed in turns with `separate`, on cold weights, as the plan that stands
for its place of rstd. Before the matmul a fused config enters the table only where it beats `separate` by more than
the A/A noise, so that a dispatched chain is not slower than the fallback. Behind the matmul there is no fallback to
compare with, `separate` being another function: there the fastest config stands, and whether it pays is a finding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from castpoint.harness.conformance.cuda import TOKENS, checked
from castpoint.harness.gpu.sweep import SEPARATE, Setting, measure_limits, own_peer, prepared
from castpoint.harness.problems.grid import STANDS_FOR, Point
from castpoint.harness.runs.progress import track
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import Check, Status, TuningRow
from castpoint.harness.timing.cuda import Cuda
from castpoint.harness.timing.rig import Outcome, ratios
from castpoint.kernels.config import Config, candidates, unsupported
from castpoint.kernels.dispatch import Table
from castpoint.kernels.plan import CastPlan
from castpoint.variants.catalogue import plan_named

BUDGET_S = 0.5


def tune(points: Sequence[Point], records: Records, gpu: Cuda) -> Table:
    """The fastest config of every point and scale, from this run's rows of `tuning`; measures what is missing.

    Raises DeviceLost where the CUDA context broke.
    """
    todo = [p for p in points if not records.has(TuningRow, **_key(p, "folded", str(SEPARATE)))]
    limits = measure_limits(todo, records, gpu) if todo else None
    for point in track(todo, "tuning"):
        setting = prepared(point, gpu, limits)
        for scale, name in STANDS_FOR.items():
            _time_candidates(setting, scale, plan_named(name), records)
        gpu.release()
    return fastest(records, gpu.name(), points)


def _time_candidates(setting: Setting, scale: str, plan: CastPlan, records: Records) -> None:
    """Rows of one point and scale; `separate` comes last and says that they are complete. It is one-rounding for all
    scales, since it cannot apply rstd behind the matmul: what runs where fusing does not pay."""
    g = setting.point.geometry
    heads = g.num_q_heads + 2 * g.num_kv_heads
    fit = [c for c in candidates(setting.point.tokens, g.hidden_size, heads, g.head_dim) if c != SEPARATE]
    fit = [c for c in fit if not unsupported(c, plan)]
    wrong = {str(config): reason for config in fit if (reason := _wrong(plan, config, setting.gpu))}
    peers = [own_peer(setting, plan_named("one-rounding"), str(SEPARATE), SEPARATE)]
    peers += [own_peer(setting, plan, str(c), c) for c in fit if str(c) not in wrong]
    measured = setting.measure([peer.arm() for peer in peers], BUDGET_S)
    for config in [*fit, SEPARATE]:
        words = str(config)
        outcome = Outcome(Status.RED, wrong[words]) if words in wrong else measured.outcomes[words]
        row = {**_key(setting.point, scale, words), **dataclasses.asdict(config), "cold": setting.cold}
        if outcome.seconds:
            row |= outcome.seconds.columns() | measured.noise_columns()
            if separate := measured.samples.get(str(SEPARATE)):
                row["speedup_separate"] = ratios(separate, measured.samples[words]).p50
        records.add(TuningRow(**row, status=outcome.status, reason=outcome.reason))


def _wrong(plan: CastPlan, config: Config, gpu: Cuda) -> str:
    """Why this config is not timed: it does not equal the plan's spec on exact inputs; empty if it does."""
    for tokens in (TOKENS, 1) if config.kernel == "split-k" else (TOKENS,):
        found = checked(plan, config, Check.EXACT, gpu, tokens=tokens)
        if found["status"] != Status.OK:
            return f"not timed: {found['reason']}"
    return ""


def _key(point: Point, scale: str, words: str) -> dict[str, Any]:
    return {"model": point.model, "tokens": point.tokens, "scale": scale, "config": words}


def fastest(records: Records, gpu_name: str, points: Sequence[Point]) -> Table:
    """The table's configs for those points; nothing for a point where `separate` has no time."""
    rows = [row for row in records.rows("tuning") if row["status"] == Status.OK and row["speedup_separate"]]
    table: Table = {}
    for point in points:
        g = point.geometry
        shape = (g.hidden_size, g.num_q_heads, g.num_kv_heads, g.head_dim)
        for scale in STANDS_FOR:
            own = [r for r in rows if (r["model"], r["tokens"], r["scale"]) == (point.model, str(point.tokens), scale)]
            own = own if scale == "prologue" else [r for r in own if r["kernel"] != SEPARATE.kernel]
            if not own:
                continue
            best = max(own, key=lambda row: float(row["speedup_separate"]))
            wins = float(best["speedup_separate"]) > max(1.0, float(best["noise_p90"] or 1))
            config = Config.of_row(best) if wins or scale != "prologue" else SEPARATE
            table.setdefault((gpu_name, shape, scale), {})[point.tokens] = config
    return table
