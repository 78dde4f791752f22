"""Where the rows of refined come from: searched for the rules that are left, or, where answers come in rounds, for all
rules before any answer is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from castpoint.harness.fingerprint import probes
from castpoint.harness.fingerprint.rules import Readout, Rows, Rule
from castpoint.kernels.plan import KEEP

SEARCHES = 24
AT_ONCE = 12  # searches that are asked before any is answered; most answers need two or three
CONTROLS = 16  # roots next to a boundary of a rounded rstd; if more than an eighth of them are an ulp off, eps is open


@dataclass(frozen=True)
class Search:
    """Rows that tell rules apart: `rules` whatever is left of them, None for those that are left."""

    rules: tuple[Rule, ...] | None = None
    searches: int = SEARCHES

    def telling_rows(self, left: Sequence[Rule], width: int, seed: int, readout: Readout | None) -> Rows | None:
        """probes.telling_rows."""
        return probes.telling_rows(self.rules or tuple(left), width, seed, readout)

    def control_rows(self, left: Sequence[Rule], width: int, seed: int, readout: Readout | None) -> Rows | None:
        """probes.control_rows."""
        return probes.control_rows(self.rules or left, width, seed, readout)

    def all_rows(self, width: int, readout: Readout | None) -> Iterator[Rows]:
        """Those of every search for `rules`, and the controls where roots may be in doubt."""
        rules = self.rules or ()
        found = [self.telling_rows(rules, width, seed, readout) for seed in range(self.searches * (len(rules) > 1))]
        if len({rule.eps for rule in rules}) > 1 and all(rule.rstd != KEEP for rule in rules):
            found += [self.control_rows(rules, width, seed, readout) for seed in range(CONTROLS)]
        return (rows for rows in found if rows is not None)


SEARCH = Search()
