"""One pass of a language model over tokens, and what it computed on the way."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from castpoint.harness.model.attach import decoder_layers, logit_scale


@dataclass(frozen=True)
class Pass:
    """Of every layer: hidden, the state behind it [S, D]; q and k, as they leave their norm [S, H, Dh], before rotary
    embedding. logits [S, V], and log_p, what they say of the next token [S, V] float64. logit_scale: as a Problem's."""

    hidden: list[Tensor]
    q: list[Tensor]
    k: list[Tensor]
    logits: Tensor
    logit_scale: float | None = None

    @functools.cached_property
    def log_p(self) -> Tensor:
        return self.logits.to(torch.float64).log_softmax(-1)


@torch.no_grad()
def forward(model: nn.Module, ids: Sequence[int], batch: int = 1, decoded: int = 0) -> Pass:
    """One pass over the tokens, the last `decoded` of them one at a time behind a cache; of copies in a batch, the
    first."""
    tokens = torch.tensor([list(ids)] * batch, device=next(model.parameters()).device)
    cache, logits = None, []
    with _taps(model) as taps:
        for part in tokens.split([len(ids) - decoded] + [1] * decoded, dim=1):
            out = model(part, past_key_values=cache, use_cache=decoded > 0)
            cache = out.past_key_values
            logits.append(out.logits[0])
    whole = {name: [torch.cat(parts) for parts in layers] for name, layers in taps.items()}
    return Pass(**whole, logits=torch.cat(logits), logit_scale=logit_scale(decoder_layers(model)[0]))


@contextmanager
def _taps(model: nn.Module) -> Iterator[dict[str, list[list[Tensor]]]]:
    """What Pass calls hidden, q and k, of every layer a list that grows with every call."""
    config, layers = model.config.get_text_config(), decoder_layers(model)
    taps: dict[str, list[list[Tensor]]] = {name: [[] for _ in layers] for name in ("hidden", "q", "k")}

    def hidden(kept: list[Tensor], module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        kept.append((output[0] if isinstance(output, tuple) else output)[0])

    def heads(kept: list[Tensor], module: nn.Module, inputs: object, output: Tensor) -> None:
        if output.ndim == 3:  # a projection without a norm
            size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            output = output.unflatten(-1, (-1, size))
        elif config.model_type == "gemma3_text":  # heads before tokens
            output = output.transpose(1, 2)
        kept.append(output[0])

    with ExitStack() as hooks:
        for number, layer in enumerate(layers):
            places = {"hidden": (layer, hidden), "q": (last_of(layer, "q"), heads), "k": (last_of(layer, "k"), heads)}
            for name, (module, keep) in places.items():
                hooks.enter_context(module.register_forward_hook(functools.partial(keep, taps[name][number])))
        yield taps


def k_norm_max(layer: nn.Module) -> float | None:
    """The largest factor that the layer's K norm applies; None without such a norm."""
    norm = getattr(layer.self_attn, "k_norm", None)
    return None if norm is None else (norm.weight.detach().float() + norm_offset(norm)).abs().max().item()


def norm_offset(norm: nn.Module) -> float:
    """What the norm adds to its stored weight: Gemma's 1."""
    return 1.0 if type(norm).__name__.startswith("Gemma") else 0.0


def last_of(layer: nn.Module, name: str) -> nn.Module:
    """What q or k comes from, before rotary embedding: its norm, or its projection in models without one."""
    attention = layer.self_attn
    return getattr(attention, f"{name}_norm", None) or getattr(attention, f"{name}_proj")


@torch.no_grad()
def greedy(model: nn.Module, ids: Sequence[int], count: int) -> list[int]:
    """The most likely tokens behind ids, one at a time with a cache, as generation runs."""
    tokens = torch.tensor([list(ids)], device=next(model.parameters()).device)
    cache, chosen = None, []
    for _ in range(count):
        out = model(tokens, past_key_values=cache, use_cache=True)
        tokens, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        chosen.append(tokens.item())
    return chosen
