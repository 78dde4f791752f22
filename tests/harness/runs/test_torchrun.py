"""Ranks that die, hang or fail end the others and are named; a taken port is said. Each runs the split decoder."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from tiny_models import IDS, saved

from castpoint.harness.runs import torchrun
from castpoint.harness.runs.errors import UserError
from castpoint.harness.runs.torchrun import launch
from castpoint.harness.systems.parallel import RANK
from castpoint.harness.systems.ranks import Job


def test_a_taken_port_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(
            UserError, match=rf"port {port} cannot be had \(Address already in use\): unset MASTER_PORT"
        ):
            launch(RANK, {}, 2, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("MASTER_PORT", "soon")
    with pytest.raises(UserError, match="port soon cannot be had"):
        torchrun.free_port()


def disturbed(
    folder: Path, source: str, ranks: int, sent: signal.Signals | None, patience_s: float
) -> tuple[str, float]:
    """What launch says where the last rank is sent a signal once all have started, and how long after it."""
    job = Job(source, IDS[:8], 2, ["fp32"], ["tree"], repeats=10**6)
    said: list[str] = []

    def run() -> None:
        with pytest.raises(UserError) as caught:
            launch(RANK, asdict(job), ranks, folder, patience_s)
        said.append(str(caught.value))

    thread = threading.Thread(target=run)
    thread.start()
    while sent and (len(signs := torchrun._signs(folder)) < ranks or signs[ranks - 1][1] < 20):
        assert thread.is_alive(), said
        time.sleep(0.02)
    if sent:
        os.kill(signs[ranks - 1][0], sent)
    start = time.monotonic()
    thread.join(60)
    took = time.monotonic() - start
    for process, _, _ in torchrun._signs(folder).values():
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    return said[0], took


def test_ranks_end_with_one_that_was_killed(tmp_path: Path) -> None:
    source = str(saved(tmp_path / "model", "qwen3"))
    said, took = disturbed(tmp_path / "run", source, 2, signal.SIGKILL, 60)
    assert said.startswith("rank 1 of 2 was ended by SIGKILL after layer ") and said.endswith(
        "the other ranks were ended"
    )
    assert took < 15


def test_ranks_end_with_one_that_hangs(tmp_path: Path) -> None:
    source = str(saved(tmp_path / "model", "qwen3"))
    said, took = disturbed(tmp_path / "run", source, 2, signal.SIGSTOP, 2)
    assert said.startswith("rank 1 of 2 hangs: no sign for 2 s after layer ")
    assert took < 15


def test_the_error_of_a_rank_is_shown(tmp_path: Path) -> None:
    said, _ = disturbed(tmp_path / "run", str(tmp_path / "nowhere"), 1, None, 60)
    assert said.startswith(f"rank 0 of 1 failed: {tmp_path / 'nowhere'} does not exist")


def test_a_rank_that_ends_without_a_word_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its first sign, while its neighbour waits, whom torchrun ends."""
    (tmp_path / "silent.py").write_text(
        "import os, time\ntime.sleep(60) if os.environ['RANK'] == '0' else os._exit(3)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(UserError, match="rank 1 of 2 ended with status 3 after its start: the other ranks were ended"):
        launch("silent", {}, 2, tmp_path / "run")


@pytest.mark.parametrize(
    "codes, lost, said",
    [
        ((1, -9), 0, "rank 1 of 2 was ended by SIGKILL after its start"),
        ((1, 3), 0, "rank 1 of 2 ended with status 3 after its start"),
        ((2, 1), 1, "rank 0 of 2 ended with status 2 after its start"),
        ((-15, -11), None, "rank 1 of 2 was ended by SIGSEGV after its start"),
    ],
)
def test_neither_who_lost_a_neighbour_nor_whom_torchrun_ends_is_named(
    tmp_path: Path, codes: tuple[int, int], lost: int | None, said: str
) -> None:
    (tmp_path / "log").write_text(
        "".join(f"  rank      : {i} (local_rank: {i})\n  exitcode  : {code} (pid: 7)\n" for i, code in enumerate(codes))
    )
    if lost is not None:
        (tmp_path / f"rank-{lost}.lost").touch()
    assert torchrun._cause(tmp_path, 2) == said
