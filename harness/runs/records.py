"""Records: tidy CSV files, one row a measurement, appended and flushed as it is made; a file begins with its first row.

environment.json beside them says of every run_id with which settings, on which machine and by which versions it
was measured. A run that was stopped is continued, by the same code: rows it has are not measured again.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from castpoint.harness.runs import archive as archives
from castpoint.harness.runs.errors import UserError, writing
from castpoint.harness.runs.schema import KEYS, TABLES, Row, text

SCHEMA = 1
ARCHIVE_EVERY_S = 15.0  # a killed machine costs what was measured since


@dataclass(frozen=True)
class Settings:
    """What a bench or a gpu run is asked for; part of its record."""

    model: str = "qwen3-0.6b"
    checkpoint: str | None = None
    layers: tuple[int, ...] = ()
    tokens: int = 128
    kernel_tokens: int = 16
    speed_tokens: tuple[int, ...] = (1, 16, 128)
    plans: tuple[str, ...] = ()
    seed: int = 0
    device: str = "cpu"
    speed_budget_s: float = 15.0


class Records:
    """The results folder of one run. Raises UserError where the folder cannot be used as it is.

    archive: the folder as one file, written again behind a row once the last writing is ARCHIVE_EVERY_S old, at
    finish() and at close(); where it exists and the folder holds no records, it is unpacked first. clock: seconds.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        environment: dict[str, Any],
        archive: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._made = [each for each in (folder, *folder.parents) if not each.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".writable").touch()
            (folder / ".writable").unlink()
        except OSError as error:  # of any kind: whatever the system says of that path, it is the wrong one
            refused = f"results folder {folder} cannot be written ({error.strerror})"
            raise UserError(f"{refused}: choose another with --results") from error
        if archive is not None and archive.exists():
            archives.restore(archive, folder)
        self._opened(folder, archive, clock)
        self._hold(self._unfinished(settings, environment) or self._started(settings, environment))

    @classmethod
    def of_run(cls, folder: Path, run_id: str) -> Records:
        """A run of a folder as it is, finished or not, to which rows are added that were computed from what it kept.
        Raises UserError where the folder cannot be used, KeyError where it has no such run."""
        records = cls.__new__(cls)
        records._opened(folder, None, time.monotonic)
        records.runs[run_id]  # raises
        records._hold(run_id)
        return records

    def _opened(self, folder: Path, archive: Path | None, clock: Callable[[], float]) -> None:
        self._clock, self._archived = clock, -math.inf
        self.folder, self.archive, self.environment_path = folder, archive, folder / "environment.json"
        self.runs = load_runs(folder)
        for table, columns in TABLES.items():
            check_table(folder / f"{table}.csv", columns)
        for table in TABLES:
            _drop_half_a_line(folder / f"{table}.csv")

    def _hold(self, run_id: str) -> None:
        self.run_id = run_id
        self.held = {table: rows_of(self.folder, run_id, table) for table in TABLES}
        self.done = {t: {tuple(row[name] for name in KEYS[t]) for row in rows} for t, rows in self.held.items()}

    def has(self, row: type[Row], **key: object) -> bool:
        """Whether this run has the row of that key already."""
        return row.key_of(**key) in self.done[row.TABLE]

    def add(self, *rows: Row) -> None:
        """Appends rows of one table that this run does not have yet, all in one writing, so that whoever kills the
        process loses all of them or none. What is None stays empty."""
        lines: dict[tuple[str, ...], list[str]] = {}
        for row in rows:
            values = {**vars(row), "run_id": self.run_id, "reason": " ".join(row.reason.split())}
            if not self.has(type(row), **values):
                lines[row.key_of(**values)] = [text(values[column]) for column in row.columns()]
        if not lines:
            return
        table, columns = rows[0].TABLE, rows[0].columns()
        with writing(self.folder), open(self.folder / f"{table}.csv", "ab", buffering=0) as file:
            whole = io.StringIO(newline="")
            csv.writer(whole, lineterminator="\n").writerows([*([] if file.tell() else [columns]), *lines.values()])
            file.write(whole.getvalue().encode())
        self.done[table].update(lines)
        self.held[table] += [dict(zip(columns, line, strict=True)) for line in lines.values()]
        self._archive_if_old()

    def rows(self, table: str) -> list[dict[str, str]]:
        """This run's rows so far, as they stand on disk."""
        return list(self.held[table])

    def note(self, **facts: object) -> None:
        """Adds facts about this run to environment.json."""
        self.runs[self.run_id].update(facts)
        self._write()

    def _write(self) -> None:
        draft = self.environment_path.with_suffix(".tmp")
        with writing(self.folder):
            draft.write_text(json.dumps({"schema": SCHEMA, "runs": self.runs}, indent=1) + "\n")
            draft.replace(self.environment_path)
        self._archive_if_old()

    def finish(self) -> None:
        self.note(finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        self.close()

    def withdraw(self) -> None:
        """Takes the run back where it holds no row, and the folders made for it where they hold nothing else."""
        if any(self.done.values()):
            return
        del self.runs[self.run_id]
        if self.runs:
            self._write()
            return
        self.environment_path.unlink()
        with contextlib.suppress(OSError):  # it holds something
            for folder in self._made:
                folder.rmdir()

    def close(self) -> None:
        """Writes the archive, where there is to be one, as the folder is now."""
        if self.archive is not None:
            archives.write(self.folder, self.archive)
            self._archived = self._clock()

    def _archive_if_old(self) -> None:
        if self._clock() - self._archived >= ARCHIVE_EVERY_S:
            self.close()

    def _unfinished(self, settings: dict[str, Any], environment: dict[str, Any]) -> str | None:
        """The newest run that is not finished and that this one continues: same settings, same code, and a machine that
        gives the same figures. Where that machine is another in any fact, the run gets a note of it."""
        settings, environment = json.loads(json.dumps([settings, environment]))
        for run_id, run in reversed(self.runs.items()):
            same = run["settings"] == settings and _deciding(run["environment"]) == _deciding(environment)
            if same and "finished" not in run:
                known = [run["environment"], *run.get("continued_on", [])]
                self.run_id = run_id
                if environment not in known:
                    self.note(continued_on=[*known[1:], environment])
                return run_id
        return None

    def _started(self, settings: dict[str, Any], environment: dict[str, Any]) -> str:
        self.run_id = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        while self.run_id in self.runs:
            self.run_id += "b"
        self.runs[self.run_id] = {"settings": settings, "environment": environment}
        self.note()
        return self.run_id


def _deciding(environment: dict[str, Any]) -> dict[str, Any]:
    """The facts by which rows are of one run. The commit is only a name for `sources`. On a GPU the CPU beside it, how
    much memory is free for use and what was tuned there before are no matter; each row says which config it took."""
    if environment.get("device") != "cuda":
        return {name: fact for name, fact in environment.items() if name != "commit"}
    gpu, versions = environment.get("gpu", {}), environment.get("versions", {})
    return {
        "sources": environment.get("sources"),
        "gpu": {name: fact for name, fact in gpu.items() if name != "memory_bytes"},
        "versions": [versions.get(package) for package in ("torch", "triton")],
    }


def load_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """Runs of a results folder by run_id, oldest first; none if it has no environment.json yet.

    Raises UserError if environment.json is not of this schema.
    """
    path = folder / "environment.json"
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        schema: int = content["schema"]
        runs: dict[str, dict[str, Any]] = content["runs"]
        runs.items()
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not a record of this lab: move it away or choose another --results") from None
    if schema != SCHEMA:
        raise UserError(f"{path} has schema {schema}, this version writes {SCHEMA}: choose another --results")
    return runs


def rows_of(folder: Path, run_id: str, table: str) -> list[dict[str, str]]:
    """The run's rows of one table, as they stand on disk."""
    lines = csv.DictReader(io.StringIO(whole_lines(folder / f"{table}.csv"), newline=""))
    return [row for row in lines if row["run_id"] == run_id]


def check_table(path: Path, columns: tuple[str, ...]) -> None:
    """Raises UserError if the file exists with other columns. Half a header, of a run killed there, is no other one."""
    if not path.exists():
        return
    with open(path, newline="") as file:
        line = file.readline()
    header = tuple(next(csv.reader([line]), ()))
    if header != columns and (line.endswith("\n") or not ",".join(columns).startswith(line)):
        raise UserError(
            f"{path} was written with other columns ({len(header)}, not these {len(columns)}): choose another --results"
        )


def whole_lines(path: Path) -> str:
    """A table's text without the half line that a killed run may have left at its end; empty where there is none."""
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1].decode()


def _drop_half_a_line(path: Path) -> None:
    """So that nothing is appended to it. A table without a whole line is none."""
    whole = whole_lines(path)
    if path.exists() and len(whole.encode()) < path.stat().st_size:
        os.truncate(path, len(whole.encode()))
    if path.exists() and not whole:
        path.unlink()
