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
from torch import Tensor

from castpoint.harness.conformance.cuda import check_loops, red_plans
from castpoint.harness.gpu.arms import compiled_peers, rows
from castpoint.harness.peers import chains as peers
from castpoint.harness.problems import grid
from castpoint.harness.problems.drawn import synthetic_problem
from castpoint.harness.problems.grid import HOT, LAYERS, ROPE, Point
from castpoint.harness.problems.positions import with_positions
from castpoint.harness.problems.work import Work
from castpoint.harness.runs.errors import UserError
from castpoint.harness.runs.progress import track
from castpoint.harness.runs.records import Records
from castpoint.harness.timing.cuda import Cuda
from castpoint.harness.timing.limits import ceilings, implausible, launch_costs, read_ceiling
from castpoint.harness.timing.outputs import values_differ
from castpoint.harness.timing.rig import Arm, Measurement, Outcome, copies_for, laps_for, measure, ratios, rotated
from castpoint.harness.timing.state import gpu_state
from castpoint.kernels.config import Config
from castpoint.kernels.dispatch import chosen
from castpoint.variants.backends import run_triton
from castpoint.variants.catalogue import plan_named
from castpoint.variants.eager import Outputs, plan_weight
from castpoint.variants.plan import CastPlan
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
    todo = [point for point in points if not records.has("gpu_points", **dataclasses.asdict(point))]
    if not todo:
        return
    limits = measure_limits(todo, records, gpu)
    check_loops(todo, records, gpu)
    red = red_plans(records)
    for point in track(todo, "grid"):
        try:
            _sweep_point(point, records, gpu, limits, red, quick)
            records.add("gpu_points", **dataclasses.asdict(point))
        except torch.OutOfMemoryError as error:
            reason = f"out of memory: {str(error)[:200]}"
            records.add("gpu_points", **dataclasses.asdict(point), status="failed", reason=reason)
        gpu.release()


def measure_limits(points: Sequence[Point], records: Records, gpu: Cuda) -> Limits:
    """Copy bandwidth, a stream that only reads, a large matmul, and the cost of launches; noted with the run.

    Raises UserError where neither bandwidth nor matmul could be measured, since no share of them could be given.
    """
    found = ceilings(gpu)
    problem = model_problem(points[0].model, gpu.device)
    copies = copies_for(_weight_bytes(problem), gpu.l2_bytes(), gpu.free_bytes()).copies
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
    gpu_name: str
    problems: list[Problem]
    cold: bool
    laps: int

    def measure(
        self, arms: Sequence[Arm], gpu: Cuda, baseline: str, budget_s: float, state: State | None = None
    ) -> Measurement:
        copies = len(self.problems)
        return measure(arms, gpu, copies=copies, laps=self.laps, baseline=baseline, budget_s=budget_s, state=state)


def _sweep_point(point: Point, records: Records, gpu: Cuda, limits: Limits, red: dict[str, str], quick: bool) -> None:
    setting = prepared(point, gpu, limits)
    seconds = _time_parts(setting, records, gpu, limits, red)
    arms = [_own_chain(setting), *_chains(setting, seconds), peers.eager_peer(setting.problems)]
    arms += [] if quick else peers.compiled_peers(setting.problems, compiled_peers(point))
    own = {name: own_arm(setting, plan_named(name), name) for name in grid.own_plans(point) if name not in red}
    ready = [peer.arm() for peer in arms if peer.call] + [arm for arm, _ in own.values()]
    measured = _plausible(setting, limits, "own", setting.measure(ready, gpu, ready[0].name, CHAIN_BUDGET_S, gpu_state))
    best = _best_chain(measured)
    write = functools.partial(_write, setting, records, limits, measured, best)
    for peer in arms:
        outcome = measured.outcomes.get(peer.name) or Outcome(peer.status, peer.reason)
        write(peer.name, "peer", peer.function, "", outcome, _work_of(point, peer.name))
    for name in grid.own_plans(point):
        outcome = Outcome("red", f"not timed: {red[name]}") if name in red else measured.outcomes[name]
        write(name, "own", name, str(own[name][1]) if name in own else "", outcome, _work_of(point, name))


def prepared(point: Point, gpu: Cuda, limits: Limits) -> Setting:
    """The point's problems: weights rotated over three times L2, one copy a layer, or one weight that stays hot."""
    problem = model_problem(point.model, gpu.device)
    problem = problem.replace(x=problem.x[: point.tokens])
    problem = with_positions(problem) if point.regime == ROPE else problem
    rotation = copies_for(_weight_bytes(problem), gpu.l2_bytes(), gpu.free_bytes(), sets=2)  # own and folded weights
    chosen_copies = {HOT: HOT_COPIES, LAYERS: point.geometry.num_layers}
    copies = chosen_copies.get(point.regime, rotation.copies)
    problems = [problem] * copies if point.regime == HOT else rotated(problem, copies)
    cold = point.regime != HOT and copies * _weight_bytes(problem) > 3 * gpu.l2_bytes()
    floor_s = _work_of(point, "").floor_s(limits.bytes_per_s, limits.flops_per_s)
    return Setting(point, limits.name, problems, cold, laps_for(copies, floor_s))


def own_arm(setting: Setting, plan: CastPlan, name: str, config: Config | None = None) -> tuple[Arm, Config]:
    """The plan's Triton kernels on the setting's problems, as that config or else as kernels.dispatch cuts them."""
    offset = plan.weight_offset != "none"
    problems = [p if p.weight_offset == offset else p.replace(weight_offset=offset) for p in setting.problems]
    first = problems[0]
    if config is None:
        shape = (first.hidden_size, first.num_q_heads, first.num_kv_heads, first.head_dim)
        config = chosen(setting.gpu_name, shape, first.tokens, plan.choices())
    weights = _weights(plan, problems)

    def call(i: int) -> Outputs:
        return run_triton(plan, problems[i], qkv_weight=weights[i], config=config)

    # inside a graph cuBLAS may choose another kernel than outside: judged by values
    return Arm(name, call, values_differ) if config.kernel == "separate" else Arm(name, call), config


def _weights(plan: CastPlan, problems: list[Problem]) -> list[Tensor]:
    """The stored weight of each problem; folded once for each that differs in memory."""
    stored: dict[int, Tensor] = {}
    for p in problems:
        if p.qkv_weight.data_ptr() not in stored:
            stored[p.qkv_weight.data_ptr()] = plan_weight(plan, p)
    return [stored[p.qkv_weight.data_ptr()] for p in problems]


def _own_chain(setting: Setting) -> peers.Peer:
    """P1 of our own norms around cuBLAS: the chain that dispatch falls back to, as one-rounding."""
    plan = plan_named("one-rounding")
    arm, _ = own_arm(setting, plan, "", SEPARATE)
    return peers.Peer("P1 own kernels | cuBLAS", arm.call, plan, differs=arm.differs)


def _time_parts(setting: Setting, records: Records, gpu: Cuda, limits: Limits, red: dict[str, str]) -> dict[str, float]:
    """Times of P1's parts and of our own loop, in rows of their own; seconds by name of those that have one."""
    point, problems = setting.point, setting.problems
    if point.regime not in grid.PARTED:
        return {}
    tiles = {peers.loop_name(tile): tile for tile in grid.loop_tiles(point)}
    parts = [
        *peers.norm_peers(problems),
        *peers.head_norm_peers(problems, plan_named("one-rounding")),
        *peers.matmul_peers(problems),
        *(peers.loop_peer(problems, tile) for name, tile in tiles.items() if name not in red),
        *(peers.Peer(name, None, None, "red", f"not timed: {red[name]}") for name in tiles if name in red),
    ]
    ready = [peer.arm() for peer in parts if peer.call]
    measured = _plausible(setting, limits, "part", setting.measure(ready, gpu, ready[0].name, PART_BUDGET_S))
    for peer in parts:
        outcome = measured.outcomes.get(peer.name) or Outcome(peer.status, peer.reason)
        work = _work_of(point, peer.name)
        config = str(tiles.get(peer.name, ""))
        _write(setting, records, limits, measured, None, peer.name, "part", peer.function, config, outcome, work)
    return {name: outcome.seconds.p50 for name, outcome in measured.outcomes.items() if outcome.seconds}


def _chains(setting: Setting, seconds: dict[str, float]) -> list[peers.Peer]:
    """The two best chains of separate parts; where no parts were timed (hot rows, layers), the plainest one."""
    plan = plan_named("one-rounding")
    picked = [("F.rms_norm", "cuBLAS", peers.OWN_KERNEL)]
    if seconds:
        picked = peers.pick_chains(seconds, at_most=2)
    return [peers.chain_peer(setting.problems, *chain, plan) for chain in picked]


def _best_chain(measured: Measurement) -> str | None:
    """The fastest P1, by its median; None if none has a time."""
    times = {n: o.seconds.p50 for n, o in measured.outcomes.items() if n.startswith("P1 ") and o.seconds}
    return min(times, key=times.__getitem__, default=None)


# ---------------------------------------------------------------- rows


def _write(
    setting: Setting,
    records: Records,
    limits: Limits,
    measured: Measurement | None,
    best: str | None,
    arm: str,
    kind: str,
    function: str,
    config: str,
    outcome: Outcome,
    work: Work,
) -> None:
    """One row of gpu_speed."""
    key = {**dataclasses.asdict(setting.point), "arm": arm}
    if records.has("gpu_speed", **key):
        return
    floor_s = work.floor_s(limits.bytes_per_s, limits.flops_per_s)
    row: dict[str, Any] = {
        **key, "kind": kind, "function": function, "config": config, "copies": len(setting.problems),
        "cold": setting.cold, **dataclasses.asdict(work), "floor_us": floor_s * 1e6,
    }  # fmt: skip
    if outcome.seconds:
        p50 = outcome.seconds.p50
        row |= {f"{name}_us": value * 1e6 for name, value in dataclasses.asdict(outcome.seconds).items()}
        row |= {"gbps": work.bytes / p50 / 1e9, "tflops": work.flops / p50 / 1e12, "roofline_share": floor_s / p50}
        row |= _against_best(measured, best, arm)
    if measured:
        noise = measured.noise
        row |= {"rounds": measured.rounds, "laps": measured.laps}
        row |= {"noise_p10": noise.p10, "noise_p90": noise.p90} if noise else {}
        row |= {name: measured.state.get(name) for name in STATE}
    records.add("gpu_speed", **row, status=outcome.status, reason=outcome.reason)


STATE = ("sm_mhz", "memory_mhz", "watts", "celsius", "slowed_by")


def _against_best(measured: Measurement | None, best: str | None, arm: str) -> dict[str, Any]:
    """Speed-up over the best P1, from ratios of two times of one round."""
    if not measured or not best:
        return {}
    speedup = dataclasses.asdict(ratios(measured.samples[best], measured.samples[arm]))
    return {"p1": best, **{f"speedup_p1_{name}": value for name, value in speedup.items()}}


def _plausible(setting: Setting, limits: Limits, kind: str, measured: Measurement) -> Measurement:
    """The measurement without the times that no such GPU can reach: those arms are red."""
    outcomes = {}
    for name, outcome in measured.outcomes.items():
        flops = _work_of(setting.point, name).flops
        cold = _cold_bytes(setting, kind, name)
        wrong = outcome.seconds and implausible(limits.name, outcome.seconds.p50, cold, flops)
        outcomes[name] = Outcome("red", wrong) if wrong else outcome
    return dataclasses.replace(measured, outcomes=outcomes)


def _cold_bytes(setting: Setting, kind: str, arm: str) -> float:
    """What must come from memory in a call: the weights, where they are cold and the arm reads them."""
    reads = kind != "part" or arm.startswith((peers.MATMUL, peers.LOOP))
    return float(_weight_bytes(setting.problems[0])) if setting.cold and reads else 0.0


def _work_of(point: Point, arm: str) -> Work:
    """What the arm needs at least; gpu.arms.rows says it for every arm that has no name of its own there."""
    known = {row.arm: row.work for row in rows(point)}
    return known.get(arm, known["P1 best"])


@functools.lru_cache(maxsize=1)
def model_problem(model: str, device: str) -> Problem:
    """Layer 0 of the model with the most tokens of the grid."""
    return synthetic_problem(model, 0, max(grid.TOKENS)).to(device)


def _weight_bytes(problem: Problem) -> int:
    return problem.qkv_weight.numel() * problem.qkv_weight.element_size()
