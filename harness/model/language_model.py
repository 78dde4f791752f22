"""A whole language model to attach variants to: a hub id, a local folder, a GGUF file, or the calibrated Qwen3-0.6B.

Weights come from safetensors or GGUF only. A pickle is never opened, remote code is never run.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, Qwen3Config
from transformers.utils import logging as transformers_logging

from castpoint.harness.model.attach import check_architecture, decoder_layers
from castpoint.harness.problems import drawn
from castpoint.harness.problems.drawn import CALIBRATED_MODEL, THETA, layer_statistics
from castpoint.harness.problems.files import hub_id, refuse_pickle, shortest
from castpoint.harness.problems.geometry import geometry_named
from castpoint.harness.runs.errors import UserError, mistakes

BYTES = 256  # the calibrated model's vocabulary: it has no tokenizer, and reads text as UTF-8
INTERMEDIATE, CONTEXT = 3072, 40960  # Qwen3-0.6B's published configuration


@dataclass(frozen=True)
class LanguageModel:
    """A bf16 model in evaluation mode, and what it is. tokenizer: None reads text as UTF-8 bytes; weights: for the
    record."""

    model: nn.Module
    tokenizer: Any
    name: str
    weights: str

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the tokens that the model expects in front of one."""
        return list(text.encode()) if self.tokenizer is None else self.tokenizer.encode(text)

    @property
    def config(self) -> Any:
        return self.model.config.get_text_config()


def load(source: str, device: str = "cpu", tokens: int = 256) -> LanguageModel:
    """The model of that name, checked before its weights are read, to be run on so many tokens at once.

    source  a hub id such as Qwen/Qwen3-0.6B; a folder with config.json, safetensors and a tokenizer; a .gguf file; or
            `qwen3-0.6b`: Qwen3-0.6B's architecture with weights drawn to its published statistics, and no tokenizer

    Raises UserError in one line: no such path, not on the hub, unsupported architecture, pickle, missing tensors, no
    tokenizer, not enough memory.
    """
    if source == CALIBRATED_MODEL:
        config = calibrated_config()
        precision_for(config, device, tokens)
        model = calibrated_model(config).to(device).eval()
        return LanguageModel(model, None, source, "calibrated")
    where, options = _where(source)

    def readable(what: str) -> AbstractContextManager[None]:
        """Within it errors of transformers, safetensors and gguf, and of a file that none of them expected."""
        return mistakes(Exception, about=f"{source}: {what} cannot be read")

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with readable("config.json"):
        config = AutoConfig.from_pretrained(where, **options)
    check_architecture(config.get_text_config().model_type)
    precision_for(config, device, tokens)
    with readable("a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes an empty one where there is none
        raise UserError(f"{source}: a tokenizer cannot be read: there is none, add tokenizer.json")
    quantised = {"quantization_config": GgufConfig(dequantize=True)} if "gguf_file" in options else {}
    options |= {"dtype": torch.bfloat16, "output_loading_info": True} | (quantised or {"use_safetensors": True})
    with readable("safetensors weights"):
        model, info = AutoModelForCausalLM.from_pretrained(where, **options)
    if info["missing_keys"]:  # transformers would draw them
        raise UserError(f"{source}: the weights lack {', '.join(sorted(info['missing_keys'])[:3])}")
    if quantised:  # GGUF keeps eps as float32
        set_eps(model, shortest(model.config.rms_norm_eps))
    weights = "GGUF, dequantised to bf16" if quantised else getattr(config, "made_from", "checkpoint")
    return LanguageModel(model.to(device).eval(), tokenizer, name_of(source), weights)


def name_of(source: str) -> str:
    """What a model is called in records: a file's name without .gguf, a folder's name, a hub id without its owner."""
    path = Path(source).expanduser()
    return path.stem if path.suffix == ".gguf" else path.resolve().name if path.is_dir() else path.name


def set_eps(model: nn.Module, eps: float) -> None:
    """That eps in the configuration and in every RMSNorm."""
    model.config.rms_norm_eps = eps
    for module in norms(model):
        setattr(module, "eps" if hasattr(module, "eps") else "variance_epsilon", eps)


def norms(model: nn.Module) -> list[nn.Module]:
    """Every RMSNorm of a transformers model."""
    return [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]


def _where(source: str) -> tuple[str, dict[str, Any]]:
    """What from_pretrained takes for it. Raises UserError."""
    path = Path(source).expanduser()
    refuse_pickle(path)
    if path.is_dir():
        return str(path), {"local_files_only": True}
    if path.is_file() and path.suffix == ".gguf":
        importlib.import_module("gguf")  # else transformers names a package, and no extra
        return str(path.parent), {"gguf_file": path.name, "local_files_only": True}
    if path.is_file():
        raise UserError(f"{source} is one file of a model: give the folder that holds it and config.json, or a .gguf")
    return hub_id(source, f"a folder, a .gguf file, a hub id, or {CALIBRATED_MODEL}"), {}


def precision_for(config: Any, device: str, tokens: int, loaded: bool = False) -> torch.dtype:
    """float64 where the bf16 model, its 4-bit copy (in bf16 too), a float64 copy and what is made of so many tokens'
    logits fit into the free memory, float32 where that fits. loaded: the bf16 model is there already.

    Raises UserError where neither does; nothing has been loaded by then.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    free = psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info()[0]
    # Logits and log p of the truth, of eager and of an arm: 8 + 8, 2 + 8, 4 + 8 bytes, and the next arm's beside them.
    work = 2**30 + 48 * tokens * config.get_text_config().vocab_size
    for dtype in (torch.float64, torch.float32):
        need = parameters * ((2 if loaded else 4) + dtype.itemsize) + work
        if need <= free:
            return dtype
    raise UserError(
        f"a model of {parameters / 1e6:,.0f} million parameters needs {need / 2**30:.1f} GiB for its bf16, 4-bit and "
        f"float32 copies, and {free / 2**30:.1f} GiB are free: take a smaller model or a machine with more memory"
    )


# ---------------------------------------------------------------- the calibrated model


def calibrated_config() -> Qwen3Config:
    """Qwen3-0.6B's published configuration, with bytes for a vocabulary."""
    g = geometry_named(CALIBRATED_MODEL)
    return Qwen3Config(
        vocab_size=BYTES,
        hidden_size=g.hidden_size,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=g.num_layers,
        num_attention_heads=g.num_q_heads,
        num_key_value_heads=g.num_kv_heads,
        head_dim=g.head_dim,
        rms_norm_eps=g.eps,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=True,
    )


def calibrated_model(config: Qwen3Config) -> nn.Module:
    """Weights drawn tensor by tensor to the published statistics of each layer (harness/problems/data/README.md).

    The embedding has the published deviation of the first layer's input. Nothing correlates as in the checkpoint, so
    what the model says means nothing; how far an error travels through its K norms is what it is for.
    """
    rng = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding.copy_(drawn.residual_std(0) * drawn.standard_normal(rng, *embedding.shape))
        model.model.norm.weight.fill_(1.0)
        for layer, row in zip(decoder_layers(model), layer_statistics(), strict=True):
            for name, weight in layer.named_parameters():  # norms heavy-tailed, matrices Gaussian
                mean, std = (row[f"{name.split('.')[-2]}_{word}"] for word in ("mean", "std"))
                if weight.ndim == 1:
                    weight.copy_(drawn.heavy_tailed(len(weight), mean, std, None, rng))
                else:
                    weight.copy_(mean + std * drawn.standard_normal(rng, *weight.shape))
        for layer, block in enumerate(decoder_layers(model)):
            weight = block.self_attn.k_norm.weight
            weight.copy_(drawn.heavy_tailed(len(weight), *drawn.k_norm_statistics(layer), rng))
    return model
