"""Variants in transformers models: the reference plan says what the model says, every other plan something else, in
every layer; behind the context all is as before."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
import transformers
from tiny_models import IDS, REFERENCE_PLANS, assert_untouched, differing, reference_plan, state_of, taken, tiny_model
from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import castpoint.harness.model.attach as attach
from castpoint.harness.model.attach import attached, decoder_layers, fitted, layer_problem
from castpoint.harness.model.passes import forward, greedy, last_of
from castpoint.harness.model.study import parting
from castpoint.variants.backends import run
from castpoint.variants.catalogue import PLANS, plan_named
from castpoint.variants.envelope import envelope, outside

transformers.logging.set_verbosity_error()

# One of every kind of choice: sums, operand, place of rstd, folded weights, truncation.
OTHER_PLANS = ("one-rounding", "separate-head-norm", "fp32", "fp32-tf32", "deferred", "folded", "truncating")


@pytest.fixture(params=REFERENCE_PLANS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return tiny_model(request.param)


def logits(model: nn.Module, ids: list[int] = IDS) -> Tensor:
    return forward(model, ids).logits


# ---------------------------------------------------------------- the same function


@pytest.mark.parametrize("backend", ["eager", "spec"])
def test_the_reference_plan_says_what_the_model_says(model: nn.Module, backend: str) -> None:
    """q, k, v and hidden state of every layer too. `spec` sums in float64, `eager` as this machine does: what differs
    must be explained by order of sums, so both models lie in the plan's envelope in every layer. Measured share that
    differs: 0 by both backends, in all four architectures (oneDNN, x86 without bf16 instructions)."""
    plan = reference_plan(model.config.model_type)
    own = forward(model, IDS)
    assert_explained(model, plan, contextlib.nullcontext())
    assert_explained(model, plan, attached(model, plan, backend))
    with attached(model, plan, backend):
        made = forward(model, IDS)
    first = [differing(getattr(made, name)[0], getattr(own, name)[0]) for name in "qk"]
    if not torch.equal(made.logits, own.logits):
        assert first != [0, 0] or differing(made.hidden[0], own.hidden[0]) == 0, "something besides q, k, v changed"


def assert_explained(model: nn.Module, plan: object, context: object) -> None:
    """Every layer's q, k and v, as attention reads them, lie in the plan's envelope of that layer's own input."""
    with context:
        kept = taken(model)
    for number, layer in enumerate(decoder_layers(model)):
        problem = layer_problem(layer, model.config, kept[number, "x"])
        for name, ends in envelope(plan, problem).items():
            assert not outside(kept[number, name].reshape(ends[0].shape), ends).any(), (number, name)


def test_another_plans_envelope_does_not_hold_the_model(model: nn.Module) -> None:
    """What the test above rests on: the envelope is narrow enough to tell plans apart."""
    others = {"gemma3_text": "gemma-bf16-offset"}
    with pytest.raises(AssertionError):
        assert_explained(
            model, plan_named(others.get(model.config.model_type, "one-rounding")), contextlib.nullcontext()
        )


@pytest.mark.parametrize("name", OTHER_PLANS)
def test_another_plan_says_something_else(model: nn.Module, name: str) -> None:
    with attached(model, plan_named(name), "spec"):
        made = forward(model, IDS)
    own = forward(model, IDS)
    kind = model.config.model_type
    if fitted(plan_named(name), kind) == reference_plan(kind) or (name == "separate-head-norm" and kind == "llama"):
        return  # gemma's own order is `one-rounding`
    assert differing(made.logits, own.logits) > 0.1, name
    # Layer 0 reads the same embeddings: what parts there is the plan alone.
    assert differing(made.k[0], own.k[0]) > 0 or differing(made.q[0], own.q[0]) > 0


# ---------------------------------------------------------------- every layer, each of q, k and v


def chain_values(model: nn.Module, name: str) -> list[tuple[str, Tensor, Tensor]]:
    """(place, attached, expected) of every layer's q, k and v: what attention reads against `run` on the layer's own
    input, whose weights are taken from the model before it is attached."""
    plan = fitted(plan_named(name), model.config.model_type)
    layers = decoder_layers(model)
    problems = [layer_problem(layer, model.config, layer.input_layernorm.weight[None]) for layer in layers]
    with attached(model, plan, "spec"):
        kept = taken(model)
    compared = []
    for number, problem in enumerate(problems):
        expected = run(plan, problem.replace(x=kept[number, "x"]), "spec")
        for place, value in zip("qkv", expected, strict=True):
            compared.append((f"{place} of layer {number}", kept[number, place].reshape(value.shape), value))
    return compared


@pytest.mark.parametrize("name", sorted({*OTHER_PLANS, "hf", "bf16-statistics"}))
def test_every_plan_reaches_every_layer(model: nn.Module, name: str) -> None:
    for place, actual, expected in chain_values(model, name):
        assert torch.equal(actual.to(torch.float64), expected), place


def test_the_weights_of_a_problem_are_the_layers_own(model: nn.Module) -> None:
    """Against names of the state dict, which layer_problem does not read."""
    state = model.state_dict()
    for number, layer in enumerate(decoder_layers(model)):
        problem, prefix = (
            layer_problem(layer, model.config, layer.input_layernorm.weight[None]),
            f"model.layers.{number}.self_attn.",
        )
        rows = torch.cat([state[f"{prefix}{n}_proj.weight"] for n in "qkv"])
        assert torch.equal(problem.qkv_weight, rows) and problem.eps == model.config.rms_norm_eps
        assert torch.equal(problem.norm_weight, state[f"model.layers.{number}.input_layernorm.weight"])
        for n in "qk":
            expected, found = state.get(f"{prefix}{n}_norm.weight"), getattr(problem, f"{n}_norm_weight")
            assert found is expected is None or torch.equal(found, expected)
        if model.config.model_type == "qwen2":
            assert torch.equal(problem.bias, torch.cat([state[f"{prefix}{n}_proj.bias"] for n in "qkv"]))
            assert problem.bias.abs().min() > 0
        else:
            assert problem.bias is None
        assert problem.weight_offset == (model.config.model_type == "gemma3_text")


def skip_a_layer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attach, "decoder_layers", lambda model: decoder_layers(model)[:-1])


def swap_k_and_v(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attach, "run", lambda *arguments: [run(*arguments)[place] for place in (0, 2, 1)])


def change_the_problem(patch: pytest.MonkeyPatch, **changes: object) -> None:
    own = attach.layer_problem
    patch.setattr(attach, "layer_problem", lambda *arguments: own(*arguments).replace(**changes))


def use_layer_0_everywhere(patch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen2")
    first = layer_problem(decoder_layers(model)[0], model.config, torch.zeros(1, 64, dtype=torch.bfloat16))
    patch.setattr(attach, "layer_problem", lambda layer, config, x: first.replace(x=x))


FAULTS = {
    "a layer skipped": skip_a_layer,
    "k and v swapped": swap_k_and_v,
    "bias forgotten": functools.partial(change_the_problem, bias=None),
    "another eps": functools.partial(change_the_problem, eps=1e-2),
    "layer 0's weights everywhere": use_layer_0_everywhere,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """By the comparison with `run` on a plan that is not the model's own, and (all but the skipped layer, which then
    runs its own norm) by the reference plan's logits."""
    model = tiny_model("qwen2")
    own = logits(model)
    FAULTS[fault](monkeypatch)
    with pytest.raises((AssertionError, KeyError)):
        test_every_plan_reaches_every_layer(model, "truncating")
    if fault != "a layer skipped":  # which then runs by itself, as the reference plan does
        with attached(model, reference_plan("qwen2"), "spec"):
            assert differing(logits(model), own) > 0.2


def test_a_head_norm_applied_twice_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chain holds q and k norm; what stands in their place must do nothing."""
    model = tiny_model("qwen3")
    monkeypatch.setattr(attach, "_same", Qwen3RMSNorm(32).bfloat16().forward)
    with pytest.raises(AssertionError):
        test_every_plan_reaches_every_layer(model, "fp32")


# ---------------------------------------------------------------- behind the context


def test_behind_the_context_all_is_as_before(model: nn.Module) -> None:
    before = state_of(model)
    with attached(model, plan_named("truncating")):
        assert not torch.equal(logits(model), before[2])
    assert_untouched(model, before)


def test_behind_an_exception_too(model: nn.Module) -> None:
    before = state_of(model)
    with pytest.raises(RuntimeError, match="inside"), attached(model, plan_named("truncating")):
        raise RuntimeError("inside")
    assert_untouched(model, before)


def test_a_layer_that_cannot_be_attached_leaves_the_others_as_they_were() -> None:
    """The last of three layers has a weight that no problem takes."""
    model = tiny_model("qwen3")
    before = state_of(model)
    weight = decoder_layers(model)[2].self_attn.q_proj.weight
    data, weight.data = weight.data, weight.data * float("inf")
    with pytest.raises(ValueError, match="must be finite"), attached(model, plan_named("fp32")):
        pass
    weight.data = data
    assert_untouched(model, before)


# ---------------------------------------------------------------- batches and caches


@pytest.mark.parametrize("name", ["truncating", "fp32"])
def test_a_batch_is_its_rows(model: nn.Module, name: str) -> None:
    """Two texts at once give what each gives alone; with the sums of `spec` bit for bit in K of the first layer."""
    rows = torch.tensor([IDS, IDS[::-1]])
    with attached(model, plan_named(name), "spec"), torch.no_grad():
        kept: list[Tensor] = []
        handle = last_of(decoder_layers(model)[0], "k").register_forward_hook(lambda m, i, output: kept.append(output))
        both = model(rows).logits
        each = torch.cat([model(row[None]).logits for row in rows])
        handle.remove()
    assert torch.equal(kept[0], torch.cat(kept[1:])) and not torch.equal(kept[1], kept[2])
    assert both.shape == each.shape and both.isfinite().all()


def test_generate_runs_attached(model: nn.Module) -> None:
    with attached(model, plan_named("truncating"), "spec"):
        chosen = greedy(model, IDS, 8)
        out = model.generate(
            torch.tensor([IDS]),
            attention_mask=torch.ones(1, len(IDS)),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=True,
        )
    assert out[0, len(IDS) :].tolist() == chosen


def test_greedy_parts_where_parting_says(model: nn.Module) -> None:
    """Token by token a forced pass does what generation does, so the first token it would not have chosen is where
    generation parts. In one pass only orders of sums differ: there the two agree unless the choice is near a tie."""
    found = []
    for start in range(0, 32, 4):
        prompt = IDS[start : start + 8]
        continuation = greedy(model, prompt, 12)
        with attached(model, plan_named("truncating"), "spec"):
            alone = greedy(model, prompt, 12)
            stepwise = forward(model, prompt + continuation, decoded=12).logits
            at_once = forward(model, prompt + continuation).logits
        parts_at = next((i for i in range(12) if alone[i] != continuation[i]), 12)
        assert parting(stepwise, 8, continuation) == parts_at
        elsewhere = parting(at_once, 8, continuation)
        if elsewhere != parts_at:
            first, second = at_once[7 + min(elsewhere, parts_at)].topk(2).values.tolist()
            assert first - second <= 2**-6 * abs(first), "not within four bf16 ulps of a tie"
        found.append((parts_at, elsewhere))
    assert any(n < 12 for pair in found for n in pair), "the plan changed no token: this shows nothing"


# ---------------------------------------------------------------- kernels


@pytest.mark.parametrize("backend", ["triton", "triton-separate"])
def test_the_kernels_run_attached(backend: str) -> None:
    """Interpreted: K of the first layer lies in the plan's envelope, of another plan it does not."""
    model = tiny_model("qwen3", 2)
    problem = layer_problem(decoder_layers(model)[0], model.config, taken(model)[0, "x"])
    with attached(model, PLANS["fp32"].plan, backend):
        made = forward(model, IDS, decoded=1)
    assert not outside(made.k[0], envelope(PLANS["fp32"].plan, problem)["k"]).any()
    assert outside(made.k[0], envelope(PLANS["hf"].plan, problem)["k"]).any()
    assert made.logits.isfinite().all()
