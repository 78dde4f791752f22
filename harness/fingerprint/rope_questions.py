"""What a way to norm and rotate leaves unexplained of a call, and the calls that an answer is held to."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from castpoint.harness.compiled.loading import Fault
from castpoint.harness.fingerprint import pairs
from castpoint.harness.fingerprint.answer import Question
from castpoint.harness.fingerprint.evidence import CLOSE, Miss, beyond, rounds
from castpoint.harness.fingerprint.layouts import CONTIGUOUS
from castpoint.harness.fingerprint.questions import Draw, eps_asked, moved, noting
from castpoint.harness.fingerprint.rope_calls import THETAS, TOP, Case, First
from castpoint.harness.fingerprint.rules import Rows, Rule
from castpoint.harness.fingerprint.stores import round_to
from castpoint.harness.fingerprint.turns import BEFORE, ROTATIONS, Way, nudges, predicted, terms, uncertainty
from castpoint.kernels.plan import KEEP

# Tokens, heads of q, of k and v, their size.
GEOMETRIES = (
    *((1, 16, 8, 128), (7, 2, 1, 64), (33, 5, 1, 96), (33, 3, 3, 256), (600, 16, 8, 128), (7, 16, 8, 256)),
    *((1, 5, 1, 64), (600, 3, 3, 64), (33, 16, 8, 96), (7, 2, 1, 128), (1, 3, 3, 256), (2049, 2, 1, 96)),
    *((2, 64, 8, 128), (8, 16, 16, 64), (63, 4, 2, 128), (65, 4, 2, 128), (128, 4, 2, 256), (257, 2, 1, 128)),
    *((4, 40, 10, 128), (16, 10, 5, 128), (32, 12, 6, 128), (256, 7, 7, 128), (512, 3, 1, 128), (1024, 1, 1, 128)),
    *((16, 5, 5, 192), (32, 6, 6, 160), (4, 7, 7, 64), (256, 1, 1, 64), (512, 10, 10, 64), (1024, 1, 1, 64)),
)
ATTENTION = 1.25  # a table's factor, as YaRN's
TOPS = (40_000, 131_071)  # positions, beyond 15 bits, and the last of public models
Drawn = Callable[[Draw, int, int], Rows]  # so many rows of that width
Shape = tuple[int, int, int, int]  # of GEOMETRIES


def unexplained(case: Case, stored: Tensor, rule: Rule, way: Way) -> tuple[Tensor, Tensor, Tensor]:
    """[T, H, Dh] each: what that way does not explain, how far it is in ulps, and what it would store."""
    made = case.turn is not None and case.turn.table is None
    bare = dataclasses.replace(way, out=KEEP)
    says = [case.of_all(functools.partial(predicted, rule, bare, turn=case.turn, nudge=n)) for n in nudges(made)]
    low, high = torch.stack(says).amin(0), torch.stack(says).amax(0)
    inner = way.roundings + rounds(rule.replace(out=KEEP)) > 0
    size = case.of_all(functools.partial(terms, rule, way, turn=case.turn))
    if made:
        slack = case.of_all(functools.partial(terms, rule, way, turn=case.turn, of=uncertainty))
        low, high = low - slack, high + slack
    low, high, says_it = (round_to(value, way.out) for value in (low, high, says[0]))
    got = stored.float()
    if way.out == KEEP:
        low, high = low - CLOSE * size, high + CLOSE * size
    if way.out == KEEP and not inner:
        unit = CLOSE * size
    else:  # what is rounded before the sum is an ulp of the terms; else the sum is off by some fp32 ulps of them
        size = torch.maximum(torch.maximum(says_it.abs(), got.abs()), size * (1.0 if inner else 2.0**-12))
        unit = torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent - 8)
    wrong = (got < low) | (got > high) | got.isnan()
    far = torch.where(got < low, low - got, got - high) / unit.clamp(min=2.0**-133)
    return wrong, far.nan_to_num(nan=float("inf")), says_it


def missed(case: Case, stored: Tensor, rule: Rule, way: Way) -> Miss:
    """As evidence.missed: too many elements, some that gather, or one too far away."""
    wrong, far, says = unexplained(case, stored, rule, way)
    got, limit = stored.float(), 2 * max(rounds(rule.replace(out=way.out)) + way.roundings, 1)
    flat = [value.flatten(0, 1) for value in (wrong, far, got, says)]
    if not beyond(flat[0], flat[1], limit, flat[2], flat[3]):
        return Miss(0, wrong.numel())
    place = int(torch.where(wrong, far, -1).argmax())
    token, rest = divmod(place, wrong.shape[1] * wrong.shape[2])
    head, channel = divmod(rest, wrong.shape[2])
    name, head = ("q", head) if head < case.heads[0] else ("k", head - case.heads[0])
    is_, has = got.flatten()[place].item(), says.flatten()[place].item()
    why = f"token {token}, head {head} of {name} has {is_:.6g} in channel {channel} where the plan has {has:.6g}"
    return Miss(int(wrong.sum()), wrong.numel(), why)


@dataclass(frozen=True)
class Held:
    """What was found, and calls that it is held to."""

    first: First
    rule: Rule
    way: Way

    @property
    def whole(self) -> bool:
        """Whether all channels are rotated that it was given angles for: else it is not known of other sizes."""
        return self.first.case.turn is None or self.way.rotary == self.first.case.turn.rotary

    def ask(self, draw: Drawn, shape: Shape | None, theta: float | None, **changes: Any) -> Miss:
        kernel, given = self.first.kernel, self.first.case
        tokens, *heads, size = shape or (len(given.x), *given.heads, given.x.shape[-1])
        rule = self.rule.replace(out=self.way.unrotated if self.way.norm == BEFORE else self.way.out)
        q, k = (
            draw(Draw(rule, weight, False), tokens * count, size)
            for weight, count in zip((given.q.weight, given.k.weight), heads, strict=True)
        )
        turn = kernel.turn(size, kernel.positions(tokens, changes.pop("top", TOP), seed=tokens), theta)
        if turn is not None and turn.table is not None:
            narrow = kernel.manner.table
            turn = dataclasses.replace(turn, table=(turn.table * changes.pop("attention", 1.0)).to(narrow).float())
        case = Case(q, k, (heads[0], heads[1]), turn, **changes)
        way = self.way if turn is None or not self.whole else dataclasses.replace(self.way, rotary=turn.rotary)
        if not case.neox:
            way = dataclasses.replace(way, rotation=ROTATIONS[way.rotation == ROTATIONS[0]])
        return missed(case, kernel.stored(case), self.rule, way)

    def question(
        self, about: str, what: str, draw: Drawn = Draw.gaussian, shape: Shape | None = None,
        theta: float | None = None, **changes: Any,
    ) -> Question:  # fmt: skip
        return Question(about, what, functools.partial(self.ask, draw, shape, theta, **changes))


def rope_questions(held: Held) -> Iterator[Question]:
    kernel, case = held.first.kernel, held.first.case
    pair, sizes, head_dim, taken = kernel.pair, kernel.sizes, case.x.shape[-1], {CONTIGUOUS: None}
    for layout in pairs.PACKED_LAYOUTS if pair.packed else pairs.LAYOUTS:
        ask = functools.partial(_as_laid, held, Draw.gaussian, None)
        yield Question("memory", layout, functools.partial(noting, taken, layout, ask))
    for i, (tokens, many, few, size) in enumerate(GEOMETRIES):
        if size == head_dim or (held.whole and "rotary_dim" not in pair.fixed):
            tokens = sizes.tokens or tokens
            what, shape = f"q [{tokens}, {many}, {size}], k [{tokens}, {few}, {size}]", (tokens, many, few, size)
            if i % 2 == 0:
                yield held.question("call", what, Draw.mixed, shape)
                continue
            more, eps, scale, layout = moved(i, taken, sizes)
            draw, top = functools.partial(Draw.gaussian, scale=scale, eps=eps), TOPS[0] if many >= 8 else TOP
            more += f", positions up to {top:,}" if case.turn is not None else ""
            yield Question("call", f"{what}{more}", functools.partial(_as_laid, held, draw, shape, layout, top=top))
    for what in (what for what, _ in Draw(held.rule, case.q.weight, False).values(8, head_dim)):
        yield held.question("values", what, functools.partial(_values, what))
    for what, eps, scale in eps_asked(sizes):
        yield held.question("eps", what, functools.partial(Draw.gaussian, scale=scale, eps=eps))
    if case.turn is None:
        return
    for top in TOPS:
        yield held.question("call", f"positions up to {top:,}", top=top)
    for theta in THETAS if pair.takes("base") else ():
        yield held.question("call", f"base {theta:g}", theta=theta)
    if pair.takes("cos", "mrope_section"):
        yield held.question("argument", pairs.ANGLES, layout=pairs.ANGLES)
    if pair.takes("cos", "cos_sin_cache"):
        yield held.question("argument", pairs.TABLE_OFFSET, layout=pairs.TABLE_OFFSET)
        yield held.question("argument", f"cos and sin times {ATTENTION}", attention=ATTENTION)
    if pair.takes("is_neox", "interleaved"):
        # of few and of many tokens, among them 16 heads
        for i, shape in enumerate((None, *(shape for shape in GEOMETRIES[4::6] if held.whole or shape[3] == head_dim))):
            _, eps, scale, _ = moved(i, taken, sizes)
            at = "" if shape is None else f", q [{shape[0]}, {shape[1]}, {shape[3]}], eps={eps:g}"
            draw = functools.partial(Draw.gaussian, scale=scale, eps=eps) if shape else Draw.gaussian
            yield held.question("argument", f"is_neox=False{at}", draw, shape, neox=False)


def _as_laid(held: Held, draw: Drawn, shape: Shape | None, layout: str, **changes: Any) -> Miss:
    return held.ask(draw, shape, None, layout=layout, **changes)


def _values(what: str, draw: Draw, count: int, width: int) -> Rows:
    return dict(draw.values(count, width))[what]


def partial(first: First, rule: Rule, way: Way) -> str:
    """What it does where half of the channels are to be rotated: a table holds half as many angles."""
    half = way.rotary // 4 * 2
    turn = first.kernel.turn(first.case.x.shape[-1], first.kernel.positions(len(first.case.x)), rotary=half)
    case = dataclasses.replace(first.case, turn=turn)
    try:
        miss = missed(case, first.kernel.stored(case), rule, dataclasses.replace(way, rotary=half))
    except Fault as fault:
        return f"refused: {fault}"
    return f"{half} channels of {way.rotary} are another function, and not refused: {miss}" if miss else "as asked for"
