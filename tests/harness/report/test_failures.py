"""What fails is a row with its reason, the sweep goes on, and report and plots come out and say so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import IDS, tiny_lm

import castpoint.harness.accuracy.budget as budget
import castpoint.harness.accuracy.sweep as sweep
import castpoint.harness.cases.run as cases
import castpoint.harness.conformance.cuda as checks
import castpoint.harness.conformance.execute as execute
import castpoint.harness.fingerprint.survey as survey
import castpoint.harness.model.study as study
from castpoint.harness import steps
from castpoint.harness.peers.running import Implementation
from castpoint.harness.report import failures
from castpoint.harness.report.publish import write
from castpoint.harness.runs.environment import describe
from castpoint.harness.runs.frames import load
from castpoint.harness.runs.records import Records, Settings
from castpoint.harness.runs.words import Check
from castpoint.variants.catalogue import PLANS

SETTINGS = Settings(
    layers=(0,), tokens=4, kernel_tokens=2, speed_tokens=(1,), plans=("hf", "one-rounding", "fp32"), speed_budget_s=0.05
)


def failing(own: Callable, when: Callable[..., bool], reason: str) -> Callable:
    """own, but where `when` says so of its arguments it raises."""

    def called(*arguments: object, **options: object) -> object:
        if when(*arguments):
            raise RuntimeError(reason)
        return own(*arguments, **options)

    return called


def plant(patch: pytest.MonkeyPatch) -> None:
    """One failure in every sweep. Nothing here asks for Triton's interpreter, which takes minutes."""
    patch.setattr(sweep, "KERNEL_BACKENDS", {"cpu": ("inductor",)})
    patch.setattr(sweep, "DRAWS", 1)
    one_rounding, fp32 = PLANS["one-rounding"].plan, PLANS["fp32"].plan
    patch.setattr(sweep, "spec", failing(sweep.spec, lambda plan, problem: plan == one_rounding, "no spec"))
    patch.setattr(sweep, "run", failing(sweep.run, lambda plan, problem, backend: backend == "inductor", "no compiler"))
    patch.setattr(budget, "budget", failing(budget.budget, lambda plan, *rest: plan == fp32, "no budget"))
    patch.setattr(budget, "order_of_sums", failing(len, lambda *rest: True, "no sums"))
    make = failing(len, lambda device: True, "no package")
    broken = Implementation("broken", "torch", "rmsnorm", "eager", make, "hf", "broken.py")
    patch.setattr(survey, "implementations", lambda: [broken])
    case = next(case for case in cases.CASES if case.claim.case == 9)
    fails = dataclasses.replace(case, claim=dataclasses.replace(case.claim, source="planted"))
    object.__setattr__(fails, "measure", failing(len, lambda seed: True, "no case"))
    patch.setattr(cases, "CASES", [case, fails])
    patch.setattr(execute, "kernel_checks", lambda: [("hf", None, Check.EXACT, False, 2)])
    patch.setattr(execute, "tile_checks", lambda: [])
    patch.setattr(execute, "block_checks", lambda: [])
    patch.setattr(checks, "run_triton", failing(len, lambda plan, problem: True, "no launch"))
    four_bit = study.four_bit
    patch.setattr(study, "four_bit", lambda model: failing(four_bit(model), lambda: True, "no quantiser"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("failures")

    def records(command: str, **settings: object) -> Records:
        found = Records(where, {"command": command, "tokens": 8, **settings}, describe("cpu"))
        found.note(command=command)
        return found

    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        bench = Records(where, vars(SETTINGS), describe("cpu"))
        bench.note(command="bench")
        steps.measure(SETTINGS, bench, ("errors", "amplification", "budget", "speed"))
        bench.finish()
        for name in ("survey", "cases"):
            made = records(name)
            steps.study(name, made, "cpu")
            made.finish()
        made = records("execute")
        execute.execute_kernels(made, "sm_90")
        made.finish()
        made = records("model", model="tiny", weights="checkpoint")
        study.sweep_model(tiny_lm(), ["hf"], "eager", [study.Text("passages", n, IDS[:6]) for n in (0, 1)], made)
        made.finish()
    return where


REASONS = {
    "errors": ("one-rounding", "no spec"),
    "budget": ("fp32", "no budget"),
    "cases": ("planted", "no case"),
    "executed": ("hf", "no launch"),
    "model_tokens": ("4-bit weights", "no quantiser"),
}


@pytest.mark.parametrize("table", REASONS)
def test_what_failed_is_a_row_and_the_others_are_measured(folder: Path, table: str) -> None:
    what, reason = REASONS[table]
    frames = [load(folder, run_id)[table] for run_id in Records(folder, {"of": "this test"}, {}).runs]
    rows = [row for frame in frames for row in frame.to_dict("records")]
    failed = [row for row in rows if row["status"] == "failed"]
    assert any(reason in row["reason"] and what in map(str, row.values()) for row in failed)
    assert table == "executed" or any(row["status"] == "ok" for row in rows)


def test_the_report_names_each_with_its_reason(folder: Path) -> None:
    said = write(folder)
    text = (folder / "report.md").read_text()
    section = text.split("## What failed")[1].split("\n## ")[0]
    assert "report.md" in said and "nan" not in section
    for table, (what, reason) in REASONS.items():
        line = next(line for line in section.splitlines() if reason in line)
        assert what in line and table in line
    for reason in ("no compiler", "no sums"):
        assert reason in section
    assert "`4-bit weights` failed in 2 texts: no quantiser" in text
    assert "| fp32 |" in text
    drawn = {path.stem for path in (folder / "plots").glob("*.png")}
    assert {"plans", "ulps", "budget", "model-tiny-layers", "model-tiny-tokens", "model-tiny-parting"} <= drawn


def test_plots_say_what_is_missing(folder: Path) -> None:
    runs = Records(folder, {"of": "this test"}, {}).runs
    notes = [failures.note(folder, run_id) for run_id in runs]
    assert any("failed: " in note and "one-rounding" in note and "more" in note for note in notes)
    assert any("4-bit weights" in note for note in notes) and "" in notes


def test_nothing_is_said_where_nothing_failed(folder: Path) -> None:
    frame = load(folder, next(iter(Records(folder, {"of": "this test"}, {}).runs)))["errors"]
    assert failures.section(failures.bad_rows(frame[frame["status"] == "ok"], "errors")) == ""
