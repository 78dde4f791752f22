"""Progress with time left, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def track(items: Sequence[T], label: str) -> Iterator[T]:
    """The items, with a bar and the time left on a terminal, and one line at the end elsewhere."""
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:  # `castpoint gpu` runs with what is there
        yield from _plain(items, label)
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from _plain(items, label)
        return
    counted = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn())
    timed = (progress.TimeElapsedColumn(), progress.TimeRemainingColumn())
    with progress.Progress(*counted, *timed, console=console) as bar:
        yield from bar.track(items, description=f"{label:24}")


def _plain(items: Iterable[T], label: str) -> Iterator[T]:
    items, start = list(items), time.monotonic()
    last = start
    for i, item in enumerate(items):
        yield item
        now = time.monotonic()
        if now - last > 10 or i + 1 == len(items):
            left = (now - start) / (i + 1) * (len(items) - i - 1)
            print(f"{label}: {i + 1}/{len(items)}, {now - start:.0f} s, {left:.0f} s left", file=sys.stderr, flush=True)
            last = now
