"""What a run measures; part of its record."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Settings:
    """What a run measures."""

    model: str = "qwen3-0.6b"
    checkpoint: str | None = None
    layers: tuple[int, ...] = ()
    tokens: int = 128
    kernel_tokens: int = 16
    speed_tokens: tuple[int, ...] = (1, 16, 128)
    plans: tuple[str, ...] = ()
    seed: int = 0
    device: str = "cpu"
    speed_budget_s: float = 15.0

    def row(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
