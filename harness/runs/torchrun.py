"""Processes under torchrun, watched: a rank that dies or hangs ends the others, and is said by name.

Every rank writes where it is into a file before each step. Nothing but that says whether it lives: a process that was
stopped, or waits for one that was, writes no more.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from castpoint.harness.runs.errors import UserError, reason_of
from castpoint.harness.runs.process import die_with_parent

Beat = Callable[[str], None]  # told where its rank is
PATIENCE_S, START_S = 20.0, 90.0  # without a sign of any rank, once each gave one behind its start; and until then
START = "its start"
# torchrun, which its parent's death ends too: asked here, since JAX's threads bear no fork that runs Python
TORCHRUN = """
import runpy, sys
from castpoint.harness.runs.process import die_with_parent
parent = int(sys.argv.pop(1))
if sys.platform == "linux":
    die_with_parent(parent)
runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)
"""
GONE = re.compile(r"rank\s*:\s*(\d+) \(local_rank: \d+\)\s*exitcode\s*:\s*(-?\d+)")  # of torchrun's summary


def free_port() -> int:
    """MASTER_PORT, where the environment names one, or any that is free. Raises UserError for one that is taken."""
    asked = os.environ.get("MASTER_PORT", "0")
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            held.bind(("127.0.0.1", int(asked)))
        except (OSError, ValueError, OverflowError) as error:
            why = f"port {asked} cannot be had ({getattr(error, 'strerror', None) or 'it is no port'})"
            raise UserError(f"{why}: unset MASTER_PORT, or give one that is free") from error
        port: int = held.getsockname()[1]
        return port


def launch(module: str, job: dict[str, Any], ranks: int, folder: Path, patience_s: float = PATIENCE_S) -> None:
    """Runs `python -m module folder` on so many ranks, which find the job in that folder and write into it.

    Raises UserError, after every rank has ended, for a rank that failed, was killed or hung, and for a taken port.
    """
    port = free_port()
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps(job))
    where = ["--nproc-per-node", str(ranks), "--master-addr", "127.0.0.1", "--master-port", str(port)]
    command = [sys.executable, "-c", TORCHRUN, str(os.getpid()), *where, "-m", module, str(folder)]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    with open(folder / "log", "wb") as log:
        torchrun = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        hung = _watched(torchrun, ranks, folder, patience_s)
    finally:
        _end(torchrun, folder)
    if hung:
        raise UserError(f"{hung}: the other ranks were ended")
    if torchrun.returncode:
        raise UserError(f"{_cause(folder, ranks)}: the other ranks were ended")


def _watched(torchrun: subprocess.Popen[bytes], ranks: int, folder: Path, patience_s: float) -> str:
    """Returns when torchrun has ended, or with the rank that hangs: of those that are behind the first."""
    seen, since, start = _signs(folder), time.monotonic(), time.monotonic()
    while torchrun.poll() is None:
        time.sleep(0.05)
        now = _signs(folder)
        if now != seen:
            seen, since = now, time.monotonic()
        late = [rank for rank in range(ranks) if rank not in seen or seen[rank][2] == START]
        if late and time.monotonic() - start > START_S:
            return f"rank {late[0]} of {ranks} did not start in {START_S:.0f} s"
        if not late and time.monotonic() - since > patience_s:
            rank = min(seen, key=lambda r: (not _stopped(seen[r][0]), seen[r][1]))
            return f"rank {rank} of {ranks} hangs: no sign for {patience_s:.0f} s after {seen[rank][2]}"
    return ""


def _signs(folder: Path) -> dict[int, tuple[int, int, str]]:
    """Rank -> its process, how many signs it gave, and where it was at the last."""
    found = {}
    for path in folder.glob("rank-*.at"):
        words = path.read_text().split(" ", 2)
        if len(words) == 3:
            found[int(path.stem.split("-")[1])] = (int(words[0]), int(words[1]), words[2].strip())
    return found


def _stopped(process: int) -> bool:
    """Whether the system says so; it does on Linux."""
    state = Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] in "Tt"


def _end(torchrun: subprocess.Popen[bytes], folder: Path) -> None:
    """Ends what still runs: the ranks, which torchrun would ask first, then torchrun."""
    if torchrun.poll() is None:
        for process, _, _ in _signs(folder).values():
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            torchrun.wait(5)
        except subprocess.TimeoutExpired:
            torchrun.kill()
            torchrun.wait()


def _cause(folder: Path, ranks: int) -> str:
    """The rank whose own error it was, in words; what a rank says of a lost neighbour is none."""
    log, signs = (folder / "log").read_text(errors="replace"), _signs(folder)
    for path in sorted(folder.glob("rank-*.error")):
        return f"rank {path.stem.split('-')[1]} of {ranks} failed: {path.read_text()}"
    if "EADDRINUSE" in log or "address already in use" in log:
        return "the port was taken meanwhile, run the command again"
    gone = {int(rank): int(code) for rank, code in GONE.findall(log)}
    lost = {int(path.stem.split("-")[1]) for path in folder.glob("rank-*.lost")}
    if gone:  # torchrun ends the others by SIGTERM
        rank, code = min(gone.items(), key=lambda item: (item[1] == -signal.SIGTERM, item[0] in lost))
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        return f"rank {rank} of {ranks} {how} after {signs[rank][2] if rank in signs else START}"
    return f"{ranks} ranks under torchrun failed: {(log.strip().splitlines() or ['without a word'])[-1][:300]}"


# ---------------------------------------------------------------- a rank


def as_rank(folder: Path, run: Callable[[dict[str, Any], str, Beat], None]) -> int:
    """Exit status of a rank: joined with the others (NCCL where each has a GPU, else gloo), it runs that job on that
    device, and writes why it failed, where that is its own."""
    if sys.platform == "linux":
        die_with_parent(os.getppid())
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    beat = _signs_to(folder / f"rank-{rank}.at")
    beat(START)
    on_gpus = torch.cuda.device_count() >= ranks
    if on_gpus:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if on_gpus else "gloo", timeout=datetime.timedelta(minutes=10))
    try:
        run(json.loads((folder / "job.json").read_text()), f"cuda:{rank}" if on_gpus else "cpu", beat)
    except Exception as error:
        lost = isinstance(error, dist.DistError) or "Connection" in str(error) or "gloo" in str(error)  # a neighbour
        said = str(error) if isinstance(error, UserError) else reason_of(error)
        (folder / f"rank-{rank}.{'lost' if lost else 'error'}").write_text(said)
        raise
    dist.destroy_process_group()
    return 0


def _signs_to(path: Path) -> Beat:
    count = 0

    def beat(where: str) -> None:
        nonlocal count
        count += 1
        draft = path.with_suffix(".draft")
        draft.write_text(f"{os.getpid()} {count} {where}")
        draft.replace(path)

    return beat
