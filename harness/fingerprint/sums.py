"""x + residual as a callable returns it, or writes it into residual: held to its bits, in one way at every call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from castpoint.harness.compiled.loading import Fault
from castpoint.harness.fingerprint.stores import round_to, same, storages
from castpoint.kernels.plan import KEEP

Totals = list[Tensor]  # fp32, of x's shape; of a scaled sum each that it may be


def totals(x: Tensor, residual: Tensor, alpha: float | None, narrow: str) -> Totals:
    """x + residual, or where one of them is multiplied by alpha, the sum for each way to hold the product."""
    if alpha is None:
        return [x.float() + residual.float()]
    return [made for by in (0, 1) for made in scaled((x, residual)[by], (residual, x)[by], alpha, narrow).values()]


def scaled(value: Tensor, other: Tensor, alpha: float, narrow: str) -> dict[str, Tensor]:
    """value * alpha + other in fp32, by how the product is held: storages, or `not rounded`, as fma has it."""
    product, factor = value.float() * alpha, torch.tensor(alpha).double()
    found = {word: round_to(product, word) + other.float() for word in storages(narrow)}
    return found | {"not rounded": (value.double() * factor + other.double()).float()}


class Sums:
    """The ways left in which a callable's sums may be held, and what it does with them, in words."""

    def __init__(self, narrow: str, usual: str, returned: str = "is returned") -> None:
        """narrow: bf16 or fp16, to which values are rounded; usual: the way that is not said; returned: what to say of
        a sum beside the result."""
        self.returned = returned
        ways = (KEEP, *(f"{to}-{way}" for to in ("bf16", "fp16") for way in ("rne", "rtz", "rna")))
        self.left = sorted(ways, key=lambda word: (word != usual, narrow not in word))
        self.usual, self.done = usual, ""
        self.seen = self.left_out = False  # whether the last call did so; whether one before did not

    def __str__(self) -> str:
        return self.done + (f" as {self.left[0]}" if self.left[0] != self.usual else "")

    def note(self, done: str, value: Tensor, sums: Totals) -> bool:
        """Whether value is one of the sums, bit for bit, NaN where that is, as it was at all calls before."""
        left = self._same(value, sums)
        if left:
            self.left, self.done, self.seen = left, done, True
        return bool(left)

    def hold(self, x: Tensor, residual: Tensor, sums: Totals) -> None:
        """After a call: raises Fault where it did with the sum what another one did not. What it leaves as it is may be
        the sum."""
        there = self.seen or any(self.is_one(value, sums) for value in (x, residual))
        if self.done and (self.left_out or not there):
            at = "other calls, at this one not" if not there else "this call, at others not"
            raise Fault(f"x + residual {self.done} at {at}")
        self.left_out, self.seen = self.left_out or not there, False

    def is_one(self, value: Any, sums: Totals) -> bool:
        """Whether note would say so."""
        return isinstance(value, Tensor) and value.shape == sums[0].shape and bool(self._same(value, sums))

    def _same(self, value: Tensor, sums: Totals) -> list[str]:
        held = value.float().nan_to_num(nan=7e37)
        return [word for word in self.left if any(same(held, round_to(total, word)) for total in sums)]

    def taken(self, beside: Sequence[Any], sums: Totals | None) -> list[Any]:
        """What is returned beside the result, but for the sum. Raises Fault where a tensor of x's shape is not it."""
        if sums is None:
            return list(beside)
        alike = [i for i, value in enumerate(beside) if isinstance(value, Tensor) and value.shape == sums[0].shape]
        if not alike:
            return list(beside)
        found = next((i for i in alike if self.note(self.done or self.returned, beside[i], sums)), None)
        if found is None:
            raise Fault("the callable returns a tensor of x's shape beside its result, and it is not x + residual")
        return [value for i, value in enumerate(beside) if i != found]
