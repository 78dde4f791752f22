"""Arms of a whole-model study against eager, text by text: how far apart, how surely, and what would have been seen."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import pandas as pd

LEVEL = 0.05  # of a test, or of all that are taken together
POWER = 0.8  # chance at which a difference counts as one that would have been seen
ENUMERATED = 16  # texts at most whose sets are all listed; of more a sample of as many


@dataclass(frozen=True)
class Difference:
    """Of an arm's column from eager's, over texts: mean, standard error (infinite of one text, NaN both of none), and
    the interval in which the mean may lie. Texts in which either failed are left out."""

    mean: float
    error: float
    low: float
    high: float

    @property
    def apart(self) -> bool:
        return self.low > 0 or self.high < 0

    @property
    def seen_from(self) -> float:
        """The true mean difference whose interval leaves 0 out in 80 % of such samples, the mean taken as normal: half
        of this interval and 0.84 standard errors."""
        return (self.high - self.low) / 2 + NormalDist().inv_cdf(POWER) * self.error


def differences(frame: pd.DataFrame, column: str, arms: Iterable[str]) -> dict[str, Difference]:
    """Of every arm that has rows, with intervals that hold at 95 % for all together that differ at all (Bonferroni)."""
    by_text = frame.pivot(index=["text", "prompt"], columns="arm", values=column)
    pairs = {arm: (by_text[arm] - by_text["eager"]).dropna().to_numpy(float) for arm in arms if arm in by_text}
    level = LEVEL / max(1, sum(values.any() for values in pairs.values()))
    return {arm: _difference(values, level) for arm, values in pairs.items()}


def _difference(values: np.ndarray, level: float) -> Difference:
    if not len(values):
        return Difference(math.nan, math.nan, -math.inf, math.inf)
    if not values.any():
        return Difference(0.0, 0.0, 0.0, 0.0)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Difference(values.mean(), error, *interval(values, level=level))


def interval(values: np.ndarray, over: np.ndarray | None = None, level: float = LEVEL) -> tuple[float, float]:
    """Where the mean of values [n] may lie, or that of values over that of `over` (above 0): all that a sign-flip test
    at that level does not reject.

    Of values - ratio * over it is assumed that they are independent, and each as likely negative. Then the ratios of
    sums over the 2^n - 1 sets of texts split the line into parts that hold the true ratio with equal chance (Hartigan,
    Using subsample values as typical values, JASA 64, 1969). Infinite where n texts cannot reject anything.
    Skewed values are not as likely negative: of 32 exponential ones 95 % are about 92.
    """
    sets = _sets(len(values))
    found = np.sort(sets @ values / (sets.sum(1) if over is None else sets @ over))
    beyond = math.floor((len(found) + 1) * level / 2)
    return (found[beyond - 1], found[-beyond]) if beyond else (-math.inf, math.inf)


def least_chance(texts: int) -> float:
    """The least p that the sign-flip test behind interval can give of so many texts."""
    return 2.0 ** (1 - min(texts, ENUMERATED))


@functools.cache
def _sets(count: int) -> np.ndarray:
    """Sets of count texts but the empty one, [sets, count] of 0 and 1."""
    if count <= ENUMERATED:
        return (np.arange(1, 2**count)[:, None] >> np.arange(count) & 1).astype(float)
    drawn = np.random.default_rng(0).integers(0, 2, (2**ENUMERATED - 1, count)).astype(float)
    return drawn[drawn.any(1)]


def correlation(a: pd.Series, b: pd.Series, level: float = LEVEL) -> tuple[float, float, float]:
    """Pearson's, and where it may lie, by Fisher's z, if its pairs were independent; -1 to 1 of three or fewer."""
    found = a.corr(b)
    if len(a) <= 3:
        return found, -1.0, 1.0
    width = NormalDist().inv_cdf(1 - level / 2) / math.sqrt(len(a) - 3)
    at = np.arctanh(np.clip(found, -1, 1))
    return found, np.tanh(at - width), np.tanh(at + width)


def given_depth(table: pd.DataFrame, column: str, level: float = LEVEL) -> tuple[float, float, float]:
    """Partial rank correlation of the column with the largest K-norm weight, the layer's number held fixed, and where
    it may lie if layers were independent draws.

    By Fisher's z, whose variance for ranks is 1.06 / (n - 3) (Fieller, Hartley & Pearson, Biometrika 44, 1957), one
    layer less for what is held fixed. From -1 to 1 of four layers or fewer.
    """
    ranks = table[["largest K-norm weight", column, "layer"]].rank().corr().to_numpy()
    xy, xz, yz = ranks[0, 1], ranks[0, 2], ranks[1, 2]
    found = (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))
    if len(table) <= 4:
        return found, -1.0, 1.0
    width = NormalDist().inv_cdf(1 - level / 2) * math.sqrt(1.06 / (len(table) - 4))
    at = np.arctanh(np.clip(found, -1, 1))
    return found, np.tanh(at - width), np.tanh(at + width)
