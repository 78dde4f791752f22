"""The measuring rig for CUDA: each arm of a comparison is a CUDA graph, timed in turns with the others and checked.

call(i)   runs an arm on the i-th copy of its weights and returns a tuple of new tensors. Copies rotate, so that none
          is in the L2 cache when its turn comes round again. With a model's layers for copies, the same measurement
          is a chain of layers: kernels of one stream follow one another, and the time of a call is that of a layer
graph     call(0) ... call(copies - 1), captured as often in a row as it takes to make the cost of replaying it small
round     A B C ... C B A, each graph timed twice: a machine that slows down linearly slows all arms by equal amounts

A time counts only with its outputs: before and after the timing each graph's outputs are filled with NaN, the graph
runs once, and they must equal what the same calls returned outside it. An arm that fails is a status and a reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from castpoint.harness.problems.geometry import Work
from castpoint.harness.runs.words import Status
from castpoint.harness.timing.cuda import Call, Cuda, Graph, reason_of
from castpoint.harness.timing.outputs import Differs, bits_differ, wrong_outputs
from castpoint.kernels.plan import CastPlan
from castpoint.variants.eager import plan_weight
from castpoint.variants.problem import Problem

COLD_CACHES = 3  # rotated weights must exceed this many times the L2 cache
MEMORY_SHARE = 0.75  # of free memory, for copies; what arms hold between kernels, workspaces and checks need the rest
GRAPH_S, GRAPH_CALLS = 1e-3, 256  # a replay costs a few us: laps of the rotation until the graph runs 1 ms
SAMPLE_S = 1e-3  # replays of a graph between two events, so that their own resolution (0.5 us) is small
MAX_REPLAYS = 500
WARM_S = 0.2  # rounds that are not counted, so that clocks settle
MIN_ROUNDS, MAX_ROUNDS = 10, 200
STEADY = 0.01  # (p90 - p10) / p50 of every arm, at which no more rounds are needed
LOAD_S = 0.5  # replays that run while the GPU is asked for its clocks
AGAIN = " (again)"
State = Callable[[], dict[str, Any]]  # timing.state.gpu_state
Watch = Callable[[str], AbstractContextManager[None]]  # within it the arm of that name runs for the first time


# ---------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class Arm:
    """One way to do the work. differs judges the graph's outputs against those of the same calls outside it."""

    name: str
    call: Call
    differs: Differs = bits_differ


@dataclass(frozen=True)
class Spread:
    """Percentiles over rounds: of seconds, or of a ratio."""

    p10: float
    p50: float
    p90: float

    def columns(self, form: str = "{}_us", scale: float = 1e6) -> dict[str, float]:
        """As columns of a row: of seconds those in us."""
        return {form.format(name): value * scale for name, value in vars(self).items()}


@dataclass(frozen=True)
class Outcome:
    """What became of one arm: status `ok`, `red` (wrong outputs) or `failed` (did not run), with the reason.
    seconds: of one call."""

    status: Status
    reason: str = ""
    seconds: Spread | None = None


@dataclass(frozen=True)
class Measurement:
    """noise: the first arm's seconds / those of the same call captured once more.
    samples: seconds of every arm that has a time, one a round, for ratios of two arms."""

    outcomes: dict[str, Outcome]
    samples: dict[str, list[float]]
    rounds: int
    laps: int
    noise: Spread | None
    state: dict[str, Any]

    def noise_columns(self) -> dict[str, float]:
        return {"noise_p10": self.noise.p10, "noise_p90": self.noise.p90} if self.noise else {}


def cold_copies(weight_bytes: int, l2_bytes: int) -> int:
    """Fewest copies whose weights exceed 3 x L2: 22 for 8.4 MB and 60 MB. Where the cache's size is unknown (0), one.
    Raises ValueError for a weight without bytes."""
    if weight_bytes <= 0:
        raise ValueError(f"a weight of {weight_bytes} bytes cannot be rotated: it must have some")
    return COLD_CACHES * l2_bytes // weight_bytes + 1


def copy_bytes(problem: Problem, arms: int, sets: int = 1) -> int:
    """Bytes that one more copy costs a measurement of so many arms: its QKV weight, `sets` times, and for every arm,
    and the first one again, the outputs expected and those of its graph, [T, rows] bf16.

    sets: once as it is, once more for every arm that folds or quantises it; 0 where all are in memory already.
    """
    weight = problem.qkv_weight
    return 2 * (sets * weight.numel() + 2 * (arms + 1) * problem.tokens * weight.shape[0])


def copies_that_fit(wanted: int, copy_bytes: int, free_bytes: int) -> int:
    """As many copies as wanted, or what fits into 3/4 of free memory; at least one. copy_bytes: of one, in all."""
    return max(1, min(wanted, int(MEMORY_SHARE * free_bytes) // copy_bytes))


def laps_for(copies: int, floor_s: float) -> int:
    """How often the rotation is captured in one graph: until it runs 1 ms at floor_s a call, at most 256 calls."""
    return max(1, min(math.ceil(GRAPH_S / (copies * floor_s)), GRAPH_CALLS // copies))


def rotated(problem: Problem, copies: int) -> list[Problem]:
    """The problem and others like it, each with weights of its own in memory: a rotation, or a chain of layers.

    Their channels are shifted, so that they differ in values too: an output that was left from another copy, or made
    from another copy's weights, is a wrong one.
    """
    weight = problem.qkv_weight
    return [problem, *(problem.replace(qkv_weight=weight.roll(i, 1)) for i in range(1, copies))]


def as_stored(plan: CastPlan, problems: Sequence[Problem]) -> list[Problem]:
    """The problems with norm weights read as the plan reads them: the time of a plan does not depend on values."""
    offset = plan.weight_offset != "none"
    return [p if p.weight_offset == offset else p.replace(weight_offset=offset) for p in problems]


def stored_weights(plan: CastPlan, problems: Sequence[Problem]) -> list[Tensor]:
    """The QKV weight of every problem as the plan stores it; folded, where it folds, once for each place in memory."""
    distinct = {p.qkv_weight.data_ptr(): p for p in as_stored(plan, problems)}
    stored = {place: plan_weight(plan, p) for place, p in distinct.items()}
    return [stored[p.qkv_weight.data_ptr()] for p in problems]


# ---------------------------------------------------------------- measuring


@dataclass
class _Ready:
    """An arm that was captured and checked."""

    arm: Arm
    graph: Graph
    expected: list[tuple[Tensor, ...]]
    graph_s: float = SAMPLE_S  # until it is known: samples of one replay


def measure(
    arms: Sequence[Arm], gpu: Cuda, *, copies: int, laps: int = 1, budget_s: float = 1.0, state: State | None = None,
    watch: Watch = lambda name: nullcontext(),
) -> Measurement:  # fmt: skip
    """Seconds a call of every arm, and the noise of a ratio of two, from rounds A B C ... C B A.

    Rounds go on until the budget is spent or every arm's p10 to p90 lies within 1 % of its median: 200 at most, and
    10 even if those cost more than the budget, since fewer have no 10th percentile. The noise floor is the ratio of two
    graphs of the first arm that did not fail: a difference that lies inside it is none.

    state: asked once after the last round, while the GPU still works. watch: is told of every arm before it first runs.
    Raises DeviceLost, with the arm's name, where one broke the CUDA context, ValueError for two arms of one name.
    """
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise ValueError(f"arms need different names: {names}")
    ready: dict[str, _Ready] = {}
    lost: dict[str, Outcome] = {}
    for arm in arms:
        with watch(arm.name):
            _prepare(arm, gpu, copies, laps, ready, lost)
    noise_of = next(iter(ready), "")
    if noise_of:
        with watch(noise_of):
            _prepare(replace(ready[noise_of].arm, name=noise_of + AGAIN), gpu, copies, laps, ready, lost)

    _warm_up(gpu, ready, lost)
    seconds = _rounds(gpu, ready, lost, budget_s)
    facts = _state_under_load(gpu, ready, state) if state else {}
    _check_again(gpu, ready, lost)
    ready.clear()
    gpu.release()

    timed = {name: values for name, values in seconds.items() if name not in lost}
    outcomes = {name: lost.get(name) or Outcome(Status.OK, seconds=spread(timed[name])) for name in names}
    pair = [timed.get(noise_of), timed.get(noise_of + AGAIN)]
    noise = ratios(*pair) if all(pair) else None
    rounds = max((len(values) for values in timed.values()), default=0)
    samples = {name: timed[name] for name in names if name in timed}
    return Measurement(outcomes, samples, rounds, laps, noise, facts)


def spread(values: Sequence[float]) -> Spread:
    return Spread(*(float(v) for v in np.quantile(values, [0.1, 0.5, 0.9])))


def speed_columns(work: Work, floor_us: float | None, seconds: Spread) -> dict[str, float | None]:
    """Columns of a row: the times, what the median reaches, and its share of what the machine allows, where known."""
    p50 = seconds.p50
    share = None if floor_us is None else floor_us * 1e-6 / p50
    return {
        **seconds.columns(),
        **{"gbps": work.bytes / p50 / 1e9, "tflops": work.flops / p50 / 1e12, "roofline_share": share},
    }


def ratios(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Percentiles over rounds of the ratio of two times of one round, not the ratio of percentiles: the clock that both
    share in a round cancels (where it varies by 3 to 30 %, the median so errs 1.4 to 3.3 times less in 10 to 50
    rounds), and p10 and p90 say how far the ratio itself can be trusted."""
    return spread(np.divide(above, below))


def replays_for(graph_s: float, wanted_s: float) -> int:
    """Replays of a graph of that duration that fill the wanted time, 1 to 500."""
    return max(1, min(math.ceil(wanted_s / max(graph_s, 1e-9)), MAX_REPLAYS))


def _prepare(arm: Arm, gpu: Cuda, copies: int, laps: int, ready: dict[str, _Ready], lost: dict[str, Outcome]) -> None:
    """Runs the arm outside a graph, captures it and checks the graph's outputs; a failure goes to lost."""
    try:
        expected = [tuple(tensor.clone() for tensor in arm.call(i)) for i in range(copies)]
        graph = gpu.capture(arm.call, copies, laps)
        wrong = wrong_outputs(gpu, graph, expected, arm.differs)
        if wrong:
            lost[arm.name] = Outcome(Status.RED, f"before timing: {wrong}")
        else:
            ready[arm.name] = _Ready(arm, graph, expected)
    except Exception as error:
        lost[arm.name] = Outcome(Status.FAILED, _reason(gpu, arm.name, error))
    if arm.name in lost:
        expected = graph = None  # what the next arm may need
        gpu.release()


def _warm_up(gpu: Cuda, ready: dict[str, _Ready], lost: dict[str, Outcome]) -> None:
    """Rounds that are not counted. The first, of single replays, says how many replays make a sample."""
    start = gpu.now()
    _round(gpu, ready, lost)
    for name, seconds in _round(gpu, ready, lost).items():
        ready[name].graph_s = seconds * ready[name].graph.calls
    while ready and gpu.now() - start < WARM_S:
        _round(gpu, ready, lost)


def _rounds(gpu: Cuda, ready: dict[str, _Ready], lost: dict[str, Outcome], budget_s: float) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    start = gpu.now()
    for done in range(MAX_ROUNDS):
        spreads = [spread(seconds[name]) for name in ready] if done >= MIN_ROUNDS else []
        steady = all(s.p90 - s.p10 <= STEADY * s.p50 for s in spreads)
        if done >= MIN_ROUNDS and (steady or gpu.now() - start > budget_s):
            break
        for name, value in _round(gpu, ready, lost).items():
            seconds[name].append(value)
    return seconds


def _round(gpu: Cuda, ready: dict[str, _Ready], lost: dict[str, Outcome]) -> dict[str, float]:
    """A B C ... C B A: the mean of each arm's two times. An arm that fails moves from ready to lost."""
    sums = dict.fromkeys(ready, 0.0)
    for name in [*ready, *reversed(ready)]:
        if name not in ready:
            continue
        try:
            sums[name] += gpu.seconds(ready[name].graph, replays_for(ready[name].graph_s, SAMPLE_S)) / 2
        except Exception as error:
            lost[name] = Outcome(Status.FAILED, _reason(gpu, name, error))
            del ready[name]
    return {name: sums[name] for name in ready}


def _check_again(gpu: Cuda, ready: dict[str, _Ready], lost: dict[str, Outcome]) -> None:
    for name, one in ready.items():
        try:
            wrong = wrong_outputs(gpu, one.graph, one.expected, one.arm.differs)
        except Exception as error:
            lost[name] = Outcome(Status.FAILED, _reason(gpu, name, error))
        else:
            if wrong:
                lost[name] = Outcome(Status.RED, f"after timing: {wrong}")


def _reason(gpu: Cuda, name: str, error: Exception) -> str:
    """cuda.reason_of, by the name of the arm that was captured twice."""
    return reason_of(gpu, name.removesuffix(AGAIN), error)


def _state_under_load(gpu: Cuda, ready: dict[str, _Ready], state: State) -> dict[str, Any]:
    """The GPU's state while replays of the first arm run: an idle GPU would show the clocks of an idle GPU."""
    for one in list(ready.values())[:1]:
        gpu.replay(one.graph, replays_for(one.graph_s, LOAD_S))
    facts = state()
    gpu.synchronize()
    return facts
