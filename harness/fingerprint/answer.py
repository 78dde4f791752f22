"""The answer of a fingerprint: what its words mean, and when it is identified, undecided or none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from castpoint.harness.compiled.loading import Fault
from castpoint.harness.fingerprint.blackbox import Refused, Stale, Unasked
from castpoint.harness.fingerprint.evidence import Miss
from castpoint.harness.fingerprint.kinds import CHAINS
from castpoint.harness.fingerprint.layouts import ALONE_AS, CONTIGUOUS, OFFSET
from castpoint.harness.ptx.ahead import compiled_ahead
from castpoint.harness.runs.errors import UserError, mistakes
from castpoint.kernels.plan import OPTIONAL, PHASE_BOUNDARIES, CastPlan
from castpoint.variants.catalogue import PLANS, plan_named

CALLED = {  # how a call was changed: the shape of x, or of x and its gate, eps, an argument, a layout in memory, values
    "x": "with x {}",
    "x and gate": "with x and gate {}",
    "eps": "with eps={}",
    **dict.fromkeys(("memory", "values", "call", "argument", "weights", "together"), "with {}"),
}
HEAD = ("proj", "head_rstd", "head_normed")  # what a chain without a head norm has not
SHOWN = 3  # questions that a reason names


@dataclass(frozen=True)
class Answer:
    """status: identified (one candidate), undecided (several), none (not of the family), error (reason says which).

    candidates: boundary or choice -> word; `a or b` where both words store the same bits on every row searched.
    share_equal, runner_up_share_equal: share of elements that the best rule, and the best rejected one, explain.
    nearest: the best rule where the answer is none.
    plans: the named plans that have these words; of a norm, those whose norm or head norm has them.
    asked: every call that the answer was held to, {about, what, result}; result is `same`, `refused: ...` where the
    callable raised, or how it differs. about: a name of CALLED.
    facts: what is no plan, in words, each by its name: `batch invariant`, `subnormal x`, `x + residual` and others.

    kind: of kinds.KINDS, where it was guessed.

    Of a chain, eps, root and order are those of its first norm; the fp32 arithmetic of the head norm is not asked.
    """

    status: str
    candidates: list[dict[str, str]] = field(default_factory=list)
    share_equal: float | None = None
    runner_up_share_equal: float | None = None
    nearest: dict[str, str] | None = None
    reason: str = ""
    plans: list[str] = field(default_factory=list)
    asked: list[dict[str, str]] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    kind: str = ""

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def merged(dicts: Sequence[dict[str, str]]) -> dict[str, str]:
    """One dict of rules that store the same bits: a word where they agree, `a or b` where they do not."""
    return {name: " or ".join(dict.fromkeys(d[name] for d in dicts)) for name in dicts[0]}


def difference(a: dict[str, str], b: dict[str, str]) -> str:
    """Where two dicts of the same names differ, in words."""
    return ", ".join(f"{name}={a[name]} against {b[name]}" for name in a if a[name] != b[name])


def answer_of(groups: list[list[dict[str, str]]], share: float, runner_up: float | None, evidence: str = "") -> Answer:
    """Identified if one group of words is left, undecided if several; the words of a group store the same bits."""
    candidates = [merged(group) for group in groups]
    if len(candidates) == 1:
        equal = [f"{name} ({word})" for name, word in candidates[0].items() if " or " in word]
        reason = f"the same bits on every row searched, whichever: {', '.join(equal)}" if equal else ""
        return Answer("identified", candidates, share, runner_up, reason=reason)
    names = {name: list(dict.fromkeys(words[name] for words in candidates)) for name in candidates[0]}
    open_ = "; ".join(f"{name}={' or '.join(words)}" for name, words in names.items() if len(words) > 1)
    return Answer("undecided", candidates, share, runner_up, reason=f"undecided between {open_}{evidence}")


def words_of(plan: CastPlan, kind: str) -> dict[str, str]:
    """The words of a plan that an answer of that kind must have; none where the plan has no such norm: one that applies
    rstd behind the matmul forms no hidden by itself."""
    if kind in CHAINS:
        left_out = OPTIONAL if kind == "qkv" else (*OPTIONAL, *HEAD)
        return {name: word for name, word in plan.choices().items() if name not in left_out}
    if kind == "qk_norm_rope":
        words = {name: getattr(plan, name) for name in ("unrotated", *PHASE_BOUNDARIES, "cos_sin", "products")}
        return words_of(plan, "head_norm") | words | {"norm": "before RoPE"}
    if kind == "rmsnorm" and plan.scale != "prologue":
        return {}
    names = ("rstd", "normed", "hidden") if kind == "rmsnorm" else ("head_rstd", "head_normed", "out")
    return {name: getattr(plan, name) for name in ("statistics", "variance", "weight_offset", *names)}


def against(plan: CastPlan, kind: str, words: dict[str, str]) -> str:
    """Where words, a candidate, are not the plan's, fp16 taken for bf16; empty if nowhere."""
    wanted = words_of(plan, kind) | ({"x": plan.x} if "x" in words else {})
    wanted = {name: word for name, word in wanted.items() if name in words or name != "weight_offset"}  # of a weight
    if kind == "qk_norm_rope":  # without angles, a norm after RoPE, or a table that is given have fewer words
        wanted = {name: word for name, word in wanted.items() if name in words}
    other = [name for name, word in wanted.items() if word not in words[name].replace("fp16", "bf16").split(" or ")]
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
    """Why the answer is not that plan, as far as its kind says; empty if it is, or if every candidate is. Raises
    UserError as check_expectation does: a kind may be guessed."""
    check_expectation(name, kind)
    if not answer.candidates:
        return f"{answer.status}: {answer.reason}"
    other = [words for words in answer.candidates if against(plan_named(name), kind, words)]
    if not other or len(answer.candidates) == 1:
        return against(plan_named(name), kind, answer.candidates[0])
    return f"{answer.status}: {answer.reason}"


@dataclass(frozen=True)
class Question:
    """A call beyond those that decide: what it changes, and what the answer's plan leaves unexplained of it."""

    about: str
    what: str
    ask: Callable[[], Miss]


def ahead(questions: Iterable[Question]) -> Iterator[Question]:
    """The questions, which another core prepares."""
    return compiled_ahead(questions, lambda question: question.ask())


def held_to(answer: Answer, questions: Iterable[Question], inputs: str = "x") -> Answer:
    """The answer, or `none` where it is another function at one of the questions. inputs: what lies in memory."""
    asked, other, failed = [*answer.asked], [], set()
    for question in questions:
        called = CALLED[question.about].format(question.what)
        try:
            miss = question.ask()
        except Unasked:
            continue
        except Refused as refused:
            result = f"refused: {refused}"
        except Stale as stale:
            result = str(stale)
            other.append(f"{called} {stale}")
            failed.add((question.about, question.what))
        except Fault as fault:
            raise Fault(f"{called}: {fault}") from fault
        else:
            result = str(miss) if miss else "same"
            if miss:
                other.append(f"{called} {miss}")
                failed.add((question.about, question.what))
        asked.append({"about": question.about, "what": question.what, "result": result})
    answer = dataclasses.replace(answer, asked=asked)
    if not other:
        return answer
    more = f"; and so at {len(other) - SHOWN} more of {len(asked)} calls" if len(other) > SHOWN else ""
    reason = f"another function than the plan that explains the first calls: {'; '.join(other[:SHOWN])}{more}"
    in_memory = {what for about, what in failed if about == "memory"}
    elsewhere = {what for about, what in failed if about != "together" or CONTIGUOUS in what} - in_memory
    if in_memory and not elsewhere:
        lone = sorted({layout.rpartition(ALONE_AS)[0] for layout in in_memory})
        inputs = " or ".join(lone) if all(lone) else inputs
        if any(OFFSET in layout for layout in in_memory):  # of which contiguous() may make no copy
            reason += f": it does not read {inputs} from where it begins, so let it clone() a view first, or refuse it"
        else:
            reason += f": it reads {inputs} as if it were contiguous, so let it call contiguous() first, or refuse "
            reason += "what is not"
    return dataclasses.replace(answer, status="none", candidates=[], nearest=answer.candidates[0], reason=reason)


def none_of_these(nearest: dict[str, str], share: float, runner_up: float | None, why: str) -> Answer:
    """None: nearest explains that share, and why says what it does not."""
    reason = f"none of these: the nearest plan leaves {1 - share:.2%} of the elements unexplained; {why}"
    return Answer("none", [], share, runner_up, nearest, reason)


def by_paths(answers: dict[tuple[str, ...], Answer]) -> Answer:
    """One answer from those of a callable with each of its optional arguments by itself. What it refuses is listed, and
    if that is all an error; where two are different functions the answer is `none`."""
    names = {given: " and ".join(given) or "no optional argument" for given in answers}
    there = {given: answer for given, answer in answers.items() if answer.status != "refused"}
    if len(answers) == 1 or all(answer.status in ("refused", "error") for answer in answers.values()):
        first = next(iter(answers.values()))
        return dataclasses.replace(first, status="error") if first.status == "refused" else first
    calls = []
    for given, answer in answers.items():
        result = f"refused: {answer.reason}" if given not in there else "same" if answer.candidates else answer.status
        calls.append({"about": "argument", "what": names[given], "result": result})
    asked = [*(call for answer in there.values() for call in answer.asked), *calls]
    fullest = max(there, key=len)
    bad = next((given for given, answer in there.items() if not answer.candidates), None)
    if bad is not None:
        reason = f"with {names[bad]}: {there[bad].reason}"
        return dataclasses.replace(there[bad], asked=asked, reason=reason)
    answer = there[fullest]
    for given, other in there.items():
        kept = [t | words for words in answer.candidates if (t := _agreeing(words, other.candidates)) is not None]
        gates = [each.facts["gate"] for each in (answer, other) if "gate" in each.facts]
        if not kept or len(set(gates)) > 1:
            of_both = f" and {names[given]} {difference_of(answer, other)}"
            how = of_both if not kept else f" {gates[0]}, with {names[given]} {gates[-1]}"
            reason = f"two functions: with {names[fullest]}{how}"
            return dataclasses.replace(
                answer, status="none", candidates=[], nearest=answer.candidates[0], reason=reason, asked=asked
            )
        status = "identified" if len(kept) == 1 else answer.status
        answer = dataclasses.replace(answer, candidates=kept, status=status)
    return dataclasses.replace(answer, asked=asked)


def _agreeing(words: dict[str, str], others: Sequence[dict[str, str]]) -> dict[str, str] | None:
    """The first of the others that one function can have with the words."""
    return next((other for other in others if agree(words, other)), None)


def agree(words: dict[str, str], other: dict[str, str]) -> bool:
    """Whether one function can have both."""
    return all(set(words[name].split(" or ")) & set(other[name].split(" or ")) for name in words.keys() & other.keys())


def difference_of(answer: Answer, other: Answer) -> str:
    shared = [name for name in answer.candidates[0] if name in other.candidates[0]]
    return difference(*({name: a.candidates[0][name] for name in shared} for a in (answer, other)))
