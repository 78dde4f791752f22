"""Qwen3 and Gemma 3 once more, as plain tensor code over a dictionary of weights: no module, no cache, no batch.

It imports nothing of the lab and nothing of transformers. In float64 it is the truth; in bf16 it rounds wherever
PyTorch's operators do, as the model does when it is run eagerly.
"""

import math

import torch
import torch.nn.functional as F


def forward(config, weights, ids, dtype):
    """logits [S, V] and, of every layer, the state behind it [S, D] and k as it leaves its norm [S, Hkv, Dh].

    config: of transformers, for its numbers alone; weights: name -> bf16 tensor, as a checkpoint names them.
    """
    w = {name: tensor.to(dtype) for name, tensor in weights.items()}
    gemma = config.model_type == "gemma3_text"
    x = w["model.embed_tokens.weight"][list(ids)]
    if gemma:
        x = x * torch.tensor(config.hidden_size**0.5, dtype=torch.bfloat16).to(
            dtype
        )  # Gemma was trained with that number
    hidden, keys = [], []
    for number in range(config.num_hidden_layers):
        layer = {
            name.removeprefix(f"model.layers.{number}."): t for name, t in w.items() if f"layers.{number}." in name
        }
        attended, k = attention(config, layer, norm(x, layer["input_layernorm.weight"], config, gemma), number, gemma)
        if gemma:
            attended = norm(attended, layer["post_attention_layernorm.weight"], config, gemma)
        x = x + attended
        before = "pre_feedforward_layernorm.weight" if gemma else "post_attention_layernorm.weight"
        mixed = mlp(layer, norm(x, layer[before], config, gemma), gemma)
        if gemma:
            mixed = norm(mixed, layer["post_feedforward_layernorm.weight"], config, gemma)
        x = x + mixed
        hidden.append(x)
        keys.append(k)
    x = norm(x, w["model.norm.weight"], config, gemma)
    return F.linear(x, w.get("lm_head.weight", w["model.embed_tokens.weight"])), hidden, keys


def norm(x, weight, config, gemma):
    """RMSNorm over the last dimension: in fp32 in a bf16 model, and rounded where Qwen3 and Gemma 3 round."""
    wide = x.float() if x.dtype == torch.bfloat16 else x
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)
    if gemma:
        return (normed * (1.0 + weight.to(wide.dtype))).to(x.dtype)
    return weight * normed.to(x.dtype)


def attention(config, w, x, number, gemma):
    size = config.head_dim
    q, k, v = (F.linear(x, w[f"self_attn.{n}_proj.weight"]).reshape(len(x), -1, size) for n in "qkv")
    q, k = (norm(value, w[f"self_attn.{n}_norm.weight"], config, gemma) for n, value in (("q", q), ("k", k)))
    scale = (config.query_pre_attn_scalar if gemma else size) ** -0.5
    cos, sin = angles(config, number, len(x), x.dtype)
    turned = [t * cos + torch.cat([-t[..., size // 2 :], t[..., : size // 2]], -1) * sin for t in (q, k)]
    heads = [t.transpose(0, 1) for t in (*turned, v)]  # [H, S, Dh]
    groups = heads[0].shape[0] // heads[1].shape[0]
    query, key, value = heads[0], *(t.repeat_interleave(groups, 0) for t in heads[1:])
    if x.dtype == torch.float64:
        scores = query @ key.transpose(1, 2) * scale
        scores = scores.masked_fill(~torch.ones_like(scores[0], dtype=torch.bool).tril(), -math.inf)
        out = scores.softmax(-1) @ value
    else:
        out = F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True, scale=scale)[0]
    return F.linear(out.transpose(0, 1).reshape(len(x), -1), w["self_attn.o_proj.weight"]), k


def angles(config, number, tokens, dtype):
    """cos and sin [S, 1, Dh] of a layer's positions; the table is fp32 in every model."""
    kind = config.layer_types[number]
    rope = config.rope_parameters.get(kind, config.rope_parameters)
    assert rope["rope_type"] == "default" and config.layer_types[number] in ("full_attention", "sliding_attention")
    assert tokens <= (getattr(config, "sliding_window", None) or tokens), "no token is out of the window"
    steps = 1 / rope["rope_theta"] ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    angle = torch.outer(torch.arange(tokens).float(), steps)
    return [torch.cat([f(angle)] * 2, -1)[:, None, :].to(dtype) for f in (torch.cos, torch.sin)]


def mlp(w, x, gemma):
    gate, up = (F.linear(x, w[f"mlp.{name}_proj.weight"]) for name in ("gate", "up"))
    gate = F.gelu(gate, approximate="tanh") if gemma else F.silu(gate)
    return F.linear(gate * up, w["mlp.down_proj.weight"])
