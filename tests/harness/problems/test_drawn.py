"""Problems: published statistics are met, real weights load, wrong inputs are refused."""

import math

import pytest
import torch

from castpoint.harness.problems.drawn import (
    heavy_tailed,
    k_norm_statistics,
    layer_statistics,
    residual_std,
    residual_stream,
    synthetic_problem,
)
from castpoint.harness.problems.geometry import GEOMETRIES, geometry_named
from castpoint.harness.runs.errors import UserError
from castpoint.variants.problem import Problem

BF16_RELATIVE = 2.0**-8  # what storing a statistic's weights in bf16 can move it by, at most


@pytest.mark.parametrize("layer", range(28))
def test_calibrated_weights_have_the_published_statistics(layer: int) -> None:
    problem = synthetic_problem("qwen3-0.6b", layer, tokens=128)
    row = layer_statistics()[layer]
    mean, std, maximum = k_norm_statistics(layer)
    k_norm = problem.k_norm_weight.double()
    assert abs(k_norm.mean() / mean - 1) < BF16_RELATIVE
    assert abs(k_norm.std(correction=0) / std - 1) < BF16_RELATIVE
    assert abs(k_norm.max() / maximum - 1) < BF16_RELATIVE
    for weight, name in ((problem.norm_weight, "input_layernorm"), (problem.q_norm_weight, "q_norm")):
        assert abs(weight.double().mean() / row[f"{name}_mean"] - 1) < BF16_RELATIVE
        assert abs(weight.double().std(correction=0) / row[f"{name}_std"] - 1) < BF16_RELATIVE
    for projection, name in zip(problem.qkv_weight.split([2048, 1024, 1024]), "qkv", strict=True):
        sampling = 6 / math.sqrt(2 * projection.numel())  # six standard errors of a deviation
        assert abs(projection.double().std() / row[f"{name}_proj_std"] - 1) < sampling + BF16_RELATIVE


def test_published_maxima_and_deviations_are_taken_as_they_are() -> None:
    assert [k_norm_statistics(layer)[2] for layer in (0, 1, 2, 4, 5)] == [96.5, 44.5, 44.0, 41.75, 34.0]
    assert [k_norm_statistics(layer)[1] for layer in (0, 1, 2)] == [9.13, 3.98, 3.94]
    assert synthetic_problem("qwen3-0.6b", 0, 1).k_norm_weight.max().item() == 96.5


def test_the_rule_for_unpublished_maxima_meets_a_published_figure_it_does_not_use() -> None:
    assert sum(k_norm_statistics(layer)[2] > 10 for layer in range(28)) == 16


def test_k_norm_weights_are_heavy_tailed_not_gaussian() -> None:
    weight = synthetic_problem("qwen3-0.6b", 0, 1).k_norm_weight.double()
    standard = (weight - weight.mean()) / weight.std()
    assert standard.pow(4).mean() > 30  # 3 for a Gaussian
    assert weight.sort().values[-2] > weight.mean() + weight.std()  # not one outlier on a flat rest


def test_residual_streams_have_the_published_deviations_and_massive_channels() -> None:
    assert [residual_std(layer) for layer in (0, 1, 25, 26)] == [0.29, 0.64, 26, 30]
    growth = [residual_std(layer + 1) / residual_std(layer) for layer in range(1, 27)]
    assert all(1.1 < g < 1.25 for g in growth)
    for layer in (0, 1, 8, 27):
        x = residual_stream(128, 1024, layer, torch.Generator().manual_seed(layer)).double()
        assert abs(x[1:].std() / residual_std(layer) - 1) < 0.02
        channels = x[1:].square().mean(0).sqrt()
        ratio = (channels.max() / channels.median()).item()
        assert ratio > 10 if layer else ratio < 3
        assert (x[0].abs().max() > 1000 * residual_std(layer)) == (layer >= 2)


def test_heavy_tailed_meets_its_statistics_exactly() -> None:
    values = heavy_tailed(128, 2.0, 5.0, 50.0, torch.Generator().manual_seed(0))
    assert values.max() == 50 and (values > 0).all()
    assert abs(values.mean() - 2) < 1e-9 and abs(values.std(correction=0) - 5) < 1e-6


@pytest.mark.parametrize("model", GEOMETRIES)
def test_every_model_by_name(model: str) -> None:
    g = geometry_named(model)
    if g.rows * g.hidden_size > 3e7:
        assert g.hidden_size % 128 == 0 and g.num_q_heads % g.num_kv_heads == 0
        return
    problem = synthetic_problem(model, g.num_layers - 1, 2)
    assert (problem.hidden_size, problem.num_q_heads, problem.num_kv_heads) == (
        g.hidden_size,
        g.num_q_heads,
        g.num_kv_heads,
    )
    assert problem.head_dim == g.head_dim and problem.has_head_norm == g.head_norm
    assert (problem.bias is not None) == g.bias and problem.weight_offset == g.weight_offset
    assert problem.weights == ("calibrated" if model == "qwen3-0.6b" else "random")


def test_seeds_and_weights_stored_as_an_offset() -> None:
    one, same, other = (synthetic_problem("qwen3-0.6b", 3, 4, seed) for seed in (0, 0, 1))
    assert torch.equal(one.qkv_weight, same.qkv_weight) and not torch.equal(one.qkv_weight, other.qkv_weight)
    offset = synthetic_problem("qwen3-0.6b", 3, 4, weight_offset=True)
    applied = 1 + offset.k_norm_weight.double()
    assert ((applied / one.k_norm_weight.double() - 1).abs() < 2 * BF16_RELATIVE).all()
    assert "w-1" in offset.weights


def small(**changes: object) -> Problem:
    inputs = {
        "x": torch.randn(3, 32).bfloat16(),
        "norm_weight": torch.ones(32).bfloat16(),
        "qkv_weight": torch.randn(4 * 16, 32).bfloat16(),
        "num_q_heads": 2,
        "num_kv_heads": 1,
        "q_norm_weight": torch.ones(16).bfloat16(),
        "k_norm_weight": torch.ones(16).bfloat16(),
    }
    return Problem(**(inputs | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.randn(3).bfloat16()}, "x must be [tokens, hidden size], not [3]"),
        ({"x": torch.empty(3, 0).bfloat16()}, "x must be [tokens, hidden size], not [3, 0]"),
        ({"x": torch.randn(3, 32)}, "x must be torch.bfloat16, not torch.float32"),
        ({"x": torch.randn(3, 31).bfloat16()}, "qkv_weight must be [rows, 31]"),
        ({"norm_weight": torch.ones(31).bfloat16()}, "norm_weight must have shape [32], not [31]"),
        ({"num_q_heads": 3, "num_kv_heads": 2}, "do not divide into groups"),
        ({"num_q_heads": 0}, "num_q_heads must be a positive multiple"),
        ({"num_q_heads": 3}, "64 rows, which do not divide into 5 heads"),
        ({"qkv_weight": torch.empty(0, 32).bfloat16()}, "0 rows"),
        ({"q_norm_weight": None}, "given together, or neither"),
        ({"k_norm_weight": torch.ones(8).bfloat16()}, "k_norm_weight must have shape [16], not [8]"),
        ({"bias": torch.ones(16).bfloat16()}, "bias must have shape [64], not [16]"),
        ({"residual": torch.ones(2, 32).bfloat16()}, "residual must have shape [3, 32], not [2, 32]"),
        ({"eps": 0.0}, "eps must be a positive number"),
        ({"eps": -1e-6}, "eps must be a positive number"),
        ({"eps": math.nan}, "eps must be a positive number"),
        ({"norm_weight": torch.full((32,), math.nan).bfloat16()}, "norm_weight holds NaN or infinity"),
        ({"qkv_weight": torch.full((64, 32), math.inf).bfloat16()}, "qkv_weight holds NaN or infinity"),
        ({"bias": torch.ones(64, device="meta").bfloat16()}, "bias is on meta but x is on cpu"),
    ],
)
def test_wrong_inputs_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError) as error:
        small(**changes)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_nan_in_x_is_allowed_and_no_tokens_are_too() -> None:
    assert small(x=torch.full((3, 32), math.nan).bfloat16()).tokens == 3
    assert small(x=torch.empty(0, 32).bfloat16()).tokens == 0


def test_unknown_model_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'qwen3-0.6b'"):
        geometry_named("qwen3-0.6")
    with pytest.raises(ValueError, match="layers 0 to 27, not 28"):
        synthetic_problem("qwen3-0.6b", 28)
