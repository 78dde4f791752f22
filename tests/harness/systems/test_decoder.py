"""The plain decoder against transformers, bit for bit; its weights from safetensors and GGUF, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import IDS, saved, tiny_model

from castpoint.harness.systems.decoder import STAGES, forward
from castpoint.harness.systems.weights import of_model, opened

TYPES = ("qwen2", "qwen3", "gemma3_text")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("model_type", TYPES)
def test_the_decoder_says_what_transformers_says(tmp_path: Path, model_type: str, dtype: torch.dtype) -> None:
    weights = opened(str(saved(tmp_path, model_type)))
    model = type(tiny_model(model_type)).from_pretrained(tmp_path, dtype=dtype, attn_implementation="eager")
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0]
    stages = []
    actual = forward(weights.config, weights.all(dtype), IDS, lambda stage, layer, value: stages.append((stage, layer)))
    assert torch.equal(actual, expected)
    due = [s for s in STAGES if "normed" not in s or "_" not in s or weights.config.head_norm or s == "mlp_normed"]
    assert sorted(stage for stage, layer in stages if layer == 1) == sorted(due)


@pytest.mark.parametrize("model_type", TYPES)
def test_weights_of_a_model_in_memory_are_those_of_its_folder(tmp_path: Path, model_type: str) -> None:
    inside, outside = of_model(tiny_model(model_type), "drawn"), opened(str(saved(tmp_path, model_type)))
    assert inside.config == outside.config
    for name, tensor in outside.all(torch.float32).items():
        assert torch.equal(tensor, inside.read(name).float())


def planted(folder: Path, change: str) -> str:
    """A saved Qwen2 with one tensor more, less or of another shape."""
    path = saved(folder, "qwen2") / "model.safetensors"
    tensors = load_file(path)
    if change == "no bias":
        del tensors["model.layers.1.self_attn.k_proj.bias"]
    elif change == "a bias too many":
        tensors["model.layers.2.self_attn.o_proj.bias"] = torch.zeros(64, dtype=torch.bfloat16)
    else:
        tensors["model.norm.weight"] = torch.zeros(32, dtype=torch.bfloat16)
    save_file(tensors, path, {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    "change, said",
    [
        ("no bias", "has no tensor for the parameter model.layers.1.self_attn.k_proj.bias: nothing would fill it"),
        (
            "a bias too many",
            "has a tensor model.layers.2.self_attn.o_proj.bias, which no parameter of that model takes",
        ),
        ("another shape", r"model.norm.weight of .* has shape \[32\], which must be \[64\]"),
    ],
)
def test_a_parameter_that_nothing_fills_is_an_error_by_name(tmp_path: Path, change: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        opened(planted(tmp_path, change))


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unsupported architecture 'llama': supported are qwen2, qwen3, gemma3_text"):
        opened(str(saved(tmp_path, "llama")))
