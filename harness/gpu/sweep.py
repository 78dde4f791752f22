"""`make gpu`: the grid of problems.grid on a CUDA device, written to records as it is measured.

At each point P1's parts are timed, and among them our own loop with every tile; then the chains of the best parts
together with every other arm, in turns. Own plans run as kernels.dispatch chooses, once they passed
conformance.cuda: what is red gets no time. An arm that fails is a row with a reason, and the grid goes on; a broken
CUDA context ends the run, and the next one continues it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from castpoint.harness.conformance.cuda import check_loops, red_plans
from castpoint.harness.gpu.arms import compiled_peers, work_of
from castpoint.harness.peers import chains as peers
from castpoint.harness.problems import grid
from castpoint.harness.problems.drawn import synthetic_problem, with_positions
from castpoint.harness.problems.grid import HOT, LAYERS, ROPE, Point
from castpoint.harness.runs.errors import UserError
from castpoint.harness.runs.progress import track
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import GpuPointRow, GpuSpeedRow, Kind, Status
from castpoint.harness.timing import rig
from castpoint.harness.timing.cuda import Cuda
from castpoint.harness.timing.limits import ceilings, implausible, launch_costs, read_ceiling
from castpoint.harness.timing.outputs import values_differ
from castpoint.harness.timing.rig import Arm, Measurement, Outcome, copies_for, laps_for, measure, ratios, rotated
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
State = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Limits:
    """What this GPU can do at most, as measured in this run."""

    name: str
    bytes_per_s: float
    flops_per_s: float


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
        try:
            _sweep_point(point, records, gpu, limits, red, quick)
            records.add(GpuPointRow(**dataclasses.asdict(point)))
        except torch.OutOfMemoryError as error:
            reason = f"out of memory: {str(error)[:200]}"
            records.add(GpuPointRow(**dataclasses.asdict(point), status=Status.FAILED, reason=reason))
        gpu.release()


def measure_limits(points: Sequence[Point], records: Records, gpu: Cuda) -> Limits:
    """Copy bandwidth, a stream that only reads, a large matmul, and the cost of launches; noted with the run.

    Raises UserError where neither bandwidth nor matmul could be measured, since no share of them could be given.
    """
    found = ceilings(gpu)
    problem = model_problem(points[0].model, gpu.device)
    copies = copies_for(_weight_bytes(problem), gpu.l2_bytes(), gpu.free_bytes())
    read = read_ceiling(gpu, [p.qkv_weight for p in rotated(problem, copies)])
    records.note(limits={**found, "read": read, "launch": launch_costs(gpu)})
    copy, flops = found["copy_bytes_per_s"], found["bf16_flops_per_s"]
    if copy is None or flops is None:
        raise UserError(f"the GPU's own limits could not be measured: {found['reason']}")
    return Limits(gpu.name(), max(copy, read.get("bytes_per_s", 0.0)), flops)


# ---------------------------------------------------------------- a point


@dataclass(frozen=True)
class Setting:
    """A point made ready: its problems, one a copy of the weights, and how often they are captured in one graph."""

    point: Point
    limits: Limits
    problems: list[Problem]
    cold: bool
    laps: int

    def measure(
        self, arms: Sequence[Arm], gpu: Cuda, baseline: str, budget_s: float, state: State | None = None
    ) -> Measurement:
        copies = len(self.problems)
        return measure(arms, gpu, copies=copies, laps=self.laps, baseline=baseline, budget_s=budget_s, state=state)


@dataclass(frozen=True)
class Entry:
    """An arm as its row names it. function: the plan, or what is rounded. untimed: what it is where it cannot run."""

    kind: Kind
    arm: str
    function: str
    config: Config | None = None
    untimed: Outcome | None = None


def _entry(peer: peers.Peer, config: Config | None = None) -> Entry:
    return Entry(peer.kind, peer.name, peer.function, config, Outcome(peer.status, peer.reason))


def _sweep_point(point: Point, records: Records, gpu: Cuda, limits: Limits, red: dict[str, str], quick: bool) -> None:
    setting = prepared(point, gpu, limits)
    seconds = _time_parts(setting, records, gpu, red)
    arms = [_own_chain(setting), *_chains(setting, seconds), peers.eager_peer(setting.problems)]
    arms += [] if quick else peers.compiled_peers(setting.problems, compiled_peers(point))
    own = {name: own_arm(setting, plan_named(name), name) for name in grid.own_plans(point) if name not in red}
    ready = [peer.arm() for peer in arms if peer.call] + [arm for arm, _ in own.values()]
    entries = [_entry(peer) for peer in arms]
    entries += [Entry(Kind.OWN, name, name, own[name][1] if name in own else None) for name in grid.own_plans(point)]
    timed = setting.measure(ready, gpu, ready[0].name, CHAIN_BUDGET_S, gpu_state)
    _add_rows(setting, records, entries, timed, red)


def prepared(point: Point, gpu: Cuda, limits: Limits) -> Setting:
    """The point's problems: weights rotated over three times L2, one copy a layer, or one weight that stays hot."""
    problem = model_problem(point.model, gpu.device)
    problem = problem.replace(x=problem.x[: point.tokens])
    problem = with_positions(problem) if point.regime == ROPE else problem
    fitting = copies_for(_weight_bytes(problem), gpu.l2_bytes(), gpu.free_bytes(), sets=2)  # own and folded weights
    copies = {HOT: HOT_COPIES, LAYERS: point.geometry.num_layers}.get(point.regime, fitting)
    problems = [problem] * copies if point.regime == HOT else rotated(problem, copies)
    cold = point.regime != HOT and copies * _weight_bytes(problem) > 3 * gpu.l2_bytes()
    floor_s = work_of(point, Kind.OWN).floor_s(limits.bytes_per_s, limits.flops_per_s)
    return Setting(point, limits, problems, cold, laps_for(copies, floor_s))


def own_arm(setting: Setting, plan: CastPlan, name: str, config: Config | None = None) -> tuple[Arm, Config]:
    """The plan's Triton kernels on the setting's problems, as that config or else as kernels.dispatch cuts them."""
    problems, weights = rig.as_stored(plan, setting.problems), rig.stored_weights(plan, setting.problems)
    first = problems[0]
    if config is None:
        shape = (first.hidden_size, first.num_q_heads, first.num_kv_heads, first.head_dim)
        config = chosen(setting.limits.name, shape, first.tokens, plan)

    def call(i: int) -> Outputs:
        return run_triton(plan, problems[i], qkv_weight=weights[i], config=config)

    # inside a graph cuBLAS may choose another kernel than outside: judged by values
    return Arm(name, call, values_differ) if config.kernel == "separate" else Arm(name, call), config


def _own_chain(setting: Setting) -> peers.Peer:
    """P1 of our own norms around cuBLAS: the chain that dispatch falls back to, as one-rounding."""
    plan = plan_named("one-rounding")
    arm, _ = own_arm(setting, plan, "", SEPARATE)
    return peers.Peer(Kind.CHAIN, "own kernels | cuBLAS", arm.call, plan, differs=arm.differs)


def _time_parts(setting: Setting, records: Records, gpu: Cuda, red: dict[str, str]) -> dict[Kind, dict[str, float]]:
    """Times of P1's parts and of our own loop, in rows of their own; seconds of those that have one."""
    point, problems = setting.point, setting.problems
    if point.regime not in grid.PARTED:
        return {}
    tiles = {peers.loop_name(tile): tile for tile in grid.loop_tiles(point)}
    parts = [
        *peers.norm_peers(problems),
        *peers.head_norm_peers(problems, plan_named("one-rounding")),
        *peers.matmul_peers(problems),
        *(peers.loop_peer(problems, tile) for tile in tiles.values()),
    ]
    ready = [peer.arm() for peer in parts if peer.call and peer.name not in red]
    entries = [_entry(peer, tiles.get(peer.name)) for peer in parts]
    outcomes = _add_rows(setting, records, entries, setting.measure(ready, gpu, ready[0].name, PART_BUDGET_S), red)
    seconds: dict[Kind, dict[str, float]] = {}
    for peer in parts:
        if found := outcomes[peer.name].seconds:
            seconds.setdefault(peer.kind, {})[peer.what] = found.p50
    return seconds


def _chains(setting: Setting, seconds: dict[Kind, dict[str, float]]) -> list[peers.Peer]:
    """The two best chains of separate parts; where no parts were timed (hot rows, layers), the plainest one."""
    plan = plan_named("one-rounding")
    plainest = [("F.rms_norm", "cuBLAS", peers.OWN_KERNEL)]
    picked = peers.pick_chains(seconds, at_most=2) if seconds else plainest
    return [peers.chain_peer(setting.problems, *chain, plan) for chain in picked]


def _best_chain(entries: Sequence[Entry], measured: Measurement) -> str | None:
    """The fastest P1, by its median; None if none has a time."""
    chains = [(entry.arm, measured.outcomes.get(entry.arm)) for entry in entries if entry.kind == Kind.CHAIN]
    times = {arm: outcome.seconds.p50 for arm, outcome in chains if outcome and outcome.seconds}
    return min(times, key=times.__getitem__, default=None)


# ---------------------------------------------------------------- rows


def _add_rows(
    setting: Setting, records: Records, entries: Sequence[Entry], timed: Measurement, red: dict[str, str]
) -> dict[str, Outcome]:
    """The rows of those arms at the setting's point; what became of each."""
    measured = _plausible(setting, entries, timed)
    best = _best_chain(entries, measured)
    outcomes = {entry.arm: measured.outcomes.get(entry.arm) or entry.untimed for entry in entries}
    outcomes |= {arm: Outcome(Status.RED, f"not timed: {red[arm]}") for arm in outcomes if arm in red}
    for entry in entries:
        records.add(_speed_row(setting, measured, entry, outcomes[entry.arm], best))
    return outcomes


def _speed_row(
    setting: Setting, measured: Measurement, entry: Entry, outcome: Outcome, best: str | None
) -> GpuSpeedRow:
    """The row of that arm at the setting's point. best: the fastest P1, for the speed-up over it."""
    work = work_of(setting.point, entry.kind)
    floor_s = work.floor_s(setting.limits.bytes_per_s, setting.limits.flops_per_s)
    row: dict[str, Any] = {
        **dataclasses.asdict(setting.point), "kind": entry.kind, "arm": entry.arm, "function": entry.function,
        "copies": len(setting.problems), "cold": setting.cold, "rounds": measured.rounds, "laps": measured.laps,
        **dataclasses.asdict(work), "floor_us": floor_s * 1e6, **{name: measured.state.get(name) for name in STATE},
    }  # fmt: skip
    if entry.config:
        row |= {"config": str(entry.config), "kernel": entry.config.kernel, "prepass": entry.config.prepass}
    if outcome.seconds:
        p50 = outcome.seconds.p50
        row |= {f"{name}_us": value * 1e6 for name, value in dataclasses.asdict(outcome.seconds).items()}
        row |= {"gbps": work.bytes / p50 / 1e9, "tflops": work.flops / p50 / 1e12, "roofline_share": floor_s / p50}
        if best:  # ratios of two times of one round
            speedup = dataclasses.asdict(ratios(measured.samples[best], measured.samples[entry.arm]))
            row |= {"p1": best, **{f"speedup_p1_{name}": value for name, value in speedup.items()}}
    if measured.noise:
        row |= {"noise_p10": measured.noise.p10, "noise_p90": measured.noise.p90}
    return GpuSpeedRow(**row, status=outcome.status, reason=outcome.reason)


STATE = ("sm_mhz", "memory_mhz", "watts", "celsius", "slowed_by")


def _plausible(setting: Setting, entries: Sequence[Entry], measured: Measurement) -> Measurement:
    """The measurement without the times that no such GPU can reach: those arms are red."""
    outcomes = dict(measured.outcomes)
    for entry in entries:
        outcome = outcomes.get(entry.arm)
        if outcome and outcome.seconds:
            flops, cold = work_of(setting.point, entry.kind).flops, _cold_bytes(setting, entry.kind)
            if wrong := implausible(setting.limits.name, outcome.seconds.p50, cold, flops):
                outcomes[entry.arm] = Outcome(Status.RED, wrong)
    return dataclasses.replace(measured, outcomes=outcomes)


def _cold_bytes(setting: Setting, kind: Kind) -> float:
    """What must come from memory in a call: the weights, where they are cold and the arm reads them."""
    reads = kind not in (Kind.NORM, Kind.HEADS)
    return float(_weight_bytes(setting.problems[0])) if setting.cold and reads else 0.0


@functools.lru_cache(maxsize=1)
def model_problem(model: str, device: str) -> Problem:
    """Layer 0 of the model with the most tokens of the grid."""
    return synthetic_problem(model, 0, max(grid.TOKENS)).to(device)


def _weight_bytes(problem: Problem) -> int:
    return problem.qkv_weight.numel() * problem.qkv_weight.element_size()
