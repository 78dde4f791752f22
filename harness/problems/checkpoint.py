"""One attention layer's weights from a real checkpoint: safetensors, GGUF, a folder, or a Hugging Face hub id.

Only the tensors of the layer asked for are read. A pickle is never opened, remote code is never run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import gguf
import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from castpoint.harness.problems.geometry import Geometry, geometry_named

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

# role -> its name after `model.layers.{i}.` (Hugging Face) and after `blk.{i}.` (gguf.constants.TENSOR_NAMES)
NAMES = {
    "norm": ("input_layernorm.weight", "attn_norm.weight"),
    "q": ("self_attn.q_proj.weight", "attn_q.weight"),
    "k": ("self_attn.k_proj.weight", "attn_k.weight"),
    "v": ("self_attn.v_proj.weight", "attn_v.weight"),
    "q_bias": ("self_attn.q_proj.bias", "attn_q.bias"),
    "k_bias": ("self_attn.k_proj.bias", "attn_k.bias"),
    "v_bias": ("self_attn.v_proj.bias", "attn_v.bias"),
    "q_norm": ("self_attn.q_norm.weight", "attn_q_norm.weight"),
    "k_norm": ("self_attn.k_norm.weight", "attn_k_norm.weight"),
}
HF_PREFIXES = ("model.", "model.language_model.", "language_model.model.", "")  # two with vision; a bare backbone
FLAT_NAMES = {role: hf.removeprefix("self_attn.").replace(".", "_") for role, (hf, _) in NAMES.items()} | {"x": "x"}

# model_type -> what its config.json may leave out: defaults of transformers 5.23's configuration classes, which
# Gemma 3's published configurations with vision rely on.
GEMMA3 = dict(hidden_size=2304, num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4, head_dim=256)
MODEL_TYPES = {"qwen2": {}, "qwen3": {"head_dim": 128}, "qwen3_moe": {}, "llama": {}, "gemma3_text": GEMMA3}
HEAD_NORM_TYPES = ("qwen3", "qwen3_moe", "gemma3_text")

# Architectures whose converter leaves the rows of q and k in Hugging Face's order; llama's permutes them for rotary.
GGUF_MODEL_TYPES = {"qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
GGUF_CONFIG = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}


@dataclass(frozen=True)
class Stored:
    """A tensor lying in a checkpoint: its shape, known from the header, and how to read it."""

    shape: list[int]
    read: Callable[[], Tensor]


def load_layer(source: str, layer: int, model: str) -> tuple[Geometry, dict[str, Tensor]]:
    """The geometry and the weights of one layer's RMSNorm, QKV and head norm, named as Problem names them.

    source  a .safetensors or .gguf file; a folder with config.json and model.safetensors, or its shards and index;
            or a hub id such as Qwen/Qwen3-0.6B: the files that hold the layer are downloaded into the hub's cache
    layer   counted from 0
    model   names the geometry of a lone .safetensors file; the other sources carry their own

    Tensors are bf16 and contiguous; fp16, fp32 and quantised ones are rounded to bf16 (nearest, ties to even):
    norm_weight [D], qkv_weight [(Hq + 2 Hkv) * Dh, D] with rows q, k, v, and where the model has them
    bias [(Hq + 2 Hkv) * Dh], q_norm_weight [Dh], k_norm_weight [Dh]; and x [T, D], the residual stream entering
    the layer, where the file carries one. With Geometry.weight_offset, norm weights are w - 1 in every format.

    Raises FileNotFoundError (no such path, shard or hub repository; hub unreachable) or ValueError (pickle, broken or
    foreign file, unsupported architecture, layer out of range, missing tensor, wrong shape or dtype), in one line.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _load_folder(partial(_local_file, path), source, layer)
    refuse_pickle(path)
    if path.is_file():
        if path.suffix == ".gguf" or _head(path).startswith(b"GGUF"):
            return _load_gguf(path, layer)
        return _load_safetensors(path, layer, model)
    if HUB_ID.fullmatch(source) and path.suffix not in (".safetensors", ".gguf"):
        return _load_folder(partial(_hub_file, source), f"hub:{source}", layer)
    raise FileNotFoundError(
        f"{source} does not exist, and is no hub id such as Qwen/Qwen3-0.6B: "
        "give a .safetensors or .gguf file, a folder holding model.safetensors, or a hub id"
    )


def _load_folder(fetch: Callable[..., Path], where: str, layer: int) -> tuple[Geometry, dict[str, Tensor]]:
    """A folder or hub repository; fetch(*names) is the path of the first of these files that it holds."""
    geometry = _geometry(_read_json(fetch("config.json")), f"config.json of {where}")
    _check_layer(layer, geometry, where)
    weights = fetch(WEIGHTS, INDEX)
    if weights.name == WEIGHTS:
        stored, _ = _open_safetensors(weights)
        names = _hf_names(stored, layer)
    else:
        shards = _read_json(weights).get("weight_map")
        if not isinstance(shards, dict):
            raise ValueError(f"{weights} has no weight_map: it is no index of safetensors shards")
        names, stored = _hf_names(shards, layer), {}
        for shard in sorted({str(shards[name]) for name in names.values() if name in shards}):
            try:
                stored |= _open_safetensors(fetch(shard))[0]
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{INDEX} of {where} names the shard {shard}, but {error}") from error
    return geometry, _read_inputs(stored, names, geometry, where, f"config.json of {where}")


def _load_safetensors(path: Path, layer: int, model: str) -> tuple[Geometry, dict[str, Tensor]]:
    """A lone file has no config: its geometry goes by the model's name."""
    stored, metadata = _open_safetensors(path)
    try:
        geometry = geometry_named(model)
    except KeyError as error:
        raise ValueError(f"{error.args[0]}; or give the folder that holds config.json and {path.name}") from error
    _check_layer(layer, geometry, f"--model {model}")
    names = _hf_names(stored, layer)
    if FLAT_NAMES["norm"] in stored:
        names = FLAT_NAMES
        if metadata.get("layer") != str(layer):
            raise ValueError(f"{path} holds layer {metadata.get('layer', 'unknown')}, not layer {layer}")
    return geometry, _read_inputs(stored, names, geometry, str(path), f"--model {model}")


def _load_gguf(path: Path, layer: int) -> tuple[Geometry, dict[str, Tensor]]:
    stat = path.stat()
    config, tensors = _open_gguf(path, stat.st_size, stat.st_mtime_ns)
    names = {role: f"blk.{layer}.{name}" for role, (_, name) in NAMES.items()}
    geometry = _geometry(config | {"attention_bias": names["q_bias"] in tensors}, f"metadata of {path}")
    _check_layer(layer, geometry, str(path))
    # llama.cpp's converter adds Gemma's 1 to every norm weight, in float32; Hugging Face stores w - 1. transformers
    # 5.23 undoes it the same way (modeling_gguf_pytorch_utils.py, Gemma2TensorProcessor).
    norms = {names[role] for role in ("norm", "q_norm", "k_norm")} if geometry.weight_offset else set()
    stored = {
        name: Stored(tensor.shape.tolist()[::-1], partial(_dequantised, tensor, name in norms))  # ggml: columns first
        for name in names.values()
        if (tensor := tensors.get(name)) is not None
    }
    return geometry, _read_inputs(stored, names, geometry, str(path), f"metadata of {path}")


@lru_cache(maxsize=1)
def _open_gguf(path: Path, size: int, modified: int) -> tuple[dict[str, object], dict[str, gguf.ReaderTensor]]:
    """GGUF metadata under the keys of a config.json, and every tensor of the file, unread.

    Kept for the next layer: gguf walks the tokenizer's 262,144 tokens in Python, 11 s a Gemma 3 file.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise ValueError(f"{path} is truncated or no GGUF file: {_one_line(error)}") from error
    values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.")}
    arch = values.get("general.architecture")
    if arch not in GGUF_MODEL_TYPES:
        known = ", ".join(GGUF_MODEL_TYPES)
        raise ValueError(f"{path} has the unsupported GGUF architecture {arch!r}: supported are {known}")
    config = {key: values[f"{arch}.{name}"] for key, name in GGUF_CONFIG.items() if f"{arch}.{name}" in values}
    if "rms_norm_eps" in config:  # kept as float32, 9.99999997e-7: its shortest decimal is the published 1e-6
        config["rms_norm_eps"] = shortest(config["rms_norm_eps"])
    return config | {"model_type": GGUF_MODEL_TYPES[arch]}, {tensor.name: tensor for tensor in reader.tensors}


def _open_safetensors(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Every tensor of the file, unread, and the file's metadata. safetensors checks the header against the size."""
    refuse_pickle(path)
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {_one_line(error)}") from error
    stored = {name: Stored(file.get_slice(name).get_shape(), partial(file.get_tensor, name)) for name in file.keys()}
    return stored, file.metadata() or {}


def _read_inputs(
    stored: dict[str, Stored], names: dict[str, str], geometry: Geometry, where: str, origin: str
) -> dict[str, Tensor]:
    """Problem's inputs from the tensors called names[role], which must be those of the geometry found in `origin`."""
    shapes = _shapes(geometry)
    if "x" in names and "x" in stored:
        shapes["x"] = [*stored["x"].shape[:1], geometry.hidden_size]
    for role, name in names.items():
        if role in shapes and name not in stored:
            raise ValueError(f"{where} has no tensor {name}, which {origin} asks for")
        if role not in shapes and name in stored:
            raise ValueError(f"{where} has a tensor {name}, which does not fit {origin}: that model has none")
        if role in shapes and (shape := stored[name].shape) != shapes[role]:
            expected = f"expected {shapes[role]}"
            raise ValueError(f"{name} of {where} has shape {shape}, which does not fit {origin}: {expected}")
    read = {role: _bf16(names[role], stored[names[role]].read()) for role in shapes}
    inputs = {"norm_weight": read["norm"], "qkv_weight": torch.cat([read["q"], read["k"], read["v"]])}
    if geometry.bias:
        inputs["bias"] = torch.cat([read["q_bias"], read["k_bias"], read["v_bias"]])
    if geometry.head_norm:
        inputs |= {"q_norm_weight": read["q_norm"], "k_norm_weight": read["k_norm"]}
    return inputs | ({"x": read["x"]} if "x" in read else {})


def _shapes(geometry: Geometry) -> dict[str, list[int]]:
    """Role -> shape, for every tensor that a layer of this geometry has."""
    head_dim = geometry.head_dim
    rows = {"q": geometry.num_q_heads * head_dim, "k": geometry.num_kv_heads * head_dim}
    rows["v"] = rows["k"]
    shapes = {"norm": [geometry.hidden_size]} | {role: [n, geometry.hidden_size] for role, n in rows.items()}
    if geometry.bias:
        shapes |= {f"{role}_bias": [n] for role, n in rows.items()}
    if geometry.head_norm:
        shapes |= {"q_norm": [head_dim], "k_norm": [head_dim]}
    return shapes


def _bf16(name: str, tensor: Tensor) -> Tensor:
    # fp8 and integer weights mean nothing without their scales, which are tensors of their own.
    if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"{name} is stored as {tensor.dtype}: of safetensors only bf16, fp16 and fp32 are read")
    return tensor.to(torch.bfloat16).contiguous()


def _dequantised(tensor: gguf.ReaderTensor, subtract_one: bool) -> Tensor:
    """float32 [rows, columns], copied out of the mapped file."""
    try:
        values = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    except NotImplementedError as error:
        raise ValueError(f"{tensor.name} is stored as {tensor.tensor_type.name}, which gguf cannot read") from error
    return torch.from_numpy(values) - 1 if subtract_one else torch.from_numpy(values)


def _hf_names(present: dict[str, object], layer: int) -> dict[str, str]:
    """Role -> full name, under the prefix that this checkpoint uses."""
    first = (prefix for prefix in HF_PREFIXES if f"{prefix}layers.{layer}.{NAMES['norm'][0]}" in present)
    prefix = next(first, HF_PREFIXES[0])
    return {role: f"{prefix}layers.{layer}.{name}" for role, (name, _) in NAMES.items()}


def _geometry(config: dict[str, object], origin: str) -> Geometry:
    """The geometry that a Hugging Face config.json describes."""
    model_type = config.get("model_type")
    if model_type == "gemma3" and isinstance(config.get("text_config"), dict):  # with vision: the text part is nested
        model_type, config = "gemma3_text", config["text_config"]
    if model_type not in MODEL_TYPES:
        known = ", ".join([*MODEL_TYPES, "gemma3"])
        raise ValueError(f"{origin} names the unsupported model type {model_type!r}: supported are {known}")
    values = MODEL_TYPES[model_type] | {key: value for key, value in config.items() if value is not None}
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        if not isinstance(values.get(key), int) or values[key] < 1:
            raise ValueError(f"{origin} must give {key} as a positive number, not {values.get(key)!r}")
    hidden_size, heads = values["hidden_size"], values["num_attention_heads"]
    return Geometry(
        hidden_size,
        heads,
        values.get("num_key_value_heads", heads),
        values["num_hidden_layers"],
        head_dim=values.get("head_dim", hidden_size // heads),
        eps=values.get("rms_norm_eps", 1e-6),
        head_norm=model_type in HEAD_NORM_TYPES,
        bias=model_type == "qwen2" or values.get("attention_bias", False),  # Qwen2 always has one, without a key
        weight_offset=model_type == "gemma3_text",
    )


def _check_layer(layer: int, geometry: Geometry, where: str) -> None:
    if not 0 <= layer < geometry.num_layers:
        last = geometry.num_layers - 1
        raise ValueError(f"layer {layer} is out of range: {where} has {geometry.num_layers} layers, 0 to {last}")


def _read_json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def _local_file(folder: Path, *names: str) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES) if WEIGHTS in names else []
    hint = f": {pickles[0]} is a pickle, which is never opened, convert it to safetensors" if pickles else ""
    raise FileNotFoundError(f"{folder} holds no {' and no '.join(names)}{hint}")


def _hub_file(repo: str, *names: str) -> Path:
    problem = f"hub:{repo} holds no {' and no '.join(names)}"
    for name in names:
        try:
            return Path(hf_hub_download(repo, name))
        except GatedRepoError:
            problem = f"hub:{repo} is gated: accept its licence on the hub and log in with `hf auth login`"
        except RepositoryNotFoundError:
            problem = f"{repo} is neither a path here nor a repository on the Hugging Face hub: check the spelling"
        except LocalEntryNotFoundError:  # not final: offline, the next name may be the one that lies in the cache
            problem = f"{name} of hub:{repo} is not in the cache and the hub cannot be reached: give a local path"
        except EntryNotFoundError:
            continue
        except Exception as error:  # the client passes on errors of its transport, which change with its version
            problem = f"{name} of hub:{repo} cannot be downloaded: {_one_line(error)}"
    raise FileNotFoundError(problem)


def shortest(value: float) -> float:
    """The shortest decimal of a number that was kept as float32: 1e-6 of 9.99999997e-7."""
    return float(str(np.float32(value)))


def refuse_pickle(path: Path) -> None:
    """Raises ValueError for a pickle, by suffix or, under another name, by its first bytes."""
    head = _head(path) if path.is_file() else b""
    # torch.save writes a zip, before 1.6 a bare pickle: \x80 and a protocol of 2 to 5. The length that opens a
    # safetensors file may look so too (640 is 80 02), but there the ninth byte is the { of the header.
    bare = head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and head[8:9] != b"{"
    if path.suffix.lower() in PICKLES or bare or head.startswith(b"PK\x03\x04"):
        raise ValueError(f"{path} is a pickle, which is never opened: convert it to safetensors")


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(16)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__} {error}".split())
