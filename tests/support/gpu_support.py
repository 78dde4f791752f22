"""A model small enough for the interpreter, arms that the fake CUDA device knows by name, and whole runs on it."""

from __future__ import annotations

import csv
import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda

import castpoint.harness.gpu.point
from castpoint.harness.conformance.cuda import Binary, Checks
from castpoint.harness.gpu.point import Setting, prepared
from castpoint.harness.problems.geometry import Geometry
from castpoint.harness.problems.grid import Point
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.words import Kind, Status
from castpoint.harness.timing.cpu import Ceilings
from castpoint.harness.timing.rig import AGAIN

PARTS = (Kind.NORM, Kind.MATMUL, Kind.HEADS, Kind.LOOP)
TINY = Geometry(64, 2, 1, 3)  # heads of 128, as drawn K-norm weights need
SHAPE = (64, 2, 1, 128)
LIMITS = Ceilings(2e12, 1e14)


def records_in(folder: Path) -> Records:
    return Records(folder, {"command": "gpu"}, {"commit": "test"})


def rows(folder: Path, table: str) -> list[dict[str, str]]:
    path = folder / f"{table}.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def setting_at(point: Point, records: Records, gpu: FakeCuda, checks: Checks | None = None) -> Setting:
    return prepared(point, records, gpu, checks or Checks(records, gpu), LIMITS, 20)


def labelled(monkeypatch: pytest.MonkeyPatch, faults: dict[str, Exception] | None = None) -> None:
    """Lets the fake device know arms by name, and break those that have a fault.

    A copy is computed once, not for every replay: what becomes of an arm whose outputs change is shown in test_rig.py.
    """

    def call_of(arm: Any) -> Callable[[int], Any]:
        once = functools.cache(arm.call)
        return lambda i: tuple(tensor.clone() for tensor in once(i))

    _calls(monkeypatch, call_of, faults or {})


def stood_in(monkeypatch: pytest.MonkeyPatch, faults: dict[str, Exception] | None = None) -> None:
    """As labelled, and no arm computes anything: whole runs cost the interpreter nothing."""
    _calls(monkeypatch, lambda arm: lambda i: (torch.full([2, 4], float(i)),), faults or {})


def _calls(monkeypatch: pytest.MonkeyPatch, call_of: Callable[[Any], Any], faults: dict[str, Exception]) -> None:
    real = castpoint.harness.gpu.point.measure

    def measure(arms, gpu, **options):
        named = []
        for arm in arms:
            call = call_of(arm)
            call.label = arm.name
            if arm.name in faults:
                call.fails_at_capture = faults[arm.name]
            named.append(dataclasses.replace(arm, call=call))
        return real(named, gpu, **options)

    monkeypatch.setattr(castpoint.harness.gpu.point, "measure", measure)


def checked_as(monkeypatch: pytest.MonkeyPatch, red: dict[Binary, str] | None = None) -> list[Binary]:
    """Checks that compute nothing, and find only those binaries red. Returns what they will have checked, in order."""
    asked: list[Binary] = []

    def checked(self: Checks, binary: Binary, check: str) -> dict[str, Any]:
        asked.append(binary)
        why = (red or {}).get(binary, "")
        return {"share_equal": 0.9, "status": Status.RED, "reason": why} if why else {"share_equal": 1.0}

    monkeypatch.setattr(Checks, "_checked", checked)
    return asked


def seconds_by(times: dict[str, float]) -> FakeCuda:
    return FakeCuda(lambda name, now: times.get(name.split(AGAIN)[0], 1e-4))


def no_compilers() -> Any:
    """Compilers that have compiled everything."""
    return SimpleNamespace(processes=16, start=lambda binaries: None, wait=lambda binaries: None)


class Compiling:
    """Compilers whose processes cost the fake device's clock what they would: each binary once, in order."""

    def __init__(self, gpu: FakeCuda, seconds: float, processes: int = 16) -> None:
        self.gpu, self.seconds, self.processes = gpu, seconds, processes
        self.ready: dict[Binary, float] = {}

    def start(self, binaries: Iterable[Binary]) -> None:
        for binary in binaries:
            if binary not in self.ready:
                self.ready[binary] = (len(self.ready) + 1) * self.seconds / self.processes

    def wait(self, binaries: Iterable[Binary]) -> None:
        self.gpu.clock = max([self.gpu.clock, *(self.ready[binary] for binary in binaries)])
