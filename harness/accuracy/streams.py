"""What massive tokens change: every headline figure on drawn residual streams and on such of published sizes, for the
first token, which holds the massive activation, and for all others.

The weights are the same in both, drawn.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from castpoint.harness.accuracy.amplification import attention_logits
from castpoint.harness.accuracy.errors import error_stats
from castpoint.harness.accuracy.k_norms import NEAR_1
from castpoint.harness.accuracy.shapley import budget
from castpoint.harness.problems.drawn import synthetic_problem
from castpoint.harness.problems.streams import published_sizes, with_published_stream
from castpoint.harness.runs.errors import reason_of
from castpoint.harness.runs.progress import track
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import StreamRow
from castpoint.harness.runs.words import MEASURES, PLAYERS, Backend, Status
from castpoint.variants.backends import run
from castpoint.variants.catalogue import PLANS, plan_named
from castpoint.variants.eager import Outputs, eager
from castpoint.variants.envelope import envelope, outside
from castpoint.variants.problem import Problem
from castpoint.variants.spec import Chain, spec, truth

MODELS = ("qwen3-1.7b", "qwen3-8b")
DRAWS = 3  # seeds
KV_HEADS = 2  # and their query heads: the others of a layer are drawn alike
TOKENS, KERNEL_TOKENS = 128, 16  # as a bench takes by default
PARTS = {"all tokens": slice(0, None), "first token": slice(0, 1), "other tokens": slice(1, None)}
LAST = list(PARTS)[-1]
DIVIDED = 16  # tokens at most, of which the error is divided
BEFORE = PLAYERS[: PLAYERS.index("matmul")]  # what rounds before the matmul
HF = "hf"  # the plan whose error is divided, and whose K-norm weights are set near one


def massive_layers(model: str) -> tuple[int, int, int]:
    """The first layer that a massive token enters, the last, and that halfway between."""
    found = [layer for layer, sizes in enumerate(published_sizes()[model]) if sizes.massive]
    return found[0], (found[0] + found[-1]) // 2, found[-1]


def sweep_streams(records: Records) -> None:
    """Rows of every plan that reads norm weights as w, on both streams; and of every plan's kernel, on the first of the
    layers."""
    cases = [(model, layer, seed) for model in MODELS for layer in massive_layers(model) for seed in range(DRAWS)]
    for model, layer, seed in track(cases, "massive tokens"):
        for problem in both_streams(model, layer, TOKENS, seed):
            references = functools.cache(functools.partial(_references, problem))  # where a row asks for them
            _add_rows(records, problem, seed, HF, Backend.EAGER_BATCH_OF_1, lambda p, _, r=references: noise(p, r()[1]))
            for name, named in PLANS.items():
                if named.plan.weight_offset == "none":
                    _add_rows(records, problem, seed, name, Backend.SPEC, lambda p, n, r=references: costs(p, n, *r()))
    for model, name in track([(model, name) for model in MODELS for name in PLANS], "kernels on massive tokens"):
        offset = plan_named(name).weight_offset != "none"
        for problem in both_streams(model, massive_layers(model)[0], KERNEL_TOKENS, 0, weight_offset=offset):
            _add_rows(records, problem, 0, name, Backend.TRITON, kernel)


@functools.lru_cache(maxsize=4)  # kernels ask for the same again and again
def both_streams(
    model: str, layer: int, tokens: int, seed: int, weight_offset: bool = False
) -> tuple[Problem, Problem]:
    """The drawn problem, and the same weights on a stream of published sizes."""
    drawn = narrow(synthetic_problem(model, layer, tokens, seed, weight_offset=weight_offset))
    return drawn, with_published_stream(drawn, seed)


def narrow(problem: Problem) -> Problem:
    """Its first KV_HEADS key and value heads and their query heads."""
    heads, group = problem.qkv_weight.split(problem.head_dim), problem.num_q_heads // problem.num_kv_heads
    first_k, first_v = problem.num_q_heads, problem.num_q_heads + problem.num_kv_heads
    kept = [*heads[: group * KV_HEADS], *heads[first_k:][:KV_HEADS], *heads[first_v:][:KV_HEADS]]
    return problem.replace(qkv_weight=torch.cat(kept), num_q_heads=group * KV_HEADS, num_kv_heads=KV_HEADS)


def _references(problem: Problem) -> tuple[Chain, Outputs]:
    return truth(problem), eager(problem)


Columns = Iterator[tuple[str, dict[str, Any]]]  # a part, and what was measured on it


def noise(problem: Problem, pytorch: Outputs) -> Columns:
    """Eager one token at a time against eager."""
    alone = torch.cat([eager(problem.replace(x=problem.x[i : i + 1]))[1] for i in range(problem.tokens)])
    for name, part in PARTS.items():
        yield name, {"k_equal_eager": error_stats(actual=alone[part], reference=pytorch[1][part]).share_equal}


def costs(problem: Problem, plan: str, exact: Chain, pytorch: Outputs) -> Columns:
    """Errors of a plan's spec. Of HF also the share of K's squared error that is made before the matmul, and the
    logits' error over that with K-norm weights near one."""
    chain = spec(plan_named(plan), problem)
    logits = logit_errors(chain, exact)
    if plan == HF:
        near_1 = problem.replace(k_norm_weight=torch.full_like(problem.k_norm_weight, NEAR_1))
        control = logit_errors(spec(plan_named(plan), near_1), truth(near_1))
    for name, part in PARTS.items():
        k = error_stats(actual=chain.k[part], reference=exact.k[part])
        found = {
            "k_rel_rms": k.rel_rms,
            "k_equal": k.share_equal,
            "k_equal_eager": error_stats(actual=chain.k[part], reference=pytorch[1][part]).share_equal,
            "v_rel_rms": error_stats(actual=chain.v[part], reference=exact.v[part]).rel_rms,
            "logit_rms_error": rms_of_keys(logits, part),
        }
        if plan == HF:
            whole = budget(plan_named(plan), problem.replace(x=problem.x[part][:DIVIDED]))[MEASURES[0]]
            before = sum(value for player, value in whole.all_parts().items() if player in BEFORE)
            found |= {"before_matmul": whole.share(before)}
            found |= {"k_norm_multiple": found["logit_rms_error"] / rms_of_keys(control, part)}
        yield name, found


def logit_errors(chain: Chain, exact: Chain) -> Tensor:
    """[Hq, T, T] float64; NaN above the diagonal."""
    return attention_logits(chain.q, chain.k) - attention_logits(exact.q, exact.k)


def rms_of_keys(errors: Tensor, part: slice) -> float:
    """Of all queries that attend to these keys."""
    found = errors[:, :, part]
    return found[found.isfinite()].square().mean().sqrt().item()


def kernel(problem: Problem, plan: str) -> Columns:
    """A plan's Triton kernel: elements of q, k and v outside its envelope, and the share equal to its spec."""
    outputs = dict(zip("qkv", run(plan_named(plan), problem, Backend.TRITON), strict=True))
    expected, bounds = spec(plan_named(plan), problem).outputs(), envelope(plan_named(plan), problem)
    beyond = {name: outside(outputs[name], bounds[name]) for name in "qkv"}
    equal = {name: outputs[name].double() == expected[name] for name in "qkv"}
    for name, part in PARTS.items():
        unexplained = sum(int(found[part].sum()) for found in beyond.values())
        same = torch.cat([found[part].flatten() for found in equal.values()])
        status = {"status": Status.RED, "reason": f"{unexplained} elements outside the envelope"} if unexplained else {}
        yield (
            name,
            {"elements": same.numel(), "outside": unexplained, "equal_spec": same.double().mean().item()} | status,
        )


def _add_rows(
    records: Records,
    problem: Problem,
    seed: int,
    plan: str,
    backend: Backend,
    measure: Callable[[Problem, str], Columns],
) -> None:
    """A row for each part, if they are not there yet; of one that fails the last part alone has one."""
    key = {"model": problem.model, "weights": problem.weights, "layer": problem.layer, "seed": seed}
    key |= {"tokens": problem.tokens, "plan": plan, "backend": backend}
    if records.has(StreamRow, **key, part=LAST):
        return
    try:
        measured = list(measure(problem, plan))
    except Exception as error:  # a row, and on
        records.add(StreamRow(**key, part=LAST, status=Status.FAILED, reason=reason_of(error)))
        return
    for part, columns in measured:
        x = problem.x[PARTS[part]].double()
        sizes = {"x_max": x.max().item(), "x_min": x.min().item(), "x_abs_median": x.abs().median().item()}
        records.add(StreamRow(**key, part=part, **sizes, **columns))
