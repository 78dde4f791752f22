"""The field's cases: what moving one boundary did to people, measured on the lab's plans beside what they reported.

What a case is and when its claim fits, cases.case says. The cases themselves stand in the modules beside it, by what
was moved. Sources are public threads, their figures the authors' own, claims retold in the lab's words. The threads of
cases 3 and 12 and the 2.2 % of case 22 could not be read again: those figures are the ones of the list of cases that
this project began with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from castpoint.harness.cases.case import Measured, described, verdict
from castpoint.harness.cases.norm import NORM
from castpoint.harness.cases.residual import RESIDUAL
from castpoint.harness.cases.rope import ROPE
from castpoint.harness.cases.stack import STACK
from castpoint.harness.cases.sums import SUMS
from castpoint.harness.runs.errors import reason_of

# By their number in that list; cases of one number in this order.
CASES = tuple(sorted((*NORM, *SUMS, *RESIDUAL, *STACK, *ROPE), key=lambda case: case.number))


def verdict_of(row: dict[str, str | float]) -> str:
    """The verdict of a row from its own numbers; empty cells count as NaN."""
    names = ("measured", "measured_low", "measured_high", "claimed", "claimed_low", "claimed_high")
    return verdict(*(math.nan if row[name] == "" else float(row[name]) for name in names))


def run_cases(seed: int = 0) -> Iterator[dict[str, Any]]:
    """One row a case, as it is measured; empty cells where something does not apply. About 10 s.

    A case that raises becomes a row with status `failed` and the reason; the others go on.
    """
    for case in CASES:
        claim, measured, status, reason = case.claim, Measured(math.nan, math.nan, math.nan), "ok", ""
        try:
            measured = case.measure(seed)
        except Exception as error:  # a case that cannot run is a row, and the cases after it go on
            status, reason = "failed", reason_of(error)
        row = {
            "case": case.number, "source": case.source, "where": case.where,
            "before": described(case.before), "after": described(case.after),
            "measure": case.quantity, "measured": measured.value, "unit": case.unit,
            "measured_low": measured.low, "measured_high": measured.high,
            "claimed": claim.value, "claimed_low": claim.low, "claimed_high": claim.high, "claimed_text": claim.text,
            "verdict": "", "why": case.why,
            "share_differ": measured.share_differ, "max_ulp": measured.max_ulp,
            "signed_bias": measured.signed_bias, "growth": measured.growth,
            "status": status, "reason": reason,
        }  # fmt: skip
        row = {name: "" if isinstance(cell, float) and math.isnan(cell) else cell for name, cell in row.items()}
        yield row if status == "failed" else row | {"verdict": verdict_of(row)}
