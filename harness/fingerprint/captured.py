"""Which plans explain a capture? No questions: what one recorded call says.

Sums of recorded values depend on their order, so a plan is excluded only by elements outside of what its sums may
make in any usual order (bounds); what is left explains every element. The whole family is tried, on a few tokens first:
of a chain v shows the input norm and the matmul, then q and k the head norm.

How many more tokens would decide between plans that are left is tried on tokens like those recorded (Capture.like).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from castpoint.harness.fingerprint.answer import Answer, answer_of, difference, words_of
from castpoint.harness.fingerprint.bounds import (
    HEAD_WORDS,
    Plan,
    bounds_of,
    disjoint,
    flat,
    head_plans,
    input_plans,
    turned,
    v_bounds_of,
)
from castpoint.harness.fingerprint.capture import Capture, Chain, Norm
from castpoint.harness.fingerprint.evidence import TELLING, outs
from castpoint.harness.fingerprint.norm import summary
from castpoint.harness.fingerprint.norm_facts import NORM_WORDS
from castpoint.harness.fingerprint.rules import Rule, norm_rules
from castpoint.kernels.plan import KEEP, RNE, CastPlan
from castpoint.variants.catalogue import PLANS
from castpoint.variants.envelope import Interval, false_red, outside

FEW = ((4, 8), (16, 4), (64, 1))  # tokens, and every so manieth channel of v, on which the family is tried first
BLOCK = 128  # tokens whose intervals are held at a time
COUNTED = 256  # tokens on which an excluded plan is counted
MANY = 32  # plans that go on where none explains all
LIKE = {"rmsnorm": 256, "head_norm": 256, "qkv": 64}  # tokens like those recorded
PAIRS = 6  # of candidates, that are shown
SURE = 0.95  # chance that so many more tokens decide
P = TypeVar("P", bound=Plan)


@dataclass(frozen=True)
class Misses:
    """Elements of outputs that a plan does not explain, and the first of them."""

    wrong: int = 0
    of: int = 0
    first: str = ""

    def __str__(self) -> str:
        return f"{self.wrong} of {self.of} elements, the first: {self.first}"


@dataclass(frozen=True)
class Captured(Answer):
    """The answer of a capture. candidates: plans that explain every element; words merged with `or` where not one of
    `tokens_like` tokens like those recorded tells them apart. plans: the named ones among them.

    excluded: the other named plans, each with `wrong` of `of` elements outside of its intervals, and the first.
    more_tokens: for candidates i and j, how many more tokens like these tell them apart with probability SURE.
    wrongly_excluded: at most the probability that the right plan is not among the candidates, under the model of
    variants.envelope.
    """

    tokens: int = 0
    elements: int = 0
    tokens_like: int = 0
    excluded: list[dict[str, Any]] = field(default_factory=list)
    more_tokens: list[dict[str, Any]] = field(default_factory=list)
    wrongly_excluded: float = 0.0


def explain(capture: Capture) -> Captured:
    """Which plans of the whole family explain every element of the capture."""
    start = time.perf_counter()
    tried = _chains(capture) if isinstance(capture, Chain) else _near(_norms(capture), capture)
    found = misses(tried, capture)
    left = [plan for plan, missed in found.items() if not missed.wrong]
    answer = _told(capture, left) if left else _none(capture, found)
    best = left[0] if left else min(found, key=lambda plan: found[plan].wrong)
    names = named(capture, best)
    held = {_weighted(plan, best) for plan in left}  # a plan has no word for how a norm weight is held
    excluded = misses([plan for plan in names if plan not in held], capture.cut(0, COUNTED))
    return dataclasses.replace(
        answer,
        plans=[name for plan in names if plan in held for name in names[plan]],
        excluded=[{"plan": ", ".join(names[plan]), **dataclasses.asdict(m)} for plan, m in excluded.items()],
        tokens=capture.tokens,
        elements=sum(output.numel() for output in capture.outputs.values()),
        wrongly_excluded=false_red(capture.sums),
        kind=capture.kind,
        seconds=round(time.perf_counter() - start, 2),
    )


def named(capture: Capture, like: Plan) -> dict[Plan, list[str]]:
    """The named plans as this capture shows them, each with its names; of a norm, those that have such a norm, with
    fp16 for bf16 where that is recorded, and the weight held as by a rule."""
    found: dict[Plan, list[str]] = {}
    for name, plan in ((name, entry.plan) for name, entry in PLANS.items()):
        if isinstance(capture, Chain):
            shown: Plan = plan.without_rope().replace(**{n: getattr(plan, n) for n in turned(capture.problem)})
            if not capture.problem.has_head_norm:
                shown = shown.replace(**dict.fromkeys(HEAD_WORDS, KEEP))
        elif words := words_of(plan, capture.kind):
            theirs = {word: own for own, word in NORM_WORDS[capture.kind].items()}
            own = {theirs.get(name, name): word for name, word in (words | {"x": _x_of(plan, capture)}).items()}
            shown = _weighted(Rule(**{n: word.replace("bf16", capture.narrow) for n, word in own.items()}), like)
        else:
            continue
        found.setdefault(shown, []).append(name)
    return found


def _x_of(plan: CastPlan, capture: Norm) -> str:
    return plan.x if len(capture.storages_of_x) > 1 else RNE


def _weighted(plan: P, like: Plan) -> P:
    return plan.replace(weight=like.weight) if isinstance(plan, Rule) and isinstance(like, Rule) else plan


def _norms(capture: Norm) -> list[Rule]:
    """Every rule of a norm with what was recorded of it."""
    rules = norm_rules(outs=_outs(capture), xs=capture.storages_of_x, narrow=capture.narrow)
    return [rule.replace(weight=word) for rule in rules for word in capture.storages_of_weight]


# ---------------------------------------------------------------- which are left


def misses(plans: Iterable[P], capture: Capture) -> dict[P, Misses]:
    """What each plan does not explain of the capture."""
    found = {plan: Misses() for plan in plans}
    for start in range(0, capture.tokens, BLOCK):
        part = capture.cut(start, start + BLOCK)
        bounds = bounds_of(part)
        for plan, before in found.items():
            found[plan] = _added(before, bounds(plan), part.outputs, start)
    return found


def _added(before: Misses, bounds: dict[str, Interval], outputs: dict[str, Tensor], start: int) -> Misses:
    wrong, first = before.wrong, before.first
    for name, output in outputs.items():
        missed = outside(output, bounds[name])
        wrong += int(missed.sum())
        first = first or (_place(name, output, bounds[name], missed, start) if missed.any() else "")
    return Misses(wrong, before.of + sum(output.numel() for output in outputs.values()), first)


def _place(name: str, output: Tensor, ends: Interval, missed: Tensor, start: int) -> str:
    place = missed.nonzero()[0].tolist()
    value, low, high = (tensor[tuple(place)].item() for tensor in (output, *ends))
    where = dict(zip(("token", "head", "channel") if len(place) == 3 else ("token", "channel"), place, strict=True))
    where["token"] += start
    has = f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"
    return f"{name} at {', '.join(f'{axis} {at}' for axis, at in where.items())} is {value:.6g}, the plan has {has}"


def _outs(capture: Capture) -> tuple[str, ...]:
    """The last roundings that y, or q, k and v, may have had."""
    narrow = capture.narrow if isinstance(capture, Norm) else "bf16"
    return outs(next(iter(capture.outputs.values())).dtype, narrow)


def _near(plans: Sequence[P], capture: Capture) -> list[P]:
    """Those near the best on a few tokens."""
    for tokens, _ in FEW:
        if len(plans) > 1 and tokens < capture.tokens:
            found = misses(plans, capture.cut(0, tokens))
            plans = _nearest({plan: missed.wrong for plan, missed in found.items()})
    return list(plans)


def _chains(capture: Chain) -> list[CastPlan]:
    """The plans of a chain near the best: by v, then by all."""
    problem, outs = capture.problem, _outs(capture)
    plans = list(input_plans(problem, outs))
    for tokens, step in FEW:
        part = capture.cut(0, tokens)
        bounds, v = v_bounds_of(part, step), part.outputs["v"].flatten(1)[:, ::step]
        plans = _nearest({plan: int(outside(v, bounds(plan)).sum()) for plan in plans})
    return _near([whole for plan in plans for whole in head_plans(plan, problem, outs)], capture)


def _nearest(wrong: dict[P, int]) -> list[P]:
    """The plans that miss few elements, or few more than the best, the best first: noise on a few decides nothing."""
    least = min(wrong.values())
    near = sorted((plan for plan in wrong if wrong[plan] <= 4 * least + TELLING), key=lambda plan: wrong[plan])
    return near if least == 0 else near[:MANY]


# ---------------------------------------------------------------- what is said of them


def _none(capture: Capture, found: Mapping[P, Misses]) -> Captured:
    (best, missed), *others = sorted(found.items(), key=lambda item: item[1].wrong)
    runner_up = 1 - others[0][1].wrong / missed.of if others else None
    reason = f"no plan explains every element; the nearest leaves {missed}"
    return Captured("none", [], 1 - missed.wrong / missed.of, runner_up, words(best, capture), reason)


def _told(capture: Capture, left: Sequence[Plan]) -> Captured:
    """The answer of plans that explain every element."""
    tokens = LIKE[capture.kind]
    bounds = bounds_of(capture.like(tokens))
    groups: list[tuple[Interval, list[dict[str, str]]]] = []
    for plan in left:
        ends = flat(bounds(plan))
        group = next((group for first, group in groups if not disjoint(first, ends).any()), None)
        if group is None:
            groups.append((ends, [words(plan, capture)]))
        else:
            group.append(words(plan, capture))
    said = answer_of([group for _, group in groups], 1.0, None)
    more = []
    for i, j in itertools.combinations(range(len(groups)), 2):
        elements = disjoint(groups[i][0], groups[j][0])
        pair = {"candidates": [i, j], "differ": difference(said.candidates[i], said.candidates[j])}
        more.append({**pair, "tokens": _until_sure(elements), "elements_a_token": elements.double().mean().item()})
    reason = said.reason
    if more:
        most = max(pair["tokens"] for pair in more)
        reason += f"; {most} more tokens like these tell each pair apart with probability {SURE}"
    elif reason:
        equal = ", ".join(f"{name} ({word})" for name, word in said.candidates[0].items() if " or " in word)
        reason = f"not one of {tokens} tokens like these tells apart: {equal}"
    said = dataclasses.replace(said, reason=reason)
    return Captured(**said.as_dict(), more_tokens=more, tokens_like=tokens)


def _until_sure(elements: Tensor) -> int:
    """Tokens until one tells two plans apart with probability SURE; elements [tokens]: how many of each do."""
    share = (elements > 0).double().mean().item()
    return 1 if share == 1 else math.ceil(math.log(1 - SURE) / math.log(1 - share))


def words(plan: Plan, capture: Capture) -> dict[str, str]:
    """The plan's words, as far as the capture shows them; what changes fp32 ulps alone is open."""
    if isinstance(plan, CastPlan):
        found = words_of(plan, "qkv")
        if isinstance(capture, Chain):
            found |= {name: getattr(plan, name) for name in turned(capture.problem)}
        if isinstance(capture, Chain) and not capture.problem.has_head_norm:
            found = {name: word for name, word in found.items() if name not in HEAD_WORDS}
        residual = isinstance(capture, Chain) and capture.problem.residual is not None
        return {"x": plan.x, **found} if residual else found
    assert isinstance(capture, Norm)
    names = ["x"] if len(capture.storages_of_x) > 1 else []
    names += ["statistics", "variance", "rstd", "normed", "out", "weight_offset", "eps", "root"]
    names += ["weight"] if len(capture.storages_of_weight) > 1 else []
    found = {NORM_WORDS[capture.kind].get(name, name): getattr(plan, name) for name in names}
    found["eps"] = "float32 or float64" if plan.eps == "float32" else plan.eps
    found["root"] = "rsqrt or sqrt" if plan.rstd == KEEP else plan.root
    return found


def holds(candidate: dict[str, str], plan: dict[str, str]) -> bool:
    """Whether a candidate's words, merged with `or`, have those of a plan."""
    return all(word in candidate[name].split(" or ") for name, word in plan.items())


def told(answer: Captured) -> str:
    """The answer in lines for a reader."""
    undecided = len(answer.candidates) > 1
    lines = [summary(dataclasses.replace(answer, kind="", plans=[] if undecided else answer.plans))]
    if undecided and answer.plans:
        lines.append(f"named plans among these: {', '.join(answer.plans)}")
    chance = f"the right plan is excluded with a probability of at most {answer.wrongly_excluded:.1e}"
    lines.append(f"{answer.tokens} tokens, {answer.elements} elements; {chance}")
    for pair in answer.more_tokens[:PAIRS]:
        first, second = (place + 1 for place in pair["candidates"])
        lines.append(f"{pair['tokens']} more tokens tell candidates {first} and {second} apart: {pair['differ']}")
    if len(answer.more_tokens) > PAIRS:
        lines.append(f"and {len(answer.more_tokens) - PAIRS} pairs more (--json has all)")
    for row in answer.excluded:
        lines.append(f"not {row['plan']}: {Misses(row['wrong'], row['of'], row['first'])}")
    return "\n".join(lines)


def unmet(answer: Captured, name: str) -> str:
    """Why what was recorded is not that named plan, or need not be; empty if it is."""
    missed = [row for row in answer.excluded if name in row["plan"].split(", ")]
    if missed:
        return f"it leaves {Misses(missed[0]['wrong'], missed[0]['of'], missed[0]['first'])}"
    return "" if answer.status == "identified" else f"{answer.status}: {answer.reason}"
