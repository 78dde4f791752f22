"""Errors and amplification of every plan, written to records.

Each sweep asks the records what they have, measures what is missing, and goes on past a case that fails.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import torch
from torch import Tensor

from castpoint.harness.accuracy.amplification import amplification, channel_gains, k_before
from castpoint.harness.accuracy.errors import error_stats, ulp_histogram
from castpoint.harness.problems.drawn import problem_at, synthetic_problem
from castpoint.harness.problems.exact import exact_problem
from castpoint.harness.problems.geometry import geometry_named
from castpoint.harness.runs.progress import track
from castpoint.harness.runs.records import TABLES, Records
from castpoint.harness.runs.settings import Settings
from castpoint.variants.backends import run
from castpoint.variants.catalogue import plan_named
from castpoint.variants.eager import eager
from castpoint.variants.envelope import envelope, outside
from castpoint.variants.plan import CastPlan
from castpoint.variants.problem import Problem
from castpoint.variants.spec import Chain, spec, truth

# On a CPU the second structure is left to the tests: interpreted, it says nothing that they do not. On a GPU Inductor,
# the plans' way to run compiled on a CPU, is left out: it is timed nowhere there.
KERNEL_BACKENDS = {"cpu": ("triton", "inductor"), "cuda": ("triton", "triton-separate")}
UNIFORM_K_NORMS = (1.0, 64.0)  # controls: no amplification, and one by a power of two, the same in every channel
DRAWS = 5  # seeds, the settings' own first: how far one draw of weights and inputs can be trusted


def sweep_precision(settings: Settings, records: Records) -> None:
    """Errors and amplification of the spec of every plan, and of eager, on every layer."""
    s = settings
    for layer in track(s.layers, "errors and amplification"):
        for stored_as_offset, names in by_storage(s.plans):
            if not offset_fits(s, stored_as_offset):
                for name in names:
                    _refused(records, s, layer, name)
                continue
            problem = problem_at(s, layer, s.tokens, names[0])
            _layer_precision(records, s, problem, names)
            if layer == s.layers[0]:
                _noise_floor(records, s, problem)
                _first_layer_details(records, s, problem, names)
        if layer == s.layers[0] and s.checkpoint is None and geometry_named(s.model).head_norm:
            for uniform in UNIFORM_K_NORMS:
                control = synthetic_problem(s.model, layer, s.tokens, s.seed, uniform_k_norm=uniform)
                fitting = [n for n in s.plans if (plan_named(n).weight_offset != "none") == control.weight_offset]
                _layer_precision(records, s, control.to(s.device), fitting)
            _draws(records, s, layer)


def sweep_kernels(settings: Settings, records: Records) -> None:
    """Every plan's kernels on the first layer, against truth, eager and the plan's spec; what is red gets no time."""
    for name in track(settings.plans, "kernels"):
        for backend in KERNEL_BACKENDS[settings.device]:
            _kernel_errors(records, settings, settings.layers[0], name, backend)


def _layer_precision(records: Records, s: Settings, problem: Problem, names: list[str]) -> None:
    """Rows of one problem. The row of v against eager comes last for each plan: it says that the plan is complete."""
    todo = [n for n in names if not records.has("errors", **_key(problem, n, "spec", "v", "eager"))]
    if not todo:
        return
    exact = truth(problem)
    true_values = _values(problem, exact)
    eager_values = _eager_values(problem)
    for output, value in eager_values.items():
        _add_error(records, s, problem, _eager_plan(problem), "eager", output, "truth", value, true_values[output])
    for name in todo:
        key = {"weights": problem.weights, "layer": problem.layer, "plan": name}
        try:
            chain = spec(plan_named(name), problem)
            measured = amplification(problem, chain, exact) if problem.has_head_norm else None
        except Exception as error:  # a plan that cannot be measured is a row, and the others go on
            _failed(records, s, _key(problem, name, "spec", "v", "eager"), error)
            continue
        if measured and not records.has("amplification", **key):
            records.add("amplification", model=s.model, **key, **measured)
        for output, value in _values(problem, chain).items():
            _add_error(records, s, problem, name, "spec", output, "truth", value, true_values[output])
            _add_error(records, s, problem, name, "spec", output, "eager", value, eager_values[output])


def _draws(records: Records, s: Settings, layer: int) -> None:
    """What eager's plan and the K norm do on other draws of the layer, and on its controls."""
    for seed, uniform in itertools.product(range(s.seed, s.seed + DRAWS), (None, *UNIFORM_K_NORMS)):
        problem = synthetic_problem(s.model, layer, s.tokens, seed, uniform_k_norm=uniform).to(s.device)
        name = _eager_plan(problem)
        key = {"weights": problem.weights, "layer": layer, "seed": seed, "plan": name}
        if not records.has("draws", **key):
            try:
                measured = amplification(problem, spec(plan_named(name), problem), truth(problem))
            except Exception as error:
                reason = reason_of(error)
                records.add("draws", model=s.model, tokens=s.tokens, **key, status="failed", reason=reason)
                continue
            row = {column: measured[column] for column in TABLES["draws"] if column in measured}
            records.add("draws", model=s.model, tokens=s.tokens, **key, **row)


def by_storage(plans: tuple[str, ...]) -> list[tuple[bool, list[str]]]:
    """Plans that read norm weights as w, and those that read them as 1 + w: each kind has a problem of its own."""
    kinds: dict[bool, list[str]] = {False: [], True: []}
    for name in plans:
        kinds[plan_named(name).weight_offset != "none"].append(name)
    return [(kind, names) for kind, names in kinds.items() if names]


@cache
def offset_fits(s: Settings, stored_as_offset: bool) -> bool:
    """Whether plans that read norm weights so fit the settings' problems: drawn ones are stored as the plan asks."""
    return s.checkpoint is None or problem_at(s, s.layers[0], 1).weight_offset == stored_as_offset


def _refused(records: Records, s: Settings, layer: int, name: str) -> None:
    problem = problem_at(s, layer, 1)
    if not records.has("errors", **_key(problem, name, "spec", "", "")):
        reason = "the plan reads norm weights as 1 + w, this checkpoint stores w, or the other way round"
        row = _key(problem, name, "spec", "", "")
        records.add("errors", model=s.model, seed=s.seed, **row, status="not applicable", reason=reason)


def _named(problem: Problem, outputs: tuple[Tensor, ...], k_proj: Tensor) -> dict[str, Tensor]:
    named = dict(zip("qkv", outputs, strict=True))
    return {"k_proj": k_proj, **named} if problem.has_head_norm else named


def _values(problem: Problem, chain: Chain) -> dict[str, Tensor]:
    return _named(problem, (chain.q, chain.k, chain.v), k_before(problem, chain))


def _eager_values(problem: Problem) -> dict[str, Tensor]:
    return _named(problem, eager(problem), eager(problem, proj_only=True)[1])


def _eager_plan(problem: Problem) -> str:
    """The plan that Hugging Face's code for this way of storing norm weights implements."""
    return "gemma" if problem.weight_offset else "hf"


def _noise_floor(records: Records, s: Settings, problem: Problem) -> None:
    """Eager against itself: one token at a time, and (on a CPU) on one thread."""
    name, expected = _eager_plan(problem), _eager_values(problem)
    if records.has("errors", **_key(problem, name, "eager, batch of 1", "v", "eager")):
        return
    rows = [eager(problem.replace(x=problem.x[i : i + 1])) for i in range(problem.tokens)]
    floors = {"eager, batch of 1": [torch.cat(parts) for parts in zip(*rows, strict=True)]}
    if s.device == "cpu":
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            floors["eager, 1 thread"] = list(eager(problem))
        finally:
            torch.set_num_threads(threads)
    for backend, outputs in floors.items():
        for output, value in zip("qkv", outputs, strict=True):
            _add_error(records, s, problem, name, backend, output, "eager", value, expected[output])


def _first_layer_details(records: Records, s: Settings, problem: Problem, names: list[str]) -> None:
    """Histogram of K's error in ulps for every plan, and the gain of every channel for eager's plan."""
    exact = truth(problem)
    for name in names:
        key = {"weights": problem.weights, "layer": problem.layer, "plan": name}
        details = {"output": "k", "reference": "truth", **key}
        if records.has("ulps", ulp_from=0.0, **details):
            continue
        try:
            chain = spec(plan_named(name), problem)
        except Exception:  # _layer_precision has its row
            continue
        if name == "hf" and problem.has_head_norm:
            gains = zip(*channel_gains(problem, chain, exact), strict=True)
            for channel, (predicted, measured) in enumerate(gains):
                row = {"gain_predicted": predicted.item(), "gain_measured": measured.item()}
                weight = problem.k_norm_weight[channel].item()
                if not records.has("channels", channel=channel, **key):
                    records.add("channels", model=s.model, channel=channel, k_norm_weight=weight, **row, **key)
        for low, high, share in reversed(ulp_histogram(actual=chain.k, reference=exact.k)):
            if not records.has("ulps", ulp_from=low, **details):
                records.add("ulps", model=s.model, backend="spec", ulp_from=low, ulp_to=high, share=share, **details)


def _kernel_errors(records: Records, s: Settings, layer: int, name: str, backend: str) -> None:
    """One backend of one plan against truth, eager and the plan's spec, and whether its envelope explains every bit."""
    plan = plan_named(name)
    if not offset_fits(s, plan.weight_offset != "none"):
        return
    problem = problem_at(s, layer, s.kernel_tokens, name)
    if records.has("errors", **_key(problem, name, backend, "v", "spec")):
        return
    try:
        outputs = dict(zip("qkv", run(plan, problem, backend), strict=True))
        references = {
            "truth": truth(problem).outputs(),
            "eager": dict(zip("qkv", eager(problem), strict=True)),
            "spec": spec(plan, problem).outputs(),
        }
        bounds = envelope(plan, problem)
        exact_share = _exact_share(plan, problem.head_dim, backend, s.device)
    except Exception as error:  # no compiler, no launch, no memory: a row, and on
        _failed(records, s, _key(problem, name, backend, "", ""), error)
        return
    for output, value in outputs.items():
        unexplained = int(outside(value, bounds[output]).sum())
        for reference, values in references.items():
            red = reference == "spec" and (unexplained or exact_share < 1)
            reason = (
                f"{unexplained} elements outside the envelope, {exact_share:.4%} equal on exact inputs" if red else ""
            )
            status = "red" if red else "ok"
            _add_error(records, s, problem, name, backend, output, reference, value, values[output], status, reason)


def _failed(records: Records, s: Settings, key: dict[str, Any], error: Exception) -> None:
    if not records.has("errors", **key):
        records.add("errors", model=s.model, seed=s.seed, **key, status="failed", reason=reason_of(error))


def reason_of(error: Exception) -> str:
    """What a row of something that failed says of it."""
    return f"{type(error).__name__}: {str(error)[:200]}"


def _exact_share(plan: CastPlan, head_dim: int, backend: str, device: str) -> float:
    """Share of elements equal to the spec where no sum depends on order: 1 for a right Triton kernel on any device.

    Of Inductor the envelope alone is asked here: on a GPU its rsqrt is approximate, on a CPU the tests hold it to
    equal bits.
    """
    if backend == "inductor":
        return 1.0
    problem = exact_problem(plan, head_dim=head_dim).to(device)
    pairs = zip(run(plan, problem, backend), spec(plan, problem).outputs().values(), strict=True)
    equal = torch.cat([(actual.double() == expected).flatten() for actual, expected in pairs])
    return equal.double().mean().item()


def _key(problem: Problem, plan: str, backend: str, output: str, reference: str) -> dict[str, Any]:
    return {
        "weights": problem.weights,
        "layer": problem.layer,
        "tokens": problem.tokens,
        "plan": plan,
        "backend": backend,
        "output": output,
        "reference": reference,
    }


def _add_error(
    records: Records,
    s: Settings,
    problem: Problem,
    plan: str,
    backend: str,
    output: str,
    reference: str,
    actual: Tensor,
    expected: Tensor,
    status: str = "ok",
    reason: str = "",
) -> None:
    key = _key(problem, plan, backend, output, reference)
    if not records.has("errors", **key):
        stats = error_stats(actual=actual, reference=expected).row()
        records.add("errors", model=s.model, seed=s.seed, **key, **stats, status=status, reason=reason)
