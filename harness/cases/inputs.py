"""How cases draw their inputs: in bf16, the type they are stored in, so that both sides read the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from castpoint.harness.cases.case import Inputs
from castpoint.harness.problems.drawn import heavy_tailed, layer_statistics


def normal(rng: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal values of that deviation, bf16: drawn in the type they are stored in."""
    return (torch.randn(*shape, generator=rng) * scale).bfloat16()


def uniform(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=rng).bfloat16()


def near_one(rng: torch.Generator, size: int) -> Tensor:
    return (1 + 0.1 * torch.randn(size, generator=rng)).bfloat16()


def ones(rng: torch.Generator, size: int) -> Tensor:
    return torch.ones(size, dtype=torch.bfloat16)


def calibrated(layer: int) -> Callable[[torch.Generator, int], Tensor]:
    """Input-norm weights with the published mean and deviation of that layer of Qwen3-0.6B."""
    row = layer_statistics()[layer]
    mean, std = row["input_layernorm_mean"], row["input_layernorm_std"]
    return lambda rng, size: heavy_tailed(size, mean, std, None, rng).bfloat16()


def norm_inputs(
    tokens: int, size: int, *weights: Callable[..., Tensor], **fixed: object
) -> Callable[..., list[Inputs]]:
    """x [tokens, size] ~ N(0, 1), one set-up for each way to draw the weight."""

    def draw(rng: torch.Generator) -> list[Inputs]:
        x = normal(rng, tokens, size)
        return [{"x": x, "weight": weight(rng, size), **fixed} for weight in weights]

    return draw


def sum_inputs(
    tokens: int, size: int, *scales: tuple[float, float], weight: Callable[..., Tensor] = ones
) -> Callable[..., list[Inputs]]:
    """x and residual [tokens, size], normal, one set-up for each pair of deviations."""

    def draw(rng: torch.Generator) -> list[Inputs]:
        return [
            {"x": normal(rng, tokens, size, scale=a), "residual": normal(rng, tokens, size, scale=b), "weight": w}
            for w in [weight(rng, size)]
            for a, b in scales
        ]

    return draw


def values(n: int, *names: str) -> Callable[..., list[Inputs]]:
    """n normal bf16 values for each name."""
    return lambda rng: [{name: normal(rng, n) for name in names}]
