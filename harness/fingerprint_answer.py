"""The answer of a fingerprint: what its words mean, and when it is identified, undecided or none."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.evidence import Call, count_votes
from harness.family import Rule

# Elements that no rule explains, above which the answer is `none`. Sums in another order and approximate roots change
# 1e-4 of them, an unlisted rounding to 11 bits (fp16, tf32) 2 %, noise on one element in a thousand 1e-3.
UNEXPLAINED = 0.005


@dataclass(frozen=True)
class Answer:
    """status: identified (one candidate), undecided (several), none (not of the family), error (reason says which).

    candidates: boundary or choice -> word; `a or b` where both words store the same bits on every row searched.
    share_equal, runner_up_share_equal: share of elements that the best rule, and the best rejected one, explain.
    nearest: the best rule where the answer is none.

    Of a chain, eps, root and order are those of its first norm; the fp32 arithmetic of the head norm is not asked.
    """

    status: str
    candidates: list[dict[str, str]] = field(default_factory=list)
    share_equal: float | None = None
    runner_up_share_equal: float | None = None
    nearest: dict[str, str] | None = None
    reason: str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _merged(dicts: Sequence[dict[str, str]]) -> dict[str, str]:
    """One dict of rules that store the same bits: a word where they agree, `a or b` where they do not."""
    return {name: " or ".join(dict.fromkeys(d[name] for d in dicts)) for name in dicts[0]}


def difference(a: dict[str, str], b: dict[str, str]) -> str:
    """Where two dicts of the same names differ, in words."""
    return ", ".join(f"{name}={a[name]} against {b[name]}" for name in a if a[name] != b[name])


def answer_of(groups: list[list[dict[str, str]]], share: float, runner_up: float | None, evidence: str = "") -> Answer:
    """Identified if one group of words is left, undecided if several; the words of a group store the same bits."""
    candidates = [_merged(group) for group in groups]
    if len(candidates) == 1:
        equal = [f"{name} ({word})" for name, word in candidates[0].items() if " or " in word]
        reason = f"the same bits on every row searched, whichever: {', '.join(equal)}" if equal else ""
        return Answer("identified", candidates, share, runner_up, reason=reason)
    pairs = "; ".join(difference(candidates[0], other) for other in candidates[1:])
    return Answer("undecided", candidates, share, runner_up, reason=f"undecided between {pairs}{evidence}")


def none_of_these(nearest: dict[str, str], share: float, runner_up: float | None, why: str) -> Answer:
    """None: nearest explains that share, and why says what it does not."""
    reason = f"none of these: the nearest plan leaves {1 - share:.2%} of the elements unexplained; {why}"
    return Answer("none", [], share, runner_up, nearest, reason)


def deciding_probe(groups: list[list[Rule]], calls: Sequence[Call]) -> str:
    """What the deciding probe said of the first two groups."""
    if len(groups) < 2:
        return ""
    differ, first, second = count_votes(groups[0][0], groups[1][0], calls)
    return (
        ". The probe that would decide, rows on which they store different bits, was given: of the "
        f"{differ:g} roots or products that tell the first two apart, {first:.3g} are stored as by the first, "
        f"{second:.3g} as by the second"
    )
