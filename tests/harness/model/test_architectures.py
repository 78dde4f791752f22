"""Every model type that is taken, against transformers' own modules: the chain of its checkpoint gives the bits of its
q, k and v; attached it says what the model says; a model with experts is studied as any other."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import transformers
from support import random_problem
from tiny_models import IDS, REFERENCE_PLANS, reference_plan, taken, tiny_config, tiny_model
from torch import Tensor, nn

from castpoint.harness.accuracy.amplification import attention_logits
from castpoint.harness.accuracy.k_norms import measures
from castpoint.harness.accuracy.shapley import budget, order_of_sums
from castpoint.harness.model.attach import attached, decoder_layers
from castpoint.harness.model.k_norms import entering
from castpoint.harness.model.language_model import LanguageModel
from castpoint.harness.model.passes import forward
from castpoint.harness.model.study import Text, arms, layer_errors, sweep_model
from castpoint.harness.model.yardsticks import four_bit, in_precision
from castpoint.harness.problems.checkpoint import open_checkpoint
from castpoint.harness.problems.drawn import checkpoint_problem
from castpoint.harness.problems.model_types import MODEL_TYPES
from castpoint.harness.runs.records import Records
from castpoint.variants.backends import run
from castpoint.variants.catalogue import plan_named
from castpoint.variants.problem import Problem
from castpoint.variants.spec import spec, truth

transformers.logging.set_verbosity_error()

EXPERTS = ("dots1", "ernie4_5_moe", "gpt_oss", "granitemoe", "granitemoeshared", "mixtral", "qwen2_moe", "qwen3_moe")


@pytest.fixture(scope="module", params=MODEL_TYPES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return tiny_model(request.param)


def problem_of(folder: Path, layer: int, x: Tensor) -> Problem:
    return checkpoint_problem(str(folder), "tiny", layer, 1, 0).replace(x=x)


def test_a_checkpoints_chain_gives_the_modules_bits(model: nn.Module, tmp_path: Path) -> None:
    """By the plan by which transformers runs it: RMSNorm, bias, head norm, w - 1, eps, all of them or none."""
    model.save_pretrained(tmp_path)
    kept, plan = taken(model), reference_plan(model.config.model_type)
    for layer in (0, 2):
        problem = problem_of(tmp_path, layer, kept[layer, "x"])
        for name, value in zip("qkv", run(plan, problem, "eager"), strict=True):
            assert torch.equal(kept[layer, name].reshape(value.shape), value), (layer, name)
    state = model.state_dict()
    assert (problem.bias is not None) == ("model.layers.0.self_attn.k_proj.bias" in state)
    assert (problem.k_norm_weight is not None) == ("model.layers.0.self_attn.k_norm.weight" in state)


def test_the_logits_scale_is_that_of_the_models_attention(model: nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    scaling = decoder_layers(model)[0].self_attn.scaling
    found = problem_of(tmp_path, 0, torch.ones(1, 64).bfloat16()).logit_scale
    usual = decoder_layers(model)[0].self_attn.head_dim ** -0.5
    assert math.isclose(usual if found is None else found, scaling)
    assert (found is not None) == bool(MODEL_TYPES[model.config.model_type].multiplier)


def test_a_config_may_leave_out_what_transformers_fills_in(model: nn.Module) -> None:
    kind = model.config.model_type
    config = transformers.AutoConfig.for_model(kind)
    defaults = MODEL_TYPES[kind].defaults
    assert {key: getattr(config, key) for key in defaults} == defaults
    own = {"num_key_value_heads": config.num_attention_heads, "rms_norm_eps": 1e-6, "attention_bias": False}
    for key, value in (own | {"use_bias": False, "qkv_bias": False}).items():
        assert key in defaults or getattr(config, key, value) == value, key
    usual = config.hidden_size // config.num_attention_heads
    assert "head_dim" in defaults or (getattr(config, "head_dim", None) or usual) == usual


# ---------------------------------------------------------------- in a whole model


def test_attached_its_own_plan_says_what_it_says(model: nn.Module) -> None:
    own = forward(model, IDS)
    with attached(model, reference_plan(model.config.model_type), "eager"):
        made = forward(model, IDS)
    assert torch.equal(made.logits, own.logits)
    with attached(model, plan_named("truncating"), "eager"):
        assert not torch.equal(forward(model, IDS).logits, own.logits)


def test_the_truth_is_closer_than_bf16(model: nn.Module) -> None:
    """float64 runs, its experts too, and leaves every bit of the model as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = forward(model, IDS).logits.double()
    with in_precision(model, torch.float64):
        truth = forward(model, IDS).logits
    with in_precision(model, torch.float32):
        wide = forward(model, IDS).logits.double()
    assert truth.dtype == torch.float64
    assert (wide - truth).abs().max() < 0.01 * (own - truth).abs().max()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", EXPERTS)
def test_four_bits_reach_every_expert(kind: str) -> None:
    """In groups of 32 along the inputs of a row: doubling an input's column doubles it, or its group's scale moves."""
    model = copy.deepcopy(tiny_model(kind))
    experts = decoder_layers(model)[2].mlp.experts if hasattr(decoder_layers(model)[2], "mlp") else None
    experts = experts or decoder_layers(model)[2].block_sparse_moe.experts
    before = {name: weight.clone() for name, weight in experts.named_parameters() if weight.ndim == 3}
    assert len(before) == 2
    with four_bit(model)():
        for name, weight in before.items():
            made = dict(experts.named_parameters())[name].detach()
            rows = (made.mT if kind == "gpt_oss" else made).float()
            distinct = max(len(group.unique()) for group in rows.reshape(-1, 32)[:64])
            assert not torch.equal(made, weight) and distinct <= 16, name
    assert all(torch.equal(dict(experts.named_parameters())[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "granite"])
def test_such_a_model_is_studied(kind: str, tmp_path: Path) -> None:
    lm = LanguageModel(tiny_model(kind), None, "tiny", "drawn")
    records = Records(tmp_path, {"model": "tiny"}, {"device": "cpu"})
    sweep_model(lm, ["hf", "truncating"], "eager", [Text("passages", 0, IDS[:24])], records)
    rows = records.rows("model_tokens")
    assert rows and all(row["status"] == "ok" for row in rows), rows
    assert {row["arm"] for row in rows} == {arm.name for arm in arms(lm, ["hf", "truncating"], "eager")}


# ---------------------------------------------------------------- Granite's multipliers


def test_the_stream_that_enters_the_first_layer_is_the_models(model: nn.Module) -> None:
    """Embeddings times embedding_multiplier, or sqrt(D): what the first norm reads."""
    lm = LanguageModel(model, None, "tiny", "drawn")
    assert torch.equal(entering(lm, IDS)[0], taken(model)[0, "x"])


def test_attention_logits_are_those_of_granites_attention() -> None:
    """q.k as its eager attention multiplies it, of one token after another, without positions."""
    model = tiny_model("granite")
    own = forward(model, IDS)
    assert own.logit_scale == model.config.attention_multiplier == 0.05
    logits = attention_logits(own.q[0], own.k[0], own.logit_scale)
    by_hand = own.q[0][7, 3].double() @ own.k[0][5, 1].double() * 0.05  # head 3 of 4 reads key head 1 of 2
    assert torch.isclose(logits[3, 7, 5], by_hand)
    with attached(model, plan_named("truncating"), "eager"):
        made = forward(model, IDS)
    apart = layer_errors(made, own, 0)["attention_logit_rms"]
    usual = [copy.copy(side) for side in (made, own)]
    for side in usual:
        object.__setattr__(side, "logit_scale", None)
    assert apart == pytest.approx(layer_errors(*usual, 0)["attention_logit_rms"] * 0.05 * 32**0.5)


def test_every_measure_of_a_layer_takes_that_scale() -> None:
    """Logits 4 times smaller have errors 4 times smaller, in the budget and beside K norms; all else stays."""
    problem = random_problem(tokens=12)
    small = problem.replace(logit_scale=problem.head_dim**-0.5 / 4)
    plan = plan_named("hf")
    whole, quarter = (budget(plan, each)["logit_ms"] for each in (problem, small))
    assert quarter.total == pytest.approx(whole.total / 16)
    assert all(quarter.parts[name] == pytest.approx(part / 16) for name, part in whole.parts.items())
    (a, b), (c, d) = (order_of_sums(plan, each, "spec")["logit_ms"] for each in (problem, small))
    assert (c, d) == pytest.approx((a / 16, b / 16))
    own, fewer = (measures(each, spec(plan, each), truth(each), 0) for each in (problem, small))
    scaled = {"logit_rms_error", "logit_terms"}
    for name, value in own.items():
        if name not in ("softmax_tv_mean", "top_key_flips"):
            assert fewer[name] == pytest.approx(value / 4 if name in scaled else value), name


def test_a_gemma_with_another_scalar(tmp_path: Path) -> None:
    """Gemma 3 27B divides q.k by sqrt(168), and its heads have 128 channels."""
    config = tiny_config("gemma3_text", 1, query_pre_attn_scalar=100)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert open_checkpoint(str(tmp_path)).geometry.logit_scale == 0.1


def test_the_first_four_are_those_of_other_tests() -> None:
    assert set(REFERENCE_PLANS) < set(MODEL_TYPES)
