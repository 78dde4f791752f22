"""Other people's tolerances: what the file says of each test, and that verdicts are those of torch's own comparison."""

from __future__ import annotations

import re

import pytest
import torch

from castpoint.harness.conformance.faults import PLANTED, RIGHT, TURNED
from castpoint.harness.conformance.tolerances import (
    Tolerance,
    chain_row,
    drawn,
    norm_faults,
    norm_rows,
    norms,
    own_summary,
    rotation,
    summary,
    tolerance_of,
    tolerances,
)
from castpoint.harness.runs.schema import GateRow
from castpoint.harness.runs.words import Gate, Status, Verdict
from castpoint.variants.catalogue import HF, PLANS
from castpoint.variants.eager import eager_norm

NAMES = [test.name for test in tolerances()]


def named(name: str) -> Tolerance:
    return tolerances()[NAMES.index(name)]


def test_every_row_leads_to_one_file_at_one_commit() -> None:
    assert len(set(NAMES)) == len(NAMES) >= 10
    for test in tolerances():
        assert re.fullmatch(r"https://github\.com/[\w-]+/[\w-]+/blob/[0-9a-f]{40}/.+\.py", test.url), test.name
        assert test.plan in PLANS and test.stored in ("bf16", "fp32") and test.shapes and test.eps
        assert all(len(shape) == (3 if test.positions else 2) for shape in test.shapes)


def test_a_row_that_says_nothing_is_refused() -> None:
    row = dict.fromkeys(["peer", "test", "plan", "stored", "x", "weight", "url", "positions", "theta"], "")
    with pytest.raises(ValueError):
        tolerance_of(row | {"atol": "0.1", "rtol": "", "eps": "1e-6", "shapes": "2x3"})
    with pytest.raises(ValueError):
        drawn("normal", (2, 3), torch.Generator())


def test_inputs_are_drawn_as_the_row_says() -> None:
    rng, shape = torch.Generator().manual_seed(0), (400, 500)
    for words, mean, deviation in (
        ("N(0, 1)", 0, 1), ("N(1, 0.1)", 1, 0.1), ("N(0, 1/2D)", 0, 1e-3), ("U(0, 1)", 0.5, 12**-0.5), ("1", 1, 0),
    ):  # fmt: skip
        value = drawn(words, shape, rng)
        assert value.dtype == torch.bfloat16 and value.shape == shape
        assert value.double().mean().item() == pytest.approx(mean, abs=0.01 * (deviation + 1e-9) + 1e-9), words
        assert value.double().std().item() == pytest.approx(deviation, rel=0.01, abs=1e-12), words


def test_angles_are_those_of_the_positions() -> None:
    cos, sin = rotation(named("vLLM: q/k norm + RoPE"), (4, 20, 128))
    assert cos.shape == sin.shape == (4, 1, 128)
    assert cos[2, 0, 0].item() == cos[2, 0, 64].item() == pytest.approx(torch.tensor(2.0).cos().item())
    assert sin[3, 0, 1].item() == pytest.approx((3 * torch.tensor(10000.0) ** (-2 / 128)).sin().item())


@pytest.mark.parametrize("name", NAMES)
def test_the_comparison_is_torch_s(name: str) -> None:
    test, rng = named(name), torch.Generator().manual_seed(0)
    reference = torch.randn(4000, generator=rng, dtype=torch.float64)
    actual = reference + 0.01 * torch.randn(4000, generator=rng, dtype=torch.float64)
    actual[0] = torch.nan
    assert torch.equal(~test.outside(actual, reference), torch.isclose(actual, reference, test.rtol, test.atol))


@pytest.mark.parametrize("name", NAMES)
def test_every_test_lets_the_right_norm_pass_and_sees_a_wrong_one(name: str) -> None:
    for norm in norms(named(name)):
        reference = norm.reference(named(name).stored)
        assert not named(name).outside(norm.run(RIGHT), reference).any()
        zeroed = next(fault for fault in PLANTED if fault.name == "last token not written")
        assert named(name).outside(norm.run(zeroed), reference).any()


def test_liger_s_verdicts_by_hand() -> None:
    """One rounding instead of two, and the weight of the channel before, in a norm with weights of one: its numbers
    pass both. A mean over one channel more too, and with the last token missing none does."""
    test = named("Liger: RMSNorm")
    assert (test.atol, test.rtol) == (0.2, 0.02)
    rows = {row.fault: row for row in norm_rows(test)}
    passed = {name for name, row in rows.items() if row.verdict == Verdict.UNSEEN}
    assert {"head_normed: fp32 instead of bf16-rne", "weight of the channel before"} <= passed
    assert "last token not written" not in passed
    rng, found = torch.Generator().manual_seed(0), True
    for tokens, width in ((256, 512), (615, 123)):
        rng.manual_seed(0)
        x, ones = torch.randn(tokens, width, generator=rng).bfloat16(), torch.ones(width).bfloat16()
        wide = x.float()
        wrong = ones * (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / (width + 1) + 1e-6)).bfloat16()
        found &= torch.allclose(wrong, eager_norm(x, ones, 1e-6, False), atol=test.atol, rtol=test.rtol)
    assert found and "head norm: mean over one channel more" in passed


def test_weights_of_one_are_told_from_weights() -> None:
    """The same fault, unseen where every weight is one and seen where they differ, by tolerances of one size."""
    fault = "weight of the channel before"
    ones, normal = (
        {row.fault: row for row in norm_rows(named(name))}[fault] for name in ("Liger: RMSNorm", "FlagGems: RMSNorm")
    )
    assert (ones.differ, ones.verdict, normal.verdict) == (0, Verdict.UNSEEN, Verdict.SEEN)


def test_only_a_gate_of_ours_is_red_for_a_right_kernel() -> None:
    right = (torch.ones(4),) * 3
    moved = (torch.tensor([1, 1, 1, 1.01]), *right[1:])
    bitwise = named("RL-Kernel: q/k norm + RoPE, ROCm")
    row = chain_row(bitwise, "hf", RIGHT, moved, right)
    assert (row.elements, row.differ, row.outside) == (12, 1, 1)
    assert (row.verdict, row.status) == (Verdict.SEEN, Status.OK)
    assert chain_row(named("Liger: RMSNorm"), "hf", RIGHT, moved, right).verdict == Verdict.UNSEEN
    wider = tuple(value.double() for value in right)
    assert chain_row(named("Liger: RMSNorm"), "hf", PLANTED[0], wider, right).verdict == Verdict.SEEN, "another dtype"


def test_what_a_norm_shows_is_planted_in_it() -> None:
    plain, rotated = norm_faults(named("vLLM: RMSNorm")), norm_faults(named("vLLM: q/k norm + RoPE"))
    assert {fault.kind for fault in rotated} - {fault.kind for fault in plain} == {
        "unrotated", "cos_sin", "products", TURNED,
    }  # fmt: skip
    assert all(fault.plan(HF) is None or fault.plan(HF).out != "fp32" for fault in rotated)


def test_a_summary_counts_what_no_gate_sees() -> None:
    def row(fault: str, gate: str, verdict: Verdict, kind: str = "proj", differ: str = "0") -> dict[str, str]:
        return vars(GateRow(plan="hf", fault=fault, kind=kind, gate=gate, verdict=verdict)) | {"differ": differ}

    test = named("Liger: RMSNorm")
    rows = [
        row("a", Gate.ONE_PRODUCT, Verdict.SEEN), row("a", Gate.ENVELOPE, Verdict.UNSEEN),
        row("b", Gate.ONE_PRODUCT, Verdict.UNSEEN), row("b", Gate.ENVELOPE, Verdict.UNSEEN),
        row("c", Gate.ONE_PRODUCT, Verdict.SAME_FUNCTION), row("c", Gate.ENVELOPE, Verdict.SAME_FUNCTION),
        row("none", Gate.ENVELOPE, Verdict.SEEN, RIGHT.kind), row("b", test.name, Verdict.UNSEEN),
        row("n", f"{test.name}, by itself", Verdict.UNSEEN), row("m", f"{test.name}, by itself", Verdict.SEEN),
        row("o", f"{test.name}, by itself", Verdict.UNSEEN, differ="7"),
    ]  # fmt: skip
    both = own_summary("both", [Gate.ONE_PRODUCT, Gate.ENVELOPE], rows)
    assert (both.chain_passed, both.chain_faults, both.right_refused, both.right_kernels) == (1, 2, 1, 1)
    liger = summary(test, rows)
    assert (liger.chain_passed, liger.chain_faults, liger.norm_passed, liger.norm_faults) == (1, 1, 2, 3)
    assert (liger.passed, liger.norm_hidden, liger.url) == ("n; o", 1, test.url)
