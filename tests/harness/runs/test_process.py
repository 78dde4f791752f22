"""A process that measures for one that watches: broken, dead or hanging it is followed by another, if there is time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import ROOT

from castpoint.harness.runs.errors import UserError
from castpoint.harness.runs.process import apart

WORK = """
import math, os, signal, sys, time
from pathlib import Path
from castpoint.harness.runs.process import LOST, supervised

folder, kind, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
status = supervised(folder, time.monotonic() + seconds, poll_s=0.02)
if status is not None:
    sys.exit(status)
if kind == "dies at once":
    print("worked")
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGSEGV)
with open(folder / "began.csv", "a") as file:
    file.write(f"{os.getpid()}\\n")
times = len((folder / "began.csv").read_text().splitlines())
if kind == "lost" and times < 3:
    sys.exit(LOST)
if kind == "dies" and times < 3:
    os.kill(os.getpid(), signal.SIGSEGV)
if kind == "hangs" and times < 2:
    (folder / "in_flight.json").write_text('{"began": %f, "limit_s": 0.3, "rows": []}' % time.time())
    time.sleep(60)
if kind == "always lost":
    time.sleep(0.05)
    sys.exit(LOST)
if kind == "forever":
    time.sleep(60)
sys.exit(7)
"""


def watched(folder: Path, kind: str, seconds: float = 30.0) -> tuple[int, int]:
    """Exit status of the process that watches, and how many worked for it."""
    command = [sys.executable, "-c", WORK, str(folder), kind, str(seconds)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False, timeout=60)
    return done.returncode, len((folder / "began.csv").read_text().splitlines())


@pytest.mark.parametrize(("kind", "processes"), [("once", 1), ("lost", 3), ("dies", 3), ("hangs", 2)])
def test_another_process_goes_on(kind: str, processes: int, tmp_path: Path) -> None:
    assert watched(tmp_path, kind) == (7, processes)
    if kind == "hangs":
        assert json.loads((tmp_path / "in_flight.json").read_text())["hung"]


def test_one_that_dies_before_it_writes_anything_is_the_last(tmp_path: Path) -> None:
    """No device, no driver: there is no end to processes that begin and die."""
    command = [sys.executable, "-c", WORK, str(tmp_path), "dies at once", "60"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (1, "worked\n")


def test_not_beyond_its_time(tmp_path: Path) -> None:
    status, processes = watched(tmp_path, "always lost", seconds=0.5)
    assert status == 75 and 1 < processes < 30


def test_a_process_that_overruns_its_time_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = WORK.replace("import math", "import castpoint.harness.runs.process as p; p.GRACE_S = 0.2\nimport math")
    monkeypatch.setattr(sys.modules[__name__], "WORK", work)
    start = time.monotonic()
    assert watched(tmp_path, "forever", seconds=0.2) == (1, 1)
    assert time.monotonic() - start < 30


def test_no_process_outlives_the_one_that_watches(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WORK, str(tmp_path), "forever", "60"]
    watching = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    while not (tmp_path / "began.csv").exists() or not (tmp_path / "began.csv").read_text():
        time.sleep(0.02)
    worker = int((tmp_path / "began.csv").read_text())
    os.kill(watching.pid, signal.SIGKILL)
    watching.wait()
    for _ in range(200):
        if not alive(worker):
            return
        time.sleep(0.02)
    pytest.fail("it would hold its GPU")


def alive(process: int) -> bool:
    path = Path(f"/proc/{process}/stat")
    return path.exists() and path.read_text().split()[2] != "Z"


def test_apart_returns_and_raises_as_here() -> None:
    assert apart(os.getpid) != os.getpid()
    with pytest.raises(UserError, match="no such device"):
        apart(refusing, "no such device")


def refusing(text: str) -> None:
    raise UserError(text)
