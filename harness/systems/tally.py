"""How far values are from others that should be theirs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DIGITS = {torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}


@dataclass
class Tally:
    """Differences in what was added, one call a passage or a layer. p999: the greatest of a call's 99.9 % quantiles."""

    elements: int = 0
    equal: int = 0
    figures: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("max_abs", "p999", "max_ulp", "largest"), 0.0)
    )
    squares: tuple[float, float] = (0.0, 0.0)
    digits: int = 24  # of the reference's dtype, which an ulp is one of

    def add(self, actual: Tensor, reference: Tensor) -> None:
        counted = (actual != 0) | (reference != 0)  # of a softmax most are 0 in both: keys that nothing sees
        self.digits = DIGITS[reference.dtype]
        a, r = actual[counted].double(), reference[counted].double()
        if not len(r):
            return
        off = (a - r).abs()
        ulp = torch.ldexp(torch.ones_like(r), torch.frexp(r).exponent - self.digits)
        self.elements, self.equal = self.elements + len(r), self.equal + int((off == 0).sum())
        tail = off.kthvalue(max(1, int(0.999 * len(off)))).values
        made = (off.max(), tail, (off / ulp)[r != 0].max() if bool((r != 0).any()) else 0.0, r.abs().max())
        self.figures = {n: max(old, float(new)) for (n, old), new in zip(self.figures.items(), made, strict=True)}
        self.squares = self.squares[0] + float(off @ off), self.squares[1] + float(r @ r)

    def columns(self) -> dict[str, Any]:
        unit = 2.0 ** (torch.frexp(torch.tensor(self.figures["largest"])).exponent.item() - self.digits)
        return self.figures | {
            "elements": self.elements,
            "share_equal": self.equal / self.elements,
            "ulps_of_largest": self.figures["max_abs"] / unit,
            "rel_rms": (self.squares[0] / self.squares[1]) ** 0.5 if self.squares[1] else 0.0,
        }

    def shares(self) -> dict[str, Any]:
        """Those of a function or a cause."""
        return {name: self.columns()[name] for name in ("elements", "share_equal", "max_ulp")}
