"""The grid, its sweep, tuning and dispatch, on a fake CUDA device whose clock is a script."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_cuda import FakeCuda
from support import ROOT

import castpoint.harness.gpu.sweep
from castpoint.harness.conformance import cuda as gpu_checks
from castpoint.harness.gpu import arms, tune
from castpoint.harness.gpu.sweep import sweep_gpu
from castpoint.harness.peers.chains import OWN_KERNEL, loop_name, loop_tile, pick_chains
from castpoint.harness.problems import grid
from castpoint.harness.problems.geometry import GEOMETRIES, Geometry
from castpoint.harness.problems.grid import COLD, HOT, LAYERS, ROPE, Point
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import Check, GpuCheckRow, Kind
from castpoint.harness.timing.cuda import DeviceLost
from castpoint.harness.timing.rig import AGAIN, Arm
from castpoint.kernels import dispatch
from castpoint.kernels.config import Config
from castpoint.kernels.dispatch import chosen, fallback, read_table, write_table
from castpoint.kernels.plan import CHOICES, CastPlan
from castpoint.variants.catalogue import PLANS, plan_named
from castpoint.variants.envelope import envelope, outside

TINY = Geometry(64, 2, 1, 3)  # heads of 128, as drawn K-norm weights need
SHAPE = (64, 2, 1, 128)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model small enough for the interpreter, limits that need no GPU, and few plans."""
    monkeypatch.setitem(GEOMETRIES, "tiny", TINY)
    monkeypatch.setattr(grid, "TOKENS", (1, 4))
    monkeypatch.setattr(grid, "PLANS", {name: PLANS[name] for name in ("one-rounding", "deferred", "fp32")})
    monkeypatch.setattr(castpoint.harness.gpu.sweep, "ceilings", lambda gpu: LIMITS)
    monkeypatch.setattr(
        castpoint.harness.gpu.sweep, "read_ceiling", lambda gpu, weights: {"bytes_per_s": 2e12, "seconds": 1e-6}
    )
    monkeypatch.setattr(castpoint.harness.gpu.sweep, "launch_costs", lambda gpu: {"per_kernel_s": 1e-6})
    monkeypatch.setattr(castpoint.harness.gpu.sweep, "gpu_state", lambda: {"sm_mhz": 1980.0, "slowed_by": "none"})
    monkeypatch.setattr(dispatch, "_committed", lambda: {})
    monkeypatch.setattr(castpoint.harness.gpu.sweep, "HOT_COPIES", 2)


LIMITS = {"copy_bytes_per_s": 1e12, "bf16_flops_per_s": 1e14, "reason": ""}


def records_in(folder: Path) -> Records:
    return Records(folder, {"command": "gpu"}, {"commit": "test"})


def rows(folder: Path, table: str) -> list[dict[str, str]]:
    with open(folder / f"{table}.csv", newline="") as file:
        return list(csv.DictReader(file))


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
    assert len([line for line in lines if line.startswith("# not built")]) == len(arms.NOT_BUILT)
    *_, last = lines
    listed = [line.split() for line in lines[2:] if line[0] != "#"]
    assert last.startswith(f"# {len({tuple(words[:3]) for words in listed})} points, {len(listed)} measurements (")
    for kind in Kind:
        assert re.search(rf"\b{sum(words[3] == kind for words in listed)} {kind}\b", last)
    floors_s = float(re.search(r"add up to (\S+) s: no estimate of the run", last)[1])
    assert floors_s == pytest.approx(sum(float(words[6]) for words in listed) / 1e6, rel=0.01)


# ---------------------------------------------------------------- the sweep


def labelled(monkeypatch: pytest.MonkeyPatch, faults: dict[str, Exception] | None = None) -> None:
    """Lets the fake device know arms by name, and break those that have a fault.

    A copy is computed once, not for every replay: what becomes of an arm whose outputs change is shown in test_rig.py.
    """
    real = castpoint.harness.gpu.sweep.measure

    def measure(arms, gpu, **options):
        named = []
        for arm in arms:
            once = functools.cache(arm.call)

            def call(i, once=once):
                return tuple(tensor.clone() for tensor in once(i))

            call.label = arm.name
            if arm.name in (faults or {}):
                call.fails_at_capture = faults[arm.name]
            named.append(dataclasses.replace(arm, call=call))
        return real(named, gpu, **options)

    monkeypatch.setattr(castpoint.harness.gpu.sweep, "measure", measure)


def seconds_by(times: dict[str, float]) -> FakeCuda:
    return FakeCuda(lambda name, now: times.get(name.split(AGAIN)[0], 1e-4))


def test_a_point_has_a_row_for_every_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    labelled(monkeypatch, {"deferred": RuntimeError("no such instruction")})
    own = "P1 own kernels | cuBLAS"
    gpu = seconds_by({own: 4e-5, "one-rounding": 2e-5, "fp32": 8e-5, "P4 cuBLAS": 1e-5})
    sweep_gpu([Point("tiny", 4)], records_in(tmp_path), gpu)
    found = {row["arm"]: row for row in rows(tmp_path, "gpu_speed")}
    parts = {name for name in found if Kind(found[name]["kind"]).is_part}
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
    assert not [row for row in found.values() if Kind(row["kind"]).is_part]


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


# ---------------------------------------------------------------- checks


def test_checks_pass_and_a_wrong_kernel_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plans = {name: PLANS[name] for name in ("hf", "gemma", "deferred")}
    monkeypatch.setattr(gpu_checks, "PLANS", plans)
    monkeypatch.setattr(gpu_checks, "problem_for", small_problem)
    records = records_in(tmp_path / "right")
    gpu_checks.check_kernels(records, FakeCuda())
    found = records.rows("gpu_checks")
    asked = {
        ("hf", "default"), ("hf", "separate"), ("gemma", "default"), ("gemma", "separate"), ("deferred", "default"),
        ("deferred", str(fallback(128, plan_named("deferred")))),
    }  # fmt: skip
    turned = {(plan, config, "True") for plan, config in asked if plan != "gemma"}  # which no grid rotates
    assert {(row["plan"], row["config"], row["rope"]) for row in found} == turned | {(*each, "False") for each in asked}
    assert {row["status"] for row in found} == {"ok"} and not gpu_checks.red_plans(records)
    run = gpu_checks.run_triton
    moved = {plan_named("hf"): plan_named("hf").replace(products="fp32")}  # wrong where q and k are rotated alone
    monkeypatch.setattr(
        gpu_checks, "run_triton", lambda plan, *rest, **options: run(moved.get(plan, plan), *rest, **options)
    )
    records = records_in(tmp_path / "wrong")
    gpu_checks.check_kernels(records, FakeCuda())
    assert set(gpu_checks.red_plans(records)) == {"hf"} and ", RoPE" in gpu_checks.red_plans(records)["hf"]


def test_split_k_is_checked_at_one_token_too(monkeypatch: pytest.MonkeyPatch):
    split = Config("split-k", block_m=16)
    monkeypatch.setattr(gpu_checks, "PLANS", {"gemma": PLANS["gemma"]})
    monkeypatch.setattr(gpu_checks, "configs_of", lambda plan: {"default": None, str(split): split})
    asked = [(config, check, tokens) for _, config, check, _, tokens in gpu_checks.kernel_checks()]
    both = gpu_checks.AGAINST_SPEC
    assert set(asked) == {(None, check, 70) for check in both} | {(split, check, n) for check in both for n in (70, 1)}
    assert gpu_checks.problem_for(PLANS["gemma"].plan, Check.EXACT, "cpu", tokens=1).tokens == 1


def small_problem(plan, check, device, rope, tokens=5):
    from support import random_problem

    from castpoint.harness.problems.exact import exact_problem

    if check == Check.EXACT:
        return exact_problem(plan, tokens=5, hidden_size=64, num_q_heads=2, num_kv_heads=1, head_dim=16, rope=rope)
    return random_problem(weight_offset=plan.weight_offset != "none", rope=rope)


# ---------------------------------------------------------------- tuning and dispatch

PLAN = CastPlan(proj="bf16-rne")


def stand_in(setting, plan, name, config):
    """An arm that costs the interpreter nothing."""
    return Arm(name, lambda i: (torch.full([2, 4], float(i)),)), config


def test_tuning_takes_what_beats_separate_by_more_than_the_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    labelled(monkeypatch)
    monkeypatch.setattr(tune, "checked", lambda *rest, **more: {"status": "ok"})
    monkeypatch.setattr(tune, "own_arm", stand_in)
    one, two = Config("fused", block_m=16, block_k=64), Config("split-k", block_m=16, block_k=32, splits=2)
    monkeypatch.setattr(tune, "candidates", lambda *shape: (one, two, Config("separate")))
    times = {str(one): 3e-5, str(two): 2e-5, "separate": 2.5e-5}
    table = tune.tune([Point("tiny", 4)], records_in(tmp_path / "a"), seconds_by(times))
    assert table == {("Fake GPU", SHAPE, scale): {4: two} for scale in CHOICES["scale"]}
    times = {str(one): 3e-5, str(two): 2.9e-5, "separate": 2.5e-5}
    table = tune.tune([Point("tiny", 4)], records_in(tmp_path / "b"), seconds_by(times))
    assert table["Fake GPU", SHAPE, "prologue"] == {4: Config("separate")}, "a fused config that loses was taken"
    assert table["Fake GPU", SHAPE, "epilogue"] == {4: two}, "separate cannot apply rstd behind the matmul"
    again = tune.tune([Point("tiny", 4)], records_in(tmp_path / "b"), seconds_by({}))
    assert again == table, "measured twice"


def test_a_config_that_is_wrong_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    labelled(monkeypatch)
    monkeypatch.setattr(tune, "own_arm", stand_in)
    one = Config("split-k", block_m=16, block_k=16)
    monkeypatch.setattr(tune, "candidates", lambda *shape: (one, Config("separate")))

    def checked(*rest: object, tokens: int) -> dict[str, str]:  # wrong in the binary for one token alone
        return {"status": "red" if tokens == 1 else "ok", "reason": "7 elements differ"}

    monkeypatch.setattr(tune, "checked", checked)
    table = tune.tune([Point("tiny", 4)], records_in(tmp_path), seconds_by({str(one): 1e-6}))
    assert table == {("Fake GPU", SHAPE, "prologue"): {4: Config("separate")}}
    assert {r["status"] for r in rows(tmp_path, "tuning") if r["config"] == str(one)} == {"red"}


def test_the_table_is_read_as_it_was_written(tmp_path: Path):
    path = tmp_path / "dispatch.csv"
    table = {
        ("NVIDIA H200", SHAPE, "prologue"): {1: Config("split-k", splits=4), 16: Config("separate")},
        ("NVIDIA H200", SHAPE, "folded"): {4096: Config("fused", "hidden", 128, 64, 8, 4)},
    }
    write_table(table, path)
    assert read_table(path) == table and read_table(tmp_path / "none.csv") == {}
    path.write_text(path.read_text().replace("splits", "shares"))
    with pytest.raises(ValueError, match="must have the columns gpu, .*castpoint gpu --tune"):
        read_table(path)


def test_dispatch_takes_the_next_larger_number_of_tokens():
    one, two = Config("split-k", splits=4), Config("fused", "hidden", 128, 64, 8, 4)
    table = {("H", SHAPE, "prologue"): {1: one, 16: two}}
    for tokens, config in ((1, one), (2, two), (16, two), (17, two)):
        assert dispatch.dispatch(table, "H", SHAPE, tokens, PLAN) == config
    assert dispatch.dispatch(table, "H", (128, 2, 1, 16), 1, PLAN) is None
    assert dispatch.dispatch(table, "H", SHAPE, 1, PLAN.replace(scale="epilogue")) is None
    assert dispatch.dispatch(table, "H", SHAPE, 1, PLAN.replace(matmul="tf32", hidden="fp32")) is None


def test_another_gpu_falls_back_and_says_so_once():
    dispatch._say_once.cache_clear()
    with pytest.warns(UserWarning, match="no config for Another GPU.*`castpoint gpu --tune`"):
        assert chosen("Another GPU", SHAPE, 1, PLAN) == Config("separate")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen("Another GPU", SHAPE, 1, PLAN.replace(scale="epilogue")).kernel == "fused"
        assert chosen("Another GPU", SHAPE, 1, PLAN.replace(matmul="fp32", hidden="fp32")).kernel == "fused"


# ---------------------------------------------------------------- our own loop

TILES = grid.loop_tiles(Point("qwen3-0.6b", 4096))
LOOPS = tuple(loop_name(tile) for tile in TILES)


def test_our_own_loop_is_asked_for_wherever_a_candidate_runs_it():
    """With the bare matmul's work, at cold points alone, and every such tile: no table chooses among them."""
    for point in grid.points():
        rows_of = {row.arm: row for row in arms.rows(point)}
        own = [row for row in rows_of.values() if row.kind == Kind.LOOP]
        assert len(own) == (0 if point.regime != COLD or point.tokens <= 32 else 1 if point.tokens <= 128 else 4)
        assert {row.work for row in own} <= {rows_of["P4 cuBLAS"].work} if own else True


def sweep_own_loop(folder: Path, monkeypatch: pytest.MonkeyPatch, times: dict[str, float], records=None) -> dict:
    """Rows of one point, with the tiles of a larger one, by arm. Without the check on drawn weights, for its time."""
    for module in (grid, arms):
        monkeypatch.setattr(module, "loop_tiles", lambda point: TILES)
    monkeypatch.setattr(grid, "PLANS", {"one-rounding": PLANS["one-rounding"]})
    monkeypatch.setattr(gpu_checks, "AGAINST_SPEC", (Check.EXACT,))
    sweep_gpu([Point("tiny", 4)], records or records_in(folder), seconds_by(times))
    return {row["arm"]: row for row in rows(folder, "gpu_speed")}


def test_every_tile_of_our_own_loop_is_a_row_and_no_part_of_a_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    labelled(monkeypatch, {LOOPS[1]: RuntimeError("out of resource: shared memory")})
    records = records_in(tmp_path)
    third = "fused after hidden 128 x 128, 8 warps, 3 stages"
    checked = {"plan": LOOPS[2], "config": third, "tokens": gpu_checks.TOKENS, "check": "exact"}
    records.add(GpuCheckRow(**checked, status="red", reason="3 elements differ"))
    found = sweep_own_loop(tmp_path, monkeypatch, {LOOPS[0]: 1e-6, LOOPS[3]: 3e-5}, records)
    best = found[LOOPS[0]]
    assert best["kind"] == Kind.LOOP and best["config"] == "fused after hidden 128 x 64, 8 warps, 4 stages"
    assert (best["bytes"], best["flops"]) == (found["P4 cuBLAS"]["bytes"], found["P4 cuBLAS"]["flops"])
    assert float(best["p50_us"]) == pytest.approx(1) and float(found[LOOPS[3]]["p50_us"]) == pytest.approx(30)
    assert found[LOOPS[1]]["status"] == "failed" and "out of resource" in found[LOOPS[1]]["reason"]
    assert found[LOOPS[2]]["status"] == "red"
    assert found[LOOPS[2]]["reason"] == f"not timed: {third}, exact: 3 elements differ"
    assert found[LOOPS[1]]["p50_us"] == found[LOOPS[2]]["p50_us"] == ""
    assert found["one-rounding"]["status"] == "ok", "the grid did not go on"
    assert not [arm for arm in found if arm.startswith("P1") and "loop" in arm]  # though it was by far the fastest
    checks = {row["plan"]: row["status"] for row in records.rows("gpu_checks")}
    assert checks == {**dict.fromkeys(LOOPS, "ok"), LOOPS[2]: "red"}


@pytest.mark.parametrize("fault", ["one element", "two runs", "no compile"])
def test_a_loop_that_is_wrong_gets_no_time(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs = []

    def wrong(hidden, weight, head_dim, tile):
        if fault == "no compile":
            raise RuntimeError("no such\ninstruction")
        runs.append(tile)
        exact = (hidden.double() @ weight.double().T).to(torch.bfloat16)
        exact[69, 300] += 512 if fault == "one element" or len(runs) % 2 == 0 else 0
        return exact

    monkeypatch.setattr(gpu_checks, "matmul", wrong)
    labelled(monkeypatch)
    found = sweep_own_loop(tmp_path, monkeypatch, {})
    words = {
        "one element": "exact: 1 of 71680 elements differ where sums are exact",
        "two runs": "exact: two runs differ",
        "no compile": "exact: RuntimeError: no such instruction",
    }
    for name in LOOPS:
        assert found[name]["status"] == "red" and found[name]["p50_us"] == ""
        assert found[name]["reason"].endswith(words[fault])
    assert found["P4 cuBLAS"]["status"] == found["one-rounding"]["status"] == "ok"


def test_the_check_on_drawn_weights_passes_and_notices_truncation(monkeypatch: pytest.MonkeyPatch):
    tile = Config("fused", "hidden", 128, 64, 8, 3)
    monkeypatch.setattr(gpu_checks, "TOKENS", 5)
    assert gpu_checks.loop_checked(tile, Check.ENVELOPE, FakeCuda())["status"] == "ok"

    def truncated(hidden, weight, head_dim, tile):
        proj = hidden.float() @ weight.float().T
        return (proj.view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)

    monkeypatch.setattr(gpu_checks, "matmul", truncated)
    found = gpu_checks.loop_checked(tile, Check.ENVELOPE, FakeCuda())
    assert found["status"] == "red" and "lie outside the interval of fp32 sums" in found["reason"]


def test_a_loop_that_does_not_write_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its outputs are poisoned before and compared behind the timing, like those of every arm."""
    real = castpoint.harness.gpu.sweep.peers.loop_peer

    def idle(problems, tile):
        peer = real(problems, tile)

        def call(i):
            return peer.call(i)

        call.replayed = lambda i: (None,)
        return dataclasses.replace(peer, call=call)

    monkeypatch.setattr(castpoint.harness.gpu.sweep.peers, "loop_peer", idle)
    monkeypatch.setattr(castpoint.harness.gpu.sweep, "check_loops", lambda *rest: None)
    found = sweep_own_loop(tmp_path, monkeypatch, {})
    assert {found[name]["status"] for name in LOOPS} == {"red"} and "still hold NaN" in found[LOOPS[0]]["reason"]
    assert found["P4 cuBLAS"]["status"] == "ok"


def test_a_loop_faster_than_the_memory_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    labelled(monkeypatch)
    monkeypatch.setattr(FakeCuda, "name", lambda self: "NVIDIA H200")
    monkeypatch.setattr(castpoint.harness.gpu.sweep, "check_loops", lambda *rest: None)
    found = sweep_own_loop(tmp_path, monkeypatch, {LOOPS[0]: 1e-9})
    assert found[LOOPS[0]]["status"] == "red" and "TB/s of cold memory" in found[LOOPS[0]]["reason"]


def test_chains_are_not_made_of_our_own_loop():
    parts = {Kind.NORM: {"eager": 1e-6}, Kind.MATMUL: {"cuBLAS": 9e-6}, Kind.HEADS: {"eager": 1e-6}}
    parts[Kind.LOOP] = {loop_tile(TILES[0]): 1e-6}
    assert pick_chains(parts) == [("eager", "cuBLAS", "eager")]
