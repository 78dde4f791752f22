"""One step of a run: whatever goes wrong in it costs its own rows, and what was measured stands on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gpu_support import checked_as, no_compilers, records_in, rows, seconds_by, stood_in

import castpoint.harness.gpu.run as run
from castpoint.harness.conformance.cuda import Checks
from castpoint.harness.gpu.order import Item
from castpoint.harness.problems.grid import Point
from castpoint.harness.runs.errors import UserError
from castpoint.harness.runs.schema import GpuLimitRow
from castpoint.harness.runs.words import Step
from castpoint.harness.timing.cpu import Ceilings
from castpoint.harness.timing.cuda import DeviceLost
from castpoint.kernels.dispatch import read_table

POINTS = Point("tiny", 1), Point("tiny", 4)
STEPS = [Item(Step.CHAINS, point) for point in POINTS]


@pytest.fixture
def short(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of two steps, whose arms and checks compute nothing."""
    monkeypatch.setattr(run, "order", lambda: STEPS)
    stood_in(monkeypatch)
    checked_as(monkeypatch)


def broken_at_one_token(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    real = run.prepared

    def prepared(point, *rest):
        if point.tokens == 1:
            raise error
        return real(point, *rest)

    monkeypatch.setattr(run, "prepared", prepared)


def run_in(folder: Path) -> bool:
    return run.run(records_in(folder), seconds_by({}), no_compilers(), 1e9)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("tried to allocate 200 GiB"), "out of memory: tried to allocate 200 GiB"),
        (ZeroDivisionError("a bug of ours"), "ZeroDivisionError: a bug of ours"),
    ],
)
def test_a_step_that_fails_is_a_row_and_the_run_goes_on(
    error: Exception, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken_at_one_token(monkeypatch, error)
    assert run_in(tmp_path)
    found = {row["tokens"]: (row["status"], row["reason"]) for row in rows(tmp_path, "gpu_steps")}
    assert found == {"1": ("failed", reason), "4": ("ok", "")}
    assert {row["tokens"] for row in rows(tmp_path, "gpu_speed")} == {"4"}
    said = capsys.readouterr().err
    assert ("Traceback" in said and "in prepared" in said) == isinstance(error, ZeroDivisionError), "unseen"
    assert run_in(tmp_path) and len(rows(tmp_path, "gpu_steps")) == 2, "a step was begun again"


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("error", [DeviceLost("an illegal access", "eager"), UserError("no space on the disk")])
def test_what_ends_a_run_is_no_row_of_its_step(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_at_one_token(monkeypatch, error)
    with pytest.raises(type(error)):
        run_in(tmp_path)
    assert not rows(tmp_path, "gpu_steps")


# ---------------------------------------------------------------- limits


def measured(monkeypatch: pytest.MonkeyPatch, folder: Path, **found: object) -> dict[str, dict[str, str]]:
    """limit -> its row; found: a value, None, or an error, by limit."""

    def of(value):
        def measure(gpu):
            if isinstance(value, Exception):
                raise value
            return (value, "" if value else "RuntimeError: no such instruction")

        return measure

    monkeypatch.setattr(run, "LIMITS", {name.replace("_", " "): ("B/s", of(value)) for name, value in found.items()})
    run.measure_limits(records_in(folder), seconds_by({}))
    return {row["limit"]: row for row in rows(folder, "gpu_limits")}


def test_every_limit_is_a_row_and_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(monkeypatch, tmp_path, copy=2e12, read=None)
    assert float(found["copy"]["value"]) == 2e12 and found["copy"]["unit"] == "B/s"
    assert (found["read"]["status"], found["read"]["value"]) == ("failed", "") and "no such" in found["read"]["reason"]
    lost, again = DeviceLost("an illegal access", "bf16 matmul"), AssertionError("measured again")
    with pytest.raises(DeviceLost):  # the others stand
        measured(monkeypatch, tmp_path, copy=again, read=again, bf16_matmul=lost)
    after = measured(monkeypatch, tmp_path, copy=again, read=again, bf16_matmul=again)
    assert {name: row["status"] for name, row in after.items()} == {
        "copy": "ok",
        "read": "failed",
        "bf16 matmul": "failed",
    }
    assert float(after["copy"]["value"]) == 2e12 and "illegal access" in after["bf16 matmul"]["reason"]


@pytest.mark.parametrize(
    ("found", "limits"),
    [
        ({"copy": 2e12, "read": 3e12, "bf16 matmul": 7e14}, Ceilings(3e12, 7e14)),  # the faster of both
        ({"copy": 4e12, "read": 3e12, "bf16 matmul": 7e14}, Ceilings(4e12, 7e14)),
        ({"copy": None, "read": 3e12, "bf16 matmul": 7e14}, Ceilings(3e12, 7e14)),
        ({"copy": None, "read": None, "bf16 matmul": 7e14}, None),
        ({"copy": 2e12, "read": 3e12, "bf16 matmul": None}, None),
        ({}, None),
    ],
)
def test_floors_follow_from_what_this_run_measured(found: dict, limits: Ceilings | None, tmp_path: Path) -> None:
    records = records_in(tmp_path)
    for name, value in found.items():
        records.add(GpuLimitRow(limit=name, unit="", value=value, status="ok" if value else "failed"))
    assert run.limits_of(records) == limits


# ---------------------------------------------------------------- the dispatch table


@pytest.mark.usefixtures("short")
def test_every_tuned_point_is_in_the_folders_table_at_once(tmp_path: Path) -> None:
    records, gpu = records_in(tmp_path), seconds_by({})
    for count, point in enumerate(POINTS, 1):
        assert run.step(Item(Step.TUNING, point), records, gpu, Checks(records, gpu))["status"] == "ok"
        table = read_table(tmp_path / "dispatch.csv")
        assert {scale for _, _, scale in table} == {"prologue", "epilogue", "folded"}
        assert all(len(configs) == count for configs in table.values())
