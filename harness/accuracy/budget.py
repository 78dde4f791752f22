"""Rows of budget.csv: the error budget of every plan on every layer, without RoPE and (one plan for each way to round
there) with it; and what a kernel adds to its spec.

Two kinds of rows share the table. Those of the spec divide a plan's error: a measure's parts sum to its total. Those
of a kernel stand beside it, without a share.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from castpoint.harness.accuracy.shapley import Errors, budget, order_of_sums
from castpoint.harness.accuracy.sweep import by_storage, offset_fits
from castpoint.harness.problems.drawn import problem_at, with_positions
from castpoint.harness.runs.environment import one_thread
from castpoint.harness.runs.errors import reason_of
from castpoint.harness.runs.progress import track
from castpoint.harness.runs.records import Records, Settings
from castpoint.harness.runs.schema import BudgetRow
from castpoint.harness.runs.words import FP32, MEASURES, ORDER_OF_SUMS, Backend, Status
from castpoint.kernels.plan import ROPE_BOUNDARIES
from castpoint.variants.catalogue import plan_named
from castpoint.variants.problem import Problem


def sweep_budget(settings: Settings, records: Records) -> None:
    """Rows of every plan on every layer, of some with RoPE too; and, on the first layer, of what its kernel adds.

    A plan that reads norm weights otherwise than a checkpoint stores them has none.
    """
    s = settings
    fitting = [(kind, names) for kind, names in by_storage(s.plans) if offset_fits(s, kind)]
    with one_thread():  # matrices of a few MB: two threads took seven times as long beside another process
        for layer in track(s.layers, "error budget"):
            for _, names in fitting:
                problem = problem_at(s, layer, s.tokens, names[0])
                _divide(records, problem, names)
                if problem.has_head_norm and not problem.weight_offset:
                    _divide(records, with_positions(problem), ways_to_rotate(names))
    for name in track([name for _, names in fitting for name in names], "kernels against specs"):
        problem = problem_at(s, s.layers[0], s.kernel_tokens, name)
        _add_rows(records, problem, name, Backend.TRITON, order_rows)


def ways_to_rotate(names: Iterable[str]) -> list[str]:
    """Of those plans the first of each way to round in RoPE: others have the same words there."""
    words: dict[tuple[str, ...], str] = {}
    for name in names:
        words.setdefault(tuple(getattr(plan_named(name), boundary) for boundary in ROPE_BOUNDARIES), name)
    return list(words.values())


def _divide(records: Records, problem: Problem, names: Iterable[str]) -> None:
    errors = functools.cache(lambda: Errors(problem))  # where any is asked for
    for name in names:
        _add_rows(records, problem, name, Backend.SPEC, lambda name, p: budget_rows(name, p, errors()))


Rows = Callable[[str, Problem], Iterator[BudgetRow]]  # of a named plan on one problem


def _add_rows(records: Records, problem: Problem, name: str, backend: Backend, rows_of: Rows) -> None:
    """The rows of that plan if it has none yet. The last says that it is complete; one that fails has no other."""
    player = FP32 if backend == Backend.SPEC else ORDER_OF_SUMS
    last = {**_key(problem, name, backend), "measure": MEASURES[-1], "player": player}
    if records.has(BudgetRow, **last):
        return
    try:
        rows = list(rows_of(name, problem))
    except Exception as error:  # no compiler, an error that is not finite: a row, and on
        rows = [BudgetRow(**last, status=Status.FAILED, reason=reason_of(error))]
    for row in rows:
        records.add(row)


def budget_rows(name: str, problem: Problem, errors: Errors | None = None) -> Iterator[BudgetRow]:
    """Rows of a named plan on one problem: for each measure one a player and one for fp32 arithmetic, whose `shapley`
    sum to `total` and `share` to 1. errors: Errors(problem), if they are at hand. Raises what budget raises."""
    key = _key(problem, name, Backend.SPEC)
    for measure, b in budget(plan_named(name), problem, errors).items():
        for player, value in b.all_parts().items():
            parts = {"shapley": value, "share": b.share(value), "total": b.total}
            yield BudgetRow(**key, measure=measure, player=player, **parts)


def order_rows(name: str, problem: Problem, backend: Backend = Backend.TRITON) -> Iterator[BudgetRow]:
    """Rows of what that backend adds to the spec of a named plan on one problem.

    They have no `shapley` and no `share`: this is no part of the plan's error. `total` is that error on the same
    tokens, and `kernel_vs_spec_share` relative to it. Raises what variants.backends.run raises.
    """
    for measure, (added, total) in order_of_sums(plan_named(name), problem, backend).items():
        key = {**_key(problem, name, backend), "measure": measure, "player": ORDER_OF_SUMS}
        share = added / total if total else 0.0
        yield BudgetRow(**key, total=total, kernel_vs_spec=added, kernel_vs_spec_share=share)


def _key(problem: Problem, plan: str, backend: Backend) -> dict[str, Any]:
    rotated_from = None if problem.positions is None else int(problem.positions[0])
    return {
        "model": problem.model, "weights": problem.weights, "rotated_from": rotated_from, "layer": problem.layer,
        "tokens": problem.tokens, "plan": plan, "backend": backend,
    }  # fmt: skip
