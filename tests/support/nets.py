"""The nets: checks that right kernels pass, of numbers, memory and rounding.

test_kernels.py holds the kernels to every net; test_mutation.py shows that a wrong kernel is caught by one, so a net
takes the kernels as an argument.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from support import (
    DEVICE,
    KERNELS,
    NAN,
    Kernels,
    assert_bit_equal,
    assert_inside,
    random_problem,
    without_onednn,
)
from torch import Tensor

from castpoint.harness.problems.exact import exact_problem
from castpoint.kernels.config import Config
from castpoint.kernels.plan import CastPlan
from castpoint.variants.catalogue import PLANS
from castpoint.variants.eager import eager
from castpoint.variants.envelope import Interval, envelope
from castpoint.variants.problem import Problem
from castpoint.variants.spec import spec, with_table

# ---------------------------------------------------------------- numbers


@functools.cache
def exact_case(plan: CastPlan, **geometry: object) -> tuple[Problem, dict[str, Tensor]]:
    problem = exact_problem(plan, **geometry)
    return problem.to(DEVICE), spec(plan, problem).outputs()


@functools.cache
def random_case(plan: CastPlan, **geometry: object) -> tuple[Problem, dict[str, Interval]]:
    problem = random_problem(weight_offset=plan.weight_offset != "none", **geometry)
    return problem, envelope(plan, problem.to("cpu"))


# Both exact problems, so that what may be absent, a residual and a bias, is there in one and absent in the other.
EXACT = ({"products": "one", "residual": True}, {"products": "many", "bias": True})
SMALL = {"tokens": 33, "hidden_size": 200, "num_q_heads": 2, "num_kv_heads": 1, "head_dim": 32}


def check_exact(
    kernels: Kernels,
    plan: CastPlan | str,
    *,
    separate: bool | None = None,
    config: Config | None = None,
    **geometry: int,
) -> None:
    """Equals the spec bit for bit where no sum depends on its order. separate None: both ways."""
    plan = PLANS[plan].plan if isinstance(plan, str) else plan
    for kind in EXACT:
        problem, expected = exact_case(plan, **kind, **(geometry or SMALL))
        ways = (False, True) if separate is None and problem.has_head_norm else (bool(separate),)
        for way in ways:
            for name, actual in kernels.run(plan, problem, separate=way, config=config).items():
                what = f"{kind['products']} product, {'separate' if way else 'fused'} {name}:"
                assert_bit_equal(actual=actual, expected=expected[name], what=what)


def check_exact_fp32(kernels: Kernels, plan: str, **options: object) -> None:
    """check_exact, stored as fp32, where every boundary and every ulp before the store shows."""
    check_exact(kernels, PLANS[plan].plan.replace(out="fp32"), **options)


def check_envelope(
    kernels: Kernels,
    plan: CastPlan | str,
    *,
    separate: bool = False,
    config: Config | None = None,
    **geometry: object,
) -> None:
    """Lies in the plan's envelope on Gaussian data with bias and residual."""
    plan = PLANS[plan].plan if isinstance(plan, str) else plan
    problem, allowed = random_case(plan, **geometry)
    assert_inside(actual=kernels.run(plan, problem, separate=separate, config=config), allowed=allowed)


def check_again(kernels: Kernels, plan: str, *, config: Config, **geometry: object) -> None:
    """A second launch on other data is as right as the first, a third on the first's data gives the first's bits, and
    every counter is zero afterwards."""
    plan = PLANS[plan].plan
    problem, allowed = random_case(plan, **geometry)
    other, other_allowed = random_case(plan, **geometry, seed=1)
    first, second, third = (kernels.run(plan, each, config=config) for each in (problem, other, problem))
    assert_inside(actual=first, allowed=allowed)
    assert_inside(actual=second, allowed=other_allowed)
    for name, actual in third.items():
        assert_bit_equal(actual=actual, expected=first[name], what=name)
    counters = kernels.split_k.counters(problem.x.device, kernels.split_k.COUNTERS)
    assert config.kernel != "split-k" or not counters.any(), "counters differ from zero"


@contextlib.contextmanager
def shuffled_programs(seed: int) -> Iterator[None]:
    """The interpreter runs the programs of each launch in a random order: on a GPU any may come first."""
    builder, rng, order = triton.runtime.interpreter.interpreter_builder, random.Random(seed), []

    def set_grid_idx(x: int, y: int, z: int) -> None:
        if not order:
            order.extend(itertools.product(*map(range, builder.grid_dim)))
            rng.shuffle(order)
        type(builder).set_grid_idx(builder, *order.pop())

    builder.set_grid_idx = set_grid_idx
    try:
        yield
    finally:
        del builder.set_grid_idx


def check_order(kernels: Kernels, plan: str, *, config: Config, **geometry: object) -> None:
    """Bits do not depend on the order in which programs run."""
    plan = PLANS[plan].plan
    problem, _allowed = random_case(plan, **geometry)
    expected = KERNELS.run(plan, problem, config=config)
    for seed in range(3):
        with shuffled_programs(seed):
            outputs = kernels.run(plan, problem, config=config)
        for name, actual in outputs.items():
            assert_bit_equal(actual=actual, expected=expected[name], what=name)


def check_nonfinite(kernels: Kernels, plan: str) -> None:
    """NaN and infinity in x make exactly the elements NaN that PyTorch makes NaN, and leave other rows as they were."""
    clean = random_problem(residual=False, weight_offset=PLANS[plan].plan.weight_offset != "none")
    x = clean.x.clone()
    x[3, 7], x[5, 100], x[6, 199], x[9, 0], x[9, 1] = NAN, torch.inf, -torch.inf, torch.inf, -torch.inf
    with without_onednn():
        wanted = eager(clean.replace(x=x))
    before, after = kernels.run(PLANS[plan].plan, clean), kernels.run(PLANS[plan].plan, clean.replace(x=x))
    sound = [row for row in range(clean.tokens) if row not in (3, 5, 6, 9)]
    for (name, actual), expected in zip(after.items(), wanted, strict=True):
        assert expected[[3, 5, 6, 9]].isnan().all(), "the test's own premise: PyTorch makes these rows NaN"
        assert torch.equal(actual.isnan(), expected.isnan()), f"{name} is NaN elsewhere than PyTorch's"
        assert_bit_equal(actual=actual[sound], expected=before[name][sound], what=name)


# ---------------------------------------------------------------- memory

GUARD = 64  # tokens before and after: a block of any launch configuration


def check_memory(
    kernels: Kernels,
    plan: CastPlan | str = "hf",
    *,
    separate: bool = False,
    config: Config | None = None,
    tokens: int = 5,
    rope: bool = False,
) -> None:
    """Writes every element of outputs that are views of a larger poisoned buffer, and nothing else of the buffer;
    reads nothing beside x and residual, around which all is NaN."""
    plan = PLANS[plan].plan if isinstance(plan, str) else plan
    problem = random_problem(tokens=tokens, rope=rope, weight_offset=plan.weight_offset != "none")
    expected = KERNELS.run(
        plan, problem, separate=separate, config=config
    )  # a kernel that writes outside must not run unguarded
    inside = {name: guarded(getattr(problem, name), 1)[1] for name in ("x", "residual")}
    guards = {name: guarded(torch.full_like(value, NAN), 1) for name, value in expected.items()}
    views = tuple(view for _buffer, view in guards.values())
    actual = kernels.run(plan, problem.replace(**inside), separate=separate, config=config, out=views)
    for (name, (buffer, view)), given in zip(guards.items(), views, strict=True):
        assert actual[name] is given, f"{name} is not the tensor that was given"
        assert not view.isnan().any(), f"{name}: {int(view.isnan().sum())} elements not written"
        assert int((~buffer.isnan()).sum()) == view.numel(), f"{name}: written outside"
        assert_bit_equal(actual=view, expected=expected[name], what=name)


def guarded(value: Tensor, margin: int) -> tuple[Tensor, Tensor]:
    """A buffer of NaN, and value in its middle: GUARD more rows on both sides, in the other dimensions more too."""
    sizes = [value.shape[0] + 2 * GUARD, *(n + 2 * margin for n in value.shape[1:-1]), value.shape[-1] + 2 * GUARD]
    buffer = torch.full(sizes, NAN, dtype=value.dtype, device=value.device)
    view = buffer[GUARD : GUARD + value.shape[0]]
    for dim in range(1, value.ndim):
        view = view.narrow(dim, GUARD if dim == value.ndim - 1 else margin, value.shape[dim])
    view.copy_(value)
    return buffer, view


def check_addressing(kernels: Kernels, plan: str = "hf", strides: tuple[int, int] = (2**30, 1)) -> None:
    """Elements of x that lie 2^31 and more elements after the first are read where they are.

    The storage has 8 GiB, on a CPU as a sparse file. x starts in its middle, so that an address which wrapped around
    at 32 bits would still lie in it, and read zeros.
    """
    problem = random_problem(tokens=3, residual=False, weight_offset=PLANS[plan].plan.weight_offset != "none")
    expected = KERNELS.run(PLANS[plan].plan, problem)
    farthest = sum((size - 1) * stride for size, stride in zip(problem.x.shape, strides, strict=True))
    assert 2**31 <= farthest < 2**32, "the test's own premise"
    with tempfile.TemporaryDirectory() as folder:
        size = 2**31 + farthest + 1
        if DEVICE == "cpu":
            storage = torch.from_file(str(Path(folder) / "sparse"), shared=True, size=size, dtype=torch.bfloat16)
        else:
            storage = torch.zeros(size, dtype=torch.bfloat16, device=DEVICE)
        far = storage.as_strided(problem.x.shape, strides, 2**31)
        far.copy_(problem.x)
        for name, actual in kernels.run(PLANS[plan].plan, problem.replace(x=far)).items():
            assert_bit_equal(actual=actual, expected=expected[name], what=name)


def check_far_positions(kernels: Kernels) -> None:
    """Rows of cos_sin_cache that lie 2^31 and more elements after the first are read where they are; its storage as
    check_addressing's."""
    plan = PLANS["hf"].plan.replace(out="fp32")
    problem = with_table(plan, random_problem(tokens=3, rope=True))
    expected = KERNELS.run(plan, problem)
    width, first = problem.head_dim, 2**31 // problem.head_dim + 7
    with tempfile.TemporaryDirectory() as folder:
        size = 2**32 + 16 * width
        if DEVICE == "cpu":
            storage = torch.from_file(str(Path(folder) / "sparse"), shared=True, size=size, dtype=torch.bfloat16)
        else:
            storage = torch.zeros(size, dtype=torch.bfloat16, device=DEVICE)
        far = storage[2**31 :].view(-1, width)  # from the middle, so that an address that wrapped would lie in it
        far[first : first + 3] = problem.cos_sin_cache[problem.positions]  # the plan rounds them to bf16 anyway
        positions = torch.arange(first, first + 3, device=DEVICE)
        for name, actual in kernels.run(plan, problem.replace(positions=positions, cos_sin_cache=far)).items():
            assert_bit_equal(actual=actual, expected=expected[name], what=name)
