"""Exact problems: sums that no order changes, and what shows on them.

That kernels equal the spec there: tests/kernels. Which moved choices show: tests/kernels/test_moved.py.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from nets import EXACT, exact_case
from torch import Tensor

from castpoint.harness.conformance.faults import Summed
from castpoint.harness.conformance.tensor_model import ALTERNATIVES, HOPPER, Model, modelled
from castpoint.harness.problems.exact import PRODUCTS, exact_problem, parted
from castpoint.harness.problems.many_products import UNIT, channels
from castpoint.kernels.plan import KEEP, RNE, RTZ, CastPlan
from castpoint.variants.catalogue import PLANS
from castpoint.variants.eager import plan_weight
from castpoint.variants.problem import Problem
from castpoint.variants.spec import matmul_operand, round_to, spec

SMALL = {"tokens": 17, "hidden_size": 200, "num_q_heads": 2, "num_kv_heads": 1, "head_dim": 32}
GEOMETRIES = {
    "one token, 40 channels, heads of 80": {**SMALL, "tokens": 1, "hidden_size": 40, "head_dim": 80},
    "an odd number of channels, heads of 16": {**SMALL, "hidden_size": 99, "head_dim": 16},
    "8192 channels, heads of 256": {**SMALL, "tokens": 3, "hidden_size": 8192, "num_q_heads": 1, "head_dim": 256},
    "positions": {**SMALL, "rope": True},
    "no head norm": {**SMALL, "head_norm": False},
}


def many(plan: CastPlan, **options: object) -> Problem:
    return exact_problem(plan, products="many", **{**SMALL, **options})


def operands(plan: CastPlan, problem: Problem) -> tuple[Tensor, Tensor]:
    """hidden [T, D] and W [rows, D] as the matmul reads them, float64, in units of which products are whole numbers."""
    hidden, unit = spec(plan, problem).hidden, UNIT if plan.scale == "prologue" else 2 * UNIT
    return matmul_operand(hidden, plan) / unit, plan_weight(plan, problem).double()


def outputs_summed(plan: CastPlan, problem: Problem, **summed: int) -> dict[str, Tensor]:
    """q, k and v, float64, of the plan with its dot products summed so: arguments of Summed."""
    hidden = matmul_operand(spec(plan, problem).hidden, plan)
    proj = hidden @ Summed(plan_weight(plan, problem).double(), **summed).T
    return spec(plan, problem, proj.double()).outputs()


# ---------------------------------------------------------------- no order


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("plan", PLANS)
def test_many_products_add_up_to_less_than_fp32_holds(plan: str, geometry: str) -> None:
    """Whole numbers, in magnitude below 2^24 together: whatever is added when, nothing is rounded."""
    plan = PLANS[plan].plan
    problem = many(plan, **GEOMETRIES[geometry], bias=True)
    hidden, weight = operands(plan, problem)
    assert not (hidden[:3, None] * weight[::5]).frac().any()
    assert (hidden.abs() @ weight.T.abs() + problem.bias.double().abs() / UNIT).max() < 2**24
    assert ((hidden != 0) & (weight[-1] != 0)).sum(1).min() >= 0.8 * problem.hidden_size, "not many"


@pytest.mark.parametrize("model", [HOPPER, *ALTERNATIVES], ids=str)
@pytest.mark.parametrize("plan", ["hf", "deferred", "folded"])
def test_a_tensor_core_loses_nothing(plan: str, model: Model) -> None:
    plan = PLANS[plan].plan
    hidden, weight = operands(plan, many(plan, tokens=5, hidden_size=256, head_dim=16))
    found = modelled(hidden.bfloat16(), weight.bfloat16(), torch.zeros(5, len(weight)), model)
    assert torch.equal(found.double(), hidden @ weight.T)


@pytest.mark.parametrize("plan", ["hf", "fp32", "folded"])
def test_partial_sums_are_exact_in_any_order_and_outgrow_an_accumulator_of_19_bits(plan: str) -> None:
    plan = PLANS[plan].plan
    hidden, weight = operands(plan, many(plan, tokens=5))
    products, rng = hidden[:, None] * weight, torch.Generator().manual_seed(0)
    for order in (
        torch.arange(200),
        torch.arange(199, -1, -1),
        *(torch.randperm(200, generator=rng) for _ in range(3)),
    ):
        partial = products[..., order].cumsum(-1)
        assert torch.equal(products[..., order].float().cumsum(-1).double(), partial)
        assert (partial.abs().amax(-1) >= 2**20).double().mean() > 0.99
        odd = (partial.abs() >= 2**19) & (partial % 2 != 0)
        assert odd.any(-1).double().mean() > 0.5, "a number of 20 bits and more whose last is not zero"


@pytest.mark.parametrize("kind", EXACT, ids=PRODUCTS)
@pytest.mark.parametrize("plan", PLANS)
def test_shuffled_channels_are_the_same_bits(plan: str, kind: dict) -> None:
    plan = PLANS[plan].plan.replace(out=KEEP)
    problem, expected = exact_case(plan, **kind, **SMALL)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    residual = None if problem.residual is None else problem.residual[:, order]
    moved = {"x": problem.x[:, order], "qkv_weight": problem.qkv_weight[:, order], "residual": residual}
    shuffled = spec(plan, problem.replace(**moved, norm_weight=problem.norm_weight[order])).outputs()
    assert all(torch.equal(shuffled[name], value) for name, value in expected.items())


# ---------------------------------------------------------------- what shows


@pytest.mark.parametrize("plan", ["bf16-operand", "fp32", "deferred"])
def test_sums_are_ties_of_bf16_of_both_kinds_and_stand_beside_them(plan: str) -> None:
    """Of Q and K, whose squares are summed next, and of V, some with digits on both sides of a tie far below."""
    plan = PLANS[plan].plan
    problem = many(plan)
    proj = spec(plan, problem).proj / UNIT
    q, k, v = problem.split_heads(proj)
    for value in (q, k, v):
        nearest = round_to(value.float(), RNE).double()
        step = 2.0 ** (torch.frexp(value)[1] - 8).double()
        ties = ((value - nearest).abs() * 2 == step) & (value != 0)
        assert (ties & (nearest.abs() < value.abs())).any() and (ties & (nearest.abs() > value.abs())).any()
        short = torch.remainder(value.abs(), step) / step - 0.5  # of a tie, in steps
        beside = (short != 0) & (short.abs() * step == 1)
        assert (beside & (short > 0)).any() and (beside & (short < 0)).any()
    assert (v.abs() >= 2**21).any() and (torch.frexp(v)[1] - 8 >= 10)[beside].any()
    assert ((torch.cat([q, k], 1) != 0).sum(-1) == 8).all()
    assert len(v[..., 3].abs().unique()) > 10, "every fourth sum of V differs by token"


@pytest.mark.parametrize("storage", [RNE, RTZ, KEEP])
@pytest.mark.parametrize("kind", EXACT, ids=PRODUCTS)
def test_a_sum_of_x_and_residual_rounds_to_x(storage: str, kind: dict) -> None:
    """So often a tie, or near one, that the other rounding, or none, shows in many."""
    plan = PLANS["fp32"].plan.replace(x=storage)
    with_one = exact_problem(plan, **{**SMALL, **kind, "residual": True})
    x = exact_problem(plan, **{**SMALL, **kind, "residual": False}).x.double()
    total = with_one.x.double() + with_one.residual.double()
    assert torch.equal(total, total.float().double()) and torch.equal(round_to(total.float(), storage).double(), x)
    for other in {RNE, RTZ, KEEP} - {storage}:
        share = (round_to(total.float(), other).double() != x).double().mean()
        assert share > 0.15 if storage != KEEP else share == 0
    assert storage != RNE or ((total - x).abs() == 2.0**-8).double().mean() > 0.2, "ties"


STEPS = (1, 16, 32, 64, 128)


@pytest.mark.parametrize("plan", PLANS)
def test_a_short_accumulator_shows_in_every_plan(plan: str) -> None:
    """Of 8, 16 and 19 bits, rounded after each product or after so many; in Q, K and V, stored as the plan does."""
    plan = PLANS[plan].plan
    problem, expected = exact_case(plan, products="many", **SMALL)
    for bits, step in itertools.product((8, 16, 19), STEPS):
        for name, value in outputs_summed(plan, problem, bits=bits, step=step).items():
            assert (value != expected[name]).double().mean() > 0.02, (bits, step, name)
    for step in (1, 16, 67):
        assert all(torch.equal(v, expected[n]) for n, v in outputs_summed(plan, problem, step=step).items()), "fp32"


@pytest.mark.parametrize("plan", PLANS)
def test_partial_sums_in_bf16_show_in_every_plan(plan: str) -> None:
    plan = PLANS[plan].plan
    problem, expected = exact_case(plan, products="many", **SMALL)
    for shares in range(2, 9):
        for name, value in outputs_summed(plan, problem, shares=shares).items():
            assert (value != expected[name]).double().mean() > 0.02, (shares, name)


def test_with_one_product_neither_shows() -> None:
    """Why there are two problems."""
    plan = PLANS["bf16-operand"].plan
    problem, expected = exact_case(plan, products="one", **SMALL)
    for summed in ({"bits": 8, "step": 1}, {"shares": 4}):
        assert all(torch.equal(v, expected[n]) for n, v in outputs_summed(plan, problem, **summed).items())


# ---------------------------------------------------------------- what is refused


def test_what_does_not_fit_is_refused() -> None:
    plan = PLANS["hf"].plan
    for wrong in ({"hidden_size": 32}, {"hidden_size": 8193, "products": "many"}):
        with pytest.raises(ValueError, match="hidden_size of an exact problem must lie in 33 to"):
            exact_problem(plan, **wrong)
    with pytest.raises(ValueError, match="bias has many products"):
        exact_problem(plan, bias=True)
    with pytest.raises(KeyError):
        exact_problem(plan, products="few")


def test_parts_of_a_sum_are_bf16_values() -> None:
    """x comes back from them, whatever its sign, at the ends of its range too."""
    x = torch.tensor([[1.0, -1.0, 1.984375, -1.984375, 1.015625]] * 500)
    first, second = parted(x, RNE, torch.Generator().manual_seed(0))
    assert first.dtype == second.dtype == torch.bfloat16
    assert torch.equal(round_to(first.float() + second.float(), RNE), x) and len(second.unique()) > 200


def test_digits_are_spread_and_twins_lie_half_a_row_apart() -> None:
    for hidden_size in (33, 40, 99, 200, 1024):
        digits, left, right = channels(hidden_size)
        used = torch.cat([digits.flatten(), left, right])
        assert len(used.unique()) == len(used) >= hidden_size - 1 and used.max() < hidden_size
        assert (right - left).min() > 0.4 * hidden_size and left.max() < right.min()
