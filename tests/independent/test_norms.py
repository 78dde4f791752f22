"""What public norms were found to round, made once more in NumPy from the words of their fingerprints."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plain_chain import cut
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

PUBLISHED = Path(__file__).parents[2] / "results" / "cpu" / "implementations.csv"
EPS = 1e-6
CLASSES = {c.__name__: c for c in (LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, Olmo2RMSNorm, Gemma3RMSNorm)}
BITS = {"fp32": 24, "bf16-rne": 8}


def called(name, x, weight):
    if name == "F.rms_norm":
        return F.rms_norm(x, (x.shape[-1],), weight, EPS)
    module = CLASSES[name](x.shape[-1], EPS).to(torch.bfloat16)
    module.weight.data = weight
    return module(x).detach()


def in_words(words, x, weight):
    """The norm of those words, float64 between fp32 or bf16 values."""

    def store(value, name):
        return cut(cut(value, 24, np.rint), BITS[words[name]], np.rint)

    assert (words["eps"], words["root"], words["order"]) == ("float32", "rsqrt", "(x*rstd)*w")
    if words["weight_offset"] != "none":
        weight = store(1 + weight, "weight_offset")
    variance = store(np.mean(store(x * x, "statistics"), -1, keepdims=True), "variance")
    normed = store(x * store(1 / np.sqrt(variance + EPS), "rstd"), "normed")
    return store(normed * weight, "hidden")


NORMS = ("F.rms_norm", *CLASSES)


@pytest.mark.parametrize("name", NORMS)
def test_the_answer_in_words_is_the_function(name):
    with open(PUBLISHED, newline="") as file:
        rows = list(csv.DictReader(file))
    (row,) = (r for r in rows if (r["implementation"], r["kind"], r["how"]) == (name, "rmsnorm", "eager"))
    (words,) = json.loads(row["plan"])
    rng = torch.Generator().manual_seed(7)
    x, weight = (torch.randn(s, generator=rng, dtype=torch.float64).bfloat16() for s in ((200, 1000), (1000,)))
    actual = called(name, x, weight).double().numpy()
    found = in_words(words, x.double().numpy(), weight.double().numpy())
    assert np.mean(actual == found) > 0.9999, "sums in fp32 flip a few in a million"
    moved = words | {"normed": "fp32" if words["normed"] == "bf16-rne" else "bf16-rne"}
    assert np.mean(actual == in_words(moved, x.double().numpy(), weight.double().numpy())) < 0.9
