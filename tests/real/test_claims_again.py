"""Claims on real weights once more, by plain code: A2 and A4 (with A3's and A5's figures of the same draws)
on Qwen2.5-Coder 0.5B against published rows, C3 on Gemma 3 270M against the lab's own figures on the same machine,
whose bf16 made the streams."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from plain_k_norm import amplified
from plain_qwen2 import apart, drawn_biases, forward, said_differently
from safetensors import safe_open
from test_claims import given_of, over_samples
from test_published import agree, published
from transformers import AutoTokenizer

from castpoint.harness.model.fetch import fetch
from castpoint.harness.systems import claims_kernels

BIAS, ULP = "output projection's bias never loaded", "one fp32 ulp on layer 1's K alone"
SEEDS, SEEDS_OF_ULP, IN_FLOAT64 = 24, 6, 6
LOGITS, OUTPUT = "logits, largest difference", "output of layer 1's attention"
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


# ---------------------------------------------------------------- A2 to A5


@pytest.fixture(scope="module")
def made():
    """Copy 0, with 24 draws of a bias, and with 6 of an ulp; the prompt is that of the reports."""
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
    """Figure -> of every draw; of states behind a layer, of every layer too."""
    copies, hidden = range(1, SEEDS + 1), made["hidden"]
    said = [said_differently(made, copy) for copy in copies]
    behind = [[(x[copy] - x[0]).abs().max().item() for x in hidden] for copy in copies]
    return {name: [each[name] for each in said] for name in said[0]} | {
        OUTPUT: [apart(made, "output", copy) for copy in copies],
        "hidden state after layer 1": [layers[0] for layers in behind],
        "hidden state after layer 3 to 24": [value for layers in behind for value in layers[2:]],
    }


def one(claim, **key):
    (row,) = published("claim_figures", claim=claim, **key)
    return row


def test_a2_a5_figures_of_the_bias(made):
    found = published("claim_figures", claim="A5", cause=f"{BIAS}, their question")
    own = with_bias(made)
    assert {row["what"] for row in found} == set(own) and len(own) == 10
    for row in found:
        near(row, own[row["what"]])
    row = one("A2", what=OUTPUT, cause=BIAS)  # of four prompts: behind the projection nothing but the bias is seen
    assert int(row["samples"]) == 4 * SEEDS
    assert float(row["measured"]) == pytest.approx(np.median(own[OUTPUT]), rel=IN_FP32)
    expected = one("A5", what="expected largest of the drawn biases")
    assert agree(
        expected["measured"], 896**-0.5 * 896 / 897
    )  # the mean of the largest of n uniform on 0 to 1: n / (n + 1)


def test_a3_the_bias_in_float64(made):
    """The same draws in the same precision: to all printed digits."""
    over_samples(one("A3", what=LOGITS, cause=f"{BIAS}, float64"), with_bias(made)[LOGITS][:IN_FLOAT64])


def test_a4_from_run_to_run(made):
    logits = with_bias(made)[LOGITS]
    near(one("A4", what="logits, one run", cause=f"{BIAS}, question"), logits)
    near(one("A4", what="logits, run to run", cause=f"{BIAS}, question"), [max(logits) - min(logits)])


def test_a2_one_ulp_on_k(made):
    """K moves by fp32's spacing where it is largest. In float64 that alone moves scores by less than one fp32 spacing
    of the largest score, of which the published figures in fp32 are multiples; these, and those behind them, are more
    than the ulp's own effect, since every value behind K rounds anew."""
    copies = range(SEEDS + 1, SEEDS + 1 + SEEDS_OF_ULP)
    rows = {what: one("A2", what=what, cause=ULP) for what in ("K", "scores", OUTPUT, LOGITS, "first choice changed")}
    ends = ("measured", "measured_low", "measured_high")
    for column in ends:
        assert all(agree(rows["K"][column], apart(made, "k", copy)) for copy in copies)
    for what, stage in (("scores", "scores"), (OUTPUT, "output"), (LOGITS, "logits")):
        assert 0 < max(apart(made, stage, copy) for copy in copies) < float(rows[what]["measured_low"])
    step = float(np.spacing(np.float32(made["scores"][0].abs().max())))
    assert max(apart(made, "scores", copy) for copy in copies) < step
    for column in ends:
        steps = float(rows["scores"][column]) / step
        assert steps == pytest.approx(round(steps), rel=6e-6)
    assert {rows["first choice changed"][column] for column in ends} == {"0"}
    assert not any(said_differently(made, copy)["first choice changed"] for copy in copies)
