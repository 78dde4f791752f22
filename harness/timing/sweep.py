"""Times of eager, torch.compile and every plan, written to records."""

from __future__ import annotations

import dataclasses
import itertools
import os
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from castpoint.harness.problems.drawn import problem_at
from castpoint.harness.runs.environment import last_cache_bytes
from castpoint.harness.runs.errors import reason_of
from castpoint.harness.runs.progress import track
from castpoint.harness.runs.records import Records, Settings
from castpoint.harness.runs.schema import SpeedRow
from castpoint.harness.runs.words import Backend, Status
from castpoint.harness.timing import cpu, limits, rig
from castpoint.harness.timing.cpu import Ceilings
from castpoint.harness.timing.cuda import Cuda
from castpoint.harness.timing.outputs import bits_differ, values_differ
from castpoint.kernels.plan import CastPlan
from castpoint.variants.backends import compiled_eager, compiled_plan, run_triton
from castpoint.variants.catalogue import plan_named
from castpoint.variants.eager import eager
from castpoint.variants.problem import Problem


class Timed(NamedTuple):
    """A plan, and what runs it."""

    plan: str
    backend: str

    def __str__(self) -> str:
        return f"{self.plan}/{self.backend}"


OWN_BACKENDS = (Backend.TRITON, Backend.TRITON_SEPARATE)
BASELINE, COMPILED = Timed("hf", Backend.EAGER), Timed("hf", Backend.COMPILED_EAGER)


def sweep_speed(settings: Settings, records: Records) -> None:
    """Eager, torch.compile and every plan, at every token count, cold: all layers' weights in rotation."""
    s = settings
    todo = [t for t in s.speed_tokens if not records.has(SpeedRow, tokens=t, **BASELINE._asdict())]
    if not todo:
        return
    load = os.getloadavg()[0]  # over a minute, before this starts: another busy process multiplies CPU times
    cpu.keep_freed_memory()
    gpu = Cuda() if s.device == "cuda" else None
    ceilings = cpu.measure_ceilings() if gpu is None else limits.ceilings(gpu)
    records.note(ceilings=dataclasses.asdict(ceilings), load_average=load)
    problems = _rotation([problem_at(s, layer, 1) for layer in s.layers], s, gpu)
    weights = {name: rig.stored_weights(plan_named(name), problems) for name in s.plans}
    for tokens in track(todo, "speed"):
        rng = torch.Generator().manual_seed(s.seed)
        x = torch.randn(tokens, problems[0].hidden_size, generator=rng).to(torch.bfloat16).to(s.device)
        at = [p.replace(x=x) for p in problems]
        arms = _speed_arms(s, at, weights)
        at = at[: _copies(at, len(arms), gpu)]
        rows = [row for row in records.rows("errors") if row["status"] in (Status.RED, Status.FAILED)]
        red = {str(Timed(row["plan"], row["backend"])): f"not timed: {row['reason']}" for row in rows}
        outcomes = {name: rig.Outcome(Status.RED, reason) for name, reason in red.items()}
        fit = [arm for arm in arms.values() if arm.name not in red]
        outcomes |= _timed_on_cpu(fit, len(at), s) if gpu is None else _timed_on_gpu(fit, at, gpu, ceilings)
        for timed in reversed(arms):  # eager last: its row says that this token count is complete
            records.add(_speed_row(s, timed, at, outcomes, ceilings))


def _timed_on_cpu(arms: list[rig.Arm], count: int, s: Settings) -> dict[str, rig.Outcome]:
    """Every arm runs once, to be compiled; those that do not fail are timed in turns."""
    ready, outcomes = {}, {}
    turn = itertools.cycle(range(count))
    for arm in track(arms, "compiling"):
        try:
            arm.call(0)
            ready[arm.name] = cpu.rotating(arm.call, turn)
        except Exception as error:  # whatever a compiler raises belongs into the row, not on the screen
            outcomes[arm.name] = rig.Outcome(Status.FAILED, reason_of(error))
    times = cpu.interleaved_times(ready, s.speed_budget_s)
    return outcomes | {name: rig.Outcome(Status.OK, seconds=rig.spread(values)) for name, values in times.items()}


def _timed_on_gpu(
    arms: list[rig.Arm], problems: list[Problem], gpu: Cuda, ceilings: Ceilings
) -> dict[str, rig.Outcome]:
    laps = rig.laps_for(len(problems), ceilings.floor_s(cpu.work_of(problems[0])))
    return rig.measure(arms, gpu, copies=len(problems), laps=laps).outcomes


def _speed_row(
    s: Settings, timed: Timed, problems: list[Problem], outcomes: dict[str, rig.Outcome], ceilings: Ceilings
) -> SpeedRow:
    """The row of one arm at one token count; without a time, but with status and reason, if it failed."""
    problem, outcome = problems[0], outcomes[str(timed)]
    work, rotated = cpu.work_of(problem), sum(p.qkv_weight.numel() * 2 for p in problems)
    row: dict[str, Any] = {"model": s.model, "tokens": problem.tokens, **timed._asdict(), **dataclasses.asdict(work)}
    cold = "cold" if rotated >= 3 * last_cache_bytes(s.device) else "weights not cold"
    row["regime"] = f"{cold}: {rotated / 1e6:.0f} MB of weights in rotation" + ", CUDA graph" * (s.device == "cuda")
    if seconds := outcome.seconds:
        row |= rig.speed_columns(work, ceilings.floor_s(work) * 1e6, seconds)
        baselines = {"speedup_vs_eager": outcomes[str(BASELINE)], "speedup_vs_compile": outcomes[str(COMPILED)]}
        row |= {column: base.seconds.p50 / seconds.p50 for column, base in baselines.items() if base.seconds}
    return SpeedRow(**row, status=outcome.status, reason=outcome.reason)


def _speed_arms(s: Settings, problems: list[Problem], weights: dict[str, list[Tensor]]) -> dict[Timed, rig.Arm]:
    """What is timed, each as a call on the i-th problem."""
    calls = {BASELINE: lambda i: eager(problems[i]), COMPILED: lambda i: compiled_eager()(problems[i])}
    backends = OWN_BACKENDS if s.device == "cuda" else (Backend.INDUCTOR,)  # Triton would run interpreted
    for name, backend in itertools.product(s.plans, backends):
        plan = plan_named(name)
        stored = rig.as_stored(plan, problems)
        calls[Timed(name, backend)] = partial(_own_call, plan, backend, stored, weights[name])
    differs = {timed: bits_differ if timed.backend in OWN_BACKENDS else values_differ for timed in calls}
    return {timed: rig.Arm(str(timed), call, differs[timed]) for timed, call in calls.items()}


def _own_call(plan: CastPlan, backend: Backend, problems: list[Problem], weights: list[Tensor], i: int) -> object:
    if backend == Backend.INDUCTOR:
        return compiled_plan(plan)(problems[i], weights[i])
    return run_triton(plan, problems[i], qkv_weight=weights[i], separate=backend == Backend.TRITON_SEPARATE)


def _rotation(problems: list[Problem], s: Settings, gpu: Cuda | None) -> list[Problem]:
    """Enough problems that their weights exceed three times the last cache, by copies of what there is; on a GPU no
    more than fit into its memory, with those that a plan folds."""
    weight = problems[0].qkv_weight.numel() * 2
    count = max(rig.cold_copies(weight, last_cache_bytes(s.device)), len(problems))
    if gpu is not None:
        folding = sum(plan_named(name).scale == "folded" for name in s.plans)
        count = rig.copies_that_fit(count, weight * (1 + folding), gpu.free_bytes())
    copies = [problems[i % len(problems)] for i in range(count)]
    return [p.replace(qkv_weight=p.qkv_weight.clone()) if i >= len(problems) else p for i, p in enumerate(copies)]


def _copies(problems: list[Problem], arms: int, gpu: Cuda | None) -> int:
    """How many of the problems to rotate: all; on a GPU as many as all arms' outputs fit for."""
    if gpu is None:
        return len(problems)
    return rig.copies_that_fit(len(problems), rig.copy_bytes(problems[0], arms, sets=0), gpu.free_bytes())
