"""Attention layers' weights from a real checkpoint: safetensors, GGUF, a folder, or a Hugging Face hub id.

It is opened once; of its tensors only those of the layers asked for are read. A pickle is never opened, remote code is
never run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from castpoint.harness.problems import files
from castpoint.harness.problems.files import Stored, readable
from castpoint.harness.problems.geometry import Geometry, geometry_named
from castpoint.harness.runs.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFReader


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
class Opened:
    """A checkpoint whose header was read. where, origin: how errors call it, and what gave its geometry.

    find: layer -> the tensors in which the layer lies, by their names, and role -> name.
    """

    geometry: Geometry
    where: str
    origin: str
    find: Callable[[int], tuple[dict[str, Stored], dict[str, str]]]


class Checkpoint:
    """A checkpoint, opened once. geometry: of its layers, from its header.

    source  a .safetensors or .gguf file; a folder with config.json and model.safetensors, or its shards and index;
            or a hub id such as Qwen/Qwen3-0.6B: the files that hold a layer are downloaded into the hub's cache
    model   names the geometry of a lone .safetensors file; the other sources carry their own

    Raises UserError, in one line: no such path, shard or hub repository; hub unreachable; pickle, broken or foreign
    file; unsupported architecture; and layer() for a layer out of range, a missing tensor, a wrong shape or dtype.
    """

    def __init__(self, source: str, model: str = "") -> None:
        self.source = source
        with readable(source):
            self._opened = _open(source, model)
        self.geometry = self._opened.geometry
        self._layers: dict[int, dict[str, Tensor]] = {}

    def layer(self, number: int) -> dict[str, Tensor]:
        """The weights of one layer's RMSNorm, QKV and head norm, named as Problem names them; read once.

        Tensors are bf16 and contiguous; fp16, fp32 and quantised ones are rounded to bf16 (nearest, ties to even):
        norm_weight [D], qkv_weight [(Hq + 2 Hkv) * Dh, D] with rows q, k, v, and where the model has them
        bias [(Hq + 2 Hkv) * Dh], q_norm_weight [Dh], k_norm_weight [Dh]; and x [T, D], the residual stream entering
        the layer, where the file carries one. With Geometry.weight_offset, norm weights are w - 1 in every format.
        """
        if number not in self._layers:
            opened, last = self._opened, self.geometry.num_layers - 1
            if not 0 <= number <= last:
                known = f"{opened.where} has {last + 1} layers, 0 to {last}"
                raise UserError(f"layer {number} is out of range: {known}")
            with readable(self.source):
                stored, names = opened.find(number)
                self._layers[number] = _read_inputs(stored, names, opened)
        return dict(self._layers[number])


def opened(source: str, model: str) -> Checkpoint:
    """The checkpoint of that source, opened by the first call that asks for it; raises what Checkpoint raises."""
    return _kept(source, model if _is_lone(Path(source).expanduser()) else "")


@lru_cache(maxsize=1)
def _kept(source: str, model: str) -> Checkpoint:
    return Checkpoint(source, model)


def _is_lone(path: Path) -> bool:
    """Whether it is a .safetensors file without a config beside it that is read."""
    with readable(str(path)):
        return path.is_file() and path.suffix != ".gguf" and not files.head(path).startswith(b"GGUF")


def _open(source: str, model: str) -> Opened:
    path = Path(source).expanduser()
    if path.is_dir():
        return _open_folder(partial(files.local_file, path), source)
    files.refuse_pickle(path)
    if path.is_file():
        return _open_lone(path, model) if _is_lone(path) else _open_gguf(path)
    if files.HUB_ID.fullmatch(source) and path.suffix not in (".safetensors", ".gguf"):
        return _open_folder(partial(files.hub_file, source), f"hub:{source}")
    raise UserError(
        f"{source} does not exist, and is no hub id such as Qwen/Qwen3-0.6B: "
        "give a .safetensors or .gguf file, a folder holding model.safetensors, or a hub id"
    )


def _open_folder(fetch: Callable[..., Path], where: str) -> Opened:
    """A folder or hub repository; fetch(*names) is the path of the first of these files that it holds."""
    origin = f"config.json of {where}"
    geometry = _geometry(files.read_json(fetch("config.json")), origin)
    weights = fetch(files.WEIGHTS, files.INDEX)
    if weights.name == files.WEIGHTS:
        stored, _ = files.open_safetensors(weights)
        return Opened(geometry, where, origin, lambda layer: (stored, _hf_names(stored, layer)))
    shards = files.read_json(weights).get("weight_map")
    if not isinstance(shards, dict):
        raise UserError(f"{weights} has no weight_map: it is no index of safetensors shards")
    held: dict[str, dict[str, Stored]] = {}

    def find(layer: int) -> tuple[dict[str, Stored], dict[str, str]]:
        names = _hf_names(shards, layer)
        wanted = sorted({str(shards[name]) for name in names.values() if name in shards})
        for shard in wanted:
            if shard not in held:
                held[shard] = files.open_safetensors(_shard(fetch, shard, where))[0]
        return {name: tensor for shard in wanted for name, tensor in held[shard].items()}, names

    return Opened(geometry, where, origin, find)


def _shard(fetch: Callable[..., Path], shard: str, where: str) -> Path:
    try:
        return fetch(shard)
    except UserError as error:
        raise UserError(f"{files.INDEX} of {where} names the shard {shard}, but {error}") from error


def _open_lone(path: Path, model: str) -> Opened:
    """A lone file has no config: its geometry goes by the model's name."""
    stored, metadata = files.open_safetensors(path)
    try:
        geometry = geometry_named(model)
    except KeyError as error:
        raise UserError(f"{error.args[0]}; or give the folder that holds config.json and {path.name}") from error

    def find(layer: int) -> tuple[dict[str, Stored], dict[str, str]]:
        if FLAT_NAMES["norm"] not in stored:
            return stored, _hf_names(stored, layer)
        if metadata.get("layer") != str(layer):
            raise UserError(f"{path} holds layer {metadata.get('layer', 'unknown')}, not layer {layer}")
        return stored, FLAT_NAMES

    return Opened(geometry, str(path), f"--model {model}", find)


def _open_gguf(path: Path) -> Opened:
    """Every tensor of the file is known, unread. gguf walks the tokenizer's 262,144 tokens in Python, 11 s a Gemma 3
    file."""
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise UserError(f"{path} is truncated or no GGUF file: {files.one_line(error)}") from error
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    bias = {"attention_bias": f"blk.0.{NAMES['q_bias'][1]}" in tensors}  # metadata does not say
    origin = f"metadata of {path}"
    geometry = _geometry(_gguf_config(reader, path) | bias, origin)

    def find(layer: int) -> tuple[dict[str, Stored], dict[str, str]]:
        names = {role: f"blk.{layer}.{name}" for role, (_, name) in NAMES.items()}
        # llama.cpp's converter adds Gemma's 1 to every norm weight, in float32; Hugging Face stores w - 1. transformers
        # 5.23 undoes it the same way (modeling_gguf_pytorch_utils.py, Gemma2TensorProcessor).
        norms = {names[role] for role in ("norm", "q_norm", "k_norm")} if geometry.weight_offset else set()
        held = [tensors[name] for name in names.values() if name in tensors]
        return {  # ggml lists columns first
            tensor.name: Stored(tensor.shape.tolist()[::-1], partial(files.dequantised, tensor, tensor.name in norms))
            for tensor in held
        }, names

    return Opened(geometry, str(path), origin, find)


def _gguf_config(reader: GGUFReader, path: Path) -> dict[str, object]:
    """GGUF metadata under the keys of a config.json."""
    values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.")}
    arch = values.get("general.architecture")
    if arch not in GGUF_MODEL_TYPES:
        known = ", ".join(GGUF_MODEL_TYPES)
        raise UserError(f"{path} has the unsupported GGUF architecture {arch!r}: supported are {known}")
    config = {key: values[f"{arch}.{name}"] for key, name in GGUF_CONFIG.items() if f"{arch}.{name}" in values}
    if "rms_norm_eps" in config:  # kept as float32, 9.99999997e-7: its shortest decimal is the published 1e-6
        config["rms_norm_eps"] = files.shortest(config["rms_norm_eps"])
    return config | {"model_type": GGUF_MODEL_TYPES[arch]}


def _read_inputs(stored: dict[str, Stored], names: dict[str, str], opened: Opened) -> dict[str, Tensor]:
    """Problem's inputs from the tensors called names[role], which must be those of the checkpoint's geometry."""
    geometry, where, origin = opened.geometry, opened.where, opened.origin
    shapes = _shapes(geometry)
    if "x" in names and "x" in stored:
        shapes["x"] = [*stored["x"].shape[:1], geometry.hidden_size]
    for role, name in names.items():
        if role in shapes and name not in stored:
            raise UserError(f"{where} has no tensor {name}, which {origin} asks for")
        if role not in shapes and name in stored:
            raise UserError(f"{where} has a tensor {name}, which does not fit {origin}: that model has none")
        if role in shapes and (shape := stored[name].shape) != shapes[role]:
            expected = f"expected {shapes[role]}"
            raise UserError(f"{name} of {where} has shape {shape}, which does not fit {origin}: {expected}")
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
        raise UserError(f"{name} is stored as {tensor.dtype}: of safetensors only bf16, fp16 and fp32 are read")
    return tensor.to(torch.bfloat16).contiguous()


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
        raise UserError(f"{origin} names the unsupported model type {model_type!r}: supported are {known}")
    values = MODEL_TYPES[model_type] | {key: value for key, value in config.items() if value is not None}
    sizes = ("hidden_size", "num_attention_heads", "num_hidden_layers")
    for key in sizes:
        _check_number(values.get(key), key, origin)
    hidden_size, heads, layers = (values[key] for key in sizes)
    values = {"num_key_value_heads": heads, "head_dim": hidden_size // heads, "rms_norm_eps": 1e-6} | values
    for key, kinds in {"num_key_value_heads": int, "head_dim": int, "rms_norm_eps": int | float}.items():
        _check_number(values[key], key, origin, kinds)
    return Geometry(
        *(hidden_size, heads, values["num_key_value_heads"], layers),
        head_dim=values["head_dim"],
        eps=values["rms_norm_eps"],
        head_norm=model_type in HEAD_NORM_TYPES,
        bias=model_type == "qwen2" or values.get("attention_bias", False),  # Qwen2 always has one, without a key
        weight_offset=model_type == "gemma3_text",
    )


def _check_number(value: object, key: str, origin: str, kinds: type | UnionType = int) -> None:
    if not isinstance(value, kinds) or value <= 0:
        raise UserError(f"{origin} must give {key} as a positive number, not {value!r}")
