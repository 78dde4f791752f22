"""What may be published, and that records, plots, report and README's block change together or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commands import ROOT, failure

from castpoint.harness.report import publish as module
from castpoint.harness.report.page import newest_run, write_report
from castpoint.harness.report.publish import add, machine, publish, publishable, unfit
from castpoint.harness.runs.errors import UserError
from castpoint.harness.runs.records import load_runs
from castpoint.variants.catalogue import PLANS

PUBLISHED = ROOT / "results" / "cpu"
SETTINGS = {"model": "qwen3-0.6b", "checkpoint": None, "layers": list(range(28)), "plans": list(PLANS)}
WHOLE = {"narrowed_by": {}, "command": "bench", "settings": SETTINGS, "finished": "now"}
WHOLE |= {"environment": {"commit": "c0ffee123456", "device": "cpu"}}


def run(**changes: object) -> dict[str, object]:
    return json.loads(json.dumps(WHOLE)) | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"environment": {"commit": "c0ffee123456+", "device": "cpu"}}, "at no commit (c0ffee123456+)"),
        ({"environment": {"commit": "unknown", "device": "cpu"}}, "at no commit (unknown)"),
        ({"narrowed_by": {"short": "True"}}, "a part of the whole (--short True)"),
        ({"narrowed_by": {"layers": "0-3", "plans": "hf"}}, "--layers 0-3 --plans hf"),
        ({"narrowed_by": {"model": "qwen3-8b"}}, "--model qwen3-8b"),
        ({"narrowed_by": {"checkpoint": "m.gguf"}}, "--checkpoint m.gguf"),
        ({"settings": SETTINGS | {"layers": [0, 1, 2]}}, "it measured 3 layers and 15 plans of qwen3-0.6b"),
        ({"settings": SETTINGS | {"plans": ["hf"]}}, "it measured 28 layers and 1 plans of qwen3-0.6b"),
        ({"settings": SETTINGS | {"checkpoint": "m.gguf"}}, "of m.gguf"),
        ({"settings": SETTINGS | {"model": "qwen3-8b"}}, "of qwen3-8b"),
        ({"command": "model", "settings": {"model": "toy"}}, "toy is no model that the lab knows"),
    ],
)
def test_what_is_no_whole_run_of_committed_code_is_refused(changes: dict, words: str) -> None:
    assert words in unfit(run(**changes)) and unfit(run()) == ""
    assert unfit(run(command="model", settings={"model": "gemma-3-270m"})) == ""


def test_a_run_that_the_command_line_did_not_make_is_refused() -> None:
    made = run()
    del made["narrowed_by"]
    assert "was not made by the command line" in unfit(made)


def test_the_published_report_is_what_its_records_say(tmp_path: Path) -> None:
    shutil.copytree(PUBLISHED, tmp_path / "cpu")
    written = write_report(tmp_path / "cpu", newest_run(tmp_path / "cpu"))
    assert written.read_text() == (PUBLISHED / "report.md").read_text(), "make publish writes it anew"
    for page in (PUBLISHED / "systems").glob("*.md"):
        assert (tmp_path / "cpu" / "systems" / page.name).read_text() == page.read_text(), "make publish writes it anew"


def folder_of(where: Path, runs: dict[str, dict]) -> Path:
    """A run folder whose tables have the published ones' columns, and rows of the first published run by these ids."""
    where.mkdir(parents=True)
    (where / "environment.json").write_text(json.dumps({"schema": 1, "runs": runs}))
    for path in PUBLISHED.glob("*.csv"):
        header, *lines = path.read_text().splitlines()
        rows = [",".join([run_id, *line.split(",")[1:]]) for run_id in runs for line in lines[:2]]
        (where / path.name).write_text("\n".join([header, *rows]) + "\n")
    return where


def test_the_newest_run_of_each_command_counts(tmp_path: Path) -> None:
    short = run(narrowed_by={"short": "True"})
    runs = {"1": short, "2": run(), "3": run(command="cases", settings={}), "4": {**short, "command": "cases"}}
    del runs["4"]["finished"]
    assert list(publishable(folder_of(tmp_path / "a", runs))) == ["2", "3"]
    with pytest.raises(UserError, match=r"run 5 \(bench\) is not published: it is a part of the whole"):
        publishable(folder_of(tmp_path / "b", runs | {"5": short}))
    with pytest.raises(UserError, match="is not published"):
        publishable(folder_of(tmp_path / "c", runs | {"6": {**short, "command": "bench --only speed"}}))
    with pytest.raises(UserError, match="holds no finished run"):
        publishable(folder_of(tmp_path / "d", {}))


def test_runs_of_two_machines_are_not_published_together() -> None:
    gpu = run(environment={"commit": "c0ffee", "device": "cuda", "gpu": {"name": "NVIDIA H200"}})
    assert machine({"1": run()}) == "cpu" and machine({"1": gpu}) == "h200"
    with pytest.raises(UserError, match="cpu, h200 lie in one folder"):
        machine({"1": run(), "2": gpu})


def test_rows_are_added_once_and_only_those(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "runs" / "cpu", {"1": run(), "2": run(command="cases", settings={})})
    target = tmp_path / "cpu"
    shutil.copytree(PUBLISHED, target, ignore=shutil.ignore_patterns("plots"))
    before = {path.name: path.read_text() for path in target.glob("*.csv")}
    runs = {"2": load_runs(source)["2"]}
    assert list(add(source, runs, target)) == ["2"]
    for name, text in before.items():
        now = (target / name).read_text()
        assert now.startswith(text)
        assert all(line.startswith("2,") for line in now[len(text) :].splitlines()), name
    assert load_runs(target) == load_runs(PUBLISHED) | runs
    after = {path.name: path.read_text() for path in target.glob("*.csv")}
    assert add(source, runs, target) == {}
    assert after == {path.name: path.read_text() for path in target.glob("*.csv")}


def test_a_table_of_an_unfinished_run_alone_is_no_file(tmp_path: Path) -> None:
    source, folder = tmp_path / "run", tmp_path / "published"
    shutil.copytree(PUBLISHED, source, ignore=shutil.ignore_patterns("plots", "systems"))
    runs = load_runs(source)
    newest = max(i for i, each in runs.items() if each["command"] == "cases")
    add(source, {newest: runs[newest]}, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["cases.csv", "environment.json"]


def test_other_columns_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "runs", {"1": run()})
    target = tmp_path / "cpu"
    shutil.copytree(PUBLISHED, target, ignore=shutil.ignore_patterns("plots"))
    (source / "ulps.csv").write_text("run_id,other\n1,2\n")
    before = {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()}
    with pytest.raises(UserError, match="ulps.csv has other columns"):
        add(source, load_runs(source), target)
    assert before == {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what publish writes, the current folder."""
    shutil.copytree(ROOT / "results", tmp_path / "results")
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_refused_run_changes_nothing(checkout: Path, capsys, monkeypatch) -> None:
    folder_of(checkout / "runs" / "cpu", {"1": run(narrowed_by={"short": "True"})})
    before = {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}
    said = failure(capsys, monkeypatch, "publish", "runs/cpu")
    assert "run 1 (bench) is not published: it is a part of the whole (--short True)" in said
    assert before == {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}


def test_records_report_and_readme_change_together(checkout: Path, monkeypatch) -> None:
    """Without a folder the same records give the same report and README, to the letter."""
    monkeypatch.setattr(module, "draw", lambda folder, run_id: [])
    publish(None)
    report, readme = (checkout / "results/cpu/report.md").read_text(), (checkout / "README.md").read_text()
    assert publish(None)[-1] == "wrote the block of README.md"
    assert (checkout / "results/cpu/report.md").read_text() == report
    assert (checkout / "README.md").read_text() == readme
    source = folder_of(checkout / "runs" / "cpu", {"99990101T000000": run(command="cases", settings={})})
    blocks: list[tuple[Path, Path]] = []
    monkeypatch.setattr(module, "update_readme", lambda readme, folder: blocks.append((readme, folder)))
    said = publish(source.relative_to(checkout))
    assert said[0] == "results/cpu: run 99990101T000000, cases"
    assert "99990101T000000" in load_runs(checkout / "results/cpu")
    changed = (checkout / "results/cpu/report.md").read_text()
    assert changed != report, "the report still shows the older cases"
    assert blocks == [(Path("README.md"), Path("results/cpu"))]
