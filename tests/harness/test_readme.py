"""The README in step with the records, and the committed records whole."""

import json
import re
import shutil
from pathlib import Path

import pytest
from commands import ROOT

from castpoint.harness.report.page import BLOCK, newest_run, readme_block, update_readme
from castpoint.harness.runs.records import TABLES, load_runs


def test_the_readme_shows_the_records() -> None:
    """The block of the README is what the run it names gives, letter for letter."""
    text = (ROOT / "README.md").read_text()
    match = BLOCK.search(text)
    assert match, "README.md has no generated block"
    folder, run_id = match.groups()
    assert match.group(0) == readme_block(ROOT / folder, run_id).replace(str(ROOT) + "/", "")
    assert "finished" in load_runs(ROOT / folder)[run_id]


def test_a_newer_bench_does_not_change_what_the_readme_says_of_an_older_one(tmp_path: Path) -> None:
    folder, run_id = BLOCK.search((ROOT / "README.md").read_text()).groups()
    copy = tmp_path / "cpu"
    shutil.copytree(ROOT / folder, copy, ignore=shutil.ignore_patterns("plots"))
    before = readme_block(copy, run_id)
    runs = json.loads((copy / "environment.json").read_text())
    runs["runs"]["29990101T000000"] = runs["runs"][run_id]
    (copy / "environment.json").write_text(json.dumps(runs))
    for table in ("errors", "amplification", "speed"):
        rows = [line.split(",") for line in (copy / f"{table}.csv").read_text().splitlines()[1:]]
        newer = [",".join(["29990101T000000", *(cell.replace("1", "3") for cell in row[1:])]) for row in rows]
        with open(copy / f"{table}.csv", "a") as file:
            file.write("\n".join(newer) + "\n")
    assert newest_run(copy) == "29990101T000000" and readme_block(copy, run_id) == before


def test_a_typed_number_in_the_readme_is_noticed(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    folder, run_id = BLOCK.search(text).groups()
    changed = re.sub(r"(\| hf \| 0\.00)(\d)", lambda m: m.group(1) + str((int(m.group(2)) + 1) % 10), text)
    assert changed != text and BLOCK.search(changed).group(0) != readme_block(Path(folder), run_id)
    (tmp_path / "README.md").write_text(changed)
    update_readme(tmp_path / "README.md", Path(folder))
    assert "| hf |" in (tmp_path / "README.md").read_text()


def test_a_readme_without_markers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# nothing\n")
    with pytest.raises(ValueError, match="no generated block"):
        update_readme(tmp_path / "README.md", ROOT / "results" / "cpu")


def test_committed_records_are_whole() -> None:
    for folder in (ROOT / "results").iterdir():
        runs = load_runs(folder)
        assert runs and all({"settings", "environment"} <= set(run) for run in runs.values())
        assert json.loads((folder / "environment.json").read_text())["schema"] == 1
        for table, columns in TABLES.items():
            lines = (folder / f"{table}.csv").read_text().splitlines()
            assert lines[0] == ",".join(columns) and {line.split(",")[0] for line in lines[1:]} <= set(runs)
