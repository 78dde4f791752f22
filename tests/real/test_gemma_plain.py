"""Gemma 3 270M once more as plain tensor code: what float32 is published to say, and the lab's plans inside it."""

import csv
from pathlib import Path

import pytest
import torch
from plain_chain import PLANS
from plain_figures import Said, of_layer, of_tokens
from plain_model import forward

from castpoint.harness.model.fetch import fetch
from castpoint.harness.model.language_model import load
from castpoint.harness.model.passes import greedy
from castpoint.harness.model.study import CONTINUATION, arms, layer_errors, texts, token_errors

PUBLISHED = Path(__file__).parents[2] / "results" / "cpu" / "model_tokens.csv"
ARMS = ("eager", "hf", "cast-after-matmul", "fp32", "truncating")  # the first is the model's own


@pytest.fixture(scope="module")
def lm():
    return load(str(fetch("gemma-3-270m")))


def made_of(lm, ids, dtype, words=None):
    weights = {name: tensor.detach() for name, tensor in lm.model.state_dict().items()}
    with torch.no_grad():
        return forward(lm.config, weights, ids, dtype, words)


def test_float32_is_as_sure_of_a_passage_as_published(lm):
    """The arm `float32` is within 1e-6 of float64, whatever the machine."""
    with open(PUBLISHED, newline="") as file:
        rows = [r for r in csv.DictReader(file) if (r["model"], r["text"]) == ("gemma-3-270m", "passages")]
    newest = max(row["run_id"] for row in rows)
    for number in (0, 5):
        (row,) = (
            r
            for r in rows
            if (r["run_id"], r["prompt"], r["arm"], r["reference"]) == (newest, str(number), "float32", "float64")
        )
        ids = next(t.ids for t in texts(lm, None, int(row["tokens"]) - 32, 8) if t.number == number)
        assert float(row["nll"]) == pytest.approx(-Said(made_of(lm, ids, torch.float64), ids).next.mean(), rel=1e-5)


def test_plans_inside_the_model(lm):
    """Against the lab's passes over a passage and its continuation on the same machine, whose own matmuls both use."""
    prompt = texts(lm, None, 96, 1)[0].ids
    read = [*prompt, *greedy(lm.model, prompt, CONTINUATION)]
    passes = {arm.name: arm.run(read) for arm in arms(lm, ARMS[1:], "eager") if arm.name in ARMS}
    made = {arm: made_of(lm, read, torch.bfloat16, PLANS.get(arm)) for arm in ARMS}
    own = {arm: Said(each, read) for arm, each in made.items()}
    assert list(passes) == list(ARMS)
    for arm, result in passes.items():
        found, _ = token_errors(result, passes["eager"], read)
        expected = of_tokens(own[arm], own["eager"], read, len(prompt))
        for name in found.keys() - {"top5"}:  # of equal logits any may be the fifth
            assert found[name] == pytest.approx(expected[name], rel=6e-6, abs=1e-12), (arm, name)
        for layer in range(lm.config.num_hidden_layers):
            found = layer_errors(result, passes["eager"], layer)
            for name, value in of_layer(made[arm], made["eager"], layer).items():
                assert found[name] == pytest.approx(value, rel=6e-6, abs=1e-12), (arm, layer, name)
