"""Publishing a GPU run, also one that was cut off and came as an archive; and its configs for the dispatch table.

The runs are invented, and so is what makes a table of their rows: it has the one config that the rows name.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import types
from pathlib import Path

import pytest
from commands import ROOT, failure
from invented_gpu import AT, CHAIN, SMALL, add, invent_cut_off, invent_tuning, opened

import castpoint.harness.__main__ as cli
from castpoint.harness import steps
from castpoint.harness.problems.geometry import geometry_named
from castpoint.harness.report import publish as module
from castpoint.harness.report.plots import draw
from castpoint.harness.runs.archive import write
from castpoint.harness.runs.errors import UserError
from castpoint.harness.runs.frames import load_table
from castpoint.harness.runs.records import Records, load_runs
from castpoint.harness.runs.schema import GpuCheckRow
from castpoint.harness.runs.words import Check
from castpoint.kernels import dispatch
from castpoint.kernels.config import Config

G = geometry_named(SMALL)
SHAPE = (G.hidden_size, G.num_q_heads, G.num_kv_heads, G.head_dim)
FAST = Config("split-k", "none", 16, 128, 8, 4, 8)
SEPARATE = Config("separate")
SOURCES = "5e5e5e5e5e5e"  # of the invented runs


def table_of(rows: list[dict[str, str]], gpu_name: str) -> dispatch.Table:
    """Stands in for gpu.tune's: the row with the largest speed-up, at its point."""
    best = max(rows, key=lambda row: float(row["speedup_separate"]))
    return {(gpu_name, SHAPE, best["scale"]): {int(best["tokens"]): Config.of_row(best)}}


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The dispatch table's file: rows of another GPU, and of this one at more tokens."""
    monkeypatch.setitem(sys.modules, "castpoint.harness.gpu.tune", types.SimpleNamespace(table_of=table_of))
    path = tmp_path / "dispatch.csv"
    monkeypatch.setattr(dispatch, "TABLE", path)
    before = {("other", SHAPE, "prologue"): {1: SEPARATE}, ("invented H200", SHAPE, "prologue"): {16: SEPARATE}}
    dispatch.write_table(before, path)
    return path


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What publish writes, the current folder; a clean checkout of the invented runs' sources."""
    shutil.copytree(ROOT / "results", tmp_path / "checkout" / "results", ignore=shutil.ignore_patterns("plots", "h200"))
    shutil.copy(ROOT / "README.md", tmp_path / "checkout")
    monkeypatch.chdir(tmp_path / "checkout")
    monkeypatch.setattr(module, "commit", lambda: "abcdef123456")
    monkeypatch.setattr(module, "sources", lambda: SOURCES)
    monkeypatch.setattr(module, "draw", lambda folder, run_id: folder.name == "cpu" or draw(folder, run_id))
    return tmp_path / "checkout"


def unknown(records: Records) -> Records:
    """As a copy of the tree without git writes it."""
    records.note(environment=records.runs[records.run_id]["environment"] | {"commit": "unknown"})
    return records


# ---------------------------------------------------------------- configs for the dispatch table


def test_configs_of_the_newest_run_join_those_that_are_there(tmp_path: Path, table: Path) -> None:
    invent_tuning(opened(tmp_path / "r"))
    opened(tmp_path / "r").finish()  # newer, and without such rows
    said = steps.write_dispatch(tmp_path / "r")
    assert said == f"wrote 1 configs of run {next(iter(load_runs(tmp_path / 'r')))} to {table}"
    assert dispatch.read_table(table) == {
        ("other", SHAPE, "prologue"): {1: SEPARATE},
        ("invented H200", SHAPE, "prologue"): {1: FAST, 16: SEPARATE},
    }


def test_the_command_says_what_it_did_with_records(
    tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Configs, and the outputs' comparison: for whoever has a GPU of their own and publishes nothing."""
    records = invent_tuning(opened(tmp_path / "r"))
    monkeypatch.setattr(sys, "argv", ["castpoint", "gpu", "--from-records", "--results", str(tmp_path / "r")])
    with pytest.raises(SystemExit) as status:
        cli.main()
    assert not status.value.code
    assert capsys.readouterr().out.splitlines() == [
        f"wrote 1 configs of run {records.run_id} to {table}",
        f"outputs of run {records.run_id} not compared: the run has not come to its step `outputs`",
    ]


def test_without_rows_of_tuning_the_table_stays(tmp_path: Path, table: Path) -> None:
    before = table.read_bytes()
    for folder in ("none", "r"):
        with pytest.raises(UserError, match="holds no rows of tuning"):
            steps.write_dispatch(tmp_path / folder)
        invent_cut_off(tmp_path / "r", [AT["1"]])
    table.write_text("gpu,tokens\n")
    invent_tuning(opened(tmp_path / "r"))
    with pytest.raises(UserError, match="dispatch.csv: ValueError: .* must have the columns"):
        steps.write_dispatch(tmp_path / "r")
    assert table.read_bytes() != before and table.read_text() == "gpu,tokens\n"


# ---------------------------------------------------------------- publishing


def test_an_archive_of_a_run_that_was_cut_off_is_published(
    checkout: Path, tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Records, report, plot, README and configs; the commit is this checkout's, whose sources are the run's."""
    records = unknown(invent_tuning(invent_cut_off(tmp_path / "far")))
    write(tmp_path / "far", tmp_path / "run.tar.gz")
    monkeypatch.setattr(sys, "argv", ["castpoint", "publish", str(tmp_path / "run.tar.gz")])
    with pytest.raises(SystemExit) as status:
        cli.main()
    assert not status.value.code
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"results/h200: run {records.run_id}, gpu, cut off"
    assert said[-1] == f"wrote 1 configs of run {records.run_id} to {table}"
    (run,) = load_runs(checkout / "results/h200").values()
    assert run["environment"]["commit"] == "abcdef123456" and "finished" not in run
    text = (checkout / "results/h200/report.md").read_text()
    assert "**cut off: 5 of 152 points**" in text and "(plots/gpu_speedup.png)" in text
    assert "(results/h200/report.md#on-a-gpu) (cut off after 5 of 152 points)." in (checkout / "README.md").read_text()
    assert dispatch.read_table(table)["invented H200", SHAPE, "prologue"][1] == FAST
    assert load_runs(tmp_path / "far")[records.run_id]["environment"]["commit"] == "unknown", "the source stays"


def test_a_run_that_went_on_takes_the_place_of_what_was_published(checkout: Path, tmp_path: Path) -> None:
    records = invent_cut_off(tmp_path / "far", [AT["1"]])
    shutil.copytree(tmp_path / "far", tmp_path / "older")
    steps.publish(tmp_path / "far")
    add(records, AT["16"], CHAIN, 6.0, 6.0)
    steps.publish(tmp_path / "far")
    published = checkout / "results/h200"
    assert len(load_table(published, records.run_id, "gpu_speed")) == 6
    with pytest.raises(UserError, match="holds more rows of a run than .*older"):
        steps.publish(tmp_path / "older")
    records.finish()
    assert steps.publish(tmp_path / "far")[0] == f"results/h200: run {records.run_id}, gpu"
    before = {path: path.read_bytes() for path in published.glob("*.csv")}
    assert not any(line.startswith("results/h200: run ") for line in steps.publish(tmp_path / "far"))
    assert before == {path: path.read_bytes() for path in published.glob("*.csv")}
    assert (published / "gpu_speed.csv").read_text() == (tmp_path / "far" / "gpu_speed.csv").read_text()


def test_outputs_that_were_compared_stay_when_the_run_went_on(checkout: Path, tmp_path: Path) -> None:
    """Newer sources cannot compare them again, and the run's own machine never had these rows."""
    records = invent_cut_off(tmp_path / "far", [AT["1"]])
    steps.publish(tmp_path / "far")
    home = Records.of_run(checkout / "results/h200", records.run_id)
    compared = GpuCheckRow(plan="hf", config="fused", tokens=8, check=Check.PTX, share_equal=1.0)
    home.add(compared)
    add(records, AT["16"], CHAIN, 6.0, 6.0)
    steps.publish(tmp_path / "far")
    table = load_table(checkout / "results/h200", records.run_id, "gpu_checks")
    assert list(table[table["check"] == Check.PTX]["share_equal"]) == [1.0]
    records.add(dataclasses.replace(compared, share_equal=0.5))
    steps.publish(tmp_path / "far")
    table = load_table(checkout / "results/h200", records.run_id, "gpu_checks")
    assert list(table[table["check"] == Check.PTX]["share_equal"]) == [0.5], "those of the newer copy take their place"
    home.add(dataclasses.replace(compared, check=Check.EXACT))
    with pytest.raises(UserError, match="holds more rows of a run than .*older"):
        steps.publish(tmp_path / "far")


@pytest.mark.parametrize(
    ("here", "sources", "ends"),
    [
        ("abcdef123456", "another", f"publish it from a clean checkout of its sources, {SOURCES}"),
        ("abcdef123456+", SOURCES, f"publish it from a clean checkout of its sources, {SOURCES}"),
        ("unknown", SOURCES, f"publish it from a clean checkout of its sources, {SOURCES}"),
    ],
)
def test_code_that_is_not_this_checkouts_is_refused_in_a_line(
    checkout: Path, tmp_path: Path, table: Path, monkeypatch, capsys, here: str, sources: str, ends: str
) -> None:
    unknown(invent_tuning(invent_cut_off(tmp_path / "far")))
    monkeypatch.setattr(module, "commit", lambda: here)
    monkeypatch.setattr(module, "sources", lambda: sources)
    monkeypatch.delattr(steps, "compare_outputs")  # which takes minutes, for nothing
    before = {path: path.read_bytes() for path in [table, *checkout.rglob("*")] if path.is_file()}
    said = failure(capsys, monkeypatch, "publish", str(tmp_path / "far"))
    assert "(gpu) is not published: its code is at no commit (unknown): " in said and said.endswith(ends)
    assert before == {path: path.read_bytes() for path in before}


def test_what_is_no_archive_is_refused_in_a_line(checkout: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "run.tar.gz").write_text("no archive")
    assert "is no archive of a results folder" in failure(capsys, monkeypatch, "publish", str(tmp_path / "run.tar.gz"))
