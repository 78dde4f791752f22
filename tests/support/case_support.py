"""What the tests of cases share."""

from castpoint.harness.cases.case import Case
from castpoint.harness.cases.run import CASES


def case(quantity: str) -> Case:
    """The one case whose figure's words begin so."""
    found = [c for c in CASES if c.claim.measure.startswith(quantity)]
    assert len(found) == 1, f"{len(found)} cases begin with {quantity!r}"
    return found[0]
