"""Figures of the verdicts on claims, each computed a second time by plain code from its definition in words."""

import numpy as np
import pytest
from plain_k_norm import amplified
from test_published import agree, published, values_of

from castpoint.harness.problems.drawn import synthetic_problem

DRAWN, DRAWN_LAYERS, DRAWN_TOKENS = "qwen3-0.6b's shape, drawn", 28, 64


def over_samples(row, values):
    """A row's median, least and greatest over so many samples, all to its printed digits."""
    assert int(row["samples"]) == len(values)
    own = {"measured": np.median(values), "measured_low": min(values), "measured_high": max(values)}
    for column, value in own.items():
        assert agree(row[column], value), (row["what"], column)


# ---------------------------------------------------------------- C3


def given_of(problem):
    offset = problem.weight_offset
    return values_of(problem) | {
        "num_q_heads": problem.num_q_heads,
        "num_kv_heads": problem.num_kv_heads,
        "eps": problem.eps,
        "weight_offset": offset,
    }


def test_c3_drawn_layers():
    """Every figure of what the K norm makes of a cast behind the matmul, over all layers of the drawn model."""
    found = published("claim_figures", claim="C3", cause=DRAWN)
    layers = [amplified(given_of(synthetic_problem(layer=n, tokens=DRAWN_TOKENS))) for n in range(DRAWN_LAYERS)]
    assert {row["what"] for row in found} == set(layers[0])
    for row in found:
        over_samples(row, [layer[row["what"]] for layer in layers])
