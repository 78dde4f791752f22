"""A CUDA device for tests on machines without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from castpoint.harness.timing import rig
from castpoint.harness.timing.cuda import Cuda, Graph
from castpoint.harness.timing.rig import AGAIN, Arm, measure


class FakeCuda(Cuda):
    """Graphs replay their calls into the captured outputs; a call's time is script(name, the clock's time).

    calls: graph handles are dicts, and the name in them is that of the arm whose call was captured.
    """

    device = "cpu"

    def __init__(self, script: Callable[[str, float], float] = lambda name, now: 1e-5, free: int = 1 << 34) -> None:
        self.script, self.clock, self.dead, self.free = script, 0.0, False, free
        self.timed: list[str] = []
        self.released, self.l2 = 0, 1 << 15
        self.names: dict[Any, list[str]] = {}

    def capture(self, call: Any, copies: int, laps: int = 1) -> Graph:
        if getattr(call, "fails_at_capture", None):
            raise call.fails_at_capture
        label = getattr(call, "label", "?")
        number = len(self.names.setdefault(label, []))
        self.names[label].append(label)
        outputs = [call(i) for i in range(copies)]
        return Graph({"call": call, "name": label + AGAIN * number}, outputs, copies * laps)

    def replay(self, graph: Graph, times: int = 1) -> None:
        replayed = getattr(graph.handle["call"], "replayed", graph.handle["call"])
        for i, outputs in enumerate(graph.outputs):
            for tensor, value in zip(outputs, replayed(i), strict=True):
                if value is not None:  # a kernel that does not write leaves what was there
                    tensor.copy_(value)

    def seconds(self, graph: Graph, replays: int) -> float:
        name = graph.handle["name"]
        broken = getattr(graph.handle["call"], "breaks_when_timed", None)
        if broken:
            self.dead = getattr(graph.handle["call"], "sticky", False)
            raise broken
        self.timed.append(name)
        seconds = self.script(name, self.clock)
        self.clock += seconds * graph.calls * replays
        return seconds

    def synchronize(self) -> None: ...

    def name(self) -> str:
        return "Fake GPU"

    def l2_bytes(self) -> int:
        return self.l2

    def free_bytes(self) -> int:
        return self.free

    def probe(self) -> None:
        if self.dead:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def release(self) -> None:
        self.released += 1

    def now(self) -> float:
        return self.clock


# ---------------------------------------------------------------- arms

COPIES = 3


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
    return measure(arms, gpu or FakeCuda(), copies=COPIES, **options)


def base_of(name: str) -> str:
    return name.removesuffix(AGAIN)
