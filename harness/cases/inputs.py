"""How cases draw their inputs: in bf16, the type they are stored in, so that both sides read the same numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from castpoint.harness.cases.case import Draw, Inputs
from castpoint.harness.problems.drawn import heavy_tailed, layer_statistics, standard_normal


def normal(rng: torch.Generator, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
    """Normal values of that deviation and mean, bf16: drawn in the type they are stored in."""
    return (mean + standard_normal(rng, *shape) * scale).bfloat16()


def uniform(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=rng).bfloat16()


def filled(value: float) -> Callable[..., Tensor]:
    """Nothing is drawn: every element is that value."""
    return lambda rng, *shape: torch.full(shape, value).bfloat16()


ONES, near_one = filled(1.0), functools.partial(normal, scale=0.1, mean=1.0)


def calibrated(layer: int) -> Callable[[torch.Generator, int], Tensor]:
    """Input-norm weights with the published mean and deviation of that layer of Qwen3-0.6B."""
    row = layer_statistics()[layer]
    mean, std = row["input_layernorm_mean"], row["input_layernorm_std"]
    return lambda rng, size: heavy_tailed(size, mean, std, None, rng).bfloat16()


def values(*names: str, shape: tuple[int, ...], draw: Callable[..., Tensor] = normal) -> Draw:
    """A tensor of that shape for each name."""
    return lambda rng: [{name: draw(rng, *shape) for name in names}]


def norm_inputs(tokens: int, size: int, *weights: Callable[..., Tensor], **fixed: object) -> Draw:
    """x [tokens, size] ~ N(0, 1), one set-up for each way to draw the weight."""

    def draw(rng: torch.Generator) -> list[Inputs]:
        x = normal(rng, tokens, size)
        return [{"x": x, "weight": weight(rng, size), **fixed} for weight in weights]

    return draw


def sum_inputs(tokens: int, size: int, weight: Callable[..., Tensor], *scales: tuple[float, float]) -> Draw:
    """x and residual [tokens, size], normal, one set-up for each pair of deviations."""

    def draw(rng: torch.Generator) -> list[Inputs]:
        drawn = weight(rng, size)
        pairs = ([normal(rng, tokens, size, scale=scale) for scale in pair] for pair in scales)
        return [{"x": x, "residual": residual, "weight": drawn} for x, residual in pairs]

    return draw


def in_turn(*draws: Draw) -> Draw:
    """The set-ups of all of these."""
    return lambda rng: [inputs for draw in draws for inputs in draw(rng)]
