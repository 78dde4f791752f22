"""The grid's surroundings in every test here."""

from __future__ import annotations

import pytest
from gpu_support import LIMITS, TINY

import castpoint.harness.gpu.sweep
from castpoint.harness.problems import grid
from castpoint.harness.problems.geometry import GEOMETRIES
from castpoint.kernels import dispatch
from castpoint.variants.catalogue import PLANS


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model small enough for the interpreter, limits that need no GPU, and few plans."""
    monkeypatch.setitem(GEOMETRIES, "tiny", TINY)
    monkeypatch.setattr(grid, "TOKENS", (1, 4))
    monkeypatch.setattr(grid, "PLANS", {name: PLANS[name] for name in ("one-rounding", "deferred", "fp32")})
    monkeypatch.setattr(castpoint.harness.gpu.sweep, "ceilings", lambda gpu: LIMITS)
    monkeypatch.setattr(
        castpoint.harness.gpu.sweep, "read_ceiling", lambda gpu, weights: {"bytes_per_s": 2e12, "seconds": 1e-6}
    )
    monkeypatch.setattr(castpoint.harness.gpu.sweep, "launch_costs", lambda gpu: {"per_kernel_s": 1e-6})
    monkeypatch.setattr(castpoint.harness.gpu.sweep, "gpu_state", lambda: {"sm_mhz": 1980.0, "slowed_by": "none"})
    monkeypatch.setattr(dispatch, "_committed", lambda: {})
    monkeypatch.setattr(castpoint.harness.gpu.sweep, "HOT_COPIES", 2)
