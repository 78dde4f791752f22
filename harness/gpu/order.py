"""What a GPU run does, in which order, and how long that may take: by worth, so that who is cut off has the best.

First the GPU's limits and its arithmetic; then, point by point, the four models and token counts that say most: parts,
every config, chains. Then what decides designs, all other plans, the rest of the grid, and torch.compile's tuning last
and by itself, which takes longer a row than all else. Touches no GPU; what it assumes of one stands in Costs and CARDS.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil

from castpoint.harness.conformance.cuda import Binary, binary_of
from castpoint.harness.peers.chains import P2
from castpoint.harness.peers.parts import MATMULS
from castpoint.harness.problems import grid
from castpoint.harness.problems.geometry import Work, heads_work, layer_work, matmul_work, norm_work
from castpoint.harness.problems.grid import COLD, GOAL_MODELS, GOAL_TOKENS, HOT, LAYERS, MAIN_PLANS, ROPE, Point
from castpoint.harness.runs.words import Kind, Step
from castpoint.harness.timing import rig
from castpoint.kernels.config import Config, candidates, unsupported
from castpoint.kernels.dispatch import reasoned
from castpoint.variants.catalogue import plan_named

SEPARATE = Config("separate")
HOT_COPIES = 8  # of one weight
PART_BUDGET_S, TUNING_BUDGET_S, CHAIN_BUDGET_S = 0.3, 0.5, 1.0  # of rounds; ten are taken whatever they cost


@dataclass(frozen=True)
class Item:
    """One step, at a point where it has one. Its rows are written before the next begins."""

    step: Step
    point: Point | None = None

    @property
    def key(self) -> dict[str, object]:
        """Of its row of gpu_steps."""
        at = {n: getattr(self.point, n) for n in ("model", "tokens", "regime")} if self.point else {}
        return {"step": self.step, "model": "", "tokens": 0, "regime": ""} | at


def order() -> list[Item]:
    """Everything, most worth first."""
    goals = [Point(model, tokens) for tokens in GOAL_TOKENS for model in GOAL_MODELS]
    cold = [p for p in grid.points() if p.regime == COLD and p not in goals]
    near = [p for p in cold if p.model in GOAL_MODELS]
    turned = [p for p in grid.points() if p.regime != COLD]
    compiled = [p for p in (*goals, *turned) if compiled_peers(p)]
    return [
        Item(Step.LIMITS),
        Item(Step.EAGER),
        *_at(goals, Step.PARTS, Step.TUNING, Step.CHAINS),
        *(Item(step) for step in (Step.TENSOR_CORES, Step.OUTPUTS, Step.COUNTERS)),
        *_at(goals, Step.PLANS),
        *_at(turned, Step.PARTS, Step.CHAINS),
        *_at([*near, *(p for p in cold if p not in near)], Step.PARTS, Step.TUNING, Step.CHAINS),
        *_at(cold, Step.PLANS),
        *_at(compiled, Step.COMPILED),
    ]


def _at(points: Iterable[Point], *steps: Step) -> Iterator[Item]:
    for point in points:
        yield from (Item(step, point) for step in steps if step != Step.PARTS or point.regime in grid.PARTED)


def compiled_peers(point: Point) -> tuple[str, ...]:
    """torch.compile at some points alone, since its tuning takes most of a minute a shape; its dependent launches at
    the smallest model, where launches weigh most."""
    models = {COLD: GOAL_MODELS, ROPE: GOAL_MODELS[:2]}.get(point.regime, ())
    if point.model not in models or point.tokens not in (1, 256, 4096):
        return ()
    return P2[: 2 if (point.model, point.regime) == (GOAL_MODELS[0], COLD) else 1]


# ---------------------------------------------------------------- what a step launches


def tiles(point: Point, plan: str) -> list[Config]:
    """The fused configs that are worth timing there for that plan, most promising first."""
    g = point.geometry
    found = candidates(point.tokens, g.hidden_size, g.num_q_heads + 2 * g.num_kv_heads, g.head_dim)
    return [c for c in found if c != SEPARATE and not unsupported(c, plan_named(plan))]


def default_tile(point: Point, plan: str) -> Config:
    """What a launch takes there where no table says more."""
    g = point.geometry
    shape = (g.hidden_size, g.num_q_heads, g.num_kv_heads, g.head_dim)
    return reasoned(shape, point.tokens, plan_named(plan))


def binaries(item: Item) -> list[Binary]:
    """What that step launches of our own kernels, as far as it is known before anything is timed: whichever config
    tuning finds fastest is among them."""
    point = item.point
    if point is None:
        return []

    def each(plan: str, configs: Iterable[Config]) -> list[Binary]:
        width, rope = point.geometry.hidden_size, point.regime == ROPE
        return [binary_of(plan, config, point.tokens, width, rope) for config in configs]

    own_chain = each("one-rounding", [SEPARATE])
    if item.step == Step.PARTS:
        loops = [Binary("", tile) for tile in grid.loop_tiles(point)]
        return [*own_chain, *loops]
    if item.step == Step.TUNING:
        named = (each(plan, tiles(point, plan)) for plan in grid.STANDS_FOR.values())
        return list(dict.fromkeys([*own_chain, *(binary for many in named for binary in many)]))
    if item.step == Step.CHAINS:
        return list(dict.fromkeys([*own_chain, *(b for plan in MAIN_PLANS for b in each(plan, expected(point, plan)))]))
    if item.step == Step.PLANS:
        others = grid.other_plans(point)
        return [*own_chain, *(b for plan in others for b in each(plan, expected(point, plan)[:1]))]
    return own_chain


def configs_of(point: Point, plan: str, tuned: Config | None = None, fused: Config | None = None) -> dict[str, Config]:
    """How that plan is timed there, by what follows its name: as tuned, else as a launch that no table tells; and where
    that is `separate`, as the fastest fused config too, else the most promising."""
    config, fused = tuned or default_tile(point, plan), fused or next(iter(tiles(point, plan)), None)
    return {"": config, ", fused": fused} if config == SEPARATE and fused else {"": config}


def expected(point: Point, plan: str) -> list[Config]:
    """Before tuning has its say."""
    return list(configs_of(point, plan).values())


# ---------------------------------------------------------------- how long it may take


@dataclass(frozen=True)
class Card:
    """What a clock is computed for. Bytes/s of a copy and FLOP/s of a bf16 matmul, as others measured them."""

    name: str
    bytes_per_s: float
    flops_per_s: float
    l2_bytes: int


CARDS = {
    "h100": Card("H100 80 GB", *grid.ASSUMED["h100"], 50_000_000),
    "h200": Card("H200", *grid.ASSUMED["h200"], 60_000_000),
}


@dataclass(frozen=True)
class Costs:
    """Seconds, estimated: compiling was timed on a CPU, the others were not. A run notes what each step took, beside
    what was estimated (gpu_steps), so that the next one knows better."""

    begin: float = 10.0  # imports, and CUDA's own beginning
    compile: float = 1.1  # of a binary, on one core
    check: float = 0.1  # two runs, a spec, an envelope
    arm: float = 0.15  # captured, its outputs checked twice
    point: float = 0.3  # weights drawn and copied
    limits: float = 6.0
    eager: float = 2.0
    tensor_cores: float = 5.0
    outputs: float = 3.0
    counters: float = 45.0  # two processes start under a profiler
    compiled: float = 45.0  # torch.compile's tuning of one shape
    cores: int = 16

    def of(self, step: Step) -> float:
        """Of a step without a point."""
        return float(getattr(self, step.replace(" ", "_")))


@dataclass(frozen=True)
class Estimate:
    """When a step begins, and what it waits for. Seconds."""

    item: Item
    start: float
    compile: float
    check: float
    measure: float

    @property
    def seconds(self) -> float:
        return self.compile + self.check + self.measure


def clock(items: Iterable[Item], card: Card, costs: Costs = Costs()) -> Iterator[Estimate]:
    """The steps with their estimated times. Binaries compile in this order from the start, while the GPU measures."""
    now, compiled, seen = costs.begin, 0.0, set[Binary]()
    for item in items:
        new = [binary for binary in binaries(item) if binary not in seen]
        seen.update(new)
        compiled += len(new) * costs.compile / costs.cores
        wait = max(0.0, compiled - now) if new else 0.0
        found = Estimate(item, now, wait, 2 * len(new) * costs.check, measured_s(item, card, costs))
        yield found
        now += found.seconds


def measured_s(item: Item, card: Card, costs: Costs) -> float:
    """Seconds of timing a step's arms, as timing.rig spends them, each at twice its floor."""
    point = item.point
    if point is None:
        return costs.of(item.step)
    floor_s = work_of(point, Kind.OWN).floor_s(card.bytes_per_s, card.flops_per_s)
    cold = rig.cold_copies(2 * point.geometry.rows * point.geometry.hidden_size, card.l2_bytes)
    copies = {HOT: HOT_COPIES, LAYERS: point.geometry.num_layers}.get(point.regime, cold)
    graph_s = 2 * floor_s * copies * rig.laps_for(copies, floor_s)
    sample_s = graph_s * (1 + rig.replays_for(graph_s, rig.SAMPLE_S))  # one replay goes first
    seconds = costs.point + costs.compiled * len(compiled_peers(point)) * (item.step == Step.COMPILED)
    for count, budget in arm_counts(item):
        round_s = 2 * (count + 1) * sample_s  # and the first arm once more
        warm, counted = max(2, ceil(rig.WARM_S / round_s)), max(rig.MIN_ROUNDS, ceil(budget / round_s))
        seconds += (warm + min(counted, rig.MAX_ROUNDS)) * round_s + (count + 1) * costs.arm
    return seconds + (rig.LOAD_S if item.step == Step.CHAINS else 0)


def arm_counts(item: Item) -> list[tuple[int, float]]:
    """Arms that a step times in turns, and the budget of their rounds; TUNING times three such groups."""
    point = item.point
    assert point is not None
    if item.step == Step.PARTS:  # of the norms, those that every machine has
        return [(2 + len(MATMULS) + 1 + len(grid.loop_tiles(point)), PART_BUDGET_S)]
    if item.step == Step.TUNING:
        return [(1 + len(tiles(point, plan)), TUNING_BUDGET_S) for plan in grid.STANDS_FOR.values()]
    if item.step == Step.CHAINS:  # three chains, two P4, eager
        return [(6 + sum(len(expected(point, plan)) for plan in MAIN_PLANS), CHAIN_BUDGET_S)]
    if item.step == Step.PLANS:
        return [(2 + len(grid.other_plans(point)), CHAIN_BUDGET_S)]
    return [(2 + len(compiled_peers(point)), CHAIN_BUDGET_S)]


def work_of(point: Point, kind: Kind) -> Work:
    """What an arm of that kind needs at least."""
    g, tokens, rope = point.geometry, point.tokens, point.regime == ROPE
    if kind == Kind.NORM:
        return norm_work(g, tokens)
    if kind == Kind.HEADS:
        return heads_work(g, tokens, rope)
    bare = kind in (Kind.MATMUL, Kind.LAUNCHES, Kind.LOOP)
    return matmul_work(g, tokens) if bare else layer_work(g, tokens, rope)


def listing() -> Iterator[str]:
    """The order of a run with the clock of an H100, a line a step; at the end what is there when it is cut off."""
    estimates = list(clock(order(), CARDS["h100"]))
    limits = (f"{c.name}: {c.bytes_per_s / 1e12:g} TB/s, {c.flops_per_s / 1e12:g} TFLOP/s" for c in CARDS.values())
    yield f"# Estimated, not measured. {'; '.join(limits)}. {Costs.cores} cores. A run notes what each step took."
    yield "# floor: bytes or FLOPs of a layer, the larger. The clock is that of an H100."
    floors = "".join(f"{f'{name} floor us':>15}" for name in CARDS)
    yield f" begins compile  check measure  step         model            tokens regime arms{floors}"
    for e in estimates:
        said = ""
        if point := e.item.point:
            work, arms = work_of(point, Kind.OWN), sum(count for count, _ in arm_counts(e.item))
            floors = "".join(f"{work.floor_s(c.bytes_per_s, c.flops_per_s) * 1e6:15.2f}" for c in CARDS.values())
            said = f"{point.model:16} {point.tokens:6} {point.regime:6} {arms:4}{floors}"
        times = f"{e.compile:6.1f}s {e.check:5.1f}s {e.measure:6.1f}s"
        yield f"{minutes(e.start):>7} {times}  {e.item.step:12} {said}".rstrip()
    for budget in (5, 10, 28):
        done = [e.item for e in estimates if e.start + e.seconds <= 60 * budget]
        chains = f"{sum(item.step == Step.CHAINS for item in done)} of {len(grid.points())} points"
        yield f"# after {budget} minutes: {len(done)} of {len(estimates)} steps, chains at {chains}"
    yield f"# in all {minutes(estimates[-1].start + estimates[-1].seconds)}"


def minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
