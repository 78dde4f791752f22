"""The answer of a fingerprint: what its words mean, and when it is identified, undecided or none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from castpoint.harness.compiled.loading import Fault
from castpoint.harness.fingerprint.blackbox import Refused
from castpoint.harness.fingerprint.evidence import TELLING, Call, concentrated
from castpoint.harness.fingerprint.probes import ROWS
from castpoint.harness.fingerprint.rules import Rule
from castpoint.harness.runs.errors import UserError, mistakes
from castpoint.kernels.plan import OPTIONAL, CastPlan
from castpoint.variants.catalogue import PLANS, plan_named

# Elements that no rule explains, above which the answer is `none`. Sums in another order and approximate roots change
# 1e-4 of them, an unlisted rounding to 11 bits (fp16, tf32) 2 %, noise on one element in a thousand 1e-3.
UNEXPLAINED = 0.005


@dataclass(frozen=True)
class Answer:
    """status: identified (one candidate), undecided (several), none (not of the family), error (reason says which).

    candidates: boundary or choice -> word; `a or b` where both words store the same bits on every row searched.
    share_equal, runner_up_share_equal: share of elements that the best rule, and the best rejected one, explain.
    nearest: the best rule where the answer is none.
    plans: the named plans that have these words; of a norm, those whose norm or head norm has them.
    shapes: of every x that the callable answered, the first call's first; where it raises it was not asked.

    kind: of blackbox.KINDS, where it was guessed.

    Of a chain, eps, root and order are those of its first norm; the fp32 arithmetic of the head norm is not asked.
    """

    status: str
    candidates: list[dict[str, str]] = field(default_factory=list)
    share_equal: float | None = None
    runner_up_share_equal: float | None = None
    nearest: dict[str, str] | None = None
    reason: str = ""
    plans: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0
    kind: str = ""

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _merged(dicts: Sequence[dict[str, str]]) -> dict[str, str]:
    """One dict of rules that store the same bits: a word where they agree, `a or b` where they do not."""
    return {name: " or ".join(dict.fromkeys(d[name] for d in dicts)) for name in dicts[0]}


def difference(a: dict[str, str], b: dict[str, str]) -> str:
    """Where two dicts of the same names differ, in words."""
    return ", ".join(f"{name}={a[name]} against {b[name]}" for name in a if a[name] != b[name])


def answer_of(groups: list[list[dict[str, str]]], share: float, runner_up: float | None, evidence: str = "") -> Answer:
    """Identified if one group of words is left, undecided if several; the words of a group store the same bits."""
    candidates = [_merged(group) for group in groups]
    if len(candidates) == 1:
        equal = [f"{name} ({word})" for name, word in candidates[0].items() if " or " in word]
        reason = f"the same bits on every row searched, whichever: {', '.join(equal)}" if equal else ""
        return Answer("identified", candidates, share, runner_up, reason=reason)
    pairs = "; ".join(difference(candidates[0], other) for other in candidates[1:])
    return Answer("undecided", candidates, share, runner_up, reason=f"undecided between {pairs}{evidence}")


def words_of(plan: CastPlan, kind: str) -> dict[str, str]:
    """The words of a plan that an answer of that kind must have; none where the plan has no such norm: one that applies
    rstd behind the matmul forms no hidden by itself."""
    if kind == "qkv":
        return {name: word for name, word in plan.choices().items() if name not in OPTIONAL}
    if kind == "rmsnorm" and plan.scale != "prologue":
        return {}
    names = ("rstd", "normed", "hidden") if kind == "rmsnorm" else ("head_rstd", "head_normed", "out")
    return {name: getattr(plan, name) for name in ("statistics", "variance", "weight_offset", *names)}


def against(plan: CastPlan, kind: str, words: dict[str, str]) -> str:
    """Where words, a candidate, are not the plan's; empty if nowhere."""
    wanted = words_of(plan, kind) | ({"x": plan.x} if "x" in words else {})
    other = [name for name, word in wanted.items() if word not in words[name].split(" or ")]
    return ", ".join(f"{name}={words[name]} against {wanted[name]}" for name in other)


def plans_of(answer: Answer, kind: str) -> list[str]:
    """The named plans whose words every candidate of the answer has."""
    return [
        name
        for name, named in PLANS.items()
        if answer.candidates and words_of(named.plan, kind)
        if not any(against(named.plan, kind, words) for words in answer.candidates)
    ]


def check_expectation(name: str, kind: str) -> None:
    """Raises UserError for an unknown plan, and for one that has nothing of that kind."""
    with mistakes(KeyError):
        plan = plan_named(name)
    if not words_of(plan, kind):
        raise UserError(f"{name} applies rstd after the matmul, so that it has no norm of its own: use --kind qkv")


def unmet(answer: Answer, name: str, kind: str) -> str:
    """Why the answer is not that plan, as far as its kind says; empty if it is."""
    if answer.status != "identified":
        return f"{answer.status}: {answer.reason}"
    return against(plan_named(name), kind, answer.candidates[0])


def differing(rule: Rule, call: Call) -> float:
    """Share of elements that the rule does not explain; 0 where noise or approximate roots may be all of it."""
    counted = call.rows.nonzero
    wrong, number = call.wrong(rule)[0] & counted, counted.sum().item()
    if wrong.sum() > max(TELLING, UNEXPLAINED * number) or (len(wrong) >= ROWS and concentrated(wrong)):
        return wrong.sum().item() / number
    return 0.0


def at_other_shapes(answer: Answer, shapes: Sequence[list[int]], ask: Callable[[list[int]], float]) -> Answer:
    """The answer, an identified one, or `none` where ask finds a share of elements that differ from it at a shape.
    Shapes that the callable refuses are left out."""
    others = []
    for shape in shapes:
        try:
            share = ask(shape)
        except Refused:
            continue
        except Fault as fault:
            raise Fault(f"at {shape}: {fault}") from fault
        if share:
            others.append(f"at {shape} it is another function: {share:.2%} of the elements differ")
    if not others:
        return answer
    reason = f"{'; '.join(others)} from the nearest plan, which explains the first shapes that were tried"
    return dataclasses.replace(answer, status="none", candidates=[], nearest=answer.candidates[0], reason=reason)


def none_of_these(nearest: dict[str, str], share: float, runner_up: float | None, why: str) -> Answer:
    """None: nearest explains that share, and why says what it does not."""
    reason = f"none of these: the nearest plan leaves {1 - share:.2%} of the elements unexplained; {why}"
    return Answer("none", [], share, runner_up, nearest, reason)
