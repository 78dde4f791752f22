"""All calls into CUDA that the measuring rig makes: few enough that everything else is tested with a fake one."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Call = Callable[[int], tuple[Tensor, ...]]


class DeviceLost(RuntimeError):
    """The CUDA context is broken (an illegal access, say): nothing that this process measures from here on counts.
    arm: what broke it."""

    def __init__(self, text: str, arm: str = "") -> None:
        super().__init__(text)
        self.arm = arm


@dataclass
class Graph:
    """A captured graph. outputs: of its last lap, one tuple a copy; they keep the memory that replays write to."""

    handle: Any
    outputs: list[tuple[Tensor, ...]]
    calls: int


class Cuda:
    """Each arm is captured on one stream of its own, into a memory pool of its own, replayed on the current stream."""

    device = "cuda"

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.ones = torch.ones(1, device="cuda")  # made now: probe must not need memory

    def capture(self, call: Call, copies: int, laps: int = 1) -> Graph:
        """Outputs of earlier laps are dropped, so that their memory is used again: a lap more needs no more of it."""
        before = torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        try:
            self.stream.wait_stream(before)
            with torch.cuda.stream(self.stream):  # workspaces of this stream, and whatever loads at a first call
                for i in range(copies):
                    call(i)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=self.stream):
                for _ in range(laps - 1):
                    for i in range(copies):
                        call(i)
                outputs = [call(i) for i in range(copies)]
        finally:
            torch.cuda.set_stream(before)  # where the capture fails, torch.cuda.graph leaves its own stream current
        torch.cuda.synchronize()
        return Graph(graph, outputs, copies * laps)

    def replay(self, graph: Graph, times: int = 1) -> None:
        """Does not wait for the GPU."""
        for _ in range(times):
            graph.handle.replay()

    def seconds(self, graph: Graph, replays: int) -> float:
        """Mean seconds of a call. One replay goes first, not timed: behind it the GPU never waits for the host."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.replay(graph)
        start.record()
        self.replay(graph, replays)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / (graph.calls * replays)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def probe(self) -> None:
        """Raises whatever a broken context raises at the simplest work."""
        torch.cuda.synchronize()
        self.ones.mul_(1)
        torch.cuda.synchronize()

    def name(self) -> str:
        return torch.cuda.get_device_name()

    def target(self) -> str:
        """`sm_90`, as compilers call it."""
        return "sm_{}{}".format(*torch.cuda.get_device_capability())

    def l2_bytes(self) -> int:
        return torch.cuda.get_device_properties(0).L2_cache_size

    def free_bytes(self) -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def release(self) -> None:
        """Gives back the memory of what was dropped."""
        gc.collect()
        torch.cuda.empty_cache()

    def now(self) -> float:
        return time.monotonic()


def reason_of(gpu: Cuda, arm: str, error: Exception) -> str:
    """The error in one line. Raises DeviceLost where after it not even the simplest work runs."""
    text = " ".join(str(error).split())[:200]
    memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    reason = f"out of memory: {text}" if memory else f"{type(error).__name__}: {text}"
    try:
        gpu.probe()
    except Exception as lost:
        raise DeviceLost(f"the CUDA context is lost after {arm}: {reason}", arm) from lost
    return reason
