"""Shapley values against every order of players; who plays; and what a kernel adds to its spec, which is no part."""

import dataclasses
import math
from collections.abc import Callable

import pytest
from games import Game, over_all_orders
from hypothesis import given
from hypothesis import strategies as st
from support import small

import castpoint.harness.accuracy.shapley as module
from castpoint.harness.accuracy.shapley import (
    order_of_sums,
    players,
    shapley,
    subsets,
)
from castpoint.harness.problems.exact import exact_problem
from castpoint.harness.runs.words import PLAYERS
from castpoint.kernels.plan import BOUNDARIES, KEEP, CastPlan
from castpoint.variants.catalogue import plan_named

pytestmark = pytest.mark.usefixtures("alone")


# ---------------------------------------------------------------- Shapley values of any game


@st.composite
def games(draw: st.DrawFn, least: int = 0) -> tuple[list[str], dict[frozenset[str], float]]:
    names = list("abcde"[: draw(st.integers(least, 5))])
    return names, {subset: draw(st.floats(-100, 100)) for subset in subsets(names)}


def check_game(solve: Callable[[Game, list[str]], dict[str, float]], game: tuple[list[str], Game]) -> None:
    """The definition, and the three properties that single it out among linear ones."""
    names, values = game
    parts = solve(values, names)
    assert parts == pytest.approx(over_all_orders(values, names), abs=1e-9)
    assert math.fsum(parts.values()) == pytest.approx(values[frozenset(names)] - values[frozenset()], abs=1e-9)
    dummy = {s: values[s - {"a"}] for s in values}  # a adds nothing to anyone
    assert solve(dummy, names).get("a", 0) == 0
    twins = {s: values[s - {"b"} | {"a"} if "b" in s and "a" not in s else s] for s in values}  # b does what a does
    alike = solve(twins, names)
    assert alike.get("a", 0) == pytest.approx(alike.get("b", alike.get("a", 0)), abs=1e-9)


@given(games())
def test_shapley_values_are_the_mean_over_all_orders(game: tuple[list[str], Game]) -> None:
    check_game(shapley, game)


def banzhaf(values: Game, names: list[str]) -> dict[str, float]:
    """Every subset weighs the same: a usual mistake, equal for two players."""
    every = subsets(names)
    return {n: sum(values[s | {n}] - values[s] for s in every if n not in s) / 2 ** (len(names) - 1) for n in names}


def one_order(values: Game, names: list[str]) -> dict[str, float]:
    """What each adds in the order of the chain alone: sums to the whole, and depends on the order."""
    before = [frozenset(names[:i]) for i in range(len(names) + 1)]
    return {n: values[after] - values[b] for n, b, after in zip(names, before, before[1:], strict=False)}


def left_one_out(values: Game, names: list[str]) -> dict[str, float]:
    return {n: v for n, v in shapley(values, names).items() if n != names[-1]}


@pytest.mark.parametrize("wrong", [banzhaf, one_order, left_one_out])
def test_another_division_is_noticed(wrong: Callable[[Game, list[str]], dict[str, float]]) -> None:
    names = list("abc")
    values = {s: len(s) ** 2 + 10.0 * ("a" in s) * (len(s) == 3) for s in subsets(names)}
    check_game(shapley, (names, values))
    with pytest.raises(AssertionError):
        check_game(wrong, (names, values))


def test_a_part_that_makes_up_for_another_stays_negative() -> None:
    values = {frozenset(): 0.0, frozenset("a"): 4.0, frozenset("b"): 0.0, frozenset("ab"): 1.0}
    assert shapley(values, "ab") == {"a": 2.5, "b": -1.5}


def test_a_subset_without_a_value_is_an_error() -> None:
    with pytest.raises(ValueError, match="each of their 4 subsets, 1 have none, first \\['a', 'b'\\]"):
        shapley({frozenset(): 0.0, frozenset("a"): 1.0, frozenset("b"): 1.0}, "ab")


# ---------------------------------------------------------------- players


def test_players_are_the_roundings_of_the_plan_on_that_problem() -> None:
    full, bare = small(), small(residual=False, head_norm=False)
    expected = {
        "hf": "x normed hidden proj head_normed out",
        "folded": "x scale out",
        "deferred": "x hidden out",
        "cast-after-matmul": "x matmul proj out",
        "fp32-tf32x3": "x matmul out",
        "fp32": "x out",
        "truncating": "x normed hidden proj head_normed out",
        "bf16-statistics": "x statistics variance rstd normed hidden proj head_rstd head_normed out",
    }
    for name, words in expected.items():
        assert players(plan_named(name), full) == words.split()
        without = [word for word in words.split() if word not in ("x", "head_rstd", "head_normed")]
        assert players(plan_named(name), bare) == without
    gemma = small(weight_offset=True)
    assert players(plan_named("gemma-bf16-offset"), gemma) == "x weight_offset hidden proj out".split()
    assert players(plan_named("gemma"), gemma) == "x hidden proj out".split()
    assert players(plan_named("fp32").replace(x=KEEP, out=KEEP), full) == []


def test_players_are_listed_in_the_order_of_the_chain() -> None:
    assert [name for name in PLAYERS if name in BOUNDARIES] == list(BOUNDARIES)
    assert set(PLAYERS) == {field.name for field in dataclasses.fields(CastPlan)}


# ---------------------------------------------------------------- order of sums


def test_kernels_differ_from_their_specs_by_far_less_than_specs_from_the_truth() -> None:
    for name in ("hf", "fp32", "deferred"):
        for added, total in order_of_sums(plan_named(name), small()).values():
            assert 0 <= added < 1e-2 * total


def test_a_kernel_on_exact_inputs_adds_nothing() -> None:
    plan = plan_named("hf")
    added = order_of_sums(
        plan, exact_problem(plan, tokens=9, hidden_size=200, num_q_heads=2, num_kv_heads=1, head_dim=32)
    )
    assert [value for value, _ in added.values()] == [0.0, 0.0]


def test_a_kernel_of_another_plan_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    right = module.run
    monkeypatch.setattr(module, "run", lambda plan, *rest: right(plan.replace(normed=KEEP), *rest))
    for added, total in order_of_sums(plan_named("hf"), small()).values():
        assert added > 0.05 * total
