"""Captures of norms beyond bf16 alone: a residual added, fp32 weights, fp32 rows, fp16 throughout."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from commands import failure
from safetensors.torch import save_file
from torch import Tensor

from castpoint.harness.fingerprint.bounds import bounds_of
from castpoint.harness.fingerprint.capture import Norm, read
from castpoint.harness.fingerprint.captured import explain
from castpoint.harness.fingerprint.comparison import compare_captures
from castpoint.harness.fingerprint.rules import Rows, Rule, norm_rules, predict, source
from castpoint.harness.fingerprint.sizes import ANY
from castpoint.harness.fingerprint.stores import storages
from castpoint.harness.problems.drawn import synthetic_problem
from castpoint.harness.runs.errors import UserError
from castpoint.kernels.plan import KEEP, RNE, RTZ

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS = 1e-6
P = synthetic_problem(tokens=64)
RESIDUAL = torch.randn(P.x.shape, generator=torch.Generator().manual_seed(1)).to(BF16)
TOTAL = P.x.float() + RESIDUAL.float()
FINE = P.norm_weight.float() * (1 + 0.004 * torch.rand(P.norm_weight.shape, generator=torch.Generator().manual_seed(2)))


def recorded(rule: Rule, x: Tensor, weight: Tensor, residual: Tensor | None = None, out: torch.dtype = BF16) -> Norm:
    """What a norm of that rule stores of them, and beside y the sum as the rule holds it."""
    added = None if residual is None else residual.float()
    rows = Rows(x.float(), weight.float(), EPS, x.shape[-1], added, exact=False)
    outputs = {"y": predict(rule, rows).to(out)}
    if residual is not None:
        outputs["residual_out"] = source(rule, rows).to(out)
    return Norm(x, weight, EPS, outputs, residual)


HF, ONE = Rule(normed=RNE), Rule()
SEEN = {  # a capture -> words that its answer must have, and its named plan
    "the sum rounded": (recorded(HF, P.x, P.norm_weight, RESIDUAL), {"x": RNE, "normed": RNE}, "hf"),
    "the sum kept": (recorded(HF.replace(x=KEEP), P.x, P.norm_weight, RESIDUAL), {"x": KEEP, "normed": RNE}, ""),
    "the sum cut": (recorded(ONE.replace(x=RTZ), P.x, P.norm_weight, RESIDUAL), {"x": RTZ, "normed": KEEP}, ""),
    "fp32 weight": (recorded(ONE, P.x, FINE), {"weight": KEEP, "hidden": RNE}, "one-rounding"),
    "fp32 weight, rounded": (recorded(ONE.replace(weight=RNE), P.x, FINE), {"weight": RNE}, "one-rounding"),
    "fp32 rows": (recorded(ONE.replace(x=KEEP), TOTAL, P.norm_weight), {"x": KEEP}, ""),
    "fp32 rows, rounded": (recorded(HF, TOTAL, P.norm_weight), {"x": RNE}, "hf"),
    "fp16": (
        recorded(Rule("fp16-rne", normed="fp16-rne", out="fp16-rne"), P.x.half(), P.norm_weight.half(), out=FP16),
        {"normed": "fp16-rne", "hidden": "fp16-rne"},
        "hf",
    ),
}


@pytest.mark.parametrize("name", SEEN)
def test_what_is_planted_is_the_answer(name: str) -> None:
    capture, words, plan = SEEN[name]
    answer = explain(capture)
    assert answer.status == "identified", answer.reason
    assert {key: answer.candidates[0][key] for key in words} == words
    assert (plan in answer.plans) if plan else not answer.plans
    there = {named for row in answer.excluded for named in row["plan"].split(", ")}
    assert "rstd-rounded" in there and not there & {*answer.plans} and all(row["wrong"] for row in answer.excluded)


@pytest.mark.parametrize("name", ["y", "residual_out"])
def test_one_wrong_element_leaves_none(name: str) -> None:
    capture = recorded(HF, P.x, P.norm_weight, RESIDUAL)
    wrong = capture.outputs[name].clone()
    wrong.view(torch.int16)[40, 7] += 2
    answer = explain(dataclasses.replace(capture, outputs=capture.outputs | {name: wrong}))
    assert answer.status == "none" and f"leaves 1 of 131072 elements, the first: {name} at token 40" in answer.reason


def test_a_sum_rounded_for_the_store_alone_is_the_plan_s_either_way() -> None:
    kept = recorded(ONE.replace(x=KEEP), P.x, P.norm_weight, RESIDUAL)
    for word in storages("bf16"):
        returned = source(Rule(word), Rows(TOTAL, FINE, EPS, 1024)).to(FP32 if word == KEEP else BF16)
        answer = explain(dataclasses.replace(kept, outputs=kept.outputs | {"residual_out": returned}))
        assert answer.status == "identified" and answer.candidates[0]["x"] == KEEP
    unread = recorded(HF, P.x, P.norm_weight, RESIDUAL)
    cut = source(Rule(RTZ), Rows(TOTAL, FINE, EPS, 1024)).to(BF16)
    assert explain(dataclasses.replace(unread, outputs=unread.outputs | {"residual_out": cut})).status == "none"


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_every_rule_of_a_sum_with_fp32_weights_lies_in_its_own_interval(dtype: torch.dtype) -> None:
    narrow = "fp16" if dtype == FP16 else "bf16"
    x, residual, weight = P.x[:2, :256].to(dtype), RESIDUAL[:2, :256].to(dtype), FINE[:256]
    capture = Norm(x, weight, EPS, {"y": x}, residual)
    assert capture.narrow == narrow
    bounds = bounds_of(capture)
    rows = Rows(x.float(), weight, EPS, 256, residual.float(), exact=False)
    words = storages(narrow)
    rules = norm_rules(outs=words, xs=words, narrow=narrow)[::7]
    for rule, word in itertools.product(rules, words):
        rule = rule.replace(weight=word)
        low, high = bounds(rule)["y"]
        y = predict(rule, rows).double()
        assert ((low <= y) & (y <= high)).all(), rule


# ---------------------------------------------------------------- files


def saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path, {"eps": str(EPS)})
    return path


def tensors_of(capture: Norm) -> dict[str, Tensor]:
    given = {"x": capture.x, "weight": capture.weight, "residual": capture.residual}
    return {name: tensor.clone() for name, tensor in given.items() if tensor is not None} | dict(capture.outputs)


def test_a_file_is_read_and_two_are_compared(tmp_path: Path) -> None:
    captures = [recorded(rule, P.x, P.norm_weight, RESIDUAL) for rule in (HF, ONE)]
    first, second = (saved(tmp_path / f"{i}.safetensors", tensors_of(each)) for i, each in enumerate(captures))
    made = read(first)
    assert isinstance(made, Norm) and made.residual is not None and torch.equal(made.residual, RESIDUAL)
    assert all(torch.equal(made.outputs[name], captures[0].outputs[name]) for name in ("y", "residual_out"))
    found = compare_captures(first, second, ANY)
    assert found.same is False and found.parts.startswith("normed") and "y element" in found.smallest
    held = tensors_of(captures[0])
    held.pop("residual_out")
    assert compare_captures(first, saved(tmp_path / "y.safetensors", held), ANY).same
    other = saved(tmp_path / "other.safetensors", held | {"residual": RESIDUAL + 1})
    with pytest.raises(UserError, match="other.safetensors has another residual than"):
        compare_captures(first, other, ANY)


def test_a_batch_counts_as_tokens(tmp_path: Path) -> None:
    tensors = tensors_of(recorded(HF, P.x, P.norm_weight))
    batch = {name: v.unflatten(0, (2, -1)) if v.ndim == 2 else v for name, v in tensors.items()}
    made = read(saved(tmp_path / "batch.safetensors", batch))
    assert made.kind == "rmsnorm" and made.tokens == len(P.x) and explain(made).plans == ["hf"]


BAD = {
    "two narrow ones": ({"weight": lambda t: t["weight"].half()}, "weight is float16 and x bfloat16"),
    "a sum of nothing": ({"residual": None}, "has no residual: residual_out is x + residual"),
    "another shape": ({"residual": lambda t: t["residual"][:, :512].clone()}, "residual has shape [64, 512]"),
    "another dtype": ({"y": lambda t: t["y"].double()}, "y is float64, expected bfloat16 or float16 or float32"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_file_ends_in_one_line(capsys, monkeypatch, tmp_path: Path, fault: str) -> None:
    changes, said = BAD[fault]
    tensors = tensors_of(recorded(HF, P.x, P.norm_weight, RESIDUAL))
    tensors |= {name: change(tensors) for name, change in changes.items() if change}
    tensors = {name: tensor for name, tensor in tensors.items() if changes.get(name, True) is not None}
    path = saved(tmp_path / "bad.safetensors", tensors)
    assert said in failure(capsys, monkeypatch, "identify", "--capture", str(path))
