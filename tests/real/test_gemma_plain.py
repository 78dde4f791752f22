"""Published figures of Gemma 3 270M that hold on any machine, recomputed by plain tensor code in float64."""

import csv
from pathlib import Path

import pytest
import torch
from plain_model import forward

from castpoint.harness.model import fetch as gemma
from castpoint.harness.model.language_model import load
from castpoint.harness.model.study import texts

PUBLISHED = Path(__file__).parents[2] / "results" / "cpu" / "model_tokens.csv"


def test_float32_is_as_sure_of_a_passage_as_published():
    """The arm `float32` is within 1e-6 of float64, whatever the machine."""
    with open(PUBLISHED, newline="") as file:
        rows = [r for r in csv.DictReader(file) if (r["model"], r["text"]) == ("gemma-3-270m", "passages")]
    newest = max(row["run_id"] for row in rows)
    lm = load(str(gemma.FOLDER))
    weights = {name: tensor.detach() for name, tensor in lm.model.state_dict().items()}
    for number in (0, 5):
        (row,) = (
            r
            for r in rows
            if (r["run_id"], r["prompt"], r["arm"], r["reference"]) == (newest, str(number), "float32", "float64")
        )
        ids = next(t.ids for t in texts(lm, None, int(row["tokens"]) - 32, 8) if t.number == number)
        with torch.no_grad():
            logits = forward(lm.config, weights, ids, torch.float64)["logits"]
        log_p = logits.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        assert float(row["nll"]) == pytest.approx(-log_p.mean().item(), rel=1e-5)
