"""Rows of budget.csv: the error budget of every plan on every layer, without RoPE and (one plan for each way to round
there) with it; and what a kernel adds to its spec.

Two kinds of rows share the table. Those of the spec divide a plan's error: a measure's parts sum to its total. Those
of a kernel stand beside it, without a share.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

from castpoint.harness.accuracy.shapley import FP32, MEASURES, ORDER_OF_SUMS, Errors, budget, order_of_sums
from castpoint.harness.accuracy.sweep import by_storage, offset_fits, problem_at, reason_of
from castpoint.harness.problems.positions import with_positions
from castpoint.harness.runs.progress import track
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.settings import Settings
from castpoint.harness.runs.threads import one_thread
from castpoint.kernels.checks import ROPE_BOUNDARIES
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
                _add_rows(records, problem, names, "spec", _sharing(problem))
                if problem.has_head_norm and not problem.weight_offset:
                    rotated = with_positions(problem)
                    _add_rows(records, rotated, ways_to_rotate(names), "spec", _sharing(rotated))
    for name in track([name for _, names in fitting for name in names], "kernels against specs"):
        problem = problem_at(s, s.layers[0], s.kernel_tokens, name)
        _add_rows(records, problem, [name], "triton", order_rows)


def ways_to_rotate(names: Iterable[str]) -> list[str]:
    """Of those plans the first of each way to round in RoPE: others have the same words there."""
    words: dict[tuple[str, ...], str] = {}
    for name in names:
        words.setdefault(tuple(getattr(plan_named(name), boundary) for boundary in ROPE_BOUNDARIES), name)
    return list(words.values())


def _sharing(problem: Problem) -> Callable[[list[str], Problem], Iterator[dict[str, object]]]:
    """budget_rows of one problem, whose errors are measured once for all plans, and not before they are asked for."""
    errors = functools.cache(lambda: Errors(problem))
    return lambda names, problem: budget_rows(names, problem, errors())


def _add_rows(
    records: Records,
    problem: Problem,
    names: list[str],
    backend: str,
    rows_of: Callable[[list[str], Problem], Iterator[dict[str, object]]],
) -> None:
    """The rows of those plans that have none yet. The last row of a plan says that it is complete; of one that fails it
    says why, and the others go on."""
    last = {"measure": MEASURES[-1], "player": ORDER_OF_SUMS if backend != "spec" else FP32}
    for name in names:
        key = _key(problem, name, backend) | last
        if records.has("budget", **key):
            continue
        try:
            rows = list(rows_of([name], problem))
        except Exception as error:
            records.add("budget", **key, status="failed", reason=reason_of(error))
            continue
        for row in rows:
            if not records.has("budget", **row):
                records.add("budget", **row)


def budget_rows(names: Iterable[str], problem: Problem, errors: Errors | None = None) -> Iterator[dict[str, object]]:
    """Rows of budget.csv of named plans on one problem: one for each measure and player, and one for fp32 arithmetic.

    A plan's `shapley` of one measure sum to its `total`, its `share` to 1. errors: of the problem, if they are at hand.
    Raises what budget raises.
    """
    errors = errors or Errors(problem)
    for name in names:
        for measure, b in budget(plan_named(name), problem, errors).items():
            for player, value in b.all_parts().items():
                key = {**_key(problem, name, "spec"), "measure": measure, "player": player}
                yield {**key, "shapley": value, "share": b.share(value), "total": b.total}


def order_rows(names: Iterable[str], problem: Problem, backend: str = "triton") -> Iterator[dict[str, object]]:
    """Rows of budget.csv of what that backend adds to the specs of named plans on one problem.

    They have no `shapley` and no `share`: this is no part of the plan's error. `total` is that error on the same
    tokens, and `kernel_vs_spec_share` relative to it. Raises what variants.backends.run raises.
    """
    for name in names:
        for measure, (added, total) in order_of_sums(plan_named(name), problem, backend).items():
            key = {**_key(problem, name, backend), "measure": measure, "player": ORDER_OF_SUMS}
            yield {
                **key,
                "total": total,
                "kernel_vs_spec": added,
                "kernel_vs_spec_share": added / total if total else 0.0,
            }


def _key(problem: Problem, plan: str, backend: str) -> dict[str, object]:
    return {
        "model": problem.model,
        "weights": problem.weights,
        "layer": problem.layer,
        "tokens": problem.tokens,
        "plan": plan,
        "backend": backend,
    }
