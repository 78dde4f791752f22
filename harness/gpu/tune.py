"""Which config is fastest where: rows of `tuning`, and the dispatch table that follows from them.

At each point of cold weights every candidate is timed in turns with `separate`, as the plan that stands for its place
of rstd. Before the matmul a fused config enters the table only where it beats `separate` by more than the A/A noise, so
that a dispatched chain is not slower than separate kernels. Behind the matmul there is no such chain to compare with,
`separate` being another function: there the fastest config stands, and whether it pays is a finding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from castpoint.harness.conformance.cuda import binary_of
from castpoint.harness.gpu.order import SEPARATE, TUNING_BUDGET_S, tiles
from castpoint.harness.gpu.point import Setting, own_peer, timed
from castpoint.harness.problems.geometry import geometry_named
from castpoint.harness.problems.grid import STANDS_FOR, Point
from castpoint.harness.runs.schema import TuningRow
from castpoint.harness.runs.words import Status
from castpoint.harness.timing.rig import Outcome, ratios
from castpoint.kernels.config import Config, unsupported
from castpoint.kernels.dispatch import Table
from castpoint.kernels.plan import CastPlan

TunedRow = Mapping[str, str]  # of `tuning`, as it stands on disk


def time_candidates(setting: Setting) -> None:
    """Rows of one point: for each scale its candidates, and `separate`, which is one-rounding for all of them since it
    cannot apply rstd behind the matmul: what runs where fusing does not pay. Raises DeviceLost as timed does."""
    point = setting.point
    for scale, name in STANDS_FOR.items():
        configs = {str(c): c for c in (SEPARATE, *tiles(point, name))}
        rows = {
            words: TuningRow(
                model=point.model, tokens=point.tokens, scale=scale, config=words, cold=setting.cold,
                **dataclasses.asdict(config),
            )
            for words, config in configs.items()
        }  # fmt: skip
        peers = {
            words: own_peer(setting, name if config != SEPARATE else "one-rounding", config, words)
            for words, config in configs.items()
        }
        binaries = {
            words: binary_of(peer.plan_name, configs[words], point.tokens, point.geometry.hidden_size)
            for words, peer in peers.items()
        }
        measured = timed(setting, peers, rows, binaries, TUNING_BUDGET_S)
        finished = []
        for words, row in rows.items():
            outcome: Outcome = measured.outcomes[words]
            found = {}
            if outcome.seconds:
                found = outcome.seconds.columns() | measured.noise_columns()
                if separate := measured.samples.get(str(SEPARATE)):
                    found["speedup_separate"] = ratios(separate, measured.samples[words]).p50
            finished.append(dataclasses.replace(row, status=outcome.status, reason=outcome.reason, **found))
        setting.records.add(*finished)


def table_of(rows: Iterable[TunedRow], gpu_name: str) -> Table:
    """The table's configs of every point in those rows of one run; of `prologue` none where `separate` has no time."""
    table: Table = {}
    for (model, tokens, scale), found in _by_point(rows).items():
        config = Config.of_row(found[0])
        if scale == "prologue" and config != SEPARATE and not _wins(found[0]):
            config = SEPARATE
        if config == SEPARATE and all(row["config"] != str(SEPARATE) for row in found):
            continue
        g = geometry_named(model)
        shape = (g.hidden_size, g.num_q_heads, g.num_kv_heads, g.head_dim)
        table.setdefault((gpu_name, shape, scale), {})[int(tokens)] = config
    return table


def fastest_fused(rows: Iterable[TunedRow], point: Point, plan: CastPlan) -> Config | None:
    """The fastest fused config of that point that expresses the plan; None where none has a time."""
    found = _by_point(rows).get((point.model, str(point.tokens), plan.scale), [])
    fused = [c for c in map(Config.of_row, found) if c != SEPARATE and not unsupported(c, plan)]
    return fused[0] if fused else None


def _by_point(rows: Iterable[TunedRow]) -> dict[tuple[str, str, str], list[TunedRow]]:
    """(model, tokens, scale) -> rows with a time, fastest first; `separate` where it is the plan's own function."""
    found: dict[tuple[str, str, str], list[TunedRow]] = {}
    for row in rows:
        own = row["config"] != str(SEPARATE) or row["scale"] == "prologue"
        if own and row["status"] == Status.OK:
            found.setdefault((row["model"], row["tokens"], row["scale"]), []).append(row)
    for many in found.values():
        many.sort(key=lambda row: float(row["p50_us"]))
    return found


def _wins(row: TunedRow) -> bool:
    return float(row["speedup_separate"] or 0) > max(1.0, float(row["noise_p90"] or 1))
