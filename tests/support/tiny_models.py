"""Tiny transformers models with drawn weights, and what the tests ask of models."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace

import gguf
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from castpoint.harness.model.attach import decoder_layers
from castpoint.harness.model.language_model import LanguageModel
from castpoint.harness.model.passes import forward, last_of
from castpoint.harness.problems.model_types import MODEL_TYPES
from castpoint.kernels.plan import CastPlan
from castpoint.variants.catalogue import plan_named

HEAD_SIZES = {"qwen3": 32, "qwen2": 16, "llama": 16, "gemma3_text": 32}  # of others 32
REFERENCE_PLANS = {"qwen3": "hf", "qwen2": "hf", "llama": "hf", "gemma3_text": "gemma"}  # by which transformers runs it
REFERENCE_OFFSET = {"gemma3_text": 1, "gemma": 1}  # norm weights are stored as w - 1
# What configurations of other types need to be small: experts by each name that a type has for them, and a multiplier.
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_num_experts": 4, "moe_k": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "shared_intermediate_size": 32,
    "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0,
    "moe_layer_start_index": 0, "attention_multiplier": 0.05, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
    "query_pre_attn_scalar": 100, "pad_token_id": 0,
}  # fmt: skip
IDS = torch.randint(0, 64, [40], generator=torch.Generator().manual_seed(1)).tolist()


def reference_plan(model_type: str) -> CastPlan:
    """The plan by which transformers runs that architecture, up to RoPE."""
    kind = MODEL_TYPES[model_type]
    name = "gemma" if kind.weight_offset else "one-rounding" if kind.one_rounding else "hf"
    return plan_named(REFERENCE_PLANS.get(model_type, name)).without_rope()


def tiny_config(model_type: str, layers: int = 3, **changes: object) -> object:
    """Of types beside REFERENCE_PLANS with biases where the type can have them."""
    changes = dict(changes)
    if model_type not in REFERENCE_PLANS:
        known = AutoConfig.for_model(model_type)
        flags = {"attention_bias": True, "use_bias": True, "qkv_bias": True}
        changes = {key: value for key, value in (EXPERTS | flags).items() if hasattr(known, key)} | changes
    return AutoConfig.for_model(
        model_type,
        **changes,
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_SIZES.get(model_type, 32),
        rms_norm_eps=1e-5 if model_type == "llama" else 1e-6,
        max_position_embeddings=256,
        tie_word_embeddings=False,  # a tied model of random weights repeats its last token
    )


@functools.cache
def tiny_model(model_type: str, layers: int = 3) -> nn.Module:
    """A bf16 model of that architecture with drawn weights: norms far from 1, K norms larger, biases if it has any.
    One for all tests, so every test that changes it must leave it as it was."""
    rng = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, layers), dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=rng)
            if "norm" in name:
                drawn = (drawn / 2).exp() * (8 if "k_norm" in name else 1) - REFERENCE_OFFSET.get(model_type, 0)
            elif weight.ndim == 2 and "embed" not in name:
                drawn /= weight.shape[1] ** 0.5
            weight.copy_(drawn)
    return model


def differing(actual: Tensor, expected: Tensor) -> float:
    """Share of elements that differ."""
    return (actual != expected).double().mean().item()


def modules(model: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(module)) for name, module in model.named_modules()]


def tiny_lm(model_type: str = "qwen3") -> LanguageModel:
    words = SimpleNamespace(encode=lambda text: [sum(map(ord, word)) % 64 for word in text.split()])
    return LanguageModel(tiny_model(model_type), words, "tiny", "drawn")


@torch.no_grad()
def taken(model: nn.Module) -> dict[tuple[int, str], Tensor]:
    """(layer, name) -> the stream x that enters it, and its q, k and v as they leave their norms, [S, ...]."""
    kept: dict[tuple[int, str], Tensor] = {}

    def keep(key: tuple[int, str], module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        heads_first = output.ndim == 4 and model.config.model_type == "gemma3_text"
        kept[key] = inputs[0][0] if key[1] == "x" else (output.transpose(1, 2) if heads_first else output)[0]

    handles = []
    for number, layer in enumerate(decoder_layers(model)):
        places = {"x": layer.input_layernorm, "q": last_of(layer, "q"), "k": last_of(layer, "k")}
        for name, module in (places | {"v": layer.self_attn.v_proj}).items():
            handles.append(module.register_forward_hook(functools.partial(keep, (number, name))))
    model(torch.tensor([IDS]))
    for handle in handles:
        handle.remove()
    return kept


def bits(model: nn.Module) -> list[Tensor]:
    return [tensor.clone().view(torch.int16) for tensor in model.state_dict().values()]


def assert_untouched(model: nn.Module, before: tuple[list[Tensor], list[tuple[str, int]], Tensor]) -> None:
    own, tree, logits = before
    assert all(torch.equal(a, b) for a, b in zip(bits(model), own, strict=True)) and modules(model) == tree
    assert torch.equal(forward(model, IDS).logits, logits)
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())


def state_of(model: nn.Module) -> tuple[list[Tensor], list[tuple[str, int]], Tensor]:
    return bits(model), modules(model), forward(model, IDS).logits


WORDS = {word: i for i, word in enumerate("<unk> it was the best of times worst".split())}


def add_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(WordLevel(WORDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def saved(folder: Path, model_type: str = "qwen3", **options: object) -> Path:
    tiny_model(model_type).save_pretrained(folder, **options)
    add_tokenizer(folder)
    return folder


def write_gguf(path: Path, model_type: str) -> Path:
    """The tiny model as llama.cpp's converter lays it out, in float32, with a byte-level vocabulary of 64 tokens."""
    model, writer = tiny_model(model_type), gguf.GGUFWriter(path, model_type)
    writer.add_block_count(3)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(model.config.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e4)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([chr(ord("0") + i) for i in range(62)] + ["ab", "<end>"])
    writer.add_token_types([1] * 63 + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(63)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[model_type.upper()], 3)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
