"""Problems with QKV weights in Q4_0 or Q8_0 blocks: drawn ones, and exact ones, whose sums have no order.

The exact ones are those of exact.py with W on the grid of the blocks:

- `one` product a sum. Heads that are normed hold powers of two, as there, each cut otherwise into scale and number.
  Rows of V hold any d * n, of up to 15 or 19 bits: the one product is rounded once, so weights need be no powers of
  two, and show how they were rounded.
- `many`. Rows of V hold small whole numbers times a power of two, in every channel; hidden is a whole multiple of
  2^-5 below 2^9 of them, so that what a sum can be is below 2^24 of them (asserted). Normed heads read two channels
  whose magnitude is the same for every token.

Where a row holds no weight its numbers are zero and its scales drawn: another offset than 8, another block's scale and
another nibble all show.
"""

from __future__ import annotations

import torch
from torch import Tensor

from castpoint.harness.problems.exact import DRAWS, agreeing, exact_problem
from castpoint.harness.problems.many_products import UNIT, channels
from castpoint.kernels.plan import RNE, CastPlan
from castpoint.kernels.quantised import BLOCK
from castpoint.variants.problem import Problem
from castpoint.variants.quantised import QuantisedProblem, packed_of, quantised_problem
from castpoint.variants.spec import spec

LARGEST = {"q4_0": 7, "q8_0": 127}  # number of which the opposite is there too


def drawn_quantised(problem: Problem, format: str, weight: str = RNE, seed: int = 0) -> QuantisedProblem:
    """That problem with drawn blocks: every number as likely, scales of one sign or the other, so that weights have
    about the size of the problem's own."""
    rng = torch.Generator().manual_seed(seed)
    rows, width = problem.qkv_weight.shape
    size = problem.qkv_weight.float().square().mean().sqrt() / LARGEST[format]
    scale = (size * torch.randn(rows, width // BLOCK, generator=rng)).to(torch.float16)
    number = torch.randint(-LARGEST[format] - 1, LARGEST[format] + 1, (rows, width), generator=rng)
    return quantised_problem(problem, packed_of(scale, number, format), format, weight)


def exact_quantised(
    plan: CastPlan, format: str, weight: str = RNE, *, products: str = "one", hidden_size: int = 224,
    head_norm: bool = True, rope: bool = False, seed: int = 0, **geometry: int,
) -> QuantisedProblem:  # fmt: skip
    """A problem on which a right kernel equals spec(plan) bit for bit. geometry: tokens, heads and head_dim of
    exact_problem. Raises what that raises, and ValueError where D is no multiple of 32."""
    if hidden_size % BLOCK:
        raise ValueError(f"hidden_size must be a multiple of {BLOCK}, not {hidden_size}")
    rng = torch.Generator().manual_seed(seed)
    shape = {"hidden_size": hidden_size, "head_norm": head_norm, "rope": rope, "seed": seed, **geometry}
    base = exact_problem(plan, products=products, **shape)
    normed = (base.num_q_heads + base.num_kv_heads) * base.head_dim * head_norm
    for _ in range(DRAWS):
        scale, number = (_one if products == "one" else _many)(plan, base, normed, rope, format, rng)
        found = quantised_problem(base, packed_of(scale, number, format), format, weight)
        q, k, _v = found.split_heads(spec(plan, found).proj)
        if not normed or bool(agreeing(plan, torch.cat([q, k], dim=1), base.eps, plan.head_rstd).all()):
            if products == "many":
                _check_sums(plan, found)
            return found
    raise RuntimeError(f"no exact problem in blocks for {plan} in {DRAWS} draws")


def _one(
    plan: CastPlan, base: Problem, normed: int, rope: bool, format: str, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Scales and numbers of W: the base's one power of two a row, and from row `normed` on any weight in its place."""
    at = base.qkv_weight.abs().argmax(dim=1, keepdim=True)
    value = base.qkv_weight.gather(1, at).float()
    scale = 0.1 * torch.randn(len(value), base.hidden_size // BLOCK, generator=rng)
    number = value.sign() * 2.0 ** torch.randint(0, 3, value.shape, generator=rng)
    whole = scale.gather(1, at // BLOCK)
    here = torch.where(number == 0, whole, value.abs() / number.abs())
    if plan.scale == "prologue" or plan.matmul in ("bf16", "tf32"):  # a product is rounded once, or not at all
        number[normed:] = torch.randint(1, LARGEST[format] + 1, value[normed:].shape, generator=rng) * 1.0
        here[normed:] = whole[normed:]
    numbers = torch.zeros(base.qkv_weight.shape).scatter(1, at, number)
    return scale.scatter(1, at // BLOCK, here).to(torch.float16), numbers


def _many(
    plan: CastPlan, base: Problem, normed: int, rope: bool, format: str, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Scales and numbers of W: small whole numbers everywhere, and in a normed head two rows of one channel each."""
    rows, width = base.qkv_weight.shape
    scale = 2.0 ** torch.randint(0, 3, (rows, width // BLOCK), generator=rng)
    scale *= torch.randint(0, 2, scale.shape, generator=rng) * 2 - 1
    number = torch.randint(-8, 8, (rows, width), generator=rng)
    wide = torch.randint(-LARGEST[format] - 1, LARGEST[format] + 1, (rows, width), generator=rng)
    number = torch.where(torch.rand(rows, width, generator=rng) < 1 / 16, wide, number).float()
    number[:normed] = 0
    digits = channels(width)[0].flatten()
    for first in range(0, normed, base.head_dim):
        two = torch.randperm(base.head_dim, generator=rng)[:2]
        two[1] = (two[0] + base.head_dim // 2) % base.head_dim if rope else two[1]
        read = digits[torch.randperm(len(digits), generator=rng)[:2]]
        number[first + two, read] = torch.randint(1, LARGEST[format] + 1, (2,), generator=rng).float()
    return scale.to(torch.float16), number


def _check_sums(plan: CastPlan, problem: QuantisedProblem) -> None:
    """Raises RuntimeError unless every sum of products, in any order, is a whole number of units that fp32 holds."""
    hidden = spec(plan, problem).hidden / UNIT
    whole = problem.qkv_weight.double()
    largest = (hidden.abs() @ whole.abs().T).max().item()
    if largest >= 2**24 or bool((hidden != hidden.round()).any()) or bool((whole != whole.round()).any()):
        raise RuntimeError(f"sums of an exact problem in blocks reach {largest} units, or are not whole")
