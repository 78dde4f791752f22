"""Exact problems: inputs on which every correct implementation of a plan gives the same bits.

In general two implementations differ by the order of their sums. Here no sum depends on order. There are two kinds,
which show different faults: with `one` product a dot product (one_product.py) all else is generic, with `many`
(many_products.py) it is the sum that is hard. In both, few channels of a Q or K head that is normed are
not zero, so that its sum of squares is exact too; with positions they come in pairs of RoPE, of which each rotated
value is a sum of two products, which has no order.

What is left is one rsqrt a problem and one a head (with a bias four), and those few are drawn until the correctly
rounded rsqrt of the spec and the two roundings of 1 / sqrt(x) in fp32 agree. All else, elementwise, is IEEE arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from castpoint.harness.problems import many_products, one_product
from castpoint.harness.problems.drawn import with_positions
from castpoint.kernels.plan import KEEP, RNE, RTZ, CastPlan
from castpoint.variants.problem import Problem
from castpoint.variants.spec import round_to, spec, store

KINDS = {"one": one_product, "many": many_products}
PRODUCTS = tuple(KINDS)
DRAWS = 200


def exact_problem(
    plan: CastPlan,
    *,
    products: str = "one",
    tokens: int = 33,
    hidden_size: int = 256,
    num_q_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    head_norm: bool = True,
    rope: bool = False,
    bias: bool = False,
    residual: bool = False,
    seed: int = 0,
) -> Problem:
    """A problem on which Triton, PyTorch and Inductor must equal spec(plan) bit for bit.

    products: of a dot product, one of PRODUCTS. hidden_size must exceed 32, and be at most 8,192 with many products;
    a bias is for those alone. A sum x + residual is a tie of bf16, or beside one, or a bf16 value.

    Raises ValueError for what does not fit, RuntimeError if 200 draws find no agreeing rsqrt, which would say that the
    spec and fp32 disagree about more than rsqrt.
    """
    kind, rng = KINDS[products], torch.Generator().manual_seed(seed)
    if not 32 < hidden_size <= kind.WIDEST:
        raise ValueError(f"hidden_size of an exact problem must lie in 33 to {kind.WIDEST}, not be {hidden_size}")
    if products == "one" and bias:
        raise ValueError("an exact problem with a bias has many products a sum")
    heads, normed = num_q_heads + 2 * num_kv_heads, (num_q_heads + num_kv_heads) * head_norm
    weight, beside = torch.zeros(heads, head_dim, hidden_size), torch.zeros(heads, head_dim)
    x, norm_weight, eps = kind.draw_rows(plan, tokens, hidden_size, rng)
    parts = parted(x, plan.x, rng) if residual else (x.to(torch.bfloat16), None)
    problem = Problem(
        x=parts[0],
        residual=parts[1],
        norm_weight=norm_weight,
        eps=eps,
        qkv_weight=weight.reshape(-1, hidden_size).to(torch.bfloat16),
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        q_norm_weight=one_product.weights(head_dim, 0.5, 8.0, rng) if head_norm else None,
        k_norm_weight=one_product.weights(head_dim, 0.5, 96.5, rng) if head_norm else None,
        weight_offset=plan.weight_offset != "none",
        model="exact",
        weights=f"exact, {products}",
    )
    problem = with_positions(problem) if rope else problem
    draws, redrawn = iter(range(DRAWS)), list(range(heads))
    while not _settled(plan, x.double(), problem.eps) and next(draws, None) is not None:
        problem = problem.replace(eps=problem.eps * 1.5)
    for _ in draws:
        for head in redrawn:
            kind.draw_head(weight[head], beside[head], normed=head < normed, pairs=rope, biased=bias, rng=rng)
        packed = {"qkv_weight": weight.reshape(-1, hidden_size).to(torch.bfloat16)}
        packed |= {"bias": beside.flatten().to(torch.bfloat16)} if bias else {}
        problem = problem.replace(**packed)
        q, k, _v = problem.split_heads(spec(plan, problem).proj)
        agree = agreeing(plan, torch.cat([q, k], dim=1), problem.eps, plan.head_rstd).all(dim=0)
        redrawn = (~agree).nonzero().flatten().tolist()
        if not normed or not redrawn:
            return problem
    raise RuntimeError(f"no exact problem for {plan} in {DRAWS} draws: its rsqrt disagrees between spec and fp32")


def parted(x: Tensor, storage: str, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two bf16 tensors whose sum rounds to x [T, D] as that storage type does: ties, and beside them; for fp32, which
    keeps it, x itself. x: in magnitude 1 to 2, of at most 7 bits."""
    unit = 2.0**-9  # a fourth of the distance between bf16's values there
    taken = 4 * torch.randint(0, 60, x.shape, generator=rng)
    low, high = {RNE: (-2, 3), RTZ: (0, 4)}.get(storage, (0, 1))
    beyond = torch.randint(low, high, x.shape, generator=rng)
    beyond = torch.where(x.abs() == 1, beyond.clamp(min=0), beyond)  # below 1 bf16's values lie closer
    parts = x - x.sign() * taken * unit, x.sign() * (taken + beyond) * unit
    return parts[0].to(torch.bfloat16), parts[1].to(torch.bfloat16)


def _settled(plan: CastPlan, x: Tensor, eps: float) -> bool:
    """Whether rstd has no order either; and, where it is rounded and not 1/2, is not both its neighbours in bf16."""
    exact = (many_products.variance(plan, x) + eps).rsqrt()
    shows = (store(exact, RNE) != store(exact, RTZ)) | (exact == 0.5) | (plan.rstd == KEEP)
    return bool((agreeing(plan, x, eps, plan.rstd) & shows).all())


def agreeing(plan: CastPlan, value: Tensor, eps: float, storage: str) -> Tensor:
    """Whether 1 / sqrt(mean of squares + eps) in fp32 is what the spec stores; [...] without the last dimension."""
    wanted = store((many_products.variance(plan, value) + eps).rsqrt(), storage)
    squares = round_to((value.float() * value.float()), plan.statistics)
    variance = round_to(squares.sum(-1) / value.shape[-1], plan.variance)
    sqrt = (variance + eps).double().sqrt().float()  # PyTorch's fp32 sqrt is not correctly rounded on every CPU
    return round_to(1 / sqrt, storage).double() == wanted
