"""Inputs of the exact problem with one product a dot product (exact.py).

- Rows of x are signed permutations of one row of values of 7 bits, or of as few as make the sum of its squares exact
  in fp32. All tokens share one variance.
- Every row of W holds one power of two, so that a dot product is one exact product.
- The two channels of a normed head that are not zero are always fed by the same two magnitudes, so that its sum of
  squares is the same for every token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from castpoint.kernels.plan import CastPlan

FIXED = 32  # channels that change sign but not place: those which normed heads read
WIDEST = 65536  # channels, whose squares leave 4 bits to x


def draw_rows(plan: CastPlan, tokens: int, hidden_size: int, rng: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """x [T, D], norm_weight [D] and eps of the problem."""
    half = 2 ** (min(7, (24 - math.ceil(math.log2(hidden_size))) // 2) - 1)
    row = torch.randint(half, 2 * half, (hidden_size,), generator=rng) / half
    signs = torch.randint(0, 2, (tokens, hidden_size), generator=rng) * 2 - 1
    order = [FIXED + torch.randperm(hidden_size - FIXED, generator=rng) for _ in range(tokens)]
    places = torch.stack([torch.cat([torch.arange(FIXED), o]) for o in order]) if tokens else signs
    return row[places] * signs, weights(hidden_size, 0.5, 2.0, rng), 1e-6


def weights(size: int, low: float, high: float, rng: torch.Generator) -> Tensor:
    """[size] bf16, as they are stored."""
    return (low + (high - low) * torch.rand(size, generator=rng)).to(torch.bfloat16)


def draw_head(weight: Tensor, bias: Tensor, *, normed: bool, pairs: bool, biased: bool, rng: torch.Generator) -> None:
    """Fills a head's rows of W [Dh, D]. normed: all but two are zero, which read one fixed channel each; for pairs,
    those of a pair i and i + Dh/2."""
    weight.zero_()
    count, hidden_size = weight.shape
    rows, columns = torch.arange(count), torch.randint(0, hidden_size, (count,), generator=rng)
    if normed:
        rows, columns = torch.randperm(count, generator=rng)[:2], torch.randperm(FIXED, generator=rng)[:2]
        if pairs:
            rows[1] = (rows[0] + count // 2) % count
    signs = torch.randint(0, 2, rows.shape, generator=rng) * 2.0 - 1
    weight[rows, columns] = signs * 2.0 ** torch.randint(-3, 4, rows.shape, generator=rng)
