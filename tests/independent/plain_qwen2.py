"""Qwen2 once more, in float64: several copies of a model that differ in one thing, through its layers together.

It imports nothing of the lab. What is planted: a bias behind the output projection, which the model does not have, or
K of the first layer moved by one fp32 ulp. Copy 0 has nothing planted.
"""

import numpy as np
import torch
import torch.nn.functional as F
from plain_model import angles, mlp, norm


def drawn_biases(config, seed):
    """Of every layer [D]: uniform in +-1 / sqrt(fan in), as torch.nn.Linear draws what it makes."""
    source = torch.Generator().manual_seed(seed)
    largest = config.hidden_size**-0.5  # all heads together are as wide as the model
    draws = torch.rand(config.num_hidden_layers, config.hidden_size, generator=source)
    return ((2 * draws - 1) * largest).double()


def ulp_of_k(shape, seed):
    """+-1, drawn; shape of K [S, Hkv * Dh]."""
    source = torch.Generator().manual_seed(seed)
    return torch.where(torch.randint(0, 2, shape, generator=source) == 1, 1.0, -1.0).double()


def forward(config, weight, ids, biases=(), seeds_of_ulp=()):
    """The first layer's k, scores [C, H, S, S] (unmasked) and output of attention, the state behind each layer, logits.

    weight: name -> tensor, one layer of which is held at a time. biases: of each further copy, [layers, D].
    """
    copies = 1 + len(biases) + len(seeds_of_ulp)
    planted = torch.zeros(copies, config.num_hidden_layers, config.hidden_size, dtype=torch.float64)
    planted[1 : 1 + len(biases)] = torch.stack(list(biases)) if len(biases) else 0.0
    x = weight("model.embed_tokens.weight")[list(ids)].double().expand(copies, -1, -1)
    made = {"hidden": []}
    for number in range(config.num_hidden_layers):
        names = [f"{part}_proj.{kind}" for part in "qkv" for kind in ("weight", "bias")] + ["o_proj.weight"]
        w = {f"self_attn.{name}": f"self_attn.{name}" for name in names}
        w |= {name: name for name in ("input_layernorm.weight", "post_attention_layernorm.weight")}
        w |= {f"mlp.{part}_proj.weight": f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
        w = {name: weight(f"model.layers.{number}.{name}").double() for name in w}
        normed = norm(x, w["input_layernorm.weight"], config, False)
        q, k, v = (F.linear(normed, w[f"self_attn.{n}_proj.weight"], w[f"self_attn.{n}_proj.bias"]) for n in "qkv")
        if number == 0:
            k = torch.stack([*k[: 1 + len(biases)], *(moved(k[0], seed) for seed in seeds_of_ulp)])
        attended, scores = attention(config, (q, k, v), number)
        output = F.linear(attended, w["self_attn.o_proj.weight"]) + planted[:, number, None]
        if number == 0:
            made |= {"k": k, "scores": scores, "output": output}
        x = x + output
        x = x + mlp(w, norm(x, w["post_attention_layernorm.weight"], config, False), False)
        made["hidden"].append(x)
    x = norm(x, weight("model.norm.weight").double(), config, False)
    table = weight("lm_head.weight")
    return made | {"logits": torch.cat([F.linear(x, part.double()) for part in table.split(1 << 14)], -1)}


def moved(k, seed):
    """k, and an fp32 ulp of it more or less."""
    single = np.abs(k.numpy()).astype(np.float32)
    return k + ulp_of_k(k.shape, seed) * torch.from_numpy(np.spacing(single).astype(np.float64))


def attention(config, qkv, number):
    """[C, S, H * Dh], and the scores; of q, k, v [C, S, H * Dh]."""
    size = config.head_dim
    cos, sin = angles(config, number, qkv[0].shape[1], torch.float64)
    q, k, v = (t.unflatten(-1, (-1, size)) for t in qkv)
    q, k = (t * cos + torch.cat([-t[..., size // 2 :], t[..., : size // 2]], -1) * sin for t in (q, k))
    groups = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(groups, 2) for t in (k, v))
    scores = torch.einsum("cqhd,ckhd->chqk", q, k) / size**0.5
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("chqk,ckhd->cqhd", weights, v).flatten(-2), scores


# ---------------------------------------------------------------- what two copies differ by


def apart(made, stage, copy):
    """Largest difference of a copy from copy 0."""
    return (made[stage][copy] - made[stage][0]).abs().max().item()


def said_differently(made, copy):
    """Of the logits, and of the distribution behind the last token."""
    right, other = made["logits"][0], made["logits"][copy]
    p, q = (each[-1].softmax(-1) for each in (right, other))
    ranks = [each[-1].argsort(descending=True).tolist() for each in (right, other)]
    return {
        "logits, largest difference": (other - right).abs().max().item(),
        "logits, mean difference": (other - right).abs().mean().item(),
        "KL": (p * (p.log() - q.log())).sum().item(),
        "largest change of a probability": (p - q).abs().max().item(),
        "first choice changed": float(ranks[0][0] != ranks[1][0]),
        "of the top 5 kept": len(set(ranks[0][:5]) & set(ranks[1][:5])),
        "of the top 10 kept": len(set(ranks[0][:10]) & set(ranks[1][:10])),
    }
