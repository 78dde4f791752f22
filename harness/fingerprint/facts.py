"""What is no plan, but what a caller must know: whether a row's bits depend on the rows beside it, whether subnormal
numbers count, and whether x may lie with gaps between its channels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from castpoint.harness.compiled.loading import Fault
from castpoint.harness.fingerprint import probes
from castpoint.harness.fingerprint.blackbox import Refused
from castpoint.harness.fingerprint.evidence import Miss

COUNTS = (1, 2, 3, 8, 17, 33, 63, 65, 128, 257, 600)
WINDOW = 8  # rows that are asked at least with each count
Stored = Callable[[Tensor, bool], Tensor]  # what is stored of x [T, D], [T, ...], and whether that must be finite
Missing = Callable[[Tensor, str, float], Miss]  # what the plan leaves unexplained of x [T, D], a layout and eps
TINY = 1e-12  # eps that makes a normal number of what is left of a subnormal one


def all_facts(stored: Stored, missing: Missing, width: int, tokens: int | None) -> dict[str, str]:
    """Each by its name, in words. tokens: of every call, where the kernel takes no other number."""
    return {
        "batch invariant": batch(stored, width, tokens),
        "subnormal x": subnormals(missing, width),
        "gaps between channels": gaps(missing, width),
    }


def batch(stored: Stored, width: int, tokens: int | None = None) -> str:
    """Whether a row's bits depend on how many rows there are, on its place or on its neighbours."""
    if tokens == 1:
        return "not asked: every call has one row"
    x = _gaussian(tokens or probes.ROWS, width)
    alone = stored(x, True)
    tried, other = [], []
    for count in () if tokens else COUNTS:
        calls = [(torch.arange(count) + start) % len(x) for start in range(0, WINDOW, count)]
        try:
            same = all(_same(stored(x[rows], True), alone[rows]) for rows in calls)
        except Refused:
            continue
        tried.append(f"{count}")
        other += [] if same else [f"with {count} rows"]
    odd = torch.arange(len(x)) % 2 == 1
    turned, beside, nan = x.roll(7, 0), x.clone(), x.clone()
    beside[odd] = x[odd].roll(1, 0) * 3
    nan[odd] = float("nan")
    for what, given, expected, kept in (
        ("in another place", turned, alone.roll(7, 0), odd | True),
        ("beside other rows", beside, alone, ~odd),
        ("beside rows of NaN", nan, alone, ~odd),
    ):
        same = _same(stored(given, given is not nan)[kept], expected[kept])
        other += [] if same else [what]
    if other:
        return f"no: a row of {width} has other bits {', '.join(other)} than among {len(x)}"
    counts = f"with {', '.join(tried)} rows, " if tried else ""
    return f"yes: a row of {width} has the same bits {counts}in another place, beside others and NaN"


def subnormals(missing: Missing, width: int) -> str:
    """What rows of numbers below 2^-126, the least normal one of bf16, are taken for."""
    rng = torch.Generator().manual_seed(4)
    x = probes.integers(1, 128, [probes.ROWS, width], rng) * 2.0**-133
    miss = missing(x, "contiguous", TINY)
    return f"taken for another number, {miss}" if miss else "counts"


def gaps(missing: Missing, width: int) -> str:
    """Whether x whose last stride is two is read as it lies."""
    try:
        miss = missing(_gaussian(probes.ROWS, width), "channels apart", probes.EPS_SMALL)
    except Fault as fault:
        return f"refused: {fault}"
    return f"not read as they lie, and not refused: {miss}" if miss else "read as they lie"


def _gaussian(rows: int, width: int) -> Tensor:
    return probes.gaussian([rows, width], torch.Generator().manual_seed(3))


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(nan=7e37), b.nan_to_num(nan=7e37))
