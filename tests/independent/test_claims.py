"""Figures of the verdicts on claims, each computed a second time by plain code from its definition in words."""

import importlib
import math
from fractions import Fraction
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from plain_chain import PLANS, TRUTH, chain, relative_rms, softmax
from plain_k_norm import amplified
from plain_quants import BYTES, bandwidth, quantised
from plain_roots import inputs, rounded_once
from plain_statistics import errors, of_tokens, part, whole
from test_published import agree, published

from castpoint.harness.problems.drawn import synthetic_problem
from castpoint.harness.systems import kl_statistics

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
    names = ("x", "norm_weight", "qkv_weight", "q_norm_weight", "k_norm_weight")
    return {name: getattr(problem, name).detach().double().numpy() for name in names} | {
        "num_q_heads": problem.num_q_heads,
        "num_kv_heads": problem.num_kv_heads,
        "eps": problem.eps,
        "weight_offset": offset,
    }


def without_q(given):
    """The same K, of a third to a half of the work."""
    rows = given["num_q_heads"] * len(given["k_norm_weight"])
    return given | {"qkv_weight": given["qkv_weight"][rows:], "num_q_heads": 0}


@cache
def drawn_layers():
    """Of every layer: C3's figures, and C8's errors of K."""
    problems = (synthetic_problem(layer=n, tokens=DRAWN_TOKENS) for n in range(DRAWN_LAYERS))
    layers = (without_q(given_of(problem)) for problem in problems)
    return [(amplified(given), errors_of_k(given)) for given in layers]


def errors_of_k(given):
    """By casts, by 8 and 4 bits in the matrix, and by these in the K norm alone."""
    true = chain(given, TRUTH)["k"]
    made = {plan: chain(given, PLANS[plan]) for plan in ("hf", "cast-after-matmul", "fp32", "truncating")}
    for kind in ("Q8_0", "Q4_0"):
        for arm, name in ((kind, "qkv_weight"), (f"{kind}, K norm alone", "k_norm_weight")):
            made[arm] = chain(given | {name: quantised(given[name], kind)}, TRUTH)
    return {f"K's relative error: {arm}": relative_rms(each["k"], true) for arm, each in made.items()}


@pytest.mark.parametrize(("claim", "place"), [("C3", 0), ("C8", 1)])
def test_c3_c8_drawn_layers(claim, place):
    """What the K norm makes of a cast behind the matmul; K's errors by casts and by 4 bits: over all layers."""
    found = published("claim_figures", claim=claim, cause=DRAWN)
    layers = [figures[place] for figures in drawn_layers()]
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
    parts = importlib.import_module("castpoint.harness.systems.jax_causes")
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


def test_c8_bytes_a_token():
    rows = {row["cause"]: row for row in published("claim_figures", claim="C8", what="GB/s that 400 tokens/s read")}
    for kind in BYTES:
        over_samples(rows[kind], [bandwidth(kind, 400)])


DRAWN_TOKENS_OF_TEXT, WORDS = 400, 40
IN_FP32 = 32 * 2**-24  # of a log p above -32, which the lab takes in fp32


def test_c8_statistics():
    """llama.cpp's list as the lab makes it, its standard errors by the jackknife: of a mean they are the same; of what
    is no mean they part by the second order, of the size of the relative standard error itself."""
    rng = np.random.default_rng(0)
    base = rng.normal(0, 3, (DRAWN_TOKENS_OF_TEXT, WORDS)).astype(np.float32)
    logits = base + rng.normal(0, 0.3, base.shape).astype(np.float32)
    ids = [int(rng.choice(WORDS, p=softmax(row))) for row in np.roll(base, 1, 0).astype(float)]
    tokens = kl_statistics.Tokens()
    tokens.add(torch.from_numpy(logits), torch.from_numpy(base), ids)
    found, values = kl_statistics.listed(tokens), of_tokens(logits.astype(float), base.astype(float), ids)
    own, own_errors = whole(values), errors(values)
    with_errors = {name for name, (_, error) in found.items() if error is not None}
    assert with_errors == set(own)
    means = {"Mean ln(PPL(Q)/PPL(base))", "Mean KLD", "Mean Δp", "Same top p"}
    second = max(own_errors[name] / own[name] for name in ("Mean PPL(Q)", "Mean PPL(base)", "RMS Δp"))
    for name, value in own.items():
        size = 100 if "p" in name.split() or "Δp" in name else max(1, own["Mean PPL(Q)"])
        assert found[name][0] == pytest.approx(value, abs=size * IN_FP32), name
        off = 0 if name in means else second
        assert found[name][1] == pytest.approx(own_errors[name], rel=off, abs=size * IN_FP32), name
    nll, base_nll, kl, _ = values
    correlation = 100 * np.corrcoef(nll, base_nll)[0, 1]
    assert found["Cor(ln(PPL(Q)), ln(PPL(base)))"][0] == pytest.approx(correlation, abs=100 * IN_FP32)
    change = 100 * (np.exp(-nll) - np.exp(-base_nll))
    parts = {"Maximum": 1, "Minimum": 0, "Median": 0.5}
    for name in found.keys() - own.keys() - {"Cor(ln(PPL(Q)), ln(PPL(base)))"}:
        share, what = name.split()
        share = parts[share] if share in parts else float(share.removesuffix("%")) / 100
        exact = part(kl if what == "KLD" else change, share)
        assert found[name][0] == pytest.approx(exact, abs=100 * IN_FP32), name
