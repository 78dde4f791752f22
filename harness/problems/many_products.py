"""Inputs of the exact problem with many products a dot product (exact.py).

Products are whole multiples of one number, and in magnitude a row's add up to less than 2^24 of it. So every partial
sum, in any order, is exact in fp32, and on a tensor core that keeps 23 bits below its largest exponent.

- eps makes variance + eps 4, so that rstd is 1/2 and hidden whole multiples of UNIT under every plan. Of a variance
  that is off by an ulp rstd is no such number, and nothing is whole any more.
- x and norm weights of the left channels come a second time on the right, W with the other sign: whatever a token
  holds, products cancel in pairs. One pair of a row outgrows all others: between its two products a partial sum has
  21 to 23 bits, and one that is not held in fp32 loses what is small.
- Digits, 2 x 3 channels at which hidden is UNIT or -UNIT, three with one sign a token and three with another, carry
  what is left of the sum, a whole number: eight of 10 bits for a Q or K head whose squares are summed next, for V one
  of 22 bits a row. A third of them are ties of bf16, a third one unit beside such a tie.
- In every fourth row of V there are none, and the small weights on the right are others than on the left: sums which
  differ by token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from castpoint.kernels.plan import KEEP, CastPlan
from castpoint.variants.spec import store

UNIT = 2.0**-5
LARGE = 2.0**13  # the weights of the pair that outgrows all others: hidden is below 2^9 units
WIDEST = 8192  # channels for which all products of a row, in magnitude, add up to less than 2^24
SUMS, HEAD_BITS = 8, 10  # of a normed head: so many squares of so many bits, a bias too, add up to less than 2^24
V_BITS = 22


def channels(hidden_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Digits [2, 3] spread over all channels, and of the others left and right, each as many; one may be left over."""
    digits = torch.linspace(0, hidden_size - 1, 6).round().long()
    others = torch.ones(hidden_size, dtype=torch.bool).index_fill(0, digits, False).nonzero().flatten()
    left, right = others[: len(others) // 2 * 2].chunk(2)
    return digits.reshape(3, 2).T, left, right


def draw_rows(plan: CastPlan, tokens: int, hidden_size: int, rng: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """x [T, D], norm_weight [D] and eps of the problem."""
    digits, left, right = channels(hidden_size)
    x = torch.ones(tokens, hidden_size)
    row = (31 - torch.arange(len(left)) % 12) / 16
    order = torch.rand(tokens, len(left), generator=rng).argsort()
    x[:, left] = x[:, right] = row[order] * signs(rng, tokens, len(left))
    x[:, digits] = signs(rng, tokens, 2, 1)
    weight = torch.ones(hidden_size)
    weight[left] = weight[right] = torch.randint(8, 16, (len(left),), generator=rng).float()
    weight[digits] = 2 * UNIT
    weight = weight - int(plan.weight_offset != "none")
    return x, weight.to(torch.bfloat16), 4 - variance(plan, x[:1].double()).item()


def variance(plan: CastPlan, value: Tensor) -> Tensor:
    """Mean of the squares of value [..., n] float64, as the spec holds it; [...]."""
    squares = value * value if plan.statistics == KEEP else store(value * value, plan.statistics)
    return store(squares.mean(-1), plan.variance)


def draw_head(weight: Tensor, bias: Tensor, *, normed: bool, pairs: bool, biased: bool, rng: torch.Generator) -> None:
    """Fills a head's rows of W [Dh, D], and its bias [Dh], which stays zero unless biased.

    normed: its squares are summed next, so that all but eight sums are zero; those of pairs i and i + Dh/2, for pairs.
    """
    rows = weight.shape[0]
    sums, group = torch.zeros(rows).long(), torch.arange(rows) % 2
    if normed:
        few = torch.randperm(rows // 2 if pairs else rows, generator=rng)[: SUMS // 2 if pairs else SUMS]
        few = torch.cat([few, few + rows // 2]) if pairs else few
        sums[few], group[few] = whole_numbers(SUMS, HEAD_BITS, rng), torch.arange(SUMS) % 2
        beside = torch.zeros(rows).long().index_put((few,), torch.randint(-100, 101, (SUMS,), generator=rng))
    else:
        sums = whole_numbers(rows, V_BITS, rng)
        beside = torch.randint(-255, 256, (rows,), generator=rng) << torch.randint(0, 9, (rows,), generator=rng)
    is_open = torch.zeros(rows).bool() if normed else torch.arange(rows) % 4 == 3
    beside = beside * int(biased)
    bias.copy_(beside * UNIT)
    fill_rows(weight, (sums - beside) * ~is_open, group, is_open, rng)


def fill_rows(weight: Tensor, sums: Tensor, group: Tensor, is_open: Tensor, rng: torch.Generator) -> None:
    """W [rows, D], so that dot products are sums [rows] in UNIT times a sign of that group, where not open."""
    digits, left, right = channels(weight.shape[1])
    rows, size = torch.arange(weight.shape[0]), (weight.shape[0], len(left))
    small, others = (torch.randint(1, 3, size, generator=rng) * signs(rng, *size) for _ in range(2))
    weight.zero_()
    weight[:, left], weight[:, right] = small, torch.where(is_open[:, None], others, -small)
    pair, large = torch.randint(0, len(left), (len(rows),), generator=rng), LARGE * signs(rng, len(rows))
    weight[rows, left[pair]], weight[rows, right[pair]] = large, -large
    places = torch.rand(len(rows), 3, generator=rng).argsort()
    for digit in range(3):
        value = sums.abs() // 256**digit % 256 * 256**digit
        weight[rows, digits[group, places[:, digit]]] = (sums.sign() * value).float()


def whole_numbers(count: int, bits: int, rng: torch.Generator) -> Tensor:
    """[count] int64, 256 to 2^bits: a third ties of bf16, a third one beside such a tie, the others any."""
    ties = 2 * torch.randint(128, 256, (count,), generator=rng) + 1
    ties = ties << torch.randint(1, bits - 8, (count,), generator=rng)
    kinds = torch.stack([ties, ties + signs(rng, count).long(), torch.randint(256, 2**bits, (count,), generator=rng)])
    return kinds[torch.randint(0, 3, (count,), generator=rng), torch.arange(count)] * signs(rng, count).long()


def signs(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(0, 2, shape, generator=rng) * 2.0 - 1
