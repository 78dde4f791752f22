"""Records: tidy CSV files, one row a measurement, appended and flushed as it is made.

environment.json beside them says of every run_id with which settings, on which machine and by which versions it
was measured. A run that was stopped is continued: rows it has are not measured again.
"""

from __future__ import annotations

import csv
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from castpoint.harness.runs.errors import UserError, writing
from castpoint.harness.runs.schema import KEYS, TABLES, Row, text

SCHEMA = 1


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
    """The results folder of one run. Raises UserError where the folder cannot be used as it is."""

    def __init__(self, folder: Path, settings: dict[str, Any], environment: dict[str, Any]) -> None:
        self.folder = folder
        self.environment_path = folder / "environment.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".writable").touch()
            (folder / ".writable").unlink()
        except OSError as error:  # of any kind: whatever the system says of that path, it is the wrong one
            refused = f"results folder {folder} cannot be written ({error.strerror})"
            raise UserError(f"{refused}: choose another with --results") from error
        self.runs = load_runs(folder)
        for table, columns in TABLES.items():
            check_table(folder / f"{table}.csv", columns)
        self.run_id = self._unfinished(settings, environment) or self._started(settings, environment)
        self.done: dict[str, set[tuple[str, ...]]] = {table: self._read_keys(table) for table in TABLES}

    def has(self, row: type[Row], **key: object) -> bool:
        """Whether this run has the row of that key already."""
        return row.key_of(**key) in self.done[row.TABLE]

    def add(self, row: Row) -> None:
        """Appends one row and flushes it, unless this run has it already. What is None stays empty."""
        values = {**vars(row), "run_id": self.run_id, "reason": " ".join(row.reason.split())}
        if self.has(type(row), **values):
            return
        with writing(self.folder), open(self.folder / f"{row.TABLE}.csv", "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow([text(values[column]) for column in row.columns()])
        self.done[row.TABLE].add(row.key_of(**values))

    def rows(self, table: str) -> list[dict[str, str]]:
        """This run's rows so far."""
        with open(self.folder / f"{table}.csv", newline="") as file:
            return [row for row in csv.DictReader(file) if row["run_id"] == self.run_id]

    def note(self, **facts: object) -> None:
        """Adds facts about this run to environment.json."""
        self.runs[self.run_id].update(facts)
        draft = self.environment_path.with_suffix(".tmp")
        with writing(self.folder):
            draft.write_text(json.dumps({"schema": SCHEMA, "runs": self.runs}, indent=1) + "\n")
            draft.replace(self.environment_path)

    def finish(self) -> None:
        self.note(finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))

    def _unfinished(self, settings: dict[str, Any], environment: dict[str, Any]) -> str | None:
        settings, environment = json.loads(json.dumps([settings, environment]))
        for run_id, run in reversed(self.runs.items()):
            same = run["settings"] == settings and run["environment"] == environment
            if same and "finished" not in run and not environment.get("commit", "").endswith("+"):
                return run_id  # a `+` is a checkout with changes, and two such may differ
        return None

    def _started(self, settings: dict[str, Any], environment: dict[str, Any]) -> str:
        self.run_id = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        while self.run_id in self.runs:
            self.run_id += "b"
        self.runs[self.run_id] = {"settings": settings, "environment": environment}
        self.note()
        return self.run_id

    def _read_keys(self, table: str) -> set[tuple[str, ...]]:
        path = self.folder / f"{table}.csv"
        if not path.exists():
            path.write_text(",".join(TABLES[table]) + "\n")
        content = path.read_bytes()
        if not content.endswith(b"\n"):  # of a killed run's last row half is there, and nothing is appended to it
            path.write_bytes(content[: content.rfind(b"\n") + 1])
        return {tuple(row[name] for name in KEYS[table]) for row in self.rows(table)}


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


def check_table(path: Path, columns: tuple[str, ...]) -> None:
    """Raises UserError if the file exists with other columns."""
    if not path.exists():
        return
    with open(path, newline="") as file:
        header = tuple(next(csv.reader(file), ()))
    if header != columns:
        raise UserError(
            f"{path} was written with other columns ({len(header)}, not these {len(columns)}): choose another --results"
        )
