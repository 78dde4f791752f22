"""The points at which `make gpu` measures, and which plans and tiles it takes at each. Touches no GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from castpoint.harness.problems.geometry import GEOMETRIES, Geometry, geometry_named
from castpoint.harness.runs.schema import Regime
from castpoint.variants.catalogue import PLANS

if TYPE_CHECKING:
    from castpoint.kernels.config import Config

MODELS = tuple(name for name in GEOMETRIES if name.startswith("qwen3-"))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# The models and token counts that goals are set for; compiled peers, hot rows and chains of layers are measured there.
GOAL_MODELS, GOAL_TOKENS = ("qwen3-0.6b", "qwen3-4b", "qwen3-8b", "qwen3-32b"), (1, 16, 256, 4096)
QUICK_MODELS = ("qwen3-0.6b", "qwen3-8b")
COLD, HOT, LAYERS, ROPE = Regime
PARTED = (COLD, ROPE)  # where P1's parts are timed by themselves, so that it is made of the best
STANDS_FOR = {"prologue": "one-rounding", "epilogue": "deferred", "folded": "folded"}  # scale: plan that is timed
# Of an H200: copy bandwidth and bf16 matmul on random data, as others measured them. A run takes what it measures.
ASSUMED_BYTES_PER_S, ASSUMED_FLOPS_PER_S = 4.3e12, 790e12


@dataclass(frozen=True)
class Point:
    """One shape at one number of tokens: its arms are timed in turns, and share one noise floor."""

    model: str
    tokens: int
    regime: Regime = COLD

    @property
    def geometry(self) -> Geometry:
        return geometry_named(self.model)


def points(quick: bool = False) -> list[Point]:
    """All points, those that say most first, so that a run that is stopped has them."""
    first = [Point(model, tokens) for model in QUICK_MODELS for tokens in GOAL_TOKENS]
    if quick:
        return first
    cold = [Point(model, tokens) for model in MODELS for tokens in TOKENS]
    more = [Point(m, t, regime) for m in GOAL_MODELS for regime in (ROPE, LAYERS, HOT) for t in GOAL_TOKENS]
    return [*first, *(point for point in cold if point not in first), *more]


def own_plans(point: Point) -> tuple[str, ...]:
    """Every plan where weights are cold; else one of each place where rstd may be applied, and with RoPE `hf` too,
    which rounds at each of its boundaries.

    An fp32 matmul runs without tensor cores, tens of milliseconds a call at thousands of tokens: to 256 tokens only.
    """
    if point.regime != COLD:
        return (*(("hf",) if point.regime == ROPE else ()), "one-rounding", "deferred", "folded")
    return tuple(name for name, named in PLANS.items() if named.plan.matmul != "fp32" or point.tokens <= 256)


def loop_tiles(point: Point) -> tuple[Config, ...]:
    """Tiles of our own loop there: every candidate that runs it after a stored hidden, from 33 tokens on. Not at points
    with RoPE, which is none of its business."""
    if point.regime != COLD:
        return ()
    from castpoint.kernels.config import candidates  # which loads triton

    g = point.geometry
    found = candidates(point.tokens, g.hidden_size, g.num_q_heads + 2 * g.num_kv_heads, g.head_dim)
    return tuple(config for config in found if (config.kernel, config.prepass) == ("fused", "hidden"))
