"""How rows become calls of a norm or a chain, and what it stores becomes evidence."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from castpoint.harness.fingerprint import probes
from castpoint.harness.fingerprint.blackbox import BlackBox, Refused
from castpoint.harness.fingerprint.evidence import Call, check_repeats
from castpoint.harness.fingerprint.heads import Geometry, HeadRows, head_rows
from castpoint.harness.fingerprint.probes import READ
from castpoint.harness.fingerprint.rules import Rows, Rule

Calls = TypeVar("Calls", "NormCalls", "ChainCalls")
T = TypeVar("T")
KEPT = "another weight makes no difference: it keeps that of its first call"


def in_parts(count: int, at_once: int | None, ask: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What ask returns of rows 0 to count, so many at once (None: all), the last part filled up with the first rows."""
    at_once = at_once or count
    places = torch.arange(math.ceil(count / at_once) * at_once) % count
    parts = [ask(part) for part in places.split(at_once)]
    return tuple(torch.cat(outputs)[:count] for outputs in zip(*parts, strict=True))


def first_of(ways: Iterable[Calls], ask: Callable[[Calls], T]) -> tuple[Calls, T, list[dict[str, str]]]:
    """The first way, of some sizes, that the callable takes, what ask makes of it, and what it refused before. Raises
    Refused where it takes none; in rounds only the first is tried."""
    refused: list[dict[str, str]] = []
    first: Refused | None = None
    for calls in ways:
        try:
            return calls, ask(calls), refused
        except Refused as error:
            refused.append({"about": "x", "what": str(calls), "result": f"refused: {error}"})
            first = first or error
            if calls.box.in_rounds:
                break
    assert first is not None
    raise first


def first_taken(
    ways: Iterable[Calls], ask: Callable[[Calls, float], Call]
) -> tuple[Calls, list[Call], list[dict[str, str]]]:
    """first_of with the calls that ask makes at EPS_SMALL and EPS_LARGE. Raises Fault where equal calls differ."""

    def main(calls: Calls) -> list[Call]:
        first_call, at_once = ask(calls, probes.EPS_SMALL), ask(calls, probes.EPS_SMALL)
        both = [first_call, ask(calls, probes.EPS_LARGE)]
        for repeated in (at_once, ask(calls, probes.EPS_SMALL)):  # changed by every call, or by one between
            check_repeats(first_call, repeated)
        return both

    calls, both, refused = first_of(ways, main)
    calls.box.settle()
    return calls, both, refused


def keeps_weight(call: Call, ask: Callable[[Rows], Call]) -> bool:
    """Whether another weight of the same width changes nothing."""
    rows = dataclasses.replace(call.rows, weight=call.rows.weight.roll(1, -1))
    return torch.equal(ask(rows).stored, call.stored)


def widened(rows: Rows) -> Rows:
    """The rows with the channels that they leave out: zeros of x, ones of the weight."""
    missing = (0, rows.width - rows.x.shape[1])
    residual = None if rows.residual is None else pad(rows.residual, missing)
    return dataclasses.replace(
        rows, x=pad(rows.x, missing), weight=pad(rows.weight, missing, value=1.0), residual=residual
    )


def scaled_by(rows: Rows, scales: Tensor | None = None) -> Rows:
    """The rows, where results are divided by scales [R, D]; by one number for all, what rules predict is remembered."""
    if scales is None:
        return rows
    if (scales != scales[0, 0]).any():
        return dataclasses.replace(rows, scales=scales)
    number = scales[0, 0].item()
    return rows.remembered(("scales", number), lambda: dataclasses.replace(rows, scales=scales))


@dataclass(frozen=True)
class NormCalls:
    """A norm as it is called: x of that width, [T, D] or with heads [T, H, Dh]."""

    box: BlackBox
    width: int
    heads: int | None = None
    tokens: int | None = None  # of every call, where the kernel takes no other number

    def __str__(self) -> str:
        return str(self.shape(probes.ROWS))

    def shape(self, rows: int) -> list[int]:
        """Of x with at least so many rows, or as many as it takes."""
        tokens = self.tokens or math.ceil(rows / (self.heads or 1))
        return [tokens, self.width] if self.heads is None else [tokens, self.heads, self.width]

    def call(
        self, rows: Rows, layout: str = "contiguous", shape: list[int] | None = None,
        weight_dtype: torch.dtype | None = None,
    ) -> Call:  # fmt: skip
        """The rows as x of that shape, in as many calls as it takes."""
        shape, dtypes = shape or self.shape(len(rows.x)), []

        def ask(part: Tensor) -> tuple[Tensor, ...]:
            call = self.at(rows.of(part), shape, layout, weight_dtype=weight_dtype)
            dtypes.append(call.dtype)
            return (call.stored,) if call.rows.scales is None else (call.stored, call.rows.scales)

        stored, *scales = in_parts(len(rows.x), math.prod(shape[:-1]), ask)
        return Call(scaled_by(rows, *scales), stored, dtypes[0])

    def at(
        self, rows: Rows, shape: list[int], layout: str = "contiguous", finite: bool = True,
        weight_dtype: torch.dtype | None = None, **more: Any,
    ) -> Call:  # fmt: skip
        """One call with x of that shape; with a weight a row of x, the first rows' are those of the heads. more: as of
        BlackBox.norm."""
        given = widened(rows)
        residual = None if given.residual is None else given.residual.reshape(shape)
        weight = given.weight if given.weight.ndim == 1 else given.weight[: shape[1]]
        x = given.x.reshape(shape)
        stored = self.box.norm(x, weight, rows.eps, residual, layout, finite, weight_dtype, **more)
        y, *scales = (
            value.reshape(given.x.shape)[:, : rows.x.shape[1]].float()
            for value in (stored.y, stored.scales)
            if value is not None
        )
        return Call(scaled_by(rows, *scales), y, stored.y.dtype)


@dataclass(frozen=True)
class ChainCalls:
    """A chain as it is called, with that geometry."""

    box: BlackBox
    geometry: Geometry
    tokens: int | None = None  # of every call, where the kernel takes no other number

    def __str__(self) -> str:
        return str(self.geometry)

    def v(self, rows: Rows) -> Call:
        """The input norm, seen through the first head of v; the rows have a readout of the head's channels."""
        g = self.geometry
        weight = torch.zeros(g.columns, g.width)
        bias = None if rows.readout.bias is None else torch.zeros(g.columns)
        at = sum(g.heads) * g.head_dim  # the weight's first row of v
        weight[at : at + g.head_dim] = rows.readout.weight(g.width)
        if bias is not None:
            bias[at : at + g.head_dim] = rows.readout.bias
        ones, given = torch.ones(g.head_dim), widened(rows)

        def ask(part: Tensor) -> tuple[Tensor, ...]:
            residual = None if given.residual is None else given.residual[part]
            return self.box.qkv(given.x[part], given.weight, weight, ones, ones, rows.eps, *g.heads, residual, bias)

        _, _, v = in_parts(len(rows.x), self.tokens, ask)
        return Call(rows, v[:, 0].float(), v.dtype)

    def qk(
        self, norm: Rule, rng: torch.Generator, eps: float, biased: bool = False, tokens: int = probes.ROWS,
        wide: float = 0.0,
    ) -> tuple[HeadRows, Call]:  # fmt: skip
        """The heads' known input, and what the callable stores of it, [tokens * (Hq + Hkv), READ], beside its rows.
        More tokens than ROWS begin again, in what is stored alone. wide: the largest
        bias, where it is not so small that all sums are exact."""
        g = self.geometry
        given = head_rows(g, rng, eps, self.box.narrow)
        if wide:
            given = dataclasses.replace(given, bias=given.bias.sign() * wide / 2.0 ** (torch.arange(READ) % 4))
        q_weight, k_weight = (probes.norm_weight(g.head_dim, rng) for _ in range(2))
        identity = torch.full([g.width], 1.0 - (norm.weight_offset != "none"))
        weight = torch.cat([given.qk_weight, torch.zeros(g.num_kv_heads * g.head_dim, g.width)])
        bias = given.packed_bias() if biased else None
        x = given.x[torch.arange(tokens) % probes.ROWS]
        q, k, _ = in_parts(
            tokens,
            self.tokens,
            lambda part: self.box.qkv(x[part], identity, weight, q_weight, k_weight, eps, *g.heads, bias=bias),
        )
        stored = torch.cat([q, k], dim=1).gather(2, given.places.expand(tokens, -1, -1))
        return given, Call(given.rows(q_weight, k_weight, eps), stored.flatten(0, 1).float(), stored.dtype)

    def of_heads(self, call: Call, *, q: bool) -> Call:
        """The part of a call of qk that is q's, or k's."""
        chosen = (torch.arange(len(call.rows.x)) % sum(self.geometry.heads) < self.geometry.num_q_heads) == q
        return Call(call.rows.of(chosen.nonzero()[:, 0]), call.stored[chosen], call.dtype)

    def at(self, geometry: Geometry) -> ChainCalls:
        """The same with another geometry."""
        return dataclasses.replace(self, geometry=geometry)
