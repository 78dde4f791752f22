"""What the kernel tests share: problems, a comparison that says what differs, and the kernels under test."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

import castpoint.kernels.norm_qkv
import castpoint.kernels.rounding
import castpoint.kernels.split_k
from castpoint.harness.problems.drawn import THETA
from castpoint.kernels.config import Config
from castpoint.kernels.plan import CastPlan
from castpoint.variants.eager import plan_weight
from castpoint.variants.envelope import Interval, outside
from castpoint.variants.problem import Problem
from castpoint.variants.spec import with_table

ROOT = Path(__file__).parents[2]
DEVICE = "cpu"
NAN = float("nan")
INTEGER = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
Outputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Kernels:
    """The kernels under test: the package of this repository, or a mutated copy of it."""

    norm_qkv: ModuleType
    rounding: ModuleType
    split_k: ModuleType

    def run(
        self,
        plan: CastPlan,
        problem: Problem,
        *,
        separate: bool = False,
        config: Config | None = None,
        out: Outputs | None = None,
    ) -> dict[str, Tensor]:
        """q, k, v by name. Plan and problem need not agree about the weight offset: a mutation may move it.

        Memory that a launch allocates holds NaN at first.
        """
        inputs = {**with_table(plan, problem).inputs(), "qkv_weight": plan_weight(plan, problem)}
        own = self.norm_qkv.CastPlan(**plan.choices())  # a copy of the package takes plans of its own class alone
        with poisoned_memory():
            outputs = self.norm_qkv.norm_qkv(**inputs, plan=own, separate_head_norm=separate, config=config, out=out)
        return dict(zip("qkv", outputs, strict=True))


KERNELS = Kernels(castpoint.kernels.norm_qkv, castpoint.kernels.rounding, castpoint.kernels.split_k)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, which PyTorch does under deterministic algorithms."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1).isnan(), "the test's own premise"
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def without_onednn() -> Iterator[None]:
    """PyTorch's own matmul: oneDNN's in bf16 makes row 2 NaN when row 3 holds one, on CPUs with bf16 tiles (AMX)."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


# ---------------------------------------------------------------- comparing


def assert_bit_equal(*, actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Fails unless both hold the same bits; NaN equals NaN, whatever its payload.

    expected may be wider than actual (the spec's float64): then it must hold values of actual's type.
    """
    assert actual.shape == expected.shape, f"{what} shape {list(actual.shape)}, expected {list(expected.shape)}"
    actual, wide = actual.detach().cpu(), expected.detach().cpu()
    expected = wide.to(actual.dtype)
    kept = (expected.to(wide.dtype) == wide) | wide.isnan()
    assert kept.all(), f"{what} expected holds values that {actual.dtype} cannot: {wide[~kept][:3].tolist()}"
    ulps = (_ordered(actual) - _ordered(expected)).abs()
    differ = (actual.view(INTEGER[actual.dtype]) != expected.view(INTEGER[actual.dtype])) & ~(
        actual.isnan() & expected.isnan()
    )
    if not differ.any():
        return
    nan = actual.isnan() != expected.isnan()
    finite = differ & actual.isfinite() & expected.isfinite()
    distance = torch.where(finite, (actual.double() - expected.double()).abs(), 0.0)
    flat = int(torch.where(finite, ulps + 1, differ.long()).flatten().argmax())
    worst = [int(i) for i in torch.unravel_index(torch.tensor(flat), differ.shape)] if differ.ndim else []
    raise AssertionError(
        f"{what} {int(differ.sum())} of {differ.numel()} elements differ, {int(nan.sum())} of them by being NaN; "
        f"max {distance.max().item():.3g}, {int(torch.where(finite, ulps, 0).max())} ulps; worst at {worst}: "
        f"{actual.flatten()[flat].item()!r}, expected {expected.flatten()[flat].item()!r}"
    )


def _ordered(value: Tensor) -> Tensor:
    """Integers in the order of the values, one apart for neighbours; the two zeros coincide."""
    bits = value.contiguous().view(INTEGER[value.dtype]).long()
    size = torch.iinfo(INTEGER[value.dtype]).min
    return torch.where(bits < 0, size - bits, bits)


def assert_inside(*, actual: dict[str, Tensor], allowed: dict[str, Interval], what: str = "") -> None:
    """Fails unless every element lies in the envelope."""
    for name, value in actual.items():
        wrong = outside(value.cpu(), allowed[name])
        if wrong.any():
            low, high = allowed[name]
            at = wrong.nonzero()[0].tolist()
            raise AssertionError(
                f"{what} {name}: {int(wrong.sum())} of {wrong.numel()} elements outside the envelope, first at {at}: "
                f"{value[tuple(at)].item()!r} not in [{low[tuple(at)].item()!r}, {high[tuple(at)].item()!r}]"
            )


# ---------------------------------------------------------------- problems


def random_problem(
    *,
    tokens: int = 33,
    hidden_size: int = 200,
    num_q_heads: int = 2,
    num_kv_heads: int = 1,
    head_dim: int = 32,
    head_norm: bool = True,
    bias: bool = True,
    residual: bool = True,
    weight_offset: bool = False,
    rope: bool = False,
    layout: str = "contiguous",
    seed: int = 0,
) -> Problem:
    """Gaussian x and weights, norm weights between 0.5 and 8 (96 for K); x and residual in that layout; with rope the
    tokens at scattered positions. On DEVICE."""
    rng = torch.Generator().manual_seed(seed)
    rows = (num_q_heads + 2 * num_kv_heads) * head_dim

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(shape, generator=rng)).to(DEVICE, torch.bfloat16)

    def weight(size: int, high: float) -> Tensor:
        return (0.5 + (high - 0.5) * torch.rand(size, generator=rng) - int(weight_offset)).to(DEVICE, torch.bfloat16)

    rotation = {}
    if rope:
        positions = torch.randint(0, 512, (2 * tokens,), generator=rng).to(DEVICE)[::2]
        rotation = {"positions": positions, "theta": THETA}
    return Problem(
        x=laid_out(normal(tokens, hidden_size), layout),
        norm_weight=weight(hidden_size, 2.0),
        qkv_weight=normal(rows, hidden_size, std=hidden_size**-0.5),
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        q_norm_weight=weight(head_dim, 8.0) if head_norm else None,
        k_norm_weight=weight(head_dim, 96.0) if head_norm else None,
        bias=normal(rows) if bias else None,
        residual=laid_out(normal(tokens, hidden_size), layout) if residual else None,
        weight_offset=weight_offset,
        **rotation,
    )


@functools.cache
def small(weight_offset: bool = False, **changes: object) -> Problem:
    """With bias and residual, so that every boundary is there."""
    geometry = {"tokens": 9, "hidden_size": 48, "head_dim": 16} | changes
    return random_problem(weight_offset=weight_offset, **geometry)


def laid_out(value: Tensor, layout: str) -> Tensor:
    """The same matrix with other strides; what lies between its elements is NaN."""
    if layout == "transposed":
        return value.T.contiguous().T
    if layout == "every second channel":
        big = torch.full((value.shape[0], 2 * value.shape[1]), NAN, dtype=value.dtype, device=value.device)
        big[:, ::2] = value
        return big[:, ::2]
    return value


def pinned_share(envelope: Interval) -> float:
    """Share of elements whose bits the plan fixes whatever the order of summation."""
    low, high = envelope
    return (low == high).double().mean().item() if low.numel() else 1.0
