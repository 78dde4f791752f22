"""The fingerprint of a gated norm, norm(x) * act(gate) or norm(x * act(gate)), gate of x's shape.

act is silu, sigmoid, gelu, relu or none. At a gate of 32 it is 32, of sigmoid 1, exactly: so it is asked as a norm
first, and then with a gate that varies for three boundaries more: ungated, norm(x) as it is multiplied; gate, act(gate)
as it is multiplied; gated, x * act(gate) as it is normalised.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from castpoint.harness.compiled.loading import Fault
from castpoint.harness.fingerprint import probes
from castpoint.harness.fingerprint.answer import Answer, Question, ahead, difference, held_to, merged, none_of_these
from castpoint.harness.fingerprint.arguments import parameters_of
from castpoint.harness.fingerprint.blackbox import BlackBox
from castpoint.harness.fingerprint.calls import NormCalls, first_of, in_parts
from castpoint.harness.fingerprint.evidence import TELLING, Call, Miss, beyond, close, outs, rounds, settled
from castpoint.harness.fingerprint.forms import like
from castpoint.harness.fingerprint.layouts import CONTIGUOUS, HEADS_FIRST, ODD, alone, each_alone, of_each
from castpoint.harness.fingerprint.questions import HEAD_SHAPES, NORM_SHAPES, Draw, rows_of
from castpoint.harness.fingerprint.rules import Rows, Rule, factor_of, predict
from castpoint.harness.fingerprint.sizes import Sizes
from castpoint.harness.fingerprint.stores import EIGHT_BITS, round_to, storages, ulp
from castpoint.kernels.plan import KEEP

ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu(gate)": functional.silu,
    "sigmoid(gate)": torch.sigmoid,
    "gelu(gate)": functional.gelu,
    "gelu(gate), by tanh": lambda gate: functional.gelu(gate, approximate="tanh"),
    "relu(gate)": torch.relu,
    "gate": lambda gate: gate,
}
NEUTRAL = 32.0
NOTHING = 2.0**-100  # a result that may be zero: of a gate of -87 on fp32 flushes e^gate, or has few bits of it
NEAR = 2.0**-5  # of what is asked for a formula: no rounding is decided
Found = tuple[Answer, Rule | None]


@dataclass(frozen=True)
class Gate:
    """How x is gated: act, a name of ACTS, and whether that is before the norm."""

    act: str
    first: bool

    def __str__(self) -> str:
        return f"norm(x * {self.act})" if self.first else f"norm(x) * {self.act}"

    @property
    def factor(self) -> float:
        """act of NEUTRAL."""
        return 1.0 if self.act.startswith("sigmoid") else NEUTRAL


@dataclass(frozen=True)
class Words:
    """How the gate's boundaries are held: ungated, or gated where it is first; the gate; the result."""

    product: str
    gate: str
    out: str


def gated(ways: list[NormCalls], sizes: Sizes, identified: Callable[[BlackBox], Found]) -> Answer:
    """The fingerprint of a black box that takes a gate, in the first of the ways to call it that it takes. identified:
    that of a norm, with the rule that it found."""
    asked, (rows, stored), _ = first_of(ways, functools.partial(_first_call, sizes))
    box, gate_values = asked.box, _values(rows)
    if stored.dtype in EIGHT_BITS:
        raise Fault("a gate beside a result of 8 bits is not asked: wrap the norm and its gate without them")
    gate = _formula(rows, gate_values, stored.stored, box.weightless)
    if gate is None:
        acts = " or ".join(ACTS)
        return Answer("none", reason=f"none of these: neither norm(x) nor x before it is multiplied with {acts}")
    answer, rule = identified(_plain(box, gate, sizes))
    if rule is None or not answer.candidates:
        return answer
    firm = _settled(rule, gate, rows, gate_values).nonzero()[:, 0]
    known, gate_values = Call(rows.of(firm), stored.stored[firm], stored.dtype), gate_values[firm]
    left = _left(rule, gate, gate_values, known)
    nearest = answer.candidates[0]
    if miss := _missed(rule, gate, left[0][0], gate_values, known):
        return none_of_these(nearest, 1 - miss.wrong / miss.of, None, f"with a gate that varies {miss}")
    last = "out" if box.kind == "head_norm" else "hidden"
    found = [merged([{_product(gate): w.product, "gate": w.gate, last: w.out} for w in group]) for group in left]
    if len(found) > 1:
        differ = difference(found[0], found[1])
        answer = dataclasses.replace(answer, status="undecided", reason=f"undecided between {differ}")
    candidates = [words | more for words in answer.candidates for more in found]
    answer = dataclasses.replace(answer, candidates=candidates)
    answer = held_to(answer, ahead(_questions(asked, sizes, rule, gate, left[0][0], rows)), "x or gate")
    said = {name: text for name, text in answer.facts.items() if not (gate.first and name == "subnormal x")}
    return dataclasses.replace(answer, facts={"gate": str(gate), **said})


def _product(gate: Gate) -> str:
    return "gated" if gate.first else "ungated"


def _first_call(sizes: Sizes, asked: NormCalls) -> tuple[Rows, Call]:
    rng = torch.Generator().manual_seed(8)
    x = probes.gaussian([probes.ROWS * 4, asked.width], rng, sizes.dtype)
    rows = Rows(x, probes.norm_weight(asked.width, rng), probes.EPS_SMALL, asked.width, exact=False)
    return rows, _ask(asked, rows, _values(rows))


def _values(rows: Rows) -> Tensor:
    return probes.gaussian(rows.x.shape, torch.Generator().manual_seed(9), scale=2.0)


def _wide_values(most: float, rows: Rows) -> Tensor:
    """1 to most in size, in the logarithm as often each."""
    rng = torch.Generator().manual_seed(11)
    sign = torch.randint(0, 2, rows.x.shape, generator=rng) * 2 - 1
    return round_to(sign * most ** torch.rand(rows.x.shape, generator=rng), "bf16-rtz")


def _ask(asked: NormCalls, rows: Rows, gate: Tensor, layout: str = CONTIGUOUS, shape: list[int] | None = None) -> Call:
    """Rows [R, D] as x of that shape, with a gate of theirs, in as many calls as it takes."""
    shape, box, dtypes = shape or asked.shape(len(rows.x)), asked.box, []

    def ask(part: Tensor) -> tuple[Tensor, ...]:
        value = box.as_given(gate[part].reshape(shape), of_each(layout)[2], box.dtype)
        call = asked.at(rows.of(part), shape, layout, gate=value)
        dtypes.append(call.dtype)
        return (call.stored,)

    (stored,) = in_parts(len(rows.x), math.prod(shape[:-1]), ask)
    return Call(rows, stored, dtypes[0])


def _settled(rule: Rule, gate: Gate, rows: Rows, values: Tensor) -> Tensor:
    """evidence.settled of what is normalised."""
    if not gate.first:
        return settled(rule, rows)
    return settled(rule.replace(x=KEEP), dataclasses.replace(rows, x=rows.x * ACTS[gate.act](values)))


def _formula(rows: Rows, values: Tensor, stored: Tensor, weightless: bool) -> Gate | None:
    """What explains nearly all up to NEAR, whatever is rounded."""
    x, weight, shares = rows.x.double(), rows.weight.double(), {}
    weight = torch.ones_like(weight) if weightless else weight
    for (act, fn), first, offset in itertools.product(ACTS.items(), (False, True), (0.0, 1.0)):
        factor = fn(values.double())
        value = x * factor if first else x
        normed = functional.rms_norm(value, [rows.width], weight + offset, rows.eps)
        expected = normed if first else normed * factor
        near = (expected - stored).abs() <= NEAR * expected.abs()
        shares[Gate(act, first)] = max(shares.get(Gate(act, first), 0.0), near.double().mean().item())
    best = max(shares, key=lambda gate: shares[gate])
    return best if shares[best] > 0.98 else None


def _plain(box: BlackBox, gate: Gate, sizes: Sizes) -> BlackBox:
    """The norm alone. In fp16, which ends at 65504, it says by how much x or y is another number inside."""

    def fn(*arguments: Any, **extra: Tensor) -> Any:
        x, *rest = arguments
        given = like(x).copy_(x / gate.factor) if gate.first else x
        result = box.fn(given, *rest, gate=like(x).fill_(NEUTRAL), **extra)
        y, *more = result if isinstance(result, tuple | list) else (given if result is None else result,)
        return (y if gate.first else y.div_(gate.factor), *more)

    parameters = [p for p in parameters_of(box.fn).values() if p.name != "gate"]
    fn.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    made = BlackBox(fn, box.kind, box.device, tuple(n for n in box.given if n != "gate"), sizes.dtype, box.way)
    if sizes.dtype == "fp16":
        made.divided, made.gain = (gate.factor, 1.0) if gate.first else (1.0, gate.factor)
    return made


def _left(rule: Rule, gate: Gate, values: Tensor, known: Call) -> list[list[Words]]:
    """Of all words those that explain most, and those that they do not outvote, in groups that store the same bits."""
    words = storages(rule.narrow)
    every = [Words(*choice) for choice in itertools.product(words, words, outs(known.dtype, rule.narrow))]
    predicted = {w: _predicted(rule, gate, w, known.rows, values) for w in every}
    best = min(every, key=lambda w: int((predicted[w] != known.stored).sum()))
    groups = [[best]]
    for other in every:
        differ = predicted[other] != predicted[best]
        as_best = int((differ & (predicted[best] == known.stored)).sum())
        outvoted = as_best >= TELLING and as_best > 4 * int((differ & (predicted[other] == known.stored)).sum())
        if other != best and not outvoted:
            same = next((group for group in groups if torch.equal(predicted[group[0]], predicted[other])), None)
            groups += [[other]] if same is None else []
            if same is not None:
                same.append(other)
    return groups


def _predicted(rule: Rule, gate: Gate, words: Words, rows: Rows, values: Tensor) -> Tensor:
    factor = round_to(ACTS[gate.act](values), words.gate)
    if gate.first:
        return predict(rule.replace(x=words.product, out=words.out), dataclasses.replace(rows, x=rows.x * factor))
    return round_to(predict(rule.replace(out=words.product), rows) * factor, words.out)


def _missed(rule: Rule, gate: Gate, words: Words, values: Tensor, known: Call) -> Miss:
    """What is left unexplained; where fp32 is stored, all that is farther than close."""
    predicted = _predicted(rule, gate, words, known.rows, values)
    far = (predicted - known.stored).abs().double()
    size = torch.maximum(predicted.abs(), known.stored.abs()).double()
    unit = ulp(size, rule.narrow) if words.out != KEEP else 2 * size * close(known.rows)
    slack = _slack(rule, gate, words, known.rows, values)
    unit = torch.maximum(unit, slack)
    wrong = (predicted != known.stored) & ~(far <= slack) if words.out != KEEP else ~(far <= unit)
    more = (words.product, words.gate, words.out)
    limit = 2 * (max(rounds(rule), 1) + sum(word != KEEP for word in more))
    why = beyond(wrong, (far / unit).nan_to_num(nan=math.inf), limit, known.stored, predicted)
    return Miss(int(wrong.sum()) if why else 0, wrong.numel(), why.strip())


def _slack(rule: Rule, gate: Gate, words: Words, rows: Rows, values: Tensor) -> Tensor:
    """The error of a result, float64, that fp32 arithmetic makes of act(gate) with a power of e: some ulps of the gate,
    or of one, since terms may cancel where it is negative; and NOTHING."""
    act, exact = ACTS[gate.act](values), gate.act in ("relu(gate)", "gate")
    error = torch.zeros_like(act) if exact else values.abs().clamp(min=1) * 2.0**-22
    inner = dataclasses.replace(rows, x=rows.x * act) if gate.first else rows
    factor = factor_of(rule.replace(x=words.product if gate.first else rule.x), inner)
    plain = rule.replace(x=KEEP, normed=KEEP, out=KEEP)
    return predict(plain, dataclasses.replace(rows, x=rows.x * error), factor).abs().double() + NOTHING


def _questions(asked: NormCalls, sizes: Sizes, rule: Rule, gate: Gate, words: Words, rows: Rows) -> Iterator[Question]:
    """The gate at other shapes, beyond where a power of e ends, and as it may lie in memory."""

    def ask(rows: Rows, shape: list[int] | None, layout: str, of: Callable[[Rows], Tensor] = _values) -> Miss:
        values = of(rows)
        firm = _settled(rule, gate, rows, values).nonzero()[:, 0]
        call = _ask(asked, rows, values, layout, shape)
        known = Call(rows.of(firm), call.stored[firm], call.dtype)
        return _missed(rule, gate, words, values[firm], known) if len(firm) else Miss(0, 1)

    draw = Draw(rule, rows.weight, False, sizes.dtype)
    for shape in NORM_SHAPES if asked.heads is None else HEAD_SHAPES:
        drawn = draw.gaussian(rows_of(shape), shape[-1])
        yield Question("x and gate", str(shape), functools.partial(ask, drawn, shape, CONTIGUOUS))
    most = 100.0 if sizes.dtype == "fp16" else 2.0**14
    wide = functools.partial(_wide_values, most)
    yield Question("values", f"a gate of 1 to {most:g}", functools.partial(ask, rows, None, CONTIGUOUS, wide))
    lone = [alone("the gate", layout) for layout in (ODD, *([HEADS_FIRST] if asked.heads else []))]
    for layout in (*each_alone("the gate"), *lone):
        yield Question("memory", layout, functools.partial(ask, rows, None, layout))
