"""A GPU run that was cut off is shown as far as it came; from records whose numbers are all invented."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from invented_gpu import AT, CHAIN, LARGE, P4_BEST, SMALL, add, end, invent_by_hand, invent_cut_off, opened

import castpoint.harness.__main__ as cli
from castpoint.harness.problems import grid
from castpoint.harness.report.failures import failures
from castpoint.harness.report.gpu import section
from castpoint.harness.report.gpu_runs import newest
from castpoint.harness.report.page import newest_run
from castpoint.harness.report.plots import draw
from castpoint.harness.report.readme import gpus
from castpoint.harness.runs.errors import UserError
from castpoint.harness.runs.records import TABLES, Records
from castpoint.harness.runs.schema import GpuCheckRow
from castpoint.harness.runs.words import Check, Step

# ---------------------------------------------------------------- nothing measured


def test_without_a_gpu_run_there_is_no_section(tmp_path: Path) -> None:
    assert section(tmp_path / "none") == section(tmp_path) == ""
    bench = Records(tmp_path, {"model": SMALL}, {"device": "cpu"})
    bench.finish()
    assert section(tmp_path) == "" and draw(tmp_path, bench.run_id) == []
    for table in ("gpu_speed", "gpu_checks"):
        (tmp_path / f"{table}.csv").write_text(",".join(TABLES[table]) + "\n")  # as an older version left it
    assert draw(tmp_path, bench.run_id) == [] and section(tmp_path) == "" and newest(tmp_path) is None


def test_the_readme_links_every_gpu_whatever_its_name(tmp_path: Path) -> None:
    for name in ("cpu", "h100", "somewhere else"):
        (tmp_path / name).mkdir()
    assert gpus(tmp_path) == "No kernel has run on a GPU yet, only its PTX on a CPU."
    invent_by_hand(tmp_path / "h100").finish()
    invent_cut_off(tmp_path / "somewhere else")
    whole, cut = (f"[invented H200]({tmp_path}/{name}/report.md#on-a-gpu)" for name in ("h100", "somewhere else"))
    assert gpus(tmp_path) == f"Times on a GPU: {whole}, {cut} (cut off after 5 of 152 points)."
    assert section(tmp_path / "h100").startswith("## On a GPU\n")


# ---------------------------------------------------------------- a run that was cut off


def test_the_newest_run_with_times_is_shown_finished_or_not(tmp_path: Path) -> None:
    invent_by_hand(tmp_path).finish()
    cut = invent_cut_off(tmp_path)
    run = newest(tmp_path)
    assert (run.run_id, run.cut_off, run.reached) == (cut.run_id, True, f"5 of {len(grid.points())} points")
    assert "invented H200, **cut off: 5 of 152 points**: 132 processors" in section(tmp_path)
    assert list(failures(tmp_path, cut.run_id)["table"]) == [], "what failed in the older run is not in this one"
    cut.finish()
    assert "cut off" not in section(tmp_path) and "invented H200, 5 of 152 points: 132" in section(tmp_path)
    opened(tmp_path)  # has no time yet
    assert newest(tmp_path).run_id == cut.run_id


def test_points_are_counted_by_their_chains(tmp_path: Path) -> None:
    """Every arm of a point has a row; other steps go to the same points."""
    records = invent_cut_off(tmp_path, [AT["1"]])
    add(records, AT["16"], CHAIN, 6.0, 6.0, step=Step.PLANS)
    add(records, AT["256"], P4_BEST, 6.0, step=Step.PARTS)
    assert newest(tmp_path).reached.startswith("1 of ")


def test_before_the_first_time_there_is_what_was_measured(tmp_path: Path) -> None:
    folder = tmp_path / "h200"
    records = opened(folder)
    records.add(GpuCheckRow(plan="hf", config="default", tokens=70, check=Check.EXACT))
    end(records, Step.COUNTERS, status="failed", reason="RuntimeError: no counters")
    text = section(folder)
    assert "**cut off: 0 of 152 points**" in text and "copy 4.2 TB/s" in text and "No time was measured." in text
    assert "| exact | hf | default | ok |" in text and draw(folder, records.run_id) == []
    (row,) = failures(folder, records.run_id).itertuples(index=False)
    assert (row.table, row.what, row.reason) == ("gpu_steps", "counters", "RuntimeError: no counters")
    assert gpus(tmp_path).endswith("(cut off after 0 of 152 points).")


def test_a_folder_without_a_bench_gets_a_report_of_its_gpu_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = invent_cut_off(tmp_path / "far")
    add(records, (LARGE, 1, grid.COLD), "hf", None, status="failed", reason="out of memory")
    with open(tmp_path / "far" / "gpu_speed.csv", "a") as file:
        file.write(f"{records.run_id},qwen3-32b,1,cold")  # half a row
    monkeypatch.setattr(sys, "argv", ["castpoint", "report", "--results", str(tmp_path / "far")])
    with pytest.raises(SystemExit) as status:
        cli.main()
    assert not status.value.code and "far/report.md" in capsys.readouterr().out
    text = (tmp_path / "far" / "report.md").read_text()
    assert re.findall("^## (.*)$", text, re.MULTILINE) == ["What failed", "On a GPU"]
    assert re.findall(r"^- \[(.*)\]", text, re.MULTILINE) == ["What failed", "On a GPU"]
    assert (
        "| gpu_speed | qwen3-32b, split-k, hf, chains, " in text
        and "(plots/gpu_speedup.png)" in text
        and "nan" not in text
    )
    assert [path.name for path in (tmp_path / "far" / "plots").iterdir()] == ["gpu_speedup.png"]


def test_a_bench_beside_the_gpu_run_keeps_its_report(tmp_path: Path) -> None:
    bench = Records(tmp_path, {"model": SMALL}, {"device": "cpu"})
    bench.note(command="bench")
    invent_cut_off(tmp_path)
    assert newest_run(tmp_path) == newest(tmp_path).run_id, "that bench never finished"
    bench.finish()
    assert newest_run(tmp_path) == bench.run_id
    with pytest.raises(UserError, match="holds no finished bench and no row of a GPU"):
        newest_run(tmp_path / "none")
