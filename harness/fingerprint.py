"""Which plan is this kernel? The fingerprint of a black box.

It is called with rows whose sums are exact in any order (harness.probes), and what it stores is compared, bit by bit,
with what every rule of the family (harness.family) would store. First the roundings are found; then, among rules that
differ by fp32 ulps only, rows are searched on which these store different bits. At last Gaussian rows must agree too.

A rule is rejected where another has more than four times its votes of what tells the two apart, and at least TELLING:
so a few wrong elements, from approximate instructions or noise, decide nothing.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from harness import probes
from harness.blackbox import BlackBox, Fault
from harness.family import (
    EPS_BF16,
    Readout,
    Rows,
    Rule,
    arithmetic,
    factor_of,
    mean_of_squares,
    norm_rules,
    predict,
    projected_rules,
)
from kernels.checks import KEEP, RNE, RTZ, STORAGE
from variants.envelope import envelope, outside
from variants.plan import CastPlan
from variants.problem import Problem
from variants.spec import round_to

# Elements that no rule explains, above which the answer is `none`. Sums in another order and approximate roots change
# 1e-4 of them, an unlisted rounding to 11 bits (fp16, tf32) 2 %, noise on one element in a thousand 1e-3.
UNEXPLAINED = 0.005
# Share of one row or channel that no rule explains, above which the answer is `none`: noise does not gather.
CONCENTRATED = 0.1
TELLING = 6
SEARCHES = 24
ENOUGH = 30  # votes on every pair, after which more would not decide either
MISSES = 8  # searches in a row without a telling one, after which rules count as the same
CONTROLS = 16  # roots next to a boundary of a rounded rstd; if more than an eighth of them are an ulp off, eps is open
CLOSE = 4 * 2.0**-23  # fp32 ulps; the least rounding of the family is 2^-9
SAMPLE = 8  # rows on which all rules are compared, before the nearest are on all

# A rule's words, as a plan calls them.
NORM_WORDS = {
    "rmsnorm": {"rstd": "rstd", "normed": "normed", "out": "hidden"},
    "head_norm": {"rstd": "head_rstd", "normed": "head_normed", "out": "out"},
}


@dataclass(frozen=True)
class Answer:
    """status: identified (one candidate), undecided (several), none (not of the family), error (reason says which).

    candidates: boundary or choice -> word; `a or b` where both words store the same bits on every row searched.
    share_equal, runner_up_share_equal: share of elements that the best rule, and the best rejected one, explain.
    nearest: the best rule where the answer is none.

    Of a chain, eps, root and order are those of its first norm; the fp32 arithmetic of the head norm is not asked.
    """

    status: str
    candidates: list[dict[str, str]] = field(default_factory=list)
    share_equal: float | None = None
    runner_up_share_equal: float | None = None
    nearest: dict[str, str] | None = None
    reason: str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def identify(fn: Callable[..., Any], kind: str, device: str = "cpu") -> Answer:
    """The fingerprint of fn, a callable of blackbox.KINDS, called on that device. Never guesses.

    Raises ValueError for an unknown kind; whatever fn does wrong is an Answer with status `error`.
    """
    start = time.perf_counter()
    box = BlackBox(fn, kind, device)
    try:
        answer = _chain(box) if kind == "qkv" else _norm(box)
    except Fault as fault:
        answer = Answer("error", reason=str(fault))
    return dataclasses.replace(answer, seconds=round(time.perf_counter() - start, 2))


def summary(answer: Answer) -> str:
    """The answer in lines for a reader."""
    lines = [f"{answer.status}{': ' if answer.reason else ''}{answer.reason}"]
    for words in answer.candidates or ([answer.nearest] if answer.nearest else []):
        lines.append(
            ("nearest: " if answer.nearest else "") + ", ".join(f"{name}={word}" for name, word in words.items())
        )
    if answer.share_equal is not None:
        runner_up = answer.runner_up_share_equal
        other = "" if runner_up is None else f", the best rejected plan {runner_up:.3%}"
        lines.append(f"explains {answer.share_equal:.3%} of the elements{other}; {answer.seconds:g} s")
    return "\n".join(lines)


# ---------------------------------------------------------------- evidence


@dataclass(frozen=True, eq=False)
class Call:
    rows: Rows
    stored: Tensor  # what the callable returned for them, in fp32
    dtype: torch.dtype = torch.bfloat16  # in which it returned it

    def share(self, rule: Rule) -> float:
        """Share of elements that the rule explains, of those that are not zero whatever the rule. Where fp32 is stored,
        up to CLOSE counts as explained: every fp32 ulp would show, which is a matter for later."""
        counted = self.rows.nonzero
        return 1 - (self.wrong(rule) & counted).sum().item() / counted.sum().item()

    def wrong(self, rule: Rule) -> Tensor:
        """Which elements the rule does not explain, bool."""
        predicted = predict(rule, self.rows)
        if rule.out == KEEP:
            return (predicted - self.stored).abs() > CLOSE * self.stored.abs()
        return predicted != self.stored


def _share(rule: Rule, calls: Sequence[Call]) -> float:
    return sum(call.share(rule) for call in calls) / len(calls)


def _votes(a: Rule, b: Rule, calls: Sequence[Call]) -> tuple[float, float, float]:
    """What tells the two rules apart, and how much of it the callable stores as a, as b. An element on which they
    differ is one vote; if they differ in the factor of its row, all elements of that variance share one, because an
    implementation's root is right or wrong for all of them at once."""
    votes = torch.zeros(3, dtype=torch.float64)
    for call in calls:
        stored_a, stored_b = predict(a, call.rows), predict(b, call.rows)
        differ = stored_a != stored_b
        counts = torch.stack([differ, differ & (stored_a == call.stored), differ & (stored_b == call.stored)]).sum(-1)
        roots = (factor_of(a, call.rows) != factor_of(b, call.rows)).flatten() & (counts[0] > 0)
        votes += counts[:, ~roots].sum(-1)
        if roots.any():
            number, group = mean_of_squares(a, call.rows).flatten()[roots].unique(return_inverse=True)
            shared = torch.zeros(3, len(number), dtype=torch.float64).index_add(1, group, counts[:, roots].double())
            votes += (shared / shared[0]).sum(-1)
    return tuple(votes.tolist())


def _rejects(a: Rule, b: Rule, calls: Sequence[Call]) -> bool:
    _, as_a, as_b = _votes(a, b, calls)
    return as_a >= TELLING and as_a > 4 * as_b


def _concentrated(wrong: Tensor) -> str:
    """Where wrong [R, C] gathers in one row or column, more than CONCENTRATED of it; empty if nowhere."""
    for name, shares in (("row", wrong.double().mean(1)), ("column", wrong.double().mean(0))):
        if shares.max() > CONCENTRATED:
            return f"they gather in {name} {int(shares.argmax())}, {shares.max():.0%} of it"
    return ""


@dataclass(frozen=True)
class Ranking:
    best: Rule
    share: float
    runner_up: float | None  # None if nothing was rejected
    left: list[Rule]  # rules that the best does not reject, itself first
    gathered: str  # where the elements gather that the best does not explain; empty if nowhere


def _rank(rules: Sequence[Rule], calls: Sequence[Call]) -> Ranking:
    """All rules on a few rows of each call, then those near the best on all rows."""
    few = [Call(call.rows.first(SAMPLE), call.stored[:SAMPLE], call.dtype) for call in calls]
    rough = {rule: _share(rule, few) for rule in rules}
    near = [rule for rule in rules if rough[rule] > max(rough.values()) - 0.1]
    shares = {rule: _share(rule, calls) for rule in near}
    ordered = sorted(near, key=lambda rule: -shares[rule])
    best = ordered[0]
    left = [rule for rule in ordered[1:] if not _rejects(best, rule, calls)]
    rejected = [shares[rule] for rule in ordered[1:] if rule not in left] or [s for s in rough.values() if s < 1]
    gathered = _concentrated(torch.cat([call.wrong(best) for call in calls]))
    return Ranking(best, shares[best], max(rejected, default=None), [best, *left], gathered)


def _classes(rules: Sequence[Rule], calls: Sequence[Call]) -> list[list[Rule]]:
    """The rules in groups that store the same bits on all rows of the calls."""
    groups: list[list[Rule]] = []
    for rule in rules:
        group = next((g for g in groups if _votes(g[0], rule, calls)[0] == 0), None)
        if group is None:
            groups.append([rule])
        else:
            group.append(rule)
    return groups


def _refine(
    rules: Sequence[Rule], width: int, calls: list[Call], call: Callable[[Rows], Call], readout: Readout | None = None
) -> tuple[list[list[Rule]], str]:
    """What is left of the rules after calls on searched rows, in groups between which no search found a difference; and
    what makes their eps doubtful, or an empty text."""
    left, misses = list(rules), 0
    for seed in range(SEARCHES):
        if len(left) == 1 or misses == MISSES:
            break
        rows = probes.telling_rows(left, width, seed, readout)
        if rows is None:
            misses += 1
            continue
        misses = 0
        calls.append(call(rows))
        left = [b for b in left if not any(_rejects(a, b, calls) for a in left)]
        if all(_votes(a, b, calls)[0] >= ENOUGH for i, a in enumerate(left) for b in left[:i]):
            break
    doubt = ""
    if len({rule.eps for rule in left}) < len({rule.eps for rule in rules}) and all(r.rstd != KEEP for r in left):
        doubt = _doubtful_roots(left, width, call, readout)
    if doubt:
        left += [rule for rule in rules if rule not in left and any(rule.replace(eps=r.eps) == r for r in left)]
    return _classes(left, calls), doubt


def _doubtful_roots(rules: Sequence[Rule], width: int, call: Callable[[Rows], Call], readout: Readout | None) -> str:
    """Whether an implementation's roots are not those of the rules, in words; empty if they are. An ulp of a rounded
    rstd shows at a boundary only, where a root that is off by an ulp looks like another eps."""
    found = [probes.control_rows(rules, width, seed, readout) for seed in range(CONTROLS)]
    controls = [call(rows) for rows in found if rows is not None]
    wrong = sum(all(control.share(rule) < 0.5 for rule in rules) for control in controls)
    if wrong <= len(controls) / 8:
        return ""
    return f". Of {len(controls)} roots next to a boundary of their rounding {wrong} are an fp32 ulp off"


# ---------------------------------------------------------------- answers


def _outs(dtype: torch.dtype) -> tuple[str, ...]:
    return (RNE, RTZ) if dtype == torch.bfloat16 else STORAGE


def _check_repeats(first: Call, second: Call) -> None:
    same = (first.stored == second.stored) | (first.stored.isnan() & second.stored.isnan())
    differ = 1 - same.double().mean().item()
    if differ:
        raise Fault(f"the callable is not deterministic: two calls on equal inputs differ in {differ:.3%} of elements")


def _merged(dicts: Sequence[dict[str, str]]) -> dict[str, str]:
    """One dict of rules that store the same bits: a word where they agree, `a or b` where they do not."""
    return {name: " or ".join(dict.fromkeys(d[name] for d in dicts)) for name in dicts[0]}


def _difference(a: dict[str, str], b: dict[str, str]) -> str:
    return ", ".join(f"{name}={a[name]} against {b[name]}" for name in a if a[name] != b[name])


def _answer(groups: list[list[dict[str, str]]], share: float, runner_up: float | None, evidence: str = "") -> Answer:
    candidates = [_merged(group) for group in groups]
    if len(candidates) == 1:
        equal = [f"{name} ({word})" for name, word in candidates[0].items() if " or " in word]
        reason = f"the same bits on every row searched, whichever: {', '.join(equal)}" if equal else ""
        return Answer("identified", candidates, share, runner_up, reason=reason)
    pairs = "; ".join(_difference(candidates[0], other) for other in candidates[1:])
    return Answer("undecided", candidates, share, runner_up, reason=f"undecided between {pairs}{evidence}")


def _none(nearest: dict[str, str], share: float, runner_up: float | None, why: str) -> Answer:
    reason = f"none of these: the nearest plan leaves {1 - share:.2%} of the elements unexplained; {why}"
    return Answer("none", [], share, runner_up, nearest, reason)


def _by_eps(rule: Rule, calls: Sequence[Call]) -> str:
    return ", ".join(f"{1 - call.share(rule):.2%} of them at eps={call.rows.eps:g}" for call in calls)


def _evidence(groups: list[list[Rule]], calls: Sequence[Call]) -> str:
    """What the deciding probe said of the first two groups."""
    if len(groups) < 2:
        return ""
    differ, first, second = _votes(groups[0][0], groups[1][0], calls)
    return (
        ". The probe that would decide, rows on which they store different bits, was given: of the "
        f"{differ:g} roots or products that tell the first two apart, {first:.3g} are stored as by the first, "
        f"{second:.3g} as by the second"
    )


# ---------------------------------------------------------------- a norm


def _norm(box: BlackBox) -> Answer:
    rng = torch.Generator().manual_seed(0)
    heads, fused_add = box.kind == "head_norm", box.takes("residual")
    rows = probes.norm_rows(probes.HEAD_DIM if heads else probes.WIDTH, rng, residual=fused_add)

    def call(rows: Rows) -> Call:
        shape = [len(rows.x) // 4, 4, rows.width] if heads else list(rows.x.shape)
        residual = torch.zeros_like(rows.x) if fused_add and rows.residual is None else rows.residual
        residual = None if residual is None else residual.reshape(shape)
        stored = box.norm(rows.x.reshape(shape), rows.weight, rows.eps, residual)
        return Call(rows, stored.reshape(rows.x.shape).float(), stored.dtype)

    def named(rule: Rule) -> dict[str, str]:
        first = ["x"] if fused_add else []
        words = [*first, "statistics", "variance", "rstd", "normed", "out", "weight_offset", "eps", "root", "order"]
        return {NORM_WORDS[box.kind].get(word, word): getattr(rule, word) for word in words}

    main = [call(rows), call(rows.at(probes.EPS_LARGE))]
    _check_repeats(main[0], call(rows))
    ranking = _rank(norm_rules(outs=_outs(main[0].dtype), xs=STORAGE if fused_add else (RNE,)), main)
    nearest = named(ranking.best)
    if 1 - ranking.share > UNEXPLAINED or ranking.gathered:
        return _none(nearest, ranking.share, ranking.runner_up, ranking.gathered or _by_eps(ranking.best, main))
    calls: list[Call] = []  # not the general rows: on some of them 1 / sqrt in two roundings is another number
    groups, doubt = _refine([v for rule in ranking.left for v in arithmetic(rule)], rows.width, calls, call)
    for count in (len(rows.x), 4):  # the same number of rows, and another
        control = call(Rows(probes.gaussian([count, rows.width], rng), rows.weight, probes.EPS_SMALL, rows.width))
        share = control.share(groups[0][0])
        if 1 - share > UNEXPLAINED:
            why = f"of {count} Gaussian rows, while it explains rows whose sums are exact"
            return _none(nearest, share, ranking.runner_up, why)
    share = max(_share(group[0], main) for group in groups)
    words = [[named(rule) for rule in group] for group in groups]
    return _answer(words, share, ranking.runner_up, doubt or _evidence(groups, calls))


# ---------------------------------------------------------------- the whole chain


def _chain(box: BlackBox) -> Answer:
    rng = torch.Generator().manual_seed(0)
    fused_add, biased = box.takes("residual"), box.takes("bias")
    norms, evidence, norm_ranking = _input_norm(box, rng)
    norm = norms[0][0]
    head_calls = _head_calls(box, norm, rng)
    head_ranking = _rank(norm_rules(outs=_outs(head_calls[0].dtype), xs=STORAGE, roots=("rsqrt",)), head_calls)
    share = (norm_ranking.share + head_ranking.share) / 2
    halves = ((norm_ranking, head_ranking), (head_ranking, norm_ranking))
    runner_up = max((a.runner_up + b.share) / 2 for a, b in halves if a.runner_up is not None)
    nearest = _plan_words(norm, head_ranking.best, fused_add)
    if 1 - min(norm_ranking.share, head_ranking.share) > UNEXPLAINED:
        v, qk = 1 - norm_ranking.share, 1 - head_ranking.share
        where = f"{v:.2%} of v, which shows the input norm, and {qk:.2%} of q and k"
        return _none(nearest, share, runner_up, where)
    if norm_ranking.gathered or head_ranking.gathered:
        where = f"v: {norm_ranking.gathered}" if norm_ranking.gathered else f"q and k: {head_ranking.gathered}"
        return _none(nearest, share, runner_up, where)
    groups = [
        [_plan_words(a, b, fused_add) for a in norm_group for b in head_group if _fit(a, b)]
        for norm_group in norms
        for head_group in _classes(head_ranking.left, head_calls)
    ]
    groups = [group for group in groups if group]
    if not groups:
        differ = _difference(_shared_words(norm), _shared_words(head_ranking.best))
        return _none(nearest, share, runner_up, f"its two norms differ: {differ}")
    if biased:
        word = _bias(box, norm, head_ranking.best, rng)
        if not word:
            why = "but no order of bias and rounding explains v, q and k with a bias"
            return _none(nearest, share, runner_up, why)
        groups = [[{**words, "bias": word} for words in group] for group in groups]
    leaving, gathered = _control(box, groups[0][0], rng)
    if leaving > UNEXPLAINED or gathered:
        why = f"but {leaving:.2%} of Gaussian elements leave the envelope of fp32 sums: "
        why += gathered or "its matmul or sums are not fp32, or q, k and v do not read one hidden"
        return _none(nearest, share, runner_up, why)
    return _answer(groups, share, runner_up, evidence)


def _input_norm(box: BlackBox, rng: torch.Generator) -> tuple[list[list[Rule]], str, Ranking]:
    """The norm before the matmul and the matmul's operands, seen through v: groups of rules left, what was said of the
    first two, and the ranking before."""
    fused_add = box.takes("residual")
    rows = probes.norm_rows(probes.WIDTH, rng, residual=fused_add)
    rows = dataclasses.replace(rows, readout=probes.general_readout(rng))
    main = [_call_v(box, rows), _call_v(box, rows.at(probes.EPS_LARGE))]
    _check_repeats(main[0], _call_v(box, rows))
    ranking = _rank(projected_rules(outs=_outs(main[0].dtype), xs=STORAGE if fused_add else (RNE,)), main)
    if 1 - ranking.share > UNEXPLAINED:
        return [ranking.left], "", ranking
    calls = [_call_v(box, probes.cancelling_rows(ranking.best, rng))]
    left = [b for b in ranking.left if not any(_rejects(a, b, calls) for a in ranking.left)]
    variants = [v for rule in left for v in arithmetic(rule)]
    groups, doubt = _refine(variants, probes.WIDTH, calls, lambda rows: _call_v(box, rows), probes.identity_readout())
    return groups, doubt or _evidence(groups, calls), ranking


def _call_v(box: BlackBox, rows: Rows) -> Call:
    heads = probes.NUM_Q_HEADS + probes.NUM_KV_HEADS
    weight = torch.cat([torch.zeros(heads * probes.HEAD_DIM, rows.width), rows.readout.weight(rows.width)])
    ones = torch.ones(probes.HEAD_DIM)
    bias = None
    if box.takes("bias"):
        bias = torch.zeros(len(weight))
        if rows.readout.bias is not None:
            bias[-probes.HEAD_DIM :] = rows.readout.bias
    _, _, v = _run(box, rows.x, rows.weight, weight, ones, ones, rows.eps, rows.residual, bias)
    return Call(rows, v[:, 0].float(), v.dtype)


def _run(
    box: BlackBox, x: Tensor, norm_weight: Tensor, weight: Tensor, q: Tensor, k: Tensor, eps: float,
    residual: Tensor | None = None, bias: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    if residual is None and box.takes("residual"):
        residual = torch.zeros_like(x)
    if bias is None and box.takes("bias"):
        bias = torch.zeros(len(weight))
    heads = (probes.NUM_Q_HEADS, probes.NUM_KV_HEADS)
    return box.qkv(x, norm_weight, weight, q, k, eps, *heads, residual=residual, bias=bias)


def _head_calls(box: BlackBox, norm: Rule, rng: torch.Generator) -> list[Call]:
    """Q and K on known inputs of 10 bits, at both eps."""
    state = rng.get_state()
    calls = []
    for eps in (probes.EPS_SMALL, probes.EPS_LARGE, probes.EPS_SMALL):
        rng.set_state(state)
        given, stored, weights = _stored_heads(box, norm, rng, eps)
        calls.append(Call(given.rows(*weights, eps), stored.float(), stored.dtype))
    _check_repeats(calls[0], calls.pop())
    return calls


def _stored_heads(
    box: BlackBox, norm: Rule, rng: torch.Generator, eps: float, biased: bool = False
) -> tuple[probes.HeadRows, Tensor, tuple[Tensor, Tensor]]:
    """The heads' known input, what the callable stores of it [ROWS * (Hq + Hkv), READ], and the q and k weights."""
    given = probes.head_rows(rng)
    q_weight, k_weight = (probes.norm_weight(probes.HEAD_DIM, rng) for _ in range(2))
    identity = torch.full([probes.WIDTH], 1.0 if norm.weight_offset == "none" else 0.0)
    weight = torch.cat([given.qk_weight, torch.zeros(probes.NUM_KV_HEADS * probes.HEAD_DIM, probes.WIDTH)])
    bias = given.packed_bias() if biased else None
    q, k, _ = _run(box, given.x, identity, weight, q_weight, k_weight, eps, bias=bias)
    stored = torch.cat([q, k], dim=1).gather(2, given.places.expand(len(q), -1, -1))
    return given, stored.flatten(0, 1), (q_weight, k_weight)


def _shared_words(rule: Rule) -> dict[str, str]:
    """What one word of a plan says of both norms."""
    eps = rule.eps if rule.eps in EPS_BF16 else KEEP
    return {
        "statistics": rule.statistics,
        "variance": rule.variance,
        "weight_offset": rule.weight_offset,
        "variance + eps": eps,
    }


def _fit(norm: Rule, head: Rule) -> bool:
    """Whether one plan can say both: v was stored as proj, then as out."""
    return _shared_words(norm) == _shared_words(head) and norm.out == (head.x if head.x != KEEP else head.out)


def _plan_words(norm: Rule, head: Rule, fused_add: bool) -> dict[str, str]:
    words = {"x": norm.x} if fused_add else {}
    words |= {name: getattr(norm, name) for name in ("statistics", "variance", "rstd", "normed", "hidden")}
    words |= {"proj": head.x, "head_rstd": head.rstd, "head_normed": head.normed, "out": head.out}
    return words | {name: getattr(norm, name) for name in ("scale", "matmul", "weight_offset", "eps", "root", "order")}


def _bias(box: BlackBox, norm: Rule, head: Rule, rng: torch.Generator) -> str:
    """`before` or `after` the rounding of proj, `before or after` if that is one, empty if neither explains all."""
    rows = probes.norm_rows(probes.WIDTH, rng)
    v = _call_v(box, dataclasses.replace(rows, readout=probes.general_readout(rng, bias=True)))
    given, stored, weights = _stored_heads(box, norm, rng, probes.EPS_SMALL, biased=True)
    words = []
    for word in ("before", "after"):
        proj = given.proj if word == "before" else round_to(given.proj, head.x)
        heads = Call(given.rows(*weights, probes.EPS_SMALL, proj + given.bias[None]), stored)
        if min(v.share(norm.replace(bias=word)), heads.share(head)) >= 1 - UNEXPLAINED:
            words.append(word)
    return " or ".join(words)


def _control(box: BlackBox, words: dict[str, str], rng: torch.Generator) -> tuple[float, str]:
    """Share of q, k and v on Gaussian inputs that leave the plan's envelope, and where they gather."""
    rows = (probes.NUM_Q_HEADS + 2 * probes.NUM_KV_HEADS) * probes.HEAD_DIM
    plan = CastPlan(**{name: word.split(" or ")[0] for name, word in words.items() if name in vars(CastPlan())})
    problem = Problem(
        x=probes.gaussian([probes.ROWS, probes.WIDTH], rng).bfloat16(),
        norm_weight=(probes.gaussian([probes.WIDTH], rng).abs() + 0.5).bfloat16(),
        qkv_weight=(probes.gaussian([rows, probes.WIDTH], rng) / 16).bfloat16(),
        num_q_heads=probes.NUM_Q_HEADS,
        num_kv_heads=probes.NUM_KV_HEADS,
        q_norm_weight=(probes.gaussian([probes.HEAD_DIM], rng).abs() + 0.5).bfloat16(),
        k_norm_weight=(probes.gaussian([probes.HEAD_DIM], rng).abs() + 0.5).bfloat16(),
        weight_offset=words["weight_offset"] != "none",
    )
    weights = (problem.norm_weight, problem.qkv_weight, problem.q_norm_weight, problem.k_norm_weight)
    outputs = _run(box, problem.x, *weights, problem.eps)
    allowed = envelope(plan, problem)
    wrong = torch.cat([outside(o, allowed[n]).flatten(1) for n, o in zip("qkv", outputs, strict=True)], dim=1)
    return wrong.double().mean().item(), _concentrated(wrong)
