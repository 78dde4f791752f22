"""Processes that measure for one that watches: what breaks, hangs or dies there is followed by another."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from castpoint.harness.runs.flight import DEATHS, IN_FLIGHT, note_hung, overdue

LOST = 75  # exit status after a broken CUDA context, EX_TEMPFAIL: the same command goes on from there
GRACE_S = 20.0  # beyond its time, that a process has for its last row


def supervised(folder: Path, deadline: float, poll_s: float = 0.5) -> int | None:
    """None in a process forked for the work; in the one that calls, when that is over, its exit status.

    A process that ends with LOST, or by a signal, is followed by another while there is time, and unless it wrote
    nothing: the next would end at the same place. One whose work in flight (runs.flight, in that folder) is overdue is
    killed, and the next leaves that out. deadline: by time.monotonic(). Must be called before CUDA is touched: no fork
    may inherit it in use.
    """
    while True:
        written, since, parent, child = _written(folder), time.time(), os.getpid(), os.fork()
        if not child:
            die_with_parent(parent)
            return None
        status = _waited(child, since, folder, deadline, poll_s)
        again = status == LOST or status < 0
        if not again or time.monotonic() > deadline or _written(folder) == written:
            return status if status >= 0 else 1


def _written(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of each file by which a process gets on: its rows, and what it was at."""
    files = [*folder.glob("*.csv"), folder / IN_FLIGHT, folder / DEATHS]
    found = {path.name: path.stat() for path in files if path.exists()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


def _waited(child: int, since: float, folder: Path, deadline: float, poll_s: float) -> int:
    """The exit status of that process, negative for the signal that ended it."""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        hung, late = overdue(folder, since, time.time()), time.monotonic() > deadline + GRACE_S
        if hung or late:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            if hung:
                note_hung(folder)
            return -signal.SIGKILL
        time.sleep(poll_s)


def apart(function: Callable[..., Any], *args: object) -> Any:
    """What the function returns or raises, in a process of its own: whatever it loads or touches ends with it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *args).result()


def die_with_parent(parent: int) -> None:
    """A killed parent leaves no process behind that would hold its GPU, though it ended before this was called. On
    Linux, where the GPUs are."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
