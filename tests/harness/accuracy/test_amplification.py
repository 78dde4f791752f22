"""Amplification: the closed form, what a uniform weight scales and what it leaves, flips and total variation."""

import dataclasses

import pytest
import torch

from castpoint.harness.accuracy.amplification import amplification, attention_logits, channel_gains
from castpoint.harness.problems.drawn import synthetic_problem
from castpoint.variants.catalogue import plan_named
from castpoint.variants.problem import Problem
from castpoint.variants.spec import Chain, spec, truth


@pytest.fixture(scope="module")
def problem() -> Problem:
    return synthetic_problem("qwen3-0.6b", 0, 32)


def measured(problem: Problem, plan: str = "hf") -> dict[str, float]:
    return amplification(problem, spec(plan_named(plan), problem), truth(problem))


def test_a_power_of_two_in_every_channel_scales_absolute_errors_and_nothing_relative(problem: Problem) -> None:
    """To the bit, since no product with it is rounded. Other weights add a rounding: tests of k_norms."""
    ones = torch.ones_like(problem.k_norm_weight)
    one, many = (measured(problem.replace(k_norm_weight=w * ones)) for w in (1, 64))
    for name in ("k_max_abs_after", "logit_rms_error", "logit_max_error", "gain_measured_max", "gain_predicted_max"):
        assert many[name] == pytest.approx(64 * one[name], rel=1e-9), name
    for name in ("k_rel_rms_before", "k_rel_rms_after", "k_max_abs_before"):
        assert many[name] == pytest.approx(one[name], rel=1e-9), name


def test_predicted_gain_is_the_weight_over_rms(problem: Problem) -> None:
    exact, chain = truth(problem), spec(plan_named("hf"), problem)
    predicted, gained = channel_gains(problem, chain, exact)
    weight = problem.k_norm_weight.double()
    k = problem.split_heads(exact.proj)[1]
    rms = k.square().mean(-1).sqrt()
    assert (predicted >= weight / rms.max() * 0.999).all() and (predicted <= weight / rms.min() * 1.001).all()
    assert ((gained / predicted - 1).abs() < 0.1).all(), "first order and measurement part by more than a tenth"


def test_an_error_in_one_channel_is_multiplied_by_its_gain(problem: Problem) -> None:
    """A planted error e in channel j comes out as w_j / r e (1 - n_j^2 / d)."""
    exact = truth(problem)
    channel = int(problem.k_norm_weight.argmax())
    proj = exact.proj.clone()
    proj[:, problem.num_q_heads : problem.num_q_heads + problem.num_kv_heads, channel] += 1e-6
    predicted, gained = channel_gains(problem, dataclasses.replace(exact, proj=proj), exact)
    k = problem.split_heads(exact.proj)[1]
    r = (k.square().mean(-1) + problem.eps).sqrt()
    factor = 96.5 / r * (1 - (k[..., channel] / r).square() / problem.head_dim)
    assert gained[channel].item() == pytest.approx(factor.square().mean().sqrt().item(), rel=1e-4)
    assert gained[channel] < predicted[channel] and (predicted > 0).sum() == 1


def test_a_common_scale_error_cancels(problem: Problem) -> None:
    exact = truth(problem)
    _, gained = channel_gains(problem, dataclasses.replace(exact, proj=exact.proj * 1.001), exact)
    predicted, _ = channel_gains(problem, dataclasses.replace(exact, proj=exact.proj * 1.001), exact)
    assert (gained < predicted * 1e-3).all()


def test_no_error_no_amplification(problem: Problem) -> None:
    exact = truth(problem)
    row = amplification(problem, exact, exact)
    zero = {name: value for name, value in row.items() if name not in ("k_norm_max",)}
    assert row["k_norm_max"] == 96.5 and set(zero.values()) == {0.0}


def with_k(chain: Chain, k: torch.Tensor) -> Chain:
    return dataclasses.replace(chain, k=k)


def test_flips_and_total_variation_by_hand() -> None:
    problem = synthetic_problem("qwen3-0.6b", 0, 2)
    exact = truth(problem)
    swapped = with_k(exact, exact.k.flip(0))
    row = amplification(problem, swapped, exact)
    logits = attention_logits(exact.q, exact.k)
    assert logits.shape == (16, 2, 2) and logits[:, 0, 1].isinf().all()
    p = logits[:, 1].softmax(-1)
    variation = (p[:, 0] - p[:, 1]).abs()  # swapping two keys swaps their two probabilities
    assert row["softmax_tv_max"] == pytest.approx(variation.max().item(), rel=1e-12)
    assert row["softmax_tv_mean"] == pytest.approx(variation.mean().item() / 2, rel=1e-12)  # the first row sees one key
    assert row["top_key_flips"] == 0.5


def test_grouped_heads_share_a_key(problem: Problem) -> None:
    exact = truth(problem)
    logits = attention_logits(exact.q, exact.k)
    by_hand = exact.q[5, 3] @ exact.k[2, 1] / 128**0.5  # query heads 2 and 3 read key head 1
    assert logits[3, 5, 2].item() == pytest.approx(by_hand.item(), rel=1e-12)


def test_gemma_weights_are_applied_as_one_plus_w() -> None:
    row = measured(synthetic_problem("qwen3-0.6b", 0, 8, weight_offset=True), "gemma")
    assert row["k_norm_max"] == 96.5
