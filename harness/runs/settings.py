"""What a run is asked for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What a run measures; part of its record."""

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
