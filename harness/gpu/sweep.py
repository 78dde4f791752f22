"""`make gpu`: the grid of problems.grid on a CUDA device, written to records as it is measured.

At each point P1's parts are timed, and among them our own loop with every tile; then the chains of the best parts
together with every other arm, in turns. Own plans run as kernels.dispatch chooses, once they passed
conformance.cuda: what is red gets no time. An arm that fails is a row with a reason, and the grid goes on; a broken
CUDA context ends the run, and the next one continues it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from castpoint.harness.conformance.cuda import check_loops, red_plans
from castpoint.harness.gpu.arms import compiled_peers, work_of
from castpoint.harness.peers import chains as peers
from castpoint.harness.problems import grid
from castpoint.harness.problems.drawn import synthetic_problem, with_positions
from castpoint.harness.problems.grid import HOT, LAYERS, ROPE, Point
from castpoint.harness.runs.progress import track
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import GpuPointRow, GpuSpeedRow, Kind, Status
from castpoint.harness.timing import rig
from castpoint.harness.timing.cpu import Ceilings
from castpoint.harness.timing.cuda import Cuda
from castpoint.harness.timing.limits import ceilings, found_ceilings, implausible, launch_costs, read_ceiling
from castpoint.harness.timing.outputs import bits_differ, values_differ
from castpoint.harness.timing.rig import Measurement, Outcome, measure
from castpoint.harness.timing.state import gpu_state
from castpoint.kernels.config import Config
from castpoint.kernels.dispatch import chosen
from castpoint.kernels.plan import CastPlan
from castpoint.variants.backends import run_triton
from castpoint.variants.catalogue import plan_named
from castpoint.variants.eager import Outputs
from castpoint.variants.problem import Problem

PART_BUDGET_S, CHAIN_BUDGET_S = 0.3, 1.0  # at least ten rounds are taken whatever they cost
HOT_COPIES = 8
SEPARATE = Config("separate")


def sweep_gpu(points: Sequence[Point], records: Records, gpu: Cuda, quick: bool = False) -> None:
    """Every point that the records do not have yet. quick: without peers that compile for each shape.

    Raises DeviceLost where the CUDA context broke.
    """
    todo = [point for point in points if not records.has(GpuPointRow, **dataclasses.asdict(point))]
    if not todo:
        return
    limits = measure_limits(todo, records, gpu)
    check_loops(todo, records, gpu)
    red = red_plans(records)
    for point in track(todo, "grid"):
        row = GpuPointRow(**dataclasses.asdict(point))
        try:
            _sweep_point(point, records, gpu, limits, red, quick)
        except torch.OutOfMemoryError as error:
            row = dataclasses.replace(row, status=Status.FAILED, reason=f"out of memory: {str(error)[:200]}")
        records.add(row)
        gpu.release()


def measure_limits(points: Sequence[Point], records: Records, gpu: Cuda) -> Ceilings:
    """Copy bandwidth, a stream that only reads, a large matmul, and the cost of launches; noted with the run.
    The memory's limit is the faster of copying and reading. Raises UserError as found_ceilings does."""
    found = ceilings(gpu)
    problem = model_problem(points[0].model, gpu.device)
    copies = rig.copies_for(_weight_bytes(problem), gpu.l2_bytes(), gpu.free_bytes())
    read = read_ceiling(gpu, [p.qkv_weight for p in rig.rotated(problem, copies)])
    records.note(limits={**found, "read": read, "launch": launch_costs(gpu)})
    limits = found_ceilings(found)
    return dataclasses.replace(limits, bytes_per_s=max(limits.bytes_per_s, read.get("bytes_per_s", 0.0)))


# ---------------------------------------------------------------- a point


@dataclass(frozen=True)
class Setting:
    """A point made ready: its problems, one a copy of the weights, and how often they are captured in one graph."""

    point: Point
    gpu: Cuda
    limits: Ceilings
    problems: list[Problem]
    cold: bool
    laps: int

    def measure(self, arms: Sequence[rig.Arm], budget_s: float, state: rig.State | None = None) -> Measurement:
        copies, laps = len(self.problems), self.laps
        return measure(arms, self.gpu, copies=copies, laps=laps, budget_s=budget_s, state=state)


def _sweep_point(point: Point, records: Records, gpu: Cuda, limits: Ceilings, red: dict[str, str], quick: bool) -> None:
    setting = prepared(point, gpu, limits)
    seconds = _time_parts(setting, records, red)
    arms = [*_chains(setting, seconds), peers.eager_peer(setting.problems)]
    arms += [] if quick else peers.compiled_peers(setting.problems, compiled_peers(point))
    for name in grid.own_plans(point):
        plan = plan_named(name)
        arms.append(peers.Peer(Kind.OWN, name, None, plan) if name in red else own_peer(setting, plan, name))
    _time(setting, records, arms, red, CHAIN_BUDGET_S, gpu_state)


def prepared(point: Point, gpu: Cuda, limits: Ceilings) -> Setting:
    """The point's problems: weights rotated over three times L2, one copy a layer, or one weight that stays hot."""
    problem = model_problem(point.model, gpu.device)
    problem = problem.replace(x=problem.x[: point.tokens])
    problem = with_positions(problem) if point.regime == ROPE else problem
    fitting = rig.copies_for(_weight_bytes(problem), gpu.l2_bytes(), gpu.free_bytes(), sets=2)  # own and folded weights
    copies = {HOT: HOT_COPIES, LAYERS: point.geometry.num_layers}.get(point.regime, fitting)
    problems = [problem] * copies if point.regime == HOT else rig.rotated(problem, copies)
    cold = point.regime != HOT and copies * _weight_bytes(problem) > 3 * gpu.l2_bytes()
    laps = rig.laps_for(copies, limits.floor_s(work_of(point, Kind.OWN)))
    return Setting(point, gpu, limits, problems, cold, laps)


def own_peer(setting: Setting, plan: CastPlan, name: str, config: Config | None = None) -> peers.Peer:
    """The plan's Triton kernels on the setting's problems, as that config or else as kernels.dispatch cuts them."""
    problems, weights = rig.as_stored(plan, setting.problems), rig.stored_weights(plan, setting.problems)
    first = problems[0]
    if config is None:
        shape = (first.hidden_size, first.num_q_heads, first.num_kv_heads, first.head_dim)
        config = chosen(setting.gpu.name(), shape, first.tokens, plan)

    def call(i: int) -> Outputs:
        return run_triton(plan, problems[i], qkv_weight=weights[i], config=config)

    # inside a graph cuBLAS may choose another kernel than outside: judged by values
    differs = values_differ if config.kernel == "separate" else bits_differ
    return peers.Peer(Kind.OWN, name, call, plan, differs=differs, config=config)


def _time_parts(setting: Setting, records: Records, red: dict[str, str]) -> dict[Kind, dict[str, float]]:
    """Times of P1's parts and of our own loop, in rows of their own; seconds of those that have one."""
    point, problems = setting.point, setting.problems
    if point.regime not in grid.PARTED:
        return {}
    parts = [
        *peers.norm_peers(problems),
        *peers.head_norm_peers(problems, plan_named("one-rounding")),
        *peers.matmul_peers(problems),
        *(peers.loop_peer(problems, tile) for tile in grid.loop_tiles(point)),
    ]
    seconds: dict[Kind, dict[str, float]] = {}
    for peer, outcome in zip(parts, _time(setting, records, parts, red, PART_BUDGET_S), strict=True):
        if outcome.seconds:
            seconds.setdefault(peer.kind, {})[peer.what] = outcome.seconds.p50
    return seconds


def _chains(setting: Setting, seconds: dict[Kind, dict[str, float]]) -> list[peers.Peer]:
    """P1: our own norms around cuBLAS, the chain that dispatch falls back to; and the two best of separate parts, or
    where no parts were timed (hot rows, layers), the plainest one. All as one-rounding."""
    plan = plan_named("one-rounding")
    own = dataclasses.replace(own_peer(setting, plan, "own kernels | cuBLAS", SEPARATE), kind=Kind.CHAIN, config=None)
    plainest = [("F.rms_norm", "cuBLAS", peers.OWN_KERNEL)]
    picked = peers.pick_chains(seconds, at_most=2) if seconds else plainest
    return [own, *(peers.chain_peer(setting.problems, *chain, plan) for chain in picked)]


# ---------------------------------------------------------------- rows


def _time(
    setting: Setting, records: Records, arms: Sequence[peers.Peer], red: dict[str, str], budget_s: float,
    state: rig.State | None = None,
) -> list[Outcome]:  # fmt: skip
    """Times those arms in turns and adds their rows; what became of each. red: arms that get no time, and why."""
    measured = setting.measure([arm.arm() for arm in arms if arm.call and arm.name not in red], budget_s, state)
    outcomes = [
        Outcome(Status.RED, f"not timed: {red[arm.name]}")
        if arm.name in red
        else _plausible(setting, arm.kind, measured.outcomes.get(arm.name) or Outcome(arm.status, arm.reason))
        for arm in arms
    ]
    both = list(zip(arms, outcomes, strict=True))
    chains = {arm.name: found.seconds.p50 for arm, found in both if arm.kind == Kind.CHAIN and found.seconds}
    best = min(chains, key=chains.__getitem__, default=None)
    for arm, outcome in both:
        records.add(_speed_row(setting, measured, arm, outcome, best))
    return outcomes


def _speed_row(
    setting: Setting, measured: Measurement, arm: peers.Peer, outcome: Outcome, best: str | None
) -> GpuSpeedRow:
    """The row of that arm at the setting's point. best: the fastest P1, for the speed-up over it."""
    work = work_of(setting.point, arm.kind)
    floor_s = setting.limits.floor_s(work)
    row: dict[str, Any] = {
        **dataclasses.asdict(setting.point), "kind": arm.kind, "arm": arm.name, "function": arm.function,
        "copies": len(setting.problems), "cold": setting.cold, "rounds": measured.rounds, "laps": measured.laps,
        **dataclasses.asdict(work), "floor_us": floor_s * 1e6, **{name: measured.state.get(name) for name in STATE},
        **measured.noise_columns(),
    }  # fmt: skip
    if arm.config:
        row |= {"config": str(arm.config), "kernel": arm.config.kernel, "prepass": arm.config.prepass}
    if outcome.seconds:
        row |= rig.speed_columns(work, floor_s, outcome.seconds)
        if best:  # ratios of two times of one round
            speedup = rig.ratios(measured.samples[best], measured.samples[arm.name])
            row |= {"p1": best, **speedup.columns("speedup_p1_{}", 1)}
    return GpuSpeedRow(**row, status=outcome.status, reason=outcome.reason)


STATE = ("sm_mhz", "memory_mhz", "watts", "celsius", "slowed_by")


def _plausible(setting: Setting, kind: Kind, outcome: Outcome) -> Outcome:
    """The outcome, or red without a time that no such GPU can reach. Weights, where they are cold and the arm reads
    them, must come from memory."""
    if outcome.seconds is None:
        return outcome
    reads = setting.cold and kind not in (Kind.NORM, Kind.HEADS)
    cold_bytes = _weight_bytes(setting.problems[0]) if reads else 0
    flops = work_of(setting.point, kind).flops
    wrong = implausible(setting.gpu.name(), outcome.seconds.p50, cold_bytes, flops)
    return Outcome(Status.RED, wrong) if wrong else outcome


@functools.lru_cache(maxsize=1)
def model_problem(model: str, device: str) -> Problem:
    """Layer 0 of the model with the most tokens of the grid."""
    return synthetic_problem(model, 0, max(grid.TOKENS)).to(device)


def _weight_bytes(problem: Problem) -> int:
    return problem.qkv_weight.numel() * problem.qkv_weight.element_size()
