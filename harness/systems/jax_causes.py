"""Why a stage differs: made again of PyTorch's parts, but for one that is JAX's, on PyTorch's own stream.

Where nothing but elementwise products, sums and casts is JAX's and every bit is equal, its other parts are all that
differs. A matmul is asked on two other inputs: on whole numbers whose sums no order rounds, and on rows of one term.
What is equal there rounds its terms and its result alike, and differs on the stream by how fp32 adds: in which order,
and with products rounded before or not. Below, the libraries' functions: roots on every mantissa, others evenly.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import torch
import torch.nn.functional as F
from jax import lax
from torch import Tensor

from castpoint.harness.runs.schema import JaxCauseRow, JaxPartRow
from castpoint.harness.systems import decoder
from castpoint.harness.systems import jax_port as port
from castpoint.harness.systems.jax import DTYPES, EXACT, JIT, OP_BY_OP, Kept, name_of, read, reference
from castpoint.harness.systems.tally import Tally
from castpoint.harness.systems.weights import LAYER, Config, Lazy

NONE = "nothing but products"
NEAR = "exp within an ulp, sum within 8, none subnormal"
Make = Callable[..., Any]
Cause = tuple[str, str, Tensor, Tensor]  # stage, what of it is JAX's, its value, PyTorch's


def by_jax(function: Make, *values: Tensor) -> Tensor:
    return port.tensor(function(*map(port.array, values)))


def coarse(x: Tensor) -> Tensor:
    """x in whole numbers up to 24: so many that 29,000 products of two add up to less than 2^24 in any order."""
    return (x / x.abs().mean() * 6).round().clamp(-24, 24)


def lone(x: Tensor) -> Tensor:
    """Of each row the largest value, as it is; else 0."""
    return torch.zeros_like(x).scatter(-1, at := x.abs().argmax(-1, keepdim=True), x.gather(-1, at))


def exact(stage: str, ours: Make, theirs: Make, x: Tensor, y: Tensor) -> Iterator[Cause]:
    """Of a product's two operands."""
    for operands in ((coarse(x), coarse(y)), (lone(x), y)):
        yield stage, EXACT, by_jax(ours, *operands), theirs(*operands)


def linear(stage: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Iterator[Cause]:
    yield from exact(stage, port.linear, F.linear, x, weight)
    if bias is not None:
        operands = [coarse(value) for value in (x, weight, bias)]
        yield stage, EXACT, by_jax(port.linear_bias, *operands), F.linear(*operands)


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
    """PyTorch's exp and sum cannot be had apart from its softmax: a row that an exp within an ulp of JAX's and one sum
    within 8 explain is taken for equal; by the product with the sum's reciprocal, and by the quotient."""
    wide = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).float()
    exp = by_jax(jnp.exp, wide - wide.amax(-1, keepdim=True))
    total = by_jax(lambda v: jnp.sum(v, -1, keepdims=True), exp)
    exps = [(exp.view(torch.int32) + ulp).clamp(min=0).view(torch.float32) for ulp in (-1, 0, 1)]
    sums = [(total.view(torch.int32) + ulp).view(torch.float32) for ulp in range(-8, 9)]
    for how, over in (("times 1 / sum", lambda e, s: e * (1 / s)), ("divided by it", torch.div)):
        made = over(exp, total).to(expected.dtype)
        yield "weights", f"exp and sum, {how}", made, expected
        for one in sums:
            near = [over(e, one).to(expected.dtype) == expected for e in exps] + [expected < 2**-126]  # XLA's are 0
            made = torch.where(torch.stack(near).any(0).all(-1, keepdim=True), expected, made)
        yield "weights", f"{NEAR}, {how}", made, expected


def mlp(config: Config, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, expected: Tensor) -> Iterator[Cause]:
    opened, beside = F.linear(x, gate), F.linear(x, up)
    theirs = F.gelu(opened, approximate="tanh") if config.gemma else F.silu(opened)
    ours = by_jax(lambda v: port.activation(config, v), opened)
    for what, by in ((NONE, theirs), ("activation", ours)):
        yield "mlp", what, F.linear(by_jax(jnp.multiply, by, beside), down), expected
    for into, matrix in ((x, gate), (x, up), (theirs * beside, down)):
        yield from linear("mlp", into, matrix)


def angles(config: Config, layer: int, expected: Tensor) -> Iterator[Cause]:
    count, size = expected.shape[1], config.head_dim
    theirs = 1 / config.thetas[layer] ** (torch.arange(0, size, 2).float() / size)
    ours = port.tensor(1 / config.thetas[layer] ** (jnp.arange(0, size, 2, dtype=jnp.float32) / size))
    turns, turned = (torch.cos, torch.sin), (partial(by_jax, jnp.cos), partial(by_jax, jnp.sin))
    for what, steps, f in ((NONE, theirs, turns), ("powers of theta", ours, turns), ("cos and sin", theirs, turned)):
        phase = by_jax(jnp.outer, torch.arange(count).float(), steps)
        yield "angles", what, torch.stack([torch.cat([turn(phase)] * 2, -1)[:, None] for turn in f]), expected


def attention(config: Config, layer: int, kept: Kept) -> Iterator[Cause]:
    q, k, v, weights = (kept[name, layer] for name in ("q_rotated", "k_rotated", "v", "weights"))
    hidden = decoder.hidden_from(config, layer, *[torch.arange(len(v))] * 2)

    def theirs(stage: str, q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
        seen = {"weights": weights}
        attended = decoder.attention(config, q, k, v, hidden, lambda name, value: seen.setdefault(name, value))
        return attended if stage == "attended" else seen[stage]

    of_scores, of_attended = partial(theirs, "scores", v=v, weights=weights), partial(theirs, "attended", q, k)
    yield from exact("scores", partial(port.scores, config), of_scores, q, k)
    yield from exact("attended", port.attended, lambda weights, v: of_attended(v, weights), weights, v)
    yield from softmax(kept["scores", layer], hidden, weights)


def of_layer(config: Config, w: Lazy, layer: int, kept: Kept) -> Iterator[Cause]:
    def weight(name: str) -> Tensor:
        return w[f"model.layers.{layer}.{name}.weight"]

    behind = "pre_feedforward_layernorm" if config.gemma else "post_attention_layernorm"
    x = kept["hidden", layer - 1] if layer else kept["embedding", -1]
    yield from norm(config, "normed", x, weight("input_layernorm"))
    yield from norm(config, "mlp_normed", kept["residual", layer], weight(behind))
    ends = ("residual", "output", "post_attention", x), ("hidden", "mlp", "post_feedforward", kept["residual", layer])
    for stage, made, name, before in ends if config.gemma else ():
        for _, what, actual, _ in norm(config, stage, kept[made, layer], weight(f"{name}_layernorm")):
            yield stage, what, by_jax(jnp.add, before, actual), kept[stage, layer]
    for name in "qk" if config.head_norm else "":
        yield from norm(config, f"{name}_normed", kept[name, layer], weight(f"self_attn.{name}_norm"))
    for stage, before, name in (*((n, "normed", n) for n in "qkv"), ("output", "attended", "o")):
        bias = w[f"model.layers.{layer}.self_attn.{name}_proj.bias"] if config.bias and name != "o" else None
        yield from linear(stage, kept[before, layer], weight(f"self_attn.{name}_proj"), bias)
    yield from angles(config, layer, kept["angles", layer])
    yield from attention(config, layer, kept)
    matrices = (weight(f"mlp.{name}_proj") for name in ("gate", "up", "down"))
    yield from mlp(config, kept["mlp_normed", layer], *matrices, kept["mlp", layer])


def of_end(config: Config, w: Lazy, kept: Kept) -> Iterator[Cause]:
    count = config.num_layers
    yield from norm(config, "normed", kept["hidden", count - 1], w["model.norm.weight"])
    yield from linear("logits", kept["normed", count], port.head(config, w))


def cause_rows(source: str, dtype: str, tokens: int, shown: int = 0) -> list[JaxCauseRow]:
    """Over the layers (shown: at most so many, 0 for all) of one passage of so many tokens, JAX op by op."""
    weights, (ids,) = read(source, 1, tokens)
    weights = weights.shortened(shown or weights.config.num_layers)
    config, found = weights.config, dict[tuple[str, str], Tally]()
    kept, w = reference(weights, DTYPES[dtype], ids), Lazy(weights, DTYPES[dtype])
    parts = [of_layer(config, w, layer, kept) for layer in range(config.num_layers)]
    parts += [] if source == LAYER else [of_end(config, w, kept)]  # its head is no model's
    for stage, what, actual, expected in itertools.chain(*parts):
        found.setdefault((stage, what), Tally()).add(actual, expected)
    about = {"model": name_of(source), "dtype": dtype, "tokens": len(ids)}
    return [
        JaxCauseRow(**about, stage=stage, by_jax=what, differ=tally.elements - tally.equal, **tally.shares())
        for (stage, what), tally in found.items()
    ]


ROOTS, RIGHT = ("rsqrt", "power", "1/sqrt"), "correctly rounded"  # but for ties of float64's value
# function -> PyTorch's, JAX's, first and last of its fp32 inputs, none: every bf16 of 2^-120 to 64; what it says
FUNCTIONS: dict[str, tuple[Make, Make, tuple[int, ...], str]] = {
    "rsqrt": (torch.rsqrt, lax.rsqrt, (), ""),
    "power": (lambda v: v**-0.5, lambda v: v**-0.5, (), ""),
    "1/sqrt": (lambda v: 1 / v.sqrt(), lambda v: 1 / jnp.sqrt(v), (), ""),
    RIGHT: (lambda v: v.double().rsqrt().float(), lax.rsqrt, (), ""),
    "exp": (lambda v: torch.cat([torch.zeros(len(v), 1), v[:, None]], 1).softmax(-1)[:, 1], jnp.exp, (-80, -20),
            "softmax: its exp, where its sum is 1"),  # PyTorch's is not torch.exp
    "silu": (F.silu, jax.nn.silu, (-16, 16), "Qwen's MLP: its function"),
    "tanh": (torch.tanh, jnp.tanh, (-4, 4), "Gemma's GELU: its function"),
    "cos": (torch.cos, jnp.cos, (0, 64), "RoPE's angles: its function at equal phases"),
    "sin": (torch.sin, jnp.sin, (0, 64), "the same"),
    "silu, rounded once": (F.silu, lambda v: jax.nn.silu(port.wide(v)).astype(v.dtype), (), "Qwen's MLP in bf16"),
    "silu, as jax.nn writes it": (F.silu, jax.nn.silu, (), "what a port does without a cast"),
}  # fmt: skip


def mantissas(bits: int = 23) -> Iterator[Tensor]:
    """Every fp32 in [1, 4) whose mantissa has that many bits, in chunks: rsqrt(4^k x) is rsqrt(x) / 2^k, exactly, for a
    function that only sees mantissa and parity of the exponent, as the tests ask of each."""
    step = 1 << (23 - bits)
    for start in range(0x3F800000, 0x40800000, 1 << 20):
        yield torch.arange(start, start + (1 << 20), step, dtype=torch.int32).view(torch.float32)


def of_function(name: str, x: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """JAX's and PyTorch's values."""
    theirs, ours, _, _ = FUNCTIONS[name]
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
    bf16 = torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(torch.bfloat16)
    bf16 = bf16[(bf16.float().abs() < 64) & (bf16.float().abs() >= 2**-120)]  # none of subnormal results
    for name, (_, _, ends, says) in FUNCTIONS.items():
        x = torch.linspace(*ends, count, dtype=torch.float64).float() if ends else bf16
        inputs = f"{count:,} fp32 in {list(ends)}" if ends else "every bf16 of 2^-120 to 64"
        if says:
            yield row(f"{name}: JAX, PyTorch", how, inputs, says, iter([of_function(name, x, how)]))


def precision(how: str) -> Iterator[JaxPartRow]:
    x, w = (torch.randn(rows, 896, generator=torch.Generator().manual_seed(rows)) for rows in (64, 512))
    made = []
    for name in ("highest", "default"):
        with jax.default_matmul_precision(name):
            made.append(by_jax(jax.jit(port.linear) if how == JIT else port.linear, x, w))
    says = "whether JAX's precision matters"
    yield row("matmul, precision default and highest", how, "normal values, fp32", says, iter([(made[0], made[1])]))


def part_rows(short: bool) -> list[JaxPartRow]:
    """Every part, op by op and compiled."""
    bits, count = (16, 2**16) if short else (23, 2**22)
    made = ((roots(how, bits), functions(how, count), precision(how)) for how in (OP_BY_OP, JIT))
    return [row for parts in made for rows in parts for row in rows]
