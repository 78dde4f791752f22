"""The claims of the JAX port (B1 to B3), measured on real weights: RMSNorm's writings, the chain of casts, 1e-6."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import torch
from jax import Array, lax
from torch import Tensor

from castpoint.harness.runs.words import Judged
from castpoint.harness.systems import decoder, jax_causes
from castpoint.harness.systems import jax_port as port
from castpoint.harness.systems.found import Figure, Found
from castpoint.harness.systems.jax import GIVEN_ANGLES, JIT, OP_BY_OP, WHOLE, fp64, read, reference, tallies
from castpoint.harness.systems.weights import Config, Lazy, Weights

GEMMA, QWEN = "gemma-3-270m", "qwen2.5-coder-0.5b-instruct"
DECIDES = "castpoint study jax --model Qwen/Qwen2.5-7B-Instruct"
OUTPUT, LOGITS = 1.14e-2, (0.14, 3.32)  # what the report says
ROOTS: dict[str, Callable[[Array, Array], Array]] = {
    "rsqrt": lambda x, v: x * lax.rsqrt(v),
    "power": lambda x, v: x * v**-0.5,
    "x / sqrt": lambda x, v: x / jnp.sqrt(v),
}


@dataclass(frozen=True)
class Size:
    models: tuple[str, ...]
    passages: int
    tokens: int


def size(short: bool) -> Size:
    return Size((QWEN,), 1, 16) if short else Size((GEMMA, QWEN), 2, 64)


def said_of(s: Size) -> str:
    return f"{', '.join(s.models)}; {s.passages} x {s.tokens} tokens; CPU"


# ---------------------------------------------------------------- B1


def written(config: Config, x: Array, weight: Array, root: str, mixed: bool) -> Array:
    """RMSNorm with that root, its statistics and root in fp32 (mixed), or everything in x's bf16."""
    held = port.wide(x) if mixed else x
    normed = ROOTS[root](held, jnp.mean(jnp.square(held), -1, keepdims=True) + jnp.asarray(config.eps, held.dtype))
    if config.gemma:
        return (normed * (1 + weight.astype(normed.dtype))).astype(x.dtype)
    return weight * normed.astype(x.dtype)


def norms(weights: Weights, ids: list[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Stream, weight and PyTorch's result of every layer's input norm, in bf16."""
    kept, found = reference(weights, torch.bfloat16, ids), []
    for layer in range(weights.config.num_layers):
        x = kept["hidden", layer - 1] if layer else kept["embedding", -1]
        weight = weights.read(f"model.layers.{layer}.input_layernorm.weight").bfloat16()
        found.append((x, weight, kept["normed", layer]))
    return found


def b1(short: bool) -> Found:
    s, bits = size(short), 16 if short else 23
    off: dict[tuple[str, bool], list[float]] = {(root, mixed): [] for mixed in (True, False) for root in ROOTS}
    differ = dict.fromkeys(off, 0)
    elements = 0
    for model in s.models:
        weights, passages = read(model, s.passages, s.tokens)
        for x, weight, expected in (row for ids in passages for row in norms(weights, ids)):
            elements += expected.numel()
            for (root, mixed), found in off.items():
                made = port.tensor(written(weights.config, port.array(x), port.array(weight), root, mixed))
                found.append((made.double() - expected.double()).abs().max().item())
                differ[root, mixed] += int((made != expected).sum())
    equal = {row.part: row.share_equal for row in jax_causes.roots(OP_BY_OP, bits)}
    zero = max(off["rsqrt", True]) == 0
    others = max(max(off[root, True]) for root in ("power", "x / sqrt"))
    verdict = Judged.NOT_REPRODUCED
    if zero and others > 0 and equal["JAX: rsqrt, power"] < 1:
        verdict = Judged.REPRODUCED
    elif 10 * max(differ[root, True] for root in ROOTS) < min(differ[root, False] for root in ROOTS):
        verdict = Judged.OTHERWISE  # fp32 or bf16 decides, not which root
    share = {key: count / elements for key, count in differ.items()}
    inside = "; ".join(f"{root} {share[root, True]:.2g}" for root in ROOTS)
    outside = "; ".join(f"{root} {share[root, False]:.2g}" for root in ROOTS)
    return Found(
        verdict,
        f"share of elements that differ from PyTorch's in bf16, statistics in fp32: {inside}; all in bf16: {outside}. "
        f"In fp32 JAX's rsqrt equals PyTorch's on {equal['rsqrt: JAX, PyTorch']:.1%} of all inputs, JAX's power JAX's "
        f"rsqrt on {equal['JAX: rsqrt, power']:.1%}, PyTorch's power PyTorch's rsqrt on "
        f"{equal['PyTorch: rsqrt, power']:.1%}",
        "the input norm of every layer on PyTorch's own stream, written in three ways, each with fp32 statistics and "
        "all in bf16; the roots on every mantissa at two exponents",
        f"{said_of(s)}; roots: {2 ** (bits + 1):,} inputs",
        tuple(
            Figure(
                "largest difference of a layer's RMSNorm",
                f"{root}, {'fp32 statistics' if mixed else 'all in bf16'}",
                found,
                (0.0,) if mixed and root == "rsqrt" else (5.08e-3,) if not mixed else (),
            )
            for (root, mixed), found in off.items()
        ),
    )


# ---------------------------------------------------------------- B2


def chained(weight: Tensor) -> Tensor:
    """bf16 -> float16 -> float32 -> bf16."""
    return weight.half().float().bfloat16()


def lost(weights: Weights) -> tuple[int, int, int, float]:
    """Weights; those that the chain changes; those of them that become 0 or infinite; the largest finite change."""
    count = changed = gone = 0
    largest = 0.0
    for name in weights.config.shapes():
        before = weights.read(name).bfloat16()
        after = chained(before)
        other = before != after
        count, changed = count + before.numel(), changed + int(other.sum())
        gone += int((other & ((after == 0) | ~after.isfinite())).sum())
        off = (after.float() - before.float()).abs()
        largest = max(largest, off[off.isfinite()].max().item())
    return count, changed, gone, largest


def output(weights: Weights, ids: list[int], through: Callable[[Tensor], Tensor]) -> Tensor:
    """Layer 0's attention output in PyTorch, bf16, every weight passed through that function."""

    class Through(Lazy):
        def __getitem__(self, name: str) -> Tensor:
            return through(super().__getitem__(name))

    kept: dict[str, Tensor] = {}
    cut = weights.shortened(1)
    decoder.forward(cut.config, Through(cut, torch.bfloat16), ids, lambda stage, _, value: kept.update({stage: value}))
    return kept["output"]


def ulp_of(value: float) -> float:
    """Of bf16, at that value."""
    return 2.0 ** (torch.frexp(torch.tensor(value)).exponent.item() - 8)


def b2(short: bool) -> Found:
    s = size(short)
    by_chain, by_rounding, at_logits, turned = [], [], [], []
    count = changed = gone = 0
    for model in s.models:
        weights, passages = read(model, s.passages, s.tokens)
        count, changed, gone = (a + b for a, b in zip((count, changed, gone), lost(weights)[:3], strict=True))
        for ids in passages:
            off = output(weights, ids, chained).double() - output(weights, ids, lambda w: w).double()
            by_chain.append(off.abs().max().item())
            for how in (OP_BY_OP, JIT):
                found = tallies(weights, torch.bfloat16, how, [ids], ("output", "logits"))
                by_rounding.append(found[WHOLE, 0, "output"].figures["max_abs"])
                at_logits.append(found[WHOLE, weights.config.num_layers, "logits"].figures["max_abs"])
        names = [f"model.layers.{n}.self_attn.q_proj.weight" for n in range(weights.config.num_layers)]
        shape = weights.config.shapes()[names[0]]
        if shape[0] == shape[1]:
            turned += [(w - w.T).abs().max().item() for w in (weights.read(name).float() for name in names)]
    rounding_makes_logits = max(at_logits) >= LOGITS[0]
    verdict = Judged.UNDECIDED
    if max(by_chain) < OUTPUT / 2 and rounding_makes_logits:
        verdict = Judged.OTHERWISE
    elif max(by_chain) >= OUTPUT / 2 and max(by_rounding) < OUTPUT / 2:
        verdict = Judged.REPRODUCED
    grids = tuple(ulp_of(value) for value in (32.0, 4.0))
    return Found(
        verdict,
        f"the chain changes {changed:,} of {count:,} weights ({gone:,} of them to 0 or infinity) and layer 0's "
        f"attention output by at most {max(by_chain):.2g}; bf16's rounding alone makes up to {max(by_rounding):.2g} "
        f"there and {min(at_logits):.2g} to {max(at_logits):.2g} at the logits; W and its transpose differ by "
        f"{min(turned):.2g} to {max(turned):.2g} in q_proj, by layer; one bf16 ulp is {grids[0]} from 32 and "
        f"{grids[1]} from 4",
        "every weight through float16, float32 and bf16, and layer 0 with what came out; the same bf16 weights in JAX "
        "and in PyTorch, end to end; q_proj, where it is square, against its transpose",
        f"{said_of(s)}; not Qwen2.5-7B's own weights",
        (
            Figure("layer 0's attention output", "float16 chain", by_chain, (OUTPUT,)),
            Figure("layer 0's attention output", "rounding to bf16", by_rounding, (OUTPUT,)),
            Figure("logits", "rounding to bf16", at_logits, LOGITS),
            Figure("q_proj, same shape, other values", "W against its transpose, a layer", turned, (0.558,)),
            Figure("Q after the weights were equal", "one bf16 ulp in [32, 64)", [grids[0]], (0.25,)),
            Figure("K after the weights were equal", "one bf16 ulp in [4, 8)", [grids[1]], (0.03125,)),
        ),
        DECIDES,
    )


# ---------------------------------------------------------------- B3


def b3(short: bool) -> Found:
    s, limit = size(short), 1e-6
    made: dict[str, list[float]] = {"bf16": [], "fp32": [], "fp64": [], "fp64, PyTorch's angles": []}
    ulp = 0.0
    for model in s.models:
        weights, passages = read(model, s.passages, s.tokens)
        for name, found in made.items():
            dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(name, torch.float64)
            how = GIVEN_ANGLES if "angles" in name else OP_BY_OP
            with fp64(dtype):
                for ids in passages:
                    tally = tallies(weights, dtype, how, [ids], ("logits",))[WHOLE, weights.config.num_layers, "logits"]
                    found.append(tally.figures["max_abs"])
                    ulp = max(ulp, ulp_of(tally.figures["largest"]) * 2.0**-16)
    reached = {name: max(found) <= limit for name, found in made.items()}
    verdict = Judged.NOT_REPRODUCED
    if reached["bf16"] or reached["fp32"]:
        verdict = Judged.REPRODUCED
    elif any(reached.values()):
        verdict = Judged.OTHERWISE
    return Found(
        verdict,
        "largest difference of a logit: "
        + "; ".join(f"{name} {max(found):.2g}" for name, found in made.items())
        + f"; one fp32 ulp of the largest logit is {ulp:.2g}",
        "logits of JAX and PyTorch, the same weights, end to end, op by op",
        f"{said_of(s)}; not Qwen2.5-7B's own weights",
        tuple(Figure("logits", name, found, (limit,)) for name, found in made.items()),
        DECIDES if verdict == Judged.UNDECIDED else "",
    )


MEASURES: dict[str, Callable[[bool], Found]] = {"B1": b1, "B2": b2, "B3": b3}
