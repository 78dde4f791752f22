"""Shapley values by their definition."""

import itertools
from collections.abc import Mapping

Game = Mapping[frozenset[str], float]


def over_all_orders(values: Game, names: list[str]) -> dict[str, float]:
    """The definition: what a player adds to those before it, averaged over every order of players."""
    sums = dict.fromkeys(names, 0.0)
    orders = list(itertools.permutations(names))
    for order in orders:
        for place, name in enumerate(order):
            sums[name] += values[frozenset(order[: place + 1])] - values[frozenset(order[:place])]
    return {name: value / len(orders) for name, value in sums.items()}
