"""Checkpoints: tensors come back bit for bit in Problem's form, of a file that is opened once."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import (
    SAMPLE,
    TINY,
    assert_inputs,
    config_of,
    fails,
    gguf_tensors,
    inputs_of,
    layer_tensors,
    loaded,
    model_tensors,
    write_folder,
    write_gguf,
    write_sharded,
)

from castpoint.harness.problems import checkpoint, files
from castpoint.harness.problems.geometry import Geometry, geometry_named
from castpoint.variants.problem import Problem


@pytest.mark.parametrize("model_type", TINY)
@pytest.mark.parametrize("layer", [0, 2])
def test_folder_returns_the_layer_bit_for_bit(tmp_path, model_type, layer):
    geometry, inputs = loaded(str(write_folder(tmp_path / "m", model_type)), layer, "ignored")
    assert geometry == TINY[model_type]
    assert_inputs(inputs, inputs_of(layer_tensors(model_type, layer)))


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", ""])
def test_prefixes(tmp_path, prefix):
    folder = write_folder(tmp_path / "m", "qwen3", model_tensors("qwen3", prefix))
    assert_inputs(loaded(str(folder), 1, "")[1], inputs_of(layer_tensors("qwen3", 1)))


def test_gemma3_with_vision_nests_its_config_and_leaves_defaults_out(tmp_path):
    """As published for gemma-3-4b: no number of heads, so transformers' defaults count: 8 and 4 heads of 256."""
    text = {"model_type": "gemma3_text", "hidden_size": 32, "num_hidden_layers": 1}
    shapes = {"q_proj": [2048, 32], "k_proj": [1024, 32], "v_proj": [1024, 32], "q_norm": [256], "k_norm": [256]}
    tensors = {f"self_attn.{name}.weight": torch.zeros(shape).bfloat16() for name, shape in shapes.items()}
    tensors["input_layernorm.weight"] = torch.zeros(32).bfloat16()
    stored = {f"language_model.model.layers.0.{name}": tensor for name, tensor in tensors.items()}
    folder = write_folder(tmp_path / "m", "", stored, {"model_type": "gemma3", "text_config": text})
    geometry, inputs = loaded(str(folder), 0, "")
    assert geometry == Geometry(32, 8, 4, 1, head_dim=256, weight_offset=True)
    assert_inputs(inputs, inputs_of(tensors))


def test_null_in_config_means_the_default(tmp_path):
    """Llama: head_dim is hidden size / heads, and every query head has its own key/value head."""
    config = config_of("llama") | {"head_dim": None, "num_key_value_heads": None, "rms_norm_eps": None}
    tensors = model_tensors("llama")
    for name in [name for name in tensors if "k_proj" in name or "v_proj" in name]:
        tensors[name] = torch.cat([tensors[name], tensors[name]])
    geometry, _ = loaded(str(write_folder(tmp_path / "m", "llama", tensors, config)), 0, "")
    assert geometry == Geometry(64, 4, 4, 3, head_dim=16, eps=1e-6, head_norm=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_wider_tensors_are_rounded_to_nearest_even_and_that_is_said(tmp_path, dtype, capfd):
    checkpoint._say_rounded.cache_clear()
    exact = {name: tensor.to(dtype) for name, tensor in model_tensors("qwen3").items()}
    loaded(str(write_folder(tmp_path / "exact", "qwen3", exact)), 0, "")
    assert not capfd.readouterr().err
    tensors = {name: tensor.to(dtype) for name, tensor in model_tensors("qwen3").items()}
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-10], dtype=dtype)  # down, up, up
    tensors["model.layers.0.input_layernorm.weight"][:3] = ties
    _, inputs = loaded(str(write_folder(tmp_path / "m", "qwen3", tensors)), 0, "")
    assert inputs["norm_weight"].dtype == torch.bfloat16
    assert inputs["norm_weight"][:3].tolist() == [1.0, 1 + 2**-6, 1 + 2**-7]
    (note,) = capfd.readouterr().err.splitlines()
    assert note.startswith(f"note: norm weights are {str(dtype)[6:]} in this checkpoint, and are rounded to bf16 here")


def test_shards_of_the_layer_are_joined_and_others_left_closed(tmp_path):
    folder = write_sharded(tmp_path / "m", "qwen3")
    (folder / "model-3.safetensors").write_bytes(b"layer 2 lies here: opening it would fail")
    for layer in (0, 1):
        assert_inputs(loaded(str(folder), layer, "")[1], inputs_of(layer_tensors("qwen3", layer)))
    fails("model-3.safetensors", "truncated", source=folder, layer=2)


def test_lone_file_takes_its_geometry_from_the_model_name(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "geometry_named", {"tiny": TINY["qwen3"]}.__getitem__)
    folder = write_folder(tmp_path / "m", "qwen3")
    geometry, inputs = loaded(str(folder / "model.safetensors"), 1, "tiny")
    assert geometry == TINY["qwen3"]
    assert_inputs(inputs, inputs_of(layer_tensors("qwen3", 1)))


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_gguf_returns_the_layer_bit_for_bit(tmp_path, arch):
    path = write_gguf(tmp_path / "m.gguf", arch, gguf_tensors(arch), attn_v=gguf.GGMLQuantizationType.F16)
    geometry, inputs = loaded(str(path), 1, "ignored")
    assert geometry == TINY[arch]  # eps too: kept as float32, it must come back as 1e-6
    expected = layer_tensors(arch, 1)
    expected["self_attn.v_proj.weight"] = expected["self_attn.v_proj.weight"].half().bfloat16()
    assert_inputs(inputs, inputs_of(expected))


@pytest.mark.parametrize(("arch", "layers_of"), [("qwen2moe", "qwen2"), ("qwen3moe", "qwen3")])
def test_gguf_of_a_model_with_experts(tmp_path, arch, layers_of):
    """Its attention is that of the dense model, and so are the names; a bias is where its tensors are."""
    path = write_gguf(tmp_path / "m.gguf", arch, gguf_tensors(layers_of))
    geometry, inputs = loaded(str(path), 1, "")
    assert geometry == TINY[layers_of]
    assert_inputs(inputs, inputs_of(layer_tensors(layers_of, 1)))


def test_gguf_gemma3_27b_divides_logits_by_a_size_that_metadata_does_not_hold(tmp_path, monkeypatch):
    """llama.cpp knows it by its 62 layers: sqrt(5376 / 32), beside heads of 128 channels. Here by its 3."""
    path = write_gguf(tmp_path / "m.gguf", "gemma3", gguf_tensors("gemma3_text", norm_offset=1.0))
    assert loaded(str(path), 1, "")[0].logit_scale is None
    monkeypatch.setattr(checkpoint, "GEMMA3_27B_LAYERS", 3)
    assert loaded(str(path), 1, "")[0].logit_scale == (64 // 4) ** -0.5


def test_gguf_qwen3_with_bias(tmp_path):
    """Metadata does not say whether there is one: the tensors do."""
    rows = {"q": 128, "k": 64, "v": 64}
    bias = {f"blk.{i}.attn_{p}.bias": np.full(n, 2 + i, np.float32) for i in range(3) for p, n in rows.items()}
    path = write_gguf(tmp_path / "m.gguf", "qwen3", gguf_tensors("qwen3") | bias)
    geometry, inputs = loaded(str(path), 1, "")
    assert geometry.bias and inputs["bias"].tolist() == [3.0] * 256


def test_gguf_quantised_tensor_is_dequantised(tmp_path):
    """Q8_0: 32 values share a float16 scale. The expected values are computed here, without gguf's dequantiser."""
    tensors = gguf_tensors("qwen3")
    rng = np.random.default_rng(0)
    for layer in range(3):
        codes = rng.integers(-127, 128, size=(128, 2, 32)).astype(np.float32)
        codes[..., 0] = 127  # the largest code in every block fixes the scale the quantiser finds
        tensors[f"blk.{layer}.attn_q.weight"] = (codes * np.float32(2**-9)).reshape(128, 64)
    path = write_gguf(tmp_path / "m.gguf", "qwen3", tensors, attn_q=gguf.GGMLQuantizationType.Q8_0)
    assert "Q8_0" in {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    _, inputs = loaded(str(path), 2, "")
    assert torch.equal(inputs["qkv_weight"][:128], torch.from_numpy(tensors["blk.2.attn_q.weight"]).bfloat16())


def test_gguf_gemma3_norm_weights_come_back_less_one(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "gemma3", gguf_tensors("gemma3_text", norm_offset=1.0))
    geometry, inputs = loaded(str(path), 1, "")
    assert geometry == TINY["gemma3_text"] and geometry.weight_offset
    expected = layer_tensors("gemma3_text", 1)
    # 1 + w is rounded to float32 on the way in, so a w far below 1 loses bits there: compare at that rounding.
    for name in [name for name in expected if "norm" in name]:
        expected[name] = ((expected[name].float() + 1) - 1).bfloat16()
    assert_inputs(inputs, inputs_of(expected))


def test_gguf_reads_no_other_layer(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", "qwen2", gguf_tensors("qwen2"))
    read, dequantised = [], files.dequantised

    def recorded(tensor, subtract_one):
        read.append(tensor.name)
        return dequantised(tensor, subtract_one)

    monkeypatch.setattr(files, "dequantised", recorded)
    loaded(str(path), 1, "")
    stems = ("attn_norm.weight", *(f"attn_{p}.{kind}" for p in "qkv" for kind in ("weight", "bias")))
    assert sorted(read) == sorted(f"blk.1.{stem}" for stem in stems)


def test_gguf_rewritten_in_place_is_read_again(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "qwen2", gguf_tensors("qwen2"))
    first = loaded(str(path), 0, "")[1]
    path.unlink()
    write_gguf(path, "qwen2", {name: values * 2 for name, values in gguf_tensors("qwen2").items()})
    assert torch.equal(loaded(str(path), 0, "")[1]["norm_weight"], first["norm_weight"] * 2)


def test_sample_file_makes_a_problem():
    geometry, inputs = loaded(str(SAMPLE), 0, "qwen2.5-0.5b")
    assert geometry == geometry_named("qwen2.5-0.5b")
    raw = load_file(SAMPLE)
    expected = {"norm_weight": raw["input_layernorm_weight"], "x": raw["x"]}
    expected["qkv_weight"] = torch.cat([raw["q_proj_weight"], raw["k_proj_weight"], raw["v_proj_weight"]])
    expected["bias"] = torch.cat([raw["q_proj_bias"], raw["k_proj_bias"], raw["v_proj_bias"]])
    assert_inputs(inputs, expected)
    problem = Problem(
        **inputs, num_q_heads=geometry.num_q_heads, num_kv_heads=geometry.num_kv_heads, eps=geometry.eps, layer=0
    )
    assert (problem.tokens, problem.hidden_size, problem.num_heads, problem.head_dim) == (64, 896, 18, 64)
