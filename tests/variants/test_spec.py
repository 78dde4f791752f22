"""The spec against the real thing: transformers' own modules, F.rms_norm, and closed forms."""

import time

import pytest
import torch
import torch.nn.functional as F
from support import pinned_share, without_onednn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RMSNorm

from castpoint.harness.problems.drawn import synthetic_problem
from castpoint.variants.catalogue import PLANS, plan_named
from castpoint.variants.eager import eager, eager_norm
from castpoint.variants.envelope import envelope, outside
from castpoint.variants.problem import Problem
from castpoint.variants.spec import spec, truth


@pytest.fixture(scope="module")
def problem() -> Problem:
    return synthetic_problem("qwen3-0.6b", layer=0, tokens=64)


def assert_explained(problem: Problem, plan_name: str, outputs: tuple[torch.Tensor, ...]) -> None:
    """Every element within the plan's envelope, and so at least the pinned share equal to the spec, bit for bit."""
    plan = plan_named(plan_name)
    bounds, values = envelope(plan, problem), spec(plan, problem).outputs()
    for name, actual in zip("qkv", outputs, strict=True):
        wrong = int(outside(actual, bounds[name]).sum())
        assert wrong == 0, f"{name}: {wrong} elements that no order of summation explains"
        equal = (actual.double() == values[name]).double().mean().item()
        assert equal >= pinned_share(bounds[name]) > 0.9


def share_outside(problem: Problem, plan_name: str, outputs: tuple[torch.Tensor, ...]) -> float:
    bounds = envelope(plan_named(plan_name), problem)
    return max(outside(a, b).double().mean().item() for a, b in zip(outputs, bounds.values(), strict=True))


def transformers_outputs(problem: Problem) -> tuple[torch.Tensor, ...]:
    """q, k, v by transformers' own modules, with the problem's weights."""
    p = problem
    config = Qwen3Config(
        hidden_size=p.hidden_size,
        num_attention_heads=p.num_q_heads,
        num_key_value_heads=p.num_kv_heads,
        head_dim=p.head_dim,
        rms_norm_eps=p.eps,
    )
    norm = Qwen3RMSNorm(p.hidden_size, p.eps).to(torch.bfloat16)
    attention = Qwen3Attention(config, layer_idx=0).to(torch.bfloat16)
    heads = (p.num_q_heads, p.num_kv_heads, p.num_kv_heads)
    q_weight, k_weight, v_weight = p.qkv_weight.split([h * p.head_dim for h in heads])
    with torch.no_grad():
        for parameter, value in (
            (norm.weight, p.norm_weight),
            (attention.q_proj.weight, q_weight),
            (attention.k_proj.weight, k_weight),
            (attention.v_proj.weight, v_weight),
            (attention.q_norm.weight, p.q_norm_weight),
            (attention.k_norm.weight, p.k_norm_weight),
        ):
            parameter.copy_(value)
        hidden = norm(p.x)
        q = attention.q_norm(attention.q_proj(hidden).view(p.tokens, p.num_q_heads, p.head_dim))
        k = attention.k_norm(attention.k_proj(hidden).view(p.tokens, p.num_kv_heads, p.head_dim))
        v = attention.v_proj(hidden).view(p.tokens, p.num_kv_heads, p.head_dim)
    return q, k, v


def test_hf_plan_is_what_transformers_computes(problem: Problem) -> None:
    outputs = transformers_outputs(problem)
    assert_explained(problem, "hf", outputs)
    assert_explained(problem, "hf", eager(problem))
    assert share_outside(problem, "one-rounding", outputs) > 0.1, "the test would not notice another plan"


def test_eager_norm_is_transformers_norm_bit_for_bit(problem: Problem) -> None:
    for module, offset in ((Qwen3RMSNorm, False), (Gemma3RMSNorm, True)):
        norm = module(problem.hidden_size, problem.eps).to(torch.bfloat16)
        with torch.no_grad():
            norm.weight.copy_(problem.norm_weight)
            expected = norm(problem.x)
        actual = eager_norm(problem.x, problem.norm_weight, problem.eps, offset)
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)


def test_one_rounding_plan_is_f_rms_norm(problem: Problem) -> None:
    p = problem
    hidden = F.rms_norm(p.x, (p.hidden_size,), p.norm_weight, p.eps)
    q, k, v = p.split_heads(F.linear(hidden, p.qkv_weight))
    q = F.rms_norm(q, (p.head_dim,), p.q_norm_weight, p.eps)
    k = F.rms_norm(k, (p.head_dim,), p.k_norm_weight, p.eps)
    assert_explained(problem, "one-rounding", (q, k, v))
    assert share_outside(problem, "hf", (q, k, v)) > 0.1, "the test would not notice another plan"


def test_gemma_plan_is_what_transformers_computes() -> None:
    problem = synthetic_problem("gemma-3-270m", layer=3, tokens=32)
    p = problem

    def norm(value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        module = Gemma3RMSNorm(weight.shape[0], p.eps).to(torch.bfloat16)
        with torch.no_grad():
            module.weight.copy_(weight)
            return module(value)

    q, k, v = p.split_heads(F.linear(norm(p.x, p.norm_weight), p.qkv_weight))
    outputs = (norm(q, p.q_norm_weight), norm(k, p.k_norm_weight), v)
    assert_explained(problem, "gemma", outputs)
    assert share_outside(problem, "gemma-bf16-offset", outputs) > 0.1, "the test would not notice another plan"


def test_f_rms_norm_without_eps_uses_that_of_fp32() -> None:
    x = torch.full((1, 64), 1e-4)
    assert torch.equal(F.rms_norm(x, (64,)), F.rms_norm(x, (64,), eps=torch.finfo(torch.float32).eps))
    assert not torch.equal(F.rms_norm(x, (64,)), F.rms_norm(x, (64,), eps=1e-6))


def test_truth_is_the_formula_in_float64(problem: Problem) -> None:
    p, chain = problem, truth(problem)
    x = p.x.double()
    hidden = x / (x.square().mean(-1, keepdim=True) + p.eps).sqrt() * p.norm_weight.double()
    _, k, v = p.split_heads(hidden @ p.qkv_weight.double().T)
    k = k / (k.square().mean(-1, keepdim=True) + p.eps).sqrt() * p.k_norm_weight.double()
    for actual, expected in ((chain.k, k), (chain.v, v)):
        assert ((actual - expected).abs() <= 1e-12 * expected.abs().max()).all()


def test_spec_depends_on_no_order_of_summation(problem: Problem) -> None:
    """Channels permuted, with weights: the same function, other sums. fp32 arithmetic changes, the spec does not."""
    order = torch.randperm(problem.hidden_size, generator=torch.Generator().manual_seed(1))
    permuted = problem.replace(
        x=problem.x[:, order], norm_weight=problem.norm_weight[order], qkv_weight=problem.qkv_weight[:, order]
    )
    for name in ("hf", "bf16-operand", "fp32"):
        one, other = (spec(plan_named(name), p).outputs() for p in (problem, permuted))
        assert all(torch.equal(one[output], other[output]) for output in "qkv"), name
    assert not torch.equal(eager(problem)[2], eager(permuted)[2]), "the permutation moved no sum"


def test_plan_and_problem_must_agree_on_the_weight_offset(problem: Problem) -> None:
    with pytest.raises(ValueError, match="weight_offset=True"):
        spec(plan_named("gemma"), problem)
    with pytest.raises(ValueError, match="gemma plans"):
        spec(plan_named("hf"), problem.replace(weight_offset=True))


def test_all_plans_over_all_layers_take_less_than_a_minute() -> None:
    problems = [
        {offset: synthetic_problem("qwen3-0.6b", layer, 128, weight_offset=offset) for offset in (False, True)}
        for layer in range(28)
    ]
    start, processor = time.monotonic(), time.process_time()
    for kinds in problems:
        for named in PLANS.values():
            spec(named.plan, kinds[named.plan.weight_offset != "none"])
    two_cores = (time.process_time() - processor) / 2  # the machine may be doing something else as well
    assert min(time.monotonic() - start, two_cores) < 60


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int) -> None:
    problem = synthetic_problem("qwen3-0.6b", 5, tokens)
    assert spec(plan_named("hf"), problem).k.shape == (tokens, 8, 128)


def test_nan_and_infinity_flow_as_in_eager(problem: Problem) -> None:
    x = problem.x.clone()
    x[1, 7], x[2, 9], x[3, 11] = float("nan"), float("inf"), -float("inf")
    poisoned = problem.replace(x=x)
    with without_onednn():
        wanted = eager(poisoned)
    for expected, actual in zip(wanted, spec(plan_named("hf"), poisoned).outputs().values(), strict=True):
        assert torch.equal(expected.isnan(), actual.isnan()) and expected.isnan()[1:4].all()
