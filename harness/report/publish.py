"""What is published: records under results/, with their plots, their report and the README's block, all of one state.

Only `make publish` writes there. It takes the newest finished run of each command from a run folder or an archive of
one, and the newest GPU run also where it was cut off. It refuses what is a part of a whole by choice: a short run, some
plans or layers, another model, a checkpoint; and code that is not committed.
"""

from __future__ import annotations

import csv
import itertools
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from castpoint.harness.problems.geometry import GEOMETRIES
from castpoint.harness.report.page import newest_run, write_report
from castpoint.harness.report.plots import draw
from castpoint.harness.report.readme import BLOCK, update_readme
from castpoint.harness.runs.archive import unpack
from castpoint.harness.runs.environment import commit, short_name, sources
from castpoint.harness.runs.errors import UserError, writing
from castpoint.harness.runs.frames import newest_gpu_run
from castpoint.harness.runs.records import Settings, load_runs, whole_lines
from castpoint.harness.runs.schema import KEYS, TABLES
from castpoint.harness.runs.words import COMPARED
from castpoint.variants.catalogue import PLANS

# model, checkpoint, layers and plans of a bench that leaves nothing out
WHOLE = (Settings.model, None, list(range(GEOMETRIES[Settings.model].num_layers)), list(PLANS))
README, PUBLISHED = Path("README.md"), Path("results")
UNKNOWN = "unknown"  # the commit of a copy of the tree
OF_README = PUBLISHED / "cpu"  # whose newest run the README's block shows


def write(folder: Path) -> str:
    """Plots and report.md of a folder's newest finished bench, or of its GPU run where it has none; says where they
    are."""
    run_id = newest_run(folder)
    with writing(folder):
        draw(folder, run_id)
        return f"wrote {write_report(folder, run_id)} and {folder / 'plots'}"


@contextmanager
def unpacked(source: Path | None) -> Iterator[Path | None]:
    """That folder; of an archive the folder in it, while the context lasts."""
    if source is None or not source.is_file():
        yield source
        return
    with tempfile.TemporaryDirectory() as folder:
        unpack(source, Path(folder, source.name))
        yield Path(folder, source.name)


def publish(source: Path | None) -> list[str]:
    """Adds the runs of a run folder to results/<machine>, and writes plots, report and README anew; without a folder
    only these, from the records that are published. Returns what was done, a line each.

    Raises UserError, before anything is written, for a run that may not be published, and outside of a checkout.
    """
    check_checkout()
    said, folder = [], OF_README
    if source is not None:
        runs = publishable(source)
        folder = PUBLISHED / machine(runs)
        for run_id, run in add(source, runs, folder).items():
            said.append(f"{folder}: run {run_id}, {run['command']}{'' if 'finished' in run else ', cut off'}")
    said += [write(each) for each in dict.fromkeys((folder, OF_README))]
    with writing(README):
        update_readme(README, OF_README)
    return [*said, f"wrote the block of {README}"]


def check_checkout() -> None:
    """Raises UserError outside of a checkout."""
    if not README.exists() or not BLOCK.search(README.read_text()):
        raise UserError("publish runs in the root of a checkout, whose README.md has the generated block")


def publishable(source: Path) -> dict[str, dict[str, Any]]:
    """run_id -> the newest finished run of each command (and model), and the newest GPU run with rows, finished or not.
    Raises UserError where one may not be published."""
    newest: dict[tuple[str, str], str] = {}
    runs = {run_id: with_commit(run) for run_id, run in load_runs(source).items()}
    for run_id, run in runs.items():
        if "finished" in run:
            command = run["command"].split(" --only")[0]
            newest[command, run["settings"]["model"] if command == "model" else ""] = run_id
    if on_a_gpu := newest_gpu_run(source):
        newest["gpu", ""] = on_a_gpu
    if not newest:
        raise UserError(f"{source} holds no finished run: run `castpoint bench` first")
    for run_id in newest.values():
        if reason := unfit(runs[run_id]):
            raise UserError(f"{source}: run {run_id} ({runs[run_id].get('command')}) is not published: {reason}")
    return {run_id: runs[run_id] for run_id in sorted(newest.values())}


def with_commit(run: dict[str, Any]) -> dict[str, Any]:
    """The run; where a copy of the tree did not know its commit, with that of this checkout, if it is clean and has the
    same sources."""
    e, here = run["environment"], commit()
    if e.get("commit") != UNKNOWN or here == UNKNOWN or here.endswith("+") or e.get("sources") != sources():
        return run
    return run | {"environment": e | {"commit": here}}


def unfit(run: dict[str, Any]) -> str:
    """Why that run may not be published; empty if it may."""
    e = run["environment"]
    named = e.get("commit", UNKNOWN)
    if named == UNKNOWN and "sources" in e:
        return f"its code is at no commit ({named}): publish it from a clean checkout of its sources, {e['sources']}"
    if named == UNKNOWN or named.endswith("+"):
        return f"its code is at no commit ({named}): commit, and run it again"
    if "narrowed_by" not in run:
        return "it was not made by the command line"
    if run["narrowed_by"]:
        options = " ".join(f"--{name} {value}" for name, value in run["narrowed_by"].items())
        return f"it is a part of the whole ({options}): run it without"
    s = run["settings"]
    if "layers" in s and (s["model"], s["checkpoint"], s["layers"], s["plans"]) != WHOLE:
        return f"it measured {len(s['layers'])} layers and {len(s['plans'])} plans of {s['checkpoint'] or s['model']}"
    if run["command"] == "model" and run["settings"]["model"] not in GEOMETRIES:
        return f"{run['settings']['model']} is no model that the lab knows by name"
    return ""


def machine(runs: dict[str, dict[str, Any]]) -> str:
    """The folder's name of the one machine that made them. Raises UserError if they are of several."""
    kinds = [run["environment"] for run in runs.values()]
    names = {"cpu" if kind["device"] == "cpu" else short_name(kind["gpu"]["name"]) for kind in kinds}
    if len(names) > 1:
        raise UserError(f"runs of {', '.join(sorted(names))} lie in one folder: publish those of one machine")
    return names.pop()


def add(source: Path, runs: dict[str, dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    """Appends rows and entries of those runs that the published folder does not have yet, or has cut off; returns
    these."""
    held = load_runs(folder)
    new = {run_id: run for run_id, run in runs.items() if "finished" not in held.get(run_id, {})}
    if not new:
        return new
    tables = [path for path in sorted(source.glob("*.csv")) if path.stem in TABLES]  # and no configs beside them
    drafts = {path.name: merged(path, folder / path.name, set(new)) for path in tables}
    drafts = {name: text for name, text in drafts.items() if text.count("\n") > 1 or (folder / name).exists()}
    whole = json.loads((source / "environment.json").read_text()) | {"runs": dict(sorted((held | new).items()))}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in drafts.items():
            (folder / name).write_text(text)
        (folder / "environment.json").write_text(json.dumps(whole, indent=1) + "\n")
    return new


def merged(source: Path, published: Path, run_ids: set[str]) -> str:
    """The published table with the rows of those runs behind it, in place of what it has of them; outputs that were
    compared at an earlier publishing stay. Raises UserError where it has other columns, or more rows of them."""

    def columns(line: str) -> dict[str, str]:
        return dict(zip(next(csv.reader([head])), next(csv.reader([line])), strict=True))

    def of_these(line: str) -> bool:
        return columns(line)["run_id"] in run_ids

    def key(line: str) -> tuple[str, ...]:
        return tuple(columns(line)[name] for name in ("run_id", *KEYS[source.stem]))

    header, *lines = whole_lines(source).splitlines(keepends=True) or [""]
    head, *before = (whole_lines(published) or header).splitlines(keepends=True) or [""]
    if header and head != header:
        raise UserError(f"{published} has other columns than {source}: bring it to this version's first")
    rows = list(filter(of_these, lines))
    there = {key(line) for line in rows}
    lacking = [line for line in filter(of_these, before) if key(line) not in there]
    if any(columns(line).get("check") not in COMPARED for line in lacking):
        raise UserError(f"{published} holds more rows of a run than {source}, an older copy: publish the newest")
    return "".join([head, *itertools.filterfalse(of_these, before), *rows, *lacking])
