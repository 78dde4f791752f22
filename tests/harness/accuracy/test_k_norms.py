"""K-norm weights in place of others: what each arm replaces, a control that is rounded like any weight, the parts of
the logits' squared error, and the prediction."""

import itertools
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from castpoint.harness.accuracy import k_norms
from castpoint.harness.accuracy.amplification import attention_logits
from castpoint.harness.accuracy.errors import error_stats
from castpoint.harness.accuracy.k_norms import NEAR_1, add_k_norms, arms, channel_parts, largest, measures
from castpoint.harness.problems.drawn import synthetic_problem
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.words import KNorms
from castpoint.variants.catalogue import plan_named
from castpoint.variants.problem import Problem
from castpoint.variants.spec import Chain, spec, truth

ARMS = [(KNorms.OWN, k) for k in KNorms] + [(KNorms.NEAR_1, k) for k in (KNorms.OWN, KNorms.NEAR_1)]


@pytest.fixture(scope="module")
def problem() -> Problem:
    return synthetic_problem("qwen3-0.6b", 0, 48)


def measured(problem: Problem, plan: str = "hf") -> dict[str, float]:
    return measures(problem, spec(plan_named(plan), problem), truth(problem), largest(problem))


def correctly_rounded(problem: Problem, weights: Tensor) -> float:
    given = problem.replace(k_norm_weight=weights.to(torch.bfloat16))
    return error_stats(actual=spec(plan_named("hf"), given).k, reference=truth(given).k).share_equal


# ---------------------------------------------------------------- arms


def test_the_control_is_rounded_like_any_other_weight(problem: Problem) -> None:
    """A product with a power of two is exact: weights of 1 or 64 take hf's fifth rounding of K away."""
    ones, own = torch.ones(128), correctly_rounded(problem, problem.k_norm_weight)
    control = correctly_rounded(problem, NEAR_1 * ones)
    for other in (63, 96.5, NEAR_1 * 63 / 64):
        assert correctly_rounded(problem, other * ones) == pytest.approx(control, abs=0.005), other
    assert own == pytest.approx(control, abs=0.005)
    assert correctly_rounded(problem, 64 * NEAR_1 * ones) == control
    exact = [correctly_rounded(problem, power * ones) for power in (1, 64)]
    assert exact[0] == exact[1] > control + 0.02


@pytest.mark.parametrize("offset", [False, True])
def test_an_arm_replaces_what_it_says_and_nothing_else(offset: bool) -> None:
    own = synthetic_problem("qwen3-0.6b", 0, 2, weight_offset=offset)
    at, found = largest(own), {(q, k): p for q, k, p in arms(own)}
    assert list(found) == ARMS and own.k_norm_weight.argmax() == at
    k, added = own.k_norm_weight.double() + offset, float(offset)
    alone, without = torch.full_like(k, NEAR_1), k.clone()
    alone[at], without[at] = k[at], NEAR_1
    expected = {
        KNorms.OWN: k,
        KNorms.NEAR_1: torch.full_like(k, NEAR_1),
        KNorms.ALL_LARGEST: torch.full_like(k, 96.5),
        KNorms.LARGEST_ALONE: alone,
        KNorms.WITHOUT_LARGEST: without,
    }
    q = {KNorms.OWN: own.q_norm_weight.double() + added, KNorms.NEAR_1: torch.full_like(k, NEAR_1)}
    for (q_norm, k_norm), arm in found.items():
        assert torch.equal(arm.k_norm_weight.double() + added, expected[k_norm]), k_norm
        assert torch.equal(arm.q_norm_weight.double() + added, q[q_norm]), q_norm
        assert arm.k_norm_weight.dtype == torch.bfloat16 and arm.weight_offset == offset
        same = {"k_norm_weight": own.k_norm_weight, "q_norm_weight": own.q_norm_weight}
        assert arm.replace(**same).inputs() == own.inputs(), "another input was replaced"


def test_the_largest_is_that_of_the_applied_weights() -> None:
    """Stored as w - 1, -4 is the factor -3, and 2.5 the factor 3.5."""
    own = synthetic_problem("qwen3-0.6b", 0, 1, weight_offset=True)
    weight = torch.zeros(128, dtype=torch.bfloat16)
    weight[5], weight[9] = -4, 2.5
    assert largest(own.replace(k_norm_weight=weight)) == 9


# ---------------------------------------------------------------- parts of the squared error


def terms(chain: Chain) -> Tensor:
    """q_j k_j / sqrt(d) of every pair that attention sees, [pairs, Dh]."""
    k = chain.k.repeat_interleave(chain.q.shape[1] // chain.k.shape[1], dim=1)
    products = torch.einsum("qhd,khd->hqkd", chain.q, k) / chain.q.shape[-1] ** 0.5
    return products[:, torch.ones(len(k), len(k), dtype=torch.bool).tril()].flatten(0, 1)


def test_parts_by_channel_are_those_written_out_and_sum_to_the_whole() -> None:
    small = synthetic_problem("qwen3-0.6b", 0, 7)
    chain, exact = spec(plan_named("hf"), small), truth(small)
    parts, each = channel_parts(chain, exact), terms(chain) - terms(exact)
    whole = each.sum(1).square().mean()
    logits = (attention_logits(chain.q, chain.k) - attention_logits(exact.q, exact.k)).nan_to_num()
    assert logits.square().sum().item() == pytest.approx(len(each) * whole.item(), rel=1e-9)
    assert torch.allclose(parts.shares, (each * each.sum(1, keepdim=True)).mean(0) / whole, rtol=0, atol=1e-13)
    assert torch.allclose(parts.squares, each.square().mean(0) / whole, rtol=0, atol=1e-13)
    assert parts.shares.sum().item() == pytest.approx(1, rel=1e-9)
    assert parts.terms == pytest.approx(terms(exact).square().sum(1).mean().sqrt().item(), rel=1e-9)
    row = measured(small)
    assert row["channel_share"] == parts.shares[row["channel"]].item() and row["channel"] == largest(small)
    assert row["cross_share"] == pytest.approx(1 - parts.squares.sum().item(), abs=1e-12)


def test_an_error_in_one_channel_is_that_channels(problem: Problem) -> None:
    exact, at = truth(problem), largest(problem)
    k = exact.k.clone()
    k[..., at] *= 1.01
    moved = Chain(**(vars(exact) | {"k": k}))
    row = measures(problem, moved, exact, at)
    assert row["channel_share"] == pytest.approx(1, rel=1e-9) and row["cross_share"] == pytest.approx(0, abs=1e-9)
    assert measures(problem, moved, exact, (at + 1) % 128)["channel_share"] == pytest.approx(0, abs=1e-9)


# ---------------------------------------------------------------- what is predicted


def test_weights_predict_the_error_and_the_logits_grow_with_it() -> None:
    """Over draws that differ by a factor of two and more; and the relative error stays. With q's weights all near 1 it
    is the rms of K's weights in every draw, 9.41."""
    found = []
    for seed in (3, 7, 10):
        rows = {
            key: measured(p) for *key, p in arms(synthetic_problem("qwen3-0.6b", 0, 48, seed)) for key in [tuple(key)]
        }
        base, own = rows[KNorms.OWN, KNorms.NEAR_1], rows[KNorms.OWN, KNorms.OWN]
        for (q_norm, _), row in rows.items():
            if q_norm == KNorms.OWN:
                multiple = row["logit_rms_error"] / base["logit_rms_error"]
                assert multiple == pytest.approx(row["logit_terms"] / base["logit_terms"], rel=0.06)
                assert multiple == pytest.approx(row["gain_predicted"] / base["gain_predicted"], rel=0.15)
                assert row["logit_rel_error"] == pytest.approx(base["logit_rel_error"], rel=0.08)
        found.append((own["logit_rms_error"] / base["logit_rms_error"], own["q_norm_there"]))
        assert rows[KNorms.OWN, KNorms.ALL_LARGEST]["gain_predicted"] == pytest.approx(96.5, rel=1e-9)
        assert rows[KNorms.NEAR_1, KNorms.OWN]["gain_predicted"] == pytest.approx(9.41, abs=0.02)
    assert max(found)[0] > 2 * min(found)[0]
    assert sorted(found) == sorted(found, key=lambda pair: pair[1]), "it follows the q weight drawn at that channel"


def test_ranks_of_weights_that_repeat() -> None:
    a, b = torch.tensor([1.0, -3, 2, 2, 5]), torch.tensor([2.0, 2, -7, 1, 3])
    ranks = [pd.Series(x.abs().numpy()).rank() for x in (a, b)]
    assert k_norms._rank_correlation(a, b) == pytest.approx(ranks[0].corr(ranks[1]), rel=1e-12)
    assert k_norms._rank_correlation(a, torch.ones(5)) is None


# ---------------------------------------------------------------- rows


def test_rows_of_every_arm_once_and_a_failure_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, turn = synthetic_problem("qwen3-0.6b", 0, 3), itertools.count()
    real = k_norms.spec

    def failing(*arguments: object) -> Chain:
        if next(turn) == 2:
            raise RuntimeError("no spec")
        return real(*arguments)

    monkeypatch.setattr(k_norms, "spec", failing)
    records = Records(tmp_path, {"tokens": 3}, {})
    add_k_norms(records, small, 4)
    add_k_norms(records, small, 4)
    rows = records.rows("k_norms")
    assert [(row["q_norm"], row["k_norm"]) for row in rows] == ARMS and next(turn) == len(ARMS)
    assert {(row["sample"], row["plan"], row["tokens"]) for row in rows} == {("4", "hf", "3")}
    assert [row["status"] for row in rows] == ["failed" if at == 2 else "ok" for at in range(len(ARMS))]
    assert rows[2]["reason"] == "RuntimeError: no spec" and rows[0]["k_norm_there"] == "96.5"
    add_k_norms(records, synthetic_problem("qwen3-0.6b", 0, 3, weight_offset=True), 4)
    assert {row["plan"] for row in records.rows("k_norms")} == {"hf", "gemma"}
