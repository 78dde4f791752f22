"""The audit passes every kernel of the catalogue. Needs no GPU.

What it turns red for: test_source.py, test_machine.py. Other people's kernels: test_foreign.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from audit_support import in_process

from castpoint.harness.audit.kernels import audit_case
from castpoint.harness.compiled.compile import TARGETS, binaries
from castpoint.harness.runs.schema import AuditRow
from castpoint.variants.catalogue import PLANS

MULTIPLY = ("norm_qkv", "quantised")


def chosen(target: str) -> list[tuple[str, str, dict]]:
    """The cases of that target; of the kernels that configs ask for few but on sm_90: TTIR is the same everywhere."""
    found = list(binaries(target))
    if target == "sm_90":
        return found
    few = [("rms_norm", {"stores"}), ("head_norm", {"packed"}), ("norm_qkv", {"config", "tokens"})]
    return [
        (kernel, plan, words)
        for kernel, plan, words in found
        if kernel != "rms_norm" and not words.keys() & {"config", "packed"}
        or plan == "hf" and (kernel, set(words)) in few
    ]  # fmt: skip


def catalogue(target: str) -> Iterator[dict]:
    for kernel, plan, keywords in chosen(target):
        yield audit_case(target, kernel, plan, keywords)


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_rounds_as_its_plan_declares(target: str, tmp_path: Path):
    rows = in_process(catalogue, target, cache=tmp_path)
    wanted = [(kernel, plan, " ".join(f"{k}={v}" for k, v in words.items())) for kernel, plan, words in chosen(target)]
    assert [(row["kernel"], row["plan"], row["keywords"]) for row in rows] == wanted
    assert not [row["reason"] for row in rows if row["status"] != "ok"]
    for row in rows:
        assert row.keys() == {field.name for field in fields(AuditRow)} and row["target"] == target
        plan = PLANS[row["plan"]].plan
        assert row["fused"] == 0 and row["not_followed"] == ""
        assert bool(row["matrix"]) == (row["kernel"] in MULTIPLY and (plan.matmul != "fp32" or target == "gfx942"))
        declared, found = (
            {word.split()[-2] for word in row[name].split(", ") if word} for name in ("declared", "ttir")
        )
        assert declared == found  # the words of a boundary: `normed bf16-rne`, `2 x out bf16-rne`
        in_code = {word.split()[0] for word in row["machine"].split(", ") if word}
        again = "unrotated" if "rope=" in row["keywords"] else "out"  # of a head without norm, which proj is already
        assert in_code == found - ({again} if "head_norm=" in row["keywords"] and plan.proj != "fp32" else set())


def test_split_k_is_audited_where_it_is_launched():
    asked = {
        target: [words["config"].kernel for _, _, words in binaries(target) if "config" in words] for target in TARGETS
    }
    assert all(("split-k" in asked[target]) == (target != "gfx942") for target in TARGETS)


def other_weights(target: str) -> Iterator[dict]:
    """A kernel that truncates weights, asked for as one that rounds them, and as one that truncates; and one that
    rounds them, asked for as one that keeps them."""
    from castpoint.harness.audit.kernels import audit_compiled
    from castpoint.harness.compiled.compile import compile_quantised

    plan, wide = PLANS["hf"].plan, PLANS["fp32"].plan
    truncating = compile_quantised(plan, target, weight="bf16-rtz")
    yield audit_compiled(truncating, plan, {"weight": "bf16-rtz"})
    yield audit_compiled(truncating, plan, {})
    yield audit_compiled(compile_quantised(wide, target), wide, {"weight": "fp32"})


def test_weights_held_otherwise_are_red(tmp_path: Path):
    right, nearest, kept = in_process(other_weights, "sm_90", cache=tmp_path)
    assert right["status"] == "ok" and nearest["status"] == kept["status"] == "red"
    assert "TTIR: weight is rounded (bf16-rtz) on its way to proj, the plan says bf16-rne" in nearest["reason"]
    assert "TTIR: weight is rounded (bf16-rne) on its way to proj, the plan keeps it" in kept["reason"]
