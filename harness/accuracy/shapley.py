"""The error budget: how much of a plan's squared error each of its roundings makes.

The players of a plan are its roundings: the boundaries it rounds, and three choices that round something of their
own (matmul: the operands cut to tf32; weight_offset: 1 + w in bf16; scale: the folded W * w_in). v(S) is the squared
error against the truth of the chain that makes the roundings in S and no others. A player's part is its Shapley value
(Shapley 1953): what its rounding adds to v, averaged over all orders in which the roundings can be added, exactly,
over all 2^n subsets. Squared, because independent roundings add in squares: then every order says the same.

A part below zero is a rounding that makes up for errors of others, or noise, and is kept. Noise, because a rounding
also redraws what those behind it do: over eight draws of qwen3-0.6b's layer 0, 64 tokens, the shares of
hf, rstd-rounded and bf16-statistics had standard deviations of 0.2 to 2.6 % of the whole.

The spec rounds to fp32 after every step, the truth never. So v of no rounding at all is not zero: in qwen3-0.6b up
to 2e-9 of the whole. It is listed as `fp32 arithmetic`: with it, the parts sum to the plan's whole error.

What a kernel adds to its spec (order of sums, approximate instructions) is no part of that error and stands apart.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from castpoint.harness.accuracy.amplification import attention_logits
from castpoint.harness.runs.words import FP32, MEASURES, PLAYERS
from castpoint.kernels.plan import BOUNDARIES, KEEP, RNE, ROPE_BOUNDARIES, CastPlan
from castpoint.variants.backends import run
from castpoint.variants.problem import Problem
from castpoint.variants.spec import Chain, check_offset, spec, truth


@dataclass(frozen=True)
class Part(CastPlan):
    """A plan with some of its roundings left out. Not checked: folded weights under an fp32 x, say, are no plan."""

    def __post_init__(self) -> None:
        pass


@dataclass(frozen=True)
class Budget:
    """One measure of a plan's error, divided. Raises RuntimeError unless the parts sum to the whole."""

    total: float  # the plan's squared error: its spec against the truth
    fp32: float  # that of the same chain in fp32, with none of the plan's roundings
    parts: Mapping[str, float]  # player -> Shapley value, signed

    def __post_init__(self) -> None:
        divided = math.fsum([self.fp32, *self.parts.values()])
        if not abs(divided - self.total) <= 1e-9 * self.total:
            raise RuntimeError(
                f"the parts of an error budget sum to {divided!r}, the plan's whole error is {self.total!r}: a "
                f"rounding of the plan is no player, or one is made wrongly (players: {', '.join(self.parts)})"
            )

    def all_parts(self) -> dict[str, float]:
        """The players' parts and fp32 arithmetic's: they sum to total."""
        return {**self.parts, FP32: self.fp32}

    def share(self, value: float) -> float:
        """value as a fraction of the total; 0 where there is no error to divide."""
        return value / self.total if self.total else 0.0


def players(plan: CastPlan, problem: Problem) -> list[str]:
    """Names of the plan's fields that round something on that problem, in the order of the chain.

    x rounds only where there is a residual, head_rstd and head_normed only where there is a head norm, those of RoPE
    only where there are positions. statistics and variance are one player each for both norms, out for q, k and v. In
    the order of PLAYERS subsets that share a matmul come one after another, and it is computed once for them.
    """
    rounding = {name for name in BOUNDARIES if getattr(plan, name) != KEEP}
    if problem.residual is None:
        rounding -= {"x"}
    if not problem.has_head_norm:
        rounding -= {"head_rstd", "head_normed"}
    if problem.positions is None:
        rounding -= {*ROPE_BOUNDARIES}
    words = {"weight_offset": (RNE,), "scale": ("folded",), "matmul": ("tf32", "tf32x3")}
    rounding |= {name for name, rounds in words.items() if getattr(plan, name) in rounds}
    return [name for name in PLAYERS if name in rounding]


def part(plan: CastPlan, rounded: Iterable[str]) -> Part:
    """The plan with only these of its players making their roundings, and fp32 for all else.

    Folded weights that are not rounded are deferred ones; the two differ by the fp32 rounding of x * w_in at most.
    """
    unrounded = {
        **dict.fromkeys(BOUNDARIES, KEEP),
        "scale": "prologue" if plan.scale == "prologue" else "epilogue",
        "matmul": "fp32",
        "weight_offset": "none" if plan.weight_offset == "none" else "fp32",
    }
    return Part(**unrounded | {name: getattr(plan, name) for name in rounded})


def subsets(players: Iterable[str]) -> list[frozenset[str]]:
    """All 2^n subsets; the last player changes fastest."""
    players = list(players)
    choices = itertools.product((False, True), repeat=len(players))
    return [frozenset(itertools.compress(players, chosen)) for chosen in choices]


def shapley(values: Mapping[frozenset[str], float], players: Iterable[str]) -> dict[str, float]:
    """Each player's Shapley value in the game that gives subset S the value values[S]; 2^n n additions.

    phi_i = sum over S without i of |S|! (n - |S| - 1)! / n! (v(S + i) - v(S)). They sum to v(all) - v(none).
    Raises ValueError if a subset has no value.
    """
    players = list(players)
    every = subsets(players)
    missing = [subset for subset in every if subset not in values]
    if missing:
        raise ValueError(
            f"Shapley values of {len(players)} players need a value for each of their {len(every)} subsets, "
            f"{len(missing)} have none, first {sorted(missing[0])}"
        )
    weights = [1 / (len(players) * math.comb(len(players) - 1, size)) for size in range(len(players))]
    return {
        player: math.fsum(weights[len(s)] * (values[s | {player}] - values[s]) for s in every if player not in s)
        for player in players
    }


def squared_errors(
    q: Tensor, k: Tensor, exact: Chain, reference: Chain | None = None, scale: float | None = None
) -> dict[str, float]:
    """MEASURES of q [T, Hq, Dh] and k [T, Hkv, Dh] against a reference, the exact chain by default; K's relative to the
    size of the exact heads; scale: of logits, as attention_logits takes it."""
    reference = reference or exact
    head_error = (k - reference.k).square().mean(-1)
    relative = torch.where(head_error == 0, 0.0, head_error / exact.k.square().mean(-1))
    logits, true_logits = attention_logits(q, k, scale), attention_logits(reference.q, reference.k, scale)
    causal = torch.ones_like(logits[0], dtype=torch.bool).tril()
    logit_error = (logits - true_logits)[:, causal]
    return dict(zip(MEASURES, (relative.mean().item(), logit_error.square().mean().item()), strict=True))


class Errors:
    """Squared errors of parts of plans on one problem. No part is measured twice, no matmul made twice in a row.

    The 13 plans that read norm weights as w have 555 parts: 3 s for qwen3-0.6b, 64 tokens, one thread.
    Raises ValueError without a token or with NaN or infinity in x: there is no whole to divide.
    """

    def __init__(self, problem: Problem) -> None:
        streams = [s for s in (problem.x, problem.residual) if s is not None]
        if problem.tokens == 0 or not all(s.isfinite().all() for s in streams):
            raise ValueError(
                "an error budget needs at least one token, and an x (and residual) without NaN and infinity"
            )
        self.problem = problem
        self.exact = truth(problem)
        self.measured: dict[Part, dict[str, float]] = {}
        self.product = functools.lru_cache(maxsize=2)(self._product)

    def of(self, part: Part) -> dict[str, float]:
        """MEASURES of that part's q and k against the truth."""
        if part not in self.measured:
            self.measured[part] = squared_errors(
                *self.queries_and_keys(part), self.exact, scale=self.problem.logit_scale
            )
        return self.measured[part]

    def queries_and_keys(self, part: Part) -> tuple[Tensor, Tensor]:
        """q [T, Hq, Dh] and k [T, Hkv, Dh] of spec(part, problem); its matmul is used again where it is the same."""
        behind = dict.fromkeys(("proj", "head_rstd", "head_normed", *ROPE_BOUNDARIES, "out"), KEEP)
        if part.scale != "prologue":
            behind |= dict.fromkeys(("statistics", "variance", "rstd"), KEEP)
        chain = spec(part, self.problem, self.product(dataclasses.replace(part, **behind)))
        return chain.q, chain.k

    def _product(self, part: Part) -> Tensor:
        return spec(part, self.problem).product


def budget(plan: CastPlan, problem: Problem, errors: Errors | None = None) -> dict[str, Budget]:
    """For each of MEASURES, the plan's squared error and every rounding's part of it.

    errors: Errors(problem), shared by the plans of one problem so that subsets they have in common are measured once.
    The whole is measured apart from the parts, on the plan's spec. Raises ValueError if plan and problem do not fit
    together or leave no finite error to divide, RuntimeError if the parts do not sum to the whole.
    """
    check_offset(plan, problem)
    errors = errors or Errors(problem)
    chain = spec(plan, problem)
    total = squared_errors(chain.q, chain.k, errors.exact, scale=problem.logit_scale)
    if not all(math.isfinite(value) for value in total.values()):
        raise ValueError(f"only a finite error can be divided, this plan's is {total}: x or weights overflow fp32")
    names = players(plan, problem)
    values = {subset: errors.of(part(plan, subset)) for subset in subsets(names)}
    budgets = {}
    for measure in MEASURES:
        game = {subset: value[measure] for subset, value in values.items()}
        budgets[measure] = Budget(total[measure], game[frozenset()], shapley(game, names))
    return budgets


def order_of_sums(plan: CastPlan, problem: Problem, backend: str = "triton") -> dict[str, tuple[float, float]]:
    """For each of MEASURES: mean square of (that backend's output - the plan's spec), and of (spec - truth).

    K's relative to the size of the exact heads in both. Raises what variants.backends.run raises.
    """
    exact, chain = truth(problem), spec(plan, problem)
    q, k, _ = (output.to(torch.float64) for output in run(plan, problem, backend))
    added = squared_errors(q, k, exact, reference=chain, scale=problem.logit_scale)
    total = squared_errors(chain.q, chain.k, exact, scale=problem.logit_scale)
    return {measure: (added[measure], total[measure]) for measure in MEASURES}
