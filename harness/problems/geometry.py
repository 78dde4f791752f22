"""Shapes of the models the lab knows by name, from their published configurations, and what a layer of them needs at
least: bytes and operations, from sizes alone."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from castpoint.harness.runs.errors import UserError


@dataclass(frozen=True)
class Geometry:
    """Sizes of one attention layer's input: D hidden channels, q and key/value heads of Dh channels.

    logit_scale: what q.k is multiplied by; None: Dh^-1/2.
    """

    hidden_size: int
    num_q_heads: int
    num_kv_heads: int
    num_layers: int
    head_dim: int = 128
    eps: float = 1e-6
    head_norm: bool = True
    bias: bool = False
    weight_offset: bool = False
    logit_scale: float | None = None

    @property
    def projections(self) -> dict[str, int]:
        """Rows of q, k and v, in the order in which the fused QKV weight has them."""
        heads = {"q": self.num_q_heads, "k": self.num_kv_heads, "v": self.num_kv_heads}
        return {name: count * self.head_dim for name, count in heads.items()}

    @property
    def rows(self) -> int:
        """Rows of the fused QKV weight."""
        return sum(self.projections.values())


GEOMETRIES = {
    "qwen3-0.6b": Geometry(1024, 16, 8, 28),
    "qwen3-1.7b": Geometry(2048, 16, 8, 28),
    "qwen3-30b-a3b": Geometry(2048, 32, 4, 48),
    "qwen3-4b": Geometry(2560, 32, 8, 36),
    "qwen3-8b": Geometry(4096, 32, 8, 36),
    "qwen3-14b": Geometry(5120, 40, 8, 40),
    "qwen3-235b-a22b": Geometry(4096, 64, 4, 94),
    "qwen3-32b": Geometry(5120, 64, 8, 64),
    "qwen2.5-0.5b": Geometry(896, 14, 2, 24, head_dim=64, head_norm=False, bias=True),
    "qwen2.5-7b": Geometry(3584, 28, 4, 28, head_norm=False, bias=True),
    "gemma-3-270m": Geometry(640, 4, 1, 18, head_dim=256, weight_offset=True),
}


def geometry_named(model: str) -> Geometry:
    """The geometry of that model. Raises UserError with the nearest name where there is none."""
    if model in GEOMETRIES:
        return GEOMETRIES[model]
    near = difflib.get_close_matches(model, GEOMETRIES, n=1, cutoff=0.3)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"unknown model {model!r}: {hint}models are {', '.join(GEOMETRIES)}")


def name_of(geometry: Geometry) -> str | None:
    """The model of that geometry, or None."""
    return next((name for name, known in GEOMETRIES.items() if known == geometry), None)


@dataclass(frozen=True)
class Work:
    """bytes: every input read once and every output written once, all in bf16. flops: of the matmul, two a
    multiply-add; the norms' are below 1 % of them at every shape here."""

    bytes: int
    flops: int

    def floor_s(self, bytes_per_s: float, flops_per_s: float) -> float:
        """Seconds below which no implementation can run, by bytes or by FLOPs."""
        return max(self.bytes / bytes_per_s, self.flops / flops_per_s)


def chain_work(tokens: int, hidden_size: int, rows: int, small: int) -> Work:
    """x [tokens, hidden_size] in, q, k and v [tokens, rows] out. small: elements of norm weights, bias and the like."""
    weight = rows * hidden_size
    return Work(2 * (tokens * hidden_size + weight + tokens * rows + small), 2 * tokens * weight)


def norm_work(g: Geometry, tokens: int) -> Work:
    """RMSNorm by itself: hidden out."""
    return Work(2 * (2 * tokens * g.hidden_size + g.hidden_size), 0)


def matmul_work(g: Geometry, tokens: int) -> Work:
    """The bare matmul."""
    return chain_work(tokens, g.hidden_size, g.rows, g.rows if g.bias else 0)


def heads_work(g: Geometry, tokens: int, rope: bool = False) -> Work:
    """The head norms by themselves: q and k in and out; with RoPE each token's cos and sin in fp32 too."""
    elements = tokens * (g.num_q_heads + g.num_kv_heads) * g.head_dim
    return Work(2 * (2 * elements + 2 * g.head_dim + (2 * tokens * g.head_dim if rope else 0)), 0)


def layer_work(g: Geometry, tokens: int, rope: bool = False) -> Work:
    """The whole chain of a layer; with RoPE it reads each token's cos and sin too, in fp32."""
    small = g.hidden_size + (2 * g.head_dim if g.head_norm else 0) + (g.rows if g.bias else 0)
    small += 2 * tokens * g.head_dim if rope else 0
    return chain_work(tokens, g.hidden_size, g.rows, small)
