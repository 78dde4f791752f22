"""Rows of which a chain's heads see known numbers, whatever its first norm rounds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from castpoint.harness.fingerprint.probes import READ, ROWS, integers
from castpoint.harness.fingerprint.rules import Rows


@dataclass(frozen=True)
class Geometry:
    """Of a chain: channels of the residual stream, heads of q, heads of k and of v, channels of a head."""

    width: int = 256
    num_q_heads: int = 2
    num_kv_heads: int = 1
    head_dim: int = 128

    @property
    def heads(self) -> tuple[int, int]:
        return self.num_q_heads, self.num_kv_heads

    @property
    def columns(self) -> int:
        """Rows of the projection's weight."""
        return (self.num_q_heads + 2 * self.num_kv_heads) * self.head_dim

    def __str__(self) -> str:
        kv = f"{self.num_q_heads} and {self.num_kv_heads} heads"
        return f"{self.width} channels, {kv} of {self.head_dim}"


@dataclass(frozen=True, eq=False)
class HeadRows:
    """An input of the chain whose first norm is the identity times 2^-15, whatever it rounds, so that the heads see
    known numbers of 10 bits: x [ROWS, width], the weight's Q and K rows, and where each head's READ channels lie."""

    geometry: Geometry
    x: Tensor
    qk_weight: Tensor  # [(Hq + Hkv) * Dh, width]
    places: Tensor  # [Hq + Hkv, READ]
    proj: Tensor  # [ROWS, Hq + Hkv, READ], fp32
    bias: Tensor  # [Hq + Hkv, READ], fp32: proj + bias has 10 bits too

    def rows(self, q_norm_weight: Tensor, k_norm_weight: Tensor, eps: float) -> Rows:
        """The heads as rows of a norm, [ROWS * (Hq + Hkv), READ]; their x is proj."""
        q_heads, kv_heads = self.geometry.heads
        weight = torch.cat([q_norm_weight.expand(q_heads, -1), k_norm_weight.expand(kv_heads, -1)])
        weight = weight.gather(1, self.places).expand(ROWS, -1, -1)
        return Rows(self.proj.flatten(0, 1), weight.flatten(0, 1), eps, self.geometry.head_dim)

    def with_bias(self, rows: Rows, proj: Tensor) -> Rows:
        """The rows where the heads see proj + bias."""
        return dataclasses.replace(rows, x=(proj + self.bias).flatten(0, 1))

    def packed_bias(self) -> Tensor:
        """The bias of all rows of the weight, V's zero."""
        geometry = self.geometry
        qk = torch.zeros(len(self.places), geometry.head_dim).scatter(1, self.places, self.bias)
        return torch.cat([qk.flatten(), torch.zeros(geometry.num_kv_heads * geometry.head_dim)])


def head_rows(geometry: Geometry, rng: torch.Generator) -> HeadRows:
    heads, half = sum(geometry.heads), geometry.width // 2
    x = torch.zeros(ROWS, geometry.width)
    x[:, :half] = integers(8, 16, [ROWS, half], rng)
    for row in x:  # the other half brings the mean of squares to 2^8, in numbers of 4 bits
        left, place = 2**8 * geometry.width - int(row.square().sum()), half
        while left:
            number = max(m << e for m in range(1, 16) for e in range(12) if (m << e) ** 2 <= left)
            row[place], left, place = number, left - number**2, place + 1
    places = torch.rand(heads, geometry.head_dim, generator=rng).argsort(1)[:, :READ]
    first, second = torch.randint(0, half, [2, heads, READ], generator=rng)
    second = torch.where(second == first, (second + 1) % half, second)
    weight = torch.zeros(heads, geometry.head_dim, geometry.width)
    head = torch.arange(heads)[:, None]
    weight[head, places, first] = 1.0
    weight[head, places, second] = 2.0**-6
    proj = (x[:, first] + x[:, second] / 64) / 16
    bias = (2 * integers(0, 20, [heads, READ], rng) + 1) / 64 / 16
    return HeadRows(geometry, x * 2**11, weight.flatten(0, 1), places, proj, bias)
