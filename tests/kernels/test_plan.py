"""CastPlan: contradictions are refused with a sentence, and a plan is a value like others."""

import dataclasses

import pytest

from castpoint.kernels.plan import KEEP, RNE, CastPlan
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
