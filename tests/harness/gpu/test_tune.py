"""What is checked before it is timed, and which config tuning and dispatch choose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_cuda import FakeCuda
from gpu_support import SHAPE, labelled, records_in, rows, seconds_by

from castpoint.harness.conformance import cuda as gpu_checks
from castpoint.harness.gpu import tune
from castpoint.harness.peers.chains import Peer
from castpoint.harness.problems.grid import Point
from castpoint.harness.runs.schema import Check, Kind
from castpoint.kernels import dispatch
from castpoint.kernels.config import Config
from castpoint.kernels.dispatch import chosen, fallback, read_table, write_table
from castpoint.kernels.plan import CHOICES, CastPlan
from castpoint.variants.catalogue import PLANS, plan_named

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
    return Peer(Kind.OWN, name, lambda i: (torch.full([2, 4], float(i)),), config=config)


def test_tuning_takes_what_beats_separate_by_more_than_the_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    labelled(monkeypatch)
    monkeypatch.setattr(tune, "checked", lambda *rest, **more: {"status": "ok"})
    monkeypatch.setattr(tune, "own_peer", stand_in)
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
    monkeypatch.setattr(tune, "own_peer", stand_in)
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
