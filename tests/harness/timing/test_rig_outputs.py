"""A time counts only with its outputs, and an arm that fails takes no other along."""

from __future__ import annotations

import math

import pytest
import torch
from fake_cuda import COPIES, Fake, FakeCuda, arms, run
from support import random_problem

from castpoint.harness.peers.chains import chain_peer, eager_peer, matmul_peers
from castpoint.harness.timing import outputs as rig_outputs
from castpoint.harness.timing import rig
from castpoint.harness.timing.cuda import DeviceLost
from castpoint.harness.timing.outputs import bits_differ, values_differ
from castpoint.harness.timing.rig import (
    Arm,
    measure,
    rotated,
)
from castpoint.variants.catalogue import plan_named

PARTS = ("F.rms_norm", "cuBLAS")


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


def test_a_red_baseline_takes_its_samples_along_and_nothing_else():
    measured = run([Arm("a", Changing("a")), *arms("b")])
    assert measured.outcomes["a"].status == "red"
    assert measured.outcomes["b"].seconds and list(measured.samples) == ["b"]


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
    measured = measure([peer.arm() for peer in given], FakeCuda(), copies=COPIES, laps=2)
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
    assert rig.ratios(measured.samples["a"], measured.samples["b"]).p50 == 1.0
    assert gpu.released >= 3, "what a failed arm held is given back before the next"


def test_the_noise_floor_is_that_of_the_first_arm_left():
    measured = run([*arms(a={"fails": RuntimeError("no")}), *arms("b")])
    assert measured.noise == rig.Spread(1.0, 1.0, 1.0) and list(measured.samples) == ["b"]


def test_nothing_runs():
    measured = run(arms(a={"fails": RuntimeError("no")}))
    assert measured.rounds == 0 and measured.noise is None
    assert measured.outcomes["a"].status == "failed"


def test_a_lost_device_ends_the_run():
    """The error is the launch's; that the context is gone shows at the next synchronisation."""
    lost = {"breaks_when_timed": RuntimeError("an illegal memory access"), "sticky": True}
    with pytest.raises(DeviceLost, match="lost after bad: RuntimeError: an illegal memory access"):
        run(arms("a", bad=lost))


def test_arms_must_be_told_apart():
    with pytest.raises(ValueError, match="different names"):
        run(arms("a", "a"))


def test_the_state_is_asked_while_the_gpu_works():
    gpu, events = FakeCuda(), []
    replay = gpu.replay
    gpu.replay = lambda graph, times=1: (events.append(("replay", times)), replay(graph))[1]
    measured = run(arms("a"), gpu, state=lambda: events.append("asked") or {"sm_mhz": 1980.0})
    assert measured.state == {"sm_mhz": 1980.0}
    before = events[events.index("asked") - 1]
    assert before[0] == "replay" and before[1] > 100
    assert run(arms("a")).state == {}
