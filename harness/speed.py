"""Times of eager, torch.compile and every plan, written to records."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.environment import last_cache_bytes
from harness.precision import problem_at
from harness.progress import track
from harness.records import Records
from harness.settings import Settings
from harness.timing import (
    Ceilings,
    count_bytes,
    count_flops,
    graph_timer,
    interleaved_times,
    keep_freed_memory,
    measure_ceilings,
    rotating,
)
from variants.catalogue import plan_named
from variants.eager import eager, plan_weight
from variants.plan import CastPlan
from variants.problem import Problem
from variants.variant import compiled_eager, compiled_plan, run_triton


def sweep_speed(settings: Settings, records: Records) -> None:
    """Eager, torch.compile and every plan, at every token count, cold: all layers' weights in rotation."""
    s = settings
    todo = [t for t in s.speed_tokens if not records.has("speed", tokens=t, plan="hf", backend="eager")]
    if not todo:
        return
    load = os.getloadavg()[0]  # over a minute, before this starts: another busy process multiplies CPU times
    keep_freed_memory()
    ceilings = measure_ceilings(s.device)
    records.note(ceilings=dataclasses.asdict(ceilings), load_average=load)
    problems = _rotation([problem_at(s, layer, 1) for layer in s.layers], s.device)
    weights = {name: _stored_weights(plan_named(name), problems) for name in s.plans}
    for tokens in track(todo, "speed"):
        rng = torch.Generator().manual_seed(s.seed)
        x = torch.randn(tokens, problems[0].hidden_size, generator=rng).to(torch.bfloat16).to(s.device)
        at = [p.replace(x=x) for p in problems]
        arms = dict(_speed_arms(s, at, weights))
        red = {f"{r['plan']}/{r['backend']}": r for r in records.rows("errors") if r["status"] in ("red", "failed")}
        ready, failed = _warmed({n: arm for n, arm in arms.items() if n not in red}, len(at), s.device)
        failed |= {arm: ("red", f"not timed: {row['reason']}") for arm, row in red.items()}
        times = interleaved_times(ready, s.device, s.speed_budget_s)
        for arm in reversed(list(arms)):  # eager last: its row says that this token count is complete
            _add_speed(records, s, arm, at, times, failed, ceilings)


def _add_speed(
    records: Records,
    s: Settings,
    arm: str,
    problems: list[Problem],
    times: dict[str, list[float]],
    failed: dict[str, tuple[str, str]],
    ceilings: Ceilings,
) -> None:
    """The row of one arm at one token count; without a time, but with status and reason, if it failed."""
    plan, backend = arm.split("/")
    problem = problems[0]
    row: dict[str, Any] = {"model": s.model, "tokens": problem.tokens, "plan": plan, "backend": backend}
    if records.has("speed", **{name: row[name] for name in ("tokens", "plan", "backend")}):
        return
    rotated = sum(p.qkv_weight.numel() * 2 for p in problems)
    cold = "cold" if rotated >= 3 * last_cache_bytes(s.device) else "weights not cold"
    row["regime"] = f"{cold}: {rotated / 1e6:.0f} MB of weights in rotation" + (
        ", CUDA graph" if s.device == "cuda" else ""
    )
    row |= {"bytes": count_bytes(problem), "flops": count_flops(problem)}
    if arm in failed:
        status, reason = failed[arm]
        records.add("speed", **row, status=status, reason=reason)
        return
    p10, p50, p90 = np.quantile(times[arm], [0.1, 0.5, 0.9])
    baselines = {"speedup_vs_eager": "hf/eager", "speedup_vs_compile": "hf/torch.compile"}
    records.add(
        "speed",
        **row,
        p10_us=p10 * 1e6,
        p50_us=p50 * 1e6,
        p90_us=p90 * 1e6,
        gbps=row["bytes"] / p50 / 1e9,
        tflops=row["flops"] / p50 / 1e12,
        roofline_share=ceilings.floor_s(problem) / p50,
        **{column: float(np.median(times[base])) / p50 for column, base in baselines.items() if base in times},
    )


def _stored_weights(plan: CastPlan, problems: list[Problem]) -> list[Tensor]:
    """The QKV weight of every problem as the plan stores it: folded where it folds, else the problem's own tensor."""
    return [plan_weight(plan, _as_stored(plan, p)) for p in problems]


def _as_stored(plan: CastPlan, problem: Problem) -> Problem:
    """The problem with its norm weights read as the plan reads them: the time of a plan does not depend on values."""
    offset = plan.weight_offset != "none"
    return problem if problem.weight_offset == offset else problem.replace(weight_offset=offset)


def _speed_arms(
    s: Settings, problems: list[Problem], weights: dict[str, list[Tensor]]
) -> Iterator[tuple[str, Callable[[int], object]]]:
    """`plan/backend` -> a call on the i-th problem."""
    yield "hf/eager", lambda i: eager(problems[i])
    yield "hf/torch.compile", lambda i: compiled_eager()(problems[i])
    for name in s.plans:
        plan = plan_named(name)
        own = [_as_stored(plan, p) for p in problems]
        yield f"{name}/inductor", partial(_inductor_call, plan, own, weights[name])
        if s.device == "cuda":
            yield f"{name}/triton", partial(_triton_call, plan, own, weights[name], separate=False)
            yield f"{name}/triton-separate", partial(_triton_call, plan, own, weights[name], separate=True)


def _inductor_call(plan: Any, problems: list[Problem], weights: list[Tensor], i: int) -> object:
    return compiled_plan(plan)(problems[i], weights[i])


def _triton_call(plan: Any, problems: list[Problem], weights: list[Tensor], i: int, *, separate: bool) -> object:
    return run_triton(plan, problems[i], qkv_weight=weights[i], separate=separate)


def _warmed(
    arms: dict[str, Callable[[int], object]], count: int, device: str
) -> tuple[dict[str, Callable[[], object]], dict[str, tuple[str, str]]]:
    """Arms that ran once, ready to be timed, and those that failed, with status and reason."""
    ready, failed = {}, {}
    turn = itertools.cycle(range(count))
    for name, call in track(list(arms.items()), "compiling"):
        try:
            call(0)
            ready[name] = graph_timer(call, count) if device == "cuda" else rotating(call, turn)
        except Exception as error:  # whatever a compiler or a driver raises belongs into the row, not on the screen
            failed[name] = ("failed", f"{type(error).__name__}: {str(error)[:200]}")
    return ready, failed


def _rotation(problems: list[Problem], device: str) -> list[Problem]:
    """Enough problems that their weights exceed three times the last cache, by copies of what there is."""
    wanted = 3 * last_cache_bytes(device) // (problems[0].qkv_weight.numel() * 2) + 1
    copies = [problems[i % len(problems)] for i in range(max(wanted, len(problems)))]
    return [p.replace(qkv_weight=p.qkv_weight.clone()) if i >= len(problems) else p for i, p in enumerate(copies)]
