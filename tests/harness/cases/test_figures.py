"""Figures of cases are those of closed forms, and those that the lab's other parts compute."""

import math

import pytest
import torch
from case_support import case

from castpoint.harness.accuracy.errors import error_stats
from castpoint.harness.cases.case import Case, Way, claims_of, described, hidden, verdict
from castpoint.harness.cases.elementwise import accumulated, shrink, summed
from castpoint.harness.cases.figures import changes, exponent, magnitude_bias, share, share_by_row, ulps
from castpoint.harness.cases.inputs import near_one, normal
from castpoint.harness.cases.norm import bf16_sum, fp32_sum
from castpoint.harness.cases.stack import exact_step, growth, stack, stack_inputs
from castpoint.kernels.plan import RNE, RTZ
from castpoint.variants.catalogue import HF, ONE_ROUNDING
from castpoint.variants.eager import eager_norm
from castpoint.variants.spec import applied_weight, store


def test_truncation_loses_a_share_of_the_mantissa() -> None:
    """1/2 ulp on average, 2^-8 / mantissa; over log-uniform mantissas 1 / mantissa averages 1 / (2 ln 2)."""
    rng = torch.Generator().manual_seed(0)
    value = torch.rand(1 << 18, generator=rng, dtype=torch.float64).exp2().float().double()
    lost = magnitude_bias(store(value, RNE), store(value, RTZ)).item()
    assert lost == pytest.approx(-(2.0**-8) / (2 * math.log(2)), rel=0.01)
    assert share(store(value, RNE), store(value, RTZ)).item() == pytest.approx(0.5, abs=0.005)


def test_the_residual_shrinks_by_half_of_calls_times_the_loss_of_one() -> None:
    """Call k's loss is a share of the residual as it was then, k / n of its final square: the sum is (n + 1) / 2."""
    c = case("change of the residual's mean magnitude")
    inputs = c.draw(torch.Generator().manual_seed(5))[0]
    before = accumulated(c.before, inputs)
    late = [{"x": x, "residual": r} for x, r in zip(inputs["calls"][40:], before[39:], strict=False)]
    pairs = [(summed(c.before, i), summed(c.after, i)) for i in late]
    one = sum(((a - b) * b.sign()).sum().item() for b, a in pairs) / sum(b.abs().sum().item() for b, _ in pairs)
    shrunk = shrink(before, accumulated(c.after, inputs))
    assert shrunk[-1].item() == pytest.approx(one * 73 / 2, rel=0.1)
    assert shrunk[-1].item() > 0.6 * one * 72, "the losses of all calls do not add up"
    assert exponent(shrunk.abs()) == pytest.approx(1.0, abs=0.1)


def test_one_plus_w_by_hand() -> None:
    """1.050048828125 -> 1.046875 and 16.8125 -> 16.75 (a tie, to even): 0.3023 % and 0.3717 %."""
    at_small = 0.003173828125 / 1.050048828125
    at_large = 0.0625 / 16.8125
    weight = torch.tensor([0.05, 15.8125], dtype=torch.bfloat16)
    c = case("error of the scale 1 + w")
    wide, narrow = applied_weight(weight, c.before), applied_weight(weight, c.after)
    assert (narrow / wide - 1).abs().tolist() == pytest.approx([at_small, at_large], rel=1e-12)
    assert case("error of the scale 1 + w").measure().measured == pytest.approx(at_small, rel=1e-12)
    assert at_large / at_small == pytest.approx(1.2, abs=0.05), "said to be 1.2 in the case's words"


def test_a_correctly_rounded_output_is_a_quarter_over_log_two_from_fp32() -> None:
    """Quarter of an ulp on average, 2^-7, in units of 2^-8 of the value: 1 / (2 mantissa) -> 1 / (4 ln 2)."""
    rng = torch.Generator().manual_seed(0)
    value = torch.rand(1 << 18, generator=rng, dtype=torch.float64).exp2()
    pick = case("mean distance to fp32 if nothing").pick
    assert pick(value, store(value, RNE)).item() == pytest.approx(1 / (4 * math.log(2)), rel=0.005)
    assert case("mean distance to fp32 if nothing").measure().measured == pytest.approx(0.3607, rel=0.02)


def test_a_row_strays_far_beyond_its_number_of_elements() -> None:
    """4,096 elements of a row share one rstd: their share of differing ones strays like that of some 30 elements."""
    c = case("elements that differ in one row of 4,096")
    inputs = c.draw(torch.Generator().manual_seed(0))[0]
    by_row = share_by_row(*(c.run(side, inputs) for side in (c.before, c.after)))
    independent = math.sqrt(by_row.mean().item() * (1 - by_row.mean().item()) / 4096)
    assert by_row.std().item() > 8 * independent


def test_sums_by_hand() -> None:
    ones = torch.ones(2, 16 * 300, dtype=torch.bfloat16)
    for storage in (RNE, RTZ):  # a lane stops at 256, where 1 is half an ulp: 16 lanes of 256, not of 300
        assert bf16_sum(storage, ones).tolist() == [[4096.0]] * 2
    few = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.bfloat16)
    assert fp32_sum(1, few).tolist() == fp32_sum(4, few).tolist() == [[30.0]]
    big = torch.tensor([[4096.0, 1.0, 1.0, 1.0]], dtype=torch.bfloat16)  # 2^24 + 1 is no fp32 number
    assert fp32_sum(1, big).item() == 2.0**24
    assert fp32_sum(2, big).item() == 2.0**24 + 2


def test_exponents_of_known_growth() -> None:
    n = torch.arange(1, 37, dtype=torch.float64)
    assert exponent(3 * n) == pytest.approx(1.0) and exponent(n.sqrt()) == pytest.approx(0.5)


def test_what_the_stack_makes_of_each_error_alone() -> None:
    """Said in case 17's words: a coherent factor of every norm grows as the stream, a root; rounding it, linearly."""
    c = case("exponent of the growth of a coherent error")
    inputs = c.draw(torch.Generator().manual_seed(3))[0]
    exact = stack(c.before, inputs)
    scaled = stack(c.after, inputs)
    added = (exact - inputs["x"].double())[-1]  # what all deltas made: 0.3 % too large, and no more after 36 layers
    along = ((scaled - exact)[-1] * added).sum() / added.square().sum()
    assert along.item() == pytest.approx(0.003, rel=0.15)
    rounded = stack(Way("stream in bf16", lambda *args: store(exact_step(*args), RNE)), inputs)
    exponents = {name: growth(s - exact) for name, s in (("scaled", scaled), ("rounded", rounded))}
    assert 0.4 < exponents["scaled"] < 0.65 and 0.85 < exponents["rounded"] < 1.15
    assert exponent(exact.square().mean((1, 2)).sqrt()) == pytest.approx(0.5, abs=0.05)


def test_products_to_nearest_by_enumeration() -> None:
    """Case 18 over all pairs of mantissas: those that truncation and nearest agree on, near what random pairs show."""
    mantissa = (128 + torch.arange(128)).double()
    product = mantissa[:, None] * mantissa
    equal = (store(product, RNE) == store(product, RTZ)).double().mean().item()
    assert equal == pytest.approx(0.5258, abs=0.01)


# ---------------------------------------------------------------- against the lab's other parts


def test_the_norm_is_hugging_faces() -> None:
    rng = torch.Generator().manual_seed(0)
    x, weight = normal(rng, 64, 512), near_one(rng, 512)
    expected = eager_norm(x, weight, 1e-6, False).double()
    differing = share(expected, hidden(HF, x=x, weight=weight)).item()
    assert differing < 1e-3 < share(expected, hidden(ONE_ROUNDING, x=x, weight=weight)).item()


def test_changes_are_those_of_error_stats() -> None:
    rng = torch.Generator().manual_seed(0)
    x, weight = normal(rng, 32, 256), near_one(rng, 256)
    before, after = (hidden(plan, x=x, weight=weight) for plan in (HF, ONE_ROUNDING.replace(hidden=RTZ)))
    stats = error_stats(actual=after.unsqueeze(1), reference=before.unsqueeze(1))
    changed = changes(before, after)
    assert changed["share_differ"] == pytest.approx(1 - stats.share_equal)
    assert changed["max_ulp"] == stats.max_ulp > 0
    assert changed["signed_bias"] == pytest.approx(stats.signed_mean) and stats.signed_mean < 0


def test_ulps_are_those_of_the_side_before() -> None:
    before = torch.tensor([1.0, 2.0, 4.0, 0.0], dtype=torch.float64)
    after = before - torch.tensor(
        [2.0**-8, 2.0**-7, 2.0**-5, 1.0]
    )  # below a power of two, where ulps are half as large
    assert ulps(before, after).tolist() == [0.5, 0.5, 1.0]


def test_a_stack_of_a_plan_is_its_spec_layer_by_layer() -> None:
    """One step by hand: norm, rounded; projection, rounded; sum, rounded."""
    inputs = stack_inputs(1)(torch.Generator().manual_seed(0))[0]
    x, projection = inputs["x"].double(), inputs["projections"][0].double()
    normed = hidden(ONE_ROUNDING, x=inputs["x"], weight=inputs["norms"][0])
    by_hand = store(x + store(normed @ projection.T, RNE), RNE)
    assert torch.equal(stack(ONE_ROUNDING, inputs)[0], by_hand)


def test_sides_in_words() -> None:
    assert described(HF) == "hf" and described(Way("a sum", torch.sum)) == "a sum"
    assert described(ONE_ROUNDING.replace(x=RTZ)) == "one-rounding with x=bf16-rtz"


def test_a_new_case_needs_no_more_than_its_fields() -> None:
    (claim,) = claims_of(
        [
            "key,case,source,where,measure,unit,claimed_text,claimed,step,claimed_low,claimed_high,why",
            "new,99,nowhere #1,out,elements that differ,share,all of them,1,0,,,fp32 values are hardly bf16 values",
        ]
    ).values()
    made = Case(
        claim,
        Way("as it is", lambda v: v.double()),
        Way("in bf16", lambda v: store(v.double(), RNE)),
        share,
        lambda rng: [{"v": torch.randn(1000, generator=rng)}],
    )
    assert verdict(made.measure(), claim) == "fits"
