"""The grid's surroundings in every test here."""

from __future__ import annotations

import pytest
from gpu_support import TINY

import castpoint.harness.gpu.point
import castpoint.harness.gpu.sweep
from castpoint.harness.problems import grid
from castpoint.harness.problems.geometry import GEOMETRIES
from castpoint.kernels import dispatch
from castpoint.variants.catalogue import PLANS


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model small enough for the interpreter, and few plans."""
    monkeypatch.setitem(GEOMETRIES, "tiny", TINY)
    monkeypatch.setattr(grid, "TOKENS", (1, 4))
    castpoint.harness.gpu.point.model_problem.cache_clear()  # which holds the most tokens of the grid
    monkeypatch.setattr(grid, "PLANS", {name: PLANS[name] for name in ("one-rounding", "deferred", "fp32")})
    monkeypatch.setattr(grid, "MAIN_PLANS", ("one-rounding", "deferred"))


@pytest.fixture(autouse=True)
def untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """No committed table, and a GPU that says how it is."""
    monkeypatch.setattr(dispatch, "_committed", lambda: {})
    monkeypatch.setattr(castpoint.harness.gpu.sweep, "gpu_state", lambda: {"sm_mhz": 1980.0, "slowed_by": "none"})
    dispatch._say_once.cache_clear()
