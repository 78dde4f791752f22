"""The envelope explains what correct implementations do, on tensor cores too, and nothing that moves a boundary."""

import pytest
import torch
from support import pinned_share

from castpoint.harness.conformance.tensor_model import modelled
from castpoint.harness.problems.drawn import synthetic_problem
from castpoint.variants.catalogue import PLANS
from castpoint.variants.envelope import dot_interval, envelope, outside
from castpoint.variants.spec import spec


@pytest.mark.parametrize("hidden_size", [1024, 4096])
def test_a_tensor_cores_truncation_lies_inside(hidden_size: int) -> None:
    rng = torch.Generator().manual_seed(0)
    operands = [torch.randn(n, hidden_size, generator=rng).to(torch.bfloat16) for n in (16, 256)]
    actual = modelled(*operands, torch.zeros(16, 256)).double()
    a, b = (operand.double() for operand in operands)
    exact = a @ b.T
    assert (actual.abs() < exact.abs()).double().mean() > 0.6, "the premise: truncation shrinks"
    low, high = dot_interval((a, a), b)
    assert ((low <= actual) & (actual <= high)).all()
    assert ((high - low) / 2 < 100 * (actual - exact).abs().max()).all(), "an interval this wide proves little"


@pytest.mark.parametrize("plan", PLANS)
def test_the_spec_lies_inside_and_most_elements_are_pinned(plan: str) -> None:
    plan = PLANS[plan].plan
    problem = synthetic_problem("qwen3-0.6b", 8, 32, weight_offset=plan.weight_offset != "none")
    values, bounds = spec(plan, problem).outputs(), envelope(plan, problem)
    for name, value in values.items():
        assert not outside(value, bounds[name]).any()
        assert pinned_share(bounds[name]) > 0.87  # half of the 26 % that a moved boundary changes at the least


def test_nan_is_inside_where_the_envelope_is_nan_only() -> None:
    problem = synthetic_problem("qwen3-0.6b", 0, 2)
    x = problem.x.clone()
    x[0, 0] = float("nan")
    bounds = envelope(PLANS["hf"].plan, problem.replace(x=x))["k"]
    nan = torch.full(bounds[0].shape, float("nan"))
    assert not outside(nan, bounds)[0].any() and outside(nan, bounds)[1].all()
