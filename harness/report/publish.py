"""What is published: records under results/, with their plots, their report and the README's block, all of one state.

Only `make publish` writes there. It takes the newest finished run of each command from a run folder, and refuses
what is a part of a whole: a short run, some plans or layers, another model, a checkpoint, code that is not committed.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from castpoint.harness.problems.geometry import GEOMETRIES
from castpoint.harness.report.page import newest_run, write_report
from castpoint.harness.report.plots import draw
from castpoint.harness.report.readme import BLOCK, update_readme
from castpoint.harness.runs.environment import short_name
from castpoint.harness.runs.errors import UserError, writing
from castpoint.harness.runs.records import Settings, load_runs
from castpoint.variants.catalogue import PLANS

# model, checkpoint, layers and plans of a bench that leaves nothing out
WHOLE = (Settings.model, None, list(range(GEOMETRIES[Settings.model].num_layers)), list(PLANS))
README, PUBLISHED = Path("README.md"), Path("results")
OF_README = PUBLISHED / "cpu"  # whose newest run the README's block shows


def write(folder: Path) -> str:
    """Plots and report.md of a folder's newest finished run of `bench` or `gpu`; says where they are."""
    run_id = newest_run(folder)
    with writing(folder):
        draw(folder, run_id)
        return f"wrote {write_report(folder, run_id)} and {folder / 'plots'}"


def publish(source: Path | None) -> list[str]:
    """Adds the runs of a run folder to results/<machine>, and writes plots, report and README anew; without a folder
    only these, from the records that are published. Returns what was done, a line each.

    Raises UserError, before anything is written, for a run that may not be published, and outside of a checkout.
    """
    if not README.exists() or not BLOCK.search(README.read_text()):
        raise UserError("publish runs in the root of a checkout, whose README.md has the generated block")
    said, folder = [], OF_README
    if source is not None:
        runs = publishable(source)
        folder = PUBLISHED / machine(runs)
        said += [f"{folder}: run {run_id}, {run['command']}" for run_id, run in add(source, runs, folder).items()]
    said += [write(each) for each in dict.fromkeys((folder, OF_README))]
    with writing(README):
        update_readme(README, OF_README)
    return [*said, f"wrote the block of {README}"]


def publishable(source: Path) -> dict[str, dict[str, Any]]:
    """run_id -> the newest finished run of each command (and model). Raises UserError where one is not whole."""
    newest: dict[tuple[str, str], str] = {}
    runs = load_runs(source)
    for run_id, run in runs.items():
        if "finished" in run:
            command = run["command"].split(" --only")[0]
            newest[command, run["settings"]["model"] if command == "model" else ""] = run_id
    if not newest:
        raise UserError(f"{source} holds no finished run: run `castpoint bench` first")
    for run_id in newest.values():
        if reason := unfit(runs[run_id]):
            raise UserError(f"{source}: run {run_id} ({runs[run_id]['command']}) is not published: {reason}")
    return {run_id: runs[run_id] for run_id in sorted(newest.values())}


def unfit(run: dict[str, Any]) -> str:
    """Why that run may not be published; empty if it may."""
    commit = run["environment"].get("commit", "unknown")
    if commit == "unknown" or commit.endswith("+"):
        return f"its code is at no commit ({commit}): commit, and run it again"
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
    """Appends rows and entries of those runs that the published folder does not have yet; returns these."""
    held = load_runs(folder)
    new = {run_id: run for run_id, run in runs.items() if run_id not in held}
    if not new:
        return new
    drafts = {path.name: merged(path, folder / path.name, set(new)) for path in sorted(source.glob("*.csv"))}
    whole = json.loads((source / "environment.json").read_text()) | {"runs": dict(sorted((held | new).items()))}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in drafts.items():
            (folder / name).write_text(text)
        (folder / "environment.json").write_text(json.dumps(whole, indent=1) + "\n")
    return new


def merged(source: Path, published: Path, run_ids: set[str]) -> str:
    """The published table with the rows of those runs behind it. Raises UserError where it has other columns."""
    lines = source.read_text().splitlines(keepends=True)
    before = published.read_text() if published.exists() else lines[0]
    if before.splitlines()[0] != lines[0].rstrip("\n"):
        raise UserError(f"{published} has other columns than {source}: bring it to this version's first")
    return before + "".join(line for line in lines[1:] if next(csv.reader([line]))[0] in run_ids)
