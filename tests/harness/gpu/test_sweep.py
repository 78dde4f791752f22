"""The steps of a point, on a fake CUDA device whose clock is a script: what their rows say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from fake_cuda import FakeCuda
from gpu_support import (
    LIMITS,
    PARTS,
    SHAPE,
    TINY,
    checked_as,
    labelled,
    records_in,
    rows,
    seconds_by,
    setting_at,
    stood_in,
)

import castpoint.harness.gpu.point
from castpoint.harness.conformance.cuda import binary_of
from castpoint.harness.gpu.order import SEPARATE, Item, binaries, tiles, work_of
from castpoint.harness.gpu.sweep import launched, own_configs, time_chains, time_parts, time_plans
from castpoint.harness.peers.chains import OWN_KERNEL
from castpoint.harness.problems import grid
from castpoint.harness.problems.grid import COLD, GOAL_MODELS, HOT, ROPE, Point
from castpoint.harness.runs.words import Kind, Step
from castpoint.kernels.config import Config, unsupported
from castpoint.kernels.dispatch import reasoned
from castpoint.variants.catalogue import plan_named
from castpoint.variants.envelope import envelope, outside

POINT = Point("tiny", 4)
OWN, BARE = "P1 own kernels | cuBLAS", "P4 cuBLAS"
LAUNCHES = f"{BARE} + 2 empty kernels"
TIME = {Step.PARTS: time_parts, Step.CHAINS: time_chains, Step.PLANS: time_plans}
Found = dict[tuple[str, str], dict[str, str]]


def swept(folder: Path, gpu: FakeCuda, point: Point = POINT, steps: tuple[Step, ...] = tuple(TIME)) -> Found:
    """(step, arm) -> its row, of a point after those steps."""
    setting = setting_at(point, records_in(folder), gpu)
    for step in steps:
        TIME[step](setting)
    found = [row for row in rows(folder, "gpu_speed") if row["tokens"] == str(point.tokens)]
    return {(row["step"], row["arm"]): row for row in found}


@pytest.mark.usefixtures("tiny")
def test_every_arm_has_a_row_with_its_own_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stood_in(monkeypatch, {"deferred": RuntimeError("no such instruction")})
    checked_as(monkeypatch)
    best = f"P1 eager | cuBLAS | {OWN_KERNEL}"
    times = {"norm eager": 1e-6, best: 4e-5, "one-rounding": 2e-5, "fp32": 8e-5, BARE: 1e-5, LAUNCHES: 1.2e-5}
    found = swept(tmp_path, seconds_by(times | {"eager": 1e-6}))
    parts = {arm for step, arm in found if step == Step.PARTS}
    assert {"norm eager", "norm quack rmsnorm", f"heads {OWN_KERNEL}", BARE} <= parts
    assert {found[Step.PARTS, arm]["kind"] for arm in parts} <= set(PARTS)
    assert found[Step.PARTS, "norm quack rmsnorm"]["status"] in ("not installed", "not applicable")
    assert {OWN, best, BARE, LAUNCHES, "eager", "one-rounding", "deferred"} <= {a for s, a in found if s == Step.CHAINS}
    assert {arm for step, arm in found if step == Step.PLANS} == {OWN, best, "fp32"}
    own, lost, failed = found[Step.CHAINS, "one-rounding"], found[Step.PLANS, "fp32"], found[Step.CHAINS, "deferred"]
    assert (own["p1"], own["p4"], own["kernel"], own["kind"]) == (best, BARE, "split-k", Kind.OWN)
    assert float(own["p50_us"]) == pytest.approx(20)
    assert float(own["speedup_p1_p50"]) == pytest.approx(2), "over the best P1: neither the slowest, nor eager"
    assert float(own["over_p4_p50"]) == pytest.approx(2) and float(found[Step.CHAINS, best]["speedup_p1_p50"]) == 1
    assert float(lost["speedup_p1_p50"]) == pytest.approx(0.5), "losses are printed"
    assert failed["status"] == "failed" and "no such instruction" in failed["reason"] and failed["p50_us"] == ""
    floor_us = work_of(POINT, Kind.OWN).floor_s(LIMITS.bytes_per_s, LIMITS.bf16_flops_per_s) * 1e6
    assert float(lost["roofline_share"]) == pytest.approx(floor_us / 80, rel=1e-4)
    assert float(own["sm_mhz"]) == 1980 and own["cold"] == "True" and own["noise_p10"] == own["noise_p90"] == "1"


@pytest.mark.usefixtures("tiny")
def test_launches_are_no_p4_however_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stood_in(monkeypatch)
    checked_as(monkeypatch)
    found = swept(tmp_path, seconds_by({BARE: 1e-5, LAUNCHES: 5e-6}))
    chains = {arm: row for (step, arm), row in found.items() if step == Step.CHAINS}
    assert chains[LAUNCHES]["kind"] == Kind.LAUNCHES and {row["p4"] for row in chains.values()} == {BARE}
    assert float(chains[LAUNCHES]["over_p4_p50"]) == pytest.approx(0.5)


@pytest.mark.usefixtures("tiny")
def test_chains_are_made_of_this_points_best_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At one token another norm and another matmul are the best; what was not timed there is `F.rms_norm | cuBLAS`."""
    stood_in(monkeypatch)
    checked_as(monkeypatch)
    best = {Point("tiny", 1): {"norm eager": 1e-6, "P4 cuBLASLt": 1e-6}, POINT: {"norm F.rms_norm": 1e-6, BARE: 1e-6}}
    parts = [swept(tmp_path, seconds_by(times), point, (Step.PARTS,)) for point, times in best.items()]
    first, other = (swept(tmp_path, seconds_by({}), point, (Step.CHAINS,)) for point in best)
    if parts[0][Step.PARTS, "P4 cuBLASLt"]["status"] == "ok":
        assert (Step.CHAINS, "P4 cuBLASLt + 2 empty kernels") in first
    assert (Step.CHAINS, f"P1 F.rms_norm | cuBLAS | {OWN_KERNEL}") in other and (Step.CHAINS, LAUNCHES) in other
    assert any(arm.startswith("P1 eager") for _, arm in first) and not any(a.startswith("P1 eager") for _, a in other)
    hot = swept(tmp_path / "hot", seconds_by({}), Point("tiny", 4, HOT), (Step.CHAINS,))
    assert (Step.CHAINS, f"P1 F.rms_norm | cuBLAS | {OWN_KERNEL}") in hot


# ---------------------------------------------------------------- what gets no time


@pytest.mark.usefixtures("tiny")
def test_a_red_binary_gets_no_time_and_its_plan_as_another_config_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stood_in(monkeypatch)
    first = reasoned(SHAPE, 4, plan_named("one-rounding"))
    checked_as(monkeypatch, {binary_of("one-rounding", first, 4, TINY.hidden_size): "3 elements differ"})
    found = swept(tmp_path, seconds_by({}), steps=(Step.CHAINS,))
    red = found[Step.CHAINS, "one-rounding"]
    assert (red["status"], red["p50_us"], red["speedup_p1_p50"]) == ("red", "", "")
    assert red["reason"].startswith("not timed: split-k ") and red["reason"].endswith(", exact: 3 elements differ")
    assert found[Step.CHAINS, OWN]["status"] == found[Step.CHAINS, "deferred"]["status"] == "ok", (
        "the same plan, as it is"
    )


@pytest.mark.usefixtures("tiny")
def test_an_impossible_time_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stood_in(monkeypatch)
    checked_as(monkeypatch)
    monkeypatch.setattr(FakeCuda, "name", lambda self: "NVIDIA H200")
    times = {OWN: 1e-9, BARE: 1e-9, "one-rounding": 1e-9}  # 128 KiB of cold weights in a nanosecond
    found = swept(tmp_path, seconds_by(times), steps=(Step.CHAINS,))
    for arm in times:
        row = found[Step.CHAINS, arm]
        assert row["status"] == "red" and "TB/s of cold memory" in row["reason"] and row["p50_us"] == ""
    others = {row["p1"] for row in found.values() if row["status"] == "ok"}
    assert others == {f"P1 F.rms_norm | cuBLAS | {OWN_KERNEL}"}, "a time that cannot be is what others are held to"
    hot = swept(tmp_path / "hot", seconds_by(times), Point("tiny", 4, HOT), (Step.CHAINS,))
    assert hot[Step.CHAINS, "one-rounding"]["status"] == "ok", "hot weights need no memory"


# ---------------------------------------------------------------- as which configs


def tuned(model: str, tokens: int, times: dict[tuple[str, Config], float]) -> list[dict[str, str]]:
    """Rows of `tuning` as they stand on disk: (scale, config) -> its speed-up over `separate`."""
    return [
        {"model": model, "tokens": str(tokens), "scale": scale, "config": str(config), "status": "ok",
         "p50_us": str(10 / speedup), "speedup_separate": str(speedup), "noise_p90": "1.01",
         **{name: str(value) for name, value in dataclasses.asdict(config).items()}}
        for (scale, config), speedup in times.items()
    ]  # fmt: skip


def test_plans_run_as_tuning_found_fastest_and_fused_beside_separate() -> None:
    point = Point("qwen3-8b", 256)
    slow, fast, *_ = (c for c in tiles(point, "one-rounding") if c.prepass == "hidden")
    rstd = next(c for c in tiles(point, "one-rounding") if c.prepass == "rstd")
    assert own_configs(point, "one-rounding", [], "H") == {"": SEPARATE, ", fused": tiles(point, "one-rounding")[0]}
    loses = tuned("qwen3-8b", 256, {("prologue", SEPARATE): 1.0, ("prologue", slow): 0.8, ("prologue", fast): 0.9})
    assert own_configs(point, "one-rounding", loses, "H") == {"": SEPARATE, ", fused": fast}
    wins = tuned("qwen3-8b", 256, {("prologue", SEPARATE): 1.0, ("prologue", slow): 1.2, ("prologue", fast): 1.1})
    assert own_configs(point, "one-rounding", wins, "H") == {"": slow}
    assert own_configs(point, "deferred", wins, "H") == own_configs(point, "deferred", [], "H"), "another scale's rows"
    assert SEPARATE not in own_configs(point, "deferred", loses, "H").values()
    elsewhere = tuned("qwen3-4b", 256, {("prologue", SEPARATE): 1.0, ("prologue", rstd): 1.5})
    assert own_configs(point, "one-rounding", elsewhere, "H") == own_configs(point, "one-rounding", [], "H")


@pytest.mark.parametrize("tokens", [1, 256])
def test_every_plan_of_every_point_has_a_fused_config_that_expresses_it(tokens: int) -> None:
    for model in GOAL_MODELS:
        point = Point(model, tokens)
        for name in (*grid.MAIN_PLANS, *grid.other_plans(point)):
            configs = own_configs(point, name, [], "H").values()
            assert [c for c in configs if c != SEPARATE] and not any(unsupported(c, plan_named(name)) for c in configs)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("tokens", "regime"), [(1, COLD), (256, COLD), (256, ROPE), (4, HOT)])
def test_all_that_a_step_checks_was_compiled_before(
    tokens: int, regime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stood_in(monkeypatch)
    asked = checked_as(monkeypatch)
    monkeypatch.setattr(grid, "TOKENS", (1, 256))
    point = Point("tiny", tokens, regime)
    for step, time in TIME.items():
        if (step == Step.PARTS and regime not in grid.PARTED) or (step == Step.PLANS and regime != COLD):
            continue
        asked.clear()
        time(setting_at(point, records_in(tmp_path / step), seconds_by({})))
        item = Item(step, point)
        assert bool(asked) == (step != Step.PARTS or point == Point("tiny", 256))
        assert set(asked) <= set(launched(item, [], "Fake GPU")), step
        assert set(asked) <= set(binaries(item)), "nothing is tuned: it is known before"


# ---------------------------------------------------------------- RoPE


@pytest.mark.usefixtures("tiny")
def test_points_with_rope_rotate_and_count_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked_as(monkeypatch)
    compared = {"one-rounding": "one-rounding", "deferred": "deferred", OWN: "one-rounding", "eager": "hf"}  # its plan
    monkeypatch.setattr(grid, "MAIN_PLANS", ("hf", "one-rounding", "deferred"))
    outputs: dict[tuple[str, str], torch.Tensor] = {}
    cold, rope = (
        kept(tmp_path / regime, Point("tiny", 4, regime), monkeypatch, outputs, compared) for regime in (COLD, ROPE)
    )
    turned = setting_at(Point("tiny", 4, ROPE), records_in(tmp_path / "turned"), seconds_by({})).problems[0]
    assert turned.positions.tolist() == [1000, 1001, 1002, 1003]
    assert {"hf", "eager", f"P1 F.rms_norm | cuBLAS | {OWN_KERNEL}"} <= {
        arm for step, arm in rope if step == Step.CHAINS
    }
    assert Kind.LOOP not in {row["kind"] for row in rope.values()} and (Step.PARTS, f"heads {OWN_KERNEL}") in rope
    for arm, plan in compared.items():
        bytes_of = [int(found[Step.CHAINS, arm]["bytes"]) for found in (cold, rope)]
        assert bytes_of[1] - bytes_of[0] == 4 * 4 * TINY.head_dim, f"{arm}: cos and sin in fp32"
        allowed = envelope(plan_named(plan), turned)["q"]
        assert not outside(outputs[ROPE, arm], allowed).any(), arm
        assert outside(outputs[COLD, arm], allowed).double().mean() > 0.5, f"{arm}: the test would not notice"


def kept(folder: Path, point: Point, monkeypatch, outputs: dict, arms: dict[str, str]) -> Found:
    """Rows of the point's parts and chains; q of those arms goes to outputs."""
    labelled(monkeypatch)
    real = castpoint.harness.gpu.point.measure

    def measure(measured, gpu, **options):
        outputs.update({(point.regime, arm.name): arm.call(0)[0] for arm in measured if arm.name in arms})
        return real(measured, gpu, **options)

    with monkeypatch.context() as patch:
        patch.setattr(castpoint.harness.gpu.point, "measure", measure)
        return swept(folder, seconds_by({}), point, (Step.PARTS, Step.CHAINS))
