"""RoPE behind the head norm: its boundaries in the plan, the spec against the real thing, the kernels against the spec.

That each of its roundings and each step of its arithmetic is noticed is shown in test_mutation.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from launches import CONFIGS, TINY, expressible
from nets import (
    SMALL,
    check_envelope,
    check_exact,
    check_exact_fp32,
    check_far_positions,
    check_memory,
    exact_case,
    random_case,
)
from support import KERNELS, assert_bit_equal, pinned_share, random_problem
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding, apply_rotary_pos_emb

from castpoint.harness.problems.drawn import THETA, synthetic_problem, with_positions
from castpoint.harness.problems.exact import exact_problem
from castpoint.kernels.head_norm import head_norm
from castpoint.kernels.norm_qkv import norm_qkv
from castpoint.kernels.plan import DEFAULT, KEEP, RNE, ROPE_BOUNDARIES
from castpoint.variants.backends import run
from castpoint.variants.catalogue import PLANS, plan_named
from castpoint.variants.eager import eager, plan_eager, plan_weight
from castpoint.variants.envelope import envelope, outside
from castpoint.variants.rope import frequencies
from castpoint.variants.spec import spec, truth, with_table

GEOMETRIES = {
    "heads of 16": {**SMALL, "tokens": 70, "hidden_size": 72, "head_dim": 16},
    "one token, heads of 128": {**SMALL, "tokens": 1, "hidden_size": 40, "head_dim": 128},
    "heads of 256": {**SMALL, "tokens": 3, "hidden_size": 40, "num_q_heads": 1, "head_dim": 256},
    "heads of 64 without head norm": {**SMALL, "tokens": 17, "head_dim": 64, "head_norm": False},
}


# ---------------------------------------------------------------- the spec against the real thing


def transformers_table(positions: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [1, T, head_dim] as Qwen3 makes them, here in fp32."""
    config = Qwen3Config(head_dim=head_dim, hidden_size=head_dim, num_attention_heads=1)
    config.rope_parameters = {"rope_type": "default", "rope_theta": THETA}
    return Qwen3RotaryEmbedding(config)(torch.zeros(1), positions[None])


def fp32_table(rows: int, head_dim: int) -> torch.Tensor:
    """cos and sin [rows, head_dim] of THETA as a plan that rounds nothing on the way holds them."""
    still = random_problem(tokens=rows, head_dim=head_dim)
    return with_table(DEFAULT, still.replace(positions=torch.arange(rows), theta=THETA)).cos_sin_cache


def test_the_table_is_qwen3s():
    """Up to what forming the angle in fp32 errs by: each phase by an ulp of the frequency and one of the product, whose
    halves are ours."""
    positions = torch.tensor([0, 1, 2, 100, 4095])
    cos, sin = (value[0, :, :64].double() for value in transformers_table(positions, 128))
    ours = fp32_table(4096, 128)[positions].double()
    allowed = (3 * positions[:, None] * 2.0**-24 + 2.0**-24).double()
    assert ((ours[:, :64] - cos).abs() <= allowed).all() and ((ours[:, 64:] - sin).abs() <= allowed).all()
    assert not ((ours[:, :64] - sin).abs() <= allowed).all(), "the test would not notice an exchange"


@pytest.fixture(scope="module")
def problem():
    """Layer 0 of Qwen3-0.6B, 48 tokens from position 3000 on, cos and sin as transformers makes them."""
    drawn = synthetic_problem(layer=0, tokens=48)
    positions = torch.arange(3000, 3048)
    cos, sin = (value[0, :, : drawn.head_dim // 2] for value in transformers_table(torch.arange(3048), drawn.head_dim))
    return drawn.replace(positions=positions, theta=THETA, cos_sin_cache=torch.cat([cos, sin], dim=1).contiguous())


def transformers_rope(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """apply_rotary_pos_emb of bf16 q and k [T, H, Dh], with the table cast to bf16 as the model casts it."""
    cos, sin = (value.to(q.dtype) for value in transformers_table(positions, q.shape[-1]))
    rotated = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    return tuple(value[0].transpose(0, 1) for value in rotated)


def test_eager_rotates_as_transformers_does_bit_for_bit(problem):
    q, k, v = eager(problem.replace(positions=None, cos_sin_cache=None))
    for actual, expected in zip(eager(problem), (*transformers_rope(q, k, problem.positions), v), strict=True):
        assert_bit_equal(actual=actual, expected=expected)


@pytest.mark.parametrize(
    "moved", [{"unrotated": KEEP}, {"cos_sin": KEEP}, {"products": KEEP}], ids=lambda change: next(iter(change))
)
def test_hf_is_what_transformers_computes_and_no_other_plan_is(problem, moved):
    plan = plan_named("hf")
    outputs = dict(zip("qkv", eager(problem), strict=True))
    bounds = envelope(plan, problem)
    assert not any(outside(outputs[name], bounds[name]).any() for name in "qkv")
    assert min(pinned_share(ends) for ends in bounds.values()) > 0.9
    other = envelope(plan.replace(**moved), problem)
    assert outside(outputs["k"], other["k"]).double().mean() > 0.02, "the test would not notice another plan"


def test_one_rounding_is_rope_in_fp32_on_stored_heads(problem):
    """What FlashInfer's kernel computes from an fp32 cos_sin_cache: bf16 in, fp32 arithmetic, one rounding."""
    p = problem
    hidden = F.rms_norm(p.x, (p.hidden_size,), p.norm_weight, p.eps)
    q, k, _v = p.split_heads(F.linear(hidden, p.qkv_weight))
    bounds = envelope(plan_named("one-rounding"), problem)
    cos, sin = p.cos_sin_cache[p.positions][:, None].chunk(2, dim=-1)
    for name, heads, weight in (("q", q, p.q_norm_weight), ("k", k, p.k_norm_weight)):
        first, second = F.rms_norm(heads, (p.head_dim,), weight, p.eps).float().chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).bfloat16()
        assert not outside(turned, bounds[name]).any()


def test_truth_is_a_complex_product(problem):
    before, after = truth(problem.replace(positions=None, cos_sin_cache=None)), truth(problem)
    angles = torch.outer(problem.positions.double(), frequencies(THETA, problem.head_dim))
    turn = torch.complex(angles.cos(), angles.sin())[:, None]
    for name in ("q", "k"):
        first, second = getattr(before, name).chunk(2, dim=-1)
        expected = torch.complex(first, second) * turn
        actual = torch.complex(*getattr(after, name).chunk(2, dim=-1))
        assert (actual - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert torch.equal(before.v, after.v)


def test_position_zero_turns_nothing():
    plan = plan_named("one-rounding")
    still = random_problem()
    zero = with_positions(still).replace(positions=torch.zeros(still.tokens, dtype=torch.int64))
    for (name, expected), actual in zip(
        KERNELS.run(plan, still).items(), KERNELS.run(plan, zero).values(), strict=True
    ):
        assert_bit_equal(actual=actual, expected=expected, what=name)


def test_a_cache_in_bf16_is_a_rounded_one():
    plan = plan_named("hf").replace(out="fp32")
    problem, expected = exact_case(plan, rope=True, **SMALL)
    stored = problem.replace(cos_sin_cache=with_table(plan, problem).cos_sin_cache.bfloat16())
    for name, actual in KERNELS.run(plan.replace(cos_sin=KEEP), stored).items():
        assert_bit_equal(actual=actual, expected=expected[name], what=name)


# ---------------------------------------------------------------- the kernels against the spec


def test_exact_problems_turn_pairs_of_which_both_count():
    chain = spec(plan_named("fp32"), exact_problem(plan_named("fp32"), rope=True))
    for value in (chain.q, chain.k):
        assert ((value != 0).sum(-1) == 2).all()  # two channels before, the same two behind, each from both


@pytest.mark.parametrize("plan", PLANS)
def test_equals_the_spec_bit_for_bit(plan: str):
    check_exact(KERNELS, plan, rope=True, **SMALL)
    check_exact_fp32(KERNELS, plan, rope=True, **SMALL)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("plan", ["hf", "folded", "fp32-tf32x3"])
def test_equals_the_spec_at_other_sizes(plan: str, geometry: str):
    check_exact_fp32(KERNELS, plan, rope=True, **GEOMETRIES[geometry])


@pytest.mark.parametrize(("plan", "config"), expressible(("hf", "one-rounding", "deferred", "truncating")))
def test_every_config_equals_the_spec(plan: str, config: str):
    check_exact(KERNELS, plan, rope=True, config=CONFIGS[config], separate=False, **TINY)


@pytest.mark.parametrize("config", ["split-k", "separate"])
def test_configs_without_a_head_norm(config: str):
    check_exact(KERNELS, "hf", rope=True, head_norm=False, config=CONFIGS[config], separate=False, **TINY)


@pytest.mark.parametrize("plan", PLANS)
def test_pytorch_equals_the_spec_bit_for_bit(plan: str):
    plan = PLANS[plan].plan.replace(out="fp32")
    problem, expected = exact_case(plan, rope=True, **SMALL)
    for actual, wanted in zip(plan_eager(plan, problem, plan_weight(plan, problem)), expected.values(), strict=True):
        assert_bit_equal(actual=actual, expected=wanted)


def test_inductor_equals_the_spec_bit_for_bit():
    plan = plan_named("hf").replace(out="fp32")
    problem, expected = exact_case(plan, rope=True, **SMALL)
    for actual, wanted in zip(run(plan, problem, "inductor"), expected.values(), strict=True):
        assert_bit_equal(actual=actual, expected=wanted)


@pytest.mark.parametrize("plan", PLANS)
def test_bias_residual_and_scattered_positions_within_the_envelope(plan: str):
    check_envelope(KERNELS, plan, rope=True, **SMALL)
    _problem, allowed = random_case(PLANS[plan].plan, rope=True, **SMALL)
    assert min(pinned_share(ends) for ends in allowed.values()) > 0.8


def test_memory_around_the_outputs_stays_as_it_was():
    for options in ({}, {"separate": True}, {"config": CONFIGS["split-k"]}, {"config": CONFIGS["separate"]}):
        check_memory(KERNELS, "hf", rope=True, **options)


def test_rows_of_the_cache_beyond_2_31_elements():
    check_far_positions(KERNELS)


def test_the_head_norm_by_itself_rotates_and_rope_needs_no_norm():
    plan = plan_named("hf")
    problem = with_table(plan, random_problem(rope=True))
    chain = spec(plan, problem)
    _q, k, _v = problem.split_heads(chain.proj)
    rope = (problem.positions, problem.cos_sin_cache)
    whole = head_norm(k.bfloat16(), problem.k_norm_weight, problem.eps, *rope, plan=plan)
    normed = head_norm(k.bfloat16(), problem.k_norm_weight, problem.eps, plan=plan)
    assert_bit_equal(actual=head_norm(normed, None, problem.eps, *rope, plan=plan), expected=whole)
    assert not torch.equal(normed, whole)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"positions": None}, "given together"),
        ({"cos_sin_cache": None}, "given together"),
        ({"positions": torch.zeros(4, dtype=torch.int64)}, r"positions must have shape \[33\], not \[4\]"),
        ({"positions": torch.zeros(33, dtype=torch.int32)}, "positions must be torch.int64"),
        ({"cos_sin_cache": torch.zeros(512, 16)}, r"cos_sin_cache must have shape \[512, 32\]"),
        ({"cos_sin_cache": torch.zeros(512)}, r"cos_sin_cache must have shape \['positions', 32\], not \[512\]"),
        ({"cos_sin_cache": torch.zeros(512, 32, dtype=torch.float16)}, "torch.float32 or torch.bfloat16, not torch.f"),
        ({"cos_sin_cache": torch.zeros(32, 512).T}, "cos_sin_cache must be contiguous"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(changes, words):
    inputs = {
        **random_problem(rope=True).replace(cos_sin_cache=fp32_table(512, 32)).inputs(),
        **changes,
    }
    with pytest.raises(ValueError, match=words) as error:
        norm_qkv(**inputs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("head_dim", [8, 33, 80])
def test_heads_that_fill_no_tile_are_refused(head_dim: int):
    with pytest.raises(ValueError, match=f"must be 16, 32, 64 and so on, not {head_dim}"):
        random_problem(head_dim=head_dim, rope=True)


def test_a_position_beyond_the_cache_is_refused_at_the_door():
    problem = random_problem(rope=True).replace(cos_sin_cache=fp32_table(512, 32))
    for wrong in (-1, 512):
        with pytest.raises(ValueError, match="positions must lie in 0 to 511"):
            problem.replace(positions=torch.full((problem.tokens,), wrong))
    spoilt = problem.cos_sin_cache.clone()
    spoilt[problem.positions[3], 1] = torch.inf
    with pytest.raises(ValueError, match="cos_sin_cache holds NaN or infinity at these positions"):
        problem.replace(cos_sin_cache=spoilt)


def test_plans_say_what_their_users_rope_does():
    """At six boundaries, of which no plan rounds the three of the phase."""
    named = {name: [getattr(entry.plan, b) for b in ROPE_BOUNDARIES] for name, entry in PLANS.items()}
    assert {tuple(words[1:4]) for words in named.values()} == {(KEEP, KEEP, KEEP)}
    named = {name: (words[0], *words[4:]) for name, words in named.items()}
    assert named["hf"] == named["gemma"] == (RNE, RNE, RNE)
    assert named["one-rounding"] == (RNE, KEEP, KEEP)
    assert {named[name] for name in ("bf16-operand", "fp32", "deferred", "folded")} == {(KEEP, KEEP, KEEP)}
