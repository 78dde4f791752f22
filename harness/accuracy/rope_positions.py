"""Rows of rope_positions.csv: K's error over the position of its token, with one of the boundaries of RoPE's angles in
bf16 and nothing else.

All else is kept in fp32, so that no other rounding hides what the angle does. All tokens of a layer stand at one
position, and its K-norm weights are near one. So all pairs of channels count alike, and the error is that of a turn by
a wrong angle, a function of the position alone: sqrt(mean of 2 - 2 cos(error of a pair's phase)). With a layer's own
weights it is nearly that of the pair with the largest: in three draws of layer 0 at position 4,000, 0.18 to 0.75.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from castpoint.harness.accuracy.errors import error_stats
from castpoint.harness.accuracy.k_norms import arms
from castpoint.harness.problems.drawn import THETA, problem_at
from castpoint.harness.runs.environment import one_thread
from castpoint.harness.runs.errors import reason_of
from castpoint.harness.runs.progress import track
from castpoint.harness.runs.records import Records, Settings
from castpoint.harness.runs.schema import RopePositionRow
from castpoint.harness.runs.words import NO_BOUNDARY, KNorms, Status
from castpoint.kernels.plan import KEEP, PHASE_BOUNDARIES, RNE, CastPlan
from castpoint.variants import rope
from castpoint.variants.problem import Problem
from castpoint.variants.spec import spec, store, truth

# Where reports of engines were made (512, 4,095, 15,962, 32,767), what bf16 holds and what it does not first (257), the
# end of a context of 2^17 tokens.
POSITIONS = (0, 1, 16, 64, 257, 512, 2048, 4000, 4095, 10_000, 15_962, 32_767, 65_535, 100_000, 131_071)
KEPT = CastPlan(x=KEEP, hidden=KEEP, matmul="fp32", out=KEEP)
ROUNDED = (NO_BOUNDARY, *PHASE_BOUNDARIES, "cos_sin")


def sweep_rope_positions(settings: Settings, records: Records) -> None:
    """Rows of all POSITIONS on the first layer, a few seconds. A position that fails is one row with the reason."""
    problem = near_1(problem_at(settings, settings.layers[0], settings.tokens))
    with one_thread():
        for position in track(POSITIONS, "RoPE over positions"):
            last = {**_key(problem, position), "boundary": ROUNDED[-1]}
            if records.has(RopePositionRow, **last):
                continue
            try:
                rows = list(position_rows(problem, position))
            except Exception as error:  # a head size that is not rotated: a row, and on
                rows = [RopePositionRow(**last, status=Status.FAILED, reason=reason_of(error))]
            records.add(*rows)


def position_rows(problem: Problem, position: int) -> Iterator[RopePositionRow]:
    """A row for each of ROUNDED with all the problem's tokens at that position, theta that of the drawn ones."""
    p = problem.replace(positions=torch.full((problem.tokens,), position, device=problem.x.device), theta=THETA)
    base = KEPT.replace(weight_offset="fp32") if p.weight_offset else KEPT
    exact, product = truth(p), spec(base, p).product
    plain = spec(base, p, product).k
    for boundary in ROUNDED:
        plan = base if boundary == NO_BOUNDARY else base.replace(**{boundary: RNE})
        k = spec(plan, p, product).k
        yield RopePositionRow(
            **_key(p, position), boundary=boundary, phase_max_error=phase_error(plan, p),
            k_vs_truth=error_stats(actual=k, reference=exact.k).rel_rms,
            k_vs_fp32=error_stats(actual=k, reference=plain).rel_rms,
        )  # fmt: skip


def near_1(problem: Problem) -> Problem:
    """The problem with K-norm weights near 1, where it has such weights."""
    if not problem.has_head_norm:
        return problem
    return next(p for _q, k_norm, p in arms(problem) if k_norm == KNorms.NEAR_1)


def phase_error(plan: CastPlan, p: Problem) -> float:
    """Largest distance of a phase as the plan holds it from the exact one, radians; whole turns count."""
    given = p.positions, p.theta, p.head_dim
    held, exact = rope.phase(plan, *given, store), rope.phase(plan, *given, lambda value, storage: value)
    return (held - exact).abs().max().item()


def _key(problem: Problem, position: int) -> dict[str, Any]:
    names = ("model", "weights", "layer", "tokens")
    return {name: getattr(problem, name) for name in names} | {"position": position}
