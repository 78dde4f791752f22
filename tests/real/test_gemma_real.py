"""Gemma 3 270M, a real model with q and k norms: run by `make test-real`, which fetches it first."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny_models import reference_plan

import castpoint.harness.__main__ as cli
from castpoint.harness.accuracy.k_norms import add_k_norms
from castpoint.harness.model.attach import attached, decoder_layers, fitted, layer_problem
from castpoint.harness.model.fetch import KNOWN, MODELS, check_hash, fetch
from castpoint.harness.model.k_norms import entering
from castpoint.harness.model.language_model import LanguageModel, load
from castpoint.harness.model.passes import Pass, forward, greedy, k_norm_max
from castpoint.harness.model.study import PASSAGES, parting, read_prompts, token_errors
from castpoint.harness.model.yardsticks import in_precision
from castpoint.harness.problems.checkpoint import open_checkpoint
from castpoint.harness.runs.records import Records
from castpoint.variants.backends import run
from castpoint.variants.catalogue import plan_named
from castpoint.variants.envelope import envelope, outside
from castpoint.variants.spec import truth

NAME = "gemma-3-270m"
GGUF = MODELS / NAME / KNOWN[NAME].file
PASSAGE = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, "
    "it was the epoch of belief, it was the epoch of"
)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load(str(fetch(NAME)))


@pytest.fixture(scope="module")
def ids(lm: LanguageModel) -> list[int]:
    return lm.encode(PASSAGE)[:32]


@pytest.fixture(scope="module")
def own(lm: LanguageModel, ids: list[int]) -> Pass:
    """What the untouched model computes."""
    return forward(lm.model, ids)


@pytest.fixture(scope="module")
def exact(lm: LanguageModel, ids: list[int]) -> Pass:
    with in_precision(lm.model, torch.float64):
        return forward(lm.model, ids)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def made_by(lm: LanguageModel, ids: list[int], plan: str, backend: str = "eager") -> Pass:
    with attached(lm.model, plan_named(plan), backend):
        return forward(lm.model, ids)


def test_the_file_is_the_pinned_one() -> None:
    check_hash(GGUF, KNOWN[NAME].sha256)
    with pytest.raises(ValueError, match="model.safetensors has the SHA-256"):
        check_hash(GGUF.with_name("model.safetensors"), KNOWN[NAME].sha256)


def test_it_is_gemma(lm: LanguageModel, ids: list[int]) -> None:
    c = lm.config
    assert (c.model_type, c.num_hidden_layers, c.hidden_size, c.head_dim) == ("gemma3_text", 18, 640, 256)
    assert (c.num_attention_heads, c.num_key_value_heads, c.rms_norm_eps) == (4, 1, 1e-6)
    assert lm.weights == "GGUF, dequantised to bf16" and {p.dtype for p in lm.model.parameters()} == {torch.bfloat16}
    assert len(ids) == 32 and ids[0] == c.bos_token_id and PASSAGE.startswith(lm.tokenizer.decode(ids[1:]))


def test_every_passage_has_as_many_tokens_as_a_study_reads(lm: LanguageModel) -> None:
    assert all(len(lm.encode(passage)) >= cli.MODEL_TOKENS for passage in read_prompts(PASSAGES))


def test_the_largest_k_norm_weight_is_in_layer_11(lm: LanguageModel) -> None:
    """30.0: stored as w - 1 it is 29, and the factor applied is 1 + w."""
    largest = [k_norm_max(layer) for layer in decoder_layers(lm.model)]
    assert max(largest) == largest[11] and 29.5 < largest[11] < 30.5
    stored = decoder_layers(lm.model)[11].self_attn.k_norm.weight.float()
    assert (stored.abs().max() + 1).item() == pytest.approx(largest[11])


def test_where_k_is_weighted_most_q_is_weighted_little(lm: LanguageModel) -> None:
    """Why its largest K-norm weights carry so little of the logits' error: in every layer q's weight there is among the
    smaller quarter of its own, and ranks run against each other."""
    for layer in decoder_layers(lm.model):
        q, k = (1 + norm.weight.double() for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm))
        assert (q.abs() < q[k.abs().argmax()].abs()).double().mean() < 0.25
        assert (
            torch.corrcoef(torch.stack([q.abs().argsort().argsort(), k.abs().argsort().argsort()]).double())[0, 1] < 0
        )


def test_the_largest_k_norm_weight_matters_in_layer_11_alone(lm: LanguageModel, ids: list[int], tmp_path: Path) -> None:
    """Without it the logits' error stays within a tenth in every other layer of these."""
    records = Records(tmp_path, {"model": lm.name}, {})
    for at, x in enumerate(entering(lm, ids)):
        if at in (2, 5, 10, 11):
            problem = layer_problem(decoder_layers(lm.model)[at], lm.config, x)
            add_k_norms(records, problem.replace(layer=at), 0)
    frame = pd.DataFrame(records.rows("k_norms")).query("q_norm == 'own'")
    error = frame.astype({"logit_rms_error": float}).pivot(index="layer", columns="k_norm", values="logit_rms_error")
    share = frame[frame["k_norm"] == "own"].set_index("layer")["channel_share"].astype(float)
    assert share["11"] > 0.1 > share.drop("11").max()
    assert (error["without the largest"] / error["own"]).drop("11").between(0.9, 1.1).all()
    assert error.loc["11", "largest alone"] > 1.5 * error.loc["11", "near 1"]


@pytest.mark.parametrize("layer", [0, 11])
def test_converted_weights_are_those_of_the_gguf_file(lm: LanguageModel, layer: int) -> None:
    """Read by two ways that share no code: transformers' and problems.checkpoint's."""
    tensors = open_checkpoint(str(GGUF)).layer(layer)
    problem = layer_problem(decoder_layers(lm.model)[layer], lm.config, torch.zeros(1, 640, dtype=torch.bfloat16))
    assert set(tensors) == {"norm_weight", "qkv_weight", "q_norm_weight", "k_norm_weight"}
    for name, tensor in tensors.items():
        assert torch.equal(tensor, getattr(problem, name)), name


def test_it_speaks_english(lm: LanguageModel, ids: list[int], own: Pass) -> None:
    """A wrong conversion (norms off by one, heads permuted) says nothing sensible: the famous passage is likely."""
    log_p = own.log_p
    nll = -log_p[:-1].gather(1, torch.tensor(ids[1:])[:, None]).mean().item()
    assert nll < 2.0, nll


def test_the_gemma_plan_says_what_the_model_says(lm: LanguageModel, ids: list[int], own: Pass) -> None:
    made = made_by(lm, ids, "gemma")
    assert torch.equal(made.logits, own.logits)
    for name in ("q", "k", "hidden"):
        layers = zip(getattr(made, name), getattr(own, name), strict=True)
        assert all(torch.equal(a, b) for a, b in layers), name
    assert fitted(plan_named("one-rounding"), "gemma3_text") == reference_plan("gemma3_text")


def test_one_plus_w_in_bf16_says_something_else(lm: LanguageModel, ids: list[int], own: Pass) -> None:
    made = made_by(lm, ids, "gemma-bf16-offset")
    assert not torch.equal(made.k[0], own.k[0]) and (made.logits != own.logits).double().mean() > 0.5
    row, _ = token_errors(made, own, ids)
    assert 0 < row["kl_mean"] < 0.1  # it is a rounding, no other model


def test_k_lies_in_the_envelope_of_the_plan(lm: LanguageModel, ids: list[int], own: Pass) -> None:
    """The untouched model's K of layer 11, of the stream that enters it; 1 + w in bf16 does not explain it."""
    problem = layer_problem(decoder_layers(lm.model)[11], lm.config, own.hidden[10])
    assert not outside(own.k[11], envelope(plan_named("gemma"), problem)["k"]).any()
    assert outside(own.k[11], envelope(plan_named("gemma-bf16-offset"), problem)["k"]).any()


def test_float64_and_float32_agree(lm: LanguageModel, ids: list[int], own: Pass, exact: Pass) -> None:
    with in_precision(lm.model, torch.float32):
        single = forward(lm.model, ids)
    for a, b in zip([*single.hidden, *single.k, single.logits], [*exact.hidden, *exact.k, exact.logits], strict=True):
        assert 0 < relative(a, b) < 1e-5
    assert 1e-3 < relative(own.logits, exact.logits) < 0.1
    assert torch.equal(forward(lm.model, ids).logits, own.logits), "float32 was not undone"


def test_keeping_more_is_nearer_to_the_truth_in_k(lm: LanguageModel, own: Pass, exact: Pass) -> None:
    """One layer's K from the same stream, so that no other layer has a say."""
    layer = decoder_layers(lm.model)[11]
    problem = layer_problem(layer, lm.config, own.hidden[10])
    errors = {}
    with torch.no_grad():
        for name in ("gemma", "fp32", "truncating"):
            plan = fitted(plan_named(name), "gemma3_text")
            errors[name] = relative(run(plan, problem, "spec")[1], truth(problem).k)
    assert errors["fp32"] < errors["gemma"] < errors["truncating"]


def test_greedy_is_deterministic_and_goes_on_in_the_form_of_the_passage(
    lm: LanguageModel, own: Pass, ids: list[int]
) -> None:
    """Four tokens, because bf16 on a CPU without bf16 instructions takes over a second for each."""
    continuation = greedy(lm.model, ids, 4)
    with attached(lm.model, plan_named("gemma")):
        assert greedy(lm.model, ids, 4) == continuation
    text = lm.tokenizer.decode([*ids[1:], *continuation])
    assert text.count("it was the age of ") == 3, text  # two of them were read, the third is what it says
    assert parting(own.logits, 32, continuation[:1]) == 1
