"""A model small enough for the interpreter, and arms that the fake CUDA device knows by name."""

from __future__ import annotations

import csv
import dataclasses
import functools
from pathlib import Path

import pytest
from fake_cuda import FakeCuda

import castpoint.harness.gpu.sweep
from castpoint.harness.problems.geometry import Geometry
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import Kind
from castpoint.harness.timing.rig import AGAIN

PARTS = (Kind.NORM, Kind.MATMUL, Kind.HEADS, Kind.LOOP)
TINY = Geometry(64, 2, 1, 3)  # heads of 128, as drawn K-norm weights need
SHAPE = (64, 2, 1, 128)


LIMITS = {"copy_bytes_per_s": 1e12, "bf16_flops_per_s": 1e14, "reason": ""}


def records_in(folder: Path) -> Records:
    return Records(folder, {"command": "gpu"}, {"commit": "test"})


def rows(folder: Path, table: str) -> list[dict[str, str]]:
    with open(folder / f"{table}.csv", newline="") as file:
        return list(csv.DictReader(file))


def labelled(monkeypatch: pytest.MonkeyPatch, faults: dict[str, Exception] | None = None) -> None:
    """Lets the fake device know arms by name, and break those that have a fault.

    A copy is computed once, not for every replay: what becomes of an arm whose outputs change is shown in test_rig.py.
    """
    real = castpoint.harness.gpu.sweep.measure

    def measure(arms, gpu, **options):
        named = []
        for arm in arms:
            once = functools.cache(arm.call)

            def call(i, once=once):
                return tuple(tensor.clone() for tensor in once(i))

            call.label = arm.name
            if arm.name in (faults or {}):
                call.fails_at_capture = faults[arm.name]
            named.append(dataclasses.replace(arm, call=call))
        return real(named, gpu, **options)

    monkeypatch.setattr(castpoint.harness.gpu.sweep, "measure", measure)


def seconds_by(times: dict[str, float]) -> FakeCuda:
    return FakeCuda(lambda name, now: times.get(name.split(AGAIN)[0], 1e-4))
