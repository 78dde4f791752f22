"""What calls of a black box say of the rules: which explains most, which are rejected, which store the same bits.

A rule is rejected where another has more than four times its votes of what tells the two apart, and at least TELLING:
so a few wrong elements, from approximate instructions or noise, decide nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from castpoint.harness.compiled.loading import Fault
from castpoint.harness.fingerprint import probes
from castpoint.harness.fingerprint.rules import Readout, Rows, Rule, factor_of, mean_of_squares, predict, scalar
from castpoint.kernels.plan import KEEP, RNE, RTZ, STORAGE
from castpoint.variants.spec import round_to

# Share of one row or channel that no rule explains, above which the answer is `none`: noise does not gather.
CONCENTRATED = 0.1
TELLING = 6
SEARCHES = 24
ENOUGH = 30  # votes on every pair, after which more would not decide either
MISSES = 8  # searches in a row without a telling one, after which rules count as the same
CONTROLS = 16  # roots next to a boundary of a rounded rstd; if more than an eighth of them are an ulp off, eps is open
CLOSE = 4 * 2.0**-23  # fp32 ulps; the least rounding of the family is 2^-9
SAMPLE = 8  # rows on which all rules are compared, before the nearest are on all


@dataclass(frozen=True, eq=False)
class Call:
    rows: Rows
    stored: Tensor  # what the callable returned for them, in fp32
    dtype: torch.dtype = torch.bfloat16  # in which it returned it

    def share(self, rule: Rule) -> float:
        """shares of one rule."""
        return self.shares([rule]).item()

    def shares(self, rules: Sequence[Rule]) -> Tensor:
        """Share of elements that each rule explains, of those that are not zero whatever the rule; float64. Where fp32
        is stored, up to CLOSE counts as explained: every fp32 ulp would show, which is a matter for later."""
        counted = self.rows.nonzero
        wrong = self.wrong(*rules) & counted
        return 1 - wrong.flatten(1).sum(1).double() / counted.sum().double()

    def wrong(self, *rules: Rule) -> Tensor:
        """Which elements each rule does not explain, bool [rules, R, C]."""
        predicted = torch.stack([predict(rule, self.rows) for rule in rules])
        wrong = predicted != self.stored
        kept = torch.tensor([rule.out == KEEP for rule in rules])
        if kept.any():
            wrong[kept] = (predicted[kept] - self.stored).abs() > CLOSE * self.stored.abs()
        return wrong


def outs(dtype: torch.dtype) -> tuple[str, ...]:
    """The words of the last rounding that what was returned in that dtype leaves open."""
    return (RNE, RTZ) if dtype == torch.bfloat16 else STORAGE


def check_repeats(first: Call, second: Call) -> None:
    """Raises Fault unless both calls, on equal inputs, stored the same; NaN equals NaN."""
    same = (first.stored == second.stored) | (first.stored.isnan() & second.stored.isnan())
    differ = 1 - same.double().mean().item()
    if differ:
        raise Fault(f"the callable is not deterministic: two calls on equal inputs differ in {differ:.3%} of elements")


def mean_shares(rules: Sequence[Rule], calls: Sequence[Call]) -> dict[Rule, float]:
    """Share of elements that each rule explains, mean of the calls."""
    shares = sum(call.shares(rules) for call in calls) / len(calls)
    return dict(zip(rules, shares.tolist(), strict=True))


def count_votes(a: Rule, b: Rule, calls: Sequence[Call]) -> tuple[float, float, float]:
    """What tells the two rules apart, and how much of it the callable stores as a, as b. An element on which they
    differ is one vote; if they differ in the factor of its row, all elements of that variance share one, because an
    implementation's root is right or wrong for all of them at once."""
    votes = torch.zeros(3, dtype=torch.float64)
    for call in calls:
        stored_a, stored_b = predict(a, call.rows), predict(b, call.rows)
        differ = stored_a != stored_b
        counts = torch.stack([differ, differ & (stored_a == call.stored), differ & (stored_b == call.stored)]).sum(-1)
        roots = (factor_of(a, call.rows) != factor_of(b, call.rows)).flatten() & (counts[0] > 0)
        votes += counts[:, ~roots].sum(-1)
        if roots.any():
            number, group = mean_of_squares(a, call.rows).flatten()[roots].unique(return_inverse=True)
            shared = torch.zeros(3, len(number), dtype=torch.float64).index_add(1, group, counts[:, roots].double())
            votes += (shared / shared[0]).sum(-1)
    return tuple(votes.tolist())


def rejects(a: Rule, b: Rule, calls: Sequence[Call]) -> bool:
    """Whether a, by its votes, rejects b."""
    _, as_a, as_b = count_votes(a, b, calls)
    return as_a >= TELLING and as_a > 4 * as_b


def concentrated(wrong: Tensor) -> str:
    """Where wrong [R, C] gathers in one row or column, more than CONCENTRATED of it; empty if nowhere."""
    for name, shares in (("row", wrong.double().mean(1)), ("column", wrong.double().mean(0))):
        if shares.max() > CONCENTRATED:
            return f"they gather in {name} {int(shares.argmax())}, {shares.max():.0%} of it"
    return ""


def settled(rule: Rule, rows: Rows) -> Tensor:
    """Which rows no error of a few fp32 ulps, in the mean or the root, brings to another stored variance or rstd: bool
    [R]. An implementation that divides by 1000 as times 1 / 1000, or whose root is approximate, has such errors."""
    mean = mean_of_squares(rule.replace(variance=KEEP), rows)
    bare = rule.replace(rstd=KEEP, root="rsqrt" if rule.root == "rsqrt" else "sqrt")
    root = scalar(bare, mean_of_squares(rule, rows), rows.eps)
    few = 1 + 2 * CLOSE
    firm = torch.ones(len(rows.x), 1, dtype=torch.bool)
    for value, storage in ((mean.float(), rule.variance), (root, rule.rstd)):
        if storage != KEEP:
            firm &= round_to(value * few, storage) == round_to(value / few, storage)
    return firm[:, 0]


@dataclass(frozen=True)
class Ranking:
    best: Rule
    share: float
    runner_up: float | None  # None if nothing was rejected
    left: list[Rule]  # rules that the best does not reject, itself first
    gathered: str  # where the elements gather that the best does not explain; empty if nowhere


def rank(rules: Sequence[Rule], calls: Sequence[Call]) -> Ranking:
    """All rules on a few rows of each call, then those near the best on all rows."""
    few = [Call(call.rows.first(SAMPLE), call.stored[:SAMPLE], call.dtype) for call in calls]
    rough = mean_shares(rules, few)
    least = max(rough.values()) - 0.1
    near = [rule for rule in rules if rough[rule] > least]
    shares = mean_shares(near, calls)
    ordered = sorted(near, key=lambda rule: -shares[rule])
    best = ordered[0]
    left = [rule for rule in ordered[1:] if not rejects(best, rule, calls)]
    rejected = [shares[rule] for rule in ordered[1:] if rule not in left] or [s for s in rough.values() if s < 1]
    gathered = concentrated(torch.cat([call.wrong(best)[0] for call in calls]))
    return Ranking(best, shares[best], max(rejected, default=None), [best, *left], gathered)


def classes(rules: Sequence[Rule], calls: Sequence[Call]) -> list[list[Rule]]:
    """The rules in groups that store the same bits on all rows of the calls."""
    groups: list[list[Rule]] = []
    for rule in rules:
        group = next((g for g in groups if count_votes(g[0], rule, calls)[0] == 0), None)
        if group is None:
            groups.append([rule])
        else:
            group.append(rule)
    return groups


def refine(
    rules: Sequence[Rule], width: int, calls: list[Call], call: Callable[[Rows], Call], readout: Readout | None = None
) -> tuple[list[list[Rule]], str]:
    """What is left of the rules after calls on searched rows, in groups between which no search found a difference; and
    what makes their eps doubtful, or what was said of the first two groups: an empty text where there is neither."""
    left, misses = list(rules), 0
    for seed in range(SEARCHES):
        if len(left) == 1 or misses == MISSES:
            break
        rows = probes.telling_rows(tuple(left), width, seed, readout)
        if rows is None:
            misses += 1
            continue
        misses = 0
        calls.append(call(rows))
        left = [b for b in left if not any(rejects(a, b, calls) for a in left)]
        if all(count_votes(a, b, calls)[0] >= ENOUGH for i, a in enumerate(left) for b in left[:i]):
            break
    doubt = ""
    if len({rule.eps for rule in left}) < len({rule.eps for rule in rules}) and all(r.rstd != KEEP for r in left):
        doubt = _doubtful_roots(left, width, call, readout)
    if doubt:
        left += [rule for rule in rules if rule not in left and any(rule.replace(eps=r.eps) == r for r in left)]
    groups = classes(left, calls)
    return groups, doubt or _deciding_probe(groups, calls)


def _deciding_probe(groups: list[list[Rule]], calls: Sequence[Call]) -> str:
    """What the deciding probe said of the first two groups."""
    if len(groups) < 2:
        return ""
    differ, first, second = count_votes(groups[0][0], groups[1][0], calls)
    return (
        ". The probe that would decide, rows on which they store different bits, was given: of the "
        f"{differ:g} roots or products that tell the first two apart, {first:.3g} are stored as by the first, "
        f"{second:.3g} as by the second"
    )


def _doubtful_roots(rules: Sequence[Rule], width: int, call: Callable[[Rows], Call], readout: Readout | None) -> str:
    """Whether an implementation's roots are not those of the rules, in words; empty if they are. An ulp of a rounded
    rstd shows at a boundary only, where a root that is off by an ulp looks like another eps."""
    found = [probes.control_rows(rules, width, seed, readout) for seed in range(CONTROLS)]
    controls = [call(rows) for rows in found if rows is not None]
    wrong = sum(all(control.share(rule) < 0.5 for rule in rules) for control in controls)
    if wrong <= len(controls) / 8:
        return ""
    return f". Of {len(controls)} roots next to a boundary of their rounding {wrong} are an fp32 ulp off"
