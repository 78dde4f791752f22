"""RoPE's angles as a plan makes them: theta and positions -> inv_freq, position -> phase -> cos and sin.

inv_freq = theta^(-2i/Dh)            for i < Dh/2
phase    = position * inv_freq       radians
cos_sin  = cos(phase), sin(phase)

RoFormer, arXiv 2104.09864. The one place where these are made: the spec takes its angles from here, and the table that
kernels read is of the same values (spec.with_table). An error of inv_freq turns q and k by position times as much: it
grows with position, which those of all other boundaries do not.

Each step is made in float64, on a CPU whatever the problem's device. Engines and transformers form theta^(-2i/Dh) in
fp32 arithmetic, which ends an ulp or two elsewhere (2^-23 of a phase); what they make of one inv_freq is this, up to
the last bit of an fp32 cos.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from functools import cache

import torch
from torch import Tensor

from castpoint.kernels.plan import CastPlan

Store = Callable[[Tensor, str], Tensor]  # how a float64 value is held as a word of the plan says: spec.store


@cache
def frequencies(theta: float, head_dim: int) -> Tensor:
    """[head_dim / 2] float64: theta^(-2i / head_dim), radians a position, from 28 decimal digits."""
    powers = [Decimal(theta) ** (Decimal(-step) / head_dim) for step in range(0, head_dim, 2)]
    return torch.tensor([float(power) for power in powers], dtype=torch.float64)


def phase(plan: CastPlan, positions: Tensor, theta: float, head_dim: int, store: Store) -> Tensor:
    """[P, head_dim / 2] float64 radians, on a CPU; positions [P] int64."""
    inv_freq = store(frequencies(theta, head_dim), plan.inv_freq)
    position = store(positions.cpu().to(torch.float64), plan.position)
    return store(torch.outer(position, inv_freq), plan.phase)


def rows(plan: CastPlan, positions: Tensor, theta: float, head_dim: int, store: Store) -> Tensor:
    """[P, head_dim] float64, on a CPU: cos of each position's phases, then their sin, as plan.cos_sin holds them."""
    angles = phase(plan, positions, theta, head_dim, store)
    return store(torch.cat([angles.cos(), angles.sin()], dim=-1), plan.cos_sin)
