"""Fault or rounding: right implementations stay inside the bound, planted faults do not, each named where it is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from commands import failure
from tiny_models import IDS as ALL_IDS
from tiny_models import saved, tiny_model, write_gguf

from castpoint.harness.systems import bound as bounding
from castpoint.harness.systems.causes import with_unloaded_bias, without
from castpoint.harness.systems.decoder import forward
from castpoint.harness.systems.weights import of_model

IDS = ALL_IDS[:12]
WEIGHTS = {kind: of_model(tiny_model(kind), kind) for kind in ("qwen2", "qwen3", "gemma3_text")}


def kept(config, w, dtype, change=None):
    found = {}

    def keep(stage, layer, value):
        other = change(stage, layer, value) if change else None
        found[stage, layer] = value if other is None else other
        return other

    logits = forward(config, {name: tensor.to(dtype) for name, tensor in w.items()}, IDS, keep)
    return found | {("logits", -1): logits}


@pytest.fixture(scope="module", params=WEIGHTS)
def held(request):
    """A configuration, its weights in float64, the bounds by dtype, and what float32 makes."""
    weights = WEIGHTS[request.param]
    wide = weights.all(torch.float64)
    found = {dtype: bounding.bounds(weights.config, wide, IDS, dtype) for dtype in bounding.BITS}
    return weights.config, wide, found, kept(weights.config, wide, torch.float32)


def beyond(made, reference, bound) -> list[tuple[str, int]]:
    return [key for key in bound if (made[key].double() - reference[key].double()).abs().max().item() > bound[key]]


def chunked(config, w):
    """q, k and v summed in chunks of 8 terms, one behind the other: another right order of sums."""
    seen = {}

    def change(stage, layer, value):
        seen[stage] = value
        if stage not in ("q", "k", "v"):
            return None
        name = f"model.layers.{layer}.self_attn.{stage}_proj"
        weight = w[f"{name}.weight"].float()
        total = torch.zeros(len(value), len(weight))
        for at in range(0, weight.shape[1], 8):
            total = total + seen["normed"][:, at : at + 8] @ weight[:, at : at + 8].T
        return (total + w[f"{name}.bias"].float() if config.bias else total).view_as(value)

    return change


def test_right_implementations_stay_inside(held) -> None:
    config, wide, bound, float32 = held
    assert beyond(kept(config, wide, torch.float64), float32, bound["float32"]) == []
    assert beyond(kept(config, wide, torch.float32, chunked(config, wide)), float32, bound["float32"]) == []
    assert beyond(kept(config, wide, torch.bfloat16), float32, bound["bfloat16"]) == []


def test_bf16_is_no_float32(held) -> None:
    config, wide, bound, float32 = held
    found = beyond(kept(config, wide, torch.bfloat16), float32, bound["float32"])
    assert ("q", 0) in found and ("logits", -1) in found


@pytest.mark.parametrize("dtype", bounding.BITS)
def test_another_eps_a_skipped_layer_another_theta_are_faults(held, dtype: str) -> None:
    config, wide, bound, float32 = held
    arithmetic = getattr(torch, dtype)
    skipped = {
        n: torch.zeros_like(t) if n.endswith(("o_proj.weight", "down_proj.weight")) and ".1." in n else t
        for n, t in wide.items()
    }
    other_theta = dataclasses.replace(config, thetas=(100.0,) * config.num_layers)
    for made in (kept(config, skipped, arithmetic), kept(other_theta, wide, arithmetic)):
        assert ("logits", -1) in beyond(made, float32, bound[dtype])
    wrong_eps = kept(dataclasses.replace(config, eps=1e-2), wide, arithmetic)
    assert beyond(wrong_eps, float32, bound["float32"])[0] == ("normed", 0)


def test_biases_that_nothing_loaded_or_nobody_added_are_faults_where_they_are() -> None:
    weights = WEIGHTS["qwen2"]
    config, wide = weights.config, weights.all(torch.float64)
    bound, right = bounding.bounds(config, wide, IDS), kept(config, wide, torch.float32)
    assert beyond(kept(config, with_unloaded_bias(config, wide, 0), torch.float32), right, bound)[0] == ("output", 0)
    assert beyond(kept(config, without(wide, "k"), torch.float32), right, bound)[0] == ("k", 0)


def test_a_bound_grows_with_the_number_of_terms_and_with_the_spread_of_its_runs() -> None:
    assert bounding.beyond([1.0, 1.0]) == pytest.approx(1.0)
    assert bounding.beyond([1.0, 2.0, 3.0]) > bounding.beyond([1.9, 2.0, 2.1]) > 2.1
    run = bounding.Perturbed(WEIGHTS["qwen2"].config, {}, {}, "float32", 0)
    few, many = (run.summed(torch.zeros(4000, dtype=torch.float64), k, torch.ones(4000)).std() for k in (16, 1600))
    assert many / few == pytest.approx(10, rel=0.1)
    assert few == pytest.approx(bounding.U * 4 / 3, rel=0.1)


@pytest.mark.parametrize("made", [lambda path: saved(path, "qwen3"), lambda path: write_gguf(path, "qwen2")])
def test_the_command_names_what_rounding_cannot_make(tmp_path: Path, capsys, monkeypatch, made) -> None:
    import castpoint.harness.__main__ as cli

    folder, said = made(tmp_path / "m.gguf"), tmp_path / "measured.csv"
    said.write_text("stage,layer,max_abs\nk,0,1e-9\nlogits,,14.31\n")
    monkeypatch.setattr("sys.argv", ["castpoint", "bound", str(folder), "--measured", str(said)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 1
    assert lines[0].startswith("k, layer 0: 1e-09 measured") and lines[0].endswith("rounding may have made it")
    assert lines[1].startswith("logits: 14.3 measured, rounding alone at most") and "a fault" in lines[1]


@pytest.mark.parametrize(
    "text, words",
    [
        ("stage,layer\nk,0\n", "must be a CSV with the columns stage, layer, max_abs"),
        ("stage,layer,max_abs\nkey,0,1\n", "line 2 of .*: unknown stage 'key', stages are embedding, normed"),
        ("stage,layer,max_abs\nk,first,1\n", "line 2 of .*: layer and max_abs must be numbers"),
        ("stage,layer,max_abs\nk,7,1\n", "this model has no k of layer 7: give one of layers 0 to 2"),
        ("stage,layer,max_abs\nlogits,0,1\n", "this model has no logits of layer 0: give one without a layer"),
    ],
)
def test_differences_that_cannot_be_judged_are_one_line(tmp_path: Path, capsys, monkeypatch, text, words) -> None:
    import re

    said, folder = tmp_path / "measured.csv", saved(tmp_path / "m", "qwen3")
    said.write_text(text)
    capsys.readouterr()
    line = failure(capsys, monkeypatch, "bound", str(folder), "--measured", str(said))
    assert re.search(words, line)
