"""A whole-model study's figures on small models, recomputed by plain_model and by the formulas of their columns."""

import numpy as np
import pytest
import torch
from plain_chain import PLANS
from plain_figures import Said, common_of_five, of_layer, of_tokens
from plain_model import forward
from tiny_models import IDS, tiny_lm

from castpoint.harness.model.passes import greedy
from castpoint.harness.model.study import CONTINUATION, Text, sweep_model
from castpoint.harness.runs.records import Records

PROMPT = 24
ARMS = ("eager", "hf", "cast-after-matmul", "fp32", "truncating")  # the first is the model's own


@pytest.fixture(scope="module", params=["qwen3", "gemma3_text"])
def study(request, tmp_path_factory):
    """Rows of the study of one text, by table; what plain code makes of the same tokens, by arm, and says of them."""
    lm = tiny_lm(request.param)
    records = Records(tmp_path_factory.mktemp("own"), {"command": "model"}, {})
    sweep_model(lm, ARMS[1:], "eager", [Text("prompts", 0, IDS[:PROMPT])], records)
    records.close()
    weights = {name: tensor.detach() for name, tensor in lm.model.state_dict().items()}
    ids = [*IDS[:PROMPT], *greedy(lm.model, IDS[:PROMPT], CONTINUATION)]  # an input: what every arm reads
    with torch.no_grad():
        made = {arm: forward(lm.config, weights, ids, torch.bfloat16, PLANS.get(arm)) for arm in ARMS}
        made["float64"] = forward(lm.config, weights, ids, torch.float64)
    said = {arm: Said(each, ids) for arm, each in made.items()}
    return {table: records.rows(table) for table in ("model_tokens", "model_layers", "model_dlogp")}, made, said, ids


def row_of(rows, **key):
    (found,) = (row for row in rows if all(row[name] == str(word) for name, word in key.items()))
    return found


@pytest.mark.parametrize("reference", ["float64", "eager"])
@pytest.mark.parametrize("arm", ARMS)
def test_tokens(study, arm, reference):
    rows, _, said, ids = study
    row = row_of(rows["model_tokens"], arm=arm, reference=reference)
    for name, value in of_tokens(said[arm], said[reference], ids, PROMPT).items():
        assert float(row[name]) == pytest.approx(value, rel=6e-6, abs=1e-12), name
    least, greatest = common_of_five(said[arm], said[reference])
    assert least - 1e-6 <= float(row["top5"]) <= greatest + 1e-6


@pytest.mark.parametrize("arm", ARMS)
def test_counts_of_changes(study, arm):
    rows, _, said, ids = study
    found = [r for r in rows["model_dlogp"] if r["arm"] == arm and r["reference"] == "float64"]
    change = np.abs(said[arm].next - said["float64"].next)
    assert sum(int(row["tokens"]) for row in found) == len(ids) - 1
    for row in found:
        low = float(row["above"])
        high = low * 10**0.25 if low else 10 ** (-28 / 4)
        assert int(row["tokens"]) == np.sum((change >= low * (1 - 1e-9)) & (change < high * (1 - 1e-9)))


@pytest.mark.parametrize("reference", ["float64", "eager"])
@pytest.mark.parametrize("arm", ARMS)
def test_layers(study, arm, reference):
    rows, made, _, _ = study
    for layer in range(3):
        row = row_of(rows["model_layers"], arm=arm, reference=reference, layer=layer)
        for name, value in of_layer(made[arm], made[reference], layer).items():
            assert float(row[name]) == pytest.approx(value, rel=6e-6, abs=1e-12), name
