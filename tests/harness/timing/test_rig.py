"""The rig's decisions, on a machine without a GPU: a fake CUDA replays calls on the CPU and its clock is a script."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import FakeCuda
from support import random_problem

from castpoint.harness.peers.chains import chain_peer, eager_peer, matmul_peers
from castpoint.harness.timing import outputs as rig_outputs
from castpoint.harness.timing import rig
from castpoint.harness.timing.cuda import DeviceLost, Graph
from castpoint.harness.timing.outputs import bits_differ, values_differ
from castpoint.harness.timing.rig import (
    AGAIN,
    Arm,
    Rotation,
    copies_for,
    laps_for,
    measure,
    ratios,
    replays_for,
    rotated,
    spread,
)
from castpoint.variants.catalogue import plan_named

COPIES = 3
PARTS = ("F.rms_norm", "cuBLAS", "head_norm kernel")


class Fake:
    """A call that returns its copy's own numbers; attributes say how it misbehaves."""

    def __init__(self, label: str, **faults: Any) -> None:
        self.label = label
        for name, value in faults.items():
            setattr(self, name, value)

    def __call__(self, i: int) -> tuple[torch.Tensor, ...]:
        if getattr(self, "fails", None):
            raise self.fails
        return torch.full([2, 4], float(i + 1)), torch.full([3], i + 1, dtype=torch.int32)


def arms(*names: str, **faulty: Any) -> list[Arm]:
    return [Arm(name, Fake(name)) for name in names] + [Arm(name, Fake(name, **f)) for name, f in faulty.items()]


def run(arms: list[Arm], gpu: FakeCuda | None = None, **options: Any) -> rig.Measurement:
    return measure(arms, gpu or FakeCuda(), copies=COPIES, baseline=options.pop("baseline", "a"), **options)


def base_of(name: str) -> str:
    return name.removesuffix(AGAIN)


# ---------------------------------------------------------------- planning


def test_copies_exceed_three_caches():
    assert copies_for(2 * 4096 * 1024, 60_000_000, 100 << 30) == Rotation(22, True)
    for weight in (1, 60_000_000, 8_388_608, 104_857_600, 180_000_000, 180_000_001):
        rotation = copies_for(weight, 60_000_000, 1 << 40)
        assert rotation.cold and rotation.copies * weight > 180_000_000 >= (rotation.copies - 1) * weight


def test_copies_shrink_to_memory_and_say_that_they_are_not_cold():
    weight = 8_388_608
    assert copies_for(weight, 60_000_000, 10 * weight) == Rotation(4, False)  # 0.4 of it
    assert copies_for(weight, 60_000_000, 0) == Rotation(1, False)
    full = 22 * weight / rig.MEMORY_SHARE
    assert copies_for(weight, 60_000_000, int(full) + weight) == Rotation(22, True)
    assert copies_for(weight, 60_000_000, int(full) + weight, sets=2) == Rotation(11, False)
    assert copies_for(weight, 0, 1 << 40) == Rotation(1, False), "an unknown cache proves nothing"
    with pytest.raises(ValueError, match="must have some"):
        copies_for(0, 60_000_000, 1 << 30)


def test_laps_make_a_graph_long_enough_but_not_too_many_nodes():
    assert laps_for(22, 2e-6) == 11  # 256 calls are the limit: 11 laps of 22
    assert laps_for(22, 10e-6) == 5
    assert laps_for(3, 25e-6) == 14
    assert laps_for(22, 1e-3) == 1
    assert laps_for(1000, 1e-9) == 1
    assert replays_for(1e-3, 2e-3) == 2
    assert replays_for(3e-3, 2e-3) == 1
    assert replays_for(0.0, 2e-3) == rig.MAX_REPLAYS


def test_rotated_problems_differ_in_memory_and_in_values():
    problem = random_problem(tokens=2)
    problems = rotated(problem, 4)
    assert problems[0] is problem and rotated(problem, 1) == [problem]
    assert len({p.qkv_weight.data_ptr() for p in problems}) == 4
    for one, other in itertools.combinations(problems, 2):
        assert not torch.equal(one.qkv_weight, other.qkv_weight)


# ---------------------------------------------------------------- order, drift, noise


def drifting(cost: dict[str, float], rate: float) -> Callable[[str, float], float]:
    """A machine on which everything slows down by `rate` a second."""
    return lambda name, now: cost[base_of(name)] * (1 + rate * now)


def sequential(gpu: FakeCuda, ready: dict, lost: dict) -> dict[str, float]:
    """The planted fault: A A B B C C."""
    return {name: np.mean([gpu.seconds(one.graph, 1) for _ in range(2)]) for name, one in ready.items()}


def unreversed(gpu: FakeCuda, ready: dict, lost: dict) -> dict[str, float]:
    """The planted fault: A B C A B C."""
    return {name: gpu.seconds(one.graph, 1) for name, one in ready.items()}


def speedup_under_drift() -> float:
    cost = {"a": 2e-5, "b": 1e-5, "c": 3e-5}
    measured = run(arms("a", "b", "c"), FakeCuda(drifting(cost, 20.0)), laps=20, budget_s=0.05)
    return abs(measured.outcomes["b"].speedup.p50 / 2 - 1)


def test_interleaving_cancels_drift():
    assert speedup_under_drift() < 0.005


@pytest.mark.parametrize("fault", [sequential, unreversed])
def test_another_order_fails_under_drift(fault: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rig, "_round", fault)
    assert speedup_under_drift() > 0.01


def test_rounds_are_palindromes_of_all_arms_and_the_second_baseline():
    gpu = FakeCuda()
    measured = run(arms("a", "b"), gpu)
    order = ["a", "b", "a" + AGAIN]
    expected = [*order, *reversed(order)]
    assert gpu.timed[: len(expected)] == expected and len(gpu.timed) % len(expected) == 0
    assert gpu.timed == expected * (len(gpu.timed) // len(expected))
    assert set(measured.outcomes) == {"a", "b"}, "the noise floor is no arm"


def test_a_clock_that_both_share_leaves_the_ratio_alone():
    """Both arms' times vary by 30 %, from round to round; their ratio does not."""
    rng, asked = np.random.default_rng(0), itertools.count()
    clock = rng.random(10_000)

    def script(name: str, now: float) -> float:
        return {"a": 2e-5, "b": 1e-5}[base_of(name)] * (1 + 0.3 * clock[next(asked) // 6])

    measured = run(arms("a", "b"), FakeCuda(script), budget_s=1e-9)
    b = measured.outcomes["b"]
    assert b.seconds.p90 / b.seconds.p10 > 1.05
    for ratio in (b.speedup.p10, b.speedup.p50, b.speedup.p90):
        assert ratio == pytest.approx(2.0, abs=1e-9)
    assert measured.rounds == rig.MIN_ROUNDS


@pytest.mark.parametrize(("common", "rounds", "gain"), [(0.03, 10, 1.3), (0.3, 10, 1.7), (0.3, 50, 3.0)])
def test_paired_ratios_err_less_than_ratios_of_medians(common: float, rounds: int, gain: float):
    """1 % of noise of each arm's own, and `common` that both share: which estimate of a ratio of 2 errs less?"""
    paired, of_medians = [], []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        clock = np.exp(common * rng.standard_normal(rounds))
        a, b = (size * clock * (1 + 0.01 * rng.standard_normal(rounds)) for size in (2.0, 1.0))
        paired.append(ratios(a, b).p50)
        of_medians.append(spread(a).p50 / spread(b).p50)
    assert np.std(of_medians) > gain * np.std(paired)


def test_noise_floor_is_the_ratio_of_two_graphs_of_the_baseline():
    rng = np.random.default_rng(1)

    def script(name: str, now: float) -> float:
        return 1e-5 * (1 + 0.1 * rng.standard_normal() * name.startswith("a"))

    measured = run(arms("b", "a"), FakeCuda(script), budget_s=0.1)
    assert measured.noise_of == "a"
    assert measured.noise.p10 < 1 < measured.noise.p90
    assert measured.noise.p90 - measured.noise.p10 > 0.05
    assert run(arms("a", "b")).noise == rig.Spread(1.0, 1.0, 1.0)


def test_rounds_end_when_steady_or_when_the_budget_is_spent():
    rng = np.random.default_rng(2)
    quiet = run(arms("a", "b"), budget_s=1e9)
    assert quiet.rounds == rig.MIN_ROUNDS
    loud = FakeCuda(lambda name, now: 1e-5 * (1 + rng.random()))
    assert run(arms("a", "b"), loud, budget_s=1e9).rounds == rig.MAX_ROUNDS
    loud = FakeCuda(lambda name, now: 1e-5 * (1 + rng.random()))
    assert rig.MIN_ROUNDS < run(arms("a", "b"), loud, budget_s=0.3).rounds < rig.MAX_ROUNDS


def test_samples_last_as_long_as_they_should():
    lengths = []
    gpu = FakeCuda()
    seconds = gpu.seconds

    def watched(graph: Graph, replays: int) -> float:
        value = seconds(graph, replays)
        lengths.append(value * graph.calls * replays)
        return value

    gpu.seconds = watched
    run(arms("a"), gpu, laps=4)
    assert min(lengths[-20:]) >= rig.SAMPLE_S
    assert max(lengths[-20:]) < 2 * rig.SAMPLE_S


# ---------------------------------------------------------------- outputs


class Unwritten(Fake):
    """Its graph leaves one output of the last copy unwritten."""

    def replayed(self, i: int) -> tuple:
        first, second = self(i)
        return (None if i == COPIES - 1 else first), second


class UnwrittenIntegers(Fake):
    def replayed(self, i: int) -> tuple:
        return self(i)[0], None


class Wrong(Fake):
    """Its graph reads the first copy's weights at every call."""

    def replayed(self, i: int) -> tuple:
        return self(0)


class Changing(Fake):
    """Its graph is right at the first check, one element off at the last."""

    replays = 0

    def replayed(self, i: int) -> tuple:
        self.replays += 1
        first, second = self(i)
        if self.replays > COPIES:
            first[1, 3] = torch.nextafter(first[1, 3], torch.tensor(math.inf))
        return first, second


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Unwritten, "before timing: output 0 of copy 2: 8 of 8 elements still hold NaN"),
        (UnwrittenIntegers, "before timing: output 1 of copy 0: 3 of 3 elements differ"),
        (Wrong, "before timing: output 0 of copy 1: 8 of 8 elements differ"),
        (Changing, "after timing: output 0 of copy 0: 1 of 8 elements differ"),
    ],
)
def test_wrong_outputs_are_red_and_have_no_time(fault: type[Fake], reason: str):
    measured = run([*arms("a"), Arm("bad", fault("bad"))])
    assert measured.outcomes["bad"] == rig.Outcome("red", reason)
    assert measured.outcomes["a"].status == "ok" and measured.outcomes["a"].seconds


@pytest.mark.parametrize("fault", [Unwritten, UnwrittenIntegers])
def test_without_poison_nobody_would_know(fault: type[Fake], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rig_outputs, "poison", lambda graph: None)
    assert run([*arms("a"), Arm("bad", fault("bad"))]).outcomes["bad"].status == "ok"


def test_a_red_baseline_takes_its_speedups_along_and_nothing_else():
    measured = run([Arm("a", Changing("a")), *arms("b")])
    assert measured.outcomes["a"].status == "red"
    assert measured.outcomes["b"].seconds and measured.outcomes["b"].speedup is None


def test_outputs_that_do_not_hold_still_may_have_a_criterion_of_their_own():
    class OneStep(Fake):
        def __call__(self, i: int) -> tuple[torch.Tensor, ...]:
            return (torch.full([2, 4], 1.0 + i, dtype=torch.bfloat16),)

        def replayed(self, i: int) -> tuple:
            return (self(i)[0] * (1 + 2**-7),)

    class Doubled(OneStep):
        def replayed(self, i: int) -> tuple:
            return (self(i)[0] * 1.04,)

    near = [Arm("a", Fake("a")), Arm("b", OneStep("b"), values_differ), Arm("c", Doubled("c"), values_differ)]
    outcomes = run(near).outcomes
    assert outcomes["b"].status == "ok"
    assert outcomes["c"] == rig.Outcome(
        "red", "before timing: output 0 of copy 0: 8 of 8 elements differ beyond rounding"
    )
    assert run([*arms("a"), Arm("b", OneStep("b"))]).outcomes["b"].status == "red"


def test_bits_tell_zeros_apart_and_nan_equals_nan():
    zero, nan = torch.tensor([0.0, 1.0]), torch.tensor([math.nan, 1.0])
    assert (
        bits_differ(zero, zero) is None
        and bits_differ(nan, torch.copysign(nan, -nan) * torch.tensor([1.0, -1.0])) is None
    )
    assert bits_differ(zero, -zero * torch.tensor([1.0, -1.0])) == "1 of 2 elements differ"
    assert bits_differ(nan, zero) == "1 of 2 elements differ"


def test_values_allow_what_cancels_but_no_more_than_the_heads_size_explains():
    head = torch.ones(4, 128)
    cancelled = head.clone()
    head[:, 0], cancelled[:, 0] = 1e-4, -6e-3
    assert values_differ(cancelled, head) is None
    cancelled[:, 0] = -9e-3
    assert values_differ(cancelled, head) == "4 of 512 elements differ beyond rounding"
    assert values_differ(torch.full([2], math.nan), torch.ones(2)) is not None


def test_peers_go_through_the_rig():
    problems = rotated(random_problem(tokens=3), COPIES)
    given = [eager_peer(problems), *matmul_peers(problems)[:1], chain_peer(problems, *PARTS, plan_named("hf"))]
    measured = measure([peer.arm() for peer in given], FakeCuda(), copies=COPIES, baseline="eager", laps=2)
    assert {name: o.status for name, o in measured.outcomes.items()} == {peer.name: "ok" for peer in given}
    assert measured.laps == 2


# ---------------------------------------------------------------- failures


def test_failures_are_reasons_and_the_others_go_on():
    memory = torch.OutOfMemoryError("CUDA out of memory.\n Tried to allocate 2 GiB")
    gpu = FakeCuda()
    measured = run(
        arms(
            "a",
            captured={"fails_at_capture": memory},
            compiled={"fails": RuntimeError("PTXAS\nerror")},
            timed={"breaks_when_timed": RuntimeError("launch failed")},
            b={},
        ),
        gpu,
    )
    assert {name: (o.status, o.reason) for name, o in measured.outcomes.items()} == {
        "a": ("ok", ""),
        "captured": ("failed", "out of memory: CUDA out of memory. Tried to allocate 2 GiB"),
        "compiled": ("failed", "RuntimeError: PTXAS error"),
        "timed": ("failed", "RuntimeError: launch failed"),
        "b": ("ok", ""),
    }
    assert measured.outcomes["b"].speedup.p50 == 1.0
    assert gpu.released >= 3, "what a failed arm held is given back before the next"


def test_without_its_baseline_the_noise_floor_is_that_of_the_first_arm_left():
    measured = run(arms("b", a={"fails": RuntimeError("no")}))
    assert measured.noise_of == "b" and measured.noise == rig.Spread(1.0, 1.0, 1.0)
    assert measured.outcomes["b"].speedup is None


def test_nothing_runs():
    measured = run(arms(a={"fails": RuntimeError("no")}))
    assert measured.rounds == 0 and measured.noise is None and measured.noise_of is None
    assert measured.outcomes["a"].status == "failed"


def test_a_lost_device_ends_the_run():
    """The error is the launch's; that the context is gone shows at the next synchronisation."""
    lost = {"breaks_when_timed": RuntimeError("an illegal memory access"), "sticky": True}
    with pytest.raises(DeviceLost, match="lost after bad: RuntimeError: an illegal memory access"):
        run(arms("a", bad=lost))


def test_arms_must_be_told_apart():
    with pytest.raises(ValueError, match="different names"):
        run(arms("a", "a"))
    with pytest.raises(ValueError, match="baseline 'c'"):
        run(arms("a", "b"), baseline="c")


def test_the_state_is_asked_while_the_gpu_works():
    gpu, events = FakeCuda(), []
    replay = gpu.replay
    gpu.replay = lambda graph, times=1: (events.append(("replay", times)), replay(graph))[1]
    measured = run(arms("a"), gpu, state=lambda: events.append("asked") or {"sm_mhz": 1980.0})
    assert measured.state == {"sm_mhz": 1980.0}
    before = events[events.index("asked") - 1]
    assert before[0] == "replay" and before[1] > 100
    assert run(arms("a")).state == {}
