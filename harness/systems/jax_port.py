"""A decoder (Qwen2, Qwen3, Gemma 3) in plain JAX, stage by stage as harness/systems/decoder.py has it in PyTorch.

A stage reads and writes a state: name -> array. Run in their order on their own state they are the model; one by one on
PyTorch's state each is judged alone. Values of one sequence: x [S, D], q, k and v [S, H, Dh]. Where PyTorch's operator
rounds once (silu, a product with a Python number), so does the stage here, by hand: JAX would round that number to bf16
first, and every step of silu.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
from jax import Array, lax
from torch import Tensor

from castpoint.harness.systems.weights import Config

State = dict[str, Array]
Stage = tuple[str, Callable[[State, Mapping[str, Array]], Array]]  # of a state and the layer's weights


def array(tensor: Tensor) -> Array:
    """The same bits in JAX; float64 needs jax.enable_x64."""
    if tensor.dtype == torch.bfloat16:
        return jnp.asarray(tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return jnp.asarray(tensor.contiguous().numpy())


def tensor(value: Array) -> Tensor:
    """The same bits in PyTorch."""
    held = np.array(value)
    if held.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(held.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(held)


def wide(x: Array) -> Array:
    return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x


def times(x: Array, number: float) -> Array:
    """x times a Python number in x's opmath, rounded once."""
    return (wide(x) * number).astype(x.dtype)


def embed(config: Config, rows: Array) -> Array:
    return rows * jnp.asarray(config.hidden_size**0.5, jnp.bfloat16).astype(rows.dtype) if config.gemma else rows


def scaled(config: Config, x: Array, rstd: Array, weight: Array) -> Array:
    normed = wide(x) * rstd
    if config.gemma:
        return (normed * (1.0 + weight.astype(normed.dtype))).astype(x.dtype)
    return weight * normed.astype(x.dtype)


def norm(config: Config, x: Array, weight: Array) -> Array:
    return scaled(config, x, lax.rsqrt(jnp.mean(jnp.square(wide(x)), -1, keepdims=True) + config.eps), weight)


def linear(x: Array, weight: Array) -> Array:
    """x W^T [S, out] of x [S, in] and weight [out, in], rounded to their dtype."""
    return lax.dot_general(x, weight, (((1,), (1,)), ((), ())))


def linear_bias(x: Array, weight: Array, bias: Array | None) -> Array:
    """Rounded once, behind the bias, as PyTorch's linear with a bias is on CPUs."""
    if bias is None:
        return linear(x, weight)
    made = lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=wide(x[:1]).dtype)
    return (made + bias.astype(made.dtype)).astype(x.dtype)


def angles(config: Config, layer: int, count: int) -> Array:
    """cos and sin [2, S, 1, Dh] fp32."""
    steps = 1 / config.thetas[layer] ** (jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    phase = jnp.outer(jnp.arange(count, dtype=jnp.float32), steps.astype(jnp.float32))
    return jnp.stack([jnp.concatenate([f(phase)] * 2, -1)[:, None] for f in (jnp.cos, jnp.sin)])


def rotate(x: Array, turned: Array) -> Array:
    half, (cos, sin) = x.shape[-1] // 2, turned.astype(x.dtype)
    return x * cos + jnp.concatenate([-x[..., half:], x[..., :half]], -1) * sin


def scores(config: Config, q: Array, k: Array) -> Array:
    """[Hq, S, S]."""
    key = jnp.repeat(k.transpose(1, 0, 2), q.shape[1] // k.shape[1], 0)
    return times(jnp.matmul(q.transpose(1, 0, 2), key.transpose(0, 2, 1)), config.scale)


def weights_of(config: Config, layer: int, made: Array) -> Array:
    """Softmax over the keys that a query sees, in fp32 for bf16."""
    place = jnp.arange(made.shape[-1])
    distance, window = place[:, None] - place[None], config.windows[layer]
    unseen = (distance < 0) | (distance >= window) if window else distance < 0
    return jax.nn.softmax(wide(jnp.where(unseen, jnp.finfo(made.dtype).min, made)), -1).astype(made.dtype)


def attended(weights: Array, v: Array) -> Array:
    value = jnp.repeat(v.transpose(1, 0, 2), weights.shape[0] // v.shape[1], 0)
    return jnp.matmul(weights, value).transpose(1, 0, 2).reshape(weights.shape[1], -1)


def activation(config: Config, x: Array) -> Array:
    return (partial(jax.nn.gelu, approximate=True) if config.gemma else jax.nn.silu)(wide(x)).astype(x.dtype)


def mlp(config: Config, x: Array, w: Mapping[str, Array]) -> Array:
    opened = activation(config, linear(x, w["mlp.gate_proj.weight"])) * linear(x, w["mlp.up_proj.weight"])
    return linear(opened, w["mlp.down_proj.weight"])


def stages(config: Config, layer: int) -> Iterator[Stage]:
    """Those of a layer in their order: `x` in, `hidden` out."""
    names = ("residual", "pre_feedforward") if config.gemma else ("residual", "post_attention")

    def behind(name: str, value: Array, w: Mapping[str, Array]) -> Array:
        return norm(config, value, w[f"{name}_layernorm.weight"]) if config.gemma else value

    def project(name: str, s: State, w: Mapping[str, Array]) -> Array:
        made = linear_bias(
            s["normed"],
            w[f"self_attn.{name}_proj.weight"],
            w.get(f"self_attn.{name}_proj.bias") if config.bias else None,
        )
        return made.reshape(made.shape[0], -1, config.head_dim)

    def head_norm(name: str, s: State, w: Mapping[str, Array]) -> Array:
        return norm(config, s[name], w[f"self_attn.{name}_norm.weight"])

    yield "normed", lambda s, w: norm(config, s["x"], w["input_layernorm.weight"])
    for name in "qkv":
        yield name, partial(project, name)
    yield "angles", lambda s, w: angles(config, layer, s["x"].shape[0])
    for name in "qk":
        if config.head_norm:
            yield f"{name}_normed", partial(head_norm, name)
        before = f"{name}_normed" if config.head_norm else name
        yield f"{name}_rotated", lambda s, w, before=before: rotate(s[before], s["angles"])
    yield "scores", lambda s, w: scores(config, s["q_rotated"], s["k_rotated"])
    yield "weights", lambda s, w: weights_of(config, layer, s["scores"])
    yield "attended", lambda s, w: attended(s["weights"], s["v"])
    yield "output", lambda s, w: linear(s["attended"], w["self_attn.o_proj.weight"])
    yield "residual", lambda s, w: s["x"] + behind("post_attention", s["output"], w)
    yield "mlp_normed", lambda s, w: norm(config, s["residual"], w[f"{names[1]}_layernorm.weight"])
    yield "mlp", lambda s, w: mlp(config, s["mlp_normed"], w)
    yield "hidden", lambda s, w: s["residual"] + behind("post_feedforward", s["mlp"], w)


def run_layer(config: Config, layer: int, x: Array, w: Mapping[str, Array], given: Mapping[str, Array]) -> State:
    """Every stage's value; given: those that are not made but taken."""
    state = {"x": x}
    for name, make in stages(config, layer):
        state[name] = given[name] if name in given else make(state, w)
    return state


def layer_weights(w: Mapping[str, Tensor], layer: int) -> dict[str, Array]:
    prefix = f"model.layers.{layer}."
    return {name.removeprefix(prefix): array(w[name]) for name in w if name.startswith(prefix)}


def first(config: Config, w: Mapping[str, Tensor], ids: list[int]) -> Array:
    """The embedding of those tokens."""
    return embed(config, array(w["model.embed_tokens.weight"][ids]))


def head(config: Config, w: Mapping[str, Tensor]) -> Tensor:
    """[V, D], what makes logits."""
    return w["model.embed_tokens.weight" if config.tied else "lm_head.weight"]
