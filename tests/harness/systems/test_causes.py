"""Causes planted in a small decoder: each does what its name says, no more, and the verdicts follow."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import IDS, tiny_model

from castpoint.harness.systems import causes, claims, claims_parallel
from castpoint.harness.systems.causes import LOGITS, OUTPUT, SCORES, ULP, UNLOADED, apart, ran
from castpoint.harness.systems.weights import of_model

WEIGHTS = of_model(tiny_model("qwen2"), "tiny")
CONFIG, STATE = WEIGHTS.config, WEIGHTS.all(torch.float32)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = {"theirs": IDS[:8], "another": IDS[8:20]}
    for module in (causes, claims_parallel):
        monkeypatch.setattr(module, "model", lambda source: (CONFIG, STATE, prompts))
    monkeypatch.setattr(claims_parallel, "measured", causes.measured.__wrapped__)
    monkeypatch.setattr(claims_parallel, "SEEDS", 4)


def test_an_unloaded_bias_shows_right_behind_its_projection_as_it_was_drawn() -> None:
    planted = causes.with_unloaded_bias(CONFIG, STATE, 0)
    bias = planted["model.layers.0.self_attn.o_proj.bias"]
    found = apart(ran(CONFIG, planted, IDS), ran(CONFIG, STATE, IDS))
    assert found[OUTPUT] == pytest.approx(bias.abs().max().item(), rel=1e-5) and found[SCORES] == 0
    bound = 1 / math.sqrt(CONFIG.num_q_heads * CONFIG.head_dim)
    assert 0.9 * bound < bias.abs().max() <= bound and not STATE.keys() >= planted.keys()
    assert not torch.equal(bias, causes.with_unloaded_bias(CONFIG, STATE, 1)["model.layers.0.self_attn.o_proj.bias"])
    linear = torch.nn.Linear(64, 4000)  # what the project's parameter keeps: that of torch.nn.Linear
    assert linear.bias.abs().max().item() == pytest.approx(1 / 8, rel=0.01)


@pytest.mark.parametrize("projections", ["k", "qkv"])
def test_a_forgotten_bias_is_that_of_no_other_projection(projections: str) -> None:
    changed = {name for name, t in causes.without(STATE, projections).items() if not torch.equal(t, STATE[name])}
    assert {name.split(".")[-2][0] for name in changed} == set(projections)
    assert all(name.endswith("_proj.bias") for name in changed) and len(changed) == 3 * len(projections)


def test_an_ulp_on_k_is_one_of_float32_and_of_every_element() -> None:
    value = torch.tensor([1.0, -150.0, 1e-3])
    moved = causes.one_ulp("k", 0, value)
    assert moved is not None and (moved - value)[1].item() == -(2.0**-16) and (moved.abs() > value.abs()).all()
    assert causes.one_ulp("q", 0, value) is None


def test_a_reduction_in_bf16_is_wrong_by_bf16_and_not_by_more() -> None:
    found = apart(ran(CONFIG, STATE, IDS, causes.reduced_in_bf16(CONFIG, STATE)), ran(CONFIG, STATE, IDS))
    size = ran(CONFIG, STATE, IDS).kept["output", 0].abs().max().item()
    assert 2**-10 * size < found[OUTPUT] < 2**-6 * size


@pytest.mark.parametrize("claim", claims_parallel.MEASURES)
def test_a_claim_is_judged_with_numbers(claim: str) -> None:
    found = claims_parallel.MEASURES[claim](False)
    row = found.row(claim, *claims.said()[claim])
    assert row.figure and row.conditions and all(math.isfinite(v) for f in found.figures for v in f.measured)


def test_only_what_is_drawn_anew_changes_from_run_to_run() -> None:
    found = claims_parallel.a4(False)
    spread = {figure.cause: list(figure.measured) for figure in found.figures}
    assert len(set(spread.pop(UNLOADED))) == 4 and all(values == [0.0] for values in spread.values())
    assert found.verdict == "explained otherwise"


def test_a_claim_is_reproduced_where_rounding_reaches_what_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    reached = causes.measured.__wrapped__("", True)[LOGITS, ULP]
    monkeypatch.setitem(claims_parallel.CLAIMED, LOGITS, (reached[0], reached[0]))
    assert claims_parallel.a2(True).verdict == "reproduced"


@pytest.mark.parametrize("said, covered", [((2.0,), True), ((4.0,), False), ((2.5, 9.0), True), ((0.1, 0.9), False)])
def test_a_range_covers_what_it_overlaps(said: tuple[float, ...], covered: bool) -> None:
    assert claims_parallel.covers([1.0, 3.0], said) is covered
