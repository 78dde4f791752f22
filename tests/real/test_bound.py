"""Fault or rounding on Qwen2.5-Coder 0.5B: right implementations stay inside the bound, the reports' faults do not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from castpoint.harness.model.fetch import had
from castpoint.harness.model.passes import forward as pass_of
from castpoint.harness.systems import bound as bounding
from castpoint.harness.systems import causes
from castpoint.harness.systems.causes import MODEL, PROMPT
from castpoint.harness.systems.decoder import forward
from castpoint.harness.systems.weights import tokenizer_of

OTHER_ISA = {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
PLAY = """
import sys, torch
from castpoint.harness.systems.decoder import forward
from castpoint.harness.systems.weights import opened
weights = opened(sys.argv[1])
torch.save(forward(weights.config, weights.all(torch.float32), [int(i) for i in sys.argv[3:]]), sys.argv[2])
"""
REPORTED = Path(bounding.__file__).parent / "data" / "differences-000.csv"


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return tokenizer_of(had(MODEL)).encode(PROMPT)


@pytest.fixture(scope="module")
def bound(ids: list[int]) -> dict[tuple[str, int], float]:
    config, w, _ = causes.model(MODEL)
    return bounding.bounds(config, {name: tensor.double() for name, tensor in w.items()}, ids)


@pytest.fixture(scope="module")
def right(ids: list[int]) -> dict[tuple[str, int], torch.Tensor]:
    return stages(ids)


def stages(ids, change=None, planted=None) -> dict[tuple[str, int], torch.Tensor]:
    config, w, _ = causes.model(MODEL)
    found = {}

    def keep(stage, layer, value):
        other = change(stage, layer, value) if change else None
        found[stage, layer] = value if other is None else other
        return other

    logits = forward(config, planted or w, ids, keep)
    return found | {("logits", -1): logits}


def beyond(made, right, bound) -> list[tuple[str, int]]:
    return [key for key in made if (made[key].double() - right[key].double()).abs().max().item() > bound[key]]


@pytest.mark.parametrize("attention, batch, decoded", [("sdpa", 1, 0), ("eager", 2, 0), ("eager", 1, 5)])
def test_transformers_stays_inside(bound, right, ids, attention: str, batch: int, decoded: int) -> None:
    """Another attention, a batch of two, token by token behind a cache."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(had(MODEL), dtype=torch.float32, attn_implementation=attention).eval()
    made = pass_of(model, ids, batch, decoded)
    found = {("logits", -1): made.logits}
    for layer, (hidden, q, k) in enumerate(zip(made.hidden, made.q, made.k, strict=True)):
        found |= {("q", layer): q, ("k", layer): k}
        if layer < len(made.q) - 1:  # behind the last layer transformers' own norm may stand
            found["hidden", layer] = hidden
    assert beyond(found, right, bound) == []


def test_other_instructions_and_threads_stay_inside(bound, right, ids, tmp_path: Path) -> None:
    path = tmp_path / "logits.pt"
    command = [sys.executable, "-c", PLAY, had(MODEL), str(path), *map(str, ids)]
    subprocess.run(command, check=True, env=os.environ | OTHER_ISA | {"OMP_NUM_THREADS": "1"})
    other = torch.load(path)
    assert not torch.equal(other, right["logits", -1])
    assert beyond({("logits", -1): other}, right, bound) == []


def test_faults_are_named_where_they_are_and_an_ulp_on_k_is_none(bound, right, ids) -> None:
    config, w, _ = causes.model(MODEL)
    assert beyond(stages(ids, causes.one_ulp), right, bound) == []
    for planted, first in (
        (causes.with_unloaded_bias(config, w, 0), ("output", 0)),
        (causes.without(w, "k"), ("k", 0)),
        (causes.without(w, "qkv"), ("q", 0)),
    ):
        found = beyond(stages(ids, planted=planted), right, bound)
        assert found[0] == first and ("logits", -1) in found and len(found) > 100
    reduced = beyond(stages(ids, causes.reduced_in_bf16(config, w)), right, bound)
    assert reduced[0] == ("output", 0) and ("logits", -1) in reduced


def test_the_reports_figures_are_a_fault_from_the_output_projection_on(bound) -> None:
    judged = bounding.judge(bounding.read_differences(REPORTED), bound)
    faults = {(each.stage, each.layer) for each in judged if each.fault}
    assert faults == {("output", 0), ("hidden", 1), ("hidden", 3), ("logits", -1)} and len(judged) == 6
