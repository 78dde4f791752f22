"""The rig's decisions, on a machine without a GPU: a fake CUDA replays calls on the CPU and its clock is a script."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from fake_cuda import FakeCuda, arms, base_of, run
from support import random_problem

from castpoint.harness.timing import rig
from castpoint.harness.timing.cuda import Graph
from castpoint.harness.timing.rig import (
    AGAIN,
    copies_for,
    laps_for,
    ratios,
    replays_for,
    rotated,
    spread,
)

# ---------------------------------------------------------------- planning


def test_copies_exceed_three_caches():
    assert copies_for(2 * 4096 * 1024, 60_000_000, 100 << 30) == 22
    for weight in (1, 60_000_000, 8_388_608, 104_857_600, 180_000_000, 180_000_001):
        copies = copies_for(weight, 60_000_000, 1 << 40)
        assert copies * weight > 180_000_000 >= (copies - 1) * weight


def test_copies_shrink_to_memory():
    weight = 8_388_608
    assert copies_for(weight, 60_000_000, 10 * weight) == 4  # 0.4 of it
    assert copies_for(weight, 60_000_000, 0) == 1
    full = 22 * weight / rig.MEMORY_SHARE
    assert copies_for(weight, 60_000_000, int(full) + weight) == 22
    assert copies_for(weight, 60_000_000, int(full) + weight, sets=2) == 11
    assert copies_for(weight, 0, 1 << 40) == 1, "an unknown cache proves nothing"
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
    return abs(ratios(measured.samples["a"], measured.samples["b"]).p50 / 2 - 1)


def test_interleaving_cancels_drift():
    assert speedup_under_drift() < 0.005


@pytest.mark.parametrize("fault", [sequential, unreversed])
def test_another_order_fails_under_drift(fault: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rig, "_round", fault)
    assert speedup_under_drift() > 0.01


def test_rounds_are_palindromes_of_all_arms_and_the_first_one_again():
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
    b, speedup = measured.outcomes["b"].seconds, ratios(measured.samples["a"], measured.samples["b"])
    assert b.p90 / b.p10 > 1.05
    for ratio in (speedup.p10, speedup.p50, speedup.p90):
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


def test_noise_floor_is_the_ratio_of_two_graphs_of_the_first_arm():
    rng = np.random.default_rng(1)

    def script(name: str, now: float) -> float:
        return 1e-5 * (1 + 0.1 * rng.standard_normal() * name.startswith("a"))

    measured = run(arms("a", "b"), FakeCuda(script), budget_s=0.1)
    assert measured.noise.p10 < 1 < measured.noise.p90
    assert measured.noise.p90 - measured.noise.p10 > 0.05
    assert run(arms("b", "a"), FakeCuda(script), budget_s=0.1).noise == rig.Spread(1.0, 1.0, 1.0)


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
