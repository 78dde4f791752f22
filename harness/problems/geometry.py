"""Shapes of the models the lab knows by name, from their published configurations."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from castpoint.harness.runs.errors import UserError


@dataclass(frozen=True)
class Geometry:
    """Sizes of one attention layer's input: D hidden channels, q and key/value heads of Dh channels."""

    hidden_size: int
    num_q_heads: int
    num_kv_heads: int
    num_layers: int
    head_dim: int = 128
    eps: float = 1e-6
    head_norm: bool = True
    bias: bool = False
    weight_offset: bool = False

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
