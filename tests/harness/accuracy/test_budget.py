"""The error budget: every subset against its spec, the whole against brute force, planted faults."""

import dataclasses
import math
from functools import cache

import pandas as pd
import pytest
import torch
from games import over_all_orders
from support import assert_bit_equal, small

import castpoint.harness.accuracy.shapley as module
from castpoint.harness.accuracy.amplification import amplification
from castpoint.harness.accuracy.budget import budget_rows
from castpoint.harness.accuracy.errors import error_stats
from castpoint.harness.accuracy.shapley import (
    Budget,
    Errors,
    budget,
    part,
    players,
    squared_errors,
    subsets,
)
from castpoint.harness.problems.drawn import synthetic_problem, with_positions
from castpoint.harness.runs.words import MEASURES
from castpoint.kernels.plan import BOUNDARIES, KEEP, PHASE_BOUNDARIES, RNE, ROPE_BOUNDARIES, RTZ, CastPlan
from castpoint.variants.catalogue import PLANS, plan_named
from castpoint.variants.problem import Problem
from castpoint.variants.spec import spec, truth

pytestmark = pytest.mark.usefixtures("alone")


def fitting(name: str, **changes: object) -> Problem:
    return small(plan_named(name).weight_offset != "none", **changes)


# ---------------------------------------------------------------- parts


def by_hand(plan: CastPlan, rounded: frozenset[str]) -> CastPlan | None:
    """The same arithmetic as a plan of its own, checked as one, made by taking roundings away; None where none is."""
    away = {name: KEEP for name in BOUNDARIES if name not in rounded}
    if plan.weight_offset == RNE and "weight_offset" not in rounded:
        away["weight_offset"] = "fp32"
    if plan.scale == "folded":
        if "scale" not in rounded:  # unfolded, x * w_in is the operand, kept in fp32
            away |= {"scale": "epilogue", "matmul": "fp32"}
        elif "x" not in rounded:
            return None
    elif "hidden" not in rounded and "matmul" not in rounded:
        away["matmul"] = "fp32"
    return plan.replace(**away)


def check_every_subset(errors_type: type[Errors], name: str, problem: Problem) -> int:
    """Every subset's q and k are its spec's, bit for bit, in the order and with the reuse of budget. How many."""
    plan, errors = plan_named(name), errors_type(problem)
    every = subsets(players(plan, problem))
    for rounded in every:
        q, k = errors.queries_and_keys(part(plan, rounded))
        chain = spec(by_hand(plan, rounded) or part(plan, rounded), problem)
        what = f"{name}, {sorted(rounded)}:"
        assert_bit_equal(actual=q, expected=chain.q, what=what)
        assert_bit_equal(actual=k, expected=chain.k, what=what)
    return len(every)


@pytest.mark.parametrize("name", PLANS)
def test_every_subset_is_the_spec_of_its_plan_bit_for_bit(name: str) -> None:
    assert check_every_subset(Errors, name, fitting(name)) == 2 ** len(players(plan_named(name), fitting(name)))


@pytest.mark.parametrize("name", ["hf", "one-rounding", "truncating", "folded"])
def test_every_subset_with_positions_too(name: str) -> None:
    problem = with_positions(small())
    rotated = players(plan_named(name), problem)
    assert set(rotated) - set(players(plan_named(name), small())) == {
        boundary for boundary in ROPE_BOUNDARIES if getattr(plan_named(name), boundary) != KEEP
    }
    check_every_subset(Errors, name, problem)


def test_what_phases_are_made_of_are_players_where_a_plan_rounds_it() -> None:
    plan, problem = plan_named("fp32").replace(inv_freq=RNE, position=RTZ, phase=RNE), with_positions(small())
    assert players(plan, problem) == ["x", *PHASE_BOUNDARIES, "out"] and players(plan, small()) == ["x", "out"]
    found = budget(plan, problem)["k_rel_ms"]
    assert all(found.parts[name] > found.parts["out"] for name in PHASE_BOUNDARIES)


def test_every_subset_without_head_norm_too() -> None:
    for name in ("hf", "folded", "cast-after-matmul"):
        check_every_subset(Errors, name, small(head_norm=False, bias=False))


class StaleProduct(Errors):
    """The matmul of the first subset is used for all."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.product = cache(lambda part: self._product(dataclasses.replace(part, hidden=RNE)))


class Forgets(Errors):
    """One rounding is left out of one subset."""

    def queries_and_keys(self, part: module.Part) -> tuple[torch.Tensor, torch.Tensor]:
        only_proj = part.proj != KEEP and part.hidden == part.head_normed == part.out == KEEP
        return super().queries_and_keys(dataclasses.replace(part, proj=KEEP) if only_proj else part)


class NoBias(Errors):
    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.problem = problem.replace(bias=None)


@pytest.mark.parametrize("fault", [StaleProduct, Forgets, NoBias])
def test_a_subset_evaluated_wrongly_is_noticed(fault: type[Errors]) -> None:
    with pytest.raises(AssertionError, match="elements differ"):
        check_every_subset(fault, "hf", small())


def test_roundings_that_stay_in_every_subset_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole would then be divided rightly, but into too little: the rest would pass for fp32 arithmetic."""
    right = module.part
    monkeypatch.setattr(f"{__name__}.part", lambda plan, rounded: right(plan, {*rounded, "normed"}))
    with pytest.raises(AssertionError, match="elements differ"):
        check_every_subset(Errors, "hf", small())


def test_every_rounding_of_every_plan_moves_its_outputs() -> None:
    """A player that moved nothing would be none; tf32x3 moves the last bits of fp32 alone."""
    for name, named in PLANS.items():
        problem = fitting(name, tokens=33, hidden_size=200)
        errors, names = Errors(problem), players(named.plan, problem)
        kept = errors.of(part(named.plan, ()))
        for player in names:
            assert errors.of(part(named.plan, {player})) != kept, f"{name}: {player}"


# ---------------------------------------------------------------- the value of a subset


def test_the_measures_are_those_of_the_tables() -> None:
    problem = small()
    exact, chain = truth(problem), spec(plan_named("hf"), problem)
    measured = squared_errors(chain.q, chain.k, exact)
    assert measured["k_rel_ms"] == pytest.approx(error_stats(actual=chain.k, reference=exact.k).rel_rms ** 2, rel=1e-12)
    table = amplification(problem, chain, exact)
    assert measured["logit_ms"] == pytest.approx(table["logit_rms_error"] ** 2, rel=1e-12)
    assert squared_errors(exact.q, exact.k, exact) == dict.fromkeys(MEASURES, 0.0)


def brute_force(plan: CastPlan, problem: Problem) -> dict[str, dict[str, float]]:
    """The budget again, by the tables' own error measures, specs of plans, and every order of players."""
    exact, names = truth(problem), players(plan, problem)
    values: dict[str, dict[frozenset[str], float]] = {measure: {} for measure in MEASURES}
    for rounded in subsets(names):
        chain = spec(by_hand(plan, rounded), problem)
        values["k_rel_ms"][rounded] = error_stats(actual=chain.k, reference=exact.k).rel_rms ** 2
        values["logit_ms"][rounded] = amplification(problem, chain, exact)["logit_rms_error"] ** 2
    return {measure: over_all_orders(game, names) for measure, game in values.items()}


def check_budget(name: str, problem: Problem, errors: Errors | None = None) -> None:
    expected = brute_force(plan_named(name), problem)
    for measure, divided in budget(plan_named(name), problem, errors).items():
        assert dict(divided.parts) == pytest.approx(expected[measure], rel=1e-9, abs=1e-12 * divided.total)


@pytest.mark.parametrize("name", ["hf", "cast-after-matmul", "deferred", "rstd-rounded", "gemma-bf16-offset"])
def test_the_budget_is_that_of_brute_force(name: str) -> None:
    check_budget(name, fitting(name))


def test_one_wrong_subset_in_the_middle_moves_the_budget() -> None:
    """The sum cannot see it: a subset's value enters once with each sign. So brute force must."""
    assert budget(plan_named("separate-head-norm"), small(), Forgets(small()))
    with pytest.raises(AssertionError):
        check_budget("separate-head-norm", small(), Forgets(small()))


# ---------------------------------------------------------------- the whole


@pytest.mark.parametrize("name", PLANS)
def test_parts_and_fp32_arithmetic_sum_to_the_plans_error(name: str) -> None:
    plan, problem = plan_named(name), fitting(name)
    exact, chain = truth(problem), spec(plan, problem)
    budgets = budget(plan, problem)
    assert budgets["k_rel_ms"].total == pytest.approx(error_stats(actual=chain.k, reference=exact.k).rel_rms ** 2)
    for divided in budgets.values():
        assert list(divided.parts) == players(plan, problem)
        assert math.fsum(divided.all_parts().values()) == pytest.approx(divided.total, rel=1e-9)
        assert 0 < divided.fp32 < 1e-8 * divided.total, "fp32 arithmetic makes as much as a rounding to bf16"


@pytest.mark.parametrize("name", ["hf", "folded", "cast-after-matmul", "truncating", "gemma-bf16-offset"])
def test_a_dropped_player_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = fitting(name)
    names = players(plan_named(name), problem)
    for dropped in names:
        monkeypatch.setattr(module, "players", lambda plan, problem, d=dropped: [n for n in names if n != d])
        with pytest.raises(RuntimeError, match="sum to .* whole error is .* is no player"):
            budget(plan_named(name), problem)


def test_a_budget_that_does_not_add_up_does_not_exist() -> None:
    Budget(total=3.0, fp32=0.5, parts={"hidden": 4.0, "out": -1.5})
    with pytest.raises(RuntimeError, match="sum to 3.0000.*, the plan's whole error is 3.0:"):
        Budget(total=3.0, fp32=0.5, parts={"hidden": 4.00001, "out": -1.5})
    with pytest.raises(RuntimeError):
        Budget(total=math.nan, fp32=0.5, parts={})


def test_another_problems_errors_are_noticed() -> None:
    with pytest.raises(RuntimeError, match="sum to"):
        budget(plan_named("hf"), small(), Errors(small(seed=1)))


def test_no_rounding_leaves_fp32_arithmetic() -> None:
    divided = budget(plan_named("fp32").replace(x=KEEP, out=KEEP), small())["k_rel_ms"]
    assert divided.parts == {} and divided.fp32 == divided.total > 0


def test_no_error_has_no_shares() -> None:
    assert Budget(total=0.0, fp32=0.0, parts={"out": 0.0}).share(0.0) == 0.0


# ---------------------------------------------------------------- what the parts must be


def test_rounding_the_same_value_twice_is_shared_in_halves() -> None:
    """Without head norm q and k are proj: rounding it, or what is stored, or both, is one rounding."""
    plan, problem = CastPlan(hidden=KEEP, matmul="fp32", proj=RNE), small(head_norm=False, residual=False)
    for divided in budget(plan, problem).values():
        assert divided.parts["proj"] == pytest.approx(divided.parts["out"], rel=1e-12)
        assert divided.parts["out"] > 0.49 * divided.total


def test_rounding_rstd_costs_nothing_where_a_head_norm_follows_in_fp32() -> None:
    """One factor a token cancels in the head norm, and does not without one."""
    plan = CastPlan(hidden=KEEP, matmul="fp32", rstd=RNE)
    shares = {}
    for head_norm in (True, False):
        problem = small(head_norm=head_norm, residual=False, bias=False, tokens=33, hidden_size=200)
        divided = budget(plan, problem)["k_rel_ms"]
        shares[head_norm] = divided.share(divided.parts["rstd"])
    assert abs(shares[True]) < 1e-3 and shares[False] > 0.2


def test_a_power_of_two_in_the_k_norm_leaves_every_share() -> None:
    own = synthetic_problem("qwen3-0.6b", 0, 8)
    ones = torch.ones_like(own.k_norm_weight)
    small_k, large_k = (budget(plan_named("hf"), own.replace(k_norm_weight=w * ones)) for w in (1, 64))
    for player, value in small_k["k_rel_ms"].parts.items():
        assert large_k["k_rel_ms"].parts[player] == pytest.approx(value, rel=1e-9)
        assert large_k["logit_ms"].parts[player] == pytest.approx(64**2 * small_k["logit_ms"].parts[player], rel=1e-9)


def test_a_rounding_that_makes_up_for_another_keeps_its_sign_in_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A truncated variance makes rstd and K too large, a truncated store makes K too small, and by more."""
    plan = CastPlan(hidden=KEEP, matmul="fp32", variance=RTZ, out=RTZ)
    problem = small(head_norm=False, residual=False, bias=False, tokens=33, hidden_size=200)
    monkeypatch.setattr("castpoint.harness.accuracy.budget.plan_named", lambda name: plan)
    rows = pd.DataFrame(budget_rows("compensating", problem))
    for _, measured in rows.groupby("measure"):
        shares = measured.set_index("player")["share"]
        assert shares["variance"] < -0.01 and shares["out"] > 1.01
        assert shares.sum() == pytest.approx(1, rel=1e-9)


def test_truncation_costs_more_than_rounding_at_the_same_boundary() -> None:
    """Twice the largest error, and a bias on top: uniform errors of [0, 1] ulp against [-1/2, 1/2] have four times the
    mean square."""
    problem = small(residual=False, tokens=33, hidden_size=200)
    rounded, truncated = (
        budget(CastPlan(hidden=KEEP, matmul="fp32", out=mode), problem)["k_rel_ms"].parts["out"] for mode in (RNE, RTZ)
    )
    assert truncated / rounded == pytest.approx(4, rel=0.15)


def test_real_size_every_plan_equals_its_spec_and_adds_up() -> None:
    """qwen3-0.6b, layer 0, 64 tokens: 3 s for 579 parts. The empty subset is an fp32 plan's spec."""
    for offset in (False, True):
        problem = synthetic_problem("qwen3-0.6b", 0, 64, weight_offset=offset)
        errors = Errors(problem)
        for name, named in PLANS.items():
            if (named.plan.weight_offset != "none") != offset:
                continue
            full = part(named.plan, players(named.plan, problem))
            for subset, plan in ((full, named.plan), (part(named.plan, ()), by_hand(named.plan, frozenset()))):
                q, k = errors.queries_and_keys(subset)
                chain = spec(plan, problem)
                assert_bit_equal(actual=q, expected=chain.q, what=f"{name} q")
                assert_bit_equal(actual=k, expected=chain.k, what=f"{name} k")
            for divided in budget(named.plan, problem, errors).values():
                assert divided.fp32 < 1e-8 * divided.total


# ---------------------------------------------------------------- wrong use


def test_what_cannot_be_divided_is_refused_in_one_sentence() -> None:
    problem = small()
    poisoned = problem.x.clone()
    poisoned[0, 0] = torch.nan
    for bad in (problem.replace(x=poisoned), problem.replace(residual=poisoned)):
        with pytest.raises(ValueError, match="without NaN and infinity"):
            budget(plan_named("hf"), bad)
    with pytest.raises(ValueError, match="at least one token"):
        budget(plan_named("hf"), small(tokens=0))
    with pytest.raises(ValueError, match="weight_offset=True"):
        budget(plan_named("gemma"), problem)
    with pytest.raises(ValueError, match="overflow fp32"):
        budget(plan_named("hf"), problem.replace(qkv_weight=torch.full_like(problem.qkv_weight, 3e38)))
    with pytest.raises(KeyError, match="did you mean 'hf'"):
        list(budget_rows("hff", problem))
