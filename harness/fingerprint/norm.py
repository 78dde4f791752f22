"""Which plan is this kernel? The fingerprint of a black box.

It is called with rows whose sums are exact in any order (probes), and what it stores is compared, bit by bit, with what
every rule of the family (rules) would store. First the roundings are found; then, among rules that differ by fp32 ulps
only, rows are searched on which these store different bits. At last it is held to the answer at other shapes, layouts,
values and eps (questions).

evidence says which rules are left after the calls. A single norm is asked here, a whole chain in chain.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from castpoint.harness.compiled.loading import Fault
from castpoint.harness.fingerprint import facts, probes
from castpoint.harness.fingerprint.answer import Answer, Question, answer_of, by_paths, held_to, none_of_these, plans_of
from castpoint.harness.fingerprint.arguments import options_of
from castpoint.harness.fingerprint.blackbox import DIRECT, BlackBox, Pending, Refused, Way
from castpoint.harness.fingerprint.calls import KEPT, NormCalls, first_taken, keeps_weight
from castpoint.harness.fingerprint.chain import chain
from castpoint.harness.fingerprint.evidence import (
    Call,
    Miss,
    by_eps,
    least_missed,
    mean_shares,
    missed,
    outs,
    rank,
    rejects,
)
from castpoint.harness.fingerprint.extra_questions import extra_questions
from castpoint.harness.fingerprint.forms import as_kind, in_a_batch
from castpoint.harness.fingerprint.gated import Found, gated
from castpoint.harness.fingerprint.kinds import CHAINS, paths
from castpoint.harness.fingerprint.missing import missing_word
from castpoint.harness.fingerprint.norm_facts import (
    IN_8_BITS,
    NORM_WORDS,
    fixed_scale,
    largest_of,
    norm_facts,
    results_of,
)
from castpoint.harness.fingerprint.questions import WIDTHS, questions
from castpoint.harness.fingerprint.rules import Rows, Rule, arithmetic, norm_rules
from castpoint.harness.fingerprint.searches import SEARCH
from castpoint.harness.fingerprint.sizes import ANY, Sizes
from castpoint.harness.fingerprint.stores import storages
from castpoint.harness.fingerprint.ties import all_at_once, refined, ties, with_ties
from castpoint.harness.ptx import driver
from castpoint.harness.ptx.ahead import compiling, made_beside
from castpoint.harness.runs.environment import one_thread_but, without_limits_of_dynamo
from castpoint.kernels.plan import KEEP

FEW = 0.97  # share explained, from which on ties may be what is left


def identify(
    fn: Callable[..., Any], kind: str, device: str = "cpu", sizes: Sizes = ANY, call: str = "", way: Way = DIRECT
) -> Answer:
    """The fingerprint of fn, a callable of kinds.KINDS or a norm in one of forms, called on that device with those
    sizes. call: how a norm is called. Never guesses.

    Raises ValueError for an unknown kind; whatever fn does wrong is an Answer with status `error`. Raises Pending where
    answers come in rounds, once all is asked that does not depend on one.
    """
    start = time.perf_counter()
    without_limits_of_dynamo()
    BlackBox(fn, kind, device)  # checks both
    if kind == "qk_norm_rope":
        from castpoint.harness.fingerprint import rope  # which asks q's and k's norms here

        return rope.identify(fn, device, sizes, call)
    options = "" if call else options_of(fn)
    try:
        if beyond := sizes.beyond(kind):
            raise Fault(beyond)
        fn = as_kind(fn, kind, call)
    except Fault as fault:
        return Answer("error", reason=str(fault))
    answers: dict[tuple[str, ...], Answer] = {}
    refused: set[str] = set()
    pending = False
    for given in paths(fn, kind):
        if refused & set(given):
            continue
        try:
            answers[given] = _guarded(BlackBox(fn, kind, device, given, sizes.dtype, way), sizes)
            refused |= set(given[-1:]) if answers[given].status == "refused" else set()
        except Pending:
            pending = True
    if pending:
        raise Pending
    answer = by_paths(answers)
    if answer.candidates and options:
        answer = dataclasses.replace(answer, facts=answer.facts | {"not asked": f"{options}, as it is by default"})
    seconds = round(time.perf_counter() - start, 2)
    return dataclasses.replace(answer, plans=plans_of(answer, kind), seconds=seconds)


def _guarded(box: BlackBox, sizes: Sizes) -> Answer:
    try:
        with one_thread_but(box.fn) as box.fn:
            answer = chain(box, sizes) if box.kind in CHAINS else _norm(box, sizes)
            box.settle()
            return answer
    except Fault as fault:
        return Answer("refused" if isinstance(fault, Refused) else "error", reason=str(fault))


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
        part = "" if "matmul" in words else "the head norm of " if "head_rstd" in words else "the norm of "
        part = "the head norm and RoPE of " if "cos_sin" in words else part
        half = ", with fp16 in place of bf16" if any("fp16" in word for word in words.values()) else ""
        lines.append(f"= {part}{', '.join(answer.plans)}{half}")
    if answer.share_equal is not None:
        runner_up = answer.runner_up_share_equal
        other = "" if runner_up is None else f", the best rejected plan {runner_up:.3%}"
        lines.append(f"explains {answer.share_equal:.3%} of the elements{other}; {answer.seconds:g} s")
    for about in dict.fromkeys(call["about"] for call in answer.asked):
        whats = [call["what"] for call in answer.asked if call["about"] == about and call["result"] == "same"]
        if about == "together":  # x's shape, layout, eps and weight: each is listed by itself
            whats = [f"{len(whats)} calls at which several of these are moved"] if whats else []
        lines += [f"the same with {about}: {'; '.join(dict.fromkeys(whats))}"] if whats else []
    for result in dict.fromkeys(call["result"] for call in answer.asked if call["result"].startswith("refused")):
        whats = [f"{call['about']} {call['what']}" for call in answer.asked if call["result"] == result]
        lines.append(f"refused with {'; '.join(dict.fromkeys(whats))}: {result.removeprefix('refused: ')}")
    return "\n".join([*lines, *(f"{name}: {said}" for name, said in answer.facts.items())])


def _ways(box: BlackBox, sizes: Sizes) -> list[NormCalls]:
    """How it may be called: the first that it takes decides."""
    heads = (sizes.heads or (4,))[0] if box.kind == "head_norm" else None
    own = sizes.head_dim if heads else sizes.width
    widths = [own] if own else [probes.HEAD_DIM, 64, 256] if heads else [probes.WIDTH, *WIDTHS]
    return [NormCalls(box, width, heads, sizes.tokens) for width in widths]


def _first_calls(box: BlackBox, sizes: Sizes) -> tuple[NormCalls, list[Call], list[dict[str, str]]]:
    """The calls that tell the roundings, at the first width that it takes; what it refused before."""
    fused_add, whole = box.takes("residual"), sizes.dtype == "fp32"

    def ask(asked: NormCalls, eps: float) -> Call:
        rows, _ = probes.first_rows(asked.width, residual=fused_add or whole, narrow=sizes.narrow)
        if whole and not fused_add:  # x of 9 bits
            rows = dataclasses.replace(rows, x=rows.x + rows.residual, residual=None)
        return asked.call(rows.at(eps))

    return first_taken(_ways(box, sizes), ask)


def _norm(box: BlackBox, sizes: Sizes) -> Answer:
    if box.takes("gate"):
        return gated(_ways(box, sizes), sizes, lambda plain: _as_called(plain, sizes))
    try:
        return _as_called(box, sizes)[0]
    except Fault as fault:
        if box.kind == "rmsnorm" and isinstance(fault, Refused) and not box.way.files:
            with contextlib.suppress(Fault):
                return _as_called(in_a_batch(box), sizes)[0]
        if box.kind != "head_norm":
            raise
        box.a_weight_a_head = True
        with contextlib.suppress(Fault):
            return _as_called(box, sizes)[0]
        box.a_weight_a_head = False
        raise


def _as_called(box: BlackBox, sizes: Sizes) -> Found:
    """The answer, and the rule that it was held to: none where no call explained one."""
    before = driver.launches
    asked, main, refused = _first_calls(box, sizes)
    any_rule = _rules(asked, main, sizes)[0]

    def guess() -> Iterator[Question]:  # of the same shapes
        yield from _questions(any_rule, asked, main, sizes, takes_all=True)
        yield Question("facts", "all", partial(norm_facts, any_rule, asked, main[0].rows, sizes))

    with compiling(guess, lambda question: question.ask(), before) as prepared:
        answer, rule = _decided(asked, main, sizes)
        if rule is None:
            return answer, None
        answer = dataclasses.replace(answer, asked=refused)
        every = prepared(_questions(rule, asked, main, sizes))
        facts_of = partial(norm_facts, rule, asked, main[0].rows, sizes)
        with made_beside(partial(facts.noted, box, facts_of), before) as beside:
            answer = held_to(answer, every, "x or residual" if box.takes("residual") else "x")
            said = beside.made()
    said = box.manners | said
    word = re.match(r"weight=(\S+?)(,|$)", said.get("fp32 weights", ""))
    candidates = [{**words, "weight": word[1]} if word else words for words in answer.candidates]
    return dataclasses.replace(answer, candidates=candidates, facts=said), rule


def _questions(
    rule: Rule, asked: NormCalls, main: list[Call], sizes: Sizes, takes_all: bool = False
) -> Iterator[Question]:
    """All that it is held to, which the calls found to be the rule. takes_all: of questions."""
    rows, other = (call.rows for call in main)
    dynamic = rows.scales is not None and not torch.equal(rows.scales, other.scales)  # whose scales follow the results
    largest = largest_of(rule, rows) if dynamic else None
    most = 8 * results_of(rule, main[0]) if dynamic else 0.0  # beyond which a scale may have an end

    def ask(rows: Rows, shape: list[int] | None, layout: str) -> Miss:
        parts = torch.arange(len(rows.x)).split(math.prod((shape or [len(rows.x), 1])[:-1]))
        calls = [asked.call(rows.of(part), layout, shape) for part in parts]
        misses = [missed(rule, call) for call in calls]
        if largest is not None and shape is not None and not any(misses):
            alike = [call for call in calls if results_of(rule, call) < most]
            misses += [facts.other_scales(largest_of(rule, call.rows), largest) for call in alike]
        return max(misses, key=lambda miss: miss.wrong)

    yield from questions(rule, rows.weight, asked, sizes, fixed_scale(asked.box), ask, takes_all)
    yield from extra_questions(rule, asked, rows, sizes)


def _rules(asked: NormCalls, main: list[Call], sizes: Sizes) -> list[Rule]:
    """The family of what stores what the calls show."""
    words, eight = storages(sizes.narrow), main[0].rows.scales is not None
    return norm_rules(
        outs=outs(main[0].dtype, sizes.narrow), xs=words if _several(asked, sizes) else words[1:2], narrow=sizes.narrow,
        hiddens=words if eight else words[:1], weightless=asked.box.weightless,
    )  # fmt: skip


def _several(asked: NormCalls, sizes: Sizes) -> bool:
    """Whether x may be rounded before it is normalised: a sum is, and x that is wider."""
    return asked.box.takes("residual") or sizes.dtype == "fp32"


def _decided(asked: NormCalls, main: list[Call], sizes: Sizes) -> tuple[Answer, Rule | None]:
    """The answer of the deciding calls, and the rule that it is held to: none where the answer is none."""
    eight = main[0].rows.scales is not None
    named = partial(_named, asked.box, main, _several(asked, sizes))
    ranking = rank(_rules(asked, main, sizes), main)
    tied, unexplained = ties(ranking.best, main)
    best, *left = with_ties([r for r in ranking.left if r.out == ranking.best.out or not eight], tied)
    misses = least_missed(best, main)
    none = partial(none_of_these, named(best), ranking.share, ranking.runner_up)
    if any(misses):
        ways = unexplained if ranking.share > FEW else ""
        return none(missing_word(best, main, NORM_WORDS[asked.box.kind]) or ways or by_eps(misses, main)), None
    calls: list[Call] = []  # not the general rows: on some of them 1 / sqrt in two roundings is another number
    variants = [best, *left] if eight else [v for rule in (best, *left) for v in arithmetic(rule)]
    kept = not asked.box.weightless and keeps_weight(main[0], asked.call)
    known, search = (main, SEARCH) if not asked.box.in_rounds else all_at_once(variants, asked.width, main, asked.call)
    asked.box.settle()
    if kept:
        return none(KEPT), None
    groups, said, unexplained = refined(variants, asked.width, known, calls, asked.call, search=search)
    if unexplained:
        return none(unexplained), None
    share = max(mean_shares([group[0] for group in groups], main).values())
    return answer_of([[named(r) for r in group] for group in groups], share, ranking.runner_up, said), groups[0][0]


def _named(box: BlackBox, main: list[Call], several: bool, rule: Rule) -> dict[str, str]:
    """The words of a rule. In 8 bits no fp32 arithmetic shows, without a weight a last rounding is that of normed."""
    eight = main[0].rows.scales is not None
    words = {name: getattr(rule, name) for name in (*(("x",) if several else ()), "statistics", "variance", "rstd")}
    words |= {"normed": rule.normed, **({"hidden": rule.hidden} if eight else {}), "out": rule.out}
    words |= {"weight": "none"} if box.weightless else {"weight_offset": rule.weight_offset}
    words |= {name: getattr(rule, name) for name in (("eps",) if eight else ("eps", "root", "order"))}
    if box.weightless:
        words["normed"] = " or ".join(dict.fromkeys((KEEP, rule.hidden if eight else rule.out)))
        words.pop("order", "")
    if eight and rule.eps == "float32":
        words["eps"] = "float32 or float64"
    ways = ("int8-rne", "int8-rna")
    if rule.out in ways and not all(rejects(rule, rule.replace(out=way), main) for way in ways if way != rule.out):
        words["out"] = " or ".join(ways)
    names = (IN_8_BITS if eight else NORM_WORDS)[box.kind]
    return {names.get(name, name): word for name, word in words.items()}
