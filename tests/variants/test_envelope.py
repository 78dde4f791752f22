"""The envelope explains what correct implementations do, on tensor cores too, and nothing that moves a boundary."""

import numpy as np
import pytest
import torch
from support import pinned_share

from castpoint.harness.problems.drawn import synthetic_problem
from castpoint.variants.catalogue import PLANS
from castpoint.variants.envelope import dot_interval, envelope, outside
from castpoint.variants.spec import spec

FRACTION_BITS = 25  # of the aligned addends on Hopper; each is cut toward zero (MMA-Sim, arXiv 2511.10909)


def tensor_core_dot(a: np.ndarray, b: np.ndarray, step: int = 16) -> np.ndarray:
    """a [T, D] @ b [N, D].T, bf16 values in float64, as a Hopper tensor core accumulates them in fp32."""
    acc = np.zeros((a.shape[0], b.shape[0]))
    for start in range(0, a.shape[1], step):
        products = a[:, None, start : start + step] * b[None, :, start : start + step]
        addends = np.concatenate([products, acc[..., None]], axis=-1)
        _, exponent = np.frexp(np.abs(addends).max(-1, keepdims=True))
        unit = np.ldexp(1.0, exponent - 1 - FRACTION_BITS)
        total = (np.trunc(addends / unit) * unit).sum(-1)
        _, exponent = np.frexp(np.abs(total))
        unit = np.ldexp(1.0, exponent - 24)
        acc = np.trunc(total / unit) * unit
    return acc


@pytest.mark.parametrize("hidden_size", [1024, 4096])
def test_a_tensor_cores_truncation_lies_inside(hidden_size: int) -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, hidden_size, generator=rng).to(torch.bfloat16).double() for n in (16, 256))
    actual = torch.from_numpy(tensor_core_dot(a.numpy(), b.numpy()))
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
