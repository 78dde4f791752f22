"""Positions for problems: RoPE's table of cos and sin, as engines keep it."""

from __future__ import annotations

import torch
from torch import Tensor

from castpoint.variants.problem import Problem

FIRST = 1000  # position of the first token: angles of many turns
THETA = 1e6  # rope_theta of Qwen3 and Qwen2.5, and of Gemma 3's global layers


def cos_sin_cache(rows: int, head_dim: int) -> Tensor:
    """[rows, head_dim] fp32: cos of position * THETA^(-2i / head_dim) for i < head_dim / 2, then sin of the same.

    In float64, rounded once to fp32. Engines and transformers form the angle in fp32, which errs by position * 2^-24,
    a thousandth of a radian at position 16,384: that is their input's error, and no rounding of the chain.
    """
    steps = torch.arange(0, head_dim, 2, dtype=torch.float64)
    angles = torch.outer(torch.arange(rows, dtype=torch.float64), THETA ** (-steps / head_dim))
    return torch.cat([angles.cos(), angles.sin()], dim=1).to(torch.float32)


def with_positions(problem: Problem) -> Problem:
    """That problem with its tokens at FIRST, FIRST + 1, and so on. Raises ValueError for a head size that the kernels
    do not rotate."""
    device, end = problem.x.device, FIRST + problem.tokens
    return problem.replace(
        positions=torch.arange(FIRST, end, device=device),
        cos_sin_cache=cos_sin_cache(end, problem.head_dim).to(device),
        weights=f"{problem.weights}, rotated from position {FIRST}",
    )
