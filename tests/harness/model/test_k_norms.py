"""K-norm weights of every layer of a model: its own streams, its own weights; nothing of a model without K norms."""

from pathlib import Path

import pytest
import torch
from tiny_models import IDS, assert_untouched, state_of, tiny_lm
from torch import Tensor, nn

from castpoint.harness.model.attach import decoder_layers
from castpoint.harness.model.k_norms import TEXTS, entering, sweep_k_norms
from castpoint.harness.model.passes import forward, k_norm_max
from castpoint.harness.model.study import Text
from castpoint.harness.runs.records import Records

FOUND = [Text("passages", number, IDS[number : number + 9]) for number in range(TEXTS + 1)]


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_streams_are_those_that_enter_the_layers(kind: str) -> None:
    """What each layer is given, bit for bit: of Gemma's first the scaled embedding."""
    lm, given = tiny_lm(kind), []

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        given.append(inputs[0][0])

    hooks = [layer.register_forward_pre_hook(keep) for layer in decoder_layers(lm.model)]
    forward(lm.model, IDS[:9])
    for hook in hooks:
        hook.remove()
    streams = entering(lm, IDS[:9])
    assert len(given) == len(streams) == 3 and all(torch.equal(a, b) for a, b in zip(given, streams, strict=True))


@pytest.mark.parametrize(("kind", "plan"), [("qwen3", "hf"), ("gemma3_text", "gemma")])
def test_rows_of_every_layer_on_the_first_texts(tmp_path: Path, kind: str, plan: str) -> None:
    lm, records = tiny_lm(kind), Records(tmp_path, {"model": kind}, {})
    before = state_of(lm.model)
    sweep_k_norms(lm, FOUND, records)
    rows = records.rows("k_norms")
    assert {row["status"] for row in rows} == {"ok"} and {row["plan"] for row in rows} == {plan}
    found = {(row["sample"], row["layer"]) for row in rows}
    assert found == {(str(text), str(layer)) for text in range(TEXTS) for layer in range(3)} and len(rows) == 7 * len(
        found
    )
    assert {row["tokens"] for row in rows} == {"9"} and {row["weights"] for row in rows} == {"drawn"}
    for row in rows:
        largest = k_norm_max(decoder_layers(lm.model)[int(row["layer"])])
        wanted = largest if row["k_norm"] in ("own", "all the largest", "largest alone") else 129 / 128
        assert float(row["k_norm_there"]) == pytest.approx(wanted, rel=1e-5), row["k_norm"]
    assert_untouched(lm.model, before)


def test_a_model_without_k_norms_has_none(tmp_path: Path) -> None:
    records = Records(tmp_path, {"model": "llama"}, {})
    sweep_k_norms(tiny_lm("llama"), FOUND, records)
    assert records.rows("k_norms") == []
