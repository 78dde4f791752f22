"""Arms of a whole-model study against eager, text by text: how far apart, and whether that may be chance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Difference:
    """Of an arm's column from eager's, over texts: mean, standard error (infinite of one text), and chance.

    Texts in which either failed are left out.

    chance: share of all ways to choose the texts' signs whose mean is as far from 0 (an exact sign-flip test; of more
    than 16 texts a sample of 2^16 ways). It assumes of the differences only that they would be as likely negative.
    """

    mean: float
    error: float
    chance: float


def difference(frame: pd.DataFrame, column: str, arm: str) -> Difference:
    by_text = frame.pivot(index=["text", "prompt"], columns="arm", values=column)
    pairs = (by_text[arm] - by_text["eager"]).dropna().to_numpy(float)
    if not len(pairs):
        return Difference(0.0, math.inf, 1.0)
    ways = 2 ** min(len(pairs), 16)
    signs = 1 - 2 * (np.arange(ways)[:, None] >> np.arange(len(pairs)) & 1)
    if len(pairs) > 16:
        signs = np.random.default_rng(0).choice([-1, 1], (ways, len(pairs)))
    chance = (np.abs(signs @ pairs) >= abs(pairs.sum()) * (1 - 1e-12)).mean()
    error = pairs.std(ddof=1) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.inf
    return Difference(pairs.mean(), error, chance)


def told_apart(found: dict[str, Difference]) -> list[str]:
    """Arms that differ from eager at the level of 5 % for all of them together (Bonferroni)."""
    moved = {arm: d for arm, d in found.items() if d.mean}
    return [arm for arm, d in moved.items() if d.chance * len(moved) < 0.05]


def given_depth(table: pd.DataFrame, column: str) -> float:
    """Partial rank correlation of the column with the largest K-norm weight, the layer's number held fixed."""
    ranks = table[["largest K-norm weight", column, "layer"]].rank().corr().to_numpy()
    xy, xz, yz = ranks[0, 1], ranks[0, 2], ranks[1, 2]
    return (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))
