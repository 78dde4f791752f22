"""Problem: one set of inputs of the chain, checked once, at the door."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from castpoint.kernels.checks import check_inputs


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
    positions      [T] int64 below P, or None: q and k are not rotated
    cos_sin_cache  [P, Dh] fp32 or bf16, a row a position: cos of Dh / 2 angles, then their sin; or None
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
    cos_sin_cache: Tensor | None = None
    eps: float = 1e-6
    weight_offset: bool = False
    logit_scale: float | None = None
    model: str = "custom"
    layer: int = 0
    weights: str = "given"

    def __post_init__(self) -> None:
        check_inputs(**self.inputs())
        check_finite(self)
        check_positions(self)

    def inputs(self) -> dict[str, Any]:
        """The arguments by which kernels.norm_qkv takes this problem."""
        shown_only = ("weight_offset", "logit_scale", "model", "layer", "weights")
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in shown_only}

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
        """cos and sin of every channel's angle, [T, 1, Dh] as the cache holds them: both halves of a head alike."""
        assert self.cos_sin_cache is not None, "q and k of a problem without positions are not rotated"
        cos, sin = self.cos_sin_cache[self.positions].unsqueeze(1).chunk(2, dim=-1)
        return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)

    def replace(self, **changes: Any) -> Problem:
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
    positions, cache = problem.positions, problem.cos_sin_cache
    if positions is None or cache is None or not problem.tokens:
        return
    rows, low, high = cache.shape[0], int(positions.min()), int(positions.max())
    if low < 0 or high >= rows:
        raise ValueError(f"positions must lie in 0 to {rows - 1}, the rows of cos_sin_cache, not in {low} to {high}")
    if not torch.isfinite(cache[positions]).all():
        raise ValueError("cos_sin_cache holds NaN or infinity at these positions: it must be finite")


def rotate_half(value: Tensor) -> Tensor:
    """The other channel of each pair [..., Dh], negated for the first half: -value[i + Dh/2], then value[i]."""
    first, second = value.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
