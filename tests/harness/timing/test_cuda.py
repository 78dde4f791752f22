"""The rig's calls into CUDA: what torch.cuda is asked for in a capture and in a timing, recorded without a GPU."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from castpoint.harness.timing.cuda import Cuda, Graph

RealCapture = torch.cuda.graph


class Recorder:
    """torch.cuda's part in a capture: what was called in which stream, and whether it was captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: str = "") -> None:
        self.current, self.capturing, self.fails = "main", False, fails
        self.events: list[Any] = []
        recorder = self

        class Stream:
            name = "side"

            def wait_stream(self, other: Any) -> None:
                recorder.events.append(("wait for", other))

        class InStream:
            def __init__(self, stream: Any) -> None:
                self.stream = stream

            def __enter__(self) -> None:
                self.before, recorder.current = recorder.current, self.stream.name

            def __exit__(self, *error: object) -> None:
                recorder.current = self.before

        class Capture(InStream):
            """As torch's: where the end of a capture raises, its stream stays current."""

            def __init__(self, graph: Any, pool: Any = None, stream: Any = None, **options: Any) -> None:
                super().__init__(stream)

            def __enter__(self) -> None:
                super().__enter__()
                recorder.capturing = True

            def __exit__(self, *error: object) -> None:
                recorder.capturing = False
                if recorder.fails:
                    raise RuntimeError(recorder.fails)
                super().__exit__(*error)

        class CUDAGraph:
            def replay(self) -> None:
                recorder.events.append("replay")

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                recorder.events.append("record")

            def synchronize(self) -> None:
                recorder.events.append("wait")

            def elapsed_time(self, end: Any) -> float:
                return 12.0  # ms

        parts = {"stream": InStream, "graph": Capture, "CUDAGraph": CUDAGraph, "Event": Event}
        parts |= {"current_stream": lambda: self.current, "set_stream": lambda to: setattr(self, "current", to)}
        parts["synchronize"] = lambda: self.events.append("synchronize")
        for name, part in parts.items():
            inspect.signature(getattr(torch.cuda, name))  # it is there
            monkeypatch.setattr(torch.cuda, name, part)
        self.gpu = Cuda.__new__(Cuda)
        self.gpu.stream = Stream()

    def call(self, i: int) -> tuple[torch.Tensor, ...]:
        self.events.append((i, self.current, self.capturing))
        return (torch.tensor(float(len(self.events))),)


def test_a_capture_warms_up_on_its_own_stream_and_keeps_the_last_laps_outputs(monkeypatch: pytest.MonkeyPatch):
    cuda = Recorder(monkeypatch)
    graph = cuda.gpu.capture(cuda.call, 2, laps=3)
    warm, captured = [(0, "side", False), (1, "side", False)], [(0, "side", True), (1, "side", True)]
    assert cuda.events == [("wait for", "main"), *warm, "synchronize", *captured * 3, "synchronize"]
    assert graph.calls == 6 and [float(t) for (t,) in graph.outputs] == [9.0, 10.0]
    assert cuda.current == "main"
    assert "stream" in inspect.signature(RealCapture.__init__).parameters


def test_a_failed_capture_gives_the_stream_back(monkeypatch: pytest.MonkeyPatch):
    cuda = Recorder(monkeypatch, fails="operation failed due to a previous error during capture")
    with pytest.raises(RuntimeError, match="previous error"):
        cuda.gpu.capture(cuda.call, 2)
    assert cuda.current == "main"


def test_seconds_are_means_of_a_call_behind_one_replay_that_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    cuda = Recorder(monkeypatch)
    graph = Graph(torch.cuda.CUDAGraph(), [], calls=4)
    assert cuda.gpu.seconds(graph, 3) == pytest.approx(12e-3 / 12)
    assert cuda.events == ["replay", "record", "replay", "replay", "replay", "record", "wait"]
