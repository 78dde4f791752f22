"""Bytes and operations that the chain and its parts need at least, from sizes alone."""

from __future__ import annotations

from dataclasses import dataclass

from castpoint.harness.problems.geometry import Geometry


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
