"""Which plan is this kernel? The fingerprint of a black box.

It is called with rows whose sums are exact in any order (probes), and what it stores is compared, bit by bit, with what
every rule of the family (rules) would store. First the roundings are found; then, among rules that differ by fp32 ulps
only, rows are searched on which these store different bits. At last Gaussian rows must agree too.

evidence says which rules are left after the calls. A single norm is asked here, a whole chain in chain.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from castpoint.harness.compiled.loading import Fault
from castpoint.harness.fingerprint import probes
from castpoint.harness.fingerprint.answer import (
    UNEXPLAINED,
    Answer,
    answer_of,
    at_other_shapes,
    differing,
    none_of_these,
    plans_of,
)
from castpoint.harness.fingerprint.blackbox import BlackBox
from castpoint.harness.fingerprint.chain import chain, other_rows
from castpoint.harness.fingerprint.evidence import Call, check_repeats, mean_shares, outs, rank, refine
from castpoint.harness.fingerprint.rules import Rows, Rule, arithmetic, norm_rules
from castpoint.kernels.plan import RNE, STORAGE

# A rule's words, as a plan calls them.
NORM_WORDS = {
    "rmsnorm": {"rstd": "rstd", "normed": "normed", "out": "hidden"},
    "head_norm": {"rstd": "head_rstd", "normed": "head_normed", "out": "out"},
}
# Kernels dispatch on the number of tokens and on the width, so the answer is tried at others: one token, rows that are
# no power of two, many tokens. x [T, D] or [T, H, Dh].
OTHER_SHAPES = {"rmsnorm": ([1, 8192], [3, 1000], [600, 2048]), "head_norm": ([1, 16, 256], [600, 1, 64])}


def identify(fn: Callable[..., Any], kind: str, device: str = "cpu") -> Answer:
    """The fingerprint of fn, a callable of blackbox.KINDS, called on that device. Never guesses.

    Raises ValueError for an unknown kind; whatever fn does wrong is an Answer with status `error`.
    """
    start = time.perf_counter()
    box = BlackBox(fn, kind, device)
    try:
        answer = chain(box) if kind == "qkv" else _norm(box)
    except Fault as fault:
        answer = Answer("error", reason=str(fault))
    seconds = round(time.perf_counter() - start, 2)
    return dataclasses.replace(answer, plans=plans_of(answer, kind), shapes=box.shapes, seconds=seconds)


def summary(answer: Answer) -> str:
    """The answer in lines for a reader."""
    lines = [f"guessed by its signature: --kind {answer.kind}"] if answer.kind else []
    lines += [f"{answer.status}{': ' if answer.reason else ''}{answer.reason}"]
    explains = (answer.share_equal or 0.0) >= 0.5  # words that explain less than half say nothing
    for words in answer.candidates or ([answer.nearest] if answer.nearest and explains else []):
        nearest = "nearest: " if answer.nearest else ""
        lines.append(nearest + ", ".join(f"{name}={word}" for name, word in words.items()))
    if answer.plans:
        words = answer.candidates[0]
        part = "" if "proj" in words else "the head norm of " if "head_rstd" in words else "the norm of "
        lines.append(f"= {part}{', '.join(answer.plans)}")
    if answer.share_equal is not None:
        runner_up = answer.runner_up_share_equal
        other = "" if runner_up is None else f", the best rejected plan {runner_up:.3%}"
        lines.append(f"explains {answer.share_equal:.3%} of the elements{other}; {answer.seconds:g} s")
        lines.append(f"called with x of {', '.join(map(str, answer.shapes))}")
    return "\n".join(lines)


def _norm(box: BlackBox) -> Answer:
    heads, fused_add = box.kind == "head_norm", box.takes("residual")
    rows, rng = probes.first_rows(probes.HEAD_DIM if heads else probes.WIDTH, residual=fused_add)

    def call(rows: Rows, count: int = 4) -> Call:
        shape = [len(rows.x) // count, count, rows.width] if heads else list(rows.x.shape)
        residual = None if rows.residual is None else rows.residual.reshape(shape)
        stored = box.norm(rows.x.reshape(shape), rows.weight, rows.eps, residual)
        return Call(rows, stored.reshape(rows.x.shape).float(), stored.dtype)

    def named(rule: Rule) -> dict[str, str]:
        first = ["x"] if fused_add else []
        words = [*first, "statistics", "variance", "rstd", "normed", "out", "weight_offset", "eps", "root", "order"]
        return {NORM_WORDS[box.kind].get(word, word): getattr(rule, word) for word in words}

    main = [call(rows), call(rows.at(probes.EPS_LARGE))]
    check_repeats(main[0], call(rows))
    ranking = rank(norm_rules(outs=outs(main[0].dtype), xs=STORAGE if fused_add else (RNE,)), main)
    nearest = named(ranking.best)
    if 1 - ranking.share > UNEXPLAINED or ranking.gathered:
        return none_of_these(nearest, ranking.share, ranking.runner_up, ranking.gathered or _by_eps(ranking.best, main))
    calls: list[Call] = []  # not the general rows: on some of them 1 / sqrt in two roundings is another number
    groups, said = refine([v for rule in ranking.left for v in arithmetic(rule)], rows.width, calls, call)
    for count in (len(rows.x), 4):  # the same number of rows, and another
        control = call(Rows(probes.gaussian([count, rows.width], rng), rows.weight, probes.EPS_SMALL, rows.width))
        share = control.share(groups[0][0])
        if 1 - share > UNEXPLAINED:
            why = f"of {count} Gaussian rows, while it explains rows whose sums are exact"
            return none_of_these(nearest, share, ranking.runner_up, why)
    share = max(mean_shares([group[0] for group in groups], main).values())
    words = [[named(rule) for rule in group] for group in groups]
    answer = answer_of(words, share, ranking.runner_up, said)
    if answer.status != "identified":
        return answer

    def ask(shape: list[int]) -> float:
        rule = groups[0][0]
        return differing(rule, call(other_rows(rule, math.prod(shape[:-1]), shape[-1], residual=fused_add), shape[-2]))

    return at_other_shapes(answer, OTHER_SHAPES[box.kind], ask)


def _by_eps(rule: Rule, calls: Sequence[Call]) -> str:
    return ", ".join(f"{1 - call.share(rule):.2%} of them at eps={call.rows.eps:g}" for call in calls)
