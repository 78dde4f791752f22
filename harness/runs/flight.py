"""What runs at the moment, on disk: a process that dies costs the rows it was at, and no rerun ends at the same place.

An error that ends a process (a broken CUDA context) becomes a row at once. Of a process that was killed, or died
without a word, the next one finds here what it was at. It may have been killed for its time, so only who dies twice is
left out; who was killed because it hung is left out at once.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import ROWS, Row
from castpoint.harness.runs.words import Status

IN_FLIGHT, DEATHS = "in_flight.json", "deaths.json"
OFTEN = 2  # deaths after which a row is failed
HANGS_S = 120.0  # seconds after which what runs counts as hanging, unless it says more


@contextmanager
def in_flight(
    records: Records, rows: Mapping[str, Row], lost: type[Exception], limit_s: float = HANGS_S
) -> Iterator[None]:
    """Within it the arms of these names run, whose rows are `failed` should the process end there.

    lost: the error that ends a process; one with `arm` makes the row of that arm alone. It is raised again. Nested, the
    inner one counts.
    """
    path = records.folder / IN_FLIGHT
    outer = _read(path)
    named = [{"table": row.TABLE, "values": vars(row)} for row in rows.values()]
    _replace(path, {"run_id": records.run_id, "began": time.time(), "limit_s": limit_s, "rows": named})
    try:
        yield
    except lost as error:
        guilty = rows.get(getattr(error, "arm", ""))
        for row in [guilty] if guilty else rows.values():
            records.add(dataclasses.replace(row, status=Status.FAILED, reason=str(error)))
        raise
    finally:
        if outer:
            _replace(path, outer | {"began": time.time()})
        else:
            path.unlink()


def recover(records: Records) -> None:
    """Counts the death of what an earlier process of this run left in flight, and makes `failed` rows of what died
    often enough. What another run left, of other code or on another GPU, is no matter."""
    path, counted = records.folder / IN_FLIGHT, records.folder / DEATHS
    left, deaths = _read(path), _read(counted)
    said = f"did not end within {left['limit_s']:g} s" if left.get("hung") else "the process died here twice"
    for found in left["rows"] if left.get("run_id") == records.run_id else ():
        kind, values = ROWS[found["table"]], found["values"]
        name = " ".join((records.run_id, kind.TABLE, *kind.key_of(**values)))
        deaths[name] = deaths.get(name, 0) + (OFTEN if left.get("hung") else 1)
        if deaths[name] >= OFTEN:
            records.add(kind(**values | {"status": Status.FAILED, "reason": said}))
    if deaths:
        _replace(counted, deaths)
    path.unlink(missing_ok=True)


def overdue(folder: Path, since: float, now: float) -> bool:
    """Whether what a process has in flight, that started at `since`, runs longer than it may. Both by time.time()."""
    left = _read(folder / IN_FLIGHT)
    return bool(left) and left["began"] >= since and now - left["began"] > left["limit_s"]


def note_hung(folder: Path) -> None:
    """Says of what is in flight that it was killed because it hung."""
    if left := _read(folder / IN_FLIGHT):
        _replace(folder / IN_FLIGHT, left | {"hung": True})


def _read(path: Path) -> dict[str, Any]:
    """Empty where there is no such file, or none any more: what runs may end at any moment."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return found


def _replace(path: Path, content: dict[str, Any]) -> None:
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(content))
    draft.replace(path)
