"""CastPlan and the catalogue: contradictions are refused with a sentence, every named plan is another function."""

import dataclasses

import pytest

from castpoint.kernels.checks import BOUNDARIES, KEEP, RNE, RTZ
from castpoint.variants.catalogue import PLANS, plan_named
from castpoint.variants.plan import CastPlan


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


def test_catalogue_holds_distinct_plans() -> None:
    plans = [named.plan for named in PLANS.values()]
    assert len(plans) >= 12 and len(set(plans)) == len(plans)
    assert all(named.about and "\n" not in named.about for named in PLANS.values())


def test_catalogue_covers_every_boundary_and_choice() -> None:
    plans = [named.plan for named in PLANS.values()]
    assert {p.scale for p in plans} == {"prologue", "epilogue", "folded"}
    assert {p.matmul for p in plans} == {"bf16", "tf32", "tf32x3", "fp32"}
    assert {p.weight_offset for p in plans} == {"none", "fp32", "bf16-rne"}
    for boundary in BOUNDARIES[1:]:
        assert {getattr(p, boundary) for p in plans} & {RNE, RTZ}, f"no plan rounds {boundary}"


def test_unknown_plan_names_the_nearest() -> None:
    with pytest.raises(KeyError, match="did you mean 'one-rounding'"):
        plan_named("one_rounding")


def test_roundings_are_listed_in_order_of_the_chain() -> None:
    assert plan_named("hf").roundings() == ["normed", "hidden", "proj", "head_normed", "out"]
