"""The field's cases: what moving one boundary did to people, measured on the lab's plans beside what they reported.

What a case is and when its claim fits, cases.case says. What was claimed stands in data/claims.csv, how each claim is
measured in the modules beside it, by what was moved. Sources are public threads, their figures the authors' own, claims
retold in the lab's words. The threads of cases 3 and 12 and the 2.2 % of case 22 could not be read again: those figures
are the ones of the list of cases that this project began with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from castpoint.harness.cases.case import CLAIMS, Measured, described, verdict
from castpoint.harness.cases.elementwise import ELEMENTWISE
from castpoint.harness.cases.norm import NORM
from castpoint.harness.cases.stack import STACK
from castpoint.harness.runs.errors import reason_of

MEASURED = {case.claim.key: case for case in (*NORM, *ELEMENTWISE, *STACK)}
CASES = tuple(MEASURED[key] for key in CLAIMS)  # in the order of the table, which is by number


def run_cases(seed: int = 0) -> Iterator[dict[str, Any]]:
    """One row a case, as it is measured; empty cells where something does not apply. About 10 s.

    A case that raises becomes a row with status `failed` and the reason; the others go on.
    """
    for case in CASES:
        claim, measured, judged, status, reason = case.claim, Measured(), "", "ok", ""
        try:
            measured = case.measure(seed)
            judged = verdict(measured, claim)
        except Exception as error:  # a case that cannot run is a row, and the cases after it go on
            status, reason = "failed", reason_of(error)
        row = asdict(claim) | asdict(measured) | {"before": described(case.before), "after": described(case.after)}
        row |= {"verdict": judged, "status": status, "reason": reason}
        del row["key"]
        yield {name: "" if isinstance(cell, float) and math.isnan(cell) else cell for name, cell in row.items()}
