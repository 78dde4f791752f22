"""Wrong sums, emulated: what a plan returns with an accumulator narrower than fp32, or partial sums stored as bf16."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from castpoint.harness.conformance.faults import rounded
from castpoint.kernels.plan import CastPlan
from castpoint.variants.eager import plan_weight
from castpoint.variants.problem import Problem
from castpoint.variants.spec import matmul_operand, spec

Sums = Callable[[Tensor, Tensor], Tensor]  # hidden [T, D] and W [rows, D] float64 -> [T, rows] float64


def narrow(bits: int, step: int = 1) -> Sums:
    """An accumulator of so many significant bits, to which `step` channels are added at a time, themselves exact."""

    def sums(hidden: Tensor, weight: Tensor) -> Tensor:
        total = torch.zeros(len(hidden), len(weight), dtype=torch.float64)
        for part, by in zip(hidden.split(step, 1), weight.split(step, 1), strict=True):
            total = rounded(total + part @ by.T, bits)
        return total

    return sums


def split(shares: int, bits: int = 8) -> Sums:
    """Split-K: exact sums over so many shares of D, each stored in so many significant bits; those added exactly."""

    def sums(hidden: Tensor, weight: Tensor) -> Tensor:
        parts = zip(hidden.tensor_split(shares, 1), weight.tensor_split(shares, 1), strict=True)
        return torch.stack([rounded(part @ by.T, bits) for part, by in parts]).sum(0)

    return sums


def outputs_summed(plan: CastPlan, problem: Problem, sums: Sums) -> dict[str, Tensor]:
    """q, k and v, float64, of the plan with its dot products summed so."""
    weight, hidden = plan_weight(plan, problem), spec(plan, problem).hidden
    return spec(plan, problem, sums(matmul_operand(hidden, plan), weight.double())).outputs()
