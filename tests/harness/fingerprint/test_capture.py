"""Captures: what is planted is among the candidates, what is wrong is excluded, and bad files end in one line."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from commands import failure
from safetensors.torch import save_file
from torch import Tensor

from castpoint.harness import __main__ as cli
from castpoint.harness.fingerprint import captured
from castpoint.harness.fingerprint.bounds import before_proj, bounds_of, flat, input_plans
from castpoint.harness.fingerprint.capture import Capture, Chain, Norm, read
from castpoint.harness.fingerprint.captured import explain, holds, misses, words
from castpoint.harness.fingerprint.known import drawn_chains, norm_plans, recorded_chain, recorded_norm, told_apart
from castpoint.harness.fingerprint.norm_facts import NORM_WORDS
from castpoint.harness.fingerprint.rules import (
    ORDERS,
    ROOTS,
    Rows,
    Rule,
    arithmetic,
    mean_of_squares,
    norm_rules,
    predict,
    two_step,
)
from castpoint.harness.fingerprint.sizes import Sizes
from castpoint.harness.problems.drawn import synthetic_problem
from castpoint.kernels.plan import KEEP, RNE, RTZ
from castpoint.variants.catalogue import PLANS, plan_named
from castpoint.variants.eager import eager, eager_norm
from castpoint.variants.envelope import envelope
from castpoint.variants.problem import Problem


def small(tokens: int = 8) -> Problem:
    """A cut of Qwen3-0.6B's layer."""
    return recorded_chain(plan_named("hf"), tokens).problem


def eager_chain(tokens: int = 8, **changes: Tensor | None) -> Chain:
    problem = small(tokens).replace(**changes)
    return Chain(problem, dict(zip("qkv", eager(problem), strict=True)))


def rows_of(capture: Norm) -> Rows:
    return Rows(capture.x.float(), capture.weight.float(), capture.eps, capture.x.shape[-1], exact=False)


def one_changed(capture: Capture, name: str, place: int = -1) -> Capture:
    """The capture with one element of that output two ulps off, the last if none is said."""
    output = capture.outputs[name].clone()
    output.view(torch.int16).flatten()[place] += 2
    capture.outputs[name] = output
    return capture


# ---------------------------------------------------------------- which plans


@pytest.mark.parametrize("plan", [named.plan for named in PLANS.values()] + drawn_chains(4), ids=str)
def test_a_planted_chain_explains_all_and_is_never_excluded(plan) -> None:
    capture = recorded_chain(plan, 8)
    shown = plan.without_rope()
    assert not misses([shown], capture)[shown].wrong
    assert bounds_of(capture)(shown)["q"][0].shape == capture.outputs["q"].shape


def test_eager_is_hf_and_every_other_named_plan_is_excluded() -> None:
    answer = explain(eager_chain(64))
    assert (answer.status, answer.plans) == ("identified", ["hf"])
    assert {name for row in answer.excluded for name in row["plan"].split(", ")} == set(PLANS) - {"hf"}
    assert all(row["wrong"] > 100 and row["of"] == 64 * 512 for row in answer.excluded)


@pytest.mark.parametrize("name", ["fp32", "deferred", "folded", "bf16-statistics", "gemma"])
def test_a_planted_chain_is_found_in_the_whole_family(name: str) -> None:
    capture = recorded_chain(plan_named(name), 64)
    answer = explain(capture)
    assert name in answer.plans
    planted = words(plan_named(name), capture)
    assert any(holds(candidate, planted) for candidate in answer.candidates)
    assert all(holds(c, {n: planted[n] for n in ("hidden", "proj", "head_normed")}) for c in answer.candidates)


def test_plans_that_store_the_same_are_one_candidate_and_the_reason_says_so() -> None:
    answer = explain(recorded_chain(plan_named("fp32"), 64))
    assert answer.status == "identified" and answer.plans == ["fp32-tf32x3", "fp32"]
    assert answer.candidates[0]["matmul"] == "tf32x3 or fp32"
    assert answer.reason.startswith("not one of 64 tokens like these tells apart:")


def test_with_bias_residual_and_without_head_norms() -> None:
    rng = torch.Generator().manual_seed(3)
    p = small()
    bias = torch.randn(512, generator=rng).to(torch.bfloat16)
    residual = torch.randn(p.x.shape, generator=rng).to(torch.bfloat16)
    answer = explain(eager_chain(16, bias=bias, q_norm_weight=None, k_norm_weight=None))
    assert "hf" in answer.plans and "head_rstd" not in answer.candidates[0]
    capture = eager_chain(8, residual=residual, bias=bias)
    hf = plan_named("hf").without_rope()
    found = misses([hf, hf.replace(x=KEEP), hf.replace(x=RTZ)], capture)
    assert [bool(missed.wrong) for missed in found.values()] == [False, True, True]


def test_fp32_outputs_are_held_to_their_last_bits() -> None:
    plan = plan_named("hf").without_rope().replace(out=KEEP)
    answer = explain(recorded_chain(plan, 64))
    assert answer.status == "identified" and answer.candidates[0]["out"] == KEEP
    assert answer.plans == []


@pytest.mark.parametrize(
    ("name", "place", "where"),
    [("k", -1, "k at token 7, head 0, channel 127"), ("v", 0, "v at token 0, head 0, channel 0")],
)
def test_one_corrupted_element_leaves_none_and_is_named(name: str, place: int, where: str) -> None:
    answer = explain(one_changed(eager_chain(), name, place))
    assert answer.status == "none" and not answer.candidates and not answer.plans
    assert f"leaves 1 of 4096 elements, the first: {where}" in answer.reason
    assert answer.nearest is not None and answer.nearest["head_normed"] == RNE
    assert answer.excluded[0]["plan"] == "hf" and answer.excluded[0]["wrong"] == 1


def test_tokens_beyond_a_block_are_held_to_the_plan_too() -> None:
    capture = one_changed(eager_chain(captured.BLOCK + 3), "v")
    hf = plan_named("hf").without_rope()
    missed = misses([hf], capture)[hf]
    assert missed.wrong == 1 and missed.of == (captured.BLOCK + 3) * 512
    assert f"v at token {captured.BLOCK + 2}, head 0, channel 127" in missed.first


# ---------------------------------------------------------------- single norms


def test_every_rule_of_a_norm_lies_in_its_own_interval() -> None:
    p = synthetic_problem(tokens=6)
    capture = Norm(p.x, p.norm_weight, 1e-6, {})
    bounds, rows = bounds_of(capture), rows_of(capture)
    rules = norm_rules(outs=(KEEP, RNE, RTZ))
    assert len(rules) == 3969 and {rule.root for rule in rules} == {*ROOTS}
    assert {rule.eps for rule in rules} == {"float32", "bf16 sum", "bf16"}
    for rule in rules:
        low, high = bounds(rule)["y"]
        y = predict(rule, rows).double()
        assert ((low <= y) & (y <= high)).all(), rule


def test_fp32_arithmetic_of_any_usual_kind_lies_in_the_same_interval() -> None:
    p = synthetic_problem(tokens=64)
    even = torch.where(p.x < 0, -0.996, 0.996).to(torch.bfloat16)  # a root just above 1, where an ulp is the most
    capture = Norm(torch.cat([p.x, even]), p.norm_weight, 1e-6, {})
    bounds, rows = bounds_of(capture), rows_of(capture)
    for rule in (Rule(), Rule(out=KEEP), Rule(rstd=RNE, out=KEEP), Rule(variance=RNE, out=KEEP)):
        low, high = bounds(rule)["y"]
        made = [predict(other, rows) for other in arithmetic(rule) if rule.rstd == KEEP or other.root == rule.root]
        variance = mean_of_squares(rule, rows)
        made.append(predict(rule, dataclasses.replace(rows), two_step(rule, variance, 1e-6)))
        if rule.variance == RNE:  # rsqrt.approx, two ulps off, and products in any order
            exact = (variance + 1e-6).rsqrt()
            ulp = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 24)
            for order, steps in itertools.product(ORDERS, ((exact / ulp + 2).floor(), (exact / ulp - 2).ceil())):
                made.append(predict(rule.replace(order=order), dataclasses.replace(rows), (steps * ulp).float()))
        assert all(((low <= y.double()) & (y.double() <= high)).all() for y in made), rule


def test_the_intervals_of_a_norm_are_narrow() -> None:
    p = synthetic_problem(tokens=16)
    bounds = bounds_of(Norm(p.x, p.norm_weight, 1e-6, {}))
    for rule in (Rule(), Rule(normed=RNE), Rule(rstd=RNE, normed=RTZ, out=RTZ)):
        low, high = flat(bounds(rule))
        assert (low != high).double().mean() < 0.01


@pytest.mark.parametrize("offset", [False, True])
def test_an_eager_norm_is_its_plan(offset: bool) -> None:
    p = synthetic_problem(tokens=64)
    y = eager_norm(p.x, p.norm_weight, 1e-6, offset)
    answer = explain(Norm(p.x, p.norm_weight, 1e-6, {"y": y}))
    assert answer.status == "identified" and answer.plans == (["gemma"] if offset else ["hf"])
    assert answer.candidates[0]["root"] == "rsqrt or sqrt", "an ulp of fp32 is not asked"


def test_heads_and_a_norm_in_bf16() -> None:
    p = synthetic_problem(tokens=32)
    x = p.x.reshape(32, 8, 128)
    rule = Rule(statistics=RNE, variance=RNE, eps="bf16 sum", root="1/sqrt", rstd=RNE, normed=RNE)
    y = predict(rule, Rows(x.float(), p.norm_weight[:128].float(), 1e-6, 128, exact=False)).bfloat16()
    answer = explain(Norm(x, p.norm_weight[:128], 1e-6, {"y": y}))
    assert answer.kind == "head_norm" and {"head_rstd", "head_normed", "out"} < {*answer.candidates[0]}
    named = {NORM_WORDS["head_norm"].get(n, n): w for n, w in vars(rule).items() if n in ("rstd", "root", "eps")}
    assert any(holds(candidate, named) for candidate in answer.candidates)
    assert all(candidate["root"] == "1/sqrt" for candidate in answer.candidates)


# ---------------------------------------------------------------- how much a capture tells


def test_power_grows_with_tokens_and_no_planted_plan_is_lost(capsys) -> None:
    subjects = ((recorded_chain, drawn_chains(4), (1, 16)), (recorded_norm, norm_plans()[30::250], (1, 64)))
    for record, plans, tokens in subjects:
        told, lost = zip(*(told_apart(plans, count, record) for count in tokens), strict=True)
        with capsys.disabled():
            print(f"\n{record.__name__}: of {len(plans)} plans, share told apart by {tokens} tokens: {told}")
        assert not any(lost) and told[0] < told[1] and told[1] > 0.6


def test_as_many_more_tokens_as_it_says_decide() -> None:
    plan = drawn_chains(1)[0]
    answer = explain(recorded_chain(plan, 1))
    assert answer.status == "undecided" and len(answer.candidates) > 2
    more = max(pair["tokens"] for pair in answer.more_tokens)
    assert f"{more} more tokens like these" in answer.reason
    assert explain(recorded_chain(plan, 1 + more)).status == "identified"


def test_the_family_of_a_chain_holds_every_named_plan() -> None:
    p = small()
    named = {before_proj(plan.plan.without_rope()) for plan in PLANS.values()}
    assert named <= {before_proj(plan) for plan in input_plans(p, (RNE, RTZ))}
    ends = bounds_of(Chain(p, {}))(plan_named("hf").without_rope())
    assert all(
        torch.equal(a, b)
        for n, pair in envelope(plan_named("hf"), p).items()
        for a, b in zip(pair, ends[n], strict=True)
    )


# ---------------------------------------------------------------- files


def tensors_of(capture: Chain) -> dict[str, Tensor]:
    names = ("x", "norm_weight", "qkv_weight", "q_norm_weight", "k_norm_weight")
    return {name: getattr(capture.problem, name).clone() for name in names} | dict(capture.outputs)


def saved(path: Path, tensors: dict[str, Tensor], **metadata: object) -> Path:
    said = {name: str(value) for name, value in metadata.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, said)
    return path


def test_a_file_is_read_flat_or_by_heads_with_what_it_or_the_user_says(tmp_path: Path) -> None:
    tensors = tensors_of(eager_chain())
    flat_ = {name: t.flatten(1) if name in ("q", "k", "v") else t for name, t in tensors.items()}
    said = read(saved(tmp_path / "a", flat_, eps=1e-6, num_q_heads=2, num_kv_heads=1))
    by_user, by_shape = saved(tmp_path / "b", tensors), saved(tmp_path / "c", flat_, eps=1e-6)
    for other in (read(by_user, Sizes(eps=1e-6)), read(by_shape)):
        assert isinstance(other, Chain) and isinstance(said, Chain)
        assert all(torch.equal(other.outputs[name], tensors[name]) for name in ("q", "k", "v"))
        assert other.problem.eps == said.problem.eps == 1e-6


def nan_in(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.flatten()[3] = torch.nan
    return tensor


BAD = {  # what is wrong -> how the tensors change (None: removed), metadata, words of the one line
    "missing": ({"v": None}, {}, "has no v: a chain's capture holds x, norm_weight, qkv_weight, q, k, v"),
    "neither": ({"q": None, "k": None, "v": None}, {}, "has no q, k, v"),
    "unknown": ({"residaul": lambda t: t["x"] + 1}, {}, "holds residaul, which is no part of a capture"),
    "input dtype": ({"x": lambda t: t["x"].float()}, {}, "x is float32, expected bfloat16"),
    "output dtype": ({"q": lambda t: t["q"].half()}, {}, "q is float16, expected bfloat16 or float32"),
    "two dtypes": ({"k": lambda t: t["k"].float()}, {}, "k and q differ in dtype"),
    "nan": ({"v": lambda t: nan_in(t["v"])}, {}, "v holds NaN or infinity in 1 elements"),
    "nan in x": ({"x": lambda t: nan_in(t["x"])}, {}, "x holds NaN or infinity in 1 elements"),
    "width": ({"norm_weight": lambda t: t["norm_weight"][:128]}, {}, "norm_weight"),
    "tokens": ({"k": lambda t: t["k"][:3]}, {}, "k has shape [3, 1, 128], expected [8, 1, 128] or flat"),
    "one head norm": ({"k_norm_weight": None}, {}, "k_norm_weight"),
    "empty": ({"x": lambda t: t["x"][:0]}, {}, "x is empty, of shape [0, 256]"),
    "one-dimensional": ({"q": lambda t: t["q"].flatten()}, {}, "a flat q does not"),
    "eps missing": ({}, {"eps": None}, "does not say eps: put it into the file's metadata, or give --eps"),
    "eps": ({}, {"eps": "small"}, "eps of its metadata is no number"),
    "eps zero": ({}, {"eps": 0}, "eps must be a positive number, not 0"),
    "heads": ({}, {"num_q_heads": 3}, "qkv_weight"),
    "half a head": ({}, {"num_q_heads": 1.5}, "num_q_heads must be a positive whole number, not 1.5"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_file_ends_in_one_line(capsys, monkeypatch, tmp_path: Path, fault: str) -> None:
    changes, metadata, said = BAD[fault]
    tensors = tensors_of(eager_chain())
    tensors |= {name: change(tensors) for name, change in changes.items() if change}
    tensors = {name: t for name, t in tensors.items() if changes.get(name, True) is not None}
    metadata = {name: value for name, value in ({"eps": 1e-6} | metadata).items() if value is not None}
    path = saved(tmp_path / "bad.safetensors", tensors, **metadata)
    assert said in failure(capsys, monkeypatch, "identify", "--capture", str(path))


@pytest.mark.parametrize(
    ("tensors", "options", "said"),
    [
        ({"weight": [64], "y": [4, 64]}, "", "has no x: a norm's capture holds x, weight, y"),
        ({"x": [4, 64], "weight": [32], "y": [4, 64]}, "--eps 1e-6", "weight has shape [32], expected [64]"),
        ({"x": [4, 64], "weight": [64], "y": [5, 64]}, "--eps 1e-6", "y has shape [5, 64], expected [4, 64]"),
        ({"x": [64], "weight": [64], "y": [64]}, "--eps 1e-6", "x has shape [64], expected [T, D] or [T, H, Dh]"),
        ({"x": [4, 64], "weight": [64], "y": [4, 64]}, "--eps 1e-6 --width 64", "leave out other options"),
        ({"x": [4, 64], "weight": [64], "y": [4, 64]}, "--eps 1e-6 --expect deferred", "use --kind qkv"),
    ],
)
def test_a_bad_norm_ends_in_one_line(capsys, monkeypatch, tmp_path: Path, tensors, options: str, said: str) -> None:
    held = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in tensors.items()}
    path = saved(tmp_path / "norm.safetensors", held)
    assert said in failure(capsys, monkeypatch, "identify", "--capture", str(path), *options.split())


def test_no_file_a_text_and_neither_end_in_one_line(capsys, monkeypatch, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("x")
    assert "is no file" in failure(capsys, monkeypatch, "identify", "--capture", str(tmp_path / "nothing"))
    assert "no safetensors file" in failure(capsys, monkeypatch, "identify", "--capture", str(text))
    assert "takes one of MODULE:FUNCTION, --command" in failure(capsys, monkeypatch, "identify")
    twice = saved(tmp_path / "twice", tensors_of(eager_chain()), eps=1e-6)
    assert "and --eps says 1e-05" in failure(capsys, monkeypatch, "identify", "--capture", str(twice), "--eps", "1e-5")


def test_the_command_answers_in_words_and_json_and_refuses_another_plan(capsys, monkeypatch, tmp_path: Path) -> None:
    path = str(saved(tmp_path / "good.safetensors", tensors_of(eager_chain(64)), eps=1e-6))

    def printed(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["harness", "identify", "--capture", path, *arguments])
        with pytest.raises(SystemExit) as status:
            cli.main()
        assert not status.value.code
        return capsys.readouterr().out

    text = printed("--expect", "hf")
    assert text.startswith("identified") and "\n= hf\n" in text and "not one-rounding: " in text
    found = json.loads(printed("--json"))
    assert found["status"] == "identified" and found["tokens"] == 64 and found["elements"] == 64 * 512
    assert 0 < found["wrongly_excluded"] < 1e-3 and found["excluded"][0]["wrong"] > 0
    why = failure(capsys, monkeypatch, "identify", "--capture", path, "--expect", "one-rounding")
    assert "is not one-rounding: it leaves " in why and "token 0" in why
