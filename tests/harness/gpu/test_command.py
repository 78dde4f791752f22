"""`castpoint gpu` as it is typed, in processes of its own: forks, restarts, archive, exit status; a scripted device."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from gpu_support import rows
from support import ROOT

COMMAND = """
import sys, time
import pytest, torch
torch.set_num_threads(1)
from pathlib import Path
from fake_run import Timed, staged
import castpoint.harness.gpu.run
from castpoint.harness import options
from castpoint.harness.gpu.order import Item, order
from castpoint.harness.__main__ import main
from castpoint.harness.timing import cuda

breaks, sys.argv = tuple(sys.argv[1].split("|")), ["castpoint", *sys.argv[2:]]
patch = pytest.MonkeyPatch()
staged(patch, Path())
device = options.device_named
patch.setattr(options, "device_named", lambda wanted: wanted)
patch.setattr(options, "machine_name", lambda device: "scripted")
patch.setattr(options, "describe", lambda device: {"device": device, "sources": "s", "gpu": {"name": "scripted H100"}})
patch.setattr(castpoint.harness.gpu.run, "say", lambda text: print(text, file=sys.stderr))

def scripted():
    gpu = Timed()
    gpu.breaks, gpu.clock = breaks, time.monotonic()
    gpu.target = lambda: "none"
    return gpu

patch.setattr(cuda, "Cuda", scripted)
whole = [item for item in order() if item.point is None or item.point.model == "qwen3-0.6b" and item.point.tokens == 1]
patch.setattr(castpoint.harness.gpu.run, "order", lambda: whole[:8])
main()
"""


def typed(folder: Path, *words: str, breaks: str = "nothing") -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COMMAND, breaks, "gpu", *words]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("typed")
    return folder, typed(folder, "--results", "run", breaks="chains|qwen3-0.6b|1|deferred")


def test_a_broken_context_is_followed_by_another_process(done: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, process = done
    failed = [row for row in rows(folder / "run", "gpu_speed") if row["status"] == "failed"]
    assert [(row["step"], row["arm"]) for row in failed] == [("chains", "deferred")], process.stderr
    assert "CUDA error" in failed[0]["reason"] and "a new process goes on from there" in process.stderr
    assert len(rows(folder / "run", "gpu_steps")) == 8
    assert process.returncode == 1, "a failed arm is named, and said with the exit status"
    assert "deferred failed: the CUDA context is lost" in process.stderr


def test_the_archive_is_the_folder(done: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = done
    with tarfile.open(folder / "run.tar.gz") as tar:
        held = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert held == {path.name: path.read_bytes() for path in (folder / "run").iterdir()}
    assert "dispatch.csv" in held and "in_flight.json" not in held


def test_time_is_up_and_the_next_machine_goes_on(tmp_path: Path) -> None:
    first = typed(tmp_path, "--minutes", "0.5", "--results", "first", "--archive", "out/run.tar.gz")
    assert first.returncode == 0, first.stderr
    begun = rows(tmp_path / "first", "gpu_steps")
    assert 0 < len(begun) < 8 and "stopped before" in first.stderr
    shutil.rmtree(tmp_path / "first")
    second = typed(tmp_path, "--results", "second", "--archive", "out/run.tar.gz")
    assert second.returncode == 0, second.stderr
    steps = rows(tmp_path / "second", "gpu_steps")
    assert steps[: len(begun)] == begun and len(steps) == 8
    assert len({row["run_id"] for row in steps}) == 1
