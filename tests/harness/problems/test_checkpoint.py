"""Checkpoints: tensors come back bit for bit in Problem's form, and every bad source is named in one line."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from castpoint.harness.problems import checkpoint
from castpoint.harness.problems.checkpoint import load_layer
from castpoint.harness.problems.geometry import Geometry, geometry_named
from castpoint.variants.problem import Problem

SAMPLE = Path(__file__).parents[2] / "data" / "qwen2.5-coder-0.5b-layer0.safetensors"

# q, k and v of one small model each; hidden size 64 is a multiple of 32, the block of Q8_0.
TINY = {
    "qwen2": Geometry(64, 4, 2, 3, head_dim=16, head_norm=False, bias=True),
    "qwen3": Geometry(64, 4, 2, 3, head_dim=32),
    "llama": Geometry(64, 4, 2, 3, head_dim=16, eps=1e-5, head_norm=False),
    "gemma3_text": Geometry(64, 4, 1, 3, head_dim=32, weight_offset=True),
}


def config_of(model_type: str) -> dict[str, object]:
    geometry = TINY[model_type]
    return {
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
    """What load_layer must return for these tensors of one layer."""
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
    geometry = TINY[{"gemma3": "gemma3_text", "llama": "llama"}.get(arch, arch)]
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


def fails(kind: type[Exception], *words: str, source: object, layer: int = 0, model: str = "qwen3-0.6b") -> None:
    """load_layer must raise exactly this kind of error, in one line that holds all these words."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_layer(str(source), layer, model)
    message = str(caught.value)
    assert isinstance(caught.value, kind), message
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} not in {message!r}"


# ---- what comes back


@pytest.mark.parametrize("model_type", TINY)
@pytest.mark.parametrize("layer", [0, 2])
def test_folder_returns_the_layer_bit_for_bit(tmp_path, model_type, layer):
    geometry, inputs = load_layer(str(write_folder(tmp_path / "m", model_type)), layer, "ignored")
    assert geometry == TINY[model_type]
    assert_inputs(inputs, inputs_of(layer_tensors(model_type, layer)))


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", ""])
def test_prefixes(tmp_path, prefix):
    folder = write_folder(tmp_path / "m", "qwen3", model_tensors("qwen3", prefix))
    assert_inputs(load_layer(str(folder), 1, "")[1], inputs_of(layer_tensors("qwen3", 1)))


def test_gemma3_with_vision_nests_its_config_and_leaves_defaults_out(tmp_path):
    """As published for gemma-3-4b: no number of heads, so transformers' defaults count: 8 and 4 heads of 256."""
    text = {"model_type": "gemma3_text", "hidden_size": 32, "num_hidden_layers": 1}
    shapes = {"q_proj": [2048, 32], "k_proj": [1024, 32], "v_proj": [1024, 32], "q_norm": [256], "k_norm": [256]}
    tensors = {f"self_attn.{name}.weight": torch.zeros(shape).bfloat16() for name, shape in shapes.items()}
    tensors["input_layernorm.weight"] = torch.zeros(32).bfloat16()
    stored = {f"language_model.model.layers.0.{name}": tensor for name, tensor in tensors.items()}
    folder = write_folder(tmp_path / "m", "", stored, {"model_type": "gemma3", "text_config": text})
    geometry, inputs = load_layer(str(folder), 0, "")
    assert geometry == Geometry(32, 8, 4, 1, head_dim=256, weight_offset=True)
    assert_inputs(inputs, inputs_of(tensors))


def test_null_in_config_means_the_default(tmp_path):
    """Llama: head_dim is hidden size / heads, and every query head has its own key/value head."""
    config = config_of("llama") | {"head_dim": None, "num_key_value_heads": None, "rms_norm_eps": None}
    tensors = model_tensors("llama")
    for name in [name for name in tensors if "k_proj" in name or "v_proj" in name]:
        tensors[name] = torch.cat([tensors[name], tensors[name]])
    geometry, _ = load_layer(str(write_folder(tmp_path / "m", "llama", tensors, config)), 0, "")
    assert geometry == Geometry(64, 4, 4, 3, head_dim=16, eps=1e-6, head_norm=False)


def test_config_defaults_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    for model_type, defaults in checkpoint.MODEL_TYPES.items():
        config = transformers.AutoConfig.for_model(model_type)
        assert {key: getattr(config, key) for key in defaults} == defaults, model_type
        assert config.rms_norm_eps == 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_wider_tensors_are_rounded_to_nearest_even(tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in model_tensors("qwen3").items()}
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-10], dtype=dtype)  # down, up, up
    tensors["model.layers.0.input_layernorm.weight"][:3] = ties
    _, inputs = load_layer(str(write_folder(tmp_path / "m", "qwen3", tensors)), 0, "")
    assert inputs["norm_weight"].dtype == torch.bfloat16
    assert inputs["norm_weight"][:3].tolist() == [1.0, 1 + 2**-6, 1 + 2**-7]


def test_shards_of_the_layer_are_joined_and_others_left_closed(tmp_path):
    folder = write_sharded(tmp_path / "m", "qwen3")
    (folder / "model-3.safetensors").write_bytes(b"layer 2 lies here: opening it would fail")
    for layer in (0, 1):
        assert_inputs(load_layer(str(folder), layer, "")[1], inputs_of(layer_tensors("qwen3", layer)))
    fails(ValueError, "model-3.safetensors", "truncated", source=folder, layer=2)


def test_lone_file_takes_its_geometry_from_the_model_name(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "geometry_named", {"tiny": TINY["qwen3"]}.__getitem__)
    folder = write_folder(tmp_path / "m", "qwen3")
    geometry, inputs = load_layer(str(folder / "model.safetensors"), 1, "tiny")
    assert geometry == TINY["qwen3"]
    assert_inputs(inputs, inputs_of(layer_tensors("qwen3", 1)))


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_gguf_returns_the_layer_bit_for_bit(tmp_path, arch):
    path = write_gguf(tmp_path / "m.gguf", arch, gguf_tensors(arch), attn_v=gguf.GGMLQuantizationType.F16)
    geometry, inputs = load_layer(str(path), 1, "ignored")
    assert geometry == TINY[arch]  # eps too: kept as float32, it must come back as 1e-6
    expected = layer_tensors(arch, 1)
    expected["self_attn.v_proj.weight"] = expected["self_attn.v_proj.weight"].half().bfloat16()
    assert_inputs(inputs, inputs_of(expected))


def test_gguf_qwen3_with_bias(tmp_path):
    """Metadata does not say whether there is one: the tensors do."""
    rows = {"q": 128, "k": 64, "v": 64}
    bias = {f"blk.{i}.attn_{p}.bias": np.full(n, 2 + i, np.float32) for i in range(3) for p, n in rows.items()}
    path = write_gguf(tmp_path / "m.gguf", "qwen3", gguf_tensors("qwen3") | bias)
    geometry, inputs = load_layer(str(path), 1, "")
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
    _, inputs = load_layer(str(path), 2, "")
    assert torch.equal(inputs["qkv_weight"][:128], torch.from_numpy(tensors["blk.2.attn_q.weight"]).bfloat16())


def test_gguf_gemma3_norm_weights_come_back_less_one(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "gemma3", gguf_tensors("gemma3_text", norm_offset=1.0))
    geometry, inputs = load_layer(str(path), 1, "")
    assert geometry == TINY["gemma3_text"] and geometry.weight_offset
    expected = layer_tensors("gemma3_text", 1)
    # 1 + w is rounded to float32 on the way in, so a w far below 1 loses bits there: compare at that rounding.
    for name in [name for name in expected if "norm" in name]:
        expected[name] = ((expected[name].float() + 1) - 1).bfloat16()
    assert_inputs(inputs, inputs_of(expected))


def test_gguf_reads_no_other_layer(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", "qwen2", gguf_tensors("qwen2"))
    read, dequantised = [], checkpoint._dequantised

    def recorded(tensor, subtract_one):
        read.append(tensor.name)
        return dequantised(tensor, subtract_one)

    monkeypatch.setattr(checkpoint, "_dequantised", recorded)
    load_layer(str(path), 1, "")
    stems = ("attn_norm.weight", *(f"attn_{p}.{kind}" for p in "qkv" for kind in ("weight", "bias")))
    assert sorted(read) == sorted(f"blk.1.{stem}" for stem in stems)


def test_gguf_rewritten_in_place_is_read_again(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "qwen2", gguf_tensors("qwen2"))
    first = load_layer(str(path), 0, "")[1]
    path.unlink()
    write_gguf(path, "qwen2", {name: values * 2 for name, values in gguf_tensors("qwen2").items()})
    assert torch.equal(load_layer(str(path), 0, "")[1]["norm_weight"], first["norm_weight"] * 2)


def test_sample_file_makes_a_problem():
    geometry, inputs = load_layer(str(SAMPLE), 0, "qwen2.5-0.5b")
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


# ---- the hub


def serve(monkeypatch, folder: Path) -> list[str]:
    """Replaces the download by a local folder; returns the list of the files asked for."""
    asked = []

    def download(repo: str, name: str) -> str:
        assert repo == "Qwen/Tiny"
        asked.append(name)
        if not (folder / name).is_file():
            raise EntryNotFoundError(f"404 Client Error.\n\nEntry Not Found for url: {name}.")
        return str(folder / name)

    monkeypatch.setattr(checkpoint, "hf_hub_download", download)
    return asked


def test_hub_downloads_only_the_shards_of_the_layer(tmp_path, monkeypatch):
    asked = serve(monkeypatch, write_sharded(tmp_path / "m", "qwen3"))
    geometry, inputs = load_layer("Qwen/Tiny", 1, "ignored")
    assert geometry == TINY["qwen3"]
    assert_inputs(inputs, inputs_of(layer_tensors("qwen3", 1)))
    shards = [name for name in asked if name.startswith("model-")]
    assert shards == ["model-1.safetensors", "model-2.safetensors"]


def test_hub_single_file(tmp_path, monkeypatch):
    asked = serve(monkeypatch, write_folder(tmp_path / "m", "qwen2"))
    assert_inputs(load_layer("Qwen/Tiny", 2, "")[1], inputs_of(layer_tensors("qwen2", 2)))
    assert asked == ["config.json", "model.safetensors"]


def test_hub_without_safetensors(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "m", "qwen3")
    (folder / "model.safetensors").unlink()
    serve(monkeypatch, folder)
    fails(FileNotFoundError, "hub:Qwen/Tiny", "no model.safetensors", "index.json", source="Qwen/Tiny")
    (folder / "config.json").unlink()
    fails(FileNotFoundError, "hub:Qwen/Tiny", "no config.json", source="Qwen/Tiny")


def test_hub_shard_missing_from_the_repository(tmp_path, monkeypatch):
    folder = write_sharded(tmp_path / "m", "qwen3")
    (folder / "model-2.safetensors").unlink()
    serve(monkeypatch, folder)
    fails(FileNotFoundError, "index.json", "names the shard model-2.safetensors", source="Qwen/Tiny", layer=1)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            LocalEntryNotFoundError("An error happened.\nPlease check your connection."),
            ("cannot be reached", "local path"),
        ),
        (ConnectionError("[Errno 111]\nConnection refused"), ("cannot be downloaded", "Connection refused")),
        (RepositoryNotFoundError.__new__(RepositoryNotFoundError), ("neither a path here nor a repository",)),
        (checkpoint.GatedRepoError.__new__(checkpoint.GatedRepoError), ("is gated", "hf auth login")),
    ],
)
def test_hub_errors(monkeypatch, error, words):
    def download(repo: str, name: str) -> str:
        raise error

    monkeypatch.setattr(checkpoint, "hf_hub_download", download)
    fails(FileNotFoundError, "Qwen/Tiny", *words, source="Qwen/Tiny")


def test_hub_offline_finds_cached_shards(tmp_path, monkeypatch):
    """Offline the client cannot tell a file that is not cached from one that does not exist: both must be tried."""
    folder = write_sharded(tmp_path / "m", "qwen3")

    def download(repo: str, name: str) -> str:
        if not (folder / name).is_file():
            raise LocalEntryNotFoundError("not in the disk cache")
        return str(folder / name)

    monkeypatch.setattr(checkpoint, "hf_hub_download", download)
    assert_inputs(load_layer("Qwen/Tiny", 0, "")[1], inputs_of(layer_tensors("qwen3", 0)))


# ---- bad sources


def test_absent_path_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "hf_hub_download", lambda *_: pytest.fail("the hub was asked"))
    for source in (tmp_path / "nothing", "nothing", "folder/nothing.safetensors", "folder/nothing.gguf"):
        fails(FileNotFoundError, str(source), "does not exist", "hub id", source=source)


class Trap:
    """Fails the test run loudly when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was opened')",)


def test_pickles_are_refused_by_suffix_and_by_content(tmp_path):
    for suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".BIN"):
        (tmp_path / f"m{suffix}").write_bytes(pickle.dumps(Trap(), protocol=0))  # text: nothing but the suffix tells
        fails(
            ValueError,
            f"m{suffix}",
            "is a pickle, which is never opened",
            "safetensors",
            source=tmp_path / f"m{suffix}",
        )
    (tmp_path / "m.gguf").write_bytes(pickle.dumps(Trap()))
    fails(ValueError, "m.gguf", "is a pickle", source=tmp_path / "m.gguf")
    fails(ValueError, "Qwen/model.bin", "is a pickle", source="Qwen/model.bin")  # shaped like a hub id
    disguised = tmp_path / "m.safetensors"
    for protocol in (2, 3, 4, 5):
        disguised.write_bytes(pickle.dumps(Trap(), protocol))
        fails(ValueError, "m.safetensors", "is a pickle", source=disguised)
    torch.save({"w": torch.zeros(2)}, disguised)
    fails(ValueError, "m.safetensors", "is a pickle", source=disguised)
    torch.save({"w": torch.zeros(2)}, disguised, _use_new_zipfile_serialization=False)
    fails(ValueError, "m.safetensors", "is a pickle", source=disguised)


def test_pickles_are_refused_in_folders(tmp_path):
    folder = write_folder(tmp_path / "m", "qwen3")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    fails(FileNotFoundError, "no model.safetensors", "pytorch_model.bin is a pickle", source=folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    fails(ValueError, "model.safetensors", "is a pickle", source=folder)
    sharded = write_sharded(tmp_path / "s", "qwen3")
    index = (sharded / "model.safetensors.index.json").read_text().replace("model-2.safetensors", "model-2.bin")
    (sharded / "model.safetensors.index.json").write_text(index)
    (sharded / "model-2.bin").write_bytes(pickle.dumps(Trap()))
    fails(ValueError, "model-2.bin", "is a pickle", source=sharded, layer=1)


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
    assert_inputs(load_layer(str(path), 0, "tiny")[1], inputs_of(layer_tensors("qwen3", 0)))


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_files(tmp_path, keep):
    safetensors = write_folder(tmp_path / "m", "qwen3") / "model.safetensors"
    ggufs = write_gguf(tmp_path / "m.gguf", "qwen3", gguf_tensors("qwen3"))
    for path in (safetensors, ggufs):
        path.write_bytes(path.read_bytes()[:keep])
        fails(ValueError, path.name, "truncated", source=path)


def test_foreign_files(tmp_path):
    for name, kind in (("m.safetensors", "no safetensors file"), ("m.gguf", "no GGUF file"), ("m", "no safetensors")):
        (tmp_path / name).write_bytes(b"<!DOCTYPE html><title>Not found</title>" * 50)
        fails(ValueError, name, kind, source=tmp_path / name)


def test_gguf_is_recognised_by_content(tmp_path):
    path = write_gguf(tmp_path / "m.safetensors", "qwen2", gguf_tensors("qwen2"))
    assert_inputs(load_layer(str(path), 0, "")[1], inputs_of(layer_tensors("qwen2", 0)))


def test_folder_without_weights_or_config(tmp_path):
    folder = write_folder(tmp_path / "m", "qwen3")
    (folder / "model.safetensors").unlink()
    fails(FileNotFoundError, "no model.safetensors and no model.safetensors.index.json", source=folder)
    (folder / "config.json").unlink()
    fails(FileNotFoundError, "no config.json", source=folder)


def test_missing_shard(tmp_path):
    folder = write_sharded(tmp_path / "m", "qwen3")
    (folder / "model-2.safetensors").unlink()
    fails(FileNotFoundError, "index.json", "names the shard model-2.safetensors", "holds no", source=folder, layer=1)


def test_broken_json(tmp_path):
    folder = write_sharded(tmp_path / "m", "qwen3")
    for text, words in (("{", "not JSON"), ("[]", "JSON object"), ("{}", "no weight_map")):
        (folder / "model.safetensors.index.json").write_text(text)
        fails(ValueError, "index.json", words, source=folder)
    (folder / "config.json").write_text("not\njson")
    fails(ValueError, "config.json", "not JSON", source=folder)
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        (folder / "config.json").write_text(json.dumps(config_of("qwen3") | {key: None}))
        fails(ValueError, "config.json", key, source=folder)


def test_missing_tensor_is_named(tmp_path):
    for missing in ("input_layernorm.weight", "self_attn.k_proj.weight", "self_attn.q_norm.weight"):
        tensors = model_tensors("qwen3")
        del tensors[f"model.layers.1.{missing}"]
        folder = write_folder(tmp_path / missing, "qwen3", tensors)
        fails(ValueError, f"no tensor model.layers.1.{missing}", "config.json", source=folder, layer=1)
    tensors = gguf_tensors("qwen3")
    del tensors["blk.1.attn_k_norm.weight"]
    path = write_gguf(tmp_path / "m.gguf", "qwen3", tensors)
    fails(ValueError, "m.gguf", "no tensor blk.1.attn_k_norm.weight", source=path, layer=1)


def test_tensor_that_the_model_does_not_have_is_not_dropped(tmp_path):
    extra = {"model.layers.0.self_attn.v_proj.bias": torch.zeros(64).bfloat16()}
    folder = write_folder(tmp_path / "m", "qwen3", model_tensors("qwen3") | extra)
    fails(ValueError, "self_attn.v_proj.bias", "does not fit config.json", "has none", source=folder)


def test_shapes_must_fit(tmp_path):
    folder = write_folder(tmp_path / "m", "qwen3")
    words = ("input_layernorm.weight", "[64]", "does not fit --model qwen3-0.6b", "expected [1024]")
    fails(ValueError, *words, source=folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_of("qwen3") | {"num_key_value_heads": 4}))
    words = ("self_attn.k_proj.weight", "[64, 64]", "does not fit config.json", "expected [128, 64]")
    fails(ValueError, *words, source=folder)
    tensors = gguf_tensors("qwen3")
    tensors["blk.0.attn_v.weight"] = tensors["blk.0.attn_v.weight"].T.copy()[:, :32]
    path = write_gguf(tmp_path / "m.gguf", "qwen3", tensors)
    fails(ValueError, "blk.0.attn_v.weight", "[64, 32]", "does not fit metadata", "expected [64, 64]", source=path)


def test_sample_residual_stream_must_fit(tmp_path):
    tensors = load_file(SAMPLE) | {"x": torch.zeros(64, 895).bfloat16()}
    save_file(tensors, tmp_path / "m.safetensors", {"layer": "0"})
    fails(ValueError, "x of", "[64, 895]", "[64, 896]", source=tmp_path / "m.safetensors", model="qwen2.5-0.5b")


def test_sample_holds_one_layer():
    fails(ValueError, SAMPLE.name, "holds layer 0, not layer 8", source=SAMPLE, layer=8, model="qwen2.5-0.5b")


def test_layer_out_of_range(tmp_path):
    folder = write_folder(tmp_path / "m", "qwen3")
    path = write_gguf(tmp_path / "m.gguf", "qwen2", gguf_tensors("qwen2"))
    for source in (folder, path):
        for layer in (-1, 3):
            fails(ValueError, f"layer {layer} is out of range", "3 layers, 0 to 2", source=source, layer=layer)
    fails(ValueError, "layer 24 is out of range", "24 layers", source=SAMPLE, layer=24, model="qwen2.5-0.5b")


def test_unsupported_architectures_are_named(tmp_path):
    folder = write_folder(tmp_path / "m", "qwen3")
    for model_type in ("mamba", "gemma2", None):
        (folder / "config.json").write_text(json.dumps(config_of("qwen3") | {"model_type": model_type}))
        fails(ValueError, "unsupported", repr(model_type), "qwen2, qwen3, qwen3_moe, llama, gemma3", source=folder)
    path = write_gguf(tmp_path / "m.gguf", "llama", gguf_tensors("llama"))  # rows of q and k permuted for rotary
    fails(ValueError, "m.gguf", "unsupported GGUF architecture 'llama'", "qwen2, qwen3, gemma3", source=path)


def test_gguf_without_a_size(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "qwen3", gguf_tensors("qwen3"), drop="head_count")
    fails(ValueError, "metadata", "m.gguf", "num_attention_heads", source=path)


def test_unknown_model_name():
    fails(ValueError, "unknown model 'qwen2.5'", "config.json", source=SAMPLE, model="qwen2.5")


def test_fp8_weights_are_refused(tmp_path):
    tensors = model_tensors("qwen3")
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(128, 64, dtype=torch.float8_e4m3fn)
    folder = write_folder(tmp_path / "m", "qwen3", tensors)
    fails(ValueError, "layers.0.self_attn.q_proj.weight", "float8_e4m3fn", "bf16", source=folder)
