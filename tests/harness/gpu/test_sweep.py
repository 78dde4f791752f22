"""The grid and its sweep, on a fake CUDA device whose clock is a script."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_cuda import FakeCuda
from gpu_support import PARTS, TINY, labelled, records_in, rows, seconds_by
from support import ROOT

import castpoint.harness.gpu.sweep
from castpoint.harness.conformance import cuda as gpu_checks
from castpoint.harness.gpu import arms
from castpoint.harness.gpu.sweep import sweep_gpu
from castpoint.harness.peers.chains import OWN_KERNEL
from castpoint.harness.problems import grid
from castpoint.harness.problems.grid import COLD, HOT, LAYERS, ROPE, Point
from castpoint.harness.runs.schema import GpuCheckRow, Kind
from castpoint.harness.timing.cuda import DeviceLost
from castpoint.variants.catalogue import PLANS, plan_named
from castpoint.variants.envelope import envelope, outside

# ---------------------------------------------------------------- the plan of a run


def test_the_grid_is_the_issues():
    points = grid.points()
    cold = [p for p in points if p.regime == COLD]
    assert len(set(points)) == len(points)
    assert {(p.model, p.tokens) for p in cold} == {(m, t) for m in grid.MODELS for t in grid.TOKENS} | {
        (m, t) for m in grid.QUICK_MODELS for t in grid.GOAL_TOKENS
    }
    assert {p.regime for p in points} == {COLD, ROPE, HOT, LAYERS}
    quick = grid.points(quick=True)
    assert points[: len(quick)] == quick, "a run that is stopped has the quick points"


@pytest.mark.parametrize(("model", "megabytes", "at_1", "at_4096"), [
    ("qwen3-0.6b", 8.4, 1.95, 43.5), ("qwen3-1.7b", 16.8, 3.90, 87), ("qwen3-30b-a3b", 21.0, 4.88, 109),
    ("qwen3-4b", 31.5, 7.32, 163), ("qwen3-8b", 50.3, 11.7, 261), ("qwen3-14b", 73.4, 17.1, 381),
    ("qwen3-235b-a22b", 75.5, 17.6, 391), ("qwen3-32b", 104.9, 24.4, 544),
])  # fmt: skip
def test_floors_as_published(model: str, megabytes: float, at_1: float, at_4096: float):
    """Weight bytes and floors in us at 4.3 TB/s and 790 TFLOP/s, computed elsewhere by hand."""
    for tokens, floor_us in ((1, at_1), (4096, at_4096)):
        (row,) = [row for row in arms.rows(Point(model, tokens)) if row.arm == "P1 best"]
        assert row.floor_s() * 1e6 == pytest.approx(floor_us, rel=0.01)
        assert 2 * row.point.geometry.rows * row.point.geometry.hidden_size / 1e6 == pytest.approx(megabytes, rel=0.01)


def test_a_dry_run_lists_every_measurement_and_touches_no_gpu():
    command = [sys.executable, "-m", "castpoint", "gpu", "--dry-run"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert "assumed" in lines[0] and lines[1].split()[-3:] == ["GFLOP", "floor_us", "arm"]
    for model in grid.MODELS:
        for plan in PLANS:
            (line,) = [line for line in lines if line.split()[:3] == [model, "16", COLD] and line.endswith(f"  {plan}")]
            assert float(line.split()[6]) > 0
    assert len(lines) == len(set(lines)), "a measurement is listed twice"
    *_, last = lines
    listed = [line.split() for line in lines[2:] if line[0] != "#"]
    assert last.startswith(f"# {len({tuple(words[:3]) for words in listed})} points, {len(listed)} measurements (")
    for kind in Kind:
        assert re.search(rf"\b{sum(words[3] == kind for words in listed)} {kind}\b", last)
    floors_s = float(re.search(r"add up to (\S+) s: no estimate of the run", last)[1])
    assert floors_s == pytest.approx(sum(float(words[6]) for words in listed) / 1e6, rel=0.01)


# ---------------------------------------------------------------- the sweep


def test_a_point_has_a_row_for_every_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    labelled(monkeypatch, {"deferred": RuntimeError("no such instruction")})
    own = "P1 own kernels | cuBLAS"
    gpu = seconds_by({own: 4e-5, "one-rounding": 2e-5, "fp32": 8e-5, "P4 cuBLAS": 1e-5})
    sweep_gpu([Point("tiny", 4)], records_in(tmp_path), gpu)
    found = {row["arm"]: row for row in rows(tmp_path, "gpu_speed")}
    parts = {name for name in found if found[name]["kind"] in PARTS}
    assert {"norm eager", "norm quack rmsnorm", "heads head_norm kernel", "P4 cuBLAS"} <= parts
    assert found["norm quack rmsnorm"]["status"] in ("not installed", "not applicable")
    assert {own, "eager", "one-rounding", "fp32"} <= found.keys()
    assert float(found["one-rounding"]["p50_us"]) == pytest.approx(20)
    assert float(found["one-rounding"]["speedup_p1_p50"]) == pytest.approx(2), "over the best P1, not the slowest"
    assert float(found["fp32"]["speedup_p1_p50"]) == pytest.approx(0.5), "losses are printed"
    assert found["one-rounding"]["p1"] == own and found["one-rounding"]["config"] == "separate"
    assert found["deferred"]["status"] == "failed" and "no such instruction" in found["deferred"]["reason"]
    assert found["deferred"]["p50_us"] == "" and found["fp32"]["cold"] == "True"
    work = [row.work for row in arms.rows(Point("tiny", 4)) if row.arm == "fp32"][0]
    floor_us = max(work.bytes / 2e12, work.flops / 1e14) * 1e6
    assert float(found["fp32"]["roofline_share"]) == pytest.approx(floor_us / 80, rel=1e-4)
    assert float(found["fp32"]["sm_mhz"]) == 1980
    noted = json.loads((tmp_path / "environment.json").read_text())["runs"]
    assert next(iter(noted.values()))["limits"]["launch"] == {"per_kernel_s": 1e-6}


def test_red_plans_get_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    labelled(monkeypatch)
    records = records_in(tmp_path)
    red = {"status": "red", "reason": "3 elements differ"}
    records.add(GpuCheckRow(plan="fp32", config="default", tokens=70, check="exact", **red))
    sweep_gpu([Point("tiny", 1)], records, seconds_by({}))
    (row,) = [row for row in rows(tmp_path, "gpu_speed") if row["arm"] == "fp32"]
    assert (row["status"], row["p50_us"]) == ("red", "") and "not timed: default, exact: 3 elements" in row["reason"]


def test_an_impossible_time_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    labelled(monkeypatch)
    gpu = seconds_by({"one-rounding": 1e-9})  # 8 KB of cold weights in a nanosecond
    monkeypatch.setattr(FakeCuda, "name", lambda self: "NVIDIA H200")
    sweep_gpu([Point("tiny", 1)], records_in(tmp_path), gpu)
    (row,) = [row for row in rows(tmp_path, "gpu_speed") if row["arm"] == "one-rounding"]
    assert row["status"] == "red" and "TB/s of cold memory" in row["reason"] and row["p50_us"] == ""


def test_hot_rows_and_chains_of_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    labelled(monkeypatch)
    sweep_gpu([Point("tiny", 1, HOT), Point("tiny", 1, LAYERS)], records_in(tmp_path), seconds_by({}))
    found = {(row["regime"], row["arm"]): row for row in rows(tmp_path, "gpu_speed")}
    assert found[HOT, "one-rounding"]["cold"] == "False"
    assert found[LAYERS, "one-rounding"]["copies"] == str(TINY.num_layers)
    assert not [row for row in found.values() if row["kind"] in PARTS]


def test_a_run_goes_on_where_it_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    points = [Point("tiny", 1), Point("tiny", 4)]
    labelled(monkeypatch)
    real = castpoint.harness.gpu.sweep._sweep_point
    monkeypatch.setattr(castpoint.harness.gpu.sweep, "_sweep_point", lambda point, *rest: breaks(point, real, *rest))
    with pytest.raises(DeviceLost):
        sweep_gpu(points, records_in(tmp_path), seconds_by({}))
    before = rows(tmp_path, "gpu_speed")
    assert {row["tokens"] for row in before} == {"1"}
    monkeypatch.setattr(castpoint.harness.gpu.sweep, "_sweep_point", real)
    sweep_gpu(points, records_in(tmp_path), seconds_by({}))
    after = rows(tmp_path, "gpu_speed")
    assert after[: len(before)] == before and {row["tokens"] for row in after[len(before) :]} == {"4"}
    assert len({(row["tokens"], row["arm"]) for row in after}) == len(after)


def breaks(point: Point, real, *rest) -> None:
    if point.tokens == 4:
        raise DeviceLost("an illegal memory access")
    real(point, *rest)


def test_a_point_that_does_not_fit_is_a_row_and_the_grid_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = castpoint.harness.gpu.sweep.prepared

    def prepared(point, gpu, limits):
        if point.tokens == 1:
            raise torch.OutOfMemoryError("tried to allocate 200 GiB")
        return real(point, gpu, limits)

    monkeypatch.setattr(castpoint.harness.gpu.sweep, "prepared", prepared)
    labelled(monkeypatch)
    sweep_gpu([Point("tiny", 1), Point("tiny", 4)], records_in(tmp_path), seconds_by({}))
    status = {row["tokens"]: row["status"] for row in rows(tmp_path, "gpu_points")}
    assert status == {"1": "failed", "4": "ok"}


def test_weights_that_do_not_fill_the_caches_are_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    labelled(monkeypatch)
    gpu = seconds_by({})
    monkeypatch.setattr(gpu, "free_bytes", lambda: 350_000)  # room for one copy, own and folded
    sweep_gpu([Point("tiny", 1)], records_in(tmp_path), gpu)
    assert {row["cold"] for row in rows(tmp_path, "gpu_speed")} == {"False"}


# ---------------------------------------------------------------- RoPE


def test_points_with_rope_rotate_and_count_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compared = {name: name for name in ("one-rounding", "deferred")}
    compared |= {"P1 own kernels | cuBLAS": "one-rounding", "eager": "hf"}  # arm -> its plan
    outputs: dict[tuple[str, str], torch.Tensor] = {}
    settings: dict[str, castpoint.harness.gpu.sweep.Setting] = {}
    measure, prepared = castpoint.harness.gpu.sweep.measure, castpoint.harness.gpu.sweep.prepared

    def measure_and_keep(arms, gpu, **options):
        regime = list(settings)[-1]
        outputs.update({(regime, arm.name): arm.call(0)[0] for arm in arms if arm.name in compared})
        return measure(arms, gpu, **options)

    def prepare_and_keep(point, gpu, limits):
        settings[point.regime] = prepared(point, gpu, limits)
        return settings[point.regime]

    monkeypatch.setattr(castpoint.harness.gpu.sweep, "measure", measure_and_keep)
    monkeypatch.setattr(castpoint.harness.gpu.sweep, "prepared", prepare_and_keep)
    for regime in (COLD, ROPE):
        sweep_gpu([Point("tiny", 4, regime)], records_in(tmp_path / regime), seconds_by({}))
    cold, rope = ({row["arm"]: row for row in rows(tmp_path / regime, "gpu_speed")} for regime in (COLD, ROPE))
    assert {"P1 F.rms_norm | cuBLAS | head_norm kernel", "P1 own kernels | cuBLAS", "eager", "hf"} <= rope.keys()
    assert {arm for arm in rope if rope[arm]["kind"] == Kind.HEADS} == {f"heads {OWN_KERNEL}"}
    kinds = {row["kind"] for row in rope.values()}
    assert Kind.LOOP not in kinds and Kind.NORM in kinds
    assert settings[COLD].problems[0].positions is None
    turned = settings[ROPE].problems[0]
    assert turned.positions.tolist() == [1000, 1001, 1002, 1003]
    for arm, plan in compared.items():
        assert int(rope[arm]["bytes"]) - int(cold[arm]["bytes"]) == 4 * 4 * TINY.head_dim, arm  # cos and sin in fp32
        allowed = envelope(plan_named(plan), turned)["q"]
        assert not outside(outputs[ROPE, arm], allowed).any(), arm
        assert outside(outputs[COLD, arm], allowed).double().mean() > 0.5, f"{arm}: the test would not notice"


@pytest.mark.parametrize("check", gpu_checks.AGAINST_SPEC)
def test_checks_with_rope_rotate(check: str):
    for rope in (False, True):
        problem = gpu_checks.problem_for(plan_named("hf"), check, "cpu", rope)
        assert (problem.positions is not None) == rope and problem.head_dim == 128
