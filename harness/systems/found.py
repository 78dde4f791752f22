"""What was found of a claim: figures beside those that were said, and a verdict."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from castpoint.harness.runs.schema import ClaimFigureRow, ClaimRow
from castpoint.harness.runs.words import Judged


def span(values: Sequence[float], form: str = "{:.3g}") -> str:
    """`least to greatest` of all samples, one figure where they print alike."""
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


@dataclass(frozen=True)
class Figure:
    """One figure of a report and what one cause makes of it here. claimed: (value,) or (least, greatest), empty where
    nothing was said; measured: every sample (seed, prompt, layer)."""

    what: str
    cause: str
    measured: Sequence[float]
    claimed: tuple[float, ...] = ()
    unit: str = ""

    def row(self, claim: str) -> ClaimFigureRow:
        return ClaimFigureRow(
            claim=claim,
            what=self.what,
            cause=self.cause,
            claimed=self.claimed[0] if self.claimed else None,
            claimed_high=self.claimed[1] if len(self.claimed) > 1 else None,
            measured=float(statistics.median(self.measured)),
            measured_low=float(min(self.measured)),
            measured_high=float(max(self.measured)),
            samples=len(self.measured),
            unit=self.unit,
        )


@dataclass(frozen=True)
class Found:
    """verdict: of the figures, never typed beside them. figure, how, conditions: sentences with their numbers; decides:
    the one command that would decide what cannot be decided here."""

    verdict: Judged
    figure: str
    how: str
    conditions: str
    figures: tuple[Figure, ...]
    decides: str = ""

    def row(self, claim: str, source: str, said: str) -> ClaimRow:
        return ClaimRow(
            claim=claim,
            source=source,
            said=said,
            how=self.how,
            figure=self.figure,
            verdict=self.verdict,
            decides=self.decides,
            conditions=self.conditions,
        )
