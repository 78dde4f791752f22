"""Exact problems: inputs on which every correct implementation of a plan gives the same bits.

In general two implementations differ by the order of their sums. Here no sum depends on order:

- rows of x are signed permutations of one row of 5-bit values, so that all tokens share one variance and its
  sum is exact in fp32;
- every row of W holds one power of two, so that a dot product is one exact product;
- each Q and K head has two channels that are not zero, always fed by the same two magnitudes, so that its
  sum of squares has two terms and is the same for every token. With positions they are the two of one pair of RoPE,
  so that each rotated value is a sum of two products, which has no order.

What is left is one rsqrt a problem and one a head, and those few are drawn until the correctly rounded rsqrt
of the spec and the two roundings of 1 / sqrt(x) in fp32 agree. All else, elementwise, is IEEE arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from castpoint.harness.problems.drawn import with_positions
from castpoint.kernels.plan import CastPlan
from castpoint.variants.problem import Problem
from castpoint.variants.spec import round_to, spec, store

FIXED = 32  # channels that change sign but not place: those which Q and K heads read
DRAWS = 200


def exact_problem(
    plan: CastPlan,
    *,
    tokens: int = 33,
    hidden_size: int = 256,
    num_q_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    head_norm: bool = True,
    rope: bool = False,
    seed: int = 0,
) -> Problem:
    """A problem on which Triton, PyTorch and Inductor must equal spec(plan) bit for bit.

    hidden_size must exceed 32. Raises RuntimeError if 200 draws find no agreeing rsqrt, which would say that
    the spec and fp32 disagree about more than rsqrt.
    """
    rng = torch.Generator().manual_seed(seed)
    heads = num_q_heads + 2 * num_kv_heads
    problem = Problem(
        x=_signed_permutations(tokens, hidden_size, rng),
        norm_weight=_weights(hidden_size, 0.5, 2.0, rng),
        qkv_weight=_one_hot_rows(heads, num_kv_heads, head_dim, hidden_size, rope, rng),
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        q_norm_weight=_weights(head_dim, 0.5, 8.0, rng) if head_norm else None,
        k_norm_weight=_weights(head_dim, 0.5, 96.5, rng) if head_norm else None,
        weight_offset=plan.weight_offset != "none",
        model="exact",
        weights="exact",
    )
    problem = with_positions(problem) if rope else problem
    draws = iter(range(DRAWS))
    while not _agreeing(plan, problem.x.double(), problem.eps, plan.rstd).all() and next(draws, None) is not None:
        problem = problem.replace(eps=problem.eps * 1.5)
    for _ in draws:
        q, k, _v = problem.split_heads(spec(plan, problem).proj)
        agree = _agreeing(plan, torch.cat([q, k], dim=1), problem.eps, plan.head_rstd).all(dim=0)
        if not head_norm or agree.all():
            return problem
        problem = problem.replace(qkv_weight=_redrawn(problem, (~agree).nonzero().flatten().tolist(), rng))
    raise RuntimeError(f"no exact problem for {plan} in {DRAWS} draws: its rsqrt disagrees between spec and fp32")


def _agreeing(plan: CastPlan, value: Tensor, eps: float, storage: str) -> Tensor:
    """Whether 1 / sqrt(mean of squares + eps) in fp32 is what the spec stores; [...] without the last dimension."""
    exact = store(value * value, plan.statistics) if plan.statistics != "fp32" else value * value
    wanted = store((store(exact.mean(-1), plan.variance) + eps).rsqrt(), storage)
    squares = round_to((value.float() * value.float()), plan.statistics)
    variance = round_to(squares.sum(-1) / value.shape[-1], plan.variance)
    sqrt = (variance + eps).double().sqrt().float()  # PyTorch's fp32 sqrt is not correctly rounded on every CPU
    return round_to(1 / sqrt, storage).double() == wanted


def _signed_permutations(tokens: int, hidden_size: int, rng: torch.Generator) -> Tensor:
    row = torch.randint(16, 32, (hidden_size,), generator=rng) / 16
    signs = torch.randint(0, 2, (tokens, hidden_size), generator=rng) * 2 - 1
    order = [FIXED + torch.randperm(hidden_size - FIXED, generator=rng) for _ in range(tokens)]
    places = torch.stack([torch.cat([torch.arange(FIXED), o]) for o in order]) if tokens else signs
    return (row[places] * signs).to(torch.bfloat16)


def _weights(size: int, low: float, high: float, rng: torch.Generator) -> Tensor:
    return (low + (high - low) * torch.rand(size, generator=rng)).to(torch.bfloat16)


def _one_hot_rows(
    heads: int, num_kv_heads: int, head_dim: int, hidden_size: int, pairs: bool, rng: torch.Generator
) -> Tensor:
    weight = torch.zeros(heads, head_dim, hidden_size)
    for head in range(heads):
        if head < heads - num_kv_heads:
            _draw_head(weight[head], pairs, rng)
        else:
            columns = torch.randint(0, hidden_size, (head_dim,), generator=rng)
            weight[head, torch.arange(head_dim), columns] = _powers_of_two(head_dim, rng)
    return weight.reshape(-1, hidden_size).to(torch.bfloat16)


def _draw_head(weight: Tensor, pairs: bool, rng: torch.Generator) -> None:
    """Fills a Q or K head's rows [Dh, D]: two rows, with pairs i and i + Dh/2, that read one fixed channel each, the
    others zero."""
    weight.zero_()
    rows = torch.randperm(weight.shape[0], generator=rng)[:2]
    if pairs:
        rows[1] = (rows[0] + weight.shape[0] // 2) % weight.shape[0]
    columns = torch.randperm(FIXED, generator=rng)[:2]
    weight[rows, columns] = _powers_of_two(2, rng).to(weight.dtype)


def _redrawn(problem: Problem, heads: list[int], rng: torch.Generator) -> Tensor:
    weight = problem.qkv_weight.reshape(problem.num_heads, problem.head_dim, -1).clone()
    for head in heads:
        _draw_head(weight[head], problem.positions is not None, rng)
    return weight.reshape(problem.qkv_weight.shape)


def _powers_of_two(count: int, rng: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, (count,), generator=rng) * 2.0 - 1
    return signs * 2.0 ** torch.randint(-3, 4, (count,), generator=rng)
