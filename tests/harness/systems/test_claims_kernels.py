"""Claims on a fused kernel: what they measure changes where it must, and their verdicts follow from it."""

from __future__ import annotations

import math

import pytest

from castpoint.harness.problems.drawn import synthetic_problem
from castpoint.harness.systems import claims_kernels, claims_model
from castpoint.harness.systems.claims import said
from castpoint.harness.systems.found import Figure
from castpoint.variants.problem import Problem

FP32_CHAIN = claims_kernels.fp32_chain


@pytest.fixture(autouse=True)
def one_layer(monkeypatch: pytest.MonkeyPatch) -> Problem:
    """Every claim measured on one drawn layer, which stands for Gemma's too."""
    problem = synthetic_problem(tokens=8)
    found = {"drawn": [problem], claims_kernels.GEMMA: [problem]}
    monkeypatch.setattr(claims_kernels, "layers", lambda short: found)
    return problem


def test_every_claim_was_made_and_has_its_words() -> None:
    listed = said()
    assert len(listed) == 16 and all(source and words for source, words in listed.values())
    assert set(claims_kernels.MEASURES | claims_model.MEASURES) <= set(listed)


@pytest.mark.parametrize("claim", claims_kernels.MEASURES)
def test_a_claim_is_judged_with_numbers(claim: str) -> None:
    found = claims_kernels.MEASURES[claim](True)
    row = found.row(claim, *said()[claim])
    assert found.figures and row.figure and row.how and row.conditions
    assert all(math.isfinite(v) for figure in found.figures for v in figure.measured)


def test_relative_error_does_not_see_the_weight_and_the_absolute_one_grows_with_it(one_layer: Problem) -> None:
    """Sixteen times the K-norm weights: sixteen times the difference behind the norm, to the last digit."""
    own = claims_kernels._amplified(one_layer)
    times_16 = claims_kernels._amplified(one_layer.replace(k_norm_weight=one_layer.k_norm_weight * 16))
    assert times_16["times"] == pytest.approx(16 * own["times"], rel=1e-12)
    assert times_16["relative error, times"] == pytest.approx(own["relative error, times"], rel=1e-12)


def test_a_norm_outside_amplifies_as_one_inside(one_layer: Problem) -> None:
    found = claims_kernels._inside_and_outside(one_layer)
    inside, outside = (found[f"largest gain of a channel, K norm {place}"] for place in ("inside", "outside"))
    assert 0.5 < outside / inside < 2


def test_casting_before_the_matmul_alone_leaves_pytorchs_bits_unmet() -> None:
    left = [f for f in claims_kernels.c5(True).figures if f.what == "K unequal to PyTorch's: bf16-operand"]
    assert min(value for figure in left for value in figure.measured) > 0.3


def test_a_wrong_eps_is_no_agreement_in_float32(one_layer: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    right = claims_kernels._in_float32(one_layer)["largest difference, of the largest value"]
    monkeypatch.setattr(claims_kernels, "fp32_chain", lambda problem: FP32_CHAIN(problem.replace(eps=1e-3)))
    assert claims_kernels._in_float32(one_layer)["largest difference, of the largest value"] > 100 * right


def samples(of_plan: float, shuffled: float) -> dict[tuple[str, str], list[float]]:
    arm = "Gemma 3 270M, its own weights"
    found = {(claims_model.OWN_SURE, f"{arm}: eager"): [1.0], (claims_model.SHUFFLED, f"{arm}: eager"): [shuffled]}
    found |= {(claims_model.KL_AGAIN, f"{arm}: eager"): [1e-3]}
    for plan in claims_model.PLANS:
        found |= {(claims_model.SURE, f"{arm}: {plan}"): [of_plan], (claims_model.KL, f"{arm}: {plan}"): [1e-3]}
    return found


@pytest.mark.parametrize("of_plan, verdict", [(1.1, "not reproduced"), (7.0, "reproduced")])
def test_gibberish_is_what_lies_nearer_to_shuffled_tokens(of_plan: float, verdict: str) -> None:
    found = claims_model.judged(["Gemma 3 270M, its own weights"], samples(of_plan, 9.0))
    assert found.verdict == verdict


def test_a_figure_keeps_its_median_and_its_ends() -> None:
    row = Figure("x", "y", [3.0, 1.0, 2.0], (0.5, 4.0), "nats").row("A1")
    assert (row.measured, row.measured_low, row.measured_high, row.samples) == (2.0, 1.0, 3.0, 3)
    assert (row.claimed, row.claimed_high) == (0.5, 4.0)
