"""Rows that make a fingerprint exact: every sum in them is exact in fp32, in any order and any block size.

Values are small integers times a power of two, so squares and sums of squares fit into 24 bits. Differences of one
fp32 ulp are found where they show: rows are searched for, on which two rules store different bits.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from castpoint.harness.fingerprint.rules import (
    Readout,
    Rows,
    Rule,
    mean_of_squares,
    means_agree,
    predict,
    scalar,
    scaled,
    two_step,
)
from castpoint.harness.fingerprint.stores import round_to
from castpoint.kernels.plan import KEEP

ROWS = 64  # of every call, so that a callable that compiles for a shape compiles once
EPS_SMALL, EPS_LARGE = 1e-6, 0.7  # the second weighs as much as the variance, and is no fp32 number
VARYING = 8  # channels whose sizes change from row to row of the pool that is searched; the others change places
POOL = 1 << 17
FINE = 3  # channels of 12 bits, 2048 to 2100
EPS_TRIED, BOUNDARIES = 32, 1 << 12
LOOKED_AT = 1 << 14  # rows of the pool whose elements are compared
# bf16 w of 2^-16 to 2^-4: 1 + w has 11 to 24 bits, so that products of three factors are not exact in fp32.
FINE_WEIGHTS = (
    torch.arange(128, 256) * 2.0 ** torch.arange(-23, -11)[:, None] * torch.tensor([1, -1])[:, None, None]
).flatten()


def integers(low: int, high: int, shape: Sequence[int], rng: torch.Generator) -> Tensor:
    """Integers in [low, high) of random sign, float32."""
    signs = torch.randint(0, 2, list(shape), generator=rng) * 2 - 1
    return (torch.randint(low, high, list(shape), generator=rng) * signs).float()


def filled(width: int) -> int:
    """How many channels hold numbers of 8 bits, so that the sum of their squares has 24; the others are zero, and left
    out of the rows."""
    return min(width, 256)


def norm_weight(width: int, rng: torch.Generator) -> Tensor:
    """[width] bf16 values in fp32, as stored: 0.001 to 100 in size, so that 1 + w needs up to 18 bits."""
    size = 10 ** (5 * torch.rand(width, generator=rng, dtype=torch.float64) - 3)
    return round_to((size * (torch.randint(0, 2, [width], generator=rng) * 2 - 1)).float(), "bf16-rne")


def weight_of_width(first: Tensor, width: int) -> Tensor:
    """[width] as stored: the first ones of that weight, and others behind them."""
    more = norm_weight(max(width - len(first), 0), torch.Generator().manual_seed(width))
    return torch.cat([first, more])[:width]


def norm_rows(
    width: int, rng: torch.Generator, *, residual: bool = False, count: int = ROWS, narrow: str = "bf16"
) -> Rows:
    """General rows, eps EPS_SMALL. A third are made of numbers whose squares narrow rounds up, a third down, for the
    statistics; with a residual, x + residual has 9 bits, one too many for bf16, in 64 channels, or 12 bits in FINE
    channels, which is what fp16 cannot hold, and 24 bits can of the sum of squares."""
    held = filled(width)
    if residual and narrow == "fp16":
        x, rest = integers(1, 64, [count, held], rng), torch.zeros(count, held)
        fine = torch.rand(count, held, generator=rng).argsort(1)[:, :FINE]
        x.scatter_(1, fine, 2 * integers(1024, 1045, [count, FINE], rng))
        rest.scatter_(1, fine, 2 * integers(0, 4, [count, FINE], rng).abs() + 1)
        scale = 2.0 ** torch.randint(-12, -5, [count, 1], generator=rng)
        return Rows(x * scale, norm_weight(held, rng), EPS_SMALL, width, rest * scale)
    if residual:
        x, rest = 2 * integers(128, 256, [count, held], rng), integers(1, 64, [count, held], rng)
        places = torch.rand(count, held, generator=rng).argsort(1) < min(64, held)
        rest = torch.where((x + rest).abs() < 512, rest, -rest)
        scale = 2.0 ** torch.randint(-12, -2, [count, 1], generator=rng)
        return Rows(x * places * scale, norm_weight(held, rng), EPS_SMALL, width, rest * places * scale)
    numbers = torch.arange(64, 256).float()
    error = (round_to(numbers.square(), f"{narrow}-rne") - numbers.square()) / numbers.square()
    kinds = itertools.cycle([numbers, numbers[error.argsort()[:16]], numbers[error.argsort()[-16:]]])
    chosen = [kind[torch.randint(0, len(kind), [held], generator=rng)] for kind in itertools.islice(kinds, count)]
    signs = torch.randint(0, 2, [count, held], generator=rng) * 2 - 1
    scale = 2.0 ** torch.randint(-10, 0, [count, 1], generator=rng)
    return Rows(torch.stack(chosen) * signs * scale, norm_weight(held, rng), EPS_SMALL, width)


@functools.lru_cache(maxsize=3)  # some hundred MB each, with what rules predict of them
def _first_rows(width: int, residual: bool, columns: int, narrow: str) -> tuple[Rows, Tensor]:
    rng = torch.Generator().manual_seed(0)
    rows = norm_rows(width, rng, residual=residual, narrow=narrow)
    return dataclasses.replace(rows, readout=general_readout(rng, width, columns) if columns else None), rng.get_state()


def first_rows(width: int, *, residual: bool, columns: int = 0, narrow: str = "bf16") -> tuple[Rows, torch.Generator]:
    """The general rows that every fingerprint begins with, read through so many columns or not, and the generator that
    drew them. What thousands of rules predict of them is remembered with them."""
    rows, state = _first_rows(width, residual, columns, narrow)
    rng = torch.Generator()
    rng.set_state(state)
    return rows, rng


def gaussian(shape: Sequence[int], rng: torch.Generator, dtype: str = "bf16", scale: float = 1.0) -> Tensor:
    """Gaussian values of that dtype and standard deviation, in fp32."""
    drawn = scale * torch.randn(list(shape), generator=rng, dtype=torch.float64)
    return round_to(drawn.float(), KEEP if dtype == "fp32" else f"{dtype}-rne")


@functools.lru_cache(maxsize=64)
def telling_rows(
    rules: tuple[Rule, ...], width: int, seed: int, readout: Readout | None = None, looked_at: int = LOOKED_AT
) -> Rows | None:
    """ROWS rows on which the rules store different bits, or None if the search finds no such row.

    Rows of the pool share the values of all channels but VARYING, and each has the first so many of those: a rounded
    variance has few values, of which such rows take most. Only rows are used on which 1 / sqrt in one rounding and in
    two agree, so that it does not matter how an implementation computes it. Every seed has an eps near EPS_LARGE; where
    variance and normed are rounded, so that few pairs of them are left, the best of EPS_TRIED. Where rstd is rounded
    every other seed gives _boundary_rows, and those between _order_rows where an order is in question. The search takes
    longer than the call it is for, and is the same for the same rules, so the latest are kept.
    """
    rng = torch.Generator().manual_seed(seed)
    if all(rule.rstd != KEEP for rule in rules):
        if seed % 2 == 0:
            rows = _boundary_rows(rules, width, rng)
            return rows and dataclasses.replace(rows, readout=readout)
        if len({rule.order for rule in rules}) > 1:
            return _order_rows(rules, width, rng, readout)
    several = EPS_LARGE * 2 ** (2 * torch.rand(EPS_TRIED, generator=rng, dtype=torch.float64) - 1)
    few = all(KEEP not in (rule.variance, rule.normed) for rule in rules)
    eps = max(several.tolist(), key=lambda eps: _telling_pairs(rules, eps)) if few else several[0].item()
    shared = integers(64, 256, [filled(width) - VARYING], rng) / 64
    varying = torch.randint(64, 256, [POOL, VARYING], generator=rng).float() / 64
    scale = 2.0 ** torch.randint(-3, 4, [POOL, 1], generator=rng)
    count = torch.randint(len(shared) // 4, len(shared) + 1, [POOL, 1], generator=rng)
    agree, differ = _factors(rules, shared, count.flatten(), varying, scale.flatten(), width, eps)
    order = (agree.long() * (1 + differ.long())).argsort(descending=True, stable=True)[:looked_at]
    order = order[agree[order]]
    held = torch.where(torch.arange(len(shared)) < count[order], shared, 0)
    turned = (torch.arange(len(shared)) + torch.arange(len(order))[:, None]) % len(shared)
    held = held.gather(1, turned)  # each row meets the weights otherwise
    x = torch.cat([varying[order], held], dim=1) * scale[order]
    rows = Rows(x, norm_weight(filled(width), rng), eps, width, readout=readout)
    stored = [predict(rule, rows) for rule in rules]
    counts = [(stored[i] != stored[j]).sum(1, dtype=torch.int32) for i in range(len(rules)) for j in range(i)]
    chosen = _most_telling(counts)
    if not len(chosen):
        return None
    others = torch.arange(len(x))
    chosen = torch.cat([chosen, others[~torch.isin(others, chosen)]])[:ROWS]
    return dataclasses.replace(rows, x=x[chosen])


def _telling_pairs(rules: Sequence[Rule], eps: float) -> int:
    """Pairs of a bf16 variance, 2^-6 to 2^7, and a bf16 value of which two rules store another normed."""
    variance = (torch.arange(128, 256)[:, None] * 2.0 ** torch.arange(-13, 0)).double().reshape(-1, 1)
    factors = torch.stack([scalar(rule, variance, eps) for rule in rules])
    told = (factors == torch.stack([two_step(rule, variance, eps) for rule in rules])).all(0)
    if len({(rule.root == "sqrt", rule.normed) for rule in rules}) == 1:  # then only another factor tells
        told &= (factors != factors[0]).any(0)
    values, chosen = torch.arange(128, 256).float(), told.flatten()
    normed = [
        round_to(scaled(rule, values, factor[chosen]), rule.normed) for rule, factor in zip(rules, factors, strict=True)
    ]
    return int(torch.stack([other != normed[0] for other in normed]).any(0).sum())


def _boundary_rows(rules: Sequence[Rule], width: int, rng: torch.Generator) -> Rows | None:
    """One row in ROWS orders, with an eps that brings variance + eps so near a boundary of rstd's rounding that two
    rules store another rstd; None if none was found."""
    pool, eps, factors, agree = _near_boundaries(rules, width, rng, BOUNDARIES, 1.0)
    differ = sum((a != b).long() for i, a in enumerate(factors) for b in factors[:i]) * agree
    return _in_orders(pool, eps, int(differ.argmax()), rng) if differ.any() else None


def control_rows(rules: Sequence[Rule], width: int, seed: int, readout: Readout | None = None) -> Rows | None:
    """One row in ROWS orders, of which all rules, whose rstd is rounded, store the same rstd, and a root that is an
    fp32 ulp off another: so it shows whether an implementation's roots are what the rules say. None if none was found.
    """
    rng = torch.Generator().manual_seed(seed)
    pool, eps, factors, agree = _near_boundaries(rules, width, rng, 4 * ROWS, 4.0)
    rule = rules[0].replace(rstd=KEEP, root="rsqrt" if rules[0].root == "rsqrt" else "sqrt")
    root = scalar(rule, mean_of_squares(rules[0], pool), eps)
    beside = [torch.nextafter(root, root * far) for far in (0.5, 2.0)]
    critical = sum((round_to(near, rules[0].rstd) != round_to(root, rules[0].rstd)).long() for near in beside)
    critical *= agree & torch.stack([factor == factors[0] for factor in factors]).all(0)
    rows = _in_orders(pool, eps, int(critical.argmax()), rng) if critical.any() else None
    return rows and dataclasses.replace(rows, readout=readout)


def _near_boundaries(
    rules: Sequence[Rule], width: int, rng: torch.Generator, count: int, ulps: float
) -> tuple[Rows, Tensor, list[Tensor], Tensor]:
    """So many rows, an eps for each that brings its root to about so many ulps from a boundary of rstd's rounding, the
    factor by each rule, and whether one and two roundings of the root agree for all of them; [count, 1]."""
    x = integers(64, 256, [count, filled(width)], rng) / 128
    pool = Rows(x, norm_weight(filled(width), rng), EPS_LARGE, width)
    variances = [mean_of_squares(rule, pool) for rule in rules]
    first = 1024 if rules[0].narrow == "fp16" else 128
    boundary = torch.randint(first, 2 * first, [count, 1], generator=rng) + (
        0.0 if rules[0].rstd[-4:] == "-rtz" else 0.5
    )
    root = boundary.double() / first if rules[0].root != "rsqrt" else 2 * first / boundary.double()
    off = ulps * torch.randn([count, 1], generator=rng, dtype=torch.float64)
    eps = root.square() * (1 + off * 2.0**-24) - variances[0]
    factors = [scalar(rule, variance, eps) for rule, variance in zip(rules, variances, strict=True)]
    agree = (eps > EPS_LARGE / 4) & (eps < 4 * EPS_LARGE) & means_agree(rules[0], pool)
    for rule, variance, factor in zip(rules, variances, factors, strict=True):
        agree &= factor == two_step(rule, variance, eps)
    return pool, eps, factors, agree


def _in_orders(pool: Rows, eps: Tensor, place: int, rng: torch.Generator) -> Rows:
    """That row of the pool in ROWS orders of its channels, with its eps."""
    orders = torch.rand(ROWS, pool.x.shape[1], generator=rng).argsort(1)
    return dataclasses.replace(pool, x=pool.x[place][orders], eps=eps[place].item())


def _order_rows(rules: Sequence[Rule], width: int, rng: torch.Generator, readout: Readout | None) -> Rows | None:
    """Rows on which products of the same three factors, taken in another order, are stored as other bits; None if none
    was found.

    Where rstd is rounded, orders differ by an fp32 ulp, which bf16 shows of one product in thousands. So all values are
    tried with FINE_WEIGHTS and each row's rstd, and what tells two rules apart gets a column of its own.
    """
    held = filled(width)
    x = torch.zeros(ROWS, held)
    for row in x:  # in another number of channels each, so that their rstd differ
        places = torch.randperm(held, generator=rng)[: int(torch.randint(held // 4, held, [1], generator=rng))]
        row[places] = integers(128, 256, [len(places)], rng) / 128
    rows = Rows(x, norm_weight(held, rng), EPS_LARGE, width, readout=readout)
    factors = torch.stack([scalar(rule, mean_of_squares(rule, rows), EPS_LARGE) for rule in rules])  # [rules, ROWS, 1]
    values = torch.arange(128, 256).float() / 128
    pairs = Rows(values.repeat_interleave(len(FINE_WEIGHTS))[None], FINE_WEIGHTS.repeat(128)[None], EPS_LARGE, width)
    if readout is not None:
        every, zero = torch.arange(pairs.x.shape[1]), torch.zeros(pairs.x.shape[1])
        pairs = dataclasses.replace(pairs, readout=Readout(every, zero + 1, every, zero))
    columns = torch.randperm(held if readout is None else min(held, len(readout.channel)), generator=rng)
    found = False
    for row, factor, own in zip(x, factors.unbind(1), columns.tensor_split(ROWS), strict=True):
        free = own.tolist()
        if (factor != factor[0]).any():
            continue
        pairs = dataclasses.replace(pairs)  # what it remembers is of another row's rstd
        stored = [predict(rule, pairs, factor[:1]) for rule in rules]
        telling = torch.cat([other != stored[0] for other in stored]).any(0).nonzero()[:, 0]
        placed: list[int] = []
        for pair in telling[torch.randperm(len(telling), generator=rng)].tolist():
            if not free:
                break
            places = [p for p in (row.abs() == pairs.x[0, pair]).nonzero()[:, 0].tolist() if p not in placed]
            if places:
                placed.append(free.pop())
                row[[placed[-1], places[0]]] = row[[places[0], placed[-1]]]
                rows.weight[placed[-1]] = pairs.weight[0, pair]
                found = True
    return dataclasses.replace(rows, x=x) if found else None


def _factors(
    rules: Sequence[Rule], shared: Tensor, count: Tensor, varying: Tensor, scale: Tensor, width: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Of each row of the pool: do one and two roundings of 1 / sqrt agree, and do factors of the same root differ?"""
    agree = torch.ones(len(varying), dtype=torch.bool)
    differ = torch.zeros(len(varying), dtype=torch.bool)
    factors: dict[str, Tensor] = {}
    for rule in rules:
        held, free = (round_to(part.square(), rule.statistics).double() for part in (shared, varying))
        total = held.cumsum(0)[count - 1] + free.sum(-1)
        total = total * scale**2
        agree &= (total / width).float() == total.float() * torch.tensor(1 / width)
        variance = round_to((total / width).float(), rule.variance).double()
        factor = scalar(rule, variance, eps)
        agree &= factor == two_step(rule, variance, eps)
        differ |= factors.setdefault(rule.root, factor) != factor
    return agree, differ


def _most_telling(counts: list[Tensor]) -> Tensor:
    """Rows with the most differing elements, taken from each pair of rules in turn; at most ROWS."""
    best = [count.argsort(descending=True, stable=True)[: int((count > 0).sum())] for count in counts]
    chosen: list[int] = []
    for place in range(ROWS):
        for rows in best:
            if place < len(rows) and int(rows[place]) not in chosen:
                chosen.append(int(rows[place]))
    return torch.tensor(chosen[:ROWS], dtype=torch.long)


# ---------------------------------------------------------------- the whole chain

HEAD_DIM = 128  # of a head norm
WIDTH = 256  # of the residual stream
READ = 16  # channels of a head that are not zero: 10-bit numbers, whose squares' sum has 24 bits


def general_readout(rng: torch.Generator, width: int, columns: int, *, bias: bool = False) -> Readout:
    """A third of the columns read one channel as it is, a third one channel times 8 bits, a third two channels."""
    channel, other = (torch.randint(0, filled(width), [columns], generator=rng) for _ in range(2))
    other = torch.where(other == channel, (other + 1) % filled(width), other)
    first = 2.0 ** torch.randint(-2, 3, [columns], generator=rng)
    second = 2.0 ** torch.randint(-4, 1, [columns], generator=rng)
    third = columns // 3
    first[:third] = integers(129, 256, [third], rng) / 128
    second[: 2 * third] = 0
    values = integers(129, 256, [columns], rng) / 128 if bias else None
    return Readout(channel, first, other, second, values)


@functools.cache
def identity_readout(columns: int, width: int) -> Readout:
    """So many columns, which read the first channels as they are."""
    channel, zero = torch.arange(columns) % filled(width), torch.zeros(columns)
    return Readout(channel, zero + 1, channel, zero)


def cancelling_rows(rule: Rule, width: int, columns: int, rng: torch.Generator) -> Rows:
    """Rows whose readout takes differences of nearly equal hidden values, 2^-14 to 2^-11 of them: the low bits of the
    matmul's operand, which no single value stored as bf16 shows. On all of them one and two roundings of the rule's
    1 / sqrt agree, since a difference would show here."""
    pairs = min(columns, filled(width)) // 2
    a, wa, b = torch.randint(129, 256, [3, 1 << 20], generator=rng).double()
    wb = (a * wa / b).round()
    difference = (a * wa / (b * wb) - 1).abs()
    good = ((difference > 2.0**-14) & (difference < 2.0**-11) & (wb > 128) & (wb < 256)).nonzero()[:pairs, 0]
    channel = torch.arange(0, 2 * pairs, 2)
    x = integers(64, 256, [4 * ROWS, filled(width)], rng)
    signs = x[:, : 2 * pairs : 2].sign()
    x[:, channel], x[:, channel + 1] = signs * a[good].float(), signs * b[good].float()
    weight = integers(129, 256, [filled(width)], rng)
    weight[channel], weight[channel + 1] = wa[good].float(), wb[good].float()
    read = channel[torch.arange(columns) % pairs]
    ones = torch.ones(columns)
    stored = weight if rule.weight_offset == "none" else weight - 1
    rows = Rows(x / 64, stored, EPS_SMALL, width, readout=Readout(read, ones, read + 1, -ones))
    variance = mean_of_squares(rule, rows)
    agree = scalar(rule, variance, EPS_SMALL) == two_step(rule, variance, EPS_SMALL)
    agree &= means_agree(rule, rows)
    return rows.of(agree.flatten().nonzero()[:ROWS, 0])
