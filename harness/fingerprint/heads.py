"""Rows of which a chain's heads see known numbers, whatever its first norm rounds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from castpoint.harness.fingerprint.probes import READ, ROWS, integers
from castpoint.harness.fingerprint.rules import Rows

WIDE = 2  # numbers of a head that have a bit more than fp16


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
    """An input of the chain whose first norm is the identity times a power of two, whatever it rounds, so that heads
    see known numbers: x [ROWS, width], the weight's Q and K rows, and where each head's READ channels lie."""

    geometry: Geometry
    x: Tensor
    qk_weight: Tensor  # [(Hq + Hkv) * Dh, width]
    places: Tensor  # [Hq + Hkv, READ]
    proj: Tensor  # [ROWS, Hq + Hkv, READ], fp32
    bias: Tensor  # [Hq + Hkv, READ], fp32: proj + bias has as many bits

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


def head_rows(geometry: Geometry, rng: torch.Generator, eps: float, narrow: str = "bf16") -> HeadRows:
    """In bf16 all numbers have 10 bits, and x is of such a size that eps is nothing beside its mean of squares, 2^30.
    fp16 ends at 2^16: there that is 2^8 less eps, a multiple of 1 / width or nothing, and no square of x is larger; the
    first WIDE numbers have 12 bits, and the others so few that the sum of squares still has 24."""
    half, wide, heads = narrow == "fp16", WIDE * (narrow == "fp16"), sum(geometry.heads)
    sizes = [m << e for m in range(1, 16) for e in range(5 if half else 12)]
    first_ones, short, scale = (2.0**-3, 2.0**-8, 1.0) if half else (1.0, 2.0**-6, 2.0**11)
    held, middle = round(eps * geometry.width) if half else 0, geometry.width // 2
    x = torch.zeros(ROWS, geometry.width)
    x[:, :middle] = integers(8, 16, [ROWS, middle], rng)
    x[:, :wide] = integers(8, 10, [ROWS, wide], rng)
    for row in x:  # the other half brings the mean of squares to 2^8, in numbers of 4 bits
        left, place = 2**8 * geometry.width - held - int(row.square().sum()), middle
        while left:
            number = max(size for size in sizes if size**2 <= left)
            row[place], left, place = number, left - number**2, place + 1
    places = torch.rand(heads, geometry.head_dim, generator=rng).argsort(1)[:, :READ]
    first, second = torch.randint(0, middle, [2, heads, READ], generator=rng)
    first[:, :wide] %= max(wide, 1)
    second = torch.where(second == first, (second + 1) % middle, second)
    coarse = torch.tensor([1.0] * wide + [first_ones] * (READ - wide))
    weight = torch.zeros(heads, geometry.head_dim, geometry.width)
    head = torch.arange(heads)[:, None]
    weight[head, places, first] = coarse.expand(heads, -1)
    weight[head, places, second] = short
    proj = (x[:, first] * coarse + x[:, second] * short) / 16
    bias = (2 * integers(0, 20, [heads, READ], rng) + 1) * short / 16
    return HeadRows(geometry, x * scale, weight.flatten(0, 1), places, proj, bias)
