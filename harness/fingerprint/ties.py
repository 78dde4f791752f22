"""Which way ties go: a rounding to nearest is to even until the callable shows otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from castpoint.harness.fingerprint import probes
from castpoint.harness.fingerprint.evidence import TELLING, Call, count_votes, refine, rejects, settled
from castpoint.harness.fingerprint.rules import Readout, Rows, Rule, arithmetic
from castpoint.harness.fingerprint.searches import AT_ONCE, SEARCH, Search
from castpoint.kernels.plan import KEEP

SEARCHES = 4


def ties(
    rule: Rule, calls: Sequence[Call], ask: Callable[[Rows], Call] | None = None, readout: Readout | None = None
) -> tuple[dict[str, str], str]:
    """The words of the rule's roundings whose ties do not go to even, and what no word explains, or an empty text.

    Ties are sought in the calls, and where they have few in rows that ask is given. Ties of a mean, a root, or x times
    a root need that number to be exact: where an implementation's is an ulp off, they say nothing, and the word stays.
    So it does where another way to compute the root explains them.
    """
    words: dict[str, str] = {}
    for name, (even, away, zero) in ways_of_ties(rule).items():
        away_, zero_ = getattr(away, name), getattr(zero, name)
        found = [*calls, *(_searched((even, away, zero), calls, ask, readout) if ask else [])]
        for other, word in ((away, away_), (zero, zero_)):
            if _rejects(other, even, found):
                words[name] = word
        if words.get(name) == away_ and rejects(zero, away, found):
            words[name] = zero_
        number, as_even, _ = count_votes(even, away, [_firm(even, call) for call in found])
        if name not in words and _sure(rule, name) and number >= TELLING and as_even < 0.75 * number:
            return {}, f"of {number:g} ties of {name} {as_even:g} go to even, the others not all one way"
    return words, ""


def refined(
    rules: Sequence[Rule], width: int, main: Sequence[Call], calls: list[Call], ask: Callable[[Rows], Call],
    readout: Readout | None = None, search: Search = SEARCH,
) -> tuple[list[list[Rule]], str, str]:  # fmt: skip
    """evidence.refine of the rules, and again where it shows that ties go otherwise: groups of rules left, what was
    said of the first two, and what of ties no word explains. calls grow."""
    while True:
        groups, said = refine(rules, width, calls, ask, readout, search)
        more = ask if search is SEARCH else None  # else main has them
        words, unexplained = ties(groups[0][0], [*main, *calls], more, readout)
        if not words:
            return groups, said, unexplained
        rules = with_ties(rules, words)


def with_ties(rules: Sequence[Rule], words: dict[str, str]) -> list[Rule]:
    """The rules with those words where they round to nearest."""
    own = [{name: word for name, word in words.items() if getattr(rule, name)[-4:] == "-rne"} for rule in rules]
    return [rule.replace(**changes) for rule, changes in zip(rules, own, strict=True)]


def ways_of_ties(rule: Rule) -> dict[str, tuple[Rule, Rule, Rule]]:
    """Of each rounding to nearest the rule as it is, and with ties away from zero and toward it."""
    names = ("x", "statistics", "variance", "rstd", "normed", "weight_offset", "hidden", "out")
    nearest = [name for name in names if getattr(rule, name) == f"{rule.narrow}-rne"]
    words = [f"{rule.narrow}-{way}" for way in ("rne", "rna", "rnz")]
    return {name: tuple(rule.replace(**{name: word}) for word in words) for name in nearest}


def all_at_once(
    rules: Sequence[Rule], width: int, main: Sequence[Call], ask: Callable[[Rows], Call], readout: Readout | None = None
) -> tuple[list[Call], Search]:
    """main and calls on the rows of all searches that refined may need, asked before any of them is answered, and the
    search that finds these rows again."""
    search = Search(tuple(rules), AT_ONCE)
    for rows in search.all_rows(width, readout):
        ask(rows)
    tied = [call for ways in ways_of_ties(rules[0]).values() for call in _searched(ways, main, ask, readout)]
    return [*main, *tied], search


def _rejects(way: Rule, even: Rule, calls: Sequence[Call]) -> bool:
    """Whether ties go that way and not to even, however the root is computed: one that is an ulp smaller brings each
    product just below its tie, as if all went toward zero."""
    if not rejects(way, even, calls):
        return False
    ways = list(arithmetic(way))
    return all(any(rejects(a, b, calls) for a in ways) for b in arithmetic(even))


def _firm(rule: Rule, call: Call) -> Call:
    """The part of the call whose rstd, if that is rounded, is the rule's though a root be off by some ulps."""
    if rule.rstd == KEEP:
        return call
    places = settled(rule, call.rows).nonzero()[:, 0]
    return Call(call.rows.of(places), call.stored[places], call.dtype)


def _sure(rule: Rule, name: str) -> bool:
    """Whether a tie there is one whatever an implementation's root is."""
    return name in ("x", "statistics", "weight_offset") or (name in ("hidden", "out") and rule.normed != KEEP)


def _searched(
    rules: tuple[Rule, ...], calls: Sequence[Call], ask: Callable[[Rows], Call], readout: Readout | None
) -> list[Call]:
    found: list[Call] = []
    width = calls[0].rows.width
    for seed in range(SEARCHES):
        if count_votes(rules[0], rules[1], [*calls, *found])[0] >= 2 * TELLING:
            break
        rows = probes.telling_rows(rules, width, seed, readout, probes.LOOKED_AT // 4)  # ties are not that rare
        found += [ask(rows)] if rows is not None else []
    return found
