"""A whole-model study's figures on small models, recomputed by plain_model and by the formulas of their columns."""

import math

import numpy as np
import pytest
import torch
from plain_chain import relative_rms
from plain_model import forward
from tiny_models import IDS, tiny_lm

from castpoint.harness.model.passes import greedy
from castpoint.harness.model.study import CONTINUATION, Text, sweep_model
from castpoint.harness.runs.records import Records

PROMPT = 24


@pytest.fixture(scope="module", params=["qwen3", "gemma3_text"])
def study(request, tmp_path_factory):
    """Rows of the study of one text, by table; and what plain code makes of the same tokens in bf16 and in float64."""
    lm = tiny_lm(request.param)
    records = Records(tmp_path_factory.mktemp("own"), {"command": "model"}, {})
    sweep_model(lm, ["fp32"], "eager", [Text("prompts", 0, IDS[:PROMPT])], records)
    records.close()
    weights = {name: tensor.detach() for name, tensor in lm.model.state_dict().items()}
    ids = [*IDS[:PROMPT], *greedy(lm.model, IDS[:PROMPT], CONTINUATION)]  # an input: what every arm reads
    with torch.no_grad():
        passes = {dtype: forward(lm.config, weights, ids, dtype) for dtype in (torch.bfloat16, torch.float64)}
    return {table: records.rows(table) for table in ("model_tokens", "model_layers", "model_dlogp")}, passes, ids


def row_of(rows, **key):
    (found,) = (row for row in rows if all(row[name] == str(word) for name, word in key.items()))
    return found


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_tokens(study):
    rows, passes, ids = study
    row = row_of(rows["model_tokens"], arm="eager", reference="float64")
    eager, true = (passes[dtype][0].double().numpy() for dtype in (torch.bfloat16, torch.float64))
    log_p, true_log_p = log_softmax(eager), log_softmax(true)
    kl = (np.exp(true_log_p) * (true_log_p - log_p)).sum(-1)
    after = np.arange(len(ids) - 1), np.array(ids[1:])
    change = np.abs(log_p[:-1][after] - true_log_p[:-1][after])
    five = [np.argsort(-logits, axis=-1, kind="stable")[:, :5] for logits in (eager, true)]
    own = {
        "tokens": len(ids),
        "logit_max": np.abs(eager - true).max(),
        "kl_mean": kl.mean(),
        "kl_max": kl.max(),
        "top1": np.mean(eager.argmax(-1) == true.argmax(-1)),
        "dlogp_p50": np.quantile(change, 0.5),
        "dlogp_p99": np.quantile(change, 0.99),
        "dlogp_max": change.max(),
        "nll": -log_p[: PROMPT - 1][np.arange(PROMPT - 1), ids[1:PROMPT]].mean(),
    }
    for name, value in own.items():
        assert float(row[name]) == pytest.approx(value, rel=6e-6, abs=1e-12), name
    common = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(*five, strict=True)])
    assert float(row["top5"]) == pytest.approx(common, abs=2 / 5 / len(ids))  # of equal logits either may be the fifth


def test_counts_of_changes(study):
    rows, passes, ids = study
    found = [r for r in rows["model_dlogp"] if r["arm"] == "eager" and r["reference"] == "float64"]
    log_p, true = (log_softmax(passes[d][0].double().numpy()) for d in (torch.bfloat16, torch.float64))
    after = np.arange(len(ids) - 1), np.array(ids[1:])
    change = np.abs(log_p[:-1][after] - true[:-1][after])
    assert sum(int(row["tokens"]) for row in found) == len(change)
    for row in found:
        low = float(row["above"])
        high = low * 10**0.25 if low else 10 ** (-28 / 4)
        assert int(row["tokens"]) == np.sum((change >= low * (1 - 1e-9)) & (change < high * (1 - 1e-9)))


def test_layers(study):
    rows, passes, _ = study
    for layer in range(3):
        row = row_of(rows["model_layers"], arm="eager", reference="float64", layer=layer)
        (a, k), (r, true_k) = (
            [passes[d][i][layer].double().numpy() for i in (1, 2)] for d in (torch.bfloat16, torch.float64)
        )
        cosine = (a * r).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(r, axis=-1)
        own = {
            "max_abs": np.abs(a - r).max(),
            "rms": math.sqrt(np.mean((a - r) ** 2)),
            "rel_rms": relative_rms(a, r),
            "one_minus_cosine": np.mean(1 - cosine),
            "k_max_abs": np.abs(k - true_k).max(),
            "k_rel_rms": relative_rms(k, true_k),
        }
        for name, value in own.items():
            assert float(row[name]) == pytest.approx(value, rel=6e-6, abs=1e-12), name
