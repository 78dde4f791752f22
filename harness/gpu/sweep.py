"""The steps of a point: parts of separate chains, chains beside our own kernels, all other plans, torch.compile.

Arms of one step are timed in turns and share one noise floor: a speed-up is over the fastest P1 of the same step, in
the same rounds. Our kernels run as this run's tuning found fastest, else as kernels.dispatch reasons; where that is
`separate`, the fastest fused config is an arm of its own, so that a fused kernel has a time wherever its plan has one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from castpoint.harness.conformance.cuda import Binary, binary_of
from castpoint.harness.gpu.order import (
    CHAIN_BUDGET_S,
    PART_BUDGET_S,
    SEPARATE,
    Item,
    binaries,
    compiled_peers,
    configs_of,
    work_of,
)
from castpoint.harness.gpu.point import OwnPeer, Setting, own_peer, timed
from castpoint.harness.gpu.tune import TunedRow, fastest_fused, table_of
from castpoint.harness.peers import chains as peers
from castpoint.harness.peers.parts import MATMULS, NORMS, OWN_KERNEL
from castpoint.harness.problems import grid
from castpoint.harness.problems.grid import Point
from castpoint.harness.runs.flight import HANGS_S
from castpoint.harness.runs.schema import GpuSpeedRow
from castpoint.harness.runs.words import Kind, Step
from castpoint.harness.timing import rig
from castpoint.harness.timing.rig import Measurement
from castpoint.harness.timing.state import gpu_state
from castpoint.kernels.config import Config
from castpoint.kernels.dispatch import dispatch
from castpoint.variants.catalogue import plan_named

STATE = ("sm_mhz", "memory_mhz", "watts", "celsius", "slowed_by")
TUNING_HANGS_S = 600.0  # torch.compile tries many kernels before it has one
PLAINEST = ("F.rms_norm", "cuBLAS")  # of separate chains, where no parts were timed (hot rows, layers)
OF_A_CHAIN = {Kind.NORM: NORMS, Kind.MATMUL: MATMULS, Kind.HEADS: (OWN_KERNEL,)}
PARTS = {peers.arm_name(kind, what): (kind, what) for kind, named in OF_A_CHAIN.items() for what in named}


def time_parts(setting: Setting) -> None:
    """Rows of P1's parts and of our own loop."""
    problems = setting.problems
    parts = [
        *peers.norm_peers(problems),
        peers.head_norm_peer(problems, plan_named("one-rounding")),
        *peers.matmul_peers(problems),
        *(peers.loop_peer(problems, tile) for tile in grid.loop_tiles(setting.point)),
    ]
    _time(setting, Step.PARTS, parts, PART_BUDGET_S)


def time_chains(setting: Setting) -> None:
    """P1: our own norms around cuBLAS, and the two best of separate parts; P4, with launches behind it and without;
    eager; and the plans that stand for an order of scaling."""
    best = _best_matmul(setting)
    arms = [*_separate_chains(setting, 2), *(p for p in peers.matmul_peers(setting.problems) if p.what == best)]
    arms += [peers.matmul_with_launches(setting.problems, best), peers.eager_peer(setting.problems)]
    tuned = setting.records.rows("tuning")
    arms += [arm for name in grid.MAIN_PLANS for arm in own_arms(setting, name, tuned)]
    _time(setting, Step.CHAINS, arms, CHAIN_BUDGET_S, state=True)


def time_plans(setting: Setting) -> None:
    """All other plans, each once."""
    tuned = setting.records.rows("tuning")
    own = [own_arms(setting, name, tuned)[0] for name in grid.other_plans(setting.point)]
    _time(setting, Step.PLANS, [*_separate_chains(setting, 1), *own], CHAIN_BUDGET_S)


def time_compiled(setting: Setting) -> None:
    """torch.compile with all its tuning."""
    tuned = peers.compiled_peers(setting.problems, compiled_peers(setting.point))
    _time(setting, Step.COMPILED, [*_separate_chains(setting, 1), *tuned], CHAIN_BUDGET_S, limit_s=TUNING_HANGS_S)


# ---------------------------------------------------------------- arms


def own_arms(setting: Setting, name: str, tuned: Sequence[TunedRow]) -> list[OwnPeer]:
    """The plan as it would be dispatched; and fused, named so, where that is `separate`. tuned: this run's rows."""
    configs = own_configs(setting.point, name, tuned, setting.gpu.name())
    return [own_peer(setting, name, config, name + what) for what, config in configs.items()]


def own_configs(point: Point, name: str, tuned: Sequence[TunedRow], gpu: str) -> dict[str, Config]:
    """What follows the plan's name -> its config."""
    g, plan = point.geometry, plan_named(name)
    shape = (g.hidden_size, g.num_q_heads, g.num_kv_heads, g.head_dim)
    found = dispatch(table_of(tuned, gpu), gpu, shape, point.tokens, plan)
    return configs_of(point, name, found, fastest_fused(tuned, point, plan))


def launched(item: Item, tuned: Sequence[TunedRow], gpu: str) -> list[Binary]:
    """The binaries of our plans that a step launches, by what tuning has found so far."""
    point = item.point
    if point is None or item.step not in (Step.CHAINS, Step.PLANS):
        return binaries(item)
    plans = grid.MAIN_PLANS if item.step == Step.CHAINS else grid.other_plans(point)
    configs = [("one-rounding", SEPARATE)]  # of the separate chain
    configs += [(name, c) for name in plans for c in own_configs(point, name, tuned, gpu).values()]
    width, rope = point.geometry.hidden_size, point.regime == grid.ROPE
    return [binary_of(name, config, point.tokens, width, rope) for name, config in configs]


def _separate_chains(setting: Setting, at_most: int) -> list[peers.Peer]:
    """Our own norms around cuBLAS, the chain that dispatch falls back to, and the best of separate parts. All as
    one-rounding."""
    plan = plan_named("one-rounding")
    own = own_peer(setting, "one-rounding", SEPARATE, "own kernels | cuBLAS")
    seconds = _part_seconds(setting)
    picked = (peers.pick_chains(seconds, at_most=at_most) if seconds else []) or [PLAINEST]
    return [
        dataclasses.replace(own, kind=Kind.CHAIN),
        *(peers.chain_peer(setting.problems, *chain, plan) for chain in picked),
    ]


def _part_seconds(setting: Setting) -> dict[Kind, dict[str, float]]:
    """Of the parts that have a time at the point, by kind and what."""
    here = [str(value) for value in Item(Step.PARTS, setting.point).key.values()]
    seconds: dict[Kind, dict[str, float]] = {}
    for row in setting.records.rows("gpu_speed"):
        at = [row[name] for name in ("step", "model", "tokens", "regime")]
        if at == here and row["p50_us"] and row["arm"] in PARTS:
            kind, what = PARTS[row["arm"]]
            seconds.setdefault(kind, {})[what] = float(row["p50_us"]) * 1e-6
    return seconds


def _best_matmul(setting: Setting) -> str:
    matmuls = _part_seconds(setting).get(Kind.MATMUL, {})
    return min(matmuls, key=matmuls.__getitem__, default=PLAINEST[1])


# ---------------------------------------------------------------- rows


def _time(
    setting: Setting, step: Step, arms: Sequence[peers.Peer], budget_s: float, state: bool = False,
    limit_s: float = HANGS_S,
) -> None:  # fmt: skip
    """Times those arms in turns and adds their rows."""
    point = setting.point
    named = {arm.name: arm for arm in arms}
    rows = {name: _blank(setting, step, arm) for name, arm in named.items()}
    own = {
        name: binary_of(arm.plan_name, arm.config, point.tokens, point.geometry.hidden_size, arm.rope)
        for name, arm in named.items()
        if isinstance(arm, OwnPeer) and arm.config
    }
    own |= {n: Binary("", arm.config) for n, arm in named.items() if arm.kind == Kind.LOOP and arm.config}
    measured = timed(setting, named, rows, own, budget_s, gpu_state if state else None, limit_s)
    best = {kind: _fastest(measured, named, kind) for kind in (Kind.CHAIN, Kind.MATMUL)}  # P1 and P4
    setting.records.add(*(_filled(setting, measured, row, best) for row in rows.values()))


def _blank(setting: Setting, step: Step, arm: peers.Peer) -> GpuSpeedRow:
    """The arm's row before anything is timed."""
    work = work_of(setting.point, arm.kind)
    row: dict[str, Any] = {
        **dataclasses.asdict(setting.point), "step": step, "kind": arm.kind, "arm": arm.name, "function": arm.function,
        "copies": len(setting.problems), "cold": setting.cold, **dataclasses.asdict(work),
        "floor_us": setting.limits and setting.limits.floor_s(work) * 1e6,
    }  # fmt: skip
    if arm.config and arm.kind in (Kind.OWN, Kind.LOOP):
        row |= {"config": str(arm.config), "kernel": arm.config.kernel, "prepass": arm.config.prepass}
    return GpuSpeedRow(**row)


def _filled(setting: Setting, measured: Measurement, row: GpuSpeedRow, best: dict[Kind, str | None]) -> GpuSpeedRow:
    outcome = measured.outcomes[row.arm]
    found: dict[str, Any] = {"rounds": measured.rounds, "laps": measured.laps, **measured.noise_columns()}
    found |= {name: measured.state.get(name) for name in STATE}
    if outcome.seconds:
        found |= rig.speed_columns(work_of(setting.point, row.kind), row.floor_us, outcome.seconds)
        mine = measured.samples[row.arm]
        if p1 := best[Kind.CHAIN]:  # ratios of two times of one round
            speedup = rig.ratios(measured.samples[p1], mine)
            found |= {"p1": p1, **speedup.columns("speedup_p1_{}", 1)}
        if p4 := best[Kind.MATMUL]:
            found |= {"p4": p4, **rig.ratios(mine, measured.samples[p4]).columns("over_p4_{}", 1)}
    return dataclasses.replace(row, **found, status=outcome.status, reason=outcome.reason)


def _fastest(measured: Measurement, arms: dict[str, peers.Peer], kind: Kind) -> str | None:
    """The arm of that kind with the lowest median."""
    seconds = {n: o.seconds.p50 for n, o in measured.outcomes.items() if o.seconds and arms[n].kind == kind}
    return min(seconds, key=seconds.__getitem__, default=None)
