"""Qwen3 and Gemma 3 once more, as plain tensor code over a dictionary of weights: no module, no cache, no batch.

It imports nothing of the lab and nothing of transformers. In float64 it is the truth; in bf16 it rounds wherever
PyTorch's operators do, as the model does when it is run eagerly; with the words of a plan, every layer's q, k and v
are rounded as these say.
"""

import math

import torch
import torch.nn.functional as F


def forward(config, weights, ids, dtype, words=None):
    """logits [S, V]; of each layer hidden, the state behind it [S, D], and q and k as they leave their norm [S, H, Dh];
    scale, what attention multiplies q.k by.

    config: of transformers, for its numbers alone; weights: name -> bf16 tensor, as a checkpoint names them.
    words: of plain_chain.PLANS; what they say of positions and of Gemma's offset is left to the model.
    """
    w = {name: tensor.to(dtype) for name, tensor in weights.items()}
    gemma = config.model_type == "gemma3_text"
    x = w["model.embed_tokens.weight"][list(ids)]
    if gemma:
        x = x * torch.tensor(config.hidden_size**0.5, dtype=torch.bfloat16).to(
            dtype
        )  # Gemma was trained with that number
    made = {"hidden": [], "q": [], "k": []}
    for number in range(config.num_hidden_layers):
        layer = {
            name.removeprefix(f"model.layers.{number}."): t for name, t in w.items() if f"layers.{number}." in name
        }
        if words is None:
            q, k, v = heads_of(config, layer, x, gemma)
        else:
            q, k, v = planned_heads(config, layer, x, gemma, set(words.split()))
        attended = attention(config, layer, (q, k, v), number, gemma)
        if gemma:
            attended = norm(attended, layer["post_attention_layernorm.weight"], config, gemma)
        x = x + attended
        before = "pre_feedforward_layernorm.weight" if gemma else "post_attention_layernorm.weight"
        mixed = mlp(layer, norm(x, layer[before], config, gemma), gemma)
        if gemma:
            mixed = norm(mixed, layer["post_feedforward_layernorm.weight"], config, gemma)
        x = x + mixed
        for name, value in (("hidden", x), ("q", q), ("k", k)):
            made[name].append(value)
    x = norm(x, w["model.norm.weight"], config, gemma)
    logits = F.linear(x, w.get("lm_head.weight", w["model.embed_tokens.weight"]))
    return made | {"logits": logits, "scale": scale_of(config)}


def norm(x, weight, config, gemma):
    """RMSNorm over the last dimension: in fp32 in a bf16 model, and rounded where Qwen3 and Gemma 3 round."""
    wide = x.float() if x.dtype == torch.bfloat16 else x
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)
    if gemma:
        return (normed * (1.0 + weight.to(wide.dtype))).to(x.dtype)
    return weight * normed.to(x.dtype)


def heads_of(config, w, x, gemma):
    """q, k and v of a layer, [S, H, Dh]."""
    x = norm(x, w["input_layernorm.weight"], config, gemma)
    q, k, v = (F.linear(x, w[f"self_attn.{n}_proj.weight"]).reshape(len(x), -1, config.head_dim) for n in "qkv")
    return *(norm(value, w[f"self_attn.{n}_norm.weight"], config, gemma) for n, value in (("q", q), ("k", k))), v


def planned_heads(config, w, x, gemma, words):
    """The same in fp32, rounded where the words say so."""

    def r(value, name):
        return cut(value, 8, torch.trunc if "rtz" in words else torch.round) if name in words else value

    def rstd(value, name):
        variance = r(r(value * value, "statistics").mean(-1, keepdim=True), "variance")
        return r(torch.rsqrt(variance + config.rms_norm_eps), name)

    def factor(name):
        return (1.0 if gemma else 0.0) + w[name].float()

    assert not words & {"deferred", "folded", "tf32x3", "offset_bf16"}
    x = x.float()
    operand = r(r(x * rstd(x, "rstd"), "normed") * factor("input_layernorm.weight"), "hidden")
    matrix = torch.cat([w[f"self_attn.{n}_proj.weight"] for n in "qkv"])
    if {"hidden", "proj"} <= words and "rtz" not in words:  # PyTorch's bf16 matmul: fp32 sums, rounded
        proj = F.linear(operand.bfloat16(), matrix).float()
    else:
        operand = cut(operand, 11, torch.trunc) if "tf32" in words else operand
        proj = r(operand @ matrix.float().T, "proj")
    counts = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
    *qk, v = proj.reshape(len(x), sum(counts), config.head_dim).split(counts, 1)
    q, k = (
        r(value * rstd(value, "head_rstd"), "head_normed") * factor(f"self_attn.{n}_norm.weight")
        for n, value in zip("qk", qk, strict=True)
    )
    return [r(value, "out").bfloat16() for value in (q, k, v)]


def cut(value, bits, to_whole):
    """fp32 with so many significant bits; to_whole: torch.round (nearest even) or torch.trunc."""
    mantissa, exponent = torch.frexp(value)
    return torch.ldexp(to_whole(mantissa * 2**bits), exponent - bits)


def scale_of(config):
    """What attention multiplies q.k by."""
    return getattr(config, "query_pre_attn_scalar", config.head_dim) ** -0.5


def attention(config, w, qkv, number, gemma):
    q, k, v = qkv
    size, dtype = config.head_dim, v.dtype
    scale = scale_of(config)
    cos, sin = angles(config, number, len(v), dtype)
    turned = [t * cos + torch.cat([-t[..., size // 2 :], t[..., : size // 2]], -1) * sin for t in (q, k)]
    heads = [t.transpose(0, 1) for t in (*turned, v)]  # [H, S, Dh]
    groups = heads[0].shape[0] // heads[1].shape[0]
    query, key, value = heads[0], *(t.repeat_interleave(groups, 0) for t in heads[1:])
    if dtype == torch.float64:
        scores = query @ key.transpose(1, 2) * scale
        scores = scores.masked_fill(~torch.ones_like(scores[0], dtype=torch.bool).tril(), -math.inf)
        out = scores.softmax(-1) @ value
    else:
        out = F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True, scale=scale)[0]
    return F.linear(out.transpose(0, 1).reshape(len(v), -1), w["self_attn.o_proj.weight"])


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
