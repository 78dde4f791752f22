"""What is no plan, but what a caller must know: whether a row's bits depend on the rows beside it or on gradients,
whether NaN stays seen and subnormal numbers count, and whether x may lie with gaps between its channels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from castpoint.harness.compiled.loading import Fault
from castpoint.harness.fingerprint import probes
from castpoint.harness.fingerprint.blackbox import BlackBox, Refused, Unasked
from castpoint.harness.fingerprint.calls import NormCalls
from castpoint.harness.fingerprint.evidence import Miss, missed, outs
from castpoint.harness.fingerprint.layouts import GAPS
from castpoint.harness.fingerprint.rules import Rows, Rule
from castpoint.harness.fingerprint.stores import round_to, same, storages

COUNTS = (1, 2, 3, 7, 8, 9, 17, 33, 63, 65, 128, 257, 600)
WINDOW = 8  # rows that are asked at least with each count
Stored = Callable[[Tensor, bool], Tensor]  # what is stored of x [T, D], [T, ...], and whether that must be finite
Missing = Callable[[Tensor, str, float], Miss]  # what the plan leaves unexplained of x [T, D], a layout and eps
THE_SAME = "the same"
TINY = 1e-12  # eps that makes a normal number of what is left of a subnormal one


def noted(box: BlackBox, make: Callable[[], dict[str, str]]) -> dict[str, str]:
    """What make says, behind those of the box's manners that its calls alone showed."""
    before = dict(box.manners)
    said = make()
    return {name: text for name, text in box.manners.items() if before.get(name) != text} | said


def all_facts(
    stored: Stored, missing: Missing, x: Tensor, tokens: int | None, narrow: str = "bf16", window: int = WINDOW
) -> dict[str, str]:
    """Each by its name, in words. x [T, D]: rows that stored is asked with, of them so many (window) with each count;
    tokens: of every call, where the kernel takes no other number; narrow: bf16 or fp16."""
    width = x.shape[1]
    return {
        "batch invariant": batch(stored, x, tokens, window),
        "NaN in x": nan(stored, width, tokens),
        "subnormal x": subnormals(missing, width, narrow),
        "gaps between channels": as_it_lies(lambda: missing(_gaussian(probes.ROWS, width), GAPS, probes.EPS_SMALL)),
    }


def batch(stored: Stored, x: Tensor, tokens: int | None = None, window: int = WINDOW) -> str:
    """Whether a row's bits depend on how many rows there are, on its place or on its neighbours. x [T, D]: rows on
    which another order of a sum shows."""
    if tokens == 1:
        return "not asked: every call has one row"
    width, alone = x.shape[1], stored(x, True)
    tried, other = [], []
    for count in () if tokens else COUNTS:
        calls = [(torch.arange(count) + start) % len(x) for start in range(0, window, count)]
        try:
            equal = all([same(stored(x[rows], True), alone[rows]) for rows in calls])  # all are asked, in rounds too
        except Refused:
            continue
        tried.append(f"{count}")
        other += [] if equal else [f"with {count} rows"]
    odd = torch.arange(len(x)) % 2 == 1
    turned, beside, nan = x.roll(7, 0), x.clone(), x.clone()
    beside[odd] = x[odd].roll(1, 0) * 3
    nan[odd] = float("nan")
    for what, given, expected, kept in (
        ("in another place", turned, alone.roll(7, 0), odd | True),
        ("beside other rows", beside, alone, ~odd),
        ("beside rows of NaN", nan, alone, ~odd),
    ):
        equal = same(stored(given, given is not nan)[kept], expected[kept])
        other += [] if equal else [what]
    if other:
        return f"no: a row of {width} has other bits {', '.join(other)} than among {len(x)}"
    counts = f"with {', '.join(tried)} rows, " if tried else ""
    return f"yes, in {len(x)} rows of {width}: the same bits {counts}in another place, beside others and NaN"


def rows_near_a_tie(
    width: int, rng: torch.Generator, count: int, narrow: str = "bf16", tie: float = 0.5
) -> tuple[Tensor, float]:
    """One row [D] in so many orders, and an eps, the same for every width, which leave open whether its normed twos are
    1 or the number below.

    The row's squares add up to the middle between two fp32 numbers, so that two ways to add them differ by an ulp in
    half of the orders; with eps the smaller sum has a root by which they round up, by the larger one's they round down.
    tie: 0.5 of nearest rounding, 0 of truncation. Weights are ones there.
    """
    first = 2048 if narrow == "fp16" else 256
    edge, gap = (first - 1 + tie) / first, 2.0**-12
    sums = edge**-2 + 2.0**-23 * torch.arange(-8, 9).double()
    last = float(sums.float()[sums.float().rsqrt().double() >= edge][-1])  # the largest mean that rounds up
    total = (last - gap + 2.0**-24) * width  # the mean is rounded too, to a multiple of 2^-23
    unit = 2.0 ** (math.floor(math.log2(total)) - 23)
    total = (math.floor(total / unit) + 0.5) * unit
    ones = max(width // 16, 4)
    row = torch.exp(1.5 * torch.randn(width - ones - 4, generator=rng, dtype=torch.float64))
    row *= ((total - ones - width / 64) / row.square().sum()).sqrt()
    row = torch.cat([torch.ones(ones), round_to(row.float(), f"{narrow}-rne")]).double()
    for _ in range(4):  # what is left of the total, nearer each time
        rest = (total - row.square().sum()).sqrt().float()
        row = torch.cat([row, round_to(rest, f"{narrow}-rtz").double()[None]])
    orders = torch.rand(count, width, generator=rng).argsort(1)
    x = row.float()[orders] * (torch.randint(0, 2, [count, width], generator=rng) * 2 - 1)
    return 2 * x, 4 * gap  # twice, so that no result is its x, as if nothing were written in place


def largest(v: Tensor, given: Tensor) -> Tensor:
    """The largest result of each row, or of each part of a row that has a scale of its own, of those that are not zero;
    v: results divided by their scales, given: the scales, [R, D]."""
    parts = torch.cat([torch.zeros(len(v), 1), given.diff(dim=1) != 0], dim=1).cumsum(1).long()
    found = torch.zeros_like(v).scatter_reduce(1, parts, v.abs(), "amax")
    return found[found > 0]


def scales(found: Tensor, most: float) -> str:
    """How large the largest results are beside what 8 bits hold."""
    low, high = (f"{float(end):.3g}" for end in (found.min(), found.max()))
    said = f"the largest result is {low}{'' if low == high else f' to {high}'} times its scale"
    return f"{said}: beyond {most:g} it is cut" if found.max() > 1.1 * most else said


def other_scales(found: Tensor, first: Tensor) -> Miss:
    """Where the largest results are beyond the largest of the first calls, or where those are all alike, others."""
    low, high = first.min() / 1.01, first.max() * 1.01
    wrong = (found > high) | ((found < low) & (high < 1.05 * low))
    far = found[wrong].max() if wrong.any() else 0.0
    why = f"the largest result is {far:.3g} times its scale, at the first calls {first.max():.3g} times"
    return Miss(int(wrong.sum()), len(found), why, "scales")


def nan(stored: Stored, width: int, tokens: int | None = None) -> str:
    """Whether one NaN in a row shows in all that is stored of it."""
    x = _gaussian(tokens or probes.ROWS, width)
    rows = torch.arange(len(x))
    x[rows, rows * 7 % width] = float("nan")
    hidden = ~stored(x, False).isnan()
    return f"hidden: {hidden.sum()} of {hidden.numel()} results are numbers" if hidden.any() else "makes its row NaN"


def subnormals(missing: Missing, width: int, narrow: str) -> str:
    """What rows of numbers below the least normal one, 2^-126 of bf16, 2^-14 of fp16, are taken for."""
    rng = torch.Generator().manual_seed(4)
    most, unit = (1024, 2.0**-24) if narrow == "fp16" else (128, 2.0**-133)
    x = probes.integers(1, most, [probes.ROWS, width], rng) * unit
    miss = missing(x, "contiguous", TINY)
    return f"taken for another number, {miss}" if miss else "counts"


def gradients(box: BlackBox, miss: Callable[[], Miss]) -> str:
    """Whether the plan explains a call with gradients too, as training makes it."""
    if box.way.files:
        return "not asked: a file holds no gradients"
    box.gradients, box.cut_off = True, False
    said = tried(miss)
    box.gradients = False
    return f"{said}, but the result has none" if said == THE_SAME and box.cut_off else said


def tried(ask: Callable[[], Miss]) -> str:
    """What it does at a call that it need not take."""
    try:
        miss = ask()
    except Unasked as why:
        return f"not asked: {why}"
    except Fault as fault:
        return f"refused: {fault}"
    return f"another function, {miss}" if miss else THE_SAME


def as_it_lies(ask: Callable[[], Miss]) -> str:
    """Whether what lies in memory otherwise is read as it lies."""
    try:
        miss = ask()
    except Unasked as why:
        return f"not asked: {why}"
    except Fault as fault:
        return f"refused: {fault}"
    return f"not read as they lie, and not refused: {miss}" if miss else "read as they lie"


def fp32_weights(rule: Rule, rows: Rows, asked: NormCalls, names: dict[str, str]) -> str:
    """What becomes of a norm weight in fp32, which bf16 does not hold: used whole, rounded, or refused; and whether the
    result is stored otherwise then, as where types are promoted. names: the plan's, of the rule's boundaries."""
    rng = torch.Generator().manual_seed(6)
    fine = rows.weight * (1 + 2.0**-7 * torch.rand(rows.weight.shape, generator=rng))
    try:
        call = asked.call(dataclasses.replace(rows, weight=fine), weight_dtype=torch.float32)
    except Refused as refused:
        return f"refused: {refused}"
    words, last = storages(rule.narrow), "out" if rows.scales is None else "hidden"
    lasts = outs(call.dtype, rule.narrow) if rows.scales is None else words
    others = [rule.replace(weight=w, normed=n, **{last: o}) for w in words for n in words for o in lasts]
    best = max(others, key=call.share)
    if miss := missed(best, call):
        return f"another function, the nearest with weight={best.weight}: {miss}"
    return f"weight={best.weight}{_changed(rule, best, ('normed', last), names)}"


def _changed(rule: Rule, best: Rule, boundaries: tuple[str, ...], names: dict[str, str]) -> str:
    """Those of the boundaries at which best is another than rule, in words."""
    changed = (name for name in boundaries if getattr(best, name) != getattr(rule, name))
    return "".join(f", {names.get(name, name)}={getattr(best, name)}" for name in changed)


def fp32_residual(rule: Rule, asked: NormCalls, weight: Tensor, names: dict[str, str]) -> str:
    """What becomes of a residual in fp32, which bf16 does not hold, as of a stream that stays in fp32: which x is
    normed, whether the result is stored otherwise then, and the sum; or that it is refused. names: as of
    fp32_weights."""
    box, rng = asked.box, torch.Generator().manual_seed(7)
    shape = [probes.ROWS, asked.width]
    x, residual = probes.gaussian(shape, rng, box.narrow), torch.randn(shape, generator=rng)
    rows = Rows(x, probes.weight_of_width(weight, asked.width), probes.EPS_SMALL, asked.width, residual, exact=False)
    before, said = (box.residual_dtype, box.sums, dict(box.manners)), ""
    box.residual_dtype = torch.float32
    box.sums = box.new_sums()
    try:
        call = asked.call(rows)
        said = f", x + residual {box.sums}" if box.sums.done else ""
    except Refused as refused:
        return f"refused: {refused}"
    except Fault as fault:
        return f"another function: {str(fault).partition(':')[0]}"
    finally:
        box.residual_dtype, box.sums, box.manners = before
    words = storages(rule.narrow)
    others = [rule.replace(x=x, normed=n, out=o) for x in words for n in words for o in outs(call.dtype, rule.narrow)]
    best = max(others, key=call.share)
    if miss := missed(best, call):
        return f"another function, the nearest with x={best.x}: {miss}"
    return f"x={best.x}{_changed(rule, best, ('normed', 'out'), names)}{said}"


def _gaussian(rows: int, width: int) -> Tensor:
    return probes.gaussian([rows, width], torch.Generator().manual_seed(3))
