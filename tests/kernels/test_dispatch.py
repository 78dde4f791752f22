"""Which config a launch takes: the table's, else a reasoned one; and where neither is asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launches import CONFIGS
from support import KERNELS, ROOT, assert_bit_equal, random_problem

import castpoint.kernels.norm_qkv
from castpoint.kernels import dispatch
from castpoint.kernels.config import Config, candidates, default_config, unsupported
from castpoint.kernels.dispatch import chosen, launch_config, read_table, reasoned, write_table
from castpoint.kernels.plan import CastPlan
from castpoint.variants.catalogue import PLANS

PLAN, DEFERRED, WIDE = CastPlan(proj="bf16-rne"), PLANS["deferred"].plan, PLANS["fp32"].plan
SHAPE = (1024, 16, 8, 128)
SHAPES = (SHAPE, (5120, 64, 8, 128), (896, 14, 2, 64), (640, 4, 1, 256), (2048, 8, 1, 512), (48, 2, 1, 16))
SEPARATE = Config("separate")
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


# ---------------------------------------------------------------- the table


def test_the_table_is_read_as_it_was_written(tmp_path: Path):
    path = tmp_path / "dispatch.csv"
    table = {
        ("NVIDIA H200", SHAPE, "prologue"): {1: Config("split-k", splits=4), 16: SEPARATE},
        ("NVIDIA H200", SHAPE, "folded"): {4096: Config("fused", "hidden", 128, 64, 8, 4)},
    }
    write_table(table, path)
    assert read_table(path) == table and read_table(tmp_path / "none.csv") == {}
    path.write_text(path.read_text().replace("splits", "shares"))
    with pytest.raises(ValueError, match="must have the columns gpu, .*castpoint gpu --from-records"):
        read_table(path)


def test_dispatch_takes_the_next_larger_number_of_tokens():
    one, two = Config("split-k", splits=4), Config("fused", "hidden", 128, 64, 8, 4)
    table = {("H", SHAPE, "prologue"): {1: one, 256: two}}
    for tokens, config in ((1, one), (2, two), (256, two), (257, two), (8192, two)):
        assert dispatch.dispatch(table, "H", SHAPE, tokens, PLAN) == config
    cut_off = {("H", SHAPE, "prologue"): {1: one, 16: two}}
    assert dispatch.dispatch(cut_off, "H", SHAPE, 16, PLAN) == two
    assert dispatch.dispatch(cut_off, "H", SHAPE, 17, PLAN) is None, "few tokens say nothing of many"
    assert dispatch.dispatch(table, "H", (128, 2, 1, 16), 1, PLAN) is None
    assert dispatch.dispatch(table, "H", SHAPE, 1, PLAN.replace(scale="epilogue")) is None
    assert dispatch.dispatch(table, "H", SHAPE, 1, PLAN.replace(matmul="tf32", hidden="fp32")) is None


# ---------------------------------------------------------------- where it says nothing


@pytest.mark.parametrize(
    ("plan", "tokens", "config"),
    [
        (PLAN, 1, Config("split-k", "none", 16, 128, 8, 4, 4)),
        (PLAN, 16, Config("split-k", "none", 16, 128, 8, 4, 4)),
        (PLAN, 17, SEPARATE),
        (PLAN, 4096, SEPARATE),
        (PLAN, 0, Config("split-k", "none", 16, 128, 8, 4, 4)),
        (DEFERRED, 16, Config("split-k", "none", 16, 128, 8, 4, 4)),
        (DEFERRED, 64, Config("split-k", "none", 64, 128, 8, 4, 4)),
        (DEFERRED, 4096, Config("fused", "hidden", 128, 64, 8, 4)),
        (WIDE, 1, default_config(128, WIDE, False)),
        (WIDE, 4096, default_config(128, WIDE, False)),
    ],
)
def test_the_reasoned_config(plan: CastPlan, tokens: int, config: Config):
    assert reasoned(SHAPE, tokens, plan) == config


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("plan", PLANS)
def test_the_reasoned_config_expresses_its_plan(plan: str, shape: dispatch.Shape):
    plan = PLANS[plan].plan
    for tokens in (0, 1, 16, 17, 128, 129, 4096):
        config = reasoned(shape, tokens, plan)
        assert not unsupported(config, plan)
        if shape[3] == 512:  # wider than any candidate was sized for
            assert config in (default_config(512, plan, False), SEPARATE)
        elif plan.matmul == "bf16":
            assert config in candidates(max(1, tokens), shape[0], shape[1] + 2 * shape[2], shape[3])


def test_another_gpu_takes_it_and_says_so_once_a_shape():
    dispatch._say_once.cache_clear()
    with pytest.warns(UserWarning, match="no config for Another GPU.*arithmetic.*`castpoint gpu` measures"):
        assert chosen("Another GPU", SHAPE, 4096, PLAN) == SEPARATE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen("Another GPU", SHAPE, 1, DEFERRED) == reasoned(SHAPE, 1, DEFERRED)
        assert chosen("A third GPU", SHAPE, 1, WIDE).kernel == "fused", "wider operands have no rows by design"


COMPILE = """
import dataclasses, json
from castpoint.harness.compiled.compile import SHARED, compile_norm_qkv
from castpoint.kernels.dispatch import reasoned
from castpoint.variants.catalogue import PLANS

for head_dim in (64, 128, 256):
    for name, tokens in (("hf", 1), ("deferred", 64), ("deferred", 4096)):
        plan = PLANS[name].plan
        config = reasoned((2048, 8, 4, head_dim), tokens, plan)
        built = compile_norm_qkv(plan, "sm_90", head_dim=head_dim, tokens=tokens, residual=True, config=config)
        print(json.dumps([head_dim, name, tokens, built.shared <= SHARED["sm_90"], built.spills]))
"""


def test_it_fits_heads_of_every_size():
    """Compiled ahead of time, with a residual, whose loads wait in shared memory too."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(built) == 9
    assert not [one for one in built if not one[3] or (one[4] or 0) > 32]


# ---------------------------------------------------------------- launches


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU that is not there, and how often it is asked what it is."""
    fake = SimpleNamespace(name="NVIDIA H200", shared=227 * 1024, asked=[])

    def properties(index: int) -> SimpleNamespace:
        fake.asked.append(index)
        return SimpleNamespace(shared_memory_per_block_optin=fake.shared)

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: fake.name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(dispatch, "_committed", lambda: {})
    monkeypatch.setattr(dispatch, "_say_once", lambda *rest: None)
    dispatch._gpu.cache_clear()
    yield fake
    dispatch._gpu.cache_clear()


def test_a_launch_on_a_gpu_takes_the_chosen_config(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    for plan in (PLAN, DEFERRED, WIDE):
        for tokens in (1, 64, 4096):
            assert launch_config(GPU, SHAPE, tokens, plan, False) == reasoned(SHAPE, tokens, plan)
    assert launch_config(torch.device("cuda", 1), SHAPE, 1, PLAN, False) == reasoned(SHAPE, 1, PLAN)
    assert gpu.asked == [0, 1], "a launch must not ask the driver what GPU it is on, but for the first"
    tuned = Config("fused", "rstd", 64, 32)
    monkeypatch.setattr(dispatch, "_committed", lambda: {(gpu.name, SHAPE, "prologue"): {1: tuned}})
    assert launch_config(GPU, SHAPE, 1, PLAN, False) == tuned


def test_elsewhere_a_launch_takes_one_config_for_all_tokens(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    for plan in (PLAN, DEFERRED, WIDE):
        for tokens in (1, 4096):
            assert launch_config(GPU, SHAPE, tokens, plan, True) == default_config(128, plan, True)
            assert launch_config(CPU, SHAPE, tokens, plan, True) == default_config(128, plan, True)
            assert launch_config(CPU, SHAPE, tokens, plan, False) == default_config(128, plan, False)
            with monkeypatch.context() as amd:
                amd.setattr(torch.version, "hip", "6.4")
                assert launch_config(GPU, SHAPE, tokens, plan, False) == default_config(128, plan, False)
    assert not gpu.asked


def test_a_gpu_of_less_shared_memory_takes_candidates_only_where_it_was_tuned(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    gpu.name, gpu.shared = "NVIDIA GeForce RTX 4090", 99 * 1024
    assert launch_config(GPU, SHAPE, 1, PLAN, False) == default_config(128, PLAN, False)
    tuned = Config("split-k", "none", 16, 32, splits=2)
    monkeypatch.setattr(dispatch, "_committed", lambda: {(gpu.name, SHAPE, "prologue"): {1: tuned}})
    assert launch_config(GPU, SHAPE, 1, PLAN, False) == tuned


def test_norm_qkv_asks_where_it_is_given_no_config(monkeypatch: pytest.MonkeyPatch):
    """And runs what it is told, with either head norm: the same function, whose sums take another order."""
    problem, plan = random_problem(tokens=5, hidden_size=600, residual=False), PLAN.replace(proj="fp32", out="fp32")
    asked = []

    def answer(*facts: object) -> Config:
        asked.append(facts)
        return config

    for config in (Config("fused", "hidden", 16, 64), Config("split-k", "none", 16, 64, splits=3)):
        expected = KERNELS.run(plan, problem, config=config)
        with monkeypatch.context() as patch:
            patch.setattr(castpoint.kernels.norm_qkv, "launch_config", answer)
            found = [KERNELS.run(plan, problem, separate=separate) for separate in (False, True)]
            KERNELS.run(plan, problem, config=CONFIGS["fused, small tiles"])
        for outputs, name in ((outputs, name) for outputs in found for name in "qkv"):
            assert_bit_equal(actual=outputs[name], expected=expected[name], what=f"{config}, {name}")
        default = KERNELS.run(plan, problem)
        assert any(not torch.equal(default[name], expected[name]) for name in "qkv"), "the test would not notice"
    assert asked == [(problem.x.device, (600, 2, 1, 32), 5, plan, True)] * 4


@pytest.mark.parametrize("separate", [False, True])
def test_both_head_norms_run_where_separate_is_chosen(separate: bool, monkeypatch: pytest.MonkeyPatch):
    problem = random_problem(tokens=5)
    expected = KERNELS.run(PLAN, problem, config=SEPARATE)
    monkeypatch.setattr(castpoint.kernels.norm_qkv, "launch_config", lambda *facts: SEPARATE)
    for name, actual in KERNELS.run(PLAN, problem, separate=separate).items():
        assert_bit_equal(actual=actual, expected=expected[name], what=name)


def test_bits_depend_on_the_batch_where_the_config_does_and_not_with_one(monkeypatch: pytest.MonkeyPatch):
    """The property that a launch without a config gives up, and how to keep it."""
    plan = PLAN.replace(proj="fp32", out="fp32")
    problem = random_problem(tokens=70, hidden_size=600, residual=False)
    alone = problem.replace(x=problem.x[:1])
    by_tokens = {70: Config("fused", "none", 64, 64), 1: Config("split-k", "none", 16, 64, splits=3)}
    monkeypatch.setattr(
        castpoint.kernels.norm_qkv, "launch_config", lambda device, shape, tokens, *rest: by_tokens[tokens]
    )
    for config in (None, default_config(32, plan, True), default_config(32, plan, False)):
        batch, row = (KERNELS.run(plan, p, config=config) for p in (problem, alone))
        same = all(torch.equal(batch[name][:1], row[name]) for name in "qkv")
        assert same == (config is not None), config
