"""Figures of the verdicts on claims, each computed a second time by plain code from its definition in words."""

import importlib
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from plain_chain import PLANS, TRUTH, chain, relative_rms
from plain_k_norm import amplified
from plain_quants import quantised
from plain_roots import inputs, rounded_once
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


# ---------------------------------------------------------------- B1


def nearest_root(x):
    """1 / sqrt(x) to the nearest fp32, by fractions: of three neighbours that whose midpoints enclose it."""
    near = np.float32(1 / math.sqrt(float(x)))
    for y in (np.nextafter(near, np.float32(0)), near, np.nextafter(near, np.float32(2))):
        beside = [Fraction(float(np.nextafter(y, np.float32(end)))) for end in (0, 4)]
        low, high = ((Fraction(float(y)) + other) / 2 for other in beside)
        if low**2 * Fraction(float(x)) < 1 < high**2 * Fraction(float(x)):
            return y
    raise AssertionError(x)


def test_whole_numbers_and_fractions_agree_on_roots():
    drawn = np.random.default_rng(0).integers(1 << 24, size=300)
    edges = np.float32([1, 1 + 2**-23, 1 + 2**-22, 2 - 2**-23, 2, 2 + 2**-22, 4 - 2**-22])
    for x in [*inputs(23)[drawn], *edges]:
        right = nearest_root(x)
        others = [np.nextafter(right, np.float32(end)) for end in (0, 4)]
        assert rounded_once(np.full(3, x), np.float32([right, *others])).tolist() == [True, False, False]


def test_b1_a_root_in_float64_rounds_once_to_fp32():
    """For every mantissa and both parities of the exponent: what the lab's counts of right roots stand on."""
    for x in np.split(inputs(23), 16):
        assert rounded_once(x, torch.from_numpy(x).double().rsqrt().float().numpy()).all()


BITS = 16
ROOTS = {"rsqrt": lambda v, m: m.rsqrt(v), "power": lambda v, m: v**-0.5, "1/sqrt": lambda v, m: 1 / m.sqrt(v)}


def test_b1_counts_of_right_roots():
    """How many of 2^17 inputs each way to write it rounds right, in JAX and in PyTorch: the lab's shares, on the same
    machine, whose vector instructions these are."""
    jax = pytest.importorskip("jax")
    parts = importlib.import_module("castpoint.harness.systems.jax_parts")
    x = inputs(BITS)
    rows = {row.part: row for row in parts.roots("op by op", BITS) if row.part.endswith("correctly rounded")}
    both = {
        "JAX": (jax.numpy.asarray(x), SimpleNamespace(rsqrt=jax.lax.rsqrt, sqrt=jax.numpy.sqrt)),
        "PyTorch": (torch.from_numpy(x), torch),
    }
    assert len(rows) == len(both) * len(ROOTS)
    for library, (value, module) in both.items():
        for name, root in ROOTS.items():
            right = rounded_once(x, np.asarray(root(value, module))).sum()
            row = rows[f"{library}: {name}, correctly rounded"]
            assert row.elements == len(x) and round(row.share_equal * len(x)) == right, (library, name)


# ---------------------------------------------------------------- C8


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_c8_quantised_as_gguf_does(kind):
    """Every value that gguf gives back, of drawn weights, of blocks of one value, of zeros, and of ties."""
    gguf = pytest.importorskip("gguf")
    drawn = synthetic_problem(layer=0, tokens=1).qkv_weight.double().numpy()
    ties = np.tile([127.0, 0.5, 1.5, -0.5, -1.5, 2.5, -8, 8], (4, 8))
    odd = [np.zeros((2, 32)), np.full((2, 32), -3.0), np.full((2, 32), 2**-20), ties]
    code = gguf.GGMLQuantizationType[kind]
    for weight in [drawn, *odd]:
        own = quantised(weight, kind)
        theirs = gguf.dequantize(gguf.quantize(weight.astype(np.float32), code), code)
        assert np.array_equal(own, theirs)
        assert kind == "Q4_0" or np.abs(own - weight).max() <= np.abs(weight).max() * (0.5 / 127 + 2**-10)


def test_c8_errors_of_k():
    """4-bit and 8-bit weights, everything else exact, beside each plan's casts on the same layer."""
    found = {row["arm"]: row for row in published("four_bit", model="qwen3-0.6b", weights="calibrated", layer=0)}
    given = given_of(synthetic_problem(layer=0, tokens=64))
    true = chain(given, TRUTH)
    made = {plan: chain(given, words) for plan, words in PLANS.items() if plan in found}
    for kind in ("Q8_0", "Q4_0"):
        made[kind] = chain(given | {"qkv_weight": quantised(given["qkv_weight"], kind)}, TRUTH)
    assert len(made) >= 10
    for arm, each in made.items():
        assert agree(found[arm]["k_rel_rms"], relative_rms(each["k"], true["k"])), arm
