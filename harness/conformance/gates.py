"""Which gate sees which planted fault: every plan's kernel, wrong in one place, before everything that could notice.

A gate sees a fault if one element of q, k and v is not what it allows. The right kernel is put before each gate too: a
gate that sees it is red.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

from castpoint.harness.conformance.faults import (
    INTERPRETED,
    RIGHT,
    RIGHTS,
    TOKENS,
    Fault,
    drawn,
    faults,
    same_function,
)
from castpoint.harness.conformance.tolerances import (
    chain_row,
    norm_rows,
    own_summary,
    row_of,
    summary,
    tolerances,
)
from castpoint.harness.problems.exact import exact_problem
from castpoint.harness.runs.environment import one_thread
from castpoint.harness.runs.progress import track
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import GateRow
from castpoint.harness.runs.words import Gate, Verdict
from castpoint.kernels.plan import KEEP, CastPlan
from castpoint.variants.catalogue import PLANS
from castpoint.variants.eager import Outputs
from castpoint.variants.envelope import Interval, envelope, outside
from castpoint.variants.problem import Problem
from castpoint.variants.spec import spec

INTERPRETED_PLANS = ("hf", "fp32", "deferred", "gemma")  # whose Triton kernel is put before the gates too


# ---------------------------------------------------------------- what each gate looks at


def one_product(plan: CastPlan, rope: bool) -> Problem:
    return exact_problem(plan, products="one", tokens=TOKENS, rope=rope, residual=True)


def many_products(plan: CastPlan, rope: bool) -> Problem:
    return exact_problem(plan, products="many", tokens=TOKENS, rope=rope, bias=True)


def same_bits(plan: CastPlan, problem: Problem) -> dict[str, Interval]:
    """Nothing but the spec's own values."""
    return {name: (value, value) for name, value in spec(plan, problem).outputs().items()}


Inputs = Callable[[CastPlan, bool], Problem]
Allowed = Callable[[CastPlan, Problem], dict[str, Interval]]
GATES: dict[Gate, tuple[Inputs, Allowed]] = {
    Gate.ONE_PRODUCT: (one_product, same_bits),
    Gate.ONE_PRODUCT_FP32: (one_product, same_bits),
    Gate.MANY_PRODUCTS: (many_products, same_bits),
    Gate.MANY_PRODUCTS_FP32: (many_products, same_bits),
    Gate.ENVELOPE: (drawn, envelope),
    Gate.ENVELOPE_FP32: (drawn, envelope),
}


@dataclass(frozen=True)
class Case:
    """One gate before one plan: how it stores, on which problem, what the right kernel returns there, what may be."""

    plan: CastPlan
    problem: Problem
    right: Outputs
    allowed: list[Interval]


@functools.cache
def case(gate: Gate, plan: CastPlan, rope: bool) -> Case:
    plan = plan.replace(out=KEEP) if gate.stores_fp32 else plan
    inputs, allowed = GATES[gate]
    problem = inputs(plan, rope)
    return Case(plan, problem, RIGHT.run(plan, problem), list(allowed(plan, problem).values()))


# ---------------------------------------------------------------- the study


OWN = {  # our gates as rows of the peers' table, each by itself and together
    "exact inputs": [gate for gate in GATES if GATES[gate][1] is same_bits],
    "envelope, bf16 outputs": [Gate.ENVELOPE],
    "envelope, fp32 outputs": [Gate.ENVELOPE_FP32],
    "all of them": list(GATES),
}


@one_thread()
def sweep_gates(records: Records) -> None:
    """A row of `gates` for each plan, fault and gate, peers' tolerances among them; then a row of `tolerances` for each
    of those. One or two minutes."""
    for test in track(tolerances(), "peers' norms"):
        records.add(*norm_rows(test))
    for name, named in track(list(PLANS.items()), "gates"):
        triton = [INTERPRETED] if name in INTERPRETED_PLANS else []
        for fault in [*RIGHTS, *triton, *faults(named.plan)]:
            records.add(*rows_of(name, fault))
        case.cache_clear()
    rows = records.rows("gates")
    records.add(
        *(summary(test, rows) for test in tolerances()), *(own_summary(name, of, rows) for name, of in OWN.items())
    )


def rows_of(name: str, fault: Fault) -> list[GateRow]:
    """Every gate's verdict on one fault of a plan; `same function` where it changes nothing that could be changed."""
    rope, store = fault.of == "positions", fault.kind == "out"
    rows = [judged(name, fault, gate, rope) for gate in GATES if not (store and gate.stores_fp32)]
    c = case(Gate.ENVELOPE, PLANS[name].plan, rope)
    wrong = fault.run(c.plan, c.problem)
    rows += [chain_row(test, name, fault, wrong, c.right) for test in tolerances()]
    if any(row.differ for row in rows) or not same_function(PLANS[name].plan, fault):
        return rows
    return [dataclasses.replace(row, verdict=Verdict.SAME_FUNCTION) for row in rows]


def judged(name: str, fault: Fault, gate: Gate, rope: bool) -> GateRow:
    """That gate's row on a fault of that plan's kernel."""
    c = case(gate, PLANS[name].plan, rope)
    wrong = fault.run(c.plan, c.problem)
    elements, differ = (
        sum(a.numel() for a in wrong),
        sum(int((a != b).sum()) for a, b in zip(wrong, c.right, strict=True)),
    )
    found = sum(int(outside(a, allowed).sum()) for a, allowed in zip(wrong, c.allowed, strict=True))
    return row_of(name, fault, gate, elements, differ, found)
