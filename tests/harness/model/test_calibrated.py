"""The calibrated Qwen3-0.6B: the published architecture, with weights drawn to published statistics."""

from __future__ import annotations

import csv

import pytest
import torch

from castpoint.harness.model import language_model
from castpoint.harness.model.attach import decoder_layers
from castpoint.harness.model.language_model import (
    calibrated_config,
    calibrated_model,
)
from castpoint.harness.problems.drawn import DATA, k_norm_statistics, residual_std


@pytest.fixture(scope="module")
def calibrated() -> torch.nn.Module:
    """Its first two layers of 28: the statistics are cut, the widths are not."""
    rows = language_model.layer_statistics()[:2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_model, "layer_statistics", lambda: rows)
        config = calibrated_config()
        config.num_hidden_layers, config.layer_types = 2, config.layer_types[:2]
        return calibrated_model(config).eval()


def published(layer: int) -> dict[str, str]:
    with open(DATA / "qwen3-0.6b-layer-statistics.csv", newline="") as file:
        return list(csv.DictReader(file))[layer]


@pytest.mark.parametrize("layer", [0, 1])
def test_weights_have_the_published_statistics(calibrated: torch.nn.Module, layer: int) -> None:
    """Norms to bf16's 2^-9 of their largest weight; of n drawn weights mean and deviation to six standard errors."""
    row, seen = published(layer), set()
    for name, weight in decoder_layers(calibrated)[layer].named_parameters():
        stem, values = name.split(".")[-2], weight.double()
        mean, std = float(row[f"{stem}_mean"]), float(row[f"{stem}_std"])
        if stem == "k_norm":
            mean, std, maximum = k_norm_statistics(layer)
            assert maximum == float(row["qwen3_k_norm_max"]) == values.max().item()
        errors = (abs(values.mean().item() - mean), abs(values.std(correction=0).item() - std))
        root = values.numel() ** 0.5
        allowed = (6 * std / root, 6 * std / root) if weight.ndim == 2 else (values.abs().max().item() * 2**-9,) * 2
        assert errors[0] <= allowed[0] and errors[1] <= allowed[1], (name, errors, allowed)
        seen.add(stem)
    assert seen == {key.removesuffix("_mean") for key in row if key.endswith("_mean")}


def test_its_head_is_tied_and_its_frequencies_are_float32(calibrated: torch.nn.Module) -> None:
    assert calibrated.lm_head.weight is calibrated.model.embed_tokens.weight
    assert abs(calibrated.lm_head.weight.double().std().item() / residual_std(0) - 1) < 6 / (2 * 256 * 1024) ** 0.5
    frequencies = calibrated.model.rotary_emb.inv_freq
    expected = 1e6 ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    relative = (frequencies.double() / expected - 1).abs().max().item()
    assert frequencies.dtype == torch.float32 and relative <= 2 * 2**-23  # two fp32 steps; bf16: 2^-9
    assert calibrated.dtype == torch.bfloat16 and calibrated.model.norm.weight.unique().tolist() == [1.0]


def test_it_reads_bytes_and_is_drawn_by_its_seed(calibrated: torch.nn.Module) -> None:
    lm = language_model.LanguageModel(calibrated, None, "qwen3-0.6b", "calibrated")
    assert lm.encode("é!") == [0xC3, 0xA9, 0x21] and lm.config.vocab_size == 256
    ids = torch.tensor([lm.encode("It was the best of times")])
    with torch.no_grad():
        assert calibrated(ids).logits.isfinite().all()


def test_its_configuration_is_the_published_one() -> None:
    config = calibrated_config()
    values = {field: getattr(config, field) for field in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    assert values == {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (16, 8, 128)
    assert config.tie_word_embeddings and config.rms_norm_eps == 1e-6 and not config.attention_bias
