"""Residual streams as large as published of larger models (data/README.md), with their massive tokens.

In these models a token that opens a text holds one channel of thousands from an early layer on, and keeps it through
the layers: 14,016 beside 3.4 in its other channels and 0.25 in those of other tokens (qwen3-1.7b, layer 3).
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache

import torch

from castpoint.harness.problems.drawn import DATA, depth, ordinary_tokens, seeded
from castpoint.harness.problems.geometry import geometry_named
from castpoint.harness.runs.errors import UserError
from castpoint.variants.problem import Problem

TABLE = "residual-streams.csv"
MASSIVE = 1000.0  # times the median |value|: massive by Sun et al., arXiv 2402.17762, who ask for more than 100 too


@dataclass(frozen=True)
class Sizes:
    """Of a residual stream at a layer's input, over millions of tokens. abs: of |values|; peak_token_median: the median
    |value| of the one token that holds the largest."""

    abs_median: float
    abs_mean: float
    rms: float
    max: float
    min: float
    peak_token_median: float

    @property
    def massive(self) -> bool:
        return max(self.max, -self.min) > max(100.0, MASSIVE * self.peak_token_median)


@cache
def published_sizes() -> dict[str, list[Sizes]]:
    """Model -> its layers' sizes."""
    found: dict[str, list[Sizes]] = {}
    with open(DATA / TABLE, newline="") as file:
        for row in csv.DictReader(file):
            model, layer = row.pop("model"), int(row.pop("layer"))
            assert layer == len(found.setdefault(model, [])), f"{TABLE}: layer {layer} of {model} is out of order"
            found[model].append(Sizes(**{name: float(value) for name, value in row.items()}))
    return found


def with_published_stream(problem: Problem, seed: int) -> Problem:
    """That drawn problem, its weights as they are, with a residual stream of the model's published sizes.

    Ordinary tokens are those of the drawn stream of that seed, brought to the published median |value|. The first token
    is brought to the median that the token with the largest value has, and holds the published largest and smallest
    value in two channels. That one token holds both is inferred: from layer to layer one changes with the other.
    Raises UserError for a model whose sizes were not published.
    """
    if problem.model not in published_sizes():
        raise UserError(f"no sizes of {problem.model}'s residual stream: {TABLE} has {', '.join(published_sizes())}")
    sizes, g = published_sizes()[problem.model][problem.layer], geometry_named(problem.model)
    rng = seeded(seed, problem.layer)
    stream, (largest, smallest, *_) = ordinary_tokens(problem.tokens, g.hidden_size, depth(problem.layer, g), rng)
    first, others = stream[:1], stream[1:]
    if len(others):
        others *= sizes.abs_median / others.abs().median()
    if len(first):
        first *= sizes.peak_token_median / first.abs().median()
        first[0, largest], first[0, smallest] = sizes.max, sizes.min
    return problem.replace(x=stream.to(torch.bfloat16), weights=f"{problem.weights}, published stream")
