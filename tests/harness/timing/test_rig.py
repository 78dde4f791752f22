"""The rig's decisions, on a machine without a GPU: a fake CUDA replays calls on the CPU and its clock is a script."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import FakeCuda, arms, base_of, run
from support import random_problem

from castpoint.harness.timing import rig
from castpoint.harness.timing.cuda import Graph
from castpoint.harness.timing.rig import (
    AGAIN,
    cold_copies,
    copies_that_fit,
    copy_bytes,
    laps_for,
    ratios,
    replays_for,
    rotated,
    spread,
)

# ---------------------------------------------------------------- planning


def test_copies_exceed_three_caches():
    assert cold_copies(2 * 4096 * 1024, 60_000_000) == 22
    for weight in (1, 60_000_000, 8_388_608, 104_857_600, 180_000_000, 180_000_001):
        copies = cold_copies(weight, 60_000_000)
        assert copies * weight > 180_000_000 >= (copies - 1) * weight
    assert cold_copies(8_388_608, 0) == 1, "an unknown cache proves nothing"
    with pytest.raises(ValueError, match="must have some"):
        cold_copies(0, 60_000_000)


def sized(tokens: int, rows: int, hidden_size: int) -> Any:
    """As much of a problem as memory is counted by, without any."""
    weight = torch.empty(rows, hidden_size, dtype=torch.bfloat16, device="meta")
    return SimpleNamespace(tokens=tokens, qkv_weight=weight)


def test_what_a_copy_costs_by_hand():
    """qwen3-32b: a weight of 104,857,600 bytes, outputs of 83,886,080 at 4096 tokens, twice for each of 12 arms and the
    first one again. qwen3-0.6b: 8,388,608 and 33,554,432."""
    large, small = sized(4096, 10240, 5120), sized(4096, 4096, 1024)
    assert copy_bytes(large, arms=12, sets=2) == 2 * 104_857_600 + 2 * 13 * 83_886_080 == 2_390_753_280
    assert copy_bytes(small, arms=34, sets=3) == 3 * 8_388_608 + 2 * 35 * 33_554_432 == 2_373_976_064
    assert copy_bytes(small, arms=34, sets=0) == 2_348_810_240
    assert copy_bytes(sized(1, 4096, 1024), arms=34) == 8_388_608 + 2 * 35 * 8192


def test_copies_shrink_to_memory():
    """To 60 of 80 GB. By weights alone all of them would fit: 64 x 0.2 GB."""
    gpu = FakeCuda(free=80_000_000_000)
    large, small = (copy_bytes(sized(4096, *shape), 12, sets=2) for shape in ((10240, 5120), (4096, 1024)))
    assert copies_that_fit(64, large, gpu.free_bytes()) == 25  # 59.8 GB; a chain of 64 layers takes 153
    assert copies_that_fit(64, 2 * 104_857_600, gpu.free_bytes()) == 64, "the test would not notice"
    assert copies_that_fit(28, small, gpu.free_bytes()) == 28  # 0.9 GB each
    many = copy_bytes(sized(4096, 4096, 1024), arms=34, sets=3)
    assert copies_that_fit(28, many, gpu.free_bytes()) == 25
    assert copies_that_fit(28, many, 141_000_000_000) == 28
    assert copies_that_fit(28, many, 0) == 1


def test_memory_is_measured_as_it_is_counted():
    """The copies that measure holds at its fullest are those of copy_bytes."""
    problem, held = random_problem(tokens=4, residual=False), []
    problems = rotated(problem, 3)

    def call(i: int) -> tuple[torch.Tensor, ...]:
        return problems[i].split_heads(problems[i].x @ problems[i].qkv_weight.T)

    def alive() -> int:
        found = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.ndim == 3 and len(t) == 4]
        return sum(t.numel() * 2 for t in found)

    class Watched(FakeCuda):
        def seconds(self, graph: Graph, replays: int) -> float:
            if not held:
                held.append(alive() - before)
            return super().seconds(graph, replays)

    gc.collect()
    before = alive()  # what other tests left
    rig.measure([rig.Arm("a", call), rig.Arm("b", call)], Watched(), copies=3)
    assert held[0] == 3 * copy_bytes(problem, arms=2, sets=0)


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
