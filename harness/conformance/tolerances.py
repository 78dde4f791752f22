"""What other people's tests allow, and which planted faults they let pass.

data/tolerances.csv holds one test a row, read in its source: the two numbers of its comparison, |kernel - reference| <=
atol + rtol |reference| in every element, and the inputs it draws. Each is put before the faults twice: on its own
inputs, where it tests a norm by itself; and on q, k and v of the drawn layer, of every plan. The reference is always
the right kernel of the same plan, as the test keeps it, so that nothing but the fault can be in the way. What such a
test says of gradients, other dtypes or the residual is left out.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from castpoint.harness.conformance.faults import PLANTED, RIGHT, Fault, move_faults, same_function
from castpoint.harness.runs.schema import GateRow, ToleranceRow
from castpoint.harness.runs.words import Gate, Status, Verdict
from castpoint.kernels.plan import KEEP, PHASE_BOUNDARIES, ROPE_BOUNDARIES, CastPlan
from castpoint.variants.catalogue import PLANS
from castpoint.variants.eager import Outputs

DATA = Path(__file__).parent / "data" / "tolerances.csv"
OF_A_NORM = ("statistics", "variance", "head_rstd", "head_normed", "out", "weight_offset")  # moves that it can show


@dataclass(frozen=True)
class Tolerance:
    """One test: a row of data/tolerances.csv.

    plan: whose norm its reference is. stored: how the reference is kept, bf16 or fp32. x, weight: their distributions,
    N(mean, deviation), U(low, high) or a number; several of x with semicolons; D is the width. shapes: rows x D or
    tokens x heads x D. positions: first and last, where q and k are rotated by angles of position * theta^(-2i / D).
    """

    peer: str
    test: str
    plan: str
    stored: str
    atol: float
    rtol: float
    x: str
    weight: str
    eps: tuple[float, ...]
    shapes: tuple[tuple[int, ...], ...]
    positions: tuple[int, int] | None
    theta: float
    url: str

    @property
    def name(self) -> str:
        return f"{self.peer}: {self.test}"

    def outside(self, actual: Tensor, reference: Tensor) -> Tensor:
        """Elements for which the test fails, NaN too; bool."""
        actual, expected = actual.double(), reference.double()
        return ~((actual - expected).abs() <= self.atol + self.rtol * expected.abs())


@functools.cache
def tolerances() -> tuple[Tolerance, ...]:
    """All of them. Raises ValueError for a row that does not say what it should."""
    with open(DATA, newline="") as file:
        return tuple(tolerance_of(row) for row in csv.DictReader(file))


def tolerance_of(row: dict[str, str]) -> Tolerance:
    shapes = tuple(tuple(map(int, shape.split("x"))) for shape in row["shapes"].split())
    first, _, last = row["positions"].partition("-")
    parsed = {
        "atol": float(row["atol"]),
        "rtol": float(row["rtol"]),
        "eps": tuple(map(float, row["eps"].split())),
        "shapes": shapes,
        "positions": (int(first), int(last)) if first else None,
        "theta": float(row["theta"] or "nan"),
    }
    return Tolerance(**{**row, **parsed})


# ---------------------------------------------------------------- a norm by itself


@dataclass(frozen=True)
class Norm:
    """Inputs of one call of the norm that a test is of, and what the right one returns."""

    plan: CastPlan
    x: Tensor
    weight: Tensor
    eps: float
    cos_sin: tuple[Tensor, Tensor] | None

    def run(self, fault: Fault) -> Tensor:
        return fault.run_norm(self.plan, self.x, self.weight, self.eps, self.cos_sin)

    def reference(self, stored: str) -> Tensor:
        """The right norm as a test keeps it: in bf16 with all the plan's roundings, or in fp32 with none."""
        if stored == "bf16":
            return self.run(RIGHT)
        plan = self.plan.replace(head_normed=KEEP, unrotated=KEEP, out=KEEP)
        return RIGHT.run_norm(plan, self.x, self.weight, self.eps, self.cos_sin)


def norms(test: Tolerance) -> Iterator[Norm]:
    """Every call of that test on which faults are tried."""
    plan = PLANS[test.plan].plan
    for shape in test.shapes:
        for x in test.x.split("; "):
            for eps in test.eps:
                rng = torch.Generator().manual_seed(0)
                value = drawn(x, shape, rng)
                yield Norm(plan, value, drawn(test.weight, shape[-1:], rng), eps, rotation(test, shape))


def drawn(words: str, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """bf16 of that distribution. Raises ValueError for words that name none."""
    if not (found := re.fullmatch(r"([NU])\((.+), (.+)\)", words)):
        return torch.full(shape, float(words)).to(torch.bfloat16)
    first, second = (1 / (2 * shape[-1]) if number == "1/2D" else float(number) for number in found.groups()[1:])
    if found[1] == "N":
        return (first + second * torch.randn(shape, generator=rng)).to(torch.bfloat16)
    return (first + (second - first) * torch.rand(shape, generator=rng)).to(torch.bfloat16)


def rotation(test: Tolerance, shape: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
    """cos and sin of each token's angles [T, 1, D]."""
    if test.positions is None:
        return None
    positions = torch.linspace(*test.positions, shape[0], dtype=torch.float64).round()
    angles = torch.outer(positions, test.theta ** (-torch.arange(0, shape[-1], 2, dtype=torch.float64) / shape[-1]))
    angles = torch.cat([angles, angles], -1).unsqueeze(1)
    return angles.cos().float(), angles.sin().float()


def norm_faults(test: Tolerance) -> list[Fault]:
    """What is planted in that test's norm; none of it changes the output's dtype, which every test would see."""
    turned = set(ROPE_BOUNDARIES).difference(PHASE_BOUNDARIES) if test.positions else ()  # its table is given to it
    kinds = (*OF_A_NORM, *turned)
    moves = [f for f in move_faults(PLANS[test.plan].plan) if f.kind in kinds and f.move != ("out", KEEP)]
    of = ("norm", "positions") if test.positions else ("norm",)
    return [*moves, *(fault for fault in PLANTED if fault.of in of)]


def norm_rows(test: Tolerance) -> Iterator[GateRow]:
    """One row a fault of that test's norm, of all calls that it makes."""
    tried = [RIGHT, *norm_faults(test)]
    counted = {fault.name: [0, 0, 0] for fault in tried}
    for norm in norms(test):
        right, reference = norm.run(RIGHT), norm.reference(test.stored)
        for fault in tried:
            wrong, found = norm.run(fault), counted[fault.name]
            found[0] += wrong.numel()
            found[1] += int((wrong != right).sum())
            found[2] += int(test.outside(wrong, reference).sum())
    for fault in tried:
        row = row_of(test.plan, fault, f"{test.name}, by itself", *counted[fault.name])
        no_fault = not row.differ and same_function(PLANS[test.plan].plan, fault)
        yield dataclasses.replace(row, verdict=Verdict.SAME_FUNCTION) if no_fault else row


def chain_row(test: Tolerance, plan: str, fault: Fault, wrong: Outputs, right: Outputs) -> GateRow:
    """What the test's tolerance says of q, k and v; of another dtype it would say no."""
    pairs = list(zip(wrong, right, strict=True))
    elements, differ = sum(a.numel() for a in wrong), sum(int((a != b).sum()) for a, b in pairs)
    outside = elements if wrong[0].dtype != right[0].dtype else sum(int(test.outside(a, b).sum()) for a, b in pairs)
    return row_of(plan, fault, test.name, elements, differ, outside)


def row_of(plan: str, fault: Fault, gate: str, elements: int, differ: int, outside: int) -> GateRow:
    """A gate's row on a fault of that plan's kernel; red where a gate of ours sees a right one."""
    false = fault.kind == RIGHT.kind and outside > 0 and gate in list(Gate)
    return GateRow(
        plan=plan,
        fault=fault.name,
        kind=fault.kind,
        gate=gate,
        elements=elements,
        differ=differ,
        outside=outside,
        verdict=Verdict.SEEN if outside else Verdict.UNSEEN,
        status=Status.RED if false else Status.OK,
        reason=f"{outside} elements of a right kernel" if false else "",
    )


def summary(test: Tolerance, rows: list[dict[str, str]]) -> ToleranceRow:
    """That test's row, from all rows of gates."""
    own = f"{test.name}, by itself"
    passed = unseen(rows, [own])
    names = [fault for (_, fault), by_all in passed.items() if by_all]
    facts = {name: getattr(test, name) for name in ("peer", "test", "atol", "rtol", "x", "weight", "url")}
    return ToleranceRow(
        **facts, **counts(rows, [test.name]), norm_faults=len(passed), norm_passed=len(names),
        norm_hidden=sum(row["gate"] == own and row["fault"] in names and row["differ"] == "0" for row in rows),
        passed="; ".join(names),
    )  # fmt: skip


def own_summary(name: str, gates: list[Gate], rows: list[dict[str, str]]) -> ToleranceRow:
    """The row of gates of ours, of which one is enough to see a fault."""
    return ToleranceRow(peer="castpoint", test=name, **counts(rows, gates))


def counts(rows: list[dict[str, str]], gates: list[str]) -> dict[str, int]:
    passed, right = unseen(rows, gates), unseen(rows, gates, right=True)
    found = {"chain_faults": len(passed), "chain_passed": sum(passed.values())}
    return found | {"right_kernels": len(right), "right_refused": len(right) - sum(right.values())}


def unseen(rows: list[dict[str, str]], gates: list[str], right: bool = False) -> dict[tuple[str, str], bool]:
    """Plan and fault, or right kernel -> whether all those gates let it pass. Without what is no fault."""
    found: dict[tuple[str, str], bool] = {}
    for row in rows:
        if row["gate"] in gates and (row["kind"] == RIGHT.kind) == right and row["verdict"] != Verdict.SAME_FUNCTION:
            key = row["plan"], row["fault"]
            found[key] = found.get(key, True) and row["verdict"] != Verdict.SEEN
    return found
