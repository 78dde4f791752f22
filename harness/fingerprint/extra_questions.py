"""What a norm is held to where it takes more than x, weight and eps: a weight a head, a scaled sum, a bias, `out`, a
static scale."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import torch

from castpoint.harness.fingerprint import probes
from castpoint.harness.fingerprint.answer import Question
from castpoint.harness.fingerprint.arguments import parameters_of
from castpoint.harness.fingerprint.calls import NormCalls
from castpoint.harness.fingerprint.evidence import Call, Miss, beyond, close, missed, rounds
from castpoint.harness.fingerprint.questions import HEAD_SHAPES, Draw
from castpoint.harness.fingerprint.rules import Rows, Rule, predict
from castpoint.harness.fingerprint.sizes import Sizes
from castpoint.harness.fingerprint.stores import ENDS, round_to, storages, ulp
from castpoint.kernels.plan import KEEP

ALPHA = 0.22  # of a scaled sum, as Granite's residual multiplier


def extra_questions(rule: Rule, asked: NormCalls, main: Rows, sizes: Sizes) -> Iterator[Question]:
    """Each with what else such a norm takes."""
    if asked.box.a_weight_a_head:
        draw = Draw(rule, main.weight, asked.box.takes("residual"), sizes.dtype)
        for shape in (asked.shape(probes.ROWS), *map(list, HEAD_SHAPES)):
            ask = functools.partial(_by_heads, draw, asked, shape)
            yield Question("values", f"another weight for each head, x {shape}", ask)
    there = parameters_of(asked.box.fn)
    if asked.box.takes("residual") and "alpha" in there:
        yield Question("argument", f"alpha={ALPHA}", lambda: _scaled_sum(rule, asked, main))
    if "bias" in there and main.scales is None:
        yield Question("argument", "a bias", lambda: _biased(rule, asked, main, sizes))
    elif "bias" in there:
        asked.box.manners["bias"] = "not asked: it is zero"
    if "out" in there and main.scales is None:
        draw = Draw(rule, main.weight, asked.box.takes("residual"), sizes.dtype)
        rows, shape = draw.gaussian(len(main.x), asked.width), asked.shape(len(main.x))
        yield Question("argument", "out given", lambda: missed(rule, asked.at(rows, shape, out=True)))
    if "quant_scale" in there:
        scale = 2.0 ** -round(math.log2(ENDS[rule.out[:4]]))
        yield Question("argument", f"scale={scale:g}", lambda: _beyond_8_bits(rule, asked, main, scale))


def _biased(rule: Rule, asked: NormCalls, main: Rows, sizes: Sizes) -> Miss:
    """What is left unexplained with a bias that is not zero; whether it is added before the last rounding is noted."""
    shape = asked.shape(probes.ROWS)
    draw = Draw(rule, main.weight, asked.box.takes("residual"), sizes.dtype)
    rows = draw.gaussian(math.prod(shape[:-1]), asked.width)
    bias = probes.gaussian([asked.width], torch.Generator().manual_seed(10), rule.narrow)
    call = asked.at(rows, shape, bias=asked.box.as_given(bias, "contiguous", asked.box.dtype))
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


def _scaled_sum(rule: Rule, asked: NormCalls, main: Rows) -> Miss:
    """What is left unexplained of rows where x or the residual is multiplied by ALPHA before they are added; which one,
    and how the product is held, is noted."""
    rng = torch.Generator().manual_seed(8)
    x, residual = (probes.gaussian([len(main.x), asked.width], rng, rule.narrow) for _ in range(2))
    weight = main.weight[torch.arange(asked.width) % len(main.weight)]
    rows = Rows(x, weight, main.eps, asked.width, residual, exact=False)
    call = asked.at(rows, asked.shape(len(x)), alpha=ALPHA)
    misses: dict[str, Miss] = {}
    for name, word in itertools.product(("x", "residual"), storages(rule.narrow)):
        given = dataclasses.replace(rows, **{name: round_to(getattr(rows, name) * ALPHA, word)})
        misses[f"{name} * alpha is {word} before the sum"] = missed(rule, Call(given, call.stored, call.dtype))
    if left := [said for said, miss in misses.items() if not miss]:
        asked.box.manners["alpha"] = " or ".join(left)
    return min(misses.values(), key=lambda miss: miss.wrong)
