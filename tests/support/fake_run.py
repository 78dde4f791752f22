"""Whole GPU runs on the fake device: the real order, points and rows; arms that compute nothing; a clock that costs
what compiling, checking and measuring are said to cost."""

from __future__ import annotations

import functools
import itertools
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda
from gpu_support import Compiling, records_in, stood_in

import castpoint.harness.gpu.point
import castpoint.harness.gpu.run
from castpoint.harness.conformance.cuda import Checks
from castpoint.harness.gpu.order import CARDS, Costs, work_of
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.words import Kind, Step
from castpoint.harness.timing import rig
from castpoint.harness.timing.cuda import DeviceLost, Graph
from castpoint.variants.problem import Problem

CARD, COSTS = CARDS["h100"], Costs()
NAME = "NVIDIA H100 80GB HBM3"


class Timed(FakeCuda):
    """Replays last twice the floor of the point at hand, a little more or less; a capture costs what an arm does."""

    def __init__(self) -> None:
        super().__init__()
        self.call_s, self.rng = 1e-6, random.Random(0)
        self.at: tuple[str, ...] = ()  # step, model and tokens
        self.breaks: tuple[str, ...] = ()  # step, model, tokens and arm that breaks the context
        self.killed_at, self.captures = 0, 0  # the number of the capture in which the process is killed

    def name(self) -> str:
        return NAME

    def capture(self, call: Any, copies: int, laps: int = 1) -> Graph:
        self.clock += COSTS.arm
        self.captures += 1
        if self.captures == self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if (*self.at, getattr(call, "label", "?")) == self.breaks:
            self.dead = True
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super().capture(call, copies, laps)

    def seconds(self, graph: Graph, replays: int) -> float:
        seconds = self.call_s * self.rng.uniform(0.97, 1.03)
        self.clock += seconds * graph.calls * (replays + 1)  # one goes first
        return seconds

    def replay(self, graph: Graph, times: int = 1) -> None:
        super().replay(graph, 1)
        self.clock += rig.LOAD_S if times > 1 else 0.0  # to fill the time while the GPU is asked for its clocks


@functools.cache
def small(tokens: int = 4096) -> Problem:
    rng = torch.Generator().manual_seed(0)
    x, w, qkv = (torch.randn(s, generator=rng).to(torch.bfloat16) for s in ((tokens, 64), (64,), (512, 64)))
    heads = torch.ones(128, dtype=torch.bfloat16)
    return Problem(x, w, qkv, num_q_heads=2, num_kv_heads=1, q_norm_weight=heads, k_norm_weight=heads)


def staged(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Callable[..., bool]:
    """run_until(minutes, gpu) -> whether all was done: one process of a run in that folder, from time 0 of a clock.

    opened(gpu), in place of that folder: the records of the run.
    """
    stood_in(monkeypatch)
    point, run = castpoint.harness.gpu.point, castpoint.harness.gpu.run
    monkeypatch.setattr(point, "model_problem", lambda model, device: small())
    monkeypatch.setattr(point, "implausible", lambda *rest: None)  # its weights are not those of its point
    prepared = point.prepared

    def prepare(at, records, gpu, *rest):
        """With as many copies as the point's own weights would have, and its own times."""
        gpu.clock += COSTS.point
        weight = 2 * at.geometry.rows * at.geometry.hidden_size
        gpu.l2 = CARD.l2_bytes * (2 * small().qkv_weight.numel()) // weight
        gpu.call_s = 2 * work_of(at, Kind.OWN).floor_s(CARD.bytes_per_s, CARD.flops_per_s)
        return prepared(at, records, gpu, *rest)

    def checked(self, binary, check):
        self.gpu.clock += COSTS.check
        if (*self.gpu.at, f"check {binary.plan} {binary.config}, {check}") == self.gpu.breaks:
            raise DeviceLost("an illegal access in a check", "a check")
        return {"share_equal": 1.0}

    def without_point(step: Step, records, gpu) -> None:
        gpu.clock += COSTS.of(step)
        if step == Step.LIMITS:
            limits(step, records, gpu)

    limits = run._without_point
    kinds = {"copy": 3e12, "read": 3.1e12, "bf16 matmul": 7e14}
    monkeypatch.setattr(run, "LIMITS", {n: ("B/s", lambda gpu, v=v: (v, "")) for n, v in kinds.items()})
    monkeypatch.setattr(run, "prepared", prepare)
    monkeypatch.setattr(run, "_without_point", without_point)
    monkeypatch.setattr(Checks, "_checked", checked)
    monkeypatch.setattr(run, "say", lambda text: None)
    compiled_s = itertools.repeat(COSTS.compiled)

    def time_compiled(setting):
        setting.gpu.clock += next(compiled_s) * len(castpoint.harness.gpu.order.compiled_peers(setting.point))
        real_compiled(setting)

    real_compiled = run.AT_POINTS[Step.COMPILED]
    monkeypatch.setitem(run.AT_POINTS, Step.COMPILED, time_compiled)

    def step(item, records, gpu, checks):
        gpu.at = (item.step, item.point.model, str(item.point.tokens)) if item.point else (item.step, "", "0")
        return real_step(item, records, gpu, checks)

    real_step = run.step
    monkeypatch.setattr(run, "step", step)

    def run_until(
        minutes: float, gpu: Timed | None = None, opened: Callable[[Timed], Records] = lambda gpu: records_in(folder)
    ) -> bool:
        gpu = gpu or Timed()
        gpu.clock += COSTS.begin
        return run.run(opened(gpu), gpu, Compiling(gpu, COSTS.compile), 60 * minutes)

    return run_until


def until_done(run_until: Callable[..., bool], gpus: Callable[[], Timed]) -> int:
    """A new process after each loss of the device, as runs.process starts them; how many there were."""
    for processes in itertools.count(1):
        try:
            assert run_until(1e6, gpus())
            return processes
        except DeviceLost:
            continue
    raise AssertionError
