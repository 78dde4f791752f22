"""What q and k are rotated by, and what each way to norm and rotate them stores.

A table's angles are drawn at random, for each position and pair of channels, so that no other has them. What a kernel
makes of theta and positions by itself is known up to fp32 arithmetic alone: a power in fp32 is an ulp or two away from
another, and position times as much is an angle.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from castpoint.harness.fingerprint.rules import Rows, Rule, predict
from castpoint.harness.fingerprint.stores import round_to
from castpoint.kernels.plan import KEEP, PHASE_BOUNDARIES, RNE, STORAGE
from castpoint.variants import rope

BEFORE, AFTER = "before RoPE", "after RoPE"
ROTATIONS = HALF, INTERLEAVED = "half", "interleaved"
NUDGE = 2.0**-20  # of theta^(-2i/Dh), by arithmetic in fp32: eight ulps
APPROXIMATE = 2.0**-21  # the greatest error of __sinf and __cosf between -pi and pi, by CUDA's programming guide
Pairs = tuple[Tensor, Tensor]  # cos and sin
COLUMNS = ("repeated", "in pairs", "once")  # how cos and sin hold each angle: [c, c], [c0, c0, c1, c1, ...], [c]


@dataclass(frozen=True)
class Manner:
    """How angles are given: columns of cos and sin, types of them and of positions, share of the channels."""

    columns: str = COLUMNS[0]
    table: torch.dtype = torch.float32
    position: torch.dtype = torch.int64
    share: float = 1.0


@dataclass(frozen=True, eq=False)
class Turn:
    """Rotations of T tokens. positions [T], or [3, T] with sections; table [P, rotary], cos and then sin of each
    position, as it is given; None: they are of theta."""

    positions: Tensor
    rotary: int
    theta: float
    table: Tensor | None
    manner: Manner
    section: tuple[int, ...] | None = None
    woven: bool = False  # sections interleaved, where that is asked by an argument

    def arguments(self, indexed: bool, device: str, views: bool) -> dict[str, Any]:
        """By the names of pairs.ALIASES. indexed: cos and sin are tables, positions say which rows. views: cos and sin
        are halves of one buffer, and three rows of positions the first columns of a longer one."""
        values: dict[str, Any] = {"base": self.theta, "rotary_dim": self.rotary, "mrope_interleaved": self.woven}
        positions = self.positions.to(self.manner.position).to(device)
        longer = views and positions.ndim == 2
        values["positions"] = torch.cat([positions, positions], 1)[:, : positions.shape[1]] if longer else positions
        if self.section is not None:
            values["mrope_section"] = list(self.section)
        if self.table is not None:
            table = self.table.to(self.manner.table)
            values["cos_sin_cache"] = _with_room(table.to(device))
            for name, half in zip(("cos", "sin"), table.chunk(2, dim=1), strict=True):
                wide = half if self.manner.columns == "once" else torch.cat([half, half], dim=1)
                wide = half.repeat_interleave(2, dim=1) if self.manner.columns == "in pairs" else wide
                values[name] = _with_room((wide if indexed else wide[self.positions]).to(device))
            if views:
                both = torch.cat([values["cos"], values["sin"]], dim=-1)
                values["cos"], values["sin"] = both.chunk(2, dim=-1)
        return values


def _with_room(table: Tensor) -> Tensor:
    """The table, contiguous, with other numbers behind it: a kernel that reads a wider one ends there."""
    return torch.cat([table.flatten(), table.flatten().flip(0)])[: table.numel()].view(table.shape)


@functools.lru_cache(maxsize=16)
def _table(count: int, half: int) -> Tensor:
    angles = 2 * math.pi * torch.rand(count, half, generator=torch.Generator().manual_seed(0))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def drawn(
    manner: Manner, positions: Tensor, rotary: int, *, theta: float, table: bool, section: bool, woven: bool
) -> Turn:
    """The turn of those positions."""
    half, held = rotary // 2, None
    if table:
        held = _table(int(positions.max()) + 1, half).to(manner.table).float()
    third = half * 5 // 16  # 24, 20, 20 of 64, as Qwen3-VL's
    return Turn(positions, rotary, theta, held, manner, (half - 2 * third, third, third) if section else None, woven)


def unturned(turn: Turn, tokens: int) -> Turn:
    """The same at position 0 of every token, where nothing is rotated."""
    table = turn.table
    if table is not None:
        table = table.clone()
        table[0], table[0, : turn.rotary // 2] = 0, 1
    return dataclasses.replace(turn, positions=torch.zeros([*turn.positions.shape[:-1], tokens]).long(), table=table)


@dataclass(frozen=True)
class Way:
    """One way to norm and to rotate. unrotated: as it is held before the rotation; rotated: behind it, where the norm
    comes then; the others as in CastPlan. rotary: channels that are rotated; sections: of mRoPE, `contiguous` or
    `interleaved`; made: it makes the angles itself."""

    rotation: str
    norm: str = BEFORE
    sections: str = ""
    rotary: int = 0
    made: bool = False
    unrotated: str = KEEP
    inv_freq: str = KEEP
    position: str = KEEP
    phase: str = KEEP
    cos_sin: str = KEEP
    products: str = KEEP
    rotated: str = KEEP
    out: str = KEEP

    @property
    def roundings(self) -> int:
        return sum(word != KEEP for word in (self.unrotated, self.products, self.rotated))


def angles(turn: Turn, way: Way, nudge: float = 0.0) -> Pairs:
    """cos and sin [T, 1, rotary / 2] fp32, as that way holds them; nudge: of what fp32 arithmetic makes it off."""
    half = way.rotary // 2
    if turn.table is not None:
        held = turn.table[turn.positions]
        cos, sin = held[..., :half], held[..., turn.rotary // 2 :][..., :half]
    else:
        inverse = _stored(rope.frequencies(turn.theta, way.rotary) * (1 + nudge), way.inv_freq)
        position = _stored(turn.positions.double(), way.position)
        phase = _stored(position[..., None] * inverse * (1 + nudge), way.phase)
        cos, sin = phase.cos().float(), phase.sin().float()
    if cos.ndim == 3:
        axis = _axes(turn, way, half).expand(1, *cos.shape[1:])
        cos, sin = cos.gather(0, axis)[0], sin.gather(0, axis)[0]
    return round_to(cos, way.cos_sin)[:, None], round_to(sin, way.cos_sin)[:, None]


def _stored(value: Tensor, word: str) -> Tensor:
    return round_to(value.float(), word).double()


def _axes(turn: Turn, way: Way, half: int) -> Tensor:
    """Which of three positions each pair of channels is rotated by."""
    assert turn.section is not None
    if way.sections != INTERLEAVED:
        return torch.arange(3).repeat_interleave(torch.tensor(turn.section))[:half]
    pair = torch.arange(half)
    return torch.where(pair < 3 * torch.tensor(turn.section)[pair % 3], pair % 3, 0)


def uncertainty(turn: Turn, way: Way) -> Pairs:
    """How far cos and sin [T, 1, rotary / 2] may lie beyond those of the angles that are NUDGE less and more: one may
    be at its greatest between the two, and a kernel's own are APPROXIMATE."""
    largest = turn.positions if turn.positions.ndim == 1 else turn.positions.amax(0)
    off = torch.outer(largest.double(), rope.frequencies(turn.theta, way.rotary)) * NUDGE
    beyond = (off.square() / 2 + APPROXIMATE).float()[:, None]
    return beyond, beyond


def pairs_of(way: Way) -> tuple[slice, slice]:
    """The channels that are rotated with each other."""
    if way.rotation == INTERLEAVED:
        return slice(0, way.rotary, 2), slice(1, way.rotary, 2)
    return slice(0, way.rotary // 2), slice(way.rotary // 2, way.rotary)


def rotated(value: Tensor, cos: Tensor, sin: Tensor, way: Way, sign: int = 1) -> Tensor:
    """value [T, H, Dh] fp32 with its first channels rotated; sign 0: the sizes of the terms, added."""
    pairs = pairs_of(way)
    first, second = (value[..., pair] for pair in pairs)
    if not sign:
        first, second, cos, sin = first.abs(), second.abs(), cos.abs(), sin.abs()
    terms = [round_to(a * b, way.products) for a, b in ((first, cos), (second, sin), (second, cos), (first, sin))]
    turned = value.clone() if sign else value.abs()
    turned[..., pairs[0]] = terms[0] - sign * terms[1] if sign else terms[0] + terms[1]
    turned[..., pairs[1]] = terms[2] + (sign or 1) * terms[3]
    return turned


def predicted(rule: Rule, way: Way, rows: Rows, heads: int, turn: Turn | None, nudge: float = 0.0) -> Tensor:
    """[T, H, Dh] fp32: what that way stores of rows [T * H, Dh]; without a turn the norm alone."""
    if turn is None:
        return predict(rule.replace(out=way.out), rows).unflatten(0, (-1, heads))
    cos, sin = angles(turn, way, nudge)
    if way.norm == AFTER:
        x = rotated(_by_heads(rows.x, heads), cos, sin, way).flatten(0, 1)
        given = dataclasses.replace(rows, x=x)
        return _by_heads(predict(rule.replace(x=way.rotated, out=way.out), given), heads)
    normed = predict(rule.replace(out=way.unrotated), rows)
    return round_to(rotated(_by_heads(normed, heads), cos, sin, way), way.out)


def terms(
    rule: Rule, way: Way, rows: Rows, heads: int, turn: Turn | None, of: Callable[[Turn, Way], Pairs] = angles
) -> Tensor:
    """[T, H, Dh] fp32: the sizes of what is added up for each element, with those cos and sin."""
    normed = _by_heads(predict(rule.replace(out=KEEP), rows), heads)
    if turn is None:
        return normed.abs()
    cos, sin = of(turn, way)
    if way.norm == BEFORE:
        return rotated(normed, cos, sin, way, 0)
    x = _by_heads(rows.x, heads)
    factor = (normed / x).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs()
    return rotated(x, cos, sin, way, 0) * factor


def _by_heads(value: Tensor, heads: int) -> Tensor:
    return value.unflatten(0, (-1, heads))


# ---------------------------------------------------------------- which way, roughly and then exactly


def structures(turn: Turn, rotary: int) -> Iterator[Way]:
    """Every way up to the roundings of q and k, with those of the angles that it makes itself."""
    sections = ("",) if turn.section is None else ("contiguous", INTERLEAVED)
    words = itertools.product(*[STORAGE if turn.table is None else STORAGE[:1]] * 3)
    for rotation, norm, section, phase in itertools.product(ROTATIONS, (BEFORE, AFTER), sections, words):
        yield Way(
            rotation, norm, section, rotary, turn.table is None, **dict(zip(PHASE_BOUNDARIES, phase, strict=True))
        )


def ways(like: Way, first: str, kept: bool, given: bool) -> Iterator[Way]:
    """Every way like that one by its roundings of q and k. first: the word that rounds where nothing is rotated; kept:
    what is stored is fp32; given: a table is rounded as it is given. Without a rotation that word is all."""
    if not like.rotation:
        yield dataclasses.replace(like, out=first)
        return
    words = tuple(dict.fromkeys([*STORAGE, first]))
    tables = (RNE,) if given else STORAGE
    outs = words if kept else words[1:]
    early = itertools.product(words, tables, words, outs)
    for unrotated, cos_sin, products, out in early:
        here = (unrotated, products, out) if like.norm == BEFORE else (out,)
        if next((word for word in here if word != KEEP), KEEP) == first:
            name = "unrotated" if like.norm == BEFORE else "rotated"
            yield dataclasses.replace(like, **{name: unrotated}, cos_sin=cos_sin, products=products, out=out)


@functools.cache
def nudges(made: bool) -> tuple[float, ...]:
    """Of angles that a kernel makes itself."""
    return (0.0, -NUDGE, NUDGE) if made else (0.0,)
