"""Rows of which a chain's heads see known numbers, whatever its first norm rounds."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from castpoint.harness.fingerprint.probes import HEAD_DIM, NUM_KV_HEADS, NUM_Q_HEADS, READ, ROWS, WIDTH, integers
from castpoint.harness.fingerprint.rules import Rows


@dataclasses.dataclass(frozen=True, eq=False)
class HeadRows:
    """An input of the chain whose first norm is the identity times 2^-15, whatever it rounds, so that the heads see
    known numbers of 10 bits: x [ROWS, WIDTH], the weight's Q and K rows, and where each head's READ channels lie."""

    x: Tensor
    qk_weight: Tensor  # [(Hq + Hkv) * HEAD_DIM, WIDTH]
    places: Tensor  # [Hq + Hkv, READ]
    proj: Tensor  # [ROWS, Hq + Hkv, READ], fp32
    bias: Tensor  # [Hq + Hkv, READ], fp32: proj + bias has 10 bits too

    def rows(self, q_norm_weight: Tensor, k_norm_weight: Tensor, eps: float) -> Rows:
        """The heads as rows of a norm, [ROWS * (Hq + Hkv), READ]; their x is proj."""
        weight = torch.cat([q_norm_weight.expand(NUM_Q_HEADS, -1), k_norm_weight.expand(NUM_KV_HEADS, -1)])
        weight = weight.gather(1, self.places).expand(ROWS, -1, -1)
        return Rows(self.proj.flatten(0, 1), weight.flatten(0, 1), eps, HEAD_DIM)

    def packed_bias(self) -> Tensor:
        """The bias of all rows of the weight, V's zero."""
        qk = torch.zeros(len(self.places), HEAD_DIM).scatter(1, self.places, self.bias)
        return torch.cat([qk.flatten(), torch.zeros(NUM_KV_HEADS * HEAD_DIM)])


def head_rows(rng: torch.Generator) -> HeadRows:
    heads, half = NUM_Q_HEADS + NUM_KV_HEADS, WIDTH // 2
    x = torch.zeros(ROWS, WIDTH)
    x[:, :half] = integers(8, 16, [ROWS, half], rng)
    for row in x:  # the other half brings the sum of squares to 2^16, in numbers of 4 bits
        left, place = 2**16 - int(row.square().sum()), half
        while left:
            number = max(m << e for m in range(1, 16) for e in range(8) if (m << e) ** 2 <= left)
            row[place], left, place = number, left - number**2, place + 1
    places = torch.rand(heads, HEAD_DIM, generator=rng).argsort(1)[:, :READ]
    first, second = torch.rand(2, heads, READ, half, generator=rng).argsort(-1)[..., 0]
    second = torch.where(second == first, (second + 1) % half, second)
    weight = torch.zeros(heads, HEAD_DIM, WIDTH)
    head = torch.arange(heads)[:, None]
    weight[head, places, first] = 1.0
    weight[head, places, second] = 2.0**-6
    proj = (x[:, first] + x[:, second] / 64) / 16
    bias = (2 * integers(0, 20, [heads, READ], rng) + 1) / 64 / 16
    return HeadRows(x * 2**11, weight.flatten(0, 1), places, proj, bias)
