"""What a run measures at each point: its arms, and what each needs at least. Touches no GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from castpoint.harness.peers.chains import P2, arm_name, loop_tile
from castpoint.harness.peers.parts import HEAD_NORMS, MATMULS, NORMS
from castpoint.harness.problems import grid
from castpoint.harness.problems.geometry import Work, heads_work, layer_work, matmul_work, norm_work
from castpoint.harness.runs.schema import Kind


@dataclass(frozen=True)
class Row:
    """One measurement. work: what its arm needs at least."""

    point: grid.Point
    kind: Kind
    arm: str
    work: Work

    def floor_s(self) -> float:
        return self.work.floor_s(grid.ASSUMED_BYTES_PER_S, grid.ASSUMED_FLOPS_PER_S)


def compiled_peers(point: grid.Point) -> tuple[str, ...]:
    """torch.compile at the goals' points alone, since its tuning takes seconds a shape; its dependent launches at
    the smallest model, where launches weigh most."""
    models = {grid.COLD: grid.GOAL_MODELS, grid.ROPE: grid.QUICK_MODELS}.get(point.regime, ())
    if point.model not in models or point.tokens not in (1, 256, 4096):
        return ()
    return P2[: 2 if (point.model, point.regime) == (grid.GOAL_MODELS[0], grid.COLD) else 1]


def rows(point: grid.Point, quick: bool = False) -> Iterator[Row]:
    """The measurements of a point. Which chains P1 is made of is decided by the times of its parts: `best` here.
    quick: without compiled peers."""
    arms: dict[Kind, Iterable[str]] = {}
    if point.regime in grid.PARTED:
        arms = {Kind.NORM: NORMS, Kind.HEADS: HEAD_NORMS[point.regime == grid.ROPE], Kind.MATMUL: MATMULS}
        arms[Kind.LOOP] = map(loop_tile, grid.loop_tiles(point))
    arms |= {Kind.CHAIN: ("best",), Kind.EAGER: ("",), Kind.COMPILED: () if quick else compiled_peers(point)}
    arms[Kind.OWN] = grid.own_plans(point)
    for kind, all_of in arms.items():
        yield from (Row(point, kind, arm_name(kind, what), work_of(point, kind)) for what in all_of)


def work_of(point: grid.Point, kind: Kind) -> Work:
    """What an arm of that kind needs at least."""
    g, tokens, rope = point.geometry, point.tokens, point.regime == grid.ROPE
    if kind == Kind.NORM:
        return norm_work(g, tokens)
    if kind == Kind.HEADS:
        return heads_work(g, tokens, rope)
    return matmul_work(g, tokens) if kind in (Kind.MATMUL, Kind.LOOP) else layer_work(g, tokens, rope)


def listing(quick: bool = False) -> Iterator[str]:
    """The plan of a run, one line a measurement; the last line sums them up."""
    listed = [row for point in grid.points(quick) for row in rows(point, quick)]
    yield (
        f"# floor: bytes at {grid.ASSUMED_BYTES_PER_S / 1e12:g} TB/s or FLOPs at {grid.ASSUMED_FLOPS_PER_S / 1e12:g} "
        "TFLOP/s, the larger; assumed for an H200. A run measures its own limits. No row has a time before it ran."
    )
    yield f"{'model':16} {'tokens':>6} {'regime':6} {'kind':8} {'MB':>9} {'GFLOP':>9} {'floor_us':>9}  arm"
    for row in listed:
        point = row.point
        yield (
            f"{point.model:16} {point.tokens:6} {point.regime:6} {row.kind:8} {row.work.bytes / 1e6:9.2f} "
            f"{row.work.flops / 1e9:9.2f} {row.floor_s() * 1e6:9.2f}  {row.arm}"
        )
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(row.kind for row in listed).items())
    yield (
        f"# {len(grid.points(quick))} points, {len(listed)} measurements ({kinds}). Their floors add up to "
        f"{sum(row.floor_s() for row in listed):.3g} s: no estimate of the run, which repeats, compiles and checks."
    )
