"""A point of the grid made ready, and arms timed at it: each checked before, none that costs more than its own row."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from torch import Tensor

from castpoint.harness.conformance.cuda import Binary, Checks
from castpoint.harness.gpu.order import HOT_COPIES, work_of
from castpoint.harness.peers import chains as peers
from castpoint.harness.problems import grid
from castpoint.harness.problems.drawn import synthetic_problem, with_positions
from castpoint.harness.problems.grid import HOT, LAYERS, ROPE, Point
from castpoint.harness.runs.flight import HANGS_S, in_flight
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import Row
from castpoint.harness.runs.words import Kind, Status
from castpoint.harness.timing import rig
from castpoint.harness.timing.cpu import Ceilings
from castpoint.harness.timing.cuda import Cuda, DeviceLost
from castpoint.harness.timing.limits import implausible
from castpoint.harness.timing.outputs import bits_differ, values_differ
from castpoint.harness.timing.rig import Measurement, Outcome, measure
from castpoint.kernels.config import Config
from castpoint.kernels.plan import DEFAULT, CastPlan
from castpoint.variants.backends import run_triton
from castpoint.variants.catalogue import plan_named
from castpoint.variants.eager import Outputs
from castpoint.variants.problem import Problem
from castpoint.variants.spec import with_table


@dataclass(frozen=True)
class Setting:
    """A point made ready: its problems, one a copy of the weights, and how often they are captured in one graph.
    limits: None where none were measured; then no row has a floor."""

    point: Point
    records: Records
    gpu: Cuda
    checks: Checks
    limits: Ceilings | None
    problems: list[Problem]
    cold: bool
    laps: int
    folded: dict[CastPlan, list[Tensor]] = field(default_factory=dict)

    def weights_of(self, plan: CastPlan) -> list[Tensor]:
        """The QKV weight of every problem as that plan stores it; folded once, for all its configs."""
        if plan.scale != "folded":
            return rig.stored_weights(plan, self.problems)
        if plan not in self.folded:
            self.folded[plan] = rig.stored_weights(plan, self.problems)
        return self.folded[plan]


def prepared(point: Point, records: Records, gpu: Cuda, checks: Checks, limits: Ceilings | None, arms: int) -> Setting:
    """The point's problems: weights rotated over three times L2, one copy a layer, or one weight that stays hot; fewer
    where memory does not hold them, with the outputs of so many arms."""
    problem = model_problem(point.model, gpu.device)
    problem = problem.replace(x=problem.x[: point.tokens])
    if point.regime == ROPE:
        problem = with_table(DEFAULT, with_positions(problem))  # fp32 phases, as all plans that are timed have them
    copies = copies_at(point, problem, gpu, arms)
    problems = [problem] * copies if point.regime == HOT else rig.rotated(problem, copies)
    cold = point.regime != HOT and copies * weight_bytes(problem) > 3 * gpu.l2_bytes()
    assumed = limits or Ceilings(*grid.ASSUMED["h200"])
    laps = rig.laps_for(copies, assumed.floor_s(work_of(point, Kind.OWN)))
    return Setting(point, records, gpu, checks, limits, problems, cold, laps)


def copies_at(point: Point, problem: Problem, gpu: Cuda, arms: int) -> int:
    """How many problems to rotate: as the regime wants, or what fits with all arms' outputs, own and folded weights."""
    wanted = rig.cold_copies(weight_bytes(problem), gpu.l2_bytes())
    wanted = {HOT: HOT_COPIES, LAYERS: point.geometry.num_layers}.get(point.regime, wanted)
    sets = 0 if point.regime == HOT else 2
    return rig.copies_that_fit(wanted, rig.copy_bytes(problem, arms, sets), gpu.free_bytes())


@dataclass(frozen=True)
class OwnPeer(peers.Peer):
    """A plan's own kernels, by the plan's name."""

    plan_name: str = ""


def own_peer(setting: Setting, plan_name: str, config: Config, what: str = "") -> OwnPeer:
    """The plan's Triton kernels on the setting's problems, cut as that config says. what: its name, or the plan's."""
    plan = plan_named(plan_name)
    problems, weights = rig.as_stored(plan, setting.problems), setting.weights_of(plan)

    def call(i: int) -> Outputs:
        return run_triton(plan, problems[i], qkv_weight=weights[i], config=config)

    # inside a graph cuBLAS may choose another kernel than outside: judged by values
    differs = values_differ if config.kernel == "separate" else bits_differ
    kept = {"rope": problems[0].positions is not None, "config": config, "plan_name": plan_name}
    return OwnPeer(Kind.OWN, what or plan_name, call, plan, differs=differs, **kept)


def timed(
    setting: Setting,
    arms: Mapping[str, peers.Peer],
    rows: Mapping[str, Row],
    binaries: Mapping[str, Binary],
    budget_s: float,
    state: rig.State | None = None,
    limit_s: float = HANGS_S,
) -> Measurement:
    """Times those arms in turns; of each an outcome. rows: what stands for an arm if the process ends at it. binaries:
    of own kernels, which are checked first: what is red gets no time. An arm that failed before, in a process that
    ended there, is left out. Raises DeviceLost, with that arm's row written, where one broke the CUDA context."""
    records = setting.records
    outcomes = {name: Outcome(arm.status, arm.reason) for name, arm in arms.items() if arm.call is None}
    died = {name: row for name, row in rows.items() if records.has(type(row), **vars(row))}
    outcomes |= {name: Outcome(Status.FAILED, "the process ended here before") for name in died}
    for name, binary in binaries.items():
        if name not in outcomes and (why := setting.checks.why_red(binary)):
            outcomes[name] = Outcome(Status.RED, f"not timed: {why}")
    fit = [arm.arm() for name, arm in arms.items() if name not in outcomes]

    def watch(name: str) -> AbstractContextManager[None]:
        return in_flight(records, {name: rows[name]}, DeviceLost, limit_s)

    with in_flight(records, {arm.name: rows[arm.name] for arm in fit}, DeviceLost, limit_s):
        options = {"copies": len(setting.problems), "laps": setting.laps, "budget_s": budget_s, "state": state}
        measured = measure(fit, setting.gpu, **options, watch=watch)
    kinds = {name: arm.kind for name, arm in arms.items()}
    found = {name: plausible(setting, kinds[name], outcome) for name, outcome in measured.outcomes.items()}
    samples = {name: s for name, s in measured.samples.items() if found[name].seconds}
    return dataclasses.replace(measured, outcomes=outcomes | found, samples=samples)


def plausible(setting: Setting, kind: Kind, outcome: Outcome) -> Outcome:
    """The outcome, or red without a time that no such GPU can reach. Weights, where they are cold and the arm reads
    them, must come from memory."""
    if outcome.seconds is None:
        return outcome
    reads = setting.cold and kind not in (Kind.NORM, Kind.HEADS)
    cold_bytes = weight_bytes(setting.problems[0]) if reads else 0
    flops = work_of(setting.point, kind).flops
    wrong = implausible(setting.gpu.name(), outcome.seconds.p50, cold_bytes, flops)
    return Outcome(Status.RED, wrong) if wrong else outcome


@functools.lru_cache(maxsize=4)  # a run goes from model to model
def model_problem(model: str, device: str) -> Problem:
    """Layer 0 of the model with the most tokens of the grid."""
    return synthetic_problem(model, 0, max(grid.TOKENS)).to(device)


def weight_bytes(problem: Problem) -> int:
    return problem.qkv_weight.numel() * problem.qkv_weight.element_size()
