"""The nets of test_kernels.py catch a kernel that rounds elsewhere: every plan with every boundary moved, and every
choice made otherwise.

Kernels with a changed source: test_mutation.py.
"""

from __future__ import annotations

import pytest
from nets import (
    EXACT,
    exact_case,
    random_case,
)
from support import KERNELS, assert_bit_equal, assert_inside

from castpoint.harness.conformance.faults import moved, moves
from castpoint.kernels.plan import KEEP, RNE, ROPE_BOUNDARIES, CastPlan
from castpoint.variants.catalogue import PLANS
from castpoint.variants.eager import plan_eager, plan_weight

TINY = {"tokens": 33, "hidden_size": 200, "num_q_heads": 1, "num_kv_heads": 1, "head_dim": 32}


ALL_MOVES = [(name, *move) for name, entry in PLANS.items() for move in moves(entry.plan)]
MOVES = [move for move in ALL_MOVES if moved(PLANS[move[0]].plan, *move[1:])]


def test_only_what_contradicts_itself_is_not_moved():
    """A value that is never formed cannot be rounded, folded multiplies the bf16 x itself, and the matmul's precision
    follows from hidden, with which it was moved."""
    left_out = set(ALL_MOVES).difference(MOVES)
    for plan, name, word in left_out:
        plan = PLANS[plan].plan
        assert (
            (name == "normed" and plan.scale != "prologue")
            or (name in ("hidden", "x") and plan.scale == "folded")
            or (name == "matmul" and "bf16" in (word, plan.matmul))
        ), (plan, name, word)
    assert {("deferred", "normed", RNE), ("folded", "hidden", RNE), ("hf", "matmul", "fp32")} <= left_out


def held_to(plan: CastPlan, name: str, word: str) -> CastPlan:
    """The plan to tell from its moved self: stored in fp32, where every boundary shows, unless the store moves."""
    return plan if name == "out" else plan.replace(out="fp32")


def check_run_as(base: CastPlan, run_as: CastPlan, rope: bool) -> None:
    """Both nets of numbers, held to base, with the kernel run as another plan."""
    for kind in EXACT:
        problem, expected = exact_case(base, rope=rope, **kind, **TINY)
        for name, actual in KERNELS.run(run_as, problem).items():
            assert_bit_equal(actual=actual.double(), expected=expected[name], what=name)
    problem, allowed = random_case(base, rope=rope, **TINY)
    assert_inside(actual=KERNELS.run(run_as, problem), allowed=allowed)


UNSEEN = {  # in outputs stored as bf16: they differ by less than 2^-20 before
    *(("fp32", *move) for move in (("scale", "epilogue"), ("scale", "folded"), ("matmul", "tf32x3"))),
    *(("fp32-tf32x3", *move) for move in (("scale", "epilogue"), ("scale", "folded"), ("matmul", "fp32"))),
}


@pytest.mark.parametrize(("plan", "name", "word"), MOVES, ids=["-".join(move) for move in MOVES])
def test_exact_inputs_alone_show_a_moved_choice(plan: str, name: str, word: str):
    """The two exact problems, of which one has a residual; outputs stored as the plan does, and in fp32."""
    for base in {PLANS[plan].plan, held_to(PLANS[plan].plan, name, word)}:
        run_as, differ = moved(base, name, word), 0
        for kind in EXACT:
            problem, expected = exact_case(base, rope=name in ROPE_BOUNDARIES, **kind)
            outputs = plan_eager(run_as, problem, plan_weight(run_as, problem))
            pairs = zip(outputs, expected.values(), strict=True)
            differ += sum(int((actual.double() != wanted).sum()) for actual, wanted in pairs)
        assert (differ == 0) == ((plan, name, word) in UNSEEN and base.out != KEEP), differ


@pytest.mark.parametrize("rope", [False, True], ids=["", "rope"])
@pytest.mark.parametrize("plan", PLANS)
def test_the_plan_itself_passes(plan: str, rope: bool):
    for base in (PLANS[plan].plan, PLANS[plan].plan.replace(out="fp32")):
        check_run_as(base, base, rope)


@pytest.mark.parametrize(("plan", "name", "word"), MOVES, ids=["-".join(move) for move in MOVES])
def test_a_moved_choice_is_caught(plan: str, name: str, word: str):
    base = held_to(PLANS[plan].plan, name, word)
    with pytest.raises(AssertionError, match="elements (differ|outside)"):
        check_run_as(base, moved(base, name, word), rope=name in ROPE_BOUNDARIES)


def test_without_positions_the_boundaries_of_rope_have_no_effect():
    for name in ROPE_BOUNDARIES:
        check_run_as(PLANS["fp32"].plan, PLANS["fp32"].plan.replace(**{name: RNE}), rope=False)
