"""Problem: one set of inputs of the chain, checked once, at the door."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from castpoint.kernels.checks import check_inputs, check_rotated


@dataclass(frozen=True)
class Problem:
    """Inputs of RMSNorm -> QKV -> head norm (-> RoPE). T tokens, D channels, H = num_q_heads + 2 num_kv_heads.

    x              [T, D] bf16, the residual stream entering the layer; any strides
    norm_weight    [D] bf16, w_in
    qkv_weight     [H * Dh, D] bf16, rows ordered q, k, v
    q_norm_weight  [Dh] bf16, or None: no head norm (Qwen2, Llama)
    k_norm_weight  [Dh] bf16, or None
    bias           [H * Dh] bf16, or None
    residual       [T, D] bf16 added to x, or None
    positions      [T] int64, or None: q and k are not rotated
    theta          base of RoPE's frequencies theta^(-2i/Dh), which are not scaled; needed where there are positions
    cos_sin_cache  [P, Dh] fp32 or bf16, a row a position below P: cos of Dh / 2 angles, then their sin, as an engine
                   holds it. None: each plan's own table is made (spec.with_table). The truth asks no table
    eps            added to the mean of squares, > 0
    weight_offset  True: norm weights are stored as w - 1 and applied as 1 + w (Gemma)
    logit_scale    what attention multiplies q.k by, behind this chain; None: Dh^-1/2
    model, layer, weights   what the inputs are, for the record

    Raises ValueError with a sentence that says what is wrong and what would be right.
    NaN and infinity are allowed in x and residual, not in weights.
    """

    x: Tensor
    norm_weight: Tensor
    qkv_weight: Tensor
    num_q_heads: int
    num_kv_heads: int
    q_norm_weight: Tensor | None = None
    k_norm_weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    positions: Tensor | None = None
    theta: float | None = None
    cos_sin_cache: Tensor | None = None
    eps: float = 1e-6
    weight_offset: bool = False
    logit_scale: float | None = None
    model: str = "custom"
    layer: int = 0
    weights: str = "given"

    def __post_init__(self) -> None:
        check_inputs(**self.checked())
        check_finite(self)
        check_positions(self)

    def inputs(self) -> dict[str, Any]:
        """The arguments by which kernels.norm_qkv takes this problem; where there are positions it needs a table."""
        not_theirs = ("theta", "weight_offset", "logit_scale", "model", "layer", "weights")
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in not_theirs}

    def checked(self) -> dict[str, Any]:
        """inputs, but no positions where their table is still to be made."""
        return self.inputs() | ({"positions": None} if self.cos_sin_cache is None else {})

    @property
    def tokens(self) -> int:
        return self.x.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.x.shape[1]

    @property
    def num_heads(self) -> int:
        """Heads of q, k and v together."""
        return self.num_q_heads + 2 * self.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.qkv_weight.shape[0] // self.num_heads

    @property
    def has_head_norm(self) -> bool:
        return self.q_norm_weight is not None

    @property
    def head_weights(self) -> tuple[Tensor, Tensor] | None:
        """q_norm_weight and k_norm_weight; None: no head norm."""
        if self.q_norm_weight is None or self.k_norm_weight is None:
            return None
        return self.q_norm_weight, self.k_norm_weight

    def cos_sin(self) -> tuple[Tensor, Tensor]:
        """cos and sin of every channel's angle, [T, 1, Dh] as cos_sin_cache holds them."""
        assert self.cos_sin_cache is not None, "a problem without a table: spec.with_table makes it"
        return both_halves(self.cos_sin_cache[self.positions])

    def replace(self, **changes: Any) -> Self:
        """This problem with some inputs changed; checked like a new one."""
        return dataclasses.replace(self, **changes)

    def to(self, device: str | torch.device) -> Problem:
        """This problem with every tensor on that device."""
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return self.replace(**{k: v.to(device) for k, v in tensors.items() if isinstance(v, Tensor)})

    def split_heads(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, Hq, Dh], k [T, Hkv, Dh], v [T, Hkv, Dh] of a packed [T, H * Dh] or [T, H, Dh]."""
        heads = packed.reshape(packed.shape[0], self.num_heads, self.head_dim)
        return heads.split([self.num_q_heads, self.num_kv_heads, self.num_kv_heads], dim=1)


def check_finite(problem: Problem) -> None:
    for name in ("norm_weight", "qkv_weight", "q_norm_weight", "k_norm_weight", "bias"):
        tensor = getattr(problem, name)
        if tensor is not None and not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN or infinity: weights must be finite")


def check_positions(problem: Problem) -> None:
    positions, theta, cache = problem.positions, problem.theta, problem.cos_sin_cache
    if positions is None:
        return
    check_rotated(positions, problem.tokens, problem.head_dim, like=problem.x)
    if not (isinstance(theta, int | float) and math.isfinite(theta) and theta > 0):
        raise ValueError(f"positions need theta, the base of RoPE's frequencies (1e6 for Qwen3), not {theta!r}")
    if not problem.tokens:
        return
    low, high = int(positions.min()), int(positions.max())
    if cache is None:
        if low < 0:
            raise ValueError(f"positions must not be negative, as {low} is")
        return
    rows = cache.shape[0]
    if low < 0 or high >= rows:
        raise ValueError(f"positions must lie in 0 to {rows - 1}, the rows of cos_sin_cache, not in {low} to {high}")
    if not torch.isfinite(cache[positions]).all():
        raise ValueError("cos_sin_cache holds NaN or infinity at these positions: it must be finite")


def both_halves(row: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, Dh] of rows [T, Dh] that hold cos of Dh / 2 angles, then their sin: both halves of a head turn
    by the same angles."""
    cos, sin = row.unsqueeze(1).chunk(2, dim=-1)
    return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)


def rotate_half(value: Tensor) -> Tensor:
    """The other channel of each pair [..., Dh], negated for the first half: -value[i + Dh/2], then value[i]."""
    first, second = value.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
