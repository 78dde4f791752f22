"""Whole runs on the fake device: what is on disk wherever they are cut off, and what one broken arm costs."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from fake_run import CARD, Timed, staged, until_done
from gpu_support import rows

import castpoint.harness.gpu.run
from castpoint.harness.gpu.order import Item, clock, order
from castpoint.harness.problems.grid import Point, points
from castpoint.harness.report.gpu import section, speed_table
from castpoint.harness.report.gpu_runs import newest
from castpoint.harness.report.readme import gpus
from castpoint.harness.runs.schema import KEYS
from castpoint.harness.runs.words import Kind, Step

GOALS = [
    (model, tokens) for tokens in (1, 16, 256, 4096) for model in ("qwen3-0.6b", "qwen3-8b", "qwen3-4b", "qwen3-32b")
]


def test_cut_off_anywhere_the_best_so_far_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 5, 10 and 28 minutes of one run that each time goes on where it was."""
    folder = tmp_path / "scripted"
    run_until = staged(monkeypatch, folder)
    estimates = list(clock(order(), CARD))
    seen = 0
    for minutes in (5, 10, 28):
        assert not run_until(minutes - seen)
        ends = [e.start + e.seconds for e in estimates]
        planned = sum(end <= 60 * minutes for end in ends)
        found = rows(folder, "gpu_steps")
        assert [r["step"] for r in found] == [e.item.step for e in estimates[: len(found)]], "another order"
        assert len(found) == pytest.approx(planned, rel=0.07), f"{minutes} minutes: the dry run's clock is off"
        chains = [(r["model"], int(r["tokens"])) for r in found if r["step"] == Step.CHAINS]
        assert chains[:16] == GOALS, "the points that say most come first, all within five minutes"
        reached = f"{len(chains)} of {len(points())} points"
        assert f"**cut off: {reached}**" in section(folder), "the report does not say how far it came"
        assert f"(cut off after {reached})" in gpus(tmp_path), "nor does the README"
        shown = speed_table(newest(folder))
        assert {*zip(shown["model"], shown["tokens"].astype(int), strict=True)} >= {*chains}
        seen = minutes
    speed = rows(folder, "gpu_speed")
    assert {r["status"] for r in speed} <= {"ok", "not installed", "not applicable"}
    keys = Counter((r["model"], r["tokens"], r["regime"], r["step"], r["arm"]) for r in speed)
    assert max(keys.values()) == 1, "a row was measured twice"
    for model, tokens in GOALS:
        here = {r["arm"]: r for r in speed if (r["model"], r["tokens"], r["step"]) == (model, str(tokens), Step.CHAINS)}
        fused = [r for r in here.values() if r["kind"] == Kind.OWN and r["kernel"] in ("fused", "split-k")]
        assert {r["function"] for r in fused} == {"hf", "one-rounding", "deferred", "folded"}, "a plan never ran fused"
        assert {"P1 own kernels | cuBLAS", "P4 cuBLAS + 2 empty kernels"} <= here.keys()
        assert all(r["p1"] and r["p4"] and r["over_p4_p50"] for r in fused)
    spent = [(float(r["seconds"]), float(r["estimated_s"])) for r in rows(folder, "gpu_steps")]
    assert sum(s for s, _ in spent) == pytest.approx(sum(e for _, e in spent), rel=0.05)


# ---------------------------------------------------------------- what breaks

POINTS = [Point("qwen3-0.6b", 1), Point("qwen3-0.6b", 256)]
SHORT = [Item(Step.LIMITS), Item(Step.EAGER)]
SHORT += [Item(step, point) for point in POINTS for step in (Step.PARTS, Step.TUNING, Step.CHAINS)]
SHORT += [Item(step, POINTS[1]) for step in (Step.PLANS, Step.COMPILED)]
TABLES = ("gpu_steps", "gpu_checks", "gpu_limits", "gpu_speed", "tuning")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(castpoint.harness.gpu.run, "order", lambda: SHORT)


def keyed(folder: Path) -> dict[tuple[str, ...], str]:
    """(table, key) -> status of every row; each once."""
    found = [
        (table, *(row[name] for name in KEYS[table]), row["status"]) for table in TABLES for row in rows(folder, table)
    ]
    assert len({row[:-1] for row in found}) == len(found), "a row was written twice"
    return {row[:-1]: row[-1] for row in found}


BREAKING = [
    (Step.PARTS, "qwen3-0.6b", "256", "norm eager"),
    (Step.PARTS, "qwen3-0.6b", "256", "own loop 128 x 64, 8 warps, 4 stages"),
    (Step.PARTS, "qwen3-0.6b", "1", "P4 cuBLAS"),
    (Step.TUNING, "qwen3-0.6b", "256", "separate"),
    (Step.TUNING, "qwen3-0.6b", "256", "fused after hidden 128 x 64, 8 warps, 3 stages"),
    (Step.CHAINS, "qwen3-0.6b", "1", "P1 own kernels | cuBLAS"),
    (Step.CHAINS, "qwen3-0.6b", "1", "P4 cuBLAS + 2 empty kernels"),
    (Step.CHAINS, "qwen3-0.6b", "256", "deferred"),
    (Step.CHAINS, "qwen3-0.6b", "256", "eager"),
    (Step.PLANS, "qwen3-0.6b", "256", "truncating"),
    (Step.COMPILED, "qwen3-0.6b", "256", "P2 torch.compile"),
]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("breaking", BREAKING, ids=lambda b: f"{b[0]} {b[3]}")
def test_an_arm_that_breaks_the_context_costs_its_row(
    breaking: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_until = staged(monkeypatch, tmp_path / "broken")

    def gpu() -> Timed:
        found = Timed()
        found.breaks = breaking
        return found

    times = 3 if breaking[0] == Step.TUNING else 1  # each scale times it, as another plan
    processes = until_done(run_until, gpu)
    broken = keyed(tmp_path / "broken")
    failed = [row for row, status in broken.items() if status == "failed"]
    assert len(failed) == times and all(breaking[3] in row for row in failed), failed
    assert processes == times + 1, "a rerun ended at the same place"
    whole = staged(monkeypatch, tmp_path / "whole")
    assert whole(1e6)
    assert expected_of(keyed(tmp_path / "whole"), broken) == []


def expected_of(whole: dict[tuple[str, ...], str], broken: dict[tuple[str, ...], str]) -> list[tuple[str, ...]]:
    """Rows of the whole run that the broken one lacks, but for those that follow what tuning found fastest."""
    return [row for row in whole if row not in broken and row[0] in ("gpu_steps", "gpu_limits", "tuning")]


@pytest.mark.usefixtures("short")
def test_a_check_that_breaks_the_context_makes_its_config_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That plan as that config, not the plan: its other configs have times."""
    run_until = staged(monkeypatch, tmp_path)
    words = "fused after hidden 128 x 64, 8 warps, 3 stages"

    def gpu() -> Timed:
        found = Timed()
        found.breaks = (Step.TUNING, "qwen3-0.6b", "256", f"check deferred {words}, exact")
        return found

    assert until_done(run_until, gpu) == 2
    checks = {(r["plan"], r["config"], r["check"]): r["status"] for r in rows(tmp_path, "gpu_checks")}
    assert [key for key, status in checks.items() if status != "ok"] == [("deferred", words, "exact")]
    tuned = {(r["scale"], r["config"]): r["status"] for r in rows(tmp_path, "tuning") if r["tokens"] == "256"}
    assert [key for key, status in tuned.items() if status != "ok"] == [("epilogue", words)]
    assert tuned["prologue", words] == "ok" and len({scale for scale, _ in tuned}) == 3
    assert (tmp_path / "dispatch.csv").read_text().count("epilogue") == 2


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("moment", [1, 20, 50, 80, 105])
def test_killed_at_any_moment_it_goes_on(moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a signal that no program sees: what is on disk is whole; the next process lacks and repeats nothing."""
    run_until = staged(monkeypatch, tmp_path)
    child = os.fork()
    if not child:
        torch.set_num_threads(1)  # a fork has none of its parent's other threads, and would wait for them
        gpu = Timed()
        gpu.killed_at = moment
        run_until(1e6, gpu)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    before = keyed(tmp_path)
    assert run_until(1e6)
    after = keyed(tmp_path)
    assert before.items() <= after.items() and "failed" not in after.values()
    assert {row for row in after if row[0] == "gpu_steps"} == {
        ("gpu_steps", *map(str, item.key.values())) for item in SHORT
    }
