"""What must hold before a kernel is timed: each binary once, and which launches share one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from fake_cuda import FakeCuda
from gpu_support import records_in, rows
from support import random_problem

from castpoint.harness.conformance import cuda
from castpoint.harness.conformance.cuda import TOKENS, WIDTHS, Binary, Checks, binary_of
from castpoint.harness.problems import grid
from castpoint.harness.problems.exact import PRODUCTS, exact_problem
from castpoint.harness.problems.geometry import geometry_named
from castpoint.harness.runs.words import Check
from castpoint.harness.timing.cuda import DeviceLost
from castpoint.kernels.config import Config
from castpoint.variants.catalogue import PLANS, plan_named

SEPARATE, FUSED, SPLIT = Config("separate"), Config(block_m=64, block_k=64), Config("split-k", block_m=16, splits=4)
AFTER = Config("fused", "hidden", 64, 64)

# ---------------------------------------------------------------- which binary a launch takes


def test_one_token_has_a_split_k_binary_of_its_own() -> None:
    one, two = (binary_of("hf", SPLIT, tokens, 1024) for tokens in (1, 2))
    assert (one.tokens, two.tokens) == (1, TOKENS) and binary_of("hf", SPLIT, 4096, 1024) == two
    assert {binary_of("hf", config, 1, 1024).tokens for config in (SEPARATE, FUSED, AFTER)} == {TOKENS}
    assert {p.tokens for p in cuda.problems_for(plan_named("gemma"), Check.EXACT, "cpu", tokens=1)} == {1}
    assert two == binary_of("hf", Config("split-k", block_m=16, splits=7), 16, 1024), "shares are no constant of it"
    assert len({binary_of("hf", SPLIT, 2, 1024, rope) for rope in (False, True)}) == 2


def test_a_kernel_before_the_matmul_has_a_binary_by_width() -> None:
    for config in (SEPARATE, AFTER, Config("fused", "rstd", 64, 64), Config("split-k", "hidden", 64, 64)):
        assert binary_of("hf", config, 16, 5120) != binary_of("hf", config, 16, 1024)
        assert binary_of("hf", config, 16, 5120) != binary_of("hf", config, 16, 4096)
    for config in (FUSED, SPLIT):
        assert binary_of("hf", config, 16, 5120) == binary_of("hf", config, 16, 1024)
    assert binary_of("", AFTER, 4096, 5120) == Binary("", AFTER), "our loop by itself has none before it"


@pytest.mark.parametrize("model", grid.MODELS)
def test_the_width_of_every_model_is_checked_with_as_many_channels_a_program(model: str) -> None:
    width = geometry_named(model).hidden_size
    checked = binary_of("one-rounding", SEPARATE, 16, width).hidden_size
    assert triton.next_power_of_2(checked) == triton.next_power_of_2(width)
    named, found = WIDTHS[triton.next_power_of_2(width)]
    assert found == checked == geometry_named(named).hidden_size and len({w for _, w in WIDTHS.values()}) == len(WIDTHS)


@pytest.mark.parametrize("check", cuda.AGAINST_SPEC)
def test_checks_rotate_with_rope_and_are_as_wide_as_asked(check: Check) -> None:
    for rope, width in ((False, 1024), (True, 2560)):
        problems = cuda.problems_for(plan_named("hf"), check, "cpu", rope, hidden_size=width)
        assert len(problems) == (2 if check == Check.EXACT else 1)
        for problem in problems:
            assert (problem.positions is not None) == rope and problem.head_dim == 128
            assert problem.x.shape == (TOKENS, width)


# ---------------------------------------------------------------- checks, each once


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    def problems_for(plan, check, device, rope=False, tokens=5, hidden_size=64):
        if check == Check.EXACT:
            shape = {"tokens": 5, "hidden_size": 64, "num_q_heads": 2, "num_kv_heads": 1, "head_dim": 16, "rope": rope}
            return [exact_problem(plan, products=products, **shape) for products in PRODUCTS]
        return [random_problem(tokens=5, weight_offset=plan.weight_offset != "none", rope=rope)]

    monkeypatch.setattr(cuda, "problems_for", problems_for)


def ran(monkeypatch: pytest.MonkeyPatch, instead: Callable[..., Any] | None = None) -> list[tuple[str, Config]]:
    """What the checks will have run, (plan, config); instead: of the real one, which it is given."""
    real, names, seen = cuda.run_triton, {named.plan: name for name, named in PLANS.items()}, []

    def run_triton(plan, problem, config):
        seen.append((names[plan], config))
        return instead(real, plan, problem, config) if instead else real(plan, problem, config=config)

    monkeypatch.setattr(cuda, "run_triton", run_triton)
    return seen


@pytest.mark.usefixtures("small")
def test_right_binaries_pass_and_each_is_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = ran(monkeypatch)
    found = [Binary("hf", SEPARATE), Binary("hf", FUSED), Binary("gemma", SEPARATE), Binary("deferred", SPLIT)]
    found.append(Binary("hf", FUSED, rope=True))
    checks = Checks(records_in(tmp_path), FakeCuda())
    assert [checks.why_red(binary) for binary in (*found, *found)] == [""] * 10
    assert len(seen) == 2 * 3 * len(found), "two runs, of two exact problems and one that is drawn"
    again = Checks(records_in(tmp_path), FakeCuda())
    assert not any(again.why_red(binary) for binary in found) and len(seen) == 2 * 3 * len(found), "checked in vain"
    written = rows(tmp_path, "gpu_checks")
    assert [row["check"] for row in written] == ["exact", "envelope"] * len(found)
    assert {(row["status"], row["share_equal"] == "1") for row in written if row["check"] == "exact"} == {("ok", True)}


@pytest.mark.usefixtures("small")
def test_configs_of_a_plan_share_its_spec_and_no_other_plan_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, real = [], cuda.reference
    monkeypatch.setattr(cuda, "reference", lambda *of: made.append(of) or real(*of))
    checks = Checks(records_in(tmp_path), FakeCuda())
    order = [Binary("hf", SEPARATE), Binary("hf", FUSED), Binary("hf", FUSED, rope=True), Binary("folded", FUSED)]
    assert not any(checks.why_red(binary) for binary in (*order, Binary("hf", AFTER)))
    assert len(made) == 2 * 4, "of hf twice, turned, and of folded"


@pytest.mark.usefixtures("small")
def test_a_wrong_kernel_is_red_where_it_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it rotates, in one config: its plan as another, and without RoPE, is not."""

    def wrong(real, plan, problem, config):
        return real(plan.replace(products="fp32") if config == FUSED else plan, problem, config=config)

    seen = ran(monkeypatch, wrong)
    checks = Checks(records_in(tmp_path), FakeCuda())
    red = Binary("hf", FUSED, rope=True)
    why = checks.why_red(red)
    assert why.startswith(f"{FUSED}, RoPE, ") and "elements" in why
    assert not checks.why_red(Binary("hf", FUSED)) and not checks.why_red(Binary("hf", SEPARATE, rope=True))
    runs = len(seen)
    assert Checks(records_in(tmp_path), FakeCuda()).why_red(red) == why and len(seen) == runs, "a rerun forgets"


@pytest.mark.usefixtures("small")
def test_two_runs_that_differ_are_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second alone, which is not held to the spec."""
    seen: list[Any] = []

    def other(real, plan, problem, config):
        q, k, v = real(plan, problem, config=config)
        seen.append(config)
        return (-q, k, v) if len(seen) == 4 else (q, k, v)  # the second run of the second problem

    ran(monkeypatch, other)
    assert Checks(records_in(tmp_path), FakeCuda()).why_red(Binary("hf", FUSED)).endswith("exact: two runs differ")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dead", [False, True])
def test_a_kernel_that_raises_is_a_row(dead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it took the context along, one that the next process finds."""
    gpu = FakeCuda()

    def broken(*rest):
        gpu.dead = dead
        raise RuntimeError("an illegal memory access\nwas encountered")

    ran(monkeypatch, broken)
    checks = Checks(records_in(tmp_path), gpu)
    if dead:
        with pytest.raises(DeviceLost):
            checks.why_red(Binary("hf", FUSED))
        checks = Checks(records_in(tmp_path), FakeCuda())
    assert "RuntimeError: an illegal memory access was encountered" in checks.why_red(Binary("hf", FUSED))
    (row,) = rows(tmp_path, "gpu_checks")
    assert (row["status"], row["check"], row["config"]) == ("failed", "exact", str(FUSED))


def test_an_element_outside_its_bounds_is_red_by_one() -> None:
    """The judge of both checks."""
    right = torch.ones(2, 3, dtype=torch.bfloat16)
    expected = right.double()
    found = cuda._judged([(right,), (right,)], [expected], [(expected, expected)], "differ")
    assert found == {"share_equal": 1.0, "elements": 6, "status": "ok", "reason": ""}
    wrong = right.clone()
    wrong[1, 2] = float("nan")
    found = cuda._judged([(wrong,), (wrong,)], [expected], [(expected, expected)], "differ")
    assert found["status"] == "red" and found["reason"].startswith("1 of 6 elements differ")
