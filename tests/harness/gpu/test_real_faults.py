"""Faults that a real GPU shows and the fake device does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from fake_cuda import FakeCuda
from fake_run import Timed, staged
from gpu_support import Compiling, records_in, rows
from support import ROOT

import castpoint.harness.conformance.cuda as cuda
import castpoint.harness.gpu.run
from castpoint.harness.conformance.cuda import Binary, Checks
from castpoint.harness.gpu.order import Item
from castpoint.harness.problems.grid import Point
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.words import Step
from castpoint.harness.timing.cuda import DeviceLost
from castpoint.kernels.config import Config

SHORT = [Item(step, Point("qwen3-0.6b", 256)) for step in (Step.TUNING, Step.CHAINS)]


class Real(Timed):
    """As CUDA: nothing works any more behind a sticky error, emptying the cache included."""

    def release(self) -> None:
        super().release()
        self.probe()


def test_a_lost_device_stays_one_where_memory_cannot_be_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(castpoint.harness.gpu.run, "order", lambda: SHORT)
    run_until = staged(monkeypatch, tmp_path)
    gpu = Real()
    gpu.breaks = (Step.CHAINS, "qwen3-0.6b", "256", "deferred")
    with pytest.raises(DeviceLost):
        run_until(1e6, gpu)


def test_a_kernel_whose_fault_is_seen_when_its_outputs_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launches do not wait: an illegal access is raised where the first output is compared."""
    gpu, records = FakeCuda(), records_in(tmp_path)

    def judged(*_: object) -> dict[str, object]:
        gpu.dead = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(cuda, "_judged", judged)
    monkeypatch.setattr(cuda, "run_triton", lambda *a, **k: ())
    monkeypatch.setattr(cuda, "reference", lambda *a, **k: cuda.Reference([], [], []))
    with pytest.raises(DeviceLost):
        Checks(records, gpu).why_red(Binary("deferred", Config()))
    assert [r["status"] for r in rows(tmp_path, "gpu_checks")] == ["failed"]


class BreaksAgain(Timed):
    """The context breaks when the first arm is captured a second time."""

    def capture(self, call, copies, laps=1):
        if self.at and self.at[0] == Step.CHAINS and getattr(call, "label", "").startswith("P1 own"):
            self.seen = getattr(self, "seen", 0) + 1
            if self.seen == 2:
                self.dead = True
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super().capture(call, copies, laps)


def test_the_second_capture_of_the_first_arm_costs_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(castpoint.harness.gpu.run, "order", lambda: SHORT)
    run_until = staged(monkeypatch, tmp_path)
    with pytest.raises(DeviceLost):
        run_until(1e6, BreaksAgain())
    assert len([r for r in rows(tmp_path, "gpu_speed") if r["status"] == "failed"]) == 1


POOL = """
import os
from castpoint.harness.conformance import warm
from castpoint.harness.conformance.cuda import Binary
from castpoint.kernels.config import Config
def crash(binary, target):
    os._exit(11)
warm.compile_binary = crash
compilers = warm.Compilers(2)
compilers.target = "sm_90"
first, second = (Binary("deferred", Config(num_warps=warps)) for warps in (4, 8))
compilers.start([first])
compilers.wait([first])
compilers.start([second])
compilers.wait([second])
print("goes on")
"""


def test_a_compiler_that_crashes_costs_no_run() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", POOL], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "goes on\n", done.stderr[-300:]


AGAIN = """
import os, signal, sys, time
from pathlib import Path
from castpoint.harness.runs.process import supervised
from castpoint.harness.runs.records import Records
folder = Path(sys.argv[1])
status = supervised(folder, time.monotonic() + 4, poll_s=0.02)
if status is not None:
    sys.exit(status)
records = Records(folder, {"command": "gpu"}, {"commit": "test"})
records.note(command="gpu", narrowed_by={})  # as options.records_of does
with open(folder.parent / "began", "a") as file:
    file.write("x")
os.kill(os.getpid(), signal.SIGKILL)  # the host's memory is full, say: nothing is in flight yet
"""


def test_one_that_dies_before_it_measures_anything_is_not_followed_for_ever(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", AGAIN, str(tmp_path / "r")], env=environment, check=False, timeout=60)
    assert len((tmp_path / "began").read_text()) <= 2


def test_what_is_red_is_said_whatever_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from castpoint.harness.runs.schema import GpuStepRow
    from castpoint.harness.runs.words import Status
    from castpoint.harness.steps import print_red

    records = records_in(tmp_path)
    records.add(GpuStepRow(step=Step.TUNING, model="qwen3-0.6b", tokens=1, status=Status.FAILED, reason="no memory"))
    assert print_red(records, "gpu_checks", "gpu_speed", "tuning", "gpu_steps")
    assert "no memory" in capsys.readouterr().err


def test_what_hung_in_another_run_is_tried_in_this_one(tmp_path: Path) -> None:
    """Another GPU, or the code in which the hang was mended, in the same folder or from its archive."""
    from castpoint.harness.runs.flight import in_flight, note_hung, recover
    from castpoint.harness.runs.records import Records
    from castpoint.harness.runs.schema import GpuLimitRow

    old = Records(tmp_path, {"command": "gpu"}, {"device": "cuda", "sources": "old"})
    pid = os.fork()
    if not pid:
        with in_flight(old, {"copy": GpuLimitRow(limit="copy", unit="B/s")}, DeviceLost):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    note_hung(tmp_path)
    new = Records(tmp_path, {"command": "gpu"}, {"device": "cuda", "sources": "new"})
    assert new.run_id != old.run_id
    recover(new)
    assert not new.has(GpuLimitRow, limit="copy")


def test_before_a_long_step_the_archive_is_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters take most of a minute, and the machine may be taken away while they do."""
    staged(monkeypatch, tmp_path)
    run, archive, seen = castpoint.harness.gpu.run, tmp_path / "run.tar.gz", []
    monkeypatch.setattr(run, "order", lambda: [Item(Step.LIMITS), Item(Step.COUNTERS)])
    real = run._without_point

    def watched(step: Step, records: Records, gpu: FakeCuda) -> None:
        if step == Step.COUNTERS:
            with tarfile.open(archive) as tar:
                seen.append(b"bf16 matmul" in tar.extractfile("gpu_limits.csv").read())
        real(step, records, gpu)

    monkeypatch.setattr(run, "_without_point", watched)
    records = Records(tmp_path / "run", {"command": "gpu"}, {"device": "cuda"}, archive, clock=lambda: 0.0)
    gpu = Timed()
    assert run.run(records, gpu, Compiling(gpu, 1.0), 1e6) and seen == [True]


def test_outputs_that_cannot_be_read_are_a_lost_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """store_outputs launches within its try, and waits for the GPU at .cpu(), behind it."""
    gpu, records = FakeCuda(), records_in(tmp_path)

    class Broken:
        def cpu(self) -> torch.Tensor:
            gpu.dead = True
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(cuda, "fused_outputs", lambda name, device: (Broken(),) * 3)
    with pytest.raises(DeviceLost):
        cuda.store_outputs(records, gpu)


def test_no_row_is_said_to_hang_because_its_group_took_long(tmp_path: Path) -> None:
    """The outer group's time begins with its first arm: captures and rounds of all arms count as one work."""
    import time

    from castpoint.harness.runs.flight import in_flight, overdue

    records = records_in(tmp_path)
    began = time.time()
    with in_flight(records, {}, DeviceLost, limit_s=0.5):
        for _ in range(3):
            with in_flight(records, {}, DeviceLost, limit_s=0.5):
                time.sleep(0.3)
            assert not overdue(tmp_path, began, time.time())


def test_a_context_that_broke_where_no_arm_was_is_no_bug_of_every_step_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A late error: the step is a failed row, and the next process goes on behind it."""
    run_until = staged(monkeypatch, tmp_path)
    run = castpoint.harness.gpu.run
    monkeypatch.setattr(run, "order", lambda: [Item(Step.EAGER), Item(Step.LIMITS)])
    real = run._without_point

    def late(step: Step, records: Records, gpu: FakeCuda) -> None:
        if step == Step.EAGER:
            gpu.dead = True
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        real(step, records, gpu)

    monkeypatch.setattr(run, "_without_point", late)
    with pytest.raises(DeviceLost):
        run_until(1e6)
    assert [(row["step"], row["status"]) for row in rows(tmp_path, "gpu_steps")] == [("eager", "failed")]
    assert run_until(1e6)
    assert [(row["step"], row["status"]) for row in rows(tmp_path, "gpu_steps")][1:] == [("limits", "ok")]
