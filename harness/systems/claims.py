"""The sixteen claims of five reports, each measured and judged (data/claims.csv says what was said, and where)."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

from castpoint.harness.runs.errors import UserError
from castpoint.harness.runs.progress import track
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import ClaimRow
from castpoint.harness.systems.found import Found

DATA = Path(__file__).parent / "data" / "claims.csv"


def said() -> dict[str, tuple[str, str]]:
    """Claim -> its report and its words."""
    with open(DATA, newline="") as file:
        return {row["claim"]: (row["source"], row["said"]) for row in csv.DictReader(file)}


def measures() -> dict[str, Callable[..., Found]]:
    """Claim -> what measures it, at small size or whole; those of reports 000 to 002 also on another model."""
    from castpoint.harness.systems import claims_four_bit, claims_kernels, claims_model, claims_parallel

    of_kernels = claims_kernels.MEASURES | claims_model.MEASURES | claims_four_bit.MEASURES
    return claims_parallel.MEASURES | of_kernels


def sweep(records: Records, source: str, short: bool, one: str = "") -> None:
    """A row a claim, and one a figure of it. source: another model for those of reports 000 to 002.

    Raises UserError for a claim that nobody made, or one that takes no model."""
    claims, found = said(), measures()
    if one and one not in claims:
        raise UserError(f"there is no claim {one!r}: claims are {', '.join(claims)}")
    if source and not one.startswith("A"):
        raise UserError("--model is for a claim of reports 000 to 002: `study claims A2 --model ...`, A1 to A5")
    for claim in track([one] if one else list(claims), "claims"):
        if records.has(ClaimRow, claim=claim):
            continue
        made = found[claim](short, source) if source else found[claim](short)
        records.add(*(figure.row(claim) for figure in made.figures))
        report, words = claims[claim]
        records.add(made.row(claim, report, words))
