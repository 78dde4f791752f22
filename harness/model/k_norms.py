"""What K-norm weights do in every layer of a model: its own weights, on the residual stream that enters the layer."""

from __future__ import annotations

import torch
from torch import Tensor

from castpoint.harness.accuracy.k_norms import add_k_norms
from castpoint.harness.model.attach import decoder_layers, layer_problem
from castpoint.harness.model.language_model import LanguageModel
from castpoint.harness.model.passes import forward
from castpoint.harness.model.study import Text
from castpoint.harness.runs.progress import track
from castpoint.harness.runs.records import Records

TEXTS, TOKENS = 4, 128  # the first of them, of each at most so many: layers differ more than texts do


@torch.no_grad()
def sweep_k_norms(lm: LanguageModel, found: list[Text], records: Records) -> None:
    """Rows of every layer on the first texts; none of a model without K norms."""
    layers = decoder_layers(lm.model)
    if not hasattr(layers[0].self_attn, "k_norm"):
        return
    for number, text in enumerate(found[:TEXTS]):
        streams = entering(lm, text.ids[:TOKENS])
        for at, x in enumerate(track(streams, f"K-norm weights, text {number + 1}")):
            problem = layer_problem(layers[at], lm.config, x)
            add_k_norms(records, problem.replace(model=lm.name, weights=lm.weights, layer=at), number)


def entering(lm: LanguageModel, ids: list[int]) -> list[Tensor]:
    """The residual stream of eager bf16 that enters each layer, [S, D]; the first by its norm's input, since models
    scale their embeddings (Granite)."""
    first: list[Tensor] = []
    norm = decoder_layers(lm.model)[0].input_layernorm
    with norm.register_forward_pre_hook(lambda module, inputs: first.append(inputs[0][0])):
        behind = forward(lm.model, ids).hidden
    return [first[0], *behind[:-1]]
