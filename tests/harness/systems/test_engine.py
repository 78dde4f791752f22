"""The engine: transformers' own tokens and logits, bit for bit; batches, pages and draws in float64, where the order of
sums cannot hide a fault; what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import IDS, reference_plan, tiny_lm, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from castpoint.harness.runs.errors import UserError
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.words import How, KScale
from castpoint.harness.systems import decoder, engine
from castpoint.harness.systems.cache import Pages, chained
from castpoint.harness.systems.engine import Size, Study, compared, generations, nats, plans_of, with_k_norms
from castpoint.harness.systems.generate import Engine, Model, Request, choose, modules, of_plan
from castpoint.harness.systems.weights import of_model
from castpoint.variants.catalogue import PLANS, plan_named

TYPES = ("qwen2", "qwen3", "gemma3_text", "gemma with windows")
# float64 keeps 52 bits: sums in another order move these logits, of size 3, by less than 1e-12. A token, a position or
# a page too many moves them by more than 1e-3.
CLOSE = 1e-9
PROMPTS = [IDS[:7], IDS[3:39], IDS[10:26], IDS[:20], IDS[5:37]]  # within a page, a page and more, exactly one and two


def network(kind: str) -> nn.Module:
    """A tiny model; of Gemma also one with windows of 16 around a layer that sees all, and two kinds of rotation."""
    if kind != "gemma with windows":
        return tiny_model(kind)
    config = copy.deepcopy(tiny_model("gemma3_text").config)
    config.sliding_window, config.layer_types = 16, ["sliding_attention", "full_attention", "sliding_attention"]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.load_state_dict(tiny_model("gemma3_text").state_dict())
    return model


def model_of(kind: str, dtype: torch.dtype = torch.bfloat16) -> Model:
    weights = of_model(network(kind), kind)
    return Model(weights.config, weights.all(dtype))


def reference(model: nn.Module, prompt: list[int], tokens: int) -> tuple[list[int], torch.Tensor]:
    """transformers' tokens and logits [tokens, V]."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    ids = torch.tensor([prompt])
    more = {"output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, pad_token_id=0, **more
    )
    model.set_attn_implementation(before)
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)


@pytest.mark.parametrize("kind", TYPES)
def test_tokens_and_logits_are_those_of_generate(kind: str) -> None:
    model, own = model_of(kind), network(kind)
    expected, logits = reference(own, IDS, 24)
    for chain in (
        modules(model),
        of_plan(model, reference_plan(kind if "window" not in kind else "gemma3_text"), "eager"),
    ):
        running = Engine(model, chain)
        sequence = running.add(Request(tuple(IDS), 24))
        running.run()
        assert sequence.new == expected
        assert torch.equal(torch.stack(sequence.logits).float(), logits)


def test_another_plan_writes_other_logits() -> None:
    """So that the equality above is no accident of small models."""
    model = model_of("qwen3")
    _, logits = reference(network("qwen3"), IDS, 1)
    (sequence,) = generations(model, "fp32", [IDS], 1)
    assert not torch.equal(sequence.logits[0].float(), logits[0])


@pytest.mark.parametrize("kind", TYPES)
def test_sequences_that_join_leave_and_share_are_computed_as_alone(kind: str) -> None:
    """Few pages and small batches, so that sequences wait, leave early, are sent back, and share what others wrote."""
    model = model_of(kind, torch.float64)
    running = Engine(model, modules(model), pages=7, batch=3)
    sequences = [running.add(Request(tuple(p), 9 + 6 * i)) for i, p in enumerate([*PROMPTS, PROMPTS[1], IDS])]
    running.run()
    assert running.counts.preempted > 0 and running.counts.reused > 0
    for sequence in sequences:
        assert len(sequence.new) == sequence.request.tokens
        alone = decoder.forward(model.config, model.w, sequence.ids[:-1])[len(sequence.request.prompt) - 1 :]
        assert (torch.stack(sequence.logits) - alone).abs().max() < CLOSE
        assert sequence.new == alone.argmax(-1).tolist()
    pages = running.pages
    assert sorted(pages.free) == list(range(7)) and not any(pages.holders) and not running.running


def test_a_prefix_is_computed_once() -> None:
    model = model_of("qwen3", torch.float64)
    running = Engine(model, modules(model))
    first = running.add(Request(tuple(IDS), 4))
    running.run()
    computed = running.counts.computed
    again, other = (running.add(Request(ids, 4)) for ids in (tuple(IDS), (IDS[0] ^ 1, *IDS[1:])))
    running.run()
    assert running.counts.reused == 32  # both full pages of 40 tokens, and none of those behind another first token
    assert running.counts.computed - computed == (40 - 32 + 3) + (40 + 3)
    assert again.new == first.new
    assert (torch.stack(other.logits) - torch.stack(first.logits)).abs().max() > 1e-3


def test_sequences_of_one_step_share_a_prefix() -> None:
    model = model_of("qwen3", torch.float64)
    running = Engine(model, modules(model))
    pair = [running.add(Request(tuple(IDS), 4)) for _ in range(2)]
    running.step()
    assert pair[0].table[:2] == pair[1].table[:2] and pair[0].table[2] != pair[1].table[2]
    running.run()
    assert running.counts.reused == 32 and pair[0].new == pair[1].new


def test_the_last_token_of_a_known_prompt_is_computed_again() -> None:
    """A prompt of whole pages: its logits are nowhere but in a step of its own."""
    model = model_of("qwen3", torch.float64)
    running = Engine(model, modules(model))
    pair = []
    for _ in range(2):
        pair.append(running.add(Request(tuple(IDS[:32]), 17)))
        running.run()
    assert running.counts.reused == 16 and pair[0].new == pair[1].new
    running.add(Request(tuple(pair[0].ids), 1))  # what was written token by token is known too
    running.run()
    assert running.counts.reused == 16 + 48


def test_a_page_lives_as_long_as_somebody_holds_it() -> None:
    pages = Pages(model_of("qwen3").config, 4, 16, torch.zeros(0))
    (first, held), (second, reused) = pages.admit(IDS), pages.admit(IDS[:33])
    assert (held, reused) == (0, 32) and first[:2] == second[:2] and pages.admit([1]) is None
    shared = first[:2]
    pages.release(first)
    assert len(pages.free) == 1 and not set(shared) & set(pages.free)
    table, none = pages.admit([1])  # takes the free one
    assert none == 0 and not pages.grow(table, 17) and pages.grow(table, 16)
    pages.release(second)
    assert pages.admit(IDS[:33])[1] == 32  # free, and not overwritten yet
    assert chained(IDS, 16)[1] != chained(IDS[16:], 16)[0]  # the same tokens behind other ones


def test_a_drawn_text_depends_on_its_seed_alone() -> None:
    model = model_of("gemma3_text", torch.float64)

    def drawn(seeds: list[int], at: int) -> list[int]:
        running = Engine(model, modules(model), pages=8)
        sequences = [running.add(Request(tuple(PROMPTS[i]), 20, 1.0, seed)) for i, seed in enumerate(seeds)]
        running.run()
        return sequences[at].new

    alone = drawn([5], 0)
    assert drawn([5, 6, 7], 0) == alone and drawn([5, 8, 9], 0) == alone
    assert drawn([4], 0) != alone


def test_draws_follow_their_probabilities() -> None:
    """Each count within five standard deviations of n p, at two temperatures."""
    logits, count, rng = torch.tensor([0.0, 1.0, -torch.inf, 2.0]), 20_000, torch.Generator().manual_seed(0)
    for temperature in (1.0, 0.5):
        share = (logits.double() / temperature).softmax(-1)
        found = torch.tensor([choose(logits, temperature, rng) for _ in range(count)]).bincount(minlength=4)
        assert ((found - count * share).abs() <= 5 * (count * share * (1 - share)).sqrt()).all()
    assert choose(torch.tensor([1.0, 3.0, 3.0]), 0.0, rng) == 1  # greedy: of equal ones the first


def test_a_stop_token_ends_the_text() -> None:
    model = model_of("qwen3")
    (whole,) = generations(model, "eager", [IDS], 12)
    stop = whole.new[4]
    running = Engine(model, modules(model))
    sequence = running.add(Request(tuple(IDS), 12, stop=frozenset({stop})))
    running.run()
    assert sequence.new == whole.new[: whole.new.index(stop) + 1]


@pytest.mark.parametrize(
    "request_, said",
    [
        (Request(tuple(IDS), 42), r"40 prompt and 42 new tokens need 6 pages of 16 tokens, and the cache has 5"),
        (Request(tuple(IDS), 300), "340 tokens with those to come: the model reads 256"),
        (Request((1, 64), 4), "a prompt's tokens must lie in 0 to 63"),
        (Request((), 4), "both must be 1 or more"),
        (Request((1,), 0), "both must be 1 or more"),
        (Request((1,), 4, temperature=-1.0), "temperature -1 is below 0"),
    ],
)
def test_what_can_never_be_computed_is_refused_in_one_line(request_: Request, said: str) -> None:
    model = model_of("qwen3")
    running = Engine(model, modules(model), pages=5)
    kept = running.add(Request(tuple(IDS), 41))  # 80 keys and values: the cache to its last slot
    with pytest.raises(UserError, match=said) as error:
        running.add(request_)
    assert "\n" not in str(error.value)
    running.run()
    assert len(kept.new) == 41 and running.counts.preempted == 0


@pytest.mark.parametrize("kind, missing", [("qwen3", {"gemma", "gemma-bf16-offset"}), ("gemma3_text", set())])
def test_every_plan_of_the_catalogue_runs_that_fits(kind: str, missing: set[str]) -> None:
    model = model_of(kind)
    assert plans_of(kind) == [name for name in PLANS if name not in missing]
    for name in plans_of(kind):
        (sequence,) = generations(model, name, [IDS[:8]], 3)
        assert torch.stack(sequence.logits).isfinite().all()


def test_kernels_run_it_too() -> None:
    """Interpreted: their tokens against those of the plan as PyTorch code."""
    model = model_of("qwen3")
    plan = plan_named("fp32")
    logits = []
    for backend in ("triton", "eager"):
        running = Engine(model, of_plan(model, plan, backend))
        sequence = running.add(Request(tuple(IDS[:8]), 2))
        running.run()
        logits.append(torch.stack(sequence.logits).float())
    other = torch.stack(generations(model, "hf", [IDS[:8]], 2)[0].logits).float()
    assert (logits[0] - logits[1]).abs().max() < (other - logits[1]).abs().max()


def test_balanced_k_norms_leave_the_function() -> None:
    model = model_of("gemma3_text")
    own, balanced, alone = (with_k_norms(model, change) for change in KScale)
    for changed in (balanced, alone):
        for layer in range(model.config.num_layers):
            applied = 1 + changed.weight(layer, "self_attn.k_norm").float()
            assert applied.abs().max().item() == 96.5
    assert own is model and set(alone.scales) == {model.config.scale}

    def logits(changed: Model) -> torch.Tensor:
        wide = Model(model.config, {name: w.double() for name, w in changed.w.items()}, changed.scales)
        running = Engine(wide, modules(wide))
        sequence = running.add(Request(tuple(IDS), 1))
        running.run()
        return sequence.logits[0]

    # bf16 keeps 8 bits: the multiplied weights moved by 2^-9 at most, relative to their own size plus 1
    assert (logits(balanced) - logits(own)).abs().max() < 0.2 * (logits(alone) - logits(own)).abs().max()


def test_nats_are_those_of_the_new_tokens_alone() -> None:
    model = model_of("qwen3", torch.float64)
    new = [3, 1, 4]
    log_p = decoder.forward(model.config, model.w, IDS + new).log_softmax(-1)
    expected = -sum(log_p[39 + i, token].item() for i, token in enumerate(new)) / 3
    assert nats(model, dict(model.w), IDS, new) == pytest.approx(expected, abs=1e-12)


def test_margins_are_of_the_others_logits() -> None:
    rows = [torch.tensor([0.0, 3.0, 1.0]), torch.tensor([2.0, 0.5, 1.5])]
    other = SimpleNamespace(new=[1, 0], logits=rows)
    assert compared([1, 0], other) == {"equal": 2, "margin": None, "margin_median": 1.25}
    assert compared([1, 1], other) == {"equal": 1, "margin": 1.5, "margin_median": 1.25}
    assert compared([0, 0], other)["equal"] == 0


def test_the_study_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "castpoint.harness.systems.engine.texts", lambda *_: [type("T", (), {"ids": p}) for p in PROMPTS[:2]]
    )
    lm = replace(tiny_lm("gemma3_text"), tokenizer=None)
    size = Size(2, 36, 14, ("fp32",))
    records = Records(tmp_path, {}, {})
    Study(records, lm, size).run()
    texts, runs = records.rows("engine"), records.rows("engine_runs")
    assert {row["how"] for row in runs} == {str(how) for how in How} and {r["k_scale"] for r in runs} == {
        str(k) for k in KScale
    }
    assert all(row["equal"] == row["tokens"] for row in texts if row["plan"] == "transformers")
    assert all(bool(row["margin"]) == (row["equal"] != row["tokens"]) for row in texts if row["plan"] != "shuffled")
    assert int(next(row for row in runs if row["how"] == How.PREEMPTED)["preempted"]) > 0
    assert int(next(row for row in runs if row["how"] == How.REUSED)["reused"]) > 0
    monkeypatch.setattr(engine, "generations", lambda *_: pytest.fail("measured again"))
    Study(Records.of_run(tmp_path, records.run_id), lm, size).run()
