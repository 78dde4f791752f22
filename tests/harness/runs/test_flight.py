"""What is in flight when a process ends costs its own rows, once, and no rerun ends at the same place."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from gpu_support import records_in, rows

from castpoint.harness.runs.flight import IN_FLIGHT, in_flight, note_hung, overdue, recover
from castpoint.harness.runs.schema import GpuLimitRow
from castpoint.harness.runs.words import Status
from castpoint.harness.timing.cuda import DeviceLost

COPY, READ = (GpuLimitRow(limit=name, unit="B/s") for name in ("copy", "read"))


def found(folder: Path) -> dict[str, tuple[str, str]]:
    if not (folder / "gpu_limits.csv").exists():
        return {}
    return {row["limit"]: (row["status"], row["reason"]) for row in rows(folder, "gpu_limits")}


def test_a_lost_device_is_the_row_of_its_arm_before_the_process_ends(tmp_path: Path) -> None:
    records = records_in(tmp_path)
    with pytest.raises(DeviceLost), in_flight(records, {"copy": COPY, "read": READ}, DeviceLost):
        raise DeviceLost("an illegal access in read", "read")
    assert found(tmp_path) == {"read": ("failed", "an illegal access in read")}
    assert not (tmp_path / IN_FLIGHT).exists()
    recover(records)
    assert set(found(tmp_path)) == {"read"}, "a death was counted that had its row"


def test_an_error_of_another_kind_ends_nothing(tmp_path: Path) -> None:
    records = records_in(tmp_path)
    with pytest.raises(ValueError), in_flight(records, {"copy": COPY}, DeviceLost):
        raise ValueError("no such shape")
    assert not found(tmp_path) and not (tmp_path / IN_FLIGHT).exists()


def died(records, *named: GpuLimitRow) -> None:
    """Leaves behind what a process leaves that is killed there."""
    text = ""
    with in_flight(records, {row.limit: row for row in named}, DeviceLost):
        text = (records.folder / IN_FLIGHT).read_text()
    (records.folder / IN_FLIGHT).write_text(text)


def test_who_is_killed_once_is_tried_again_and_who_dies_twice_is_left_out(tmp_path: Path) -> None:
    records = records_in(tmp_path)
    died(records, COPY)
    recover(records)
    assert not found(tmp_path), "a process that is killed for its time is no fault of what it was at"
    died(records, READ)
    recover(records)
    assert not found(tmp_path)
    died(records, COPY)
    recover(records)
    assert found(tmp_path) == {"copy": (Status.FAILED, "the process died here twice")}
    recover(records)
    assert set(found(tmp_path)) == {"copy"}


def test_what_hung_is_left_out_at_once(tmp_path: Path) -> None:
    records = records_in(tmp_path)
    assert not overdue(tmp_path, 0, 1e12)
    with in_flight(records, {"copy": COPY}, DeviceLost, limit_s=5):
        began = json.loads((tmp_path / IN_FLIGHT).read_text())["began"]
        assert not overdue(tmp_path, began, began + 4.9) and overdue(tmp_path, began, began + 5.1)
        assert not overdue(tmp_path, began + 1, began + 5.1), "what an earlier process left kills no later one"
    died(records, COPY)
    note_hung(tmp_path)
    recover(records)
    assert found(tmp_path) == {"copy": ("failed", "did not end within 120 s")}


def test_nested_the_inner_one_counts_and_the_outer_comes_back(tmp_path: Path) -> None:
    records = records_in(tmp_path)

    def named() -> list[str]:
        return [row["values"]["limit"] for row in json.loads((tmp_path / IN_FLIGHT).read_text())["rows"]]

    with in_flight(records, {"copy": COPY, "read": READ}, DeviceLost):
        with in_flight(records, {"read": READ}, DeviceLost):
            assert named() == ["read"]
        assert named() == ["copy", "read"]
    with pytest.raises(DeviceLost), in_flight(records, {"copy": COPY, "read": READ}, DeviceLost):
        with in_flight(records, {"copy": COPY}, DeviceLost):
            raise DeviceLost("lost", "copy")
    assert set(found(tmp_path)) == {"copy"}, "one arm broke the context and two rows say so"


def test_an_unknown_arm_costs_all_that_was_in_flight(tmp_path: Path) -> None:
    records = records_in(tmp_path)
    with pytest.raises(DeviceLost), in_flight(records, {"copy": COPY, "read": READ}, DeviceLost):
        raise DeviceLost("lost", SimpleNamespace(name="nobody").name)
    assert set(found(tmp_path)) == {"copy", "read"}
