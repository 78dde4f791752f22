"""Why a stage differs: made again of PyTorch's parts, but for one that is JAX's, on PyTorch's own stream.

Where none is JAX's and every bit is equal, no cause is left out. A matmul is asked on inputs whose sums are exact in
any order: what is equal there, and not on the stream, differs by the order of its sums. Below, the libraries' functions
side by side: roots on every mantissa, others on evenly spaced inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import torch
import torch.nn.functional as F
from jax import Array, lax
from torch import Tensor

from castpoint.harness.runs.schema import JaxCauseRow, JaxPartRow
from castpoint.harness.systems import decoder
from castpoint.harness.systems import jax_port as port
from castpoint.harness.systems.jax import DTYPES, EXACT, JIT, OP_BY_OP, Kept, name_of, read, reference
from castpoint.harness.systems.tally import Tally
from castpoint.harness.systems.weights import Config, Lazy

NONE = "nothing but products"
SOFTMAX = "exp within an ulp, any sum, times 1 / sum"
Cause = tuple[str, str, Tensor, Tensor]  # stage, what of it is JAX's, its value, PyTorch's


def by_jax(function: Callable[..., Array], *values: Tensor) -> Tensor:
    return port.tensor(function(*map(port.array, values)))


def coarse(x: Tensor) -> Tensor:
    """x in 65 steps, of size 1: what 2^13 products of two such add up to fits fp32's 24 bits in any order."""
    return (x / x.abs().max() * 32).round()


def exact(stage: str, x: Tensor, weight: Tensor) -> Cause:
    x, weight = coarse(x), coarse(weight)
    return stage, EXACT, by_jax(port.linear, x, weight), F.linear(x, weight)


def norm(config: Config, stage: str, x: Tensor, weight: Tensor) -> Iterator[Cause]:
    def root(mean: Tensor) -> Tensor:
        return torch.rsqrt(mean + config.eps)

    wide, expected = x.float(), decoder.norm(config, x, weight)
    theirs = wide.pow(2).mean(-1, keepdim=True)
    mean = by_jax(lambda v: jnp.mean(jnp.square(v), -1, keepdims=True), wide)
    rsqrt = by_jax(lambda v: lax.rsqrt(v + config.eps), theirs)
    for what, by in ((NONE, root(theirs)), ("sum of squares", root(mean)), ("rsqrt", rsqrt)):
        yield stage, what, by_jax(lambda *v: port.scaled(config, *v), x, by, weight), expected


def softmax(scores: Tensor, hidden: Tensor, expected: Tensor) -> Iterator[Cause]:
    """PyTorch's exp cannot be had apart from its softmax: what an exp within an ulp of JAX's, one sum a row and the
    product with its reciprocal explain is taken for equal."""
    wide = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).float()
    made = by_jax(jnp.exp, wide - wide.amax(-1, keepdim=True))
    total = by_jax(lambda v: jnp.sum(v, -1, keepdims=True), made)
    yield "weights", "exp and sum, times 1 / sum", (made * (1 / total)).to(expected.dtype), expected
    explained = torch.zeros_like(expected[..., :1], dtype=torch.bool)
    for step in range(-8, 9):
        inverse = 1 / (total.view(torch.int32) + step).view(torch.float32)
        near = [((made.view(torch.int32) + ulp).clamp(min=0).view(torch.float32) * inverse).to(expected.dtype)
                for ulp in (-1, 0, 1)]  # fmt: skip
        explained |= torch.stack([each == expected for each in near]).any(0).all(-1, keepdim=True)
    yield "weights", SOFTMAX, torch.where(explained, expected, made), expected


def mlp(config: Config, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, expected: Tensor) -> Iterator[Cause]:
    opened, beside = F.linear(x, gate), F.linear(x, up)
    theirs = F.gelu(opened, approximate="tanh") if config.gemma else F.silu(opened)
    ours = by_jax(lambda v: port.activation(config, v), opened)
    for what, by in ((NONE, theirs), ("activation", ours)):
        yield "mlp", what, F.linear(by_jax(jnp.multiply, by, beside), down), expected
    for into, matrix in ((x, gate), (theirs * beside, down)):
        yield exact("mlp", into, matrix)


def angles(config: Config, layer: int, expected: Tensor) -> Iterator[Cause]:
    count, size = expected.shape[1], config.head_dim
    theirs = 1 / config.thetas[layer] ** (torch.arange(0, size, 2).float() / size)
    ours = port.tensor(1 / config.thetas[layer] ** (jnp.arange(0, size, 2, dtype=jnp.float32) / size))
    turns = torch.cos, torch.sin
    turned = (lambda v: by_jax(jnp.cos, v)), (lambda v: by_jax(jnp.sin, v))
    for what, steps, f in ((NONE, theirs, turns), ("powers of theta", ours, turns), ("cos and sin", theirs, turned)):
        phase = torch.outer(torch.arange(count).float(), steps)
        yield "angles", what, torch.stack([torch.cat([turn(phase)] * 2, -1)[:, None] for turn in f]), expected


def attention(config: Config, layer: int, kept: Kept) -> Iterator[Cause]:
    places, seen = torch.arange(len(kept["v", layer])), {}
    hidden = decoder.hidden_from(config, layer, places, places)

    def tap(stage: str, value: Tensor) -> Tensor:
        seen[stage] = coarse(value) if stage == "weights" else value
        return seen[stage]

    q, k, v = (coarse(kept[name, layer]) for name in ("q_rotated", "k_rotated", "v"))
    attended = decoder.attention(config, q, k, v, hidden, tap)
    yield "scores", EXACT, by_jax(lambda *qk: port.scores(config, *qk), q, k), seen["scores"]
    yield "attended", EXACT, by_jax(port.attended, seen["weights"], v), attended
    yield from softmax(kept["scores", layer], hidden, kept["weights", layer])


def of_layer(config: Config, w: Lazy, layer: int, kept: Kept) -> Iterator[Cause]:
    def weight(name: str) -> Tensor:
        return w[f"model.layers.{layer}.{name}.weight"]

    behind = "pre_feedforward_layernorm" if config.gemma else "post_attention_layernorm"
    x = kept["hidden", layer - 1] if layer else kept["embedding", -1]
    yield from norm(config, "normed", x, weight("input_layernorm"))
    yield from norm(config, "mlp_normed", kept["residual", layer], weight(behind))
    if config.gemma:
        yield from norm(config, "residual", kept["output", layer], weight("post_attention_layernorm"))
        yield from norm(config, "hidden", kept["mlp", layer], weight("post_feedforward_layernorm"))
    for name in "qk" if config.head_norm else "":
        yield from norm(config, f"{name}_normed", kept[name, layer], weight(f"self_attn.{name}_norm"))
    for stage, before, name in (*((n, "normed", n) for n in "qkv"), ("output", "attended", "o")):
        yield exact(stage, kept[before, layer], weight(f"self_attn.{name}_proj"))
    yield from angles(config, layer, kept["angles", layer])
    yield from attention(config, layer, kept)
    matrices = (weight(f"mlp.{name}_proj") for name in ("gate", "up", "down"))
    yield from mlp(config, kept["mlp_normed", layer], *matrices, kept["mlp", layer])


def cause_rows(source: str, dtype: str, tokens: int, shown: int = 0) -> list[JaxCauseRow]:
    """Over the layers (shown: at most so many, 0 for all) of one passage of so many tokens, JAX op by op."""
    weights, (ids,) = read(source, 1, tokens)
    weights = weights.shortened(shown or weights.config.num_layers)
    config, count = weights.config, weights.config.num_layers
    kept, w = reference(weights, DTYPES[dtype], ids), Lazy(weights, DTYPES[dtype])
    found: dict[tuple[str, str], Tally] = {}
    head = exact("logits", kept["normed", count], port.head(config, w))
    causes = (cause for layer in range(count) for cause in of_layer(config, w, layer, kept))
    for stage, what, actual, expected in itertools.chain([head], causes):
        found.setdefault((stage, what), Tally()).add(actual, expected)
    return [
        JaxCauseRow(model=name_of(source), dtype=dtype, stage=stage, by_jax=what, tokens=len(ids), **tally.shares())
        for (stage, what), tally in found.items()
    ]


# ---------------------------------------------------------------- functions

RIGHT = "correctly rounded"  # but for ties of float64's value
# fp32 function -> PyTorch's, JAX's
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Array], Array]]] = {
    "rsqrt": (torch.rsqrt, lax.rsqrt),
    "power": (lambda v: v**-0.5, lambda v: v**-0.5),
    "1/sqrt": (lambda v: 1 / v.sqrt(), lambda v: 1 / jnp.sqrt(v)),
    RIGHT: (lambda v: v.double().rsqrt().float(),) * 2,
    "exp": (lambda v: torch.cat([torch.zeros(len(v), 1), v[:, None]], 1).softmax(-1)[:, 1], jnp.exp),  # see functions
    "tanh": (torch.tanh, jnp.tanh),
    "cos": (torch.cos, jnp.cos),
    "sin": (torch.sin, jnp.sin),
    "silu": (F.silu, jax.nn.silu),
}
ROOTS = ("rsqrt", "power", "1/sqrt")


def mantissas(bits: int = 23) -> Iterator[Tensor]:
    """Every fp32 in [1, 4) whose mantissa has that many bits, in chunks: rsqrt(4^k x) is rsqrt(x) / 2^k, exactly, for a
    function that only sees mantissa and parity of the exponent, as the tests hold each to be."""
    step = 1 << (23 - bits)
    for start in range(0x3F800000, 0x40800000, 1 << 20):
        yield torch.arange(start, start + (1 << 20), step, dtype=torch.int32).view(torch.float32)


def of_function(name: str, x: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """JAX's and PyTorch's values."""
    theirs, ours = FUNCTIONS[name]
    return theirs(x) if name == RIGHT else by_jax(jax.jit(ours) if how == JIT else ours, x), theirs(x)


def row(part: str, how: str, inputs: str, says: str, pairs: Iterator[tuple[Tensor, Tensor]]) -> JaxPartRow:
    tally = Tally()
    for actual, expected in pairs:
        tally.add(actual, expected)
    return JaxPartRow(part=part, how=how, inputs=inputs, says=says, **tally.shares())


def roots(how: str, bits: int) -> Iterator[JaxPartRow]:
    inputs = "every mantissa, two exponents" if bits == 23 else f"mantissas of {bits} bits, two exponents"
    for name in ROOTS:
        pairs = (of_function(name, x, how) for x in mantissas(bits))
        yield row(f"{name}: JAX, PyTorch", how, inputs, f"whether {name} is one function in both", pairs)
    for place, library in enumerate(("JAX", "PyTorch")):
        for one, other in itertools.combinations((*ROOTS, RIGHT), 2):
            says = "which of two is nearer" if other == RIGHT else "whether two ways to write it are one"
            pairs = ((of_function(one, x, how)[place], of_function(other, x, how)[place]) for x in mantissas(bits))
            yield row(f"{library}: {one}, {other}", how, inputs, says, pairs)


def functions(how: str, count: int) -> Iterator[JaxPartRow]:
    for name, low, high, says in (
        ("exp", -80.0, -20.0, "softmax: its exp, where its sum is 1"),  # PyTorch's is not torch.exp
        ("silu", -16.0, 16.0, "Qwen's MLP: its function"),
        ("tanh", -4.0, 4.0, "Gemma's GELU: its function"),
        ("cos", 0.0, 64.0, "RoPE's angles: its function at equal phases"),
        ("sin", 0.0, 64.0, "the same"),
    ):
        x = torch.linspace(low, high, count, dtype=torch.float64).float()
        inputs = f"{count:,} fp32 in [{low:g}, {high:g}]"
        yield row(f"{name}: JAX, PyTorch", how, inputs, says, iter([of_function(name, x, how)]))
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(torch.bfloat16)
    every = every[every.isfinite() & (every.float().abs() < 64)]
    for name, says, silu in (
        ("silu, rounded once", "Qwen's MLP in bf16: its function", lambda v: jax.nn.silu(port.wide(v)).astype(v.dtype)),
        ("silu, as jax.nn writes it", "what a port does without a cast", jax.nn.silu),
    ):
        made = by_jax(jax.jit(silu) if how == JIT else silu, every), F.silu(every)
        yield row(f"{name}: JAX, PyTorch", how, "every bf16 below 64", says, iter([made]))


def precision(how: str) -> Iterator[JaxPartRow]:
    rng = torch.Generator().manual_seed(0)
    x, w = (port.array(torch.randn(shape, generator=rng)) for shape in ((64, 896), (512, 896)))
    made = []
    for name in ("highest", "default"):
        with jax.default_matmul_precision(name):
            made.append(port.tensor((jax.jit(port.linear) if how == JIT else port.linear)(x, w)))
    yield row("matmul, precision default and highest", how, "normal values, fp32", "whether JAX's precision matters",
              iter([(made[0], made[1])]))  # fmt: skip


def part_rows(short: bool) -> list[JaxPartRow]:
    """Every part, op by op and compiled."""
    made = ((roots(how, 16 if short else 23), functions(how, 2**16 if short else 2**22), precision(how))
            for how in (OP_BY_OP, JIT))  # fmt: skip
    return [row for parts in made for rows in parts for row in rows]
