"""Progress with time left, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def track(items: Sequence[T], label: str) -> Iterator[T]:
    """The items, with a bar and the time left on a terminal, and elsewhere a line every ten seconds and at the end."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        counted = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn())
        timed = (progress.TimeElapsedColumn(), progress.TimeRemainingColumn())
        with progress.Progress(*counted, *timed, console=console) as bar:
            yield from bar.track(items, description=f"{label:24}")
        return
    last = start = time.monotonic()
    for i, item in enumerate(items):
        yield item
        now = time.monotonic()
        if now - last > 10 or i + 1 == len(items):
            left = (now - start) / (i + 1) * (len(items) - i - 1)
            print(f"{label}: {i + 1}/{len(items)}, {now - start:.0f} s, {left:.0f} s left", file=sys.stderr, flush=True)
            last = now
