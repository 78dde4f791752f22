"""Figures of cases of the field, within one norm and of sums and products, again in NumPy on what each case draws."""

import csv
import math
from functools import cache
from pathlib import Path

import numpy as np
import plain_elementwise as wise
import plain_norm as norms
import pytest
import torch
from plain_chain import fp32
from plain_norm import bf16, bf16_truncated, norm

from castpoint.harness.cases.inputs import normal
from castpoint.harness.cases.run import MEASURED
from castpoint.harness.problems.drawn import standard_normal

RESULTS = Path(__file__).parents[2] / "results" / "cpu"


def relative(a, b):
    return np.abs(b - a)[a != 0] / np.abs(a)[a != 0]


def in_256ths(a, b):
    return 256 * relative(a, b).mean()


def largest_relative(a, b):
    return relative(a, b).max()


def relative_l1(a, b):
    return np.abs(b - a).mean() / np.abs(a).mean()


def largest(a, b):
    return np.abs(b - a).max()


def differ(a, b):
    return np.mean(a != b)


def differ_in_rows(a, b):
    return np.mean(a != b, -1)


def outlier_ratio(a, b):
    """rms relative error of every other token, which has an outlier, over that of the rest."""
    error = (b / a - 1) ** 2
    return np.sqrt(error[1::2].mean() / error[::2].mean())


TWO, ONE, NONE = norm("normed hidden"), norm("hidden"), norm("")
OFFSETS = norm("offset hidden"), norm("offset offset_bf16 hidden")
ONCE, IN_GROUPS = norms.norm_of(norms.exact_sum), [norms.norm_of(norms.groups_in_fp32(n)) for n in (1, 128)]
RSTDS = norms.rstd_of(norms.exact_sum), norms.rstd_of(norms.lanes(bf16))
NEAREST, TRUNCATED = (norms.norm_of(norms.lanes(s), s, s, s) for s in (bf16, bf16_truncated))
RANKS = wise.reduced(bf16), wise.reduced(fp32)
SUMS = wise.summed(bf16), wise.summed(bf16_truncated)
ROPE = wise.two_products(fp32, fp32)
CASES = {
    "llada-largest": (TWO, ONE, largest),
    "llada-mean": (TWO, ONE, lambda a, b: np.abs(b - a).mean()),
    "fp8-codes": (norms.fp8_of(ONE), norms.fp8_of(NONE), differ),
    "published-weights": (TWO, ONE, differ),
    "row-of-4096": (TWO, ONE, differ_in_rows),
    "offset-scale": (norms.scale(["offset"]), norms.scale(["offset", "offset_bf16"]), largest_relative),
    "offset-large": (*OFFSETS, differ),
    "eps-fp64": (norms.eps_in_fp32, norms.eps_in_fp64, differ),
    "inner-rounding": (TWO, ONE, differ),
    "bf16-variance": (NONE, norm("statistics variance hidden"), in_256ths),
    "bf16-output": (NONE, ONE, in_256ths),
    "compiled-fp64": (norms.exact, ONCE, largest),
    "compiled-uniform": (TWO, ONE, largest),
    "dropped-cast": (TWO, ONE, differ),
    "offset-fixed": (*OFFSETS, largest),
    "sum-order": (ONCE, IN_GROUPS[1], differ),
    "sum-order-heads": (*IN_GROUPS, largest_relative),
    "bf16-sum-massive": (*RSTDS, outlier_ratio),
    "bf16-sum-outlier": (*RSTDS, outlier_ratio),
    "bf16-sum-nearest": (norms.exact, NEAREST, relative_l1),
    "bf16-sum-truncated": (norms.exact, TRUNCATED, relative_l1),
    "fp32-sum": (norms.exact, ONCE, relative_l1),
    "row-of-128": (ONE, norm("x hidden"), differ_in_rows),
    "truncated-sum": (*SUMS, wise.magnitude_bias),
    "truncated-sum-30": (*SUMS, differ),
    "truncated-hidden": (norm("x hidden"), norm("x hidden_rtz"), differ),
    "truncated-step": (*SUMS, lambda a, b: wise.moved(a, b).max()),
    "72-calls": (
        wise.accumulated(bf16),
        wise.accumulated(bf16_truncated),
        lambda a, b: wise.shrinks(a, b)[-1],
    ),
    "all-reduce": (*RANKS, differ),
    "all-reduce-ulps": (*RANKS, wise.moved_farther(4)),
    "added-in-fp16": (wise.added(wise.fp16), wise.added(fp32), wise.failing),
    "product-truncated": (wise.product(bf16), wise.product(bf16_truncated), differ),
    "rope-truncated": (ROPE, wise.two_products(bf16_truncated, bf16_truncated), wise.outside),
    "rope-nearest": (ROPE, wise.two_products(bf16, bf16), wise.outside),
    "rope-addcmul": (ROPE, wise.two_products(bf16, fp32), wise.outside),
    "rope-contracted": (wise.two_products(bf16, bf16), wise.two_products(bf16, fp32), wise.moved_farther(1)),
    "rope-unrounded": (wise.norm_turned(ONE), wise.norm_turned(NONE), differ),
    "indexer-runs": (wise.value(fp32), wise.value(bf16), wise.runs_over),
}
NO_OUTPUTS = {"offset-scale", "bf16-sum-massive", "bf16-sum-outlier", "added-in-fp16"}  # not in bf16: no ulps, no share


@cache
def published():
    with open(RESULTS / "cases.csv", newline="") as file:
        return list(csv.DictReader(file))


def array(drawn):
    return drawn.double().numpy() if torch.is_tensor(drawn) else drawn


def recomputed(key, before, after, pick):
    """The columns of a row: the figures of all draws by set-up, and what changed in the first."""
    case, rng, figures, own = MEASURED[key], torch.Generator().manual_seed(MEASURED[key].claim.case), {}, {}
    for _ in range(case.draws):
        for setup, drawn in enumerate(case.draw(rng)):
            inputs = {n: [array(t) for t in v] if isinstance(v, list) else array(v) for n, v in drawn.items()}
            a, b = before(inputs), after(inputs)
            own = own or what_changed(key, a, b)
            figures.setdefault(setup, []).extend(np.ravel(pick(a, b)))
    own["measured_low"] = min(np.quantile(values, 0.025) for values in figures.values())
    own["measured_high"] = max(np.quantile(values, 0.975) for values in figures.values())
    return own | {"measured": np.quantile(figures[0], 0.5)}


def what_changed(key, a, b):
    """Those columns of the first draw; None: there is nothing to compare."""
    found = dict.fromkeys(("share_differ", "max_ulp", "signed_bias", "growth"))
    found |= {} if key in NO_OUTPUTS else wise.changes(a, b)
    return found | ({"growth": wise.slope(np.abs(wise.shrinks(a, b)))} if key == "72-calls" else {})


def verdict(own, claim):
    """Of ranges that meet: a claim without a figure must hold of all that was measured, a figure within 1.5 times."""
    claimed, least, most = (float(claim[name] or "nan") for name in ("claimed", "claimed_low", "claimed_high"))
    if math.isnan(least):
        return "cannot be decided here"
    if own["measured_low"] > most or own["measured_high"] < least:
        return "does not fit"
    if math.isnan(claimed):
        inside = own["measured_low"] > least and own["measured_high"] < most
        return "same direction" if inside else "cannot be decided here"
    inside = least <= own["measured"] <= most
    close = claimed != 0 and 2 / 3 <= own["measured"] / claimed <= 3 / 2
    return "fits" if inside or close else "cannot be decided here"


def row_of(key):
    claim = MEASURED[key].claim
    (row,) = (r for r in published() if r["source"] == claim.source and r["measure"] == claim.measure)
    return row


@pytest.mark.parametrize("key", CASES)
def test_a_case(key):
    row = row_of(key)
    own = recomputed(key, *CASES[key])
    for name, value in own.items():
        assert (value is None) == (row[name] == ""), name
        assert value is None or float(row[name]) == pytest.approx(value, rel=6e-6, abs=0), name
    assert row["verdict"] == verdict(own, row)


def test_the_indexers_values():
    """LayerNorm with weight and bias of each run, half of its channels turned: what `indexer-runs` draws is that."""
    drawn, rng = (torch.Generator().manual_seed(30) for _ in range(2))
    x = normal(rng, 1000, 37, 128).double().numpy()
    weight, bias = (standard_normal(rng, 1000, 1, 128).double().numpy() for _ in range(2))
    cos, sin = standard_normal(rng, 2, 1000, 37, 32).double().numpy()
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * weight + bias
    own = np.concatenate([wise.turned(normed[..., :64], cos, sin), normed[..., 64:]], -1)
    (inputs,) = MEASURED["indexer-runs"].draw(drawn)
    assert np.mean(inputs["value"].numpy() == own.reshape(1000, -1).astype(np.float32)) > 1 - 1e-6
