"""The weights of a decoder (Qwen2, Qwen3, Gemma 3), as Hugging Face names them, each read when it is asked for.

A folder of safetensors or a GGUF file is opened, not read. Every parameter must have its tensor and every tensor its
parameter, each of its shape: a model one of whose parameters nothing filled is never made.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from castpoint.harness.problems import files
from castpoint.harness.problems.drawn import layer_statistics, standard_normal, synthetic_problem
from castpoint.harness.problems.files import Stored
from castpoint.harness.problems.geometry import geometry_named
from castpoint.harness.runs.errors import UserError, mistakes

LAYER = "qwen2.5-7b, one layer"
INNER = 18944  # Qwen2.5-7B's MLP, from its published configuration
MODEL_TYPES = ("qwen2", "qwen3", "gemma3_text")
SPARE = re.compile(r"rotary_emb\.inv_freq$|lm_head\.weight$")  # stored by some, and no parameter of its own
# Names in GGUF (gguf.constants.TENSOR_NAMES) -> ours; of a layer after `blk.{i}.` and `model.layers.{i}.`
GGUF_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    **{f"attn_{name}": f"self_attn.{name}_proj" for name in "qkv"},
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class Config:
    """What a decoder is. thetas, windows: of every layer; a window of None attends to all before. bias: of q, k and v.
    gemma: norm weights are stored as w - 1, norms stand behind attention and MLP too, GELU, a scaled embedding."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    scale: float  # of q k
    thetas: tuple[float, ...]
    windows: tuple[int | None, ...]
    tied: bool
    bias: bool
    context: int

    @property
    def gemma(self) -> bool:
        return self.model_type == "gemma3_text"

    @property
    def head_norm(self) -> bool:
        return self.model_type != "qwen2"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every parameter."""
        d, inner = self.hidden_size, self.intermediate_size
        rows = {"q": self.num_q_heads * self.head_dim} | dict.fromkeys("kv", self.num_kv_heads * self.head_dim)
        layer: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,)}
        if self.gemma:
            layer |= {"pre_feedforward_layernorm.weight": (d,), "post_feedforward_layernorm.weight": (d,)}
        layer |= {f"self_attn.{name}_proj.weight": (count, d) for name, count in rows.items()}
        layer |= {f"self_attn.{name}_proj.bias": (count,) for name, count in rows.items() if self.bias}
        layer |= {f"self_attn.{name}_norm.weight": (self.head_dim,) for name in "qk" if self.head_norm}
        layer |= {"self_attn.o_proj.weight": (d, rows["q"])}
        layer |= {f"mlp.{name}_proj.weight": (inner, d) for name in ("gate", "up")} | {
            "mlp.down_proj.weight": (d, inner)
        }
        whole: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, d)}
        for number in range(self.num_layers):
            whole |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
        whole |= {"model.norm.weight": (d,)}
        return whole if self.tied else whole | {"lm_head.weight": (self.vocab_size, d)}


@dataclass(frozen=True)
class Weights:
    """A decoder's configuration and its tensors, unread. where: for errors and records."""

    config: Config
    where: str
    stored: dict[str, Stored]

    def __post_init__(self) -> None:
        check_filled(self.config.shapes(), {name: tuple(held.shape) for name, held in self.stored.items()}, self.where)

    def read(self, name: str) -> Tensor:
        """That parameter as it is stored; what a GGUF file has quantised is dequantised and rounded to bf16."""
        return self.stored[name].read()

    def part(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """These rows and columns of it (of a vector, these elements), a tensor of its own; nothing else is read, but
        for the rest of a GGUF block."""
        held = self.stored[name]
        if held.cut is None:
            whole = held.read()
            return (whole[rows] if whole.ndim == 1 else whole[rows, columns]).clone()
        return held.cut(rows, columns)

    def shortened(self, layers: int) -> Weights:
        """The model cut off behind its first layers."""
        config = replace(self.config, num_layers=min(layers, self.config.num_layers))
        return Weights(config, self.where, {name: self.stored[name] for name in config.shapes()})

    def all(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Every parameter, widened or rounded to dtype."""
        return {name: self.read(name).to(dtype) for name in self.config.shapes()}


class Lazy(Mapping[str, Tensor]):
    """Weights read, and rounded or widened to dtype, when they are asked for: one layer at a time in memory."""

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        self.weights, self.dtype = weights, dtype

    def __getitem__(self, name: str) -> Tensor:
        return self.weights.read(name).to(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights.config.shapes())

    def __len__(self) -> int:
        return len(self.weights.config.shapes())


def check_filled(parameters: dict[str, tuple[int, ...]], tensors: dict[str, tuple[int, ...]], where: str) -> None:
    """Raises UserError, by name, for a parameter that no tensor fills, a tensor that no parameter takes, or another
    shape."""
    if empty := [name for name in parameters if name not in tensors]:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        raise UserError(f"{where} has no tensor for the parameter {empty[0]}{more}: nothing would fill it")
    if foreign := [name for name in tensors if name not in parameters and not SPARE.search(name)]:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise UserError(f"{where} has a tensor {foreign[0]}{more}, which no parameter of that model takes")
    for name, shape in parameters.items():
        if tensors[name] != shape:
            raise UserError(f"{name} of {where} has shape {list(tensors[name])}, which must be {list(shape)}")


def config_of(hf: Any, bias: bool | None = None) -> Config:
    """Of a configuration of transformers. bias: whether q, k and v have one, where the file does not say.

    Raises UserError for another architecture, or scaled rotary embedding.
    """
    hf = hf.get_text_config()
    if hf.model_type not in MODEL_TYPES:
        raise UserError(f"unsupported architecture {hf.model_type!r}: supported are {', '.join(MODEL_TYPES)}")
    kinds = getattr(hf, "layer_types", None) or ["full_attention"] * hf.num_hidden_layers
    ropes = [hf.rope_parameters.get(kind, hf.rope_parameters) for kind in kinds]
    if other := next((rope["rope_type"] for rope in ropes if rope["rope_type"] != "default"), None):
        raise UserError(f"unsupported rotary embedding {other!r}: supported is default, without scaling")
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    own = hf.model_type == "qwen2" or bool(getattr(hf, "attention_bias", False))
    return Config(
        model_type=hf.model_type,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_q_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=head_dim,
        eps=files.shortest(hf.rms_norm_eps),
        scale=getattr(hf, "query_pre_attn_scalar", head_dim) ** -0.5,
        thetas=tuple(rope["rope_theta"] for rope in ropes),
        windows=tuple(hf.sliding_window if kind == "sliding_attention" else None for kind in kinds),
        tied=hf.tie_word_embeddings,
        bias=own if bias is None else bias,
        context=hf.max_position_embeddings,
    )


def opened(source: str) -> Weights:
    """The weights of a folder with config.json and safetensors, of a .gguf file, or of a hub id; none is read yet.

    Raises UserError, in one line: no such path or repository, pickle, broken file, unsupported architecture, a
    parameter without a tensor, a tensor without a parameter, a wrong shape.
    """
    from transformers import AutoConfig

    path = Path(source).expanduser()
    files.refuse_pickle(path)
    if path.suffix == ".gguf" and path.is_file():
        importlib.import_module("gguf")  # else transformers names a package, and no extra
        with mistakes(Exception, about=f"{source}: its metadata cannot be read"):
            hf = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
        config = config_of(hf)
        return Weights(config, source, _of_gguf(path, config))
    if not path.is_dir():
        files.hub_id(source, "a folder with config.json and safetensors, or a .gguf file")
    fetch = partial(files.local_file, path) if path.is_dir() else partial(files.hub_file, source)
    with mistakes(ValueError, KeyError, OSError, about=f"{source}: config.json cannot be read"):
        hf = AutoConfig.from_pretrained(str(fetch("config.json").parent), local_files_only=True)
    held = fetch(files.WEIGHTS, files.INDEX)
    shards = [held]
    if held.name == files.INDEX:
        listed = files.read_json(held).get("weight_map")
        if not isinstance(listed, dict):
            raise UserError(f"{held} has no weight_map: it is no index of safetensors shards")
        shards = [fetch(str(name)) for name in sorted(set(listed.values()))]
    stored = {name: tensor for shard in shards for name, tensor in files.open_safetensors(shard)[0].items()}
    return Weights(config_of(hf), source, stored)


def tokenizer_of(source: str) -> Any:
    """The tokenizer beside the weights of that folder, .gguf file or hub id. Raises UserError where there is none."""
    from transformers import AutoTokenizer

    path = Path(source).expanduser()
    where: tuple[str, dict[str, Any]] = (source, {})
    if path.exists():
        where = (str(path), {}) if path.is_dir() else (str(path.parent), {"gguf_file": path.name})
    with mistakes(Exception, about=f"{source}: its tokenizer cannot be read"):
        return AutoTokenizer.from_pretrained(where[0], **where[1])


def of_model(model: nn.Module, where: str) -> Weights:
    """Those of a transformers model in memory, such as one with drawn weights."""
    config = config_of(model.config)
    state = {name: tensor for name, tensor in model.state_dict().items() if name in config.shapes()}
    return Weights(config, where, {n: Stored(list(t.shape), partial(lambda kept: kept, t)) for n, t in state.items()})


def drawn_layer() -> Weights:
    """One layer of Qwen2.5-7B's geometry with drawn weights; its table is the residual stream of 64 drawn tokens."""
    g, row, rng = geometry_named("qwen2.5-7b"), layer_statistics()[1], torch.Generator().manual_seed(0)
    problem = synthetic_problem("qwen2.5-7b", 1, 64)
    config = Config(
        *("qwen2", 64, g.hidden_size, INNER, 1, g.num_q_heads, g.num_kv_heads, g.head_dim, g.eps, g.head_dim**-0.5),
        *((1e6,), (None,), True, True, 32768),
    )
    made = {"model.embed_tokens.weight": problem.x, "model.norm.weight": problem.norm_weight}
    layer = "model.layers.0."
    made |= {f"{layer}{name}_layernorm.weight": problem.norm_weight for name in ("input", "post_attention")}
    rows = list(g.projections.values())
    for name, part in zip("qkv", problem.qkv_weight.split(rows), strict=True):
        made[f"{layer}self_attn.{name}_proj.weight"] = part
        made[f"{layer}self_attn.{name}_proj.bias"] = (standard_normal(rng, len(part)) * 0.5).bfloat16()
    for name, shape in config.shapes().items():
        if name not in made:
            std = row[f"{name.split('.')[-2]}_std"] * (1024 / g.hidden_size) ** 0.5
            made[name] = (standard_normal(rng, *shape) * std).bfloat16()
    return Weights(config, LAYER, {n: Stored(list(t.shape), partial(lambda kept: kept, t)) for n, t in made.items()})


def _of_gguf(path: Path, config: Config) -> dict[str, Stored]:
    import gguf

    with mistakes(ValueError, KeyError, IndexError, TypeError, OverflowError, about=f"{path} is no whole GGUF file"):
        reader = gguf.GGUFReader(path)
    names = GGUF_LAYER | (GEMMA_NORMS if config.gemma else {"ffn_norm": "post_attention_layernorm"})
    stored = {}
    for tensor in reader.tensors:
        ours = _our_name(tensor.name, names)
        minus_one = config.gemma and "norm" in ours  # llama.cpp's converter adds Gemma's 1
        cut = partial(_bf16_part, tensor, minus_one)
        stored[ours] = Stored(tensor.shape.tolist()[::-1], partial(_bf16, tensor, minus_one), cut)
    return stored


def _our_name(name: str, names: dict[str, str]) -> str:
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if not found:
        return GGUF_NAMES.get(name, name)
    return f"model.layers.{found[1]}.{names.get(found[2], found[2])}.{found[3]}"


def _bf16(tensor: Any, minus_one: bool) -> Tensor:
    return files.dequantised(tensor, minus_one).to(torch.bfloat16)


def _bf16_part(tensor: Any, minus_one: bool, rows: slice, columns: slice) -> Tensor:
    return files.dequantised_part(tensor, minus_one, rows, columns).to(torch.bfloat16).contiguous()
