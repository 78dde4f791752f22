"""A case of the field: what a thread claims, its two sides, how its figure is measured, and when the claim fits.

`before` is what a case's thread holds up as right, `after` what it complains of, whichever came first; differences are
after - before. A side is a cast plan, or a Way where no plan expresses it (the order or the precision of a sum, a
compiler's contraction, an all-reduce). Both sides get the same drawn inputs, of the author's shape and distribution
where the thread gives them. What it leaves open (the weights, the residual's size) is drawn in several set-ups, the
likeliest first.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from castpoint.harness.cases.figures import changes, exponent
from castpoint.harness.runs.environment import one_thread
from castpoint.kernels.plan import CastPlan
from castpoint.variants.catalogue import PLANS
from castpoint.variants.problem import Problem
from castpoint.variants.spec import spec

FACTOR = 1.5
FITS, DIFFERS, DIRECTION, UNDECIDED = "fits", "does not fit", "same direction", "cannot be decided here"


@dataclass(frozen=True)
class Way:
    """One side of a case that no cast plan expresses: its words, and a function of the drawn inputs."""

    words: str
    run: Callable[..., Tensor]


Side = CastPlan | Way
Inputs = dict[str, object]
Draw = Callable[[torch.Generator], list[Inputs]]  # the inputs of every set-up


@dataclass(frozen=True)
class Claim:
    """What a thread says: a row of data/claims.csv, columns as in runs.schema.CaseRow.

    claimed_low and claimed_high hold every number that would be printed as the claimed one. claimed NaN, low and high
    given: a direction, the effect lies between them. All NaN: nothing the lab can measure.
    """

    key: str
    case: int  # its number in the list of cases
    claimed: float
    claimed_low: float
    claimed_high: float
    claimed_text: str
    source: str  # the public threads
    where: str  # the boundary
    measure: str  # what the figure is of, in words
    unit: str
    why: str


def claims_of(table: Iterable[str]) -> dict[str, Claim]:
    """Claims by their keys, from the lines of a CSV table like data/claims.csv: columns are the fields of Claim, and
    `step`, what the last printed digit of a figure counts (0: an exact one), in place of its interval.

    Raises ValueError for a row that has not one cell for each column, TypeError for other columns.
    """
    header, *rows = csv.reader(table)
    claims = {}
    for cells in rows:
        row = dict(zip(header, cells, strict=True))
        key, case = row.pop("key"), int(row.pop("case"))
        numbers = (row.pop(name) for name in ("claimed", "claimed_low", "claimed_high", "step"))
        claimed, low, high, step = (float(number or "nan") for number in numbers)
        if not math.isnan(step):
            low, high = claimed - step / 2, claimed + step / 2
        claims[key] = Claim(key, case, claimed, low, high, **row)
    return claims


CLAIMS = claims_of((Path(__file__).parent / "data/claims.csv").read_text(encoding="utf-8").splitlines())


@dataclass(frozen=True)
class Measured:
    """A case's figure: the median over draws of the first set-up, and 95 % of the draws of any set-up.

    share_differ, max_ulp and signed_bias compare after with before on the first draw: elements that are not equal,
    bf16 ulps of before where it is not 0, and mean error along before's sign over mean |before|. growth is the
    exponent of the figure against calls or layers, fitted in logarithms. NaN: does not apply.
    """

    measured: float = math.nan
    measured_low: float = math.nan
    measured_high: float = math.nan
    share_differ: float = math.nan
    max_ulp: float = math.nan
    signed_bias: float = math.nan
    growth: float = math.nan


def hidden(plan: CastPlan, *, x: Tensor, weight: Tensor, **rest: Any) -> Tensor:
    """The norm's output, `hidden` of the plan's spec, [T, D] float64, of x [T, D] and weight [D], bf16, and whatever
    else of a Problem bears on it: residual, eps, weight_offset."""
    projection = torch.ones(3, x.shape[1], dtype=torch.bfloat16)  # only the norm is read: the least there is
    return spec(plan, Problem(x, weight, projection, num_q_heads=1, num_kv_heads=1, **rest)).hidden


def run_side(side: Side, inputs: Inputs) -> Tensor:
    """One side on the drawn inputs: the Way's function, or the plan's norm output. Float64."""
    return side.run(**inputs) if isinstance(side, Way) else hidden(side, **inputs)


@dataclass(frozen=True)
class Case:
    """How a claim is measured: what moved, what is taken of the two outputs, and on which inputs."""

    claim: Claim
    before: Side
    after: Side
    pick: Callable[[Tensor, Tensor], Tensor | float]  # of the outputs before and after: one number, or one a draw
    draw: Draw
    draws: int = 6
    outputs: bool = True  # False: what the sides return is no output in bf16, so it has no ulps and no share
    run: Callable[[Side, Inputs], Tensor] = run_side  # a side's output of the inputs
    grow: Callable[[Tensor, Tensor], Tensor] | None = None  # what grows, after each call or layer if there are some

    @one_thread()  # many small sums: two took 68 s beside another process, one takes 8
    def measure(self, seed: int = 0) -> Measured:
        """Draws, runs both sides and compares, on one thread. The same seed gives the same figures."""
        rng = torch.Generator().manual_seed(7919 * seed + self.claim.case)
        figures = defaultdict(list)  # by set-up
        for _ in range(self.draws):
            for setup, inputs in enumerate(self.draw(rng)):
                before, after = (self.run(side, inputs) for side in (self.before, self.after))
                if not figures:
                    first = (before, after)
                figures[setup].append(torch.as_tensor(self.pick(before, after), dtype=torch.float64).flatten())
        pooled = [torch.cat(setup) for setup in figures.values()]
        if any(not setup.isfinite().all() or setup.numel() == 0 for setup in pooled):
            raise ValueError("the figure is not a finite number on every draw: are both sides the same?")
        low, high = (extreme(f.quantile(q).item() for f in pooled) for extreme, q in ((min, 0.025), (max, 0.975)))
        growth = exponent(self.grow(*first).abs()) if self.grow else math.nan
        changed = changes(*first) if self.outputs else {}
        return Measured(pooled[0].quantile(0.5).item(), low, high, **changed, growth=growth)


def verdict(found: Measured, claim: Claim) -> str:
    """The rule. NaN stands for what a claim does not have.

    fits            the measured range meets the claimed one, and the figure lies in it or within a factor of 1.5
    does not fit    the ranges are apart
    same direction  a claim without a figure, whose direction the whole measured range has
    cannot be decided here   the claim has nothing the lab measures; or the ranges meet only because the measured one
                    is wide: the figure itself is more than a factor of 1.5 off, or a direction is had by a part of it
    """
    claimed, low, high = claim.claimed, claim.claimed_low, claim.claimed_high
    if math.isnan(low):
        return UNDECIDED
    if found.measured_high < low or found.measured_low > high:
        return DIFFERS
    if math.isnan(claimed):
        return DIRECTION if low < found.measured_low and found.measured_high < high else UNDECIDED
    near = low <= found.measured <= high or (claimed and 1 / FACTOR <= found.measured / claimed <= FACTOR)
    return FITS if near else UNDECIDED


def described(side: Side) -> str:
    """A side in words: a Way's own, a plan's name, or how it departs from the plan nearest to it."""
    if isinstance(side, Way):
        return side.words
    choices = side.choices()
    departs = {
        name: [f"{key}={word}" for key, word in choices.items() if named.plan.choices()[key] != word]
        for name, named in PLANS.items()
    }
    nearest = min(departs, key=lambda name: len(departs[name]))
    return f"{nearest} with {', '.join(departs[nearest])}" if departs[nearest] else nearest
