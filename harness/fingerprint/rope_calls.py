"""A kernel of q and k as it is called: which sizes and angles it takes, and which rotation that is, roundings aside."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from castpoint.harness.compiled.loading import Fault
from castpoint.harness.fingerprint import probes
from castpoint.harness.fingerprint.blackbox import BlackBox, Refused, Unasked
from castpoint.harness.fingerprint.missing import TYPES
from castpoint.harness.fingerprint.pairs import Pair
from castpoint.harness.fingerprint.rules import Rows
from castpoint.harness.fingerprint.sizes import Sizes
from castpoint.harness.fingerprint.turns import (
    AFTER,
    COLUMNS,
    Manner,
    Pairs,
    Turn,
    Way,
    angles,
    drawn,
    pairs_of,
    rotated,
    structures,
    unturned,
)
from castpoint.kernels.plan import KEEP, PHASE_BOUNDARIES
from castpoint.variants.rope import frequencies

THETA = 1e4
THETAS = (1e6, 5e5, 1e7)  # Qwen3, Llama 3, and longer contexts
NEARLY = 2.0**-6  # of the terms of an element: two ulps of bf16, about which rotation it is leaves no doubt
FITS = 0.99  # share of elements that the right rotation explains up to that
SHARES = (1.0, 0.5, 0.25, 0.75)  # of a head's channels that a table is for; the others where the first is refused
TOP = 4095  # positions of the deciding calls
LADDER = tuple(4**i for i in range(7))  # positions at which frequencies are measured


@dataclass(frozen=True, eq=False)
class Case:
    """One call: rows [T * H, Dh] of q and of k, and what they are rotated by."""

    q: Rows
    k: Rows
    heads: tuple[int, int]
    turn: Turn | None
    layout: str = "contiguous"
    neox: bool = True

    @property
    def x(self) -> Tensor:
        """[T, Hq + Hkv, Dh] fp32."""
        return torch.cat([r.x.unflatten(0, (-1, h)) for r, h in zip((self.q, self.k), self.heads, strict=True)], dim=1)

    def of_all(self, make: Callable[[Rows, int], Tensor]) -> Tensor:
        """[T, Hq + Hkv, Dh]: what make says of q's rows and heads, and of k's."""
        return torch.cat([make(self.q, self.heads[0]), make(self.k, self.heads[1])], dim=1)


@dataclass(frozen=True)
class Kernel:
    """A pair as it is called: with those heads where it takes no other, in that manner."""

    pair: Pair
    sizes: Sizes
    manner: Manner = Manner()
    theta: float = THETA

    def turn(
        self, head_dim: int, positions: Tensor, theta: float | None = None, rotary: int | None = None
    ) -> Turn | None:
        p = self.pair
        if not p.rotates:
            return None
        rotary = p.fixed.get("rotary_dim") or rotary or 2 * int(head_dim * self.manner.share / 2)
        section = p.fixed.get("mrope_section") or p.takes("mrope_section")
        return drawn(
            self.manner, positions, rotary, theta=p.fixed.get("base") or theta or self.theta,
            table=not p.makes_angles, section=bool(section), woven=bool(p.fixed.get("mrope_interleaved", False)),
        )  # fmt: skip

    def positions(self, tokens: int, top: int = TOP, seed: int = 1) -> Tensor:
        """[T] or [3, T] up to top, most above 256, where bf16 holds not every one; the last is top."""
        rng = torch.Generator().manual_seed(seed)
        axes = (3,) if self.pair.takes("mrope_section") or "mrope_section" in self.pair.fixed else ()
        drawn_ = torch.randint(257, top + 1, [*axes, tokens], generator=rng)
        drawn_[..., -1] = top
        return drawn_

    def stored(self, case: Case) -> Tensor:
        """[T, Hq + Hkv, Dh], on the CPU."""
        split = case.heads[0]

        def fn(x: Tensor, weight: Tensor, eps: float) -> Tensor:
            parts = [
                part.clone(memory_format=torch.contiguous_format) for part in (x[:, :split], x[:, split:], *weight)
            ]
            q, k = self.pair(*parts, eps, case.turn, case.layout, case.neox)
            if q.dtype != k.dtype or q.dtype not in (torch.bfloat16, torch.float32):
                raise Fault(f"the callable returned q in {q.dtype}, k in {k.dtype}, expected both in bf16 or fp32")
            return torch.cat([q, k], dim=1)

        box = BlackBox(fn, "head_norm", self.pair.device)
        return box.norm(case.x, torch.stack([case.q.weight, case.k.weight]), case.q.eps).y

    def alone(self, name: str, head_dim: int) -> Callable[..., Any]:
        """q's norm, or k's, as a function (x, weight, eps): that of position 0, beside another k or q."""
        heads = self.sizes.heads or ()

        def fn(x: Tensor, weight: Tensor, eps: float) -> Tensor:
            if self.pair.packed and (x.storage_offset() or not x.is_contiguous()):
                raise Unasked(f"{name} lies in qkv")
            turn = self.turn(x.shape[-1], self.positions(1))
            turn = None if turn is None else unturned(turn, len(x))
            other, own = x.flip(-1), x.shape[1]
            if name == "q":
                few = heads[1] if heads and own == heads[0] else own // 2 if own % 2 == 0 else 1
                return self.pair(x, other[:, :few].contiguous(), weight, weight.flip(0), eps, turn)[0]
            many = heads[0] // heads[1] if heads and own == heads[1] else 2
            return self.pair(other.repeat(1, many, 1), x, weight.flip(0), weight, eps, turn)[1]

        return fn


@dataclass(frozen=True)
class First:
    """The deciding call: rows whose sums are exact, rotated; and every structure that fits it."""

    kernel: Kernel
    case: Case
    stored: Tensor
    share: float
    fits: list[Way]
    near: Way | None = None

    @property
    def explained(self) -> bool:
        """Whether the nearest rotation explains nearly all, and rotates every channel that a table is for."""
        return self.near is None or (self.share >= FITS and not self.left_out)

    @property
    def left_out(self) -> bool:
        """Whether channels that a table is for are not rotated."""
        turn = self.case.turn
        return turn is not None and turn.table is not None and self.near is not None and self.near.rotary < turn.rotary


def first_call(pair: Pair, sizes: Sizes) -> First:
    """The first geometry and manner that it takes, and whose rotation is one of the family; else the nearest."""
    best: First | None = None
    refused: Refused | None = None
    forms = [pair] if pair.packed else [pair, dataclasses.replace(pair, flat=True)]
    dims = [sizes.head_dim] if sizes.head_dim else [probes.HEAD_DIM, 64, 256]
    for form, head_dim in itertools.product(forms, dims):
        for kernel in _manners(form, sizes):
            if best and best.share < FITS and kernel.manner.share < 1:  # it takes angles of all channels, but otherwise
                return best
            try:
                first = _tried(kernel, head_dim)
            except Refused as error:
                refused = refused or error
                continue
            if first.explained:
                return _as_engines_give(first)
            best = first if best is None or first.share > best.share else best
        if best:
            return best
    assert refused is not None
    raise Fault(str(refused))


def _manners(pair: Pair, sizes: Sizes) -> Iterator[Kernel]:
    columns = COLUMNS if pair.takes("cos") else COLUMNS[:1]
    tables = (torch.float32, torch.bfloat16) if pair.takes("cos", "cos_sin_cache") else (torch.float32,)
    places = (torch.int64, torch.int32) if pair.takes("positions") else (torch.int64,)
    own = pair.makes_angles and not pair.takes("base") and "base" not in pair.fixed
    for share, column, table, place in ((s, c, t, p) for s in SHARES for c in columns for t in tables for p in places):
        for theta in (THETA, *THETAS) if own else (THETA,):
            yield Kernel(pair, sizes, Manner(column, table, place, share), theta)
        if not pair.rotates:
            return


def _tried(kernel: Kernel, head_dim: int) -> First:
    rng = torch.Generator().manual_seed(0)
    heads, tokens = kernel.sizes.heads or (4, 2), kernel.sizes.tokens or probes.ROWS
    q, k = (probes.norm_rows(head_dim, rng, count=tokens * count) for count in heads)
    turn = kernel.turn(head_dim, kernel.positions(tokens))
    case = Case(q, k, (heads[0], heads[1]), turn)
    stored = kernel.stored(case)
    if not torch.equal(stored, kernel.stored(case)):
        raise Fault("the callable is not deterministic: two calls on equal inputs differ")
    if turn is None:
        return First(kernel, case, stored, 1.0, [Way("")])
    still = kernel.stored(dataclasses.replace(case, turn=unturned(turn, tokens))).float()
    moved = (stored != still).double().mean((0, 1)) > 0.05
    rotary = min(int(moved.nonzero().max()) // 2 * 2 + 2 if moved.any() else turn.rotary, turn.rotary)
    shares = {way: _near(case, still, stored.float(), way).item() for way in structures(turn, rotary)}
    near = max(shares, key=lambda way: shares[way])
    return First(kernel, case, stored, shares[near], [w for w in shares if shares[w] >= shares[near] - 0.01], near)


def _near(case: Case, still: Tensor, stored: Tensor, way: Way, sign: int = 1, heads: slice = slice(None)) -> Tensor:
    """Share of elements that turning what is stored at position 0 explains up to NEARLY."""
    assert case.turn is not None
    return _by(angles(case.turn, way), case, still, stored, way, sign)[:, heads].double().mean()


def _by(turns: Pairs, case: Case, still: Tensor, stored: Tensor, way: Way, sign: int = 1) -> Tensor:
    """Which elements turning by these cos and sin explains up to NEARLY."""
    factor = still / case.x if way.norm == AFTER else torch.ones(1)
    value = case.x if way.norm == AFTER else still
    expected = rotated(value, *turns, way, sign) * factor
    size = rotated(value, *turns, way, 0) * factor.abs()
    return (expected - stored).abs() <= NEARLY * size


def _as_engines_give(first: First) -> First:
    """The same with a table in bf16, where fp32 makes it return fp32 and bf16 does not: its types are promoted."""
    kernel, manner = first.kernel, first.kernel.manner
    table = first.case.turn is not None and first.case.turn.table is not None
    if first.stored.dtype == torch.float32 and table and manner.table == torch.float32:
        narrow = dataclasses.replace(kernel, manner=dataclasses.replace(manner, table=torch.bfloat16))
        try:
            other = _tried(narrow, first.case.x.shape[-1])
        except Refused:
            return first
        return other if other.stored.dtype != torch.float32 and other.share >= FITS else first
    return first


def no_rotation(first: First) -> str:
    case, stored = first.case, first.stored.float()
    assert case.turn is not None and first.near is not None
    still = first.kernel.stored(dataclasses.replace(case, turn=unturned(case.turn, len(stored)))).float()
    if torch.equal(still, stored):
        return "positions, cos and sin make no difference: q and k are not rotated"
    if first.share >= FITS:
        return f"it is given angles of {case.turn.rotary} channels, and rotates the first {first.near.rotary}"
    for way in structures(case.turn, first.near.rotary):
        if _near(case, still, stored, way, sign=-1) >= FITS:
            return "all is explained if it rotates the other way, by minus the angle"
        for name, word in itertools.product(PHASE_BOUNDARIES if way.made else (), TYPES):
            if _near(case, still, stored, dataclasses.replace(way, **{name: word})) >= FITS:
                return f"all is explained, roundings aside, if {name} is {TYPES[word]}"
    if said := _other_frequencies(first, still, stored):
        return f"all is explained, roundings aside, if {said}"
    parts = {"q": slice(case.heads[0]), "k": slice(case.heads[0], None)}
    shares = [f"{_near(case, still, stored, first.near, heads=part):.2%} of {name}" for name, part in parts.items()]
    return (
        "none of these: the nearest rotation, "
        f"{first.near.rotation} with the norm {first.near.norm}, explains {' and '.join(shares)}, roundings aside"
    )


def _other_frequencies(first: First, still: Tensor, stored: Tensor) -> str:
    """What frequencies a kernel has that makes its angles otherwise than of the theta it was asked with; empty where
    positions times no frequencies explain the deciding call."""
    case, turn = first.case, first.case.turn
    assert turn is not None
    if turn.table is not None or turn.section is not None:
        return ""
    calls = {position: _everywhere(first.kernel, case, position) for position in LADDER}

    def explained(found: Tensor, way: Way) -> bool:
        phase = turn.positions[:, None, None].double() * found
        return _by((phase.cos().float(), phase.sin().float()), case, still, stored, way).double().mean().item() >= FITS

    for way in structures(turn, turn.rotary):
        if any(getattr(way, name) != KEEP for name in PHASE_BOUNDARIES):
            continue
        found = _frequencies(case, still, calls, way)
        if explained(found, way):
            middle = torch.arange(turn.rotary // 8, turn.rotary // 4)  # which are known to the most digits
            theta = (found[middle] ** (-turn.rotary / (2 * middle))).median().item()
            for rounded in (float(f"{theta:.{digits}g}") for digits in range(1, 7)):
                if theta > 1 and explained(frequencies(rounded, turn.rotary), way):
                    return f"theta is {rounded:g}"
            by = frequencies(turn.theta, turn.rotary) / found
            said = " to ".join(dict.fromkeys(f"{end:.2g}" for end in (by.min(), by.max())))
            return f"theta's frequencies are divided by {said}: scaled RoPE, such as YaRN's or Llama 3's"
    return ""


def _everywhere(kernel: Kernel, case: Case, position: int) -> Tensor:
    """What is stored with every token at that position."""
    assert case.turn is not None
    turn = dataclasses.replace(case.turn, positions=torch.full_like(case.turn.positions, position))
    return kernel.stored(dataclasses.replace(case, turn=turn)).float()


def _frequencies(case: Case, still: Tensor, calls: dict[int, Tensor], way: Way) -> Tensor:
    """[rotary / 2] float64: radians that each pair of channels is turned by from one position to the next, measured at
    positions each so near to the last that no turn is missed."""
    found, factor = torch.zeros(way.rotary // 2).double(), still / case.x if way.norm == AFTER else torch.ones(1)
    for position, turned in calls.items():
        before, after = (
            torch.complex(*(value[..., pair].double() for pair in pairs_of(way)))
            for value in (still / factor, (turned / factor).nan_to_num(posinf=0.0, neginf=0.0))
        )
        missing = (after * before.conj() * torch.polar(torch.ones_like(found), -position * found)).sum((0, 1)).angle()
        found = found + missing / position
    return found
