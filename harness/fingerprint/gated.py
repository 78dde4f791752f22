"""The fingerprint of a gated norm, norm(x) * act(gate) or norm(x * act(gate)), gate of x's shape.

act is silu, sigmoid, gelu, relu or none. At a gate of 32 it is 32, of sigmoid 1, exactly: so it is asked as a norm
first, and then with a gate that varies for three boundaries more: ungated, norm(x) as it is multiplied; gate, act(gate)
as it is multiplied; gated, x * act(gate) as it is normalised.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from castpoint.harness.fingerprint import probes
from castpoint.harness.fingerprint.answer import Answer, Question, difference, held_to, merged, none_of_these
from castpoint.harness.fingerprint.blackbox import BlackBox, laid_out
from castpoint.harness.fingerprint.calls import widened
from castpoint.harness.fingerprint.evidence import TELLING, Call, Miss, beyond, close, outs, rounds, settled
from castpoint.harness.fingerprint.forms import like
from castpoint.harness.fingerprint.questions import LAYOUTS
from castpoint.harness.fingerprint.rules import Rows, Rule, predict
from castpoint.harness.fingerprint.stores import round_to, storages, ulp
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


def gated(box: BlackBox, width: int, identified: Callable[[BlackBox], Found]) -> Answer:
    """The fingerprint of a black box that takes a gate. identified: that of a norm, with the rule that it found."""
    rows = _rows(box, width)
    gate_values = _values(rows)
    stored = _ask(box, rows, gate_values)
    gate = _formula(rows, gate_values, stored.stored)
    if gate is None:
        acts = " or ".join(ACTS)
        return Answer("none", reason=f"none of these: neither norm(x) nor x before it is multiplied with {acts}")
    answer, rule = identified(_plain(box, gate))
    if rule is None or not answer.candidates:
        return answer
    firm = settled(rule, rows).nonzero()[:, 0]
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
    answer = held_to(answer, _questions(box, rule, gate, left[0][0], rows))
    said = {name: text for name, text in answer.facts.items() if not (gate.first and name == "subnormal x")}
    return dataclasses.replace(answer, facts={"gate": str(gate), **said})


def _product(gate: Gate) -> str:
    return "gated" if gate.first else "ungated"


def _rows(box: BlackBox, width: int) -> Rows:
    rng = torch.Generator().manual_seed(8)
    x = probes.gaussian([probes.ROWS * 4, width], rng, "fp16" if box.weight_dtype == torch.float16 else "bf16")
    return Rows(x, probes.norm_weight(width, rng), probes.EPS_SMALL, width, exact=False)


def _values(rows: Rows) -> Tensor:
    return probes.gaussian(rows.x.shape, torch.Generator().manual_seed(9), scale=2.0)


def _ask(box: BlackBox, rows: Rows, gate: Tensor, layout: str = "contiguous") -> Call:
    """Rows [R, D] with a gate of that shape, which lies so in memory."""
    given = widened(rows)
    shape = [len(rows.x) // 4, 4, rows.width] if box.kind == "head_norm" else list(given.x.shape)
    value = laid_out(gate.reshape(shape).to(box.dtype).to(box.device), layout)
    y = box.norm(given.x.reshape(shape), given.weight, rows.eps, gate=value).y
    return Call(rows, y.reshape(given.x.shape).float(), y.dtype)


def _formula(rows: Rows, values: Tensor, stored: Tensor) -> Gate | None:
    """What explains nearly all up to NEAR, whatever is rounded."""
    x, weight, shares = rows.x.double(), rows.weight.double(), {}
    for (act, fn), first, offset in itertools.product(ACTS.items(), (False, True), (0.0, 1.0)):
        factor = fn(values.double())
        value = x * factor if first else x
        normed = functional.rms_norm(value, [rows.width], weight + offset, rows.eps)
        expected = normed if first else normed * factor
        near = (expected - stored).abs() <= NEAR * expected.abs()
        shares[Gate(act, first)] = max(shares.get(Gate(act, first), 0.0), near.double().mean().item())
    best = max(shares, key=lambda gate: shares[gate])
    return best if shares[best] > 0.98 else None


def _plain(box: BlackBox, gate: Gate) -> BlackBox:
    """The norm alone."""

    def fn(*arguments: Any, **extra: Tensor) -> Any:
        x, *rest = arguments
        given = like(x).copy_(x / gate.factor) if gate.first else x
        result = box.fn(given, *rest, gate=like(x).fill_(NEUTRAL), **extra)
        y, *more = result if isinstance(result, tuple | list) else (given if result is None else result,)
        return (y if gate.first else y.div_(gate.factor), *more)

    parameters = [p for p in inspect.signature(box.fn).parameters.values() if p.name != "gate"]
    fn.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    plain = BlackBox(fn, box.kind, box.device, tuple(name for name in box.given if name != "gate"), way=box.way)
    plain.dtype, plain.weight_dtype = box.dtype, box.weight_dtype
    return plain


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
    unit = ulp(size, rule.narrow) if words.out != KEEP else (2 * size * close(known.rows)).clamp(min=2.0**-149)
    wrong = predicted != known.stored if words.out != KEEP else far > unit
    more = (words.product, words.gate, words.out)
    limit = 2 * (max(rounds(rule), 1) + sum(word != KEEP for word in more))
    why = beyond(wrong, (far / unit).nan_to_num(nan=math.inf), limit, known.stored, predicted)
    return Miss(int(wrong.sum()) if why else 0, wrong.numel(), why.strip())


def _questions(box: BlackBox, rule: Rule, gate: Gate, words: Words, rows: Rows) -> Iterator[Question]:
    """The gate as it may lie in memory."""
    for layout in LAYOUTS:

        def ask(layout: str = layout) -> Miss:
            values = _values(rows)
            return _missed(rule, gate, words, values, _ask(box, rows, values, layout))

        yield Question("memory", f"the gate as {layout}", ask)
