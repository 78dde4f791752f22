"""Checkpoints that cannot be read or do not fit: each is named in one line, and no pickle is opened."""

from __future__ import annotations

import json
import pickle
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
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
from castpoint.harness.runs.errors import UserError


def test_absent_path_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: pytest.fail("the hub was asked"))
    for source in (tmp_path / "nothing", "nothing", "folder/nothing.safetensors", "folder/nothing.gguf"):
        fails(str(source), "does not exist", "hub id", source=source)


def test_a_quantisation_that_gguf_cannot_read_is_named() -> None:
    kind = gguf.GGMLQuantizationType.Q8_K  # of ggml's intermediate sums, which gguf's Python does not read
    tensor = SimpleNamespace(name="blk.0.attn_q.weight", tensor_type=kind, data=np.zeros((1, 292), np.uint8))
    with pytest.raises(UserError, match="gguf cannot read blk.0.attn_q.weight, stored as Q8_K"):
        files.dequantised(tensor, subtract_one=False)


class Trap:
    """Fails the test run loudly when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was opened')",)


def test_pickles_are_refused_by_suffix_and_by_content(tmp_path):
    for suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".BIN"):
        (tmp_path / f"m{suffix}").write_bytes(pickle.dumps(Trap(), protocol=0))  # text: nothing but the suffix tells
        fails(
            f"m{suffix}",
            "is a pickle, which is never opened",
            "safetensors",
            source=tmp_path / f"m{suffix}",
        )
    (tmp_path / "m.gguf").write_bytes(pickle.dumps(Trap()))
    fails("m.gguf", "is a pickle", source=tmp_path / "m.gguf")
    fails("Qwen/model.bin", "is a pickle", source="Qwen/model.bin")  # shaped like a hub id
    disguised = tmp_path / "m.safetensors"
    for protocol in (2, 3, 4, 5):
        disguised.write_bytes(pickle.dumps(Trap(), protocol))
        fails("m.safetensors", "is a pickle", source=disguised)
    torch.save({"w": torch.zeros(2)}, disguised)
    fails("m.safetensors", "is a pickle", source=disguised)
    torch.save({"w": torch.zeros(2)}, disguised, _use_new_zipfile_serialization=False)
    fails("m.safetensors", "is a pickle", source=disguised)


def test_pickles_are_refused_in_folders(tmp_path):
    folder = write_folder(tmp_path / "m", "qwen3")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    fails("no model.safetensors", "pytorch_model.bin is a pickle", source=folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    fails("model.safetensors", "is a pickle", source=folder)
    sharded = write_sharded(tmp_path / "s", "qwen3")
    index = (sharded / "model.safetensors.index.json").read_text().replace("model-2.safetensors", "model-2.bin")
    (sharded / "model.safetensors.index.json").write_text(index)
    (sharded / "model-2.bin").write_bytes(pickle.dumps(Trap()))
    fails("model-2.bin", "is a pickle", source=sharded, layer=1)


def test_safetensors_header_that_opens_like_a_pickle_is_read(tmp_path, monkeypatch):
    """A header of 640 bytes begins with 80 02, a pickle's first bytes."""
    monkeypatch.setattr(checkpoint, "geometry_named", {"tiny": TINY["qwen3"]}.__getitem__)
    tensors = {f"model.layers.0.{name}": tensor for name, tensor in layer_tensors("qwen3", 0).items()}
    path = tmp_path / "m.safetensors"
    for padding in range(600):
        save_file(tensors, path, {"": "x" * padding})
        if path.read_bytes()[:2] == b"\x80\x02":
            break
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert_inputs(loaded(str(path), 0, "tiny")[1], inputs_of(layer_tensors("qwen3", 0)))


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_files(tmp_path, keep):
    safetensors = write_folder(tmp_path / "m", "qwen3") / "model.safetensors"
    ggufs = write_gguf(tmp_path / "m.gguf", "qwen3", gguf_tensors("qwen3"))
    for path in (safetensors, ggufs):
        path.write_bytes(path.read_bytes()[:keep])
        fails(path.name, "truncated", source=path)


def test_foreign_files(tmp_path):
    for name, kind in (("m.safetensors", "no safetensors file"), ("m.gguf", "no GGUF file"), ("m", "no safetensors")):
        (tmp_path / name).write_bytes(b"<!DOCTYPE html><title>Not found</title>" * 50)
        fails(name, kind, source=tmp_path / name)


def test_gguf_is_recognised_by_content(tmp_path):
    path = write_gguf(tmp_path / "m.safetensors", "qwen2", gguf_tensors("qwen2"))
    assert_inputs(loaded(str(path), 0, "")[1], inputs_of(layer_tensors("qwen2", 0)))


def test_folder_without_weights_or_config(tmp_path):
    folder = write_folder(tmp_path / "m", "qwen3")
    (folder / "model.safetensors").unlink()
    fails("no model.safetensors and no model.safetensors.index.json", source=folder)
    (folder / "config.json").unlink()
    fails("no config.json", source=folder)


def test_missing_shard(tmp_path):
    folder = write_sharded(tmp_path / "m", "qwen3")
    (folder / "model-2.safetensors").unlink()
    fails("index.json", "names the shard model-2.safetensors", "holds no", source=folder, layer=1)


def test_broken_json(tmp_path):
    folder = write_sharded(tmp_path / "m", "qwen3")
    for text, words in (("{", "not JSON"), ("[]", "JSON object"), ("{}", "no weight_map")):
        (folder / "model.safetensors.index.json").write_text(text)
        fails("index.json", words, source=folder)
    (folder / "config.json").write_text("not\njson")
    fails("config.json", "not JSON", source=folder)
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        (folder / "config.json").write_text(json.dumps(config_of("qwen3") | {key: None}))
        fails("config.json", key, source=folder)


def test_missing_tensor_is_named(tmp_path):
    for missing in ("input_layernorm.weight", "self_attn.k_proj.weight", "self_attn.q_norm.weight"):
        tensors = model_tensors("qwen3")
        del tensors[f"model.layers.1.{missing}"]
        folder = write_folder(tmp_path / missing, "qwen3", tensors)
        fails(f"no tensor model.layers.1.{missing}", "config.json", source=folder, layer=1)
    tensors = gguf_tensors("qwen3")
    del tensors["blk.1.attn_k_norm.weight"]
    path = write_gguf(tmp_path / "m.gguf", "qwen3", tensors)
    fails("m.gguf", "no tensor blk.1.attn_k_norm.weight", source=path, layer=1)


def test_tensor_that_the_model_does_not_have_is_not_dropped(tmp_path):
    extra = {"model.layers.0.self_attn.v_proj.bias": torch.zeros(64).bfloat16()}
    folder = write_folder(tmp_path / "m", "qwen3", model_tensors("qwen3") | extra)
    fails("self_attn.v_proj.bias", "does not fit config.json", "has none", source=folder)


def test_shapes_must_fit(tmp_path):
    folder = write_folder(tmp_path / "m", "qwen3")
    words = ("input_layernorm.weight", "[64]", "does not fit --model qwen3-0.6b", "expected [1024]")
    fails(*words, source=folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_of("qwen3") | {"num_key_value_heads": 4}))
    words = ("self_attn.k_proj.weight", "[64, 64]", "does not fit config.json", "expected [128, 64]")
    fails(*words, source=folder)
    tensors = gguf_tensors("qwen3")
    tensors["blk.0.attn_v.weight"] = tensors["blk.0.attn_v.weight"].T.copy()[:, :32]
    path = write_gguf(tmp_path / "m.gguf", "qwen3", tensors)
    fails("blk.0.attn_v.weight", "[64, 32]", "does not fit metadata", "expected [64, 64]", source=path)


def test_sample_residual_stream_must_fit(tmp_path):
    tensors = load_file(SAMPLE) | {"x": torch.zeros(64, 895).bfloat16()}
    save_file(tensors, tmp_path / "m.safetensors", {"layer": "0"})
    fails("x of", "[64, 895]", "[64, 896]", source=tmp_path / "m.safetensors", model="qwen2.5-0.5b")


def test_sample_holds_one_layer():
    fails(SAMPLE.name, "holds layer 0, not layer 8", source=SAMPLE, layer=8, model="qwen2.5-0.5b")


def test_layer_out_of_range(tmp_path):
    folder = write_folder(tmp_path / "m", "qwen3")
    path = write_gguf(tmp_path / "m.gguf", "qwen2", gguf_tensors("qwen2"))
    for source in (folder, path):
        for layer in (-1, 3):
            fails(f"layer {layer} is out of range", "3 layers, 0 to 2", source=source, layer=layer)
    fails("layer 24 is out of range", "24 layers", source=SAMPLE, layer=24, model="qwen2.5-0.5b")


def test_unsupported_architectures_are_named(tmp_path):
    folder = write_folder(tmp_path / "m", "qwen3")
    for model_type in ("mamba", "gemma2", None):
        (folder / "config.json").write_text(json.dumps(config_of("qwen3") | {"model_type": model_type}))
        fails("unsupported", repr(model_type), "qwen2, qwen3, qwen3_moe, llama, gemma3", source=folder)
    path = write_gguf(tmp_path / "m.gguf", "llama", gguf_tensors("llama"))  # rows of q and k permuted for rotary
    fails("m.gguf", "unsupported GGUF architecture 'llama'", "qwen2, qwen3, gemma3", source=path)


def test_gguf_without_a_size(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "qwen3", gguf_tensors("qwen3"), drop="head_count")
    fails("metadata", "m.gguf", "num_attention_heads", source=path)


def test_unknown_model_name():
    fails("unknown model 'qwen2.5'", "config.json", source=SAMPLE, model="qwen2.5")


def test_fp8_weights_are_refused(tmp_path):
    tensors = model_tensors("qwen3")
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(128, 64, dtype=torch.float8_e4m3fn)
    folder = write_folder(tmp_path / "m", "qwen3", tensors)
    fails("layers.0.self_attn.q_proj.weight", "float8_e4m3fn", "bf16", source=folder)
