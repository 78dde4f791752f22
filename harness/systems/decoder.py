"""A decoder (Qwen2, Qwen3, Gemma 3) as plain tensor code: what transformers' eager attention computes, stage by stage.

Values of one sequence: x [S, D], q, k and v [S, H, Dh]. Every function rounds where PyTorch's operators do in the dtype
of its inputs; the tests hold the whole to transformers, bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from castpoint.harness.systems.weights import Config

Keep = Callable[[str, int, Tensor], Tensor | None]  # stage, layer, value -> another to go on with, or None
STAGES = (  # of a layer, in their order
    *("normed", "q", "k", "v", "q_normed", "k_normed", "q_rotated", "k_rotated"),
    *("scores", "weights", "attended", "output", "residual", "mlp_normed", "mlp", "hidden"),
)


def embed(config: Config, table: Tensor, ids: Tensor) -> Tensor:
    """Rows of the table; Gemma's times sqrt(D), which it was trained with in bf16."""
    x = table[ids]
    return x * torch.tensor(config.hidden_size**0.5, dtype=torch.bfloat16).to(x.dtype) if config.gemma else x


def norm(config: Config, x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm over the last dimension, in fp32 for bf16 values; Qwen rounds before its weight and behind it."""
    wide = x.float() if x.dtype == torch.bfloat16 else x
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + config.eps)
    if config.gemma:
        return (normed * (1.0 + weight.to(wide.dtype))).to(x.dtype)
    return weight * normed.to(x.dtype)


def angles(config: Config, layer: int, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [S, 1, Dh] of positions [S]: made in fp32, and rounded to dtype."""
    steps = 1 / config.thetas[layer] ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    phase = torch.outer(positions.float(), steps.to(positions.device))
    cos, sin = (torch.cat([f(phase)] * 2, -1)[:, None].to(dtype) for f in (torch.cos, torch.sin))
    return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [S, H, Dh]: channel i with channel i + Dh/2."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def hidden_from(config: Config, layer: int, positions: Tensor, keys: Tensor) -> Tensor:
    """Which of the keys at positions [K] each query at positions [S] does not see, [S, K]."""
    distance = positions[:, None] - keys[None, :]
    window = config.windows[layer]
    return (distance < 0) | (distance >= window) if window else distance < 0


def attention(
    config: Config, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, tap: Callable[[str, Tensor], Tensor]
) -> Tensor:
    """[S, Hq * Dh] of q [S, Hq, Dh] and k, v [K, Hkv, Dh]; hidden [S, K]: what no query sees."""
    groups = q.shape[1] // k.shape[1]
    query = q.transpose(0, 1)
    key, value = (t.transpose(0, 1).repeat_interleave(groups, 0) for t in (k, v))
    scores = query @ key.transpose(1, 2) * config.scale
    scores = tap("scores", scores)
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=None if q.dtype == torch.float64 else torch.float32).to(q.dtype)
    weights = tap("weights", weights)
    return (weights @ value).transpose(0, 1).flatten(1)


def mlp(config: Config, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The gated MLP; weights [I, D], [I, D], [D, I]."""
    opened = F.linear(x, gate)
    opened = F.gelu(opened, approximate="tanh") if config.gemma else F.silu(opened)
    return F.linear(opened * F.linear(x, up), down)


@torch.no_grad()
def forward(config: Config, w: Mapping[str, Tensor], ids: list[int], keep: Keep | None = None) -> Tensor:
    """Logits [S, V] in the weights' dtype. keep: is shown every stage of every layer as it is made, and may put another
    value in its place; the embedding as layer -1, and the last norm as that of layer num_layers. A weight
    `self_attn.o_proj.bias`, which none of these models has, is added where it is given."""

    def tap(stage: str, layer: int, value: Tensor) -> Tensor:
        other = keep(stage, layer, value) if keep else None
        return value if other is None else other

    positions = torch.arange(len(ids))
    x = tap("embedding", -1, embed(config, w["model.embed_tokens.weight"], torch.tensor(ids)))
    for number in range(config.num_layers):
        x = _layer(config, w, number, x, positions, functools.partial(_at, tap, number))
    x = tap("normed", config.num_layers, norm(config, x, w["model.norm.weight"]))
    return F.linear(x, w["model.embed_tokens.weight" if config.tied else "lm_head.weight"])


def _at(tap: Callable[[str, int, Tensor], Tensor], layer: int, stage: str, value: Tensor) -> Tensor:
    return tap(stage, layer, value)


def _layer(
    config: Config, w: Mapping[str, Tensor], number: int, x: Tensor, positions: Tensor,
    tap: Callable[[str, Tensor], Tensor],
) -> Tensor:  # fmt: skip
    def weight(name: str) -> Tensor:
        return w[f"model.layers.{number}.{name}.weight"]

    normed = tap("normed", norm(config, x, weight("input_layernorm")))
    heads = {}
    for name in "qkv":
        bias = w[f"model.layers.{number}.self_attn.{name}_proj.bias"] if config.bias else None
        proj = F.linear(normed, weight(f"self_attn.{name}_proj"), bias)
        heads[name] = tap(name, proj.unflatten(-1, (-1, config.head_dim)))
    cos, sin = angles(config, number, positions, x.dtype)
    for name in "qk":
        if config.head_norm:
            heads[name] = tap(f"{name}_normed", norm(config, heads[name], weight(f"self_attn.{name}_norm")))
        heads[name] = tap(f"{name}_rotated", rotate(heads[name], cos, sin))
    hidden = hidden_from(config, number, positions, positions)
    attended = tap("attended", attention(config, heads["q"], heads["k"], heads["v"], hidden, tap))
    output = tap(
        "output", F.linear(attended, weight("self_attn.o_proj"), w.get(f"model.layers.{number}.self_attn.o_proj.bias"))
    )
    if config.gemma:
        output = norm(config, output, weight("post_attention_layernorm"))
    x = tap("residual", x + output)
    before = "pre_feedforward_layernorm" if config.gemma else "post_attention_layernorm"
    mixed = tap("mlp_normed", norm(config, x, weight(before)))
    mixed = tap("mlp", mlp(config, mixed, *(weight(f"mlp.{name}_proj") for name in ("gate", "up", "down"))))
    if config.gemma:
        mixed = norm(config, mixed, weight("post_feedforward_layernorm"))
    return tap("hidden", x + mixed)
