"""The points at which `make gpu` measures, and which plans and tiles it takes at each. Touches no GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from castpoint.harness.problems.geometry import GEOMETRIES, Geometry, geometry_named
from castpoint.harness.runs.words import Regime
from castpoint.variants.catalogue import PLANS

if TYPE_CHECKING:
    from castpoint.kernels.config import Config

MODELS = tuple(name for name in GEOMETRIES if name.startswith("qwen3-"))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# Models and token counts that say most, most first; compiled peers, hot rows and chains of layers are measured there.
GOAL_MODELS, GOAL_TOKENS = ("qwen3-0.6b", "qwen3-8b", "qwen3-4b", "qwen3-32b"), (1, 16, 256, 4096)
COLD, HOT, LAYERS, ROPE = Regime
PARTED = (COLD, ROPE)  # where P1's parts are timed by themselves, so that it is made of the best
STANDS_FOR = {"prologue": "one-rounding", "epilogue": "deferred", "folded": "folded"}  # scale: plan that is timed
MAIN_PLANS = ("hf", *STANDS_FOR.values())  # `hf` rounds at each of RoPE's boundaries
# By card: bytes/s of a copy and FLOP/s of a bf16 matmul on random data, as others measured them. A run takes what it
# measures.
ASSUMED = {"h200": (4.3e12, 790e12), "h100": (3.0e12, 798e12)}


@dataclass(frozen=True)
class Point:
    """One shape at one number of tokens: its arms are timed in turns, and share one noise floor."""

    model: str
    tokens: int
    regime: Regime = COLD

    @property
    def geometry(self) -> Geometry:
        return geometry_named(self.model)


def points() -> list[Point]:
    """All points, those that say most first, so that a run that is cut off has them."""
    goals = [(model, tokens) for tokens in GOAL_TOKENS for model in GOAL_MODELS]
    turned = [Point(*goal, regime) for regime in (ROPE, LAYERS, HOT) for goal in goals]
    first = [Point(*goal) for goal in goals]
    models = (*GOAL_MODELS, *(model for model in MODELS if model not in GOAL_MODELS))
    cold = [Point(model, tokens) for model in models for tokens in TOKENS]
    return [*first, *turned, *(point for point in cold if point not in first)]


def other_plans(point: Point) -> tuple[str, ...]:
    """Plans but MAIN_PLANS that are timed there: all, where weights are cold.

    An fp32 matmul runs without tensor cores, tens of milliseconds a call at thousands of tokens: to 256 tokens only.
    """
    names = [name for name, named in PLANS.items() if named.plan.matmul != "fp32" or point.tokens <= 256]
    return tuple(name for name in names if name not in MAIN_PLANS) if point.regime == COLD else ()


def loop_tiles(point: Point) -> tuple[Config, ...]:
    """Tiles of our own loop there: every candidate that runs it after a stored hidden, from 33 tokens on. Not at points
    with RoPE, which is none of its business."""
    if point.regime != COLD:
        return ()
    from castpoint.kernels.config import candidates  # which loads triton

    g = point.geometry
    found = candidates(point.tokens, g.hidden_size, g.num_q_heads + 2 * g.num_kv_heads, g.head_dim)
    return tuple(config for config in found if (config.kernel, config.prepass) == ("fused", "hidden"))
