"""What `make gpu` measures: points of the grid, their arms, and what each needs at least. Touches no GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from castpoint.harness.peers.chains import HEADS, MATMUL, NORM, P2, loop_name
from castpoint.harness.peers.parts import HEAD_NORMS, MATMULS, NORMS
from castpoint.harness.problems.geometry import Geometry, geometry_named
from castpoint.harness.problems.work import Work, heads_work, layer_work, matmul_work, norm_work
from castpoint.kernels.config import Config, candidates
from castpoint.variants.catalogue import PLANS

MODELS = (
    "qwen3-0.6b",
    "qwen3-1.7b",
    "qwen3-30b-a3b",
    "qwen3-4b",
    "qwen3-8b",
    "qwen3-14b",
    "qwen3-235b-a22b",
    "qwen3-32b",
)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# The models and token counts that goals are set for; compiled peers, hot rows and chains of layers are measured there.
GOAL_MODELS, GOAL_TOKENS = ("qwen3-0.6b", "qwen3-4b", "qwen3-8b", "qwen3-32b"), (1, 16, 256, 4096)
QUICK_MODELS = ("qwen3-0.6b", "qwen3-8b")
COLD, HOT, LAYERS = "cold", "hot", "layers"  # weights rotate over 3 x L2; one weight; every layer has its own
ROPE = "rope"  # cold, and q and k are rotated too
PARTED = (COLD, ROPE)  # where P1's parts are timed by themselves, so that it is made of the best
# Of an H200: copy bandwidth and bf16 matmul on random data, as others measured them. A run takes what it measures.
ASSUMED_BYTES_PER_S, ASSUMED_FLOPS_PER_S = 4.3e12, 790e12

# Designs that no kernel has yet: tokens, design, and the measurement of this grid that would call for it.
NOT_BUILT = (
    ("1 to 8", "32 columns a program, sums of squares exchanged between those of a head, no split of D",
     "split-k more than 2.5 us above the floor at qwen3-0.6b, 1 token"),
    ("16 to 128", "W as the left operand, so that wgmma's 64 rows are full at 16 tokens",
     "split-k below 70 % of the roofline at 32 to 128 tokens"),
    ("1024 and more", "TMA, persistent programs, warp specialisation",
     "own loop below its break-even share of the bare matmul's speed at 4096 tokens, which the same run measures"),
    ("1 to 64", "4-bit weights", "blocks of 4-bit weights; no plan has them"),
    ("all", "rows of W interleaved, so that the channels that RoPE turns together meet in one thread",
     "fused gains less over P1 with RoPE than without"),
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One shape at one number of tokens: its arms are timed in turns, and share one noise floor."""

    model: str
    tokens: int
    regime: str = COLD

    @property
    def geometry(self) -> Geometry:
        return geometry_named(self.model)

    @property
    def compiled_peers(self) -> tuple[str, ...]:
        """torch.compile at the goals' points alone, since its tuning takes seconds a shape; its dependent launches at
        the smallest model, where launches weigh most."""
        models = {COLD: GOAL_MODELS, ROPE: QUICK_MODELS}.get(self.regime, ())
        if self.model not in models or self.tokens not in (1, 256, 4096):
            return ()
        return P2[: 2 if (self.model, self.regime) == (GOAL_MODELS[0], COLD) else 1]


@dataclass(frozen=True)
class Row:
    """One measurement. kind: `part` of P1 (and our own loop, timed among them), `peer` or `own`."""

    point: Point
    kind: str
    arm: str
    work: Work

    def floor_s(self) -> float:
        return self.work.floor_s(ASSUMED_BYTES_PER_S, ASSUMED_FLOPS_PER_S)


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
    g = point.geometry
    found = candidates(point.tokens, g.hidden_size, g.num_q_heads + 2 * g.num_kv_heads, g.head_dim)
    return tuple(config for config in found if (config.kernel, config.prepass) == ("fused", "hidden"))


def rows(point: Point, quick: bool = False) -> Iterator[Row]:
    """The measurements of a point. Which chains P1 is made of is decided by the times of its parts: `best` here.
    quick: without compiled peers."""
    g, tokens = point.geometry, point.tokens
    rope = point.regime == ROPE
    if point.regime in PARTED:
        yield from (Row(point, "part", NORM + name, norm_work(g, tokens)) for name in NORMS)
        yield from (Row(point, "part", HEADS + name, heads_work(g, tokens, rope)) for name in HEAD_NORMS[rope])
        yield from (Row(point, "part", MATMUL + name, matmul_work(g, tokens)) for name in MATMULS)
        yield from (Row(point, "part", loop_name(tile), matmul_work(g, tokens)) for tile in loop_tiles(point))
    chain = layer_work(g, tokens, rope)
    yield Row(point, "peer", "P1 best", chain)
    yield Row(point, "peer", "eager", chain)
    yield from (Row(point, "peer", name, chain) for name in (() if quick else point.compiled_peers))
    yield from (Row(point, "own", name, chain) for name in own_plans(point))


def listing(quick: bool = False) -> Iterator[str]:
    """The plan of a run, one line a measurement; the last line sums them up."""
    listed = [row for point in points(quick) for row in rows(point, quick)]
    yield (
        f"# floor: bytes at {ASSUMED_BYTES_PER_S / 1e12:g} TB/s or FLOPs at {ASSUMED_FLOPS_PER_S / 1e12:g} TFLOP/s, "
        "the larger; assumed for an H200. A run measures its own limits. No row has a time before it ran."
    )
    yield f"{'model':16} {'tokens':>6} {'regime':6} {'kind':4} {'MB':>9} {'GFLOP':>9} {'floor_us':>9}  arm"
    for row in listed:
        point = row.point
        yield (
            f"{point.model:16} {point.tokens:6} {point.regime:6} {row.kind:4} {row.work.bytes / 1e6:9.2f} "
            f"{row.work.flops / 1e9:9.2f} {row.floor_s() * 1e6:9.2f}  {row.arm}"
        )
    for tokens, design, reason in NOT_BUILT:
        yield f"# not built, {tokens} tokens: {design}. Called for by: {reason}"
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(row.kind for row in listed).items())
    yield (
        f"# {len(points(quick))} points, {len(listed)} measurements ({kinds}). Their floors add up to "
        f"{sum(row.floor_s() for row in listed):.3g} s: no estimate of the run, which repeats, compiles and checks."
    )
