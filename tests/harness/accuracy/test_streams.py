"""What massive tokens change: the physics, planted faults, and the study from command to table."""

import dataclasses
from pathlib import Path

import pytest
import torch

import castpoint.harness.__main__ as cli
import castpoint.harness.accuracy.streams as streams
from castpoint.harness.accuracy.streams import costs, kernel, massive_layers, narrow
from castpoint.harness.problems.drawn import synthetic_problem
from castpoint.harness.problems.streams import with_published_stream
from castpoint.harness.report.streams import section
from castpoint.harness.runs.frames import latest
from castpoint.harness.runs.records import Records, load_runs
from castpoint.kernels.plan import RTZ
from castpoint.variants.backends import run
from castpoint.variants.catalogue import plan_named
from castpoint.variants.eager import eager
from castpoint.variants.problem import Problem
from castpoint.variants.spec import spec, truth


@pytest.fixture(scope="module")
def massive() -> Problem:
    return with_published_stream(narrow(synthetic_problem("qwen3-1.7b", 3, 16)), 0)


def test_the_layers_are_those_that_a_massive_token_enters() -> None:
    assert massive_layers("qwen3-1.7b") == (3, 15, 27) and massive_layers("qwen3-8b") == (7, 21, 35)


def test_narrow_keeps_whole_groups_of_heads() -> None:
    problem = synthetic_problem("qwen3-8b", 7, 2)
    few = narrow(problem)
    assert (few.num_q_heads, few.num_kv_heads) == (8, 2)
    for mine, its in zip(
        spec(plan_named("hf"), few).outputs().values(), spec(plan_named("hf"), problem).outputs().values(), strict=True
    ):
        assert torch.equal(mine, its[:, : mine.shape[1]])


def test_the_k_norm_divides_out_what_rounds_before_the_matmul(massive: Problem) -> None:
    """Of the massive token alone; nor is it so of that token without its two channels."""
    found = dict(costs(massive, "hf", truth(massive), eager(massive)))
    assert abs(found["first token"]["before_matmul"]) < 0.1 < 0.3 < found["other tokens"]["before_matmul"]
    first, others = found["first token"], found["other tokens"]
    assert first["k_rel_rms"] < 0.9 * others["k_rel_rms"] and first["k_equal"] > 1.3 * others["k_equal"]
    bf16_operand = dict(costs(massive, "bf16-operand", truth(massive), eager(massive)))
    assert bf16_operand["first token"]["k_equal"] > 0.9 > 0.65 > bf16_operand["other tokens"]["k_equal"]
    assert bf16_operand["first token"]["v_rel_rms"] > 1.5 * bf16_operand["first token"]["k_rel_rms"]
    x = massive.x.clone()
    x[0, x[0].abs().topk(2).indices] = 0
    ordinary = massive.replace(x=x)
    found = dict(costs(ordinary, "hf", truth(ordinary), eager(ordinary)))
    assert found["first token"]["before_matmul"] > 0.15


def test_the_k_norm_keeps_the_factor_of_a_second_large_channel(massive: Problem) -> None:
    """Unless both channels happen to round alike, so several sizes are tried; qwen3-8b's is near the first."""
    equal = []
    for size in (3472, 5000, 7008, 10000):
        x = massive.x[:1].clone()
        x[0, x[0].argmin()] = -size
        two = massive.replace(x=x)
        found = dict(costs(two, "bf16-operand", truth(two), eager(two)))
        equal.append(found["first token"]["k_equal"])
    assert min(equal) < 0.9  # of one large channel more: above


def test_all_tokens_are_the_first_and_the_others(massive: Problem) -> None:
    found = dict(costs(massive, "one-rounding", truth(massive), eager(massive)))
    for column in ("k_equal", "k_equal_eager"):
        assert found["all tokens"][column] == pytest.approx(
            (found["first token"][column] + 15 * found["other tokens"][column]) / 16
        )


def test_kernels_hold_on_massive_tokens_and_a_moved_boundary_is_seen(massive: Problem, monkeypatch) -> None:
    for part, found in kernel(massive, "hf"):
        tokens = len(range(*streams.PARTS[part].indices(16)))
        assert found["outside"] == 0 and found["elements"] == tokens * 8 * 128 and "status" not in found
    for boundary in ("proj", "out"):
        other = dataclasses.replace(plan_named("hf"), **{boundary: RTZ})
        monkeypatch.setattr(streams, "run", lambda plan, *rest, other=other: run(other, *rest))
        found = dict(kernel(massive, "hf"))
        assert all(found[part]["status"] == "red" and found[part]["outside"] > 0 for part in streams.PARTS), boundary


def test_the_study_writes_its_rows_once_and_its_table(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(streams, "MODELS", ("qwen3-1.7b",))
    monkeypatch.setattr(streams, "PLANS", {name: streams.PLANS[name] for name in ("hf", "fp32", "gemma")})
    monkeypatch.setattr(streams, "massive_layers", lambda model: (3,))
    monkeypatch.setattr(streams, "DRAWS", 1)
    monkeypatch.setattr(streams, "TOKENS", 4)
    monkeypatch.setattr(streams, "KERNEL_TOKENS", 2)
    broken = streams.costs

    def failing(problem: Problem, plan: str, *rest: object):
        if plan == "fp32" and "published" in problem.weights:
            raise RuntimeError("no memory")
        return broken(problem, plan, *rest)

    monkeypatch.setattr(streams, "costs", failing)
    cli.study("streams", tmp_path, "cpu")
    printed = capsys.readouterr().out
    run_id, frame = latest(tmp_path, "streams")
    assert load_runs(tmp_path)[run_id]["command"] == "streams"
    counts = frame.groupby(["backend", "plan"]).size().to_dict()
    assert counts == {
        ("eager, batch of 1", "hf"): 6, ("spec", "hf"): 6, ("spec", "fp32"): 4,
        ("triton", "hf"): 6, ("triton", "fp32"): 6, ("triton", "gemma"): 6,
    }  # fmt: skip
    assert list(frame.query("status == 'failed'")["reason"]) == ["RuntimeError: no memory"]
    headings = "| figure | drawn stream | published sizes | drawn, first token | published, first token, qwen3-1.7b |"
    assert headings in printed and "no memory" in printed
    lines = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in printed.splitlines()}
    assert lines["K equal to PyTorch's: hf"][0].endswith("%") and lines["K correctly rounded: fp32"][-1] == "– |"
    assert lines["largest value of x"][1] == lines["largest value of x"][3].removesuffix(" |") == "14,016"
    outside = lines["elements of all plans' kernels outside their envelope"]
    assert outside[0] == "0 of 6,144" and outside[2] == "0 of 3,072"
    monkeypatch.setattr(streams, "spec", None)
    monkeypatch.setattr(streams, "run", None)
    streams.sweep_streams(Records.of_run(tmp_path, run_id))
    assert len(latest(tmp_path, "streams")[1]) == len(frame), "measured again"
    assert section(frame).startswith("## Massive tokens\n\nqwen3-1.7b (layers 3); weights drawn")
