"""Claims on real weights once more, by plain code: A2 and A4 (with A3's figures of the same draws)
on Qwen2.5-Coder 0.5B against published rows, C3 on Gemma 3 270M against the lab's own figures on the same machine,
whose bf16 made the streams, B1 on both models' streams."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from plain_chain import spacing
from plain_k_norm import amplified
from plain_norm import bf16
from plain_qwen2 import apart, drawn_biases, forward, said_differently
from safetensors import safe_open
from test_claims import given_of, over_samples
from test_published import published
from transformers import AutoTokenizer

from castpoint.harness.model.fetch import fetch
from castpoint.harness.systems import claims_jax, claims_kernels
from castpoint.harness.systems import jax_port as port
from castpoint.harness.systems.jax import read

BIAS, LOGITS, OUTPUT = "unloaded bias", "logits, largest", "first layer's output projection"
SEEDS, SEEDS_OF_ULP = 20, 6
# Published in fp32, here in float64: 24 layers of 14 operations, each of which may round by 2^-24; and six digits.
IN_FP32 = 24 * 14 * 2**-24 + 6e-6


# ---------------------------------------------------------------- C3


def test_c3_gemma():
    problems = claims_kernels.layers(False)[claims_kernels.GEMMA]
    assert len(problems) == 18
    for problem in problems:
        own, found = amplified(given_of(problem)), claims_kernels._amplified(problem)
        assert own.keys() == found.keys()
        for name, value in own.items():
            assert found[name] == pytest.approx(value, rel=6e-6), (problem.layer, name)


# ---------------------------------------------------------------- B1


def in_bf16(x, weight, eps, root, gemma):
    """RMSNorm with every value stored in bf16, sums in more."""
    mean = bf16(bf16(bf16(x * x).mean(-1, keepdims=True)) + bf16(np.float64(eps)))
    normed = bf16(x / bf16(np.sqrt(mean)) if root == "x / sqrt" else x * bf16(1 / np.sqrt(mean)))
    return bf16(normed * (bf16(1 + weight) if gemma else weight))


def before_rounding(x, weight, eps, gemma):
    """Of RMSNorm in fp32, in float64: what is rounded to bf16 first, Gemma's behind its weight, Qwen's before it."""
    normed = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return normed * (1 + weight) if gemma else normed


@pytest.mark.parametrize("model", claims_jax.size(False).models)
def test_b1_on_real_streams(model):
    """All in bf16: all but 1 in 10,000 elements are the lab's, and the largest difference from PyTorch is, however the
    root is written. Statistics in fp32: whatever differs from PyTorch lies beside a tie of bf16, within 10 x 2^-24."""
    weights, (ids,) = read(model, 1, 64)
    eps, gemma = weights.config.eps, weights.config.gemma
    for stream, held, expected in claims_jax.norms(weights, ids):
        x, weight, theirs = (value.double().numpy() for value in (stream, held, expected))
        first = before_rounding(x, weight, eps, gemma)
        beside = np.abs(np.abs(first) % spacing(first) / spacing(first) - 0.5) * spacing(first) / np.abs(first)
        for root in claims_jax.ROOTS:
            for mixed in (True, False):
                arrays = (port.array(value) for value in (stream, held))
                made = port.tensor(claims_jax.written(weights.config, *arrays, root, mixed)).double().numpy()
                if not mixed:
                    own = in_bf16(x, weight, eps, root, gemma)
                    assert (own == made).mean() > 0.9999
                    assert np.abs(own - theirs).max() == np.abs(made - theirs).max()
                else:
                    assert (beside[made != theirs] < 10 * 2**-24).all()
                    assert (made == theirs).mean() > 0.999


# ---------------------------------------------------------------- A2 to A4


@pytest.fixture(scope="module")
def made():
    """Copy 0, with 20 draws of a bias, and with 6 of an ulp; the prompt is that of the reports."""
    folder = fetch("qwen2.5-coder-0.5b-instruct")
    config = SimpleNamespace(**json.loads((folder / "config.json").read_text()))
    config.head_dim = config.hidden_size // config.num_attention_heads
    ids = AutoTokenizer.from_pretrained(folder).encode("What is the capital of France?")
    with safe_open(folder / "model.safetensors", "pt") as file, torch.no_grad():
        biases = [drawn_biases(config, seed) for seed in range(SEEDS)]
        return forward(config, file.get_tensor, ids, biases, range(SEEDS_OF_ULP))


def near(row, values):
    """A row of so many samples in fp32."""
    assert int(row["samples"]) == len(values)
    own = {"measured": np.median(values), "measured_low": min(values), "measured_high": max(values)}
    for column, value in own.items():
        assert float(row[column]) == pytest.approx(value, rel=IN_FP32), (row["what"], column)


def with_bias(made):
    """Figure -> of every draw."""
    said = [said_differently(made, copy) for copy in range(1, SEEDS + 1)]
    return {name: [each[name] for each in said] for name in said[0]}


def one(claim, what):
    (row,) = published("claim_figures", claim=claim, what=what, cause=BIAS)
    return row


def test_a2_what_the_bias_makes(made):
    """Behind the projection nothing but the bias is seen, whatever the prompt; other figures are published of four
    prompts, of which this is one."""
    own = [apart(made, "output", copy) for copy in range(1, SEEDS + 1)]
    row = one("A2", OUTPUT)
    assert int(row["samples"]) == 4 * SEEDS
    for column, value in (("measured", np.median(own)), ("measured_low", min(own)), ("measured_high", max(own))):
        assert float(row[column]) == pytest.approx(value, rel=IN_FP32)
    names = {"KL": "KL, last token", "logits, mean difference": "logits, mean"}
    names |= {"largest change of a probability": "largest probability change, last token"}
    for what, theirs in (names | {"logits, largest difference": LOGITS}).items():
        row, values = one("A2", theirs), with_bias(made)[what]
        assert float(row["measured_low"]) <= min(values) * (1 + IN_FP32)
        assert max(values) <= float(row["measured_high"]) * (1 + IN_FP32)


def test_a3_the_bias_in_float64(made):
    """The same draws in the same precision: to all printed digits."""
    over_samples(one("A3", f"{LOGITS}, float64"), with_bias(made)["logits, largest difference"])


def test_a4_the_bias_from_run_to_run(made):
    near(one("A4", LOGITS), with_bias(made)["logits, largest difference"])


def test_a2_one_ulp_on_k(made):
    """An fp32 ulp on the first layer's K moves its scores by less than one fp32 spacing of the largest score: what fp32
    shows there is a multiple of that spacing, its own rounding. No first choice changes."""
    for copy in range(SEEDS + 1, SEEDS + 1 + SEEDS_OF_ULP):
        assert apart(made, "k", copy) == pytest.approx(2**-16, rel=2**-30)
        spacing = np.spacing(np.float32(made["scores"][0].abs().max()))
        assert 0 < apart(made, "scores", copy) < spacing
        assert said_differently(made, copy)["first choice changed"] == 0
