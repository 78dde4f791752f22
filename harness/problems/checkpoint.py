"""Attention layers' weights from a real checkpoint: safetensors, GGUF, a folder, or a Hugging Face hub id.

It is opened once; of its tensors only those of the layers asked for are read. A pickle is never opened, remote code is
never run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from castpoint.harness.problems import files
from castpoint.harness.problems.files import Stored
from castpoint.harness.problems.geometry import Geometry, geometry_named
from castpoint.harness.problems.model_types import MODEL_TYPES, geometry_of
from castpoint.harness.runs.errors import UserError, mistakes

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

# Architectures whose converter leaves the rows of q and k in Hugging Face's order; llama's permutes them for rotary.
GGUF_MODEL_TYPES = {
    "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text", "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe",
}  # fmt: skip
GEMMA3_27B_LAYERS = 62
NORMS = ("norm.weight", "layernorm.weight")  # how names of norm weights end
GGUF_CONFIG = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose header was read; what it says is in `geometry`.

    where, origin: how errors call it, and what gave its geometry. find: layer -> the tensors in which the layer lies,
    by their names, and role -> name. read: layers so far.
    """

    geometry: Geometry
    where: str
    origin: str
    find: Callable[[int], tuple[dict[str, Stored], dict[str, str]]]
    read: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def layer(self, number: int) -> dict[str, Tensor]:
        """The weights of one layer's RMSNorm, QKV and head norm, named as Problem names them; read once.

        Tensors are bf16 and contiguous; fp16, fp32 and quantised ones are rounded to bf16 (nearest, ties to even):
        norm_weight [D], qkv_weight [(Hq + 2 Hkv) * Dh, D] with rows q, k, v, and where the model has them
        bias [(Hq + 2 Hkv) * Dh], q_norm_weight [Dh], k_norm_weight [Dh]; and x [T, D], the residual stream entering
        the layer, where the file carries one. With Geometry.weight_offset, norm weights are w - 1 in every format.

        Raises UserError, in one line, for a layer out of range, a missing tensor or shard, a wrong shape or dtype.
        """
        if number not in self.read:
            last = self.geometry.num_layers - 1
            if not 0 <= number <= last:
                raise UserError(f"layer {number} is out of range: {self.where} has {last + 1} layers, 0 to {last}")
            with mistakes(OSError, about=f"{self.where} cannot be read"):
                self.read[number] = _read_inputs(*self.find(number), self)
        return dict(self.read[number])


def opened(source: str, model: str) -> Checkpoint:
    """What open_checkpoint gives and raises, by the first call that asks for that source."""
    return _kept(source, model if _is_lone(Path(source).expanduser()) else "")


def open_checkpoint(source: str, model: str = "") -> Checkpoint:
    """A checkpoint, of which nothing but headers is read yet.

    source  a .safetensors or .gguf file; a folder with config.json and model.safetensors, or its shards and index;
            or a hub id such as Qwen/Qwen3-0.6B: the files that hold a layer are downloaded into the hub's cache
    model   names the geometry of a lone .safetensors file; the other sources carry their own

    Raises UserError, in one line: no such path or hub repository; hub unreachable; pickle, broken or foreign file;
    unsupported architecture.
    """
    path = Path(source).expanduser()
    with mistakes(OSError, about=f"{source} cannot be read"):
        if path.is_dir():
            return _open_folder(partial(files.local_file, path), source)
        files.refuse_pickle(path)
        if path.is_file():
            return _open_lone(path, model) if _is_lone(path) else _open_gguf(path)
        repo = files.hub_id(source, "a .safetensors or .gguf file, a folder holding model.safetensors, or a hub id")
        return _open_folder(partial(files.hub_file, repo), f"hub:{repo}")


_kept = lru_cache(maxsize=1)(open_checkpoint)


def _is_lone(path: Path) -> bool:
    """Whether it is a .safetensors file without a config beside it that is read."""
    with mistakes(OSError, about=f"{path} cannot be read"):
        return path.is_file() and path.suffix != ".gguf" and not files.head(path).startswith(b"GGUF")


def _open_folder(fetch: Callable[..., Path], where: str) -> Checkpoint:
    """A folder or hub repository; fetch(*names) is the path of the first of these files that it holds."""
    origin = f"config.json of {where}"
    geometry = geometry_of(files.read_json(fetch("config.json")), origin)
    weights = fetch(files.WEIGHTS, files.INDEX)
    if weights.name == files.WEIGHTS:
        stored, _ = files.open_safetensors(weights)
        return Checkpoint(geometry, where, origin, lambda layer: (stored, _hf_names(stored, layer)))
    shards = files.read_json(weights).get("weight_map")
    if not isinstance(shards, dict):
        raise UserError(f"{weights} has no weight_map: it is no index of safetensors shards")

    @cache
    def held_by(shard: str) -> dict[str, Stored]:
        try:
            return files.open_safetensors(fetch(shard))[0]
        except UserError as error:
            raise UserError(f"{files.INDEX} of {where} names the shard {shard}, but {error}") from error

    def find(layer: int) -> tuple[dict[str, Stored], dict[str, str]]:
        names = _hf_names(shards, layer)
        wanted = sorted({str(shards[name]) for name in names.values() if name in shards})
        return {name: tensor for shard in wanted for name, tensor in held_by(shard).items()}, names

    return Checkpoint(geometry, where, origin, find)


def _open_lone(path: Path, model: str) -> Checkpoint:
    """A lone file has no config: its geometry goes by the model's name."""
    stored, metadata = files.open_safetensors(path)
    try:
        geometry = geometry_named(model)
    except UserError as error:
        raise UserError(f"{error}; or give the folder that holds config.json and {path.name}") from error

    def find(layer: int) -> tuple[dict[str, Stored], dict[str, str]]:
        if FLAT_NAMES["norm"] not in stored:
            return stored, _hf_names(stored, layer)
        if metadata.get("layer") != str(layer):
            raise UserError(f"{path} holds layer {metadata.get('layer', 'unknown')}, not layer {layer}")
        return stored, FLAT_NAMES

    return Checkpoint(geometry, str(path), f"--model {model}", find)


def _open_gguf(path: Path) -> Checkpoint:
    """Every tensor of the file is known, unread. gguf walks the tokenizer's 262,144 tokens in Python, 11 s a Gemma 3
    file."""
    import gguf

    foreign = (ValueError, KeyError, IndexError, TypeError, OverflowError)
    with mistakes(*foreign, about=f"{path} is truncated or no GGUF file"):
        reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config, origin = _gguf_config(reader, path), f"metadata of {path}"
    key = MODEL_TYPES[str(config["model_type"])].bias
    bias = {str(key): f"blk.0.{NAMES['q_bias'][1]}" in tensors}  # metadata does not say
    geometry = geometry_of(config | bias, origin)

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

    return Checkpoint(geometry, str(path), origin, find)


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
    if (
        arch == "gemma3"
    ):  # metadata does not say: llama.cpp knows the 27B, whose q.k is over sqrt(D / Hq), by its layers
        large = config.get("num_hidden_layers") == GEMMA3_27B_LAYERS
        config["query_pre_attn_scalar"] = (
            config["hidden_size"] // config["num_attention_heads"] if large else config.get("head_dim")
        )
    return config | {"model_type": GGUF_MODEL_TYPES[arch]}


def _read_inputs(stored: dict[str, Stored], names: dict[str, str], opened: Checkpoint) -> dict[str, Tensor]:
    """Problem's inputs from the tensors called names[role], which must be those of the checkpoint's geometry."""
    geometry, where, origin = opened.geometry, opened.where, opened.origin
    rows, hidden_size = geometry.projections, geometry.hidden_size
    shapes = {"norm": [hidden_size]} | {role: [n, hidden_size] for role, n in rows.items()}
    shapes |= {f"{role}_bias": [n] for role, n in rows.items() if geometry.bias}
    shapes |= {f"{role}_norm": [geometry.head_dim] for role in "qk" if geometry.head_norm}
    if "x" in names and "x" in stored:
        shapes["x"] = [*stored["x"].shape[:1], hidden_size]
    for role, name in names.items():
        due, found = shapes.get(role), stored[name].shape if name in stored else None
        if due is not None and found is None:
            raise UserError(f"{where} has no tensor {name}, which {origin} asks for")
        if found is not None and due is None:
            raise UserError(f"{where} has a tensor {name}, which does not fit {origin}: that model has none")
        if found != due:
            raise UserError(f"{name} of {where} has shape {found}, which does not fit {origin}: expected {due}")
    read = {role: _bf16(names[role], stored[names[role]].read()) for role in shapes}
    inputs = {"norm_weight": read["norm"], "qkv_weight": torch.cat([read["q"], read["k"], read["v"]])}
    if geometry.bias:
        inputs["bias"] = torch.cat([read["q_bias"], read["k_bias"], read["v_bias"]])
    if geometry.head_norm:
        inputs |= {"q_norm_weight": read["q_norm"], "k_norm_weight": read["k_norm"]}
    return inputs | ({"x": read["x"]} if "x" in read else {})


def _bf16(name: str, tensor: Tensor) -> Tensor:
    # fp8 and integer weights mean nothing without their scales, which are tensors of their own.
    if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise UserError(f"{name} is stored as {tensor.dtype}: of safetensors only bf16, fp16 and fp32 are read")
    rounded = tensor.to(torch.bfloat16).contiguous()
    if name.endswith(NORMS) and not torch.equal(rounded.to(tensor.dtype), tensor):
        _say_rounded(str(tensor.dtype).removeprefix("torch."))
    return rounded


@cache
def _say_rounded(dtype: str) -> None:
    """On standard error, once: another number for an implementation that uses such weights whole."""
    print(
        f"note: norm weights are {dtype} in this checkpoint, and are rounded to bf16 here: a kernel that uses them "
        "whole is another function (castpoint identify: the word `weight`)",
        file=sys.stderr,
    )


def _hf_names(present: dict[str, object], layer: int) -> dict[str, str]:
    """Role -> full name, under the prefix that this checkpoint uses."""
    first = (prefix for prefix in HF_PREFIXES if f"{prefix}layers.{layer}.{NAMES['norm'][0]}" in present)
    prefix = next(first, HF_PREFIXES[0])
    return {role: f"{prefix}layers.{layer}.{name}" for role, (name, _) in NAMES.items()}
