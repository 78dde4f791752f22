"""What a norm is held to where it takes more than x, weight and eps: a weight a head, a scaled sum, a bias, `out`, a
static scale."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch

from castpoint.harness.fingerprint import probes
from castpoint.harness.fingerprint.answer import Question
from castpoint.harness.fingerprint.arguments import parameters_of
from castpoint.harness.fingerprint.calls import NormCalls
from castpoint.harness.fingerprint.evidence import Call, Miss, beyond, close, missed, rounds
from castpoint.harness.fingerprint.forms import QUANT_SCALE
from castpoint.harness.fingerprint.layouts import CONTIGUOUS, OFFSET, alone
from castpoint.harness.fingerprint.questions import HEAD_SHAPES, LAYOUTS, NORM_SHAPES, WIDE_BIAS, Draw, moved
from castpoint.harness.fingerprint.rules import Rows, Rule, predict
from castpoint.harness.fingerprint.sizes import Sizes
from castpoint.harness.fingerprint.stores import ENDS, round_to, ulp
from castpoint.harness.fingerprint.sums import scaled
from castpoint.kernels.plan import KEEP

ODD_SCALE = QUANT_SCALE * (1 + 2**-8 - 2**-14)  # which bf16 rounds to QUANT_SCALE, by all but half of its step
ALPHA = 0.22  # of a scaled sum, as Granite's residual multiplier


def extra_questions(rule: Rule, asked: NormCalls, main: Rows, sizes: Sizes) -> Iterator[Question]:
    """Each with what else such a norm takes."""
    if asked.box.a_weight_a_head:
        draw = Draw(rule, main.weight, asked.box.takes("residual"), sizes.dtype)
        for shape in (asked.shape(probes.ROWS), *map(list, HEAD_SHAPES)):
            ask = functools.partial(_by_heads, draw, asked, shape)
            yield Question("values", f"another weight for each head, x {shape}", ask)
    there, draw = parameters_of(asked.box.fn), Draw(rule, main.weight, asked.box.takes("residual"), sizes.dtype)
    own, plain = asked.shape(probes.ROWS), main.scales is None
    shapes = (own, *map(list, NORM_SHAPES if asked.heads is None else HEAD_SHAPES))
    for i, shape in enumerate(shapes if {"alpha", "bias", "out"} & {*there} else ()):
        what, eps, scale, _ = moved(i, {CONTIGUOUS: None}, sizes)
        at = f", x {shape}{what.removesuffix(f', {CONTIGUOUS}')}" if i else ""
        drawn = functools.partial(draw.gaussian, math.prod(shape[:-1]), shape[-1])
        rows = drawn(scale=scale, eps=eps) if i else drawn()
        if draw.residual and "alpha" in there:
            ask = functools.partial(_scaled_sum, rule, asked, rows, shape)
            yield Question("argument", f"alpha={ALPHA}{at}", ask)
        if "bias" in there and plain:
            yield Question("argument", f"a bias{at}", functools.partial(_biased, rule, asked, rows, shape, CONTIGUOUS))
        if "out" in there and plain:
            ask = functools.partial(_given, rule, asked, rows, shape, out=True)
            yield Question("argument", f"out given{at}", ask)
    rows = draw.gaussian(math.prod(own[:-1]), asked.width)
    if "bias" in there and plain:
        yield Question("memory", alone("the bias", OFFSET), functools.partial(_biased, rule, asked, rows, own, OFFSET))
    if "apart" in there and plain:
        for given in ({"apart": True},) if "out" not in there else ({"out": True, "apart": True}, {"out": True}):
            ask = functools.partial(_given, rule, asked, rows, own, layout=LAYOUTS[0], **given)
            yield Question("memory", f"{LAYOUTS[0]}, out {'contiguous' if 'apart' in given else 'too'}", ask)
    if "bias" in there and not plain:
        asked.box.manners["bias"] = "not asked: it is zero"
    if "quant_scale" in there:
        ask = functools.partial(_given, rule, asked, main, asked.shape(len(main.x)), quant_scale=ODD_SCALE)
        yield Question("argument", f"scale={ODD_SCALE:g}", ask)
        scale = 2.0 ** -round(math.log2(ENDS[rule.out[:4]]))
        yield Question("argument", f"scale={scale:g}", lambda: _beyond_8_bits(rule, asked, main, scale))


def _given(rule: Rule, asked: NormCalls, rows: Rows, shape: list[int], **more: Any) -> Miss:
    return missed(rule, asked.at(rows, shape, **more))


def _biased(rule: Rule, asked: NormCalls, rows: Rows, shape: list[int], layout: str) -> Miss:
    """What is left unexplained with a bias that is not zero; whether it is added before the last rounding is noted."""
    bias = probes.gaussian([shape[-1]], torch.Generator().manual_seed(10), rule.narrow)
    bias[1::2] *= WIDE_BIAS
    call = asked.at(rows, shape, bias=asked.box.as_given(bias, layout, asked.box.dtype))
    value = predict(rule.replace(out=KEEP), rows)
    size = torch.maximum(value.abs(), bias.abs()).double()
    unit = ulp(size, rule.narrow) if rule.out != KEEP or rounds(rule) else size * close(rows)
    misses = {}
    for word, held in (("before", value), ("after", round_to(value, rule.out))):
        expected = round_to(held + bias, rule.out)
        far = ((expected - call.stored).abs().double() / unit).nan_to_num(nan=math.inf)
        wrong = expected != call.stored if rule.out != KEEP else far > 1
        why = beyond(wrong, far, 2 * (rounds(rule) + 1), call.stored, expected)
        misses[word] = Miss(int(wrong.sum()) if why else 0, wrong.numel(), why.strip())
    if left := [word for word, miss in misses.items() if not miss]:
        asked.box.manners["bias"] = f"is added {' or '.join(left)} the last rounding"
    return min(misses.values(), key=lambda miss: miss.wrong)


def _by_heads(draw: Draw, asked: NormCalls, shape: list[int]) -> Miss:
    """What is left unexplained of rows of that shape with weights [H, Dh] of which no two are alike."""
    rng = torch.Generator().manual_seed(7)
    weights = torch.stack([probes.norm_weight(shape[2], rng) for _ in range(shape[1])])
    rows = draw.gaussian(shape[0] * shape[1], shape[2])
    return missed(draw.rule, asked.at(dataclasses.replace(rows, weight=weights.repeat(shape[0], 1)), shape))


def _beyond_8_bits(rule: Rule, asked: NormCalls, main: Rows, scale: float) -> Miss:
    """What is left unexplained where many results divided by the scale are larger than 8 bits hold; which number they
    are is noted, if it is not the largest."""
    call = asked.at(main, asked.shape(len(main.x)), finite=False, quant_scale=scale)
    value, expected = predict(rule.replace(out=KEEP), call.rows), predict(rule, call.rows)
    large = value.abs() > ENDS[rule.out[:4]]
    for said, number in (("NaN", torch.nan), ("infinite", torch.inf), ("-127 and 127", 127.0)):
        ends = torch.full_like(value, number).copysign(value)
        same = (ends == call.stored) | (ends.isnan() & call.stored.isnan())
        if same[large].all() and (ends != expected)[large].any():
            asked.box.manners["what is too large"] = f"is {said}"
            return missed(rule, dataclasses.replace(call, stored=torch.where(large, expected, call.stored)))
    return missed(rule, call)


def _scaled_sum(rule: Rule, asked: NormCalls, rows: Rows, shape: list[int]) -> Miss:
    """What is left unexplained of the rows where x or the residual is multiplied by ALPHA before they are added; which
    one, and how the product is held, is noted."""
    call = asked.at(rows, shape, alpha=ALPHA)
    misses: dict[str, Miss] = {}
    for name, other in (("x", "residual"), ("residual", "x")):
        for word, total in scaled(getattr(rows, name), getattr(rows, other), ALPHA, rule.narrow).items():
            given = dataclasses.replace(rows, x=total, residual=torch.zeros_like(total))
            misses[f"{name} * alpha is {word} before the sum"] = missed(rule, Call(given, call.stored, call.dtype))
    if left := [said for said, miss in misses.items() if not miss]:
        asked.box.manners["alpha"] = " or ".join(left)
    return min(misses.values(), key=lambda miss: miss.wrong)
