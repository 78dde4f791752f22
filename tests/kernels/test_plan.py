"""CastPlan: contradictions are refused with a sentence, a plan is a value like others, and one argument of a kernel."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton.language as tl
from support import ROOT

from castpoint.kernels.plan import BOUNDARIES, CHOICES, KEEP, RNE, STORAGE, CastPlan, words
from castpoint.variants.catalogue import plan_named


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scale": "epilogue", "normed": RNE}, "x * rstd is never formed"),
        ({"scale": "folded", "hidden": RNE}, "no x * w_in to round"),
        ({"scale": "folded", "hidden": KEEP, "matmul": "fp32"}, "matmul must be 'bf16'"),
        ({"scale": "folded", "hidden": KEEP, "x": KEEP}, "x rounded"),
        ({"hidden": KEEP}, "a bf16 matmul needs hidden in bf16"),
        ({"matmul": "tf32"}, "products of bf16 values are exact"),
        ({"proj": "bf16"}, "fp32, bf16-rne, bf16-rtz, not 'bf16'"),
        ({"scale": "epilog"}, "prologue, epilogue, folded, not 'epilog'"),
        ({"weight_offset": "bf16-rtz"}, "none, fp32, bf16-rne"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError) as error:
        CastPlan(**changes)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_plans_are_frozen_and_hashable() -> None:
    plan = CastPlan()
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.proj = RNE
    assert {plan: 1}[CastPlan()] == 1


def test_roundings_are_listed_in_order_of_the_chain() -> None:
    assert plan_named("hf").roundings() == ["normed", "hidden", "proj", "head_normed", "out"]


# ---------------------------------------------------------------- one argument of a kernel


def test_a_kernel_reads_every_word_as_a_constant() -> None:
    """Triton 3.6 does not compile a kernel that reads a plain string out of its argument."""
    plan = plan_named("truncating")
    for name, word in plan.choices().items():
        read = getattr(words(plan), name)
        assert isinstance(read, tl.constexpr) and read.value == word


def test_plans_that_differ_in_one_word_print_differently() -> None:
    """Word by word, contradictions or not: Triton's caches know the argument by what it prints."""
    for name in (*BOUNDARIES, *CHOICES):
        plans = []
        for word in CHOICES.get(name, STORAGE):
            plans.append(object.__new__(CastPlan))
            vars(plans[-1]).update(CastPlan().choices() | {name: word})
        assert len({str(words(plan)) for plan in plans}) == len(plans), name
        assert len({words(plan) for plan in plans}) == len(plans), name


BINARIES = """
import json
from triton.runtime.jit import compute_cache_key
from castpoint.harness.compiled import compile as compiling
from castpoint.kernels.plan import CastPlan, Words

class Blind(Words):
    def __repr__(self):
        return super().__repr__().replace(f"head_normed={self.plan.head_normed!r}, ", "")

for seen in (Blind, Words):
    compiling.words = seen
    plans = CastPlan(), CastPlan(head_normed="bf16-rne")
    machine = [compiling.compile_head_norm(plan, "sm_80", head_dim=16).asm["ptx"] for plan in plans]
    keys = [compute_cache_key({}, [("constexpr", seen(plan))], {}) for plan in plans]  # of launches in one process
    print(json.dumps([len(set(machine)), len(set(keys))]))
"""


def test_a_word_that_is_not_printed_would_give_another_plans_binary(tmp_path: Path) -> None:
    """The planted fault is one: two plans share the binary of the first. With every word there are two."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = {**kept, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", BINARIES], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert [json.loads(line) for line in run.stdout.splitlines()] == [[1, 1], [2, 2]]


def test_plans_are_named_without_torch_and_triton() -> None:
    """The report is written where neither is."""
    code = "import castpoint.variants.catalogue, sys; assert not {'torch', 'triton'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
