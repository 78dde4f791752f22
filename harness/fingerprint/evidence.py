"""What calls of a black box say of the rules: which explains most, which are rejected, which store the same bits.

A rule is rejected where another has more than four times its votes of what tells the two apart, and at least TELLING:
so a few wrong elements, from approximate instructions or noise, decide nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from castpoint.harness.compiled.loading import Fault
from castpoint.harness.fingerprint import probes
from castpoint.harness.fingerprint.rules import (
    Readout,
    Rows,
    Rule,
    arithmetic,
    factor_of,
    mean_of_squares,
    predict,
    scalar,
    size_of_terms,
)
from castpoint.harness.fingerprint.searches import CONTROLS, SEARCH, Search
from castpoint.harness.fingerprint.stores import EIGHT_BITS, round_to, storages, ulp
from castpoint.kernels.plan import KEEP

# Share of one row or channel that no rule explains, above which the answer is `none`: noise does not gather.
CONCENTRATED = 0.1
TELLING = 6
ENOUGH = 30  # votes on every pair, after which more would not decide either
MISSES = 8  # searches in a row without a telling one, after which rules count as the same
# Elements that a rule leaves unexplained, above which the answer is `none`. Sums in another order and approximate roots
# change 1e-4 of them, an unlisted rounding to 11 bits (fp16, tf32) 2 %, noise on one element in a thousand 1e-3.
UNEXPLAINED = 0.005
CLOSE = 4 * 2.0**-23  # fp32 ulps; the least rounding of the family is 2^-9
HOPELESS = 32  # rules that are compared with the best where that does not explain half of the elements
SAMPLE = 8  # rows on which all rules are compared, before the nearest are on all


@dataclass(frozen=True, eq=False)
class Call:
    rows: Rows
    stored: Tensor  # what the callable returned for them, in fp32
    dtype: torch.dtype = torch.bfloat16  # in which it returned it

    def share(self, rule: Rule) -> float:
        """Share of elements that the rule explains, of those that are not zero whatever the rule. Where fp32 is stored,
        up to close counts as explained: every fp32 ulp would show, which is a matter for later."""
        return 1 - int((self.wrong(rule) & self.rows.nonzero).sum()) / self.rows.counted

    def wrong(self, rule: Rule) -> Tensor:
        """Which elements the rule does not explain, bool [R, C]."""
        predicted = predict(rule, self.rows)
        wrong = predicted != self.stored
        if rule.out == KEEP:
            wrong &= ~((predicted - self.stored).abs() <= close(self.rows) * self.stored.abs())
        return wrong

    def ulps(self, rule: Rule) -> Tensor:
        """How far each element is from what the rule says, float64 [R, C]: in ulps of bf16 (or fp16) where the rule
        rounds, else in units of close; of an element that is read as a sum, relative to the terms. NaN is infinitely
        far."""
        predicted = predict(rule, self.rows)
        size = torch.maximum(predicted.abs(), self.stored.abs())
        size = torch.maximum(size, size_of_terms(rule, self.rows)).double()
        narrow = rule.out if self.rows.scales is not None else rule.narrow
        unit = ulp(size, narrow) if rounds(rule) else (size * close(self.rows)).clamp(min=2.0**-149)
        far = (predicted.double() - self.stored.double()).abs() / unit
        return far.nan_to_num(nan=float("inf"))


def close(rows: Rows) -> float:
    """The relative error in fp32 that is no rounding of the family: CLOSE where sums are exact, else what adding up one
    after the other may make of them too, the square root of the terms in ulps (eight times what it does on average)."""
    return CLOSE if rows.exact else CLOSE + rows.width**0.5 * 2.0**-23


def rounds(rule: Rule) -> int:
    """How often the rule rounds to bf16 on the way from the mean to the result."""
    words = (rule.variance, rule.rstd, rule.normed, rule.hidden if rule.matmul == "bf16" else KEEP, rule.out)
    return sum(word != KEEP for word in words) if rule.out[:4] not in ("e4m3", "e5m2", "int8") else 1


@dataclass(frozen=True)
class Miss:
    """What a rule leaves unexplained of a call, in elements, of those that are wrong, or not zero whatever the rule:
    false where noise, an approximate root or a sum in another order may be all of it."""

    wrong: int
    of: int
    why: str = ""
    what: str = "elements"

    def __bool__(self) -> bool:
        return self.wrong > 0

    def __str__(self) -> str:
        share = f"{self.wrong / self.of:.2%} of the {self.what} differ"
        share = share if self.wrong > self.of / 10_000 else f"{self.wrong} of {self.of} {self.what} differ"
        return share + (f", {self.why}" if self.why else "")


def missed(rule: Rule, call: Call) -> Miss:
    """What the rule leaves unexplained: too many elements, some that gather in a row or column, or one farther away
    than two ulps for each of its roundings."""
    wrong = call.wrong(rule)
    if not wrong.any():
        return Miss(0, int(call.rows.nonzero.sum()))
    if call.rows.scales is not None:  # where a scale is a share of the largest, products of 8 bits are often ties
        value, few = predict(rule.replace(out=KEEP), call.rows), 2 * close(call.rows)
        for factor in (1 - few, 1 + few):
            wrong &= round_to(value * factor, rule.out) != call.stored
    share = UNEXPLAINED if call.rows.scales is None else UNEXPLAINED / 16  # of a tie of 4 bits so much less comes near
    why = beyond(wrong, call.ulps(rule), 2 * max(rounds(rule), 1), call.stored, predict(rule, call.rows), share)
    return Miss(int(wrong.sum()) if why else 0, int((wrong | call.rows.nonzero).sum()), why.strip())


def least_missed(rule: Rule, calls: Sequence[Call]) -> list[Miss]:
    """What the rule leaves unexplained of each call, however it computes its root; if something is left with every
    root, what is left as it is."""
    as_it_is = [missed(rule, call) for call in calls]
    if any(as_it_is) and not all(any(missed(way, call) for call in calls) for way in arithmetic(rule)):
        return [Miss(0, miss.of) for miss in as_it_is]
    return as_it_is


def by_eps(misses: Sequence[Miss], calls: Sequence[Call]) -> str:
    """What is left unexplained of calls with different eps, in words; empty if nothing."""
    return "; ".join(f"{miss} at eps={c.rows.eps:g}" for miss, c in zip(misses, calls, strict=True) if miss)


def beyond(
    wrong: Tensor, ulps: Tensor, limit: float, stored: Tensor, predicted: Tensor, share: float = UNEXPLAINED
) -> str:
    """Why wrong elements [R, C] cannot be noise, an approximate root or a sum in another order; empty if they can.
    limit: in ulps. share: of elements that may be wrong."""
    far = torch.where(wrong, ulps, 0)
    if far.max() > limit:
        row, column = divmod(int(far.argmax()), far.shape[1])
        is_, has = stored[row, column].item(), predicted[row, column].item()
        return f"row {row} of {len(far)} has {is_:.6g} in column {column} where the plan has {has:.6g}"
    if wrong.sum() > max(TELLING, share * wrong.numel()):
        return " "
    return concentrated(wrong) if len(wrong) >= probes.ROWS else ""


def outs(dtype: torch.dtype, narrow: str = "bf16") -> tuple[str, ...]:
    """The words of the last rounding that what was returned in that dtype leaves open."""
    return EIGHT_BITS.get(dtype) or storages(narrow)[dtype != torch.float32 :]


def check_repeats(first: Call, second: Call) -> None:
    """Raises Fault unless both calls, on equal inputs, stored the same; NaN equals NaN."""
    same = (first.stored == second.stored) | (first.stored.isnan() & second.stored.isnan())
    differ = 1 - same.double().mean().item()
    if differ:
        raise Fault(f"the callable is not deterministic: two calls on equal inputs differ in {differ:.3%} of elements")


def mean_shares(rules: Sequence[Rule], calls: Sequence[Call]) -> dict[Rule, float]:
    """Share of elements that each rule explains, mean of the calls."""
    return {rule: sum(call.share(rule) for call in calls) / len(calls) for rule in rules}


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
    """Where wrong [R, C] gathers in one row or column, more than CONCENTRATED and TELLING of it; empty if nowhere."""
    for name, dim in (("row", 1), ("column", 0)):
        shares = wrong.double().mean(dim)
        if shares.max() > max(CONCENTRATED, TELLING / wrong.shape[dim]):
            return f"they gather in {name} {int(shares.argmax())} of {len(shares)}, {shares.max():.0%} of it"
    return ""


def settled(rule: Rule, rows: Rows) -> Tensor:
    """Which rows no error of a few fp32 ulps, in the mean or the root, brings to another stored variance or rstd, nor
    more than a few of their elements to another result: bool [R]. An implementation that divides by 1000 as times 1 /
    1000, or whose root is approximate, has such errors; where all products are numbers of bf16, truncation shows them
    all."""
    mean = mean_of_squares(rule.replace(variance=KEEP), rows)
    bare = rule.replace(rstd=KEEP, root="rsqrt" if rule.root == "rsqrt" else "sqrt")
    root = scalar(bare, mean_of_squares(rule, rows), rows.eps)
    few = 1 + 2 * close(rows)
    firm = torch.ones(len(rows.x), 1, dtype=torch.bool)
    for value, storage in ((mean.float(), rule.variance), (root, rule.rstd)):
        if storage != KEEP:
            firm &= round_to(value * few, storage) == round_to(value / few, storage)
    low, high = (predict(rule, dataclasses.replace(rows), round_to(root * f, rule.rstd)) for f in (1 / few, few))
    moved = (high - low).abs() > 4 * (few - 1) * high.abs() if rule.out == KEEP else high != low
    return firm[:, 0] & (moved.double().mean(1) < CONCENTRATED / 2)


@dataclass(frozen=True)
class Ranking:
    best: Rule
    share: float
    runner_up: float | None  # None if nothing was rejected
    left: list[Rule]  # rules that the best does not reject, itself first


def rank(rules: Sequence[Rule], calls: Sequence[Call]) -> Ranking:
    """All rules on a few rows of each call, then those near the best, and the best of the others, on all rows."""
    few = [Call(call.rows.first(SAMPLE), call.stored[:SAMPLE], call.dtype) for call in calls]
    rough = mean_shares(rules, few)
    least = max(rough.values()) - 0.1
    far = sorted((rule for rule in rules if rough[rule] <= least), key=rough.__getitem__)[-1:]
    near = [rule for rule in rules if rough[rule] > least] + far
    shares = mean_shares(near, calls)
    ordered = sorted(near, key=lambda rule: -shares[rule])
    best = ordered[0]
    if shares[best] < 0.5:  # none is right
        ordered = ordered[:HOPELESS]
    rejected = {rule: shares[rule] for rule in ordered[1:] if rejects(best, rule, few) or rejects(best, rule, calls)}
    runners_up = rejected.values() or [shares[rule] for rule in far if rule != best]
    left = [rule for rule in ordered if rule not in rejected]
    return Ranking(best, shares[best], max(runners_up, default=None), left)


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
    rules: Sequence[Rule], width: int, calls: list[Call], call: Callable[[Rows], Call], readout: Readout | None = None,
    search: Search = SEARCH,
) -> tuple[list[list[Rule]], str]:  # fmt: skip
    """What is left of the rules after calls on searched rows, in groups between which no search found a difference; and
    what makes their eps doubtful, or what was said of the first two groups: an empty text where there is neither."""
    left, misses = list(rules), 0
    for seed in range(search.searches):
        if len(left) == 1 or misses == MISSES:
            break
        rows = search.telling_rows(left, width, seed, readout)
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
        doubt = _doubtful_roots(left, width, call, readout, search)
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


def _doubtful_roots(
    rules: Sequence[Rule], width: int, call: Callable[[Rows], Call], readout: Readout | None, search: Search
) -> str:
    """Whether an implementation's roots are not those of the rules, in words; empty if they are. An ulp of a rounded
    rstd shows at a boundary only, where a root that is off by an ulp looks like another eps."""
    found = [search.control_rows(rules, width, seed, readout) for seed in range(CONTROLS)]
    controls = [call(rows) for rows in found if rows is not None]
    wrong = sum(all(control.share(rule) < 0.5 for rule in rules) for control in controls)
    if wrong <= len(controls) / 8:
        return ""
    return f". Of {len(controls)} roots next to a boundary of their rounding {wrong} are an fp32 ulp off"
