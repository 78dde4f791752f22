"""The fingerprint of a whole chain: its input norm and matmul seen through v, its head norm through q and k, then
whether one plan says both, where the bias is added, and what it is held to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from castpoint.harness.compiled.loading import Fault
from castpoint.harness.fingerprint import probes
from castpoint.harness.fingerprint.answer import Answer, Question, answer_of, difference, held_to, none_of_these
from castpoint.harness.fingerprint.blackbox import BlackBox
from castpoint.harness.fingerprint.calls import KEPT, ChainCalls, first_taken, keeps_weight
from castpoint.harness.fingerprint.chain_questions import GEOMETRIES, Found, chain_facts, chain_questions
from castpoint.harness.fingerprint.evidence import (
    Call,
    Miss,
    Ranking,
    by_eps,
    check_repeats,
    classes,
    least_missed,
    missed,
    outs,
    rank,
    rejects,
)
from castpoint.harness.fingerprint.facts import noted
from castpoint.harness.fingerprint.heads import Geometry, HeadRows
from castpoint.harness.fingerprint.layouts import CONTIGUOUS, ROWS
from castpoint.harness.fingerprint.missing import missing_word
from castpoint.harness.fingerprint.rules import Readout, Rule, arithmetic, norm_rules, projected_rules
from castpoint.harness.fingerprint.searches import SEARCH, Search
from castpoint.harness.fingerprint.sizes import Sizes
from castpoint.harness.fingerprint.stores import round_to, storages
from castpoint.harness.fingerprint.ties import all_at_once, refined, ties, with_ties
from castpoint.harness.ptx import driver
from castpoint.harness.ptx.ahead import compiling, made_beside
from castpoint.kernels.plan import KEEP

EPS_HALF = 0.75  # for EPS_LARGE in fp16, where x cannot be so large that eps is nothing: x makes up for it
HEAD_WORDS = {"rstd": "head_rstd", "normed": "head_normed"}  # of a head's rule, as a plan calls them


def chain(box: BlackBox, sizes: Sizes) -> Answer:
    """The fingerprint of a black box of kind qkv. Raises Fault for what the callable does wrong."""
    before = driver.launches
    calls, main, refused = _first_calls(box, sizes)
    any_plan = _any_plan(box, main[0])

    def guess() -> Iterator[Question]:
        yield from chain_questions(calls, any_plan, sizes, (CONTIGUOUS, ROWS))
        yield Question("facts", "all", partial(chain_facts, calls, any_plan))

    with compiling(guess, lambda question: question.ask(), before) as asked:
        return _answered(calls, main, refused, sizes, before, asked)


def _any_plan(box: BlackBox, call: Call) -> Found:
    """Of the form of the call. Its questions have the shapes of those about the plan that it is."""
    stored = outs(call.dtype, box.narrow)
    norm = projected_rules(outs=stored, narrow=box.narrow)[0]
    head = norm_rules(outs=stored, narrow=box.narrow)[0] if box.kind == "qkv" else None
    bias = {"bias": "before"} if box.takes("bias") else {}
    return Found(norm, head, _plan_words(norm, head, box.takes("residual")) | bias)


def _answered(
    calls: ChainCalls, main: list[Call], refused: list[dict[str, str]], sizes: Sizes, before: int,
    asked: Callable[[Iterable[Question]], Iterator[Question]],
) -> Answer:  # fmt: skip
    """What the calls and others say. asked: gives the questions that it is held to, and says so to who prepares them;
    before: launches before all."""
    box = calls.box
    fused_add, rng = box.takes("residual"), torch.Generator().manual_seed(1)
    words = storages(box.narrow)
    xs = words if fused_add else words[1:2]
    projected = projected_rules(outs=outs(main[0].dtype, box.narrow), xs=xs, narrow=box.narrow)
    norm_ranking = rank(projected, main)
    norm_words, unexplained = ties(norm_ranking.best, main)
    left = with_ties(norm_ranking.left, norm_words)
    explained = not any(least_missed(left[0], main))
    known, told, search = _norm_calls(calls, main, left, rng) if explained else (main, [], SEARCH)
    head_calls = _head_calls(calls, left[0], rng) if box.kind == "qkv" else None
    biased = _bias_calls(calls, left[0], rng) if box.takes("bias") else None
    kept = explained and keeps_weight(main[0], calls.v)
    box.settle()
    norms, evidence, norm_ties = [left], "", unexplained
    if explained and not kept:
        norms, evidence, norm_ties = _input_norm(calls, left, known, told, search)
    norm, heads = norms[0][0], None if head_calls is None else _heads(head_calls, box.narrow)
    rankings = [norm_ranking, *([heads.ranking] if heads else [])]
    share = sum(ranking.share for ranking in rankings) / len(rankings)
    runners = [r.runner_up - r.share for r in rankings if r.runner_up is not None]
    runner_up = share + max(runners) / len(rankings) if runners else None
    nearest = _plan_words(norm, heads and heads.left[0], fused_add)
    seen = {"v, which shows the input norm," if heads else "y": (norm, main)}
    for name, q in (("q", True), ("k", False)) if heads and head_calls else ():
        seen[name] = (heads.left[0], [calls.of_heads(call, q=q) for call in head_calls])
    why = "; ".join(text for name, of in seen.items() if (text := _unexplained(name, *of)))
    if why := KEPT if kept else why or norm_ties or (heads.unexplained if heads else ""):
        return none_of_these(nearest, share, runner_up, why)
    both = itertools.product(norms, classes(heads.left, head_calls) if heads and head_calls else [[None]])
    pairs = [[pair for pair in itertools.product(*groups) if _fit(*pair)] for groups in both]
    pairs = [fitting for fitting in pairs if fitting]
    groups = [[_plan_words(*pair, fused_add) for pair in fitting] for fitting in pairs]
    if heads and not groups:
        differ = difference(_shared_words(norm), _shared_words(heads.left[0]))
        return none_of_these(nearest, share, runner_up, f"its two norms differ: {differ}")
    if biased:
        word = _bias(calls, *pairs[0][0], *biased)
        if not word:
            why = "but no order of bias and rounding explains v, q and k with a bias"
            return none_of_these(nearest, share, runner_up, why)
        groups = [[{**words, "bias": word} for words in group] for group in groups]
    answer = dataclasses.replace(answer_of(groups, share, runner_up, evidence), asked=refused)
    found = Found(*pairs[0][0], groups[0][0])
    make = partial(noted, box, partial(chain_facts, calls, found))
    with made_beside(make, before, partial(_the_same, calls, found, sizes)) as beside:
        inputs = "x or residual" if box.takes("residual") else "x"
        questions = beside.asked(asked(chain_questions(calls, found, sizes)))
        answer = held_to(answer, _known(questions, beside.more), inputs)
        said = beside.made()
    return dataclasses.replace(answer, facts=box.manners | said)


def _the_same(calls: ChainCalls, found: Found, sizes: Sizes, begun: Callable[[], int]) -> Iterator[tuple[str, str]]:
    """Questions, from the last one back to those that were begun elsewhere, of which nothing is left unexplained, nor
    said besides. None where a residual is added: what a call says of that counts later."""
    box = calls.box
    every = [*chain_questions(calls, found, sizes, (CONTIGUOUS, ROWS))]
    while len(every) > begun() and every[-1].about != "memory" and not box.takes("residual"):
        question, manners = every.pop(), dict(box.manners)
        with contextlib.suppress(Fault):
            if not question.ask() and box.manners == manners:
                yield question.about, question.what


def _known(questions: Iterable[Question], same: Callable[[], set[tuple[str, str]]]) -> Iterator[Question]:
    """The questions, those answered which are known to be the same."""
    for question in questions:
        known = (question.about, question.what) in same()
        yield dataclasses.replace(question, ask=lambda: Miss(0, 1)) if known else question


@dataclass(frozen=True)
class Heads:
    """What calls say of the head norm: the rules left, and what of ties no word explains."""

    ranking: Ranking
    left: list[Rule]
    unexplained: str


def _heads(calls: list[Call], narrow: str) -> Heads:
    rules = norm_rules(outs=outs(calls[0].dtype, narrow), xs=storages(narrow), roots=("rsqrt",), narrow=narrow)
    ranking = rank(rules, calls)
    words, unexplained = ties(ranking.best, calls)
    return Heads(ranking, with_ties(ranking.left, words), unexplained)


def _first_calls(box: BlackBox, sizes: Sizes) -> tuple[ChainCalls, list[Call], list[dict[str, str]]]:
    """The calls that show the input norm, at the first geometry that the callable takes; what it refused before."""

    def ask(calls: ChainCalls, eps: float) -> Call:
        geometry = calls.geometry
        rows, _ = probes.first_rows(
            geometry.width, residual=box.takes("residual"), columns=geometry.head_dim, narrow=box.narrow
        )
        return calls.v(rows.at(eps))

    geometries = dict.fromkeys(_own(geometry, sizes) for geometry in (Geometry(), *(g for _, g in GEOMETRIES)))
    return first_taken((ChainCalls(box, geometry, sizes.tokens) for geometry in geometries), ask)


def _own(geometry: Geometry, sizes: Sizes) -> Geometry:
    """The geometry with the sizes that the user gave."""
    heads = sizes.heads or geometry.heads
    q, kv = heads if len(heads) == 2 else heads * 2
    return Geometry(sizes.width or geometry.width, q, kv, sizes.head_dim or geometry.head_dim)


def _identity(calls: ChainCalls) -> Readout:
    return probes.identity_readout(calls.geometry.head_dim, calls.geometry.width)


def _unexplained(name: str, best: Rule, calls: Sequence[Call]) -> str:
    """What the best rule leaves unexplained of that output, in words; empty if nothing."""
    misses = least_missed(best, calls)
    if not any(misses):
        return ""
    return f"of {name} {missing_word(best, calls, HEAD_WORDS if name in 'qk' else {}) or by_eps(misses, calls)}"


def _norm_calls(
    calls: ChainCalls, main: list[Call], left: Sequence[Rule], rng: torch.Generator
) -> tuple[list[Call], list[Call], Search]:
    """What tells the matmul's operands and is known of the input norm before its fp32 arithmetic is searched: the calls
    in which ties are sought, those that told, and the search. Where answers come in rounds it is for the best rule of
    each scale: operands do not show through the identity."""
    geometry = calls.geometry
    told = [calls.v(probes.cancelling_rows(left[0], geometry.width, geometry.head_dim, rng))]
    if not calls.box.in_rounds:
        return main, told, SEARCH
    best = {(rule.scale, rule.normed): rule for rule in reversed(left)}
    variants = [v for rule in reversed(best.values()) for v in arithmetic(rule)]
    known, search = all_at_once(variants, geometry.width, main, calls.v, _identity(calls))
    return known, told, search


def _input_norm(
    calls: ChainCalls, left: Sequence[Rule], known: list[Call], told: list[Call], search: Search
) -> tuple[list[list[Rule]], str, str]:
    """The norm before the matmul and the matmul's operands, seen through v: groups of rules left, what was said of the
    first two, and what of ties no word explains."""
    left = [b for b in left if not any(rejects(a, b, told) for a in left)]
    variants = [v for rule in left for v in arithmetic(rule)]
    return refined(variants, calls.geometry.width, known, told, calls.v, _identity(calls), search)


def _head_calls(calls: ChainCalls, norm: Rule, rng: torch.Generator) -> list[Call]:
    """Q and K on known inputs of 10 bits, at both eps."""
    state = rng.get_state()
    told = []
    large = probes.EPS_LARGE if calls.box.narrow == "bf16" else EPS_HALF
    for eps in (probes.EPS_SMALL, large, probes.EPS_SMALL):
        rng.set_state(state)
        told.append(calls.qk(norm, rng, eps)[1])
    check_repeats(told[0], told.pop())
    return told


def _shared_words(rule: Rule) -> dict[str, str]:
    """What one word of a plan says of both norms."""
    words = {name: getattr(rule, name) for name in ("statistics", "variance", "weight_offset")}
    return words | {"variance + eps": KEEP if rule.eps in ("float32", "float64") else rule.eps}


def _fit(norm: Rule, head: Rule | None) -> bool:
    """Whether one plan can say both: v was stored as proj, then as out."""
    if head is None:
        return True
    return _shared_words(norm) == _shared_words(head) and norm.out == (head.x if head.x != KEEP else head.out)


def _plan_words(norm: Rule, head: Rule | None, fused_add: bool) -> dict[str, str]:
    words = {"x": norm.x} if fused_add else {}
    words |= {name: getattr(norm, name) for name in ("statistics", "variance", "rstd", "normed", "hidden")}
    if head:
        words |= {"proj": head.x, "head_rstd": head.rstd, "head_normed": head.normed}
    words["out"] = head.out if head else norm.out
    if norm.narrow == "fp16" and norm.matmul == "bf16":
        norm = norm.replace(matmul="fp16")
    return words | {name: getattr(norm, name) for name in ("scale", "matmul", "weight_offset", "eps", "root", "order")}


def _bias_calls(calls: ChainCalls, norm: Rule, rng: torch.Generator) -> tuple[Call, HeadRows | None, Call | None]:
    """V, and where there is a head norm its known input and q and k, all with a bias."""
    geometry = calls.geometry
    rows = probes.norm_rows(geometry.width, rng, residual=calls.box.takes("residual"), narrow=calls.box.narrow)
    readout = probes.general_readout(rng, geometry.width, geometry.head_dim, bias=True)
    v = calls.v(dataclasses.replace(rows, readout=readout))
    return (v, *calls.qk(norm, rng, probes.EPS_SMALL, biased=True)) if calls.box.kind == "qkv" else (v, None, None)


def _bias(calls: ChainCalls, norm: Rule, head: Rule | None, v: Call, given: HeadRows | None, qk: Call | None) -> str:
    """`before` or `after` the rounding of proj, `before or after` if that is one, empty if neither explains all."""
    words = []
    for word in ("before", "after"):
        parts = [missed(norm.replace(bias=word), v)]
        if head and given and qk:
            proj = given.proj if word == "before" else round_to(given.proj, head.x)
            biased = Call(given.with_bias(qk.rows, proj), qk.stored, qk.dtype)
            parts += [missed(head, calls.of_heads(biased, q=q)) for q in (True, False)]
        if not any(parts):
            words.append(word)
    return " or ".join(words)
