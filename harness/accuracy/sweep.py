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
from castpoint.harness.accuracy.k_norms import add_k_norms
from castpoint.harness.accuracy.machines import Machines
from castpoint.harness.problems.drawn import problem_at, synthetic_problem
from castpoint.harness.problems.exact import PRODUCTS, exact_problem
from castpoint.harness.problems.geometry import geometry_named
from castpoint.harness.runs.errors import reason_of
from castpoint.harness.runs.progress import track
from castpoint.harness.runs.records import Records, Settings
from castpoint.harness.runs.schema import AmplificationRow, ChannelRow, ErrorRow, UlpRow
from castpoint.harness.runs.words import Backend, Status
from castpoint.kernels.plan import CastPlan
from castpoint.variants.backends import run
from castpoint.variants.catalogue import plan_named
from castpoint.variants.eager import eager, eager_plan
from castpoint.variants.envelope import envelope, outside
from castpoint.variants.problem import Problem
from castpoint.variants.spec import Chain, spec, truth

# On a CPU the second structure is left to the tests: interpreted, it says nothing that they do not. On a GPU Inductor,
# the plans' way to run compiled on a CPU, is left out: it is timed nowhere there.
KERNEL_BACKENDS = {"cpu": (Backend.TRITON, Backend.INDUCTOR), "cuda": (Backend.TRITON, Backend.TRITON_SEPARATE)}
DRAWS = 20  # seeds, the settings' own first, of what K-norm weights do: one draw of weights says little of the next


def sweep_precision(settings: Settings, records: Records) -> None:
    """Errors and amplification of the spec of every plan, and of eager, on every layer."""
    s = settings
    machines = Machines(s, records, _problems(s))
    for layer in track(s.layers, "errors and amplification"):
        for stored_as_offset, names in by_storage(s.plans):
            if not offset_fits(s, stored_as_offset):
                for name in names:
                    _refused(records, s, layer, name)
                continue
            problem = problem_at(s, layer, s.tokens, names[0])
            _layer_precision(records, s, problem, names, machines)
            if layer == s.layers[0]:
                _first_layer_details(records, s, problem, names)
    if s.checkpoint is None and geometry_named(s.model).head_norm:
        for seed in track(range(s.seed, s.seed + DRAWS), "K-norm weights"):
            add_k_norms(records, synthetic_problem(s.model, s.layers[0], s.tokens, seed).to(s.device), seed)


def sweep_kernels(settings: Settings, records: Records) -> None:
    """Every plan's kernels on the first layer, against truth, eager and the plan's spec; what is red gets no time."""
    for name in track(settings.plans, "kernels"):
        for backend in KERNEL_BACKENDS[settings.device]:
            _kernel_errors(records, settings, settings.layers[0], name, backend)


def _layer_precision(records: Records, s: Settings, problem: Problem, names: list[str], machines: Machines) -> None:
    """Rows of one problem. The row of v against eager comes last for each plan: it says that the plan is complete.
    machines: other instruction sets whose eager is compared too."""
    todo = [n for n in names if not records.has(ErrorRow, **_key(s, problem, n, Backend.SPEC, "v", "eager"))]
    if not todo:
        return
    exact = truth(problem)
    true_values = _values(problem, exact)
    eager_values = _eager_values(problem)
    for output, value in eager_values.items():
        key = _key(s, problem, eager_plan(problem), Backend.EAGER, output, "truth")
        _add_error(records, key, value, true_values[output])
    for name in todo:
        row = {"model": s.model, "weights": problem.weights, "layer": problem.layer, "plan": name}
        try:
            chain = spec(plan_named(name), problem)
            measured = amplification(problem, chain, exact) if problem.has_head_norm else None
        except Exception as error:  # a plan that cannot be measured is a row, and the others go on
            _failed(records, _key(s, problem, name, Backend.SPEC, "v", "eager"), error)
            continue
        if measured:
            records.add(AmplificationRow(**row, **measured))
        records.add(*machines.compared(problem, name, chain.k))
        for output, value in _values(problem, chain).items():
            for reference, values in (("truth", true_values), ("eager", eager_values)):
                key = _key(s, problem, name, Backend.SPEC, output, reference)
                _add_error(records, key, value, values[output])


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


def _problems(s: Settings) -> list[tuple[int, str]]:
    """Layers, and a plan of each way of storing norm weights that fits the settings' problems."""
    fitting = [names[0] for kind, names in by_storage(s.plans) if offset_fits(s, kind)]
    return list(itertools.product(s.layers, fitting))


def _refused(records: Records, s: Settings, layer: int, name: str) -> None:
    reason = "the plan reads norm weights as 1 + w, this checkpoint stores w, or the other way round"
    key = _key(s, problem_at(s, layer, 1), name, Backend.SPEC, "", "")
    records.add(ErrorRow(**key, status=Status.NOT_APPLICABLE, reason=reason))


def _named(problem: Problem, outputs: tuple[Tensor, ...], k_proj: Tensor) -> dict[str, Tensor]:
    named = dict(zip("qkv", outputs, strict=True))
    return {"k_proj": k_proj, **named} if problem.has_head_norm else named


def _values(problem: Problem, chain: Chain) -> dict[str, Tensor]:
    return _named(problem, (chain.q, chain.k, chain.v), k_before(problem, chain))


def _eager_values(problem: Problem) -> dict[str, Tensor]:
    return _named(problem, eager(problem), eager(problem, proj_only=True)[1])


def _first_layer_details(records: Records, s: Settings, problem: Problem, names: list[str]) -> None:
    """Histogram of K's error in ulps for every plan, and the gain of every channel for eager's plan."""
    exact = truth(problem)
    for name in names:
        key = {"model": s.model, "weights": problem.weights, "layer": problem.layer, "plan": name}
        details = {**key, "backend": Backend.SPEC, "output": "k", "reference": "truth"}
        if records.has(UlpRow, ulp_from=0.0, **details):
            continue
        try:
            chain = spec(plan_named(name), problem)
        except Exception:  # _layer_precision has its row
            continue
        if name == "hf" and problem.has_head_norm:
            gains = zip(*channel_gains(problem, chain, exact), strict=True)
            for channel, (predicted, measured) in enumerate(gains):
                row = {"gain_predicted": predicted.item(), "gain_measured": measured.item(), **key}
                weight = problem.k_norm_weight[channel].item()
                records.add(ChannelRow(channel=channel, k_norm_weight=weight, **row))
        for low, high, share in reversed(ulp_histogram(actual=chain.k, reference=exact.k)):
            records.add(UlpRow(ulp_from=low, ulp_to=high, share=share, **details))


def _kernel_errors(records: Records, s: Settings, layer: int, name: str, backend: str) -> None:
    """One backend of one plan against truth, eager and the plan's spec, and whether its envelope explains every bit."""
    plan = plan_named(name)
    if not offset_fits(s, plan.weight_offset != "none"):
        return
    problem = problem_at(s, layer, s.kernel_tokens, name)
    if records.has(ErrorRow, **_key(s, problem, name, backend, "v", "spec")):
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
        _failed(records, _key(s, problem, name, backend, "", ""), error)
        return
    for output, value in outputs.items():
        unexplained = int(outside(value, bounds[output]).sum())
        for reference, values in references.items():
            found: dict[str, str] = {}
            if reference == "spec" and (unexplained or exact_share < 1):
                said = f"{unexplained} elements outside the envelope, {exact_share:.4%} equal on exact inputs"
                found = {"status": Status.RED, "reason": said}
            _add_error(records, _key(s, problem, name, backend, output, reference) | found, value, values[output])


def _failed(records: Records, key: dict[str, Any], error: Exception) -> None:
    records.add(ErrorRow(**key, status=Status.FAILED, reason=reason_of(error)))


def _exact_share(plan: CastPlan, head_dim: int, backend: str, device: str) -> float:
    """Share of elements equal to the spec where no sum depends on order: 1 for a right Triton kernel on any device.

    Of Inductor the envelope alone is asked here: on a GPU its rsqrt is approximate, on a CPU the tests hold it to
    equal bits.
    """
    if backend == Backend.INDUCTOR:
        return 1.0
    equal = []
    for products in PRODUCTS:
        problem = exact_problem(plan, products=products, head_dim=head_dim).to(device)
        pairs = zip(run(plan, problem, backend), spec(plan, problem).outputs().values(), strict=True)
        equal += [(actual.double() == expected).flatten() for actual, expected in pairs]
    return torch.cat(equal).double().mean().item()


def _key(s: Settings, problem: Problem, plan: str, backend: str, output: str, reference: str) -> dict[str, Any]:
    return {
        "model": s.model, "weights": problem.weights, "layer": problem.layer, "tokens": problem.tokens, "seed": s.seed,
        "plan": plan, "backend": backend, "output": output, "reference": reference,
    }  # fmt: skip


def _add_error(records: Records, row: dict[str, Any], actual: Tensor, expected: Tensor) -> None:
    if not records.has(ErrorRow, **row):
        records.add(ErrorRow(**row, **error_stats(actual=actual, reference=expected).row()))
