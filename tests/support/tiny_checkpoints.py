"""Checkpoints of one tiny model in every form that is read, and what reading them must give."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from castpoint.harness.problems.checkpoint import open_checkpoint
from castpoint.harness.problems.geometry import Geometry
from castpoint.harness.runs.errors import UserError

SAMPLE = Path(__file__).parents[1] / "data" / "qwen2.5-coder-0.5b-layer0.safetensors"

# q, k and v of one small model each; hidden size 64 is a multiple of 32, the block of Q8_0.
TINY = {
    "qwen2": Geometry(64, 4, 2, 3, head_dim=16, head_norm=False, bias=True),
    "qwen3": Geometry(64, 4, 2, 3, head_dim=32),
    "llama": Geometry(64, 4, 2, 3, head_dim=16, eps=1e-5, head_norm=False),
    "gemma3_text": Geometry(64, 4, 1, 3, head_dim=32, weight_offset=True),
}


def config_of(model_type: str) -> dict[str, object]:
    geometry = TINY[model_type]
    scalar = {"query_pre_attn_scalar": geometry.head_dim} if model_type == "gemma3_text" else {}
    return scalar | {
        "model_type": model_type,
        "hidden_size": geometry.hidden_size,
        "num_attention_heads": geometry.num_q_heads,
        "num_key_value_heads": geometry.num_kv_heads,
        "num_hidden_layers": geometry.num_layers,
        "head_dim": geometry.head_dim,
        "rms_norm_eps": geometry.eps,
    }


def layer_tensors(model_type: str, layer: int) -> dict[str, torch.Tensor]:
    """One layer under Hugging Face's names, all values different, norms small like Gemma's w - 1."""
    geometry = TINY[model_type]
    generator = torch.Generator().manual_seed(layer)
    heads = {"q": geometry.num_q_heads, "k": geometry.num_kv_heads, "v": geometry.num_kv_heads}
    shapes = {"input_layernorm.weight": [geometry.hidden_size]}
    shapes |= {f"self_attn.{p}_proj.weight": [n * geometry.head_dim, geometry.hidden_size] for p, n in heads.items()}
    if geometry.bias:
        shapes |= {f"self_attn.{p}_proj.bias": [n * geometry.head_dim] for p, n in heads.items()}
    if geometry.head_norm:
        shapes |= {f"self_attn.{p}_norm.weight": [geometry.head_dim] for p in "qk"}
    return {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in shapes.items()}


def model_tensors(model_type: str, prefix: str = "model.") -> dict[str, torch.Tensor]:
    layers = range(TINY[model_type].num_layers)
    return {f"{prefix}layers.{i}.{name}": t for i in layers for name, t in layer_tensors(model_type, i).items()}


def inputs_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a checkpoint must give for these tensors of one layer."""
    projections = [tensors[f"self_attn.{p}_proj.weight"] for p in ("q", "k", "v")]
    inputs = {"norm_weight": tensors["input_layernorm.weight"], "qkv_weight": torch.cat(projections)}
    if "self_attn.q_proj.bias" in tensors:
        inputs["bias"] = torch.cat([tensors[f"self_attn.{p}_proj.bias"] for p in ("q", "k", "v")])
    for p in "qk":
        if f"self_attn.{p}_norm.weight" in tensors:
            inputs[f"{p}_norm_weight"] = tensors[f"self_attn.{p}_norm.weight"]
    return inputs


def assert_inputs(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert tensor.dtype == torch.bfloat16 and tensor.is_contiguous(), name
        assert torch.equal(tensor, expected[name]), name


def write_folder(folder: Path, model_type: str, tensors: dict | None = None, config: dict | None = None) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config or config_of(model_type)))
    save_file(tensors or model_tensors(model_type), folder / "model.safetensors")
    return folder


def write_sharded(folder: Path, model_type: str) -> Path:
    """A shard per layer, and layer 1 torn: its norms in one shard, the rest in the next."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of(model_type)))
    tensors = model_tensors(model_type)
    shard_of = {name: f"model-{int('.0.' not in name) + int('_proj' in name)}.safetensors" for name in tensors}
    shard_of |= {name: "model-3.safetensors" for name in tensors if ".2." in name}
    for shard in set(shard_of.values()):
        save_file({name: tensors[name] for name in tensors if shard_of[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    return folder


GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}


def write_gguf(path: Path, arch: str, tensors: dict[str, np.ndarray], drop: str = "", **types) -> Path:
    """A GGUF file as llama.cpp's converter lays it out, with `blk.{i}.` names; types: name -> quantisation."""
    geometry = TINY[{"gemma3": "gemma3_text", "qwen2moe": "qwen2", "qwen3moe": "qwen3"}.get(arch, arch)]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(geometry.num_layers)
    writer.add_embedding_length(geometry.hidden_size)
    if drop != "head_count":
        writer.add_head_count(geometry.num_q_heads)
    writer.add_head_count_kv(geometry.num_kv_heads)
    writer.add_key_length(geometry.head_dim)
    writer.add_layer_norm_rms_eps(geometry.eps)
    for name, values in tensors.items():
        quantisation = types.get(name.split(".")[2])
        raw = values if quantisation is None else gguf.quantize(values, quantisation)
        writer.add_tensor(name, raw, raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(model_type: str, norm_offset: float = 0.0) -> dict[str, np.ndarray]:
    """float32 tensors of every layer under GGUF names, norms shifted as llama.cpp's converter shifts Gemma's."""
    tensors = {}
    for layer in range(TINY[model_type].num_layers):
        for name, tensor in layer_tensors(model_type, layer).items():
            stem, kind = name.rsplit(".", 1)
            shift = norm_offset if "norm" in stem else 0.0
            tensors[f"blk.{layer}.{GGUF_NAMES[stem]}.{kind}"] = tensor.float().numpy() + np.float32(shift)
    return tensors


def loaded(source: object, layer: int, model: str) -> tuple[Geometry, dict[str, torch.Tensor]]:
    """Geometry and inputs of one layer of a checkpoint that is opened for it."""
    checkpoint = open_checkpoint(str(source), model)
    return checkpoint.geometry, checkpoint.layer(layer)


def fails(*words: str, source: object, layer: int = 0, model: str = "qwen3-0.6b") -> None:
    """Opening it and reading the layer must raise a UserError, in one line that holds all these words."""
    with pytest.raises(UserError) as caught:
        loaded(source, layer, model)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} not in {message!r}"
