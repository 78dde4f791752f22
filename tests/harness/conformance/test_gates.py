"""Planted faults and the gates they are put before: what is planted does what it says, each gate is red on a fault and
green on right kernels, and what rows say is recomputed by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from castpoint.harness.conformance import gates
from castpoint.harness.conformance.faults import (
    ACCUMULATORS,
    PLANTED,
    RIGHT,
    RIGHTS,
    SPLITS,
    Fault,
    Summed,
    away,
    changed,
    drawn,
    faults,
    move_faults,
    rounded,
)
from castpoint.harness.conformance.gates import GATES, case, judged, rows_of
from castpoint.harness.runs.words import Gate, Status, Verdict
from castpoint.kernels.plan import KEEP, RNE
from castpoint.variants.catalogue import HF, PLANS
from castpoint.variants.eager import plan_eager, plan_weight
from castpoint.variants.envelope import outside
from castpoint.variants.spec import spec


def named(name: str, plan: str = "hf") -> Fault:
    return next(fault for fault in faults(PLANS[plan].plan) if fault.name == name)


# ---------------------------------------------------------------- what is planted


@pytest.mark.parametrize("plan", PLANS)
def test_no_two_faults_of_a_plan_have_one_name(plan: str) -> None:
    names = [fault.name for fault in [*RIGHTS, *faults(PLANS[plan].plan)]]
    assert len(set(names)) == len(names) > 40


def test_nothing_changed_is_the_plan_itself() -> None:
    problem = drawn(HF, True)
    for right, own in zip(plan_eager(HF, problem, plan_weight(HF, problem)), RIGHT.run(HF, problem), strict=True):
        assert torch.equal(right, own)


def test_a_text_that_the_source_does_not_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no 'variance - eps'"):
        changed((("variance - eps", "variance"),))


def test_a_move_that_contradicts_the_plan_is_refused() -> None:
    with pytest.raises(ValueError, match="contradicts"):
        Fault("normed", "normed", ("normed", RNE)).run(PLANS["deferred"].plan, drawn(HF, False))


def test_an_accumulator_is_rounded_as_bf16_fp32_and_truncation_are() -> None:
    rng = torch.Generator().manual_seed(0)
    wide = torch.randn(10_000, generator=rng, dtype=torch.float64) * 2.0 ** torch.randint(
        -60, 60, (10_000,), generator=rng
    )
    narrow = wide.float()
    assert torch.equal(rounded(wide, 24), narrow.double())
    assert torch.equal(rounded(narrow.double(), 8), narrow.bfloat16().double())
    cut = (narrow.view(torch.int32) & -(1 << 16)).view(torch.float32)
    assert torch.equal(rounded(narrow.double(), 8, cut=True), cut.double())
    ties = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 2.0**-8 + 2.0**-16])
    assert rounded(ties.double(), 8).tolist() == ties.bfloat16().tolist()


def test_ties_go_away_from_zero_and_nothing_else_moves() -> None:
    values = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, 1 + 2.0**-8 - 2.0**-16, 1 + 2.0**-8 + 2.0**-16])
    assert away(values, RNE).tolist() == [1 + 2.0**-7, 1 + 2.0**-6, -1 - 2.0**-7, 1.0, 1 + 2.0**-7]
    assert torch.equal(away(values, KEEP), values)


def test_sums_and_shares_are_made_as_they_say() -> None:
    """2^7 and 16 ones: 8 bits lose every one added by itself, and keep 16 of them added at once."""
    hidden, ones = torch.ones(1, 32), torch.ones(1, 32)
    ones[0, 0] = 2.0**8 - 15
    assert (hidden @ Summed(ones, bits=8).T).item() == 2.0**8 + 16
    ones[0, 0] = 2.0**8
    assert (hidden @ Summed(ones, bits=8, step=1).T).item() == 2.0**8
    assert (hidden @ Summed(ones, bits=24, step=1).T).item() == (hidden @ ones.T).item() == 2.0**8 + 31
    halves = torch.tensor([[257.0, 1.0]])  # 257 is no bf16: 256
    assert (torch.ones(1, 2) @ Summed(halves, shares=2).T).item() == 257.0


# ---------------------------------------------------------------- gates


@pytest.mark.parametrize("plan", ["hf", "fp32", "deferred", "folded", "truncating", "gemma"])
@pytest.mark.parametrize("gate", GATES)
def test_every_gate_lets_right_kernels_pass(gate: Gate, plan: str) -> None:
    for right in RIGHTS:
        row = judged(plan, right, gate, False)
        assert (row.outside, row.verdict, row.status) == (0, Verdict.UNSEEN, Status.OK), right.name


@pytest.mark.parametrize("gate", GATES)
def test_every_gate_is_red_on_a_fault(gate: Gate) -> None:
    row = judged("hf", named("head norm: mean over one channel more"), gate, False)
    assert row.verdict == Verdict.SEEN and row.outside and row.status == Status.OK


@pytest.mark.parametrize("gate", GATES)
def test_a_gate_that_sees_a_right_kernel_is_red(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, allowed = GATES[gate]

    def shifted(*arguments: object) -> dict[str, gates.Interval]:
        return {name: (low + 1e-3, high + 1e-3) for name, (low, high) in allowed(*arguments).items()}

    monkeypatch.setitem(GATES, gate, (inputs, shifted))
    case.cache_clear()
    row = judged("fp32", RIGHT, gate, False)
    case.cache_clear()
    assert row.status == Status.RED and f"{row.outside} elements of a right kernel" == row.reason


def test_a_boundary_that_is_not_there_is_no_fault() -> None:
    """Without positions nothing is rotated, so that moving cos and sin is the same function."""
    move = next(fault for fault in move_faults(HF) if fault.kind == "cos_sin")
    assert {row.verdict for row in rows_of("hf", dataclasses.replace(move, of="chain"))} == {Verdict.SAME_FUNCTION}
    assert Verdict.SAME_FUNCTION not in {row.verdict for row in rows_of("hf", move)}


def test_a_fault_that_no_inputs_show_is_unseen_not_the_same_function() -> None:
    """A variance that is rounded to bf16 hides the roundings of the sum whose squares it is the mean of."""
    fault = named("variance of the sum before it is rounded", "bf16-statistics")
    rows = [row for row in rows_of("bf16-statistics", fault) if row.gate in [*Gate]]
    assert {row.verdict for row in rows} == {Verdict.UNSEEN} and not any(row.differ for row in rows)


def test_stores_in_fp32_are_no_gate_for_the_store() -> None:
    rows = rows_of("hf", named("out: bf16-rtz instead of bf16-rne"))
    assert not [row for row in rows if row.gate in [*Gate] and Gate(row.gate).stores_fp32]


def test_eight_bits_of_an_accumulator_by_hand() -> None:
    """bf16-operand on the drawn layer: the sum of 16 products rounded to bf16 over and over, in ordinary code."""
    plan = PLANS["bf16-operand"].plan
    c = case(Gate.ENVELOPE, plan, False)
    hidden, weight = spec(plan, c.problem).hidden, c.problem.qkv_weight.double()
    total = torch.zeros(c.problem.tokens, weight.shape[0], dtype=torch.float64)
    for k in range(0, hidden.shape[1], 16):
        total = (total + hidden[:, k : k + 16] @ weight[:, k : k + 16].T).float().bfloat16().double()
    wrong = spec(plan, c.problem, product=total).outputs().values()
    found = sum(int(outside(w, allowed).sum()) for w, allowed in zip(wrong, c.allowed, strict=True))
    row = judged("bf16-operand", ACCUMULATORS[0], Gate.ENVELOPE, False)
    assert row.verdict == Verdict.SEEN and abs(row.outside - found) < 0.01 * found


def test_truncated_k_by_hand() -> None:
    """hf with head_normed truncated, on exact inputs: elements of q and k that are not the spec's, in ordinary code."""
    c = case(Gate.ONE_PRODUCT, HF, False)
    chain, count = spec(HF, c.problem), 0
    heads = chain.proj[:, :6] * chain.head_rstd
    normed = (heads.float().view(torch.int32) & -(1 << 16)).view(torch.float32)
    weights = c.problem.q_norm_weight, c.problem.k_norm_weight
    for value, weight, right in zip(normed.split([4, 2], 1), weights, (chain.q, chain.k), strict=True):
        count += int(((value * weight.float()).bfloat16().double() != right).sum())
    row = judged("hf", named("head_normed: bf16-rtz instead of bf16-rne"), Gate.ONE_PRODUCT, False)
    assert count and (row.outside, row.verdict) == (count, Verdict.SEEN)


def test_the_published_blind_spots_of_exact_inputs_are_there() -> None:
    """One product a dot product: split-K's partial sums in bf16 change nothing that bf16-operand computes."""
    row = judged("bf16-operand", SPLITS[0], Gate.ONE_PRODUCT_FP32, False)
    assert (row.differ, row.verdict) == (0, Verdict.UNSEEN)
    assert judged("bf16-operand", SPLITS[0], Gate.ENVELOPE, False).verdict == Verdict.SEEN


def test_what_is_planted_in_a_norm_changes_a_norm() -> None:
    rng = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 64, generator=rng).bfloat16(), (5 * torch.randn(64, generator=rng)).bfloat16()
    right = RIGHT.run_norm(HF, x, weight, 0.01)
    assert torch.equal(one_rounding(x, weight), RIGHT.run_norm(PLANS["one-rounding"].plan, x, weight, 1e-6))
    for fault in [f for f in PLANTED if f.of == "norm" and f.name != "ties away from zero"]:
        assert not torch.equal(fault.run_norm(HF, x, weight, 0.01), right), fault.name


def one_rounding(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (64,), weight, 1e-6)
