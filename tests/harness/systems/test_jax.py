"""The decoder in JAX against the plain one in PyTorch: every stage, end to end, and the functions that differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import pytest
import torch
from jax import Array
from tiny_models import IDS, add_tokenizer, tiny_model, write_gguf
from typer.testing import CliRunner

from castpoint.harness.__main__ import app
from castpoint.harness.runs.frames import load_table
from castpoint.harness.runs.records import load_runs
from castpoint.harness.runs.words import Judged
from castpoint.harness.systems import decoder, jax_causes
from castpoint.harness.systems import jax_port as port
from castpoint.harness.systems.jax import (
    ALONE,
    EXACT,
    GIVEN_ANGLES,
    JIT,
    OP_BY_OP,
    WHOLE,
    fp64,
    read,
    reference,
    tallies,
)
from castpoint.harness.systems.jax_causes import NEAR, NONE
from castpoint.harness.systems.tally import Tally
from castpoint.harness.systems.weights import Lazy, Weights, of_model

TYPES = ("qwen2", "qwen3", "gemma3_text")


def weights(model_type: str) -> Weights:
    return of_model(tiny_model(model_type), "drawn")


@pytest.mark.parametrize("model_type", TYPES)
def test_in_float64_only_the_last_bits_differ(model_type: str) -> None:
    """With PyTorch's angles, which it makes in fp32: what is wrong in the port shows, rounding does not. 1e-12: some
    thousand roundings of 1.1e-16, with room for three layers to let them grow."""
    with fp64(torch.float64):
        found = tallies(weights(model_type), torch.float64, GIVEN_ANGLES, [IDS])
    due = {(stage, layer) for _, layer, stage in found}
    assert {
        ("logits", 3),
        ("embedding", -1),
        *((s, n) for n in range(3) for s in ("normed", "scores", "hidden")),
    } <= due
    for (reading, layer, stage), tally in found.items():
        if stage != "angles":
            assert tally.columns()["rel_rms"] < 1e-12, (reading, layer, stage)


@pytest.mark.parametrize("model_type", TYPES)
def test_bf16_stages_round_where_pytorch_does(model_type: str) -> None:
    """Fed PyTorch's input, a stage differs where two fp32 sums straddle a rounding: rarely, and by one step."""
    found = tallies(weights(model_type), torch.bfloat16, OP_BY_OP, [IDS])
    for (reading, layer, stage), tally in found.items():
        if reading == ALONE and stage not in ("angles", "mlp"):  # of an MLP: any of its three roundings
            assert tally.equal / tally.elements > 0.99, (layer, stage)
            assert tally.columns()["ulps_of_largest"] <= 1, (layer, stage)


def test_embedding_rope_and_residual_are_the_same_bits_op_by_op() -> None:
    found = tallies(weights("qwen3"), torch.float32, OP_BY_OP, [IDS])
    for stage in ("embedding", "q_rotated", "k_rotated", "residual", "hidden"):
        assert all(t.equal == t.elements for (reading, _, s), t in found.items() if reading == ALONE and s == stage)


def test_a_port_with_a_fault_is_found_at_its_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """RoPE that turns the wrong way: nothing before it differs more, and alone nothing behind it."""
    monkeypatch.setattr(port, "rotate", lambda x, turned, right=port.rotate: right(x, turned * port.jnp.array([[1], [-1]])[..., None, None]))  # noqa: E501  # fmt: skip
    with fp64(torch.float64):
        found = tallies(weights("qwen3"), torch.float64, GIVEN_ANGLES, [IDS])
    bad = {(stage, layer) for (reading, layer, stage), tally in found.items()
           if reading == ALONE and stage != "angles" and tally.columns()["rel_rms"] > 1e-12}  # fmt: skip
    assert bad == {(f"{name}_rotated", layer) for name in "qk" for layer in range(3)}


def test_compiled_layers_are_run_and_only_what_is_asked_for_is_shown() -> None:
    found = tallies(weights("gemma3_text"), torch.float32, JIT, [IDS], ("output", "logits"))
    assert {key[2] for key in found} == {"output", "logits"} and {key[0] for key in found} == {WHOLE}
    assert found[WHOLE, 3, "logits"].columns()["rel_rms"] < 1e-4


def test_the_study_runs_to_its_end(tmp_path: Path) -> None:
    """On more layers than it shows."""
    folder = tmp_path / "model"
    tiny_model("gemma3_text", 5).save_pretrained(folder)
    add_tokenizer(folder)
    command = ["study", "jax", "--short", "--model", str(folder), "--results", str(tmp_path / "results")]
    assert CliRunner().invoke(app, command).exit_code == 0
    (run_id,) = load_runs(tmp_path / "results")
    stages, caused, parts = (
        load_table(tmp_path / "results", run_id, f"jax_{t}") for t in ("stages", "causes", "parts")
    )
    assert set(stages["layer"]) == {-1, 0, 1, 2, 3, 4} and set(stages["dtype"]) == {"fp32", "bf16", "fp64"}
    assert set(caused["model"]) == {"model"} and (caused[caused["by_jax"].isin([NONE, EXACT])]["differ"] == 0).all()
    assert {f"{name}: JAX, PyTorch" for name in jax_causes.ROOTS} < set(parts["part"])


def test_a_gguf_file_says_what_its_model_says(tmp_path: Path) -> None:
    source = str(write_gguf(tmp_path / "m.gguf", "qwen2"))
    model, (ids,) = read(source, 1, 8)
    assert len(ids) == 8
    found, expected = (tallies(each, torch.float32, OP_BY_OP, [ids]) for each in (model, weights("qwen2")))
    assert found.keys() == expected.keys() and all(found[key] == expected[key] for key in found)


def test_a_tally_counts_what_differs() -> None:
    tally = Tally()
    tally.add(*(torch.tensor([1.0, two, 0.0, 4.0]).bfloat16() for two in (2.0, 2.03125)))
    made = tally.columns()
    assert (made["elements"], tally.equal) == (3, 2) and made["share_equal"] == 2 / 3
    assert made["max_abs"] == 0.03125 and made["max_ulp"] == 2 and made["ulps_of_largest"] == 1


def causes(model_type: str, dtype: torch.dtype) -> dict[tuple[str, str], Tally]:
    """Of every layer of a small model."""
    model, found = weights(model_type), dict[tuple[str, str], Tally]()
    kept, w = reference(model, dtype, IDS), Lazy(model, dtype)
    for layer in range(model.config.num_layers):
        for stage, what, actual, expected in jax_causes.of_layer(model.config, w, layer, kept):
            found.setdefault((stage, what), Tally()).add(actual, expected)
    for stage, what, actual, expected in jax_causes.of_end(model.config, w, kept):
        found.setdefault((stage, what), Tally()).add(actual, expected)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", TYPES)
def test_no_cause_of_a_stage_is_left_out(model_type: str, dtype: torch.dtype) -> None:
    """Every stage that differs has its causes, without which no bit differs."""
    found = causes(model_type, dtype)
    for (stage, what), tally in found.items():
        if what in (NONE, EXACT, f"{NEAR}, times 1 / sum"):
            assert tally.equal == tally.elements > 0, (stage, what)
    stages = tallies(weights(model_type), dtype, OP_BY_OP, [IDS])
    apart = {stage for (reading, _, stage), t in stages.items() if reading == ALONE and t.equal < t.elements}
    assert apart <= {stage for stage, _ in found}


def narrowed(values: Array) -> Array:
    return jax.lax.reduce_precision(values, 8, 3)


@pytest.mark.parametrize(
    "kind, name, stage, what, moved",
    [
        ("qwen3", "linear", "q", EXACT, lambda own: lambda *args: narrowed(own(*args))),
        ("qwen3", "linear", "mlp", EXACT, lambda own: lambda x, w: own(jax.lax.reduce_precision(x, 8, 7), w)),
        ("qwen2", "linear_bias", "k", EXACT, lambda own: lambda x, w, b: narrowed(own(x, w, 0 * b)) + b),
        ("qwen3", "scaled", "k_normed", NONE, lambda own: lambda *args: narrowed(own(*args))),
        ("qwen3", "scores", "scores", EXACT, lambda own: lambda *args: narrowed(own(*args))),
        ("qwen3", "attended", "attended", EXACT, lambda own: lambda w, v: own(jax.lax.reduce_precision(w, 8, 7), v)),
    ],
)
def test_a_port_that_rounds_more_is_not_explained(
    kind: str, name: str, stage: str, what: str, moved: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result or an operand once more, a sum before its bias."""
    monkeypatch.setattr(port, name, moved(getattr(port, name)))
    tally = causes(kind, torch.float32)[stage, what]
    assert tally.equal < tally.elements


def test_an_exp_some_ulps_off_does_not_explain_a_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """6 ulps at -1; less above, more below, so that no sum makes up for it."""
    own = jax.numpy.exp
    monkeypatch.setattr(jax.numpy, "exp", lambda value: own(value * (1 + 2**-21)))
    tally = causes("qwen3", torch.float32)["weights", f"{NEAR}, times 1 / sum"]
    assert tally.equal < tally.elements


@pytest.mark.parametrize("how", [OP_BY_OP, JIT])
@pytest.mark.parametrize("name", jax_causes.ROOTS)
def test_two_exponents_stand_for_all(name: str, how: str) -> None:
    """The function at 4^k x is that at x over 2^k, in both libraries."""
    for x in jax_causes.mantissas(12):
        near = jax_causes.of_function(name, x, how)
        for k in (-60, -10, 1, 60):
            far = jax_causes.of_function(name, x * 4.0**k, how)
            assert all(torch.equal(a * 2.0**k, b) for a, b in zip(far, near, strict=True))


def test_the_chain_of_casts_loses_what_float16_cannot_hold() -> None:
    from castpoint.harness.systems.claims_jax import chained, ulp_of

    kept, gone = torch.tensor([1.0078125, -65280.0, 2**-14]), torch.tensor([2.0**-30, 1e5, 2**-24 * 1.5])
    assert torch.equal(chained(kept.bfloat16()), kept.bfloat16())
    assert not (chained(gone.bfloat16()) == gone.bfloat16()).any()
    assert (ulp_of(32.0), ulp_of(63.9), ulp_of(4.0)) == (0.25, 0.25, 0.03125)


@pytest.mark.parametrize(
    "reached, verdict",
    [
        ((0.1, 1e-5, 1e-12), Judged.OTHERWISE),
        ((0.1, 1e-5, 1e-5), Judged.NOT_REPRODUCED),
        ((0.1, 1e-6, 1e-12), Judged.REPRODUCED),
    ],
)
def test_verdicts_follow_from_figures(
    monkeypatch: pytest.MonkeyPatch, reached: tuple[float, ...], verdict: Judged
) -> None:
    """B3, as if these were the largest differences in bf16, fp32 and float64."""
    from castpoint.harness.systems import claims_jax

    def planted(model: Weights, dtype: torch.dtype, *_: object) -> dict[object, Tally]:
        tally = Tally()
        tally.figures["max_abs"] = reached[(torch.bfloat16, torch.float32, torch.float64).index(dtype)]
        return {(WHOLE, model.config.num_layers, "logits"): tally}

    monkeypatch.setattr(claims_jax, "read", lambda *_: (weights("qwen3"), [IDS[:8]]))
    monkeypatch.setattr(claims_jax, "tallies", planted)
    assert claims_jax.b3(True).verdict == verdict


def test_stages_are_those_of_the_plain_decoder() -> None:
    for model_type in TYPES:
        config = weights(model_type).config
        own = [name for name, _ in port.stages(config, 0)]
        due = [s for s in decoder.STAGES if config.head_norm or s not in ("q_normed", "k_normed")]
        assert sorted(own) == sorted([*due, "angles"])
