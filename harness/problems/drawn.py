"""Problems to measure on: calibrated or random weights, and checkpoints.

Calibrated means: drawn so that every tensor has the published statistics of that layer of Qwen3-0.6B
(data/README.md). It is not the checkpoint: individual weights, and how they correlate, are not its own.

Every machine draws the same bits. In fp32 PyTorch draws other normal values where there is AVX2, and adds in another
order on another number of threads. So all is drawn and scaled in float64, sums are made of elementwise additions, and
the one rounding to bf16 comes last. Another libm may move a float64 value by its last bit, which moves a bf16 value
only where a tie lies between the two: one value in about 2^44, some 3e-7 for a layer of Qwen3-0.6B.
"""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from statistics import NormalDist, fmean

import torch
from torch import Tensor

from castpoint.harness.problems.geometry import Geometry, geometry_named
from castpoint.harness.runs.errors import UserError
from castpoint.harness.runs.records import Settings
from castpoint.variants.catalogue import plan_named
from castpoint.variants.problem import Problem

DATA = Path(__file__).parent / "data"
CALIBRATED_MODEL = "qwen3-0.6b"
GROWTH = 1.2  # of the residual stream, a layer; published
# Largest channel rms over the median channel's, and the first token's largest value over the other tokens' rms, in
# the residual stream entering layer 8 of Qwen2.5-Coder-0.5B (a public sample of 64 tokens of Python source).
MASSIVE_CHANNELS = (16.4, 11.6, 11.6, 8.2)
MASSIVE_FIRST_TOKEN = 1800.0
FIRST = 1000  # position of the first token: angles of many turns
THETA = 1e6  # rope_theta of Qwen3 and Qwen2.5, and of Gemma 3's global layers


def standard_normal(rng: torch.Generator, *shape: int) -> Tensor:
    """[shape] float64, mean 0, deviation 1."""
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def ordered_sum(values: Tensor) -> Tensor:
    """The sum of all elements, [] in their type: halves added to halves, an order that no machine changes."""
    values = values.flatten()
    while (half := len(values) // 2) > 0:
        values = torch.cat([values[:half] + values[half : 2 * half], values[2 * half :]])
    return values.sum()


def digest(tensors: Iterable[Tensor]) -> str:
    """Twelve hexadecimal digits that any bit of these tensors changes."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]


@cache
def layer_statistics() -> list[dict[str, float | None]]:
    """Published statistics of Qwen3-0.6B, a dict for each of the 28 layers; None where nothing was published."""
    with open(DATA / "qwen3-0.6b-layer-statistics.csv", newline="") as file:
        return [{k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(file)]


def k_norm_statistics(layer: int) -> tuple[float, float, float]:
    """Mean, standard deviation and maximum of the K-norm weights of a layer of Qwen3-0.6B.

    The mean is the derivative's. Maximum and deviation are Qwen3-0.6B's own where published. Elsewhere the
    deviation is the derivative's, and the maximum stands as far out as in the layers where both are published:
    on average 0.94 of the farthest that one channel of 128 can stand at that deviation. That rule is checked by
    a figure it does not use: it puts 16 of 28 layers above 10, as published.
    """
    row = layer_statistics()[layer]
    mean, std, maximum = row["k_norm_mean"], row["qwen3_k_norm_std"], row["qwen3_k_norm_max"]
    farthest = math.sqrt(geometry_named(CALIBRATED_MODEL).head_dim - 1)
    both = [r for r in layer_statistics() if r["qwen3_k_norm_std"]]
    share = fmean((r["qwen3_k_norm_max"] - r["k_norm_mean"]) / (r["qwen3_k_norm_std"] * farthest) for r in both)
    if std is None:
        std = row["k_norm_std"] if maximum is None else (maximum - mean) / (share * farthest)
    if maximum is None:
        maximum = mean + share * farthest * std
    return mean, std, maximum


def residual_std(layer: int) -> float:
    """Standard deviation of Qwen3-0.6B's residual stream at that layer's input: published, or geometric between."""
    with open(DATA / "qwen3-0.6b-residual-stream.csv", newline="") as file:
        known = {int(row["layer"]): float(row["std"]) for row in csv.DictReader(file)}
    below = max(at for at in known if at <= layer)
    above = min((at for at in known if at > layer), default=None)
    growth = GROWTH if above is None else (known[above] / known[below]) ** (1 / (above - below))
    return known[below] * growth ** (layer - below)


def heavy_tailed(size: int, mean: float, std: float, maximum: float | None, rng: torch.Generator) -> Tensor:
    """[size] float64, shuffled: positive weights of exactly that mean, population deviation and maximum.

    The quantiles of a lognormal distribution, whose width is solved for; the maximum, if given, is one outlier on top.
    """
    rest = size
    if maximum is not None:
        rest = size - 1
        total, squares = size * mean - maximum, size * (std**2 + mean**2) - maximum**2
        mean, std = total / rest, math.sqrt(squares / rest - (total / rest) ** 2)
    z = torch.tensor([NormalDist().inv_cdf((i + 0.5) / rest) for i in range(rest)], dtype=torch.float64)
    low, high = 0.0, 10.0
    for _ in range(60):  # the relative deviation of exp(sigma z) grows with sigma
        sigma = (low + high) / 2
        values = (sigma * z).exp()
        average = ordered_sum(values) / rest
        spread = (ordered_sum((values - average).square()) / rest).sqrt()
        low, high = (sigma, high) if spread / average < std / mean else (low, sigma)
    values = values * (mean / (ordered_sum(values) / rest))
    if maximum is not None:
        values = torch.cat([values, torch.tensor([maximum], dtype=torch.float64)])
    return values[torch.randperm(size, generator=rng)]


def ordinary_tokens(tokens: int, hidden_size: int, layer: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A stream [tokens, hidden_size] float64 of no particular size, without massive tokens, and its massive channels.

    Channel scales are lognormal (width 0.2 at the embedding, 0.5 later, as in Qwen2.5-Coder-0.5B). From layer 1
    of Qwen3-0.6B on the four massive channels keep their sign over all tokens.
    """
    scale = (standard_normal(rng, hidden_size) * (0.5 if layer else 0.2)).exp()
    stream = standard_normal(rng, tokens, hidden_size) * scale
    massive = torch.randperm(hidden_size, generator=rng)[: len(MASSIVE_CHANNELS)]
    if layer >= 1:
        level = torch.tensor(MASSIVE_CHANNELS, dtype=torch.float64) * scale.median()
        stream[:, massive] = level * (1 + 0.1 * standard_normal(rng, tokens, len(massive)))
    return stream, massive


def residual_stream(tokens: int, hidden_size: int, layer: int, rng: torch.Generator) -> Tensor:
    """[tokens, hidden_size] bf16: ordinary tokens of Qwen3-0.6B's published deviation at that layer. From layer 2 on
    the first token carries one massive activation; the published deviation is taken as that of the tokens after it.
    """
    stream, massive = ordinary_tokens(tokens, hidden_size, layer, rng)
    if tokens:
        stream *= residual_std(layer) / (ordered_sum(stream.square()) / stream.numel()).sqrt()
    if layer >= 2:
        stream[:1, massive[0]] = MASSIVE_FIRST_TOKEN * residual_std(layer)
    return stream.to(torch.bfloat16)


def depth(layer: int, g: Geometry) -> int:
    """The layer of Qwen3-0.6B at the same depth."""
    return layer * len(layer_statistics()) // g.num_layers


def seeded(seed: int, layer: int) -> torch.Generator:
    """What draws a layer, its residual stream first."""
    return torch.Generator().manual_seed(seed * 1000 + layer)


def synthetic_problem(
    model: str = CALIBRATED_MODEL,
    layer: int = 0,
    tokens: int = 128,
    seed: int = 0,
    *,
    weight_offset: bool | None = None,
) -> Problem:
    """One layer of a model with drawn weights: `calibrated` for qwen3-0.6b, `random` for every other.

    `random` takes the statistics of the layer of Qwen3-0.6B at the same depth, the projection scaled to keep the
    size of its results. weight_offset: store norm weights as w - 1 (default: as the model does).
    Raises UserError for an unknown model, ValueError for a layer that the model does not have.
    """
    g = geometry_named(model)
    if not 0 <= layer < g.num_layers:
        raise ValueError(f"{model} has layers 0 to {g.num_layers - 1}, not {layer}")
    source = depth(layer, g)
    row = layer_statistics()[source]
    rng = seeded(seed, layer)
    x = residual_stream(tokens, g.hidden_size, source, rng)
    rescale = math.sqrt(geometry_named(CALIBRATED_MODEL).hidden_size / g.hidden_size)
    projections = [
        (standard_normal(rng, rows, g.hidden_size) * (row[f"{name}_proj_std"] * rescale)).to(torch.bfloat16)
        for name, rows in g.projections.items()
    ]
    offset = g.weight_offset if weight_offset is None else weight_offset
    drawn = (g.hidden_size, row["input_layernorm_mean"], row["input_layernorm_std"], None)
    norms = {"norm_weight": heavy_tailed(*drawn, rng)}
    if g.head_norm:
        norms["q_norm_weight"] = heavy_tailed(g.head_dim, row["q_norm_mean"], row["q_norm_std"], None, rng)
        norms["k_norm_weight"] = heavy_tailed(g.head_dim, *k_norm_statistics(source), rng)
    label = "calibrated" if model == CALIBRATED_MODEL else "random"
    if offset != g.weight_offset:
        label += ", stored as w-1" if offset else ", stored as w"
    return Problem(
        x=x,
        qkv_weight=torch.cat(projections),
        bias=_bias(g, rng) if g.bias else None,
        weights=label,
        num_q_heads=g.num_q_heads,
        num_kv_heads=g.num_kv_heads,
        eps=g.eps,
        weight_offset=offset,
        model=model,
        layer=layer,
        **{name: (weight - 1 if offset else weight).to(torch.bfloat16) for name, weight in norms.items()},
    )


def _bias(g: Geometry, rng: torch.Generator) -> Tensor:
    """QKV bias: a few large entries in K, as in Qwen2.5 (up to 145 in layer 0 of Qwen2.5-Coder-0.5B)."""
    bias = standard_normal(rng, g.rows)
    q, k = g.projections["q"], g.projections["k"]
    bias[q : q + k] *= standard_normal(rng, k).abs().mul(2).exp()
    return bias.to(torch.bfloat16)


def checkpoint_problem(source: str, model: str, layer: int, tokens: int, seed: int) -> Problem:
    """One layer of real weights. The residual stream is the file's own where it holds one (`x`), else drawn.

    Raises UserError where the checkpoint cannot be read, does not fit or holds no problem (NaN, a head size that no
    kernel takes); see problems.checkpoint.
    """
    from castpoint.harness.problems.checkpoint import opened

    checkpoint = opened(source, model)
    g, tensors = checkpoint.geometry, checkpoint.layer(layer)
    weights = "checkpoint"
    if "x" in tensors:
        tensors["x"] = tensors["x"][:tokens]
    else:
        weights = "checkpoint, drawn residual stream"
        tensors["x"] = residual_stream(tokens, g.hidden_size, depth(layer, g), seeded(seed, layer))
    words = {"model": model, "layer": layer, "weights": weights}
    heads = {"num_q_heads": g.num_q_heads, "num_kv_heads": g.num_kv_heads}
    try:
        return Problem(**tensors, **heads, eps=g.eps, weight_offset=g.weight_offset, logit_scale=g.logit_scale, **words)
    except ValueError as error:
        raise UserError(f"layer {layer} of {source}: {error}") from error


def problem_at(settings: Settings, layer: int, tokens: int, plan_name: str | None = None) -> Problem:
    """The problem of a layer; drawn norm weights are stored as w - 1 for Gemma's plans (None: as the model does).

    A checkpoint's own residual stream may have fewer tokens. Raises what those two raise.
    """
    s = settings
    if s.checkpoint is not None:
        return checkpoint_problem(s.checkpoint, s.model, layer, tokens, s.seed).to(s.device)
    offset = None if plan_name is None else plan_named(plan_name).weight_offset != "none"
    return synthetic_problem(s.model, layer, tokens, s.seed, weight_offset=offset).to(s.device)


# ---------------------------------------------------------------- positions


def with_positions(problem: Problem) -> Problem:
    """That problem with its tokens at FIRST, FIRST + 1, and so on. Raises ValueError for a head size that the kernels
    do not rotate."""
    return problem.replace(
        positions=torch.arange(FIRST, FIRST + problem.tokens, device=problem.x.device),
        theta=THETA,
        weights=f"{problem.weights}, rotated from position {FIRST}",
    )
