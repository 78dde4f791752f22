"""The catalogue: every named plan is another function, and together they use every boundary and choice."""

import pytest

from castpoint.kernels.plan import BOUNDARIES, PHASE_BOUNDARIES, RNE, RTZ
from castpoint.variants.catalogue import PLANS, plan_named


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
        rounded = {getattr(p, boundary) for p in plans} & {RNE, RTZ}
        assert bool(rounded) == (boundary not in PHASE_BOUNDARIES), f"{boundary}: only the phase is fp32 in every plan"


def test_unknown_plan_names_the_nearest() -> None:
    with pytest.raises(KeyError, match="did you mean 'one-rounding'"):
        plan_named("one_rounding")
