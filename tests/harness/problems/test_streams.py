"""Residual streams of published sizes: what the table says, and what a problem has of it."""

import dataclasses
from statistics import fmean

import pytest
import torch

from castpoint.harness.problems.drawn import synthetic_problem
from castpoint.harness.problems.geometry import geometry_named
from castpoint.harness.problems.streams import MASSIVE, published_sizes, with_published_stream
from castpoint.harness.runs.errors import UserError
from castpoint.variants.problem import Problem
from castpoint.variants.spec import truth

BF16 = 2.0**-8  # what storing a value in bf16 can move it by, at most


def published(layer: int, tokens: int = 64, model: str = "qwen3-1.7b") -> Problem:
    return with_published_stream(synthetic_problem(model, layer, tokens), 0)


def test_every_layer_has_its_sizes() -> None:
    assert set(published_sizes()) == {"qwen3-1.7b", "qwen3-8b", "qwen3-30b-a3b", "qwen3-32b", "qwen2.5-7b"}
    for model, layers in published_sizes().items():
        assert len(layers) == geometry_named(model).num_layers
        for sizes in layers:
            assert 0 < sizes.abs_median < sizes.abs_mean < sizes.rms < sizes.max and sizes.min < 0


@pytest.mark.parametrize(
    ("model", "layer", "largest"), [("qwen3-1.7b", 3, 14016), ("qwen3-8b", 7, 17280), ("qwen3-32b", 7, 26624)]
)
def test_massive_tokens_set_in_where_published(model: str, layer: int, largest: float) -> None:
    layers = published_sizes()[model]
    assert [sizes.massive for sizes in layers] == [i >= layer for i in range(len(layers))]
    assert layers[layer].max == largest


def test_about_one_token_a_text_is_massive() -> None:
    """As data/README.md says: what rms has beyond ordinary tokens, whose own is near 2.1 medians, by the squares of the
    largest and the smallest value."""
    sizes, width = published_sizes()["qwen3-1.7b"][3], geometry_named("qwen3-1.7b").hidden_size
    tokens = (sizes.max**2 + sizes.min**2) / (width * (sizes.rms**2 - (2.1 * sizes.abs_median) ** 2))
    assert 2900 < tokens < 3100


@pytest.mark.parametrize("layer", [0, 3, 14, 27])
def test_a_stream_has_the_published_sizes(layer: int) -> None:
    drawn, sizes = synthetic_problem("qwen3-1.7b", layer, 64), published_sizes()["qwen3-1.7b"][layer]
    problem = published(layer)
    first, others = problem.x[0].double(), problem.x[1:].double()
    assert abs(others.abs().median() / sizes.abs_median - 1) < BF16
    assert abs(first.abs().median() / sizes.peak_token_median - 1) < 2 * BF16
    assert abs(first.max() / sizes.max - 1) < BF16 and abs(first.min() / sizes.min - 1) < BF16
    assert (first.abs().max() > MASSIVE * first.abs().median()) == (layer > 0)
    kept = [field.name for field in dataclasses.fields(Problem) if field.name not in ("x", "weights")]
    for name in kept:
        mine, its = getattr(problem, name), getattr(drawn, name)
        assert torch.equal(mine, its) if torch.is_tensor(mine) else mine == its
    assert problem.weights == "random, published stream"
    scale = others.norm() / drawn.x[1:].double().norm()  # ordinary tokens are the drawn ones, by one factor
    assert ((others / (drawn.x[1:].double() * scale)) - 1).abs().max() < 3 * BF16


def test_ordinary_values_spread_as_published() -> None:
    """A figure that the stream does not use: mean over median of |value|, 1.18 for a Gaussian."""
    for model in ("qwen3-1.7b", "qwen2.5-7b"):
        ratios = [sizes.abs_mean / sizes.abs_median for sizes in published_sizes()[model] if sizes.massive]
        size = published(len(published_sizes()[model]) // 2, model=model).x[1:].double().abs()
        assert size.mean() / size.median() == pytest.approx(fmean(ratios), rel=0.05)


def test_k_of_a_massive_token_is_nearly_one_column_of_the_weight() -> None:
    problem = published(3)
    k = problem.split_heads(truth(problem).proj)[1][0].flatten().double()
    channel = problem.x[0].abs().argmax()
    column = problem.split_heads(problem.qkv_weight.T)[1][channel].flatten().double()
    assert torch.cosine_similarity(k, column, dim=0).abs() > 0.99
    other = problem.split_heads(truth(problem).proj)[1][1].flatten().double()
    assert torch.cosine_similarity(other, column, dim=0).abs() < 0.9


def test_few_tokens_and_other_models() -> None:
    assert published(3, 0).tokens == 0
    assert published(3, 1).x.max() == 14016
    with pytest.raises(UserError, match=r"no sizes of qwen3-0\.6b's residual stream: .* has qwen3-1\.7b, qwen3-8b"):
        with_published_stream(synthetic_problem("qwen3-0.6b", 3, 4), 0)
