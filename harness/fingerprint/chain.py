"""The fingerprint of a whole chain: its input norm and matmul seen through v, its head norm through q and k, then
whether one plan says both, where the bias is added, and whether Gaussian inputs agree.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import torch
from torch import Tensor

from castpoint.harness.fingerprint import probes
from castpoint.harness.fingerprint.answer import (
    UNEXPLAINED,
    Answer,
    answer_of,
    at_other_shapes,
    difference,
    differing,
    none_of_these,
)
from castpoint.harness.fingerprint.blackbox import BlackBox
from castpoint.harness.fingerprint.evidence import (
    Call,
    Ranking,
    check_repeats,
    classes,
    concentrated,
    outs,
    rank,
    refine,
    rejects,
    settled,
)
from castpoint.harness.fingerprint.heads import HeadRows, head_rows
from castpoint.harness.fingerprint.rules import EPS_BF16, Rows, Rule, arithmetic, norm_rules, projected_rules
from castpoint.kernels.plan import KEEP, RNE, STORAGE, CastPlan
from castpoint.variants.envelope import envelope, outside
from castpoint.variants.problem import Problem
from castpoint.variants.spec import round_to

# [T, D] at which an answer is tried besides [64, 256]. D is 256 times a power of four, for the heads' input.
OTHER_SHAPES = ([1, 4096], [600, 256])


def chain(box: BlackBox) -> Answer:
    """The fingerprint of a black box of kind qkv. Raises Fault for what the callable does wrong."""
    fused_add, biased = box.takes("residual"), box.takes("bias")
    rows, rng = probes.first_rows(probes.WIDTH, residual=fused_add, read=True)
    norms, evidence, norm_ranking = _input_norm(box, rows, rng)
    norm = norms[0][0]
    head_calls = _head_calls(box, norm, rng)
    head_ranking = rank(norm_rules(outs=outs(head_calls[0].dtype), xs=STORAGE, roots=("rsqrt",)), head_calls)
    share = (norm_ranking.share + head_ranking.share) / 2
    halves = ((norm_ranking, head_ranking), (head_ranking, norm_ranking))
    runner_up = max((a.runner_up + b.share) / 2 for a, b in halves if a.runner_up is not None)
    nearest = _plan_words(norm, head_ranking.best, fused_add)
    if 1 - min(norm_ranking.share, head_ranking.share) > UNEXPLAINED:
        v, qk = 1 - norm_ranking.share, 1 - head_ranking.share
        where = f"{v:.2%} of v, which shows the input norm, and {qk:.2%} of q and k"
        return none_of_these(nearest, share, runner_up, where)
    for outputs, ranking in (("v", norm_ranking), ("q and k", head_ranking)):
        if ranking.gathered:
            return none_of_these(nearest, share, runner_up, f"{outputs}: {ranking.gathered}")
    both = itertools.product(norms, classes(head_ranking.left, head_calls))
    pairs = [[pair for pair in itertools.product(*groups) if _fit(*pair)] for groups in both]
    pairs = [fitting for fitting in pairs if fitting]
    groups = [[_plan_words(*pair, fused_add) for pair in fitting] for fitting in pairs]
    if not groups:
        differ = difference(_shared_words(norm), _shared_words(head_ranking.best))
        return none_of_these(nearest, share, runner_up, f"its two norms differ: {differ}")
    if biased:
        word = _bias(box, norm, head_ranking.best, rng)
        if not word:
            why = "but no order of bias and rounding explains v, q and k with a bias"
            return none_of_these(nearest, share, runner_up, why)
        groups = [[{**words, "bias": word} for words in group] for group in groups]
    leaving, gathered = _control(box, groups[0][0], rng)
    if leaving > UNEXPLAINED or gathered:
        why = f"but {leaving:.2%} of Gaussian elements leave the envelope of fp32 sums: "
        why += gathered or "its matmul or sums are not fp32, or q, k and v do not read one hidden"
        return none_of_these(nearest, share, runner_up, why)
    answer = answer_of(groups, share, runner_up, evidence)
    if answer.status != "identified":
        return answer
    return at_other_shapes(answer, OTHER_SHAPES, lambda shape: _differing_at(box, *pairs[0][0], *shape))


def _input_norm(box: BlackBox, rows: Rows, rng: torch.Generator) -> tuple[list[list[Rule]], str, Ranking]:
    """The norm before the matmul and the matmul's operands, seen through v: groups of rules left, what was said of the
    first two, and the ranking before."""
    main = [_call_v(box, rows), _call_v(box, rows.at(probes.EPS_LARGE))]
    check_repeats(main[0], _call_v(box, rows))
    ranking = rank(projected_rules(outs=outs(main[0].dtype), xs=STORAGE if rows.residual is not None else (RNE,)), main)
    if 1 - ranking.share > UNEXPLAINED:
        return [ranking.left], "", ranking
    calls = [_call_v(box, probes.cancelling_rows(ranking.best, rng))]
    left = [b for b in ranking.left if not any(rejects(a, b, calls) for a in ranking.left)]
    variants = [v for rule in left for v in arithmetic(rule)]
    ask = functools.partial(_call_v, box)
    return *refine(variants, probes.WIDTH, calls, ask, probes.identity_readout()), ranking


def _call_v(box: BlackBox, rows: Rows) -> Call:
    qk = sum(probes.HEADS) * probes.HEAD_DIM  # rows of the weight that are not v's
    weight = torch.cat([torch.zeros(qk, rows.width), rows.readout.weight(rows.width)])
    ones = torch.ones(probes.HEAD_DIM)
    bias = rows.readout.bias
    bias = None if bias is None else torch.cat([torch.zeros(qk), bias])
    _, _, v = box.qkv(rows.x, rows.weight, weight, ones, ones, rows.eps, *probes.HEADS, rows.residual, bias)
    return Call(rows, v[:, 0].float(), v.dtype)


def _head_calls(box: BlackBox, norm: Rule, rng: torch.Generator) -> list[Call]:
    """Q and K on known inputs of 10 bits, at both eps."""
    state = rng.get_state()
    calls = []
    for eps in (probes.EPS_SMALL, probes.EPS_LARGE, probes.EPS_SMALL):
        rng.set_state(state)
        calls.append(_call_heads(box, norm, rng, eps)[1])
    check_repeats(calls[0], calls.pop())
    return calls


def _call_heads(
    box: BlackBox, norm: Rule, rng: torch.Generator, eps: float, biased: bool = False,
    tokens: int = probes.ROWS, width: int = probes.WIDTH,
) -> tuple[HeadRows, Call]:  # fmt: skip
    """The heads' known input, and what the callable stores of it, [tokens * (Hq + Hkv), READ], beside its rows.

    More tokens than ROWS begin again, in what is stored alone. Of a larger width the channels between those of the
    input are zero, which makes rstd a power of two larger, and the norm's weight as much smaller.
    """
    given = head_rows(rng)
    q_weight, k_weight = (probes.norm_weight(probes.HEAD_DIM, rng) for _ in range(2))
    step = width // probes.WIDTH
    identity = torch.full([width], step**-0.5 - (norm.weight_offset != "none"))
    weight = torch.cat([given.qk_weight, torch.zeros(probes.NUM_KV_HEADS * probes.HEAD_DIM, probes.WIDTH)])
    bias = given.packed_bias() if biased else None
    x = given.x[torch.arange(tokens) % probes.ROWS]
    x, weight = _spread(x, step), _spread(weight, step)
    q, k, _ = box.qkv(x, identity, weight, q_weight, k_weight, eps, *probes.HEADS, bias=bias)
    stored = torch.cat([q, k], dim=1).gather(2, given.places.expand(len(q), -1, -1))
    return given, Call(given.rows(q_weight, k_weight, eps), stored.flatten(0, 1).float(), stored.dtype)


def _spread(value: Tensor, step: int) -> Tensor:
    """[R, C] as [R, C * step], with zeros between."""
    return torch.nn.functional.pad(value[..., None], (step - 1, 0)).flatten(1)


def other_rows(rule: Rule, count: int, width: int, *, residual: bool = False) -> Rows:
    """Rows of any width up to 16384, all settled, with sums that are exact in any order: values of so many bits that
    the squares' sum has 24."""
    rng = torch.Generator().manual_seed(count * width)
    drawn = max(count, 16)  # of which some are left
    if residual:
        rows = probes.norm_rows(width, rng, residual=True, count=drawn)
    else:
        low = 2 ** (int(math.log2(2**24 / width) / 2) - 1)
        scale = 2.0 ** torch.randint(-4, 6, [drawn, 1], generator=rng)
        x = probes.integers(low, 2 * low, [drawn, width], rng) / low * scale
        rows = Rows(x, probes.norm_weight(width, rng), probes.EPS_SMALL, width)
    firm = settled(rule, rows).nonzero()[:, 0]
    chosen = firm[torch.arange(count) % len(firm)]
    rest = None if rows.residual is None else rows.residual[chosen]
    return dataclasses.replace(rows, x=rows.x[chosen], residual=rest)


def _differing_at(box: BlackBox, norm: Rule, head: Rule, tokens: int, width: int) -> float:
    """Share of elements of v, or of q and k if more, that are not as the two rules have them at [tokens, width]."""
    rng = torch.Generator().manual_seed(1)
    step = width // probes.WIDTH
    readout = probes.general_readout(rng)
    places = {name: getattr(readout, name) * step + step - 1 for name in ("channel", "other")}
    rows = other_rows(norm, tokens, width, residual=box.takes("residual"))
    v = _call_v(box, dataclasses.replace(rows, readout=dataclasses.replace(readout, **places)))
    _, qk = _call_heads(box, norm, rng, probes.EPS_SMALL, tokens=tokens, width=width)
    chosen = torch.arange(len(qk.stored)) % len(qk.rows.x)
    firm = settled(head, qk.rows)[chosen]
    chosen = chosen[firm]
    known = dataclasses.replace(qk.rows, x=qk.rows.x[chosen], weight=qk.rows.weight[chosen])
    return max(differing(norm, v), differing(head, Call(known, qk.stored[firm], qk.dtype)))


def _shared_words(rule: Rule) -> dict[str, str]:
    """What one word of a plan says of both norms."""
    words = {name: getattr(rule, name) for name in ("statistics", "variance", "weight_offset")}
    return words | {"variance + eps": rule.eps if rule.eps in EPS_BF16 else KEEP}


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
    given, qk = _call_heads(box, norm, rng, probes.EPS_SMALL, biased=True)
    words = []
    for word in ("before", "after"):
        proj = given.proj if word == "before" else round_to(given.proj, head.x)
        biased = dataclasses.replace(qk.rows, x=(proj + given.bias).flatten(0, 1))
        if min(v.share(norm.replace(bias=word)), Call(biased, qk.stored).share(head)) >= 1 - UNEXPLAINED:
            words.append(word)
    return " or ".join(words)


def _control(box: BlackBox, words: dict[str, str], rng: torch.Generator) -> tuple[float, str]:
    """Share of q, k and v on Gaussian inputs that leave the plan's envelope, and where they gather."""
    rows = (probes.NUM_Q_HEADS + 2 * probes.NUM_KV_HEADS) * probes.HEAD_DIM
    plan = CastPlan(**{name: word.split(" or ")[0] for name, word in words.items() if name in vars(CastPlan())})

    def norm_weight(size: int) -> Tensor:
        return (probes.gaussian([size], rng).abs() + 0.5).bfloat16()

    x, norm = probes.gaussian([probes.ROWS, probes.WIDTH], rng).bfloat16(), norm_weight(probes.WIDTH)
    weight = (probes.gaussian([rows, probes.WIDTH], rng) / 16).bfloat16()
    q_norm, k_norm = norm_weight(probes.HEAD_DIM), norm_weight(probes.HEAD_DIM)
    offset = words["weight_offset"] != "none"
    problem = Problem(x, norm, weight, *probes.HEADS, q_norm, k_norm, weight_offset=offset)
    outputs = box.qkv(x, norm, weight, q_norm, k_norm, problem.eps, *probes.HEADS)
    allowed = envelope(plan, problem)
    wrong = torch.cat([outside(o, allowed[n]).flatten(1) for n, o in zip("qkv", outputs, strict=True)], dim=1)
    return wrong.double().mean().item(), concentrated(wrong)
