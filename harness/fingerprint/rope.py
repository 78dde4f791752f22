"""Which plan is a kernel of q's and k's head norms with RoPE?

At position 0 (cos 1, sin 0) nothing is rotated: there q and k are each a head norm, asked as one. Rotated calls then
say what is paired with what, whether the norm comes before the rotation or after it, and what is rounded around it. At
last it is held to the answer at other geometries, positions, layouts, values and eps.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch

from castpoint.harness.compiled.loading import Fault
from castpoint.harness.fingerprint import norm, pairs
from castpoint.harness.fingerprint.answer import (
    Answer,
    agree,
    ahead,
    answer_of,
    difference,
    held_to,
    none_of_these,
    plans_of,
)
from castpoint.harness.fingerprint.evidence import TELLING, Miss
from castpoint.harness.fingerprint.facts import as_it_lies
from castpoint.harness.fingerprint.missing import TYPES
from castpoint.harness.fingerprint.pairs import Pair
from castpoint.harness.fingerprint.questions import Draw
from castpoint.harness.fingerprint.rope_calls import First, first_call, no_rotation
from castpoint.harness.fingerprint.rope_questions import Held, missed, partial, rope_questions, unexplained
from castpoint.harness.fingerprint.rules import Rule
from castpoint.harness.fingerprint.sizes import ANY, Sizes
from castpoint.harness.fingerprint.turns import AFTER, BEFORE, Way, ways
from castpoint.harness.runs.environment import one_thread_but, without_limits_of_dynamo
from castpoint.kernels.plan import KEEP

KIND = "qk_norm_rope"


def identify(fn: Callable[..., Any], device: str = "cpu", sizes: Sizes = ANY, call: str = "") -> Answer:
    """The fingerprint of a kernel of q and k in one of pairs' forms. Never guesses; whatever fn does wrong is an Answer
    with status `error`."""
    start = time.perf_counter()
    without_limits_of_dynamo()
    try:
        if sizes.dtype != "bf16" or sizes.width is not None:
            raise Fault(f"{KIND} takes bf16, and no width: leave out --dtype and --width")
        pair = pairs.pair_of(fn, call, device)
        with one_thread_but(pair.fn) as its_own:
            answer = _answer(dataclasses.replace(pair, fn=its_own), _sizes_of(pair, sizes))
    except Fault as fault:
        answer = Answer("error", reason=str(fault))
    seconds = round(time.perf_counter() - start, 2)
    return dataclasses.replace(answer, plans=plans_of(answer, KIND), seconds=seconds)


def _sizes_of(pair: Pair, sizes: Sizes) -> Sizes:
    """With the numbers of the user's call; heads of q, and of k and v."""
    many, few = (pair.fixed.get(name) for name in ("num_heads_q", "num_heads_k"))
    heads = sizes.heads if sizes.heads is None or len(sizes.heads) == 2 else (sizes.heads[0], sizes.heads[0])
    heads = heads if many is None else (many, few or many)
    return dataclasses.replace(sizes, heads=heads, head_dim=pair.fixed.get("head_dim", sizes.head_dim))


def _answer(pair: Pair, sizes: Sizes) -> Answer:
    first = first_call(pair, sizes)
    if not first.explained:
        return Answer("none", share_equal=round(first.share, 6), reason=no_rotation(first))
    alone = _norms(first)
    if not alone.candidates:
        return alone
    rule = _rule(alone.candidates[0])
    groups, share, runner_up, miss = _decided(first, rule)
    words = [[_words(candidate, way) for way in group] for group in groups for candidate in alone.candidates]
    if miss:
        answer = none_of_these(words[0][0], share, runner_up, _missing(first, rule) or str(miss))
    else:
        answer = answer_of(words, share, runner_up)
    best = groups[0][0]
    answer = dataclasses.replace(answer, asked=alone.asked, facts=_facts(first, alone, rule, best))
    questions = rope_questions(Held(first, rule, best))
    return answer if miss else held_to(answer, ahead(questions), "qkv" if pair.packed else "q or k")


def _norms(first: First) -> Answer:
    """The head norm that q and k are at position 0; none where one is not of the family or they differ."""
    kernel, head_dim = first.kernel, first.case.x.shape[-1]
    answers = {}
    for name, heads in zip(("q", "k"), first.case.heads, strict=True):
        given = heads if kernel.sizes.heads else 4
        sizes = dataclasses.replace(kernel.sizes, heads=(given,), head_dim=head_dim)
        answers[name] = norm.identify(kernel.alone(name, head_dim), "head_norm", kernel.pair.device, sizes)
    where = "" if first.case.turn is None else " at position 0, where nothing is rotated"
    asked = [
        {**call, "about": f"{name}{' at position 0' if where else ''}, {call['about']}"}
        for name, answer in answers.items()
        for call in answer.asked
    ]
    for name, answer in answers.items():
        if not answer.candidates:
            return dataclasses.replace(answer, reason=f"{name}{where}: {answer.reason}", asked=asked)
    q, k = answers["q"], answers["k"]
    kept = [words for words in q.candidates if any(agree(words, other) for other in k.candidates)]
    if not kept:
        reason = f"two functions: the norms of q and k differ, {difference(q.candidates[0], k.candidates[0])}"
        return dataclasses.replace(q, status="none", candidates=[], nearest=q.candidates[0], reason=reason, asked=asked)
    said = {name: q.facts[name] for name in q.facts if q.facts[name] == k.facts.get(name)}
    other = {f"{name} of {of}": a.facts[name] for of, a in answers.items() for name in a.facts if name not in said}
    return dataclasses.replace(q, candidates=kept, asked=asked, facts=said | other)


def _rule(words: dict[str, str]) -> Rule:
    """Of a head norm's words."""
    names = {"head_rstd": "rstd", "head_normed": "normed"}
    chosen = {names.get(name, name): word.split(" or ")[0] for name, word in words.items() if name != "weight"}
    return Rule(**chosen)


def _words(words: dict[str, str], way: Way) -> dict[str, str]:
    """A candidate's: those of the norm, of the rotation's boundaries in the order of the plan, and its structure."""
    first = {name: words[name] for name in ("statistics", "variance", "head_rstd", "head_normed")}
    last = {name: word for name, word in words.items() if name not in first and name != "out"}
    if not way.rotation:
        return first | {"out": way.out} | last
    names = ["unrotated"] if way.norm == BEFORE else []
    names += ["inv_freq", "position", "phase"] if way.made else []
    names += ["cos_sin", "products"] + (["rotated"] if way.norm == AFTER else []) + ["out"]
    structure = {"norm": way.norm, "rotation": way.rotation} | ({"sections": way.sections} if way.sections else {})
    return first | {name: getattr(way, name) for name in names} | last | structure


def _decided(first: First, rule: Rule) -> tuple[list[list[Way]], float, float | None, Miss]:
    """The ways left in groups that store the same bits, first that which explains most, its share, that of the best
    that is rejected, and what is left unexplained."""
    case, stored = first.case, first.stored
    given = case.turn is None or (case.turn.table is not None and first.kernel.manner.table != torch.float32)
    kept = stored.dtype == torch.float32
    tried = [way for like in first.fits for way in ways(like, rule.out, kept, given)]
    found = {way: unexplained(case, stored, rule, way) for way in tried}
    shares = {way: 1 - wrong.double().mean().item() for way, (wrong, _, _) in found.items()}
    best = max(tried, key=lambda way: shares[way])
    left: list[list[Way]] = []
    rejected = []
    for way in sorted(tried, key=lambda way: -shares[way]):
        votes = (found[way][0] & ~found[best][0]).sum()
        if votes >= TELLING and votes > 4 * (found[best][0] & ~found[way][0]).sum():
            rejected.append(shares[way])
        elif same := [group for group in left if torch.equal(found[group[0]][2], found[way][2])]:
            same[0].append(way)
        else:
            left.append([way])
    return left, shares[best], max(rejected, default=None), missed(case, stored, rule, best)


def _missing(first: First, rule: Rule) -> str:
    """Which type of the table the family lacks, if that would explain all; empty if none does."""
    kept, like = first.stored.dtype == torch.float32, first.fits[0]
    tried = dict.fromkeys(dataclasses.replace(way, cos_sin=KEEP) for way in ways(like, rule.out, kept, True))
    for (word, said), way in itertools.product(TYPES.items(), tried if first.case.turn is not None else ()):
        if not missed(first.case, first.stored, rule, dataclasses.replace(way, cos_sin=word)):
            return f"all is explained if cos_sin is {said}"
    return ""


def _facts(first: First, alone: Answer, rule: Rule, way: Way) -> dict[str, str]:
    pair, turn, manner = first.kernel.pair, first.case.turn, first.kernel.manner
    facts = {name: said for name, said in alone.facts.items() if not name.startswith("y")} | pair.manners
    if turn is None:
        return {"RoPE": "not asked: it takes no angles"} | facts
    head_dim = first.case.x.shape[-1]
    said = {"rotary channels": "all" if way.rotary == head_dim else f"the first {way.rotary} of {head_dim}"}
    if turn.table is not None:
        narrow = "bf16: it is not known whether it would round others" if manner.table != torch.float32 else "fp32"
        columns = f", each angle {manner.columns}" if pair.takes("cos") else ""
        said["cos and sin"] = f"given in {narrow}{columns}"
        if way.rotary == head_dim and pair.takes("rotary_dim", *pairs.TABLES) and "rotary_dim" not in pair.fixed:
            said["partial RoPE"] = partial(first, rule, way)
    if pair.takes("positions"):
        ask = functools.partial(Held(first, rule, way).ask, Draw.gaussian, None, None, layout=pairs.APART)
        said[pairs.APART] = as_it_lies(ask)
    return said | facts
