"""x + residual as a callable returns it, or writes it into residual: held to its bits, in one way at every call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from castpoint.harness.compiled.loading import Fault
from castpoint.harness.fingerprint.stores import round_to
from castpoint.kernels.plan import KEEP


class Sums:
    """The ways left in which a callable's sums may be held, and what it does with them, in words."""

    def __init__(self, narrow: str, usual: str, returned: str = "is returned") -> None:
        """narrow: bf16 or fp16, to which values are rounded; usual: the way that is not said; returned: what to say of
        a sum beside the result."""
        self.returned = returned
        ways = (KEEP, *(f"{to}-{way}" for to in ("bf16", "fp16") for way in ("rne", "rtz", "rna")))
        self.left = sorted(ways, key=lambda word: (word != usual, narrow not in word))
        self.usual, self.done = usual, ""

    def __str__(self) -> str:
        return self.done + (f" as {self.left[0]}" if self.left[0] != self.usual else "")

    def note(self, done: str, value: Tensor, sums: Tensor) -> bool:
        """Whether value is x + residual, bit for bit, NaN where that is, as it was at all calls before."""
        same = self._same(value, sums)
        if same:
            self.left, self.done = same, done
        return bool(same)

    def is_one(self, value: Any, sums: Tensor) -> bool:
        """Whether note would say so."""
        return isinstance(value, Tensor) and value.shape == sums.shape and bool(self._same(value, sums))

    def _same(self, value: Tensor, sums: Tensor) -> list[str]:
        held = value.float().nan_to_num(nan=7e37)
        return [word for word in self.left if torch.equal(held, round_to(sums, word).nan_to_num(nan=7e37))]

    def taken(self, beside: Sequence[Any], sums: Tensor | None) -> list[Any]:
        """What is returned beside the result, but for the sum. Raises Fault where a tensor of x's shape is not it."""
        if sums is None:
            return list(beside)
        alike = [i for i, value in enumerate(beside) if isinstance(value, Tensor) and value.shape == sums.shape]
        if not alike:
            return list(beside)
        found = next((i for i in alike if self.note(self.done or self.returned, beside[i], sums)), None)
        if found is None:
            raise Fault("the callable returns a tensor of x's shape beside its result, and it is not x + residual")
        return [value for i, value in enumerate(beside) if i != found]
