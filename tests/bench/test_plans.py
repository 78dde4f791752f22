"""pytest-benchmark over the plans: `make compare`. Errors travel in extra_info beside the times.

On a CPU each plan runs through Inductor with its roundings kept, on a GPU through its compiled Triton kernel.
"""

import pytest
import torch

from castpoint.harness.accuracy.errors import error_stats
from castpoint.harness.problems.drawn import synthetic_problem
from castpoint.variants.backends import compiled_eager, compiled_plan, run_triton
from castpoint.variants.catalogue import PLANS
from castpoint.variants.eager import eager, plan_weight
from castpoint.variants.problem import Problem
from castpoint.variants.spec import spec, truth

TOKENS = (1, 128)


def problem_for(tokens: int, weight_offset: bool, device: str) -> Problem:
    return synthetic_problem("qwen3-0.6b", 0, tokens, weight_offset=weight_offset).to(device)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("plan_name", PLANS)
def test_plan(benchmark, device: str, plan_name: str, tokens: int) -> None:
    plan = PLANS[plan_name].plan
    problem = problem_for(tokens, plan.weight_offset != "none", device)
    weight = plan_weight(plan, problem)
    if device == "cuda":
        backend, call = "triton", lambda: synchronized(run_triton(plan, problem, qkv_weight=weight))
    else:
        backend, call = "inductor", lambda: compiled_plan(plan)(problem, weight)
    outputs = benchmark.pedantic(call, rounds=20, warmup_rounds=3)
    references = {
        "truth": truth(problem).outputs(),
        "eager": dict(zip("qkv", eager(problem), strict=True)),
        "spec": spec(plan, problem).outputs(),
    }
    benchmark.extra_info.update(
        model=problem.model, weights=problem.weights, tokens=tokens, plan=plan_name, backend=backend
    )
    for reference, values in references.items():
        stats = error_stats(actual=outputs[1], reference=values["k"])
        benchmark.extra_info[f"k_vs_{reference}"] = stats.row()
        assert stats.rel_rms < 1, f"{plan_name}: K is unrelated to {reference}"


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("baseline", ["eager", "torch.compile"])
def test_baseline(benchmark, device: str, baseline: str, tokens: int) -> None:
    problem = problem_for(tokens, False, device)
    function = eager if baseline == "eager" else compiled_eager()
    outputs = benchmark.pedantic(lambda: synchronized(function(problem)), rounds=20, warmup_rounds=3)
    stats = error_stats(actual=outputs[1], reference=truth(problem).k)
    benchmark.extra_info.update(tokens=tokens, plan="hf", backend=baseline, k_vs_truth=stats.row())


def synchronized(outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    if outputs[0].is_cuda:
        torch.cuda.synchronize()
    return outputs
