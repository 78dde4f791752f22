"""Figures of cases of the field within one norm, recomputed in NumPy on the inputs that each case draws."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_chain import cut, fp32

from castpoint.harness.cases.run import MEASURED

PUBLISHED = Path(__file__).parents[2] / "results" / "cpu" / "cases.csv"
DRAWS = {"row-of-4096": 2, "eps-fp64": 8, "compiled-fp64": 8, "bf16-sum-nearest": 3}  # six where nothing is said


def bf16(value):
    return cut(fp32(value), 8, np.rint)


def norm(rounds, inputs):
    """RMSNorm of x (+ residual, kept), its values rounded to fp32, and to bf16 where they are named."""
    x, weight, eps = (inputs.get(name) for name in ("x", "weight", "eps"))
    x = x if inputs.get("residual") is None else fp32(x + inputs["residual"])
    weight = weight if "offset" not in rounds else fp32(1 + weight)
    weight = bf16(weight) if "offset_bf16" in rounds else weight

    def store(value, name):
        return bf16(value) if name in rounds else fp32(value)

    squares = store(x * x, "statistics") if "statistics" in rounds else x * x
    rstd = fp32(1 / np.sqrt(store(squares.mean(-1, keepdims=True), "variance") + (1e-6 if eps is None else eps)))
    return store(store(x * rstd, "normed") * weight, "hidden")


def exact(_, inputs):
    return inputs["x"] / np.sqrt(np.mean(inputs["x"] ** 2, -1, keepdims=True) + 1e-5) * inputs["weight"]


def summed_exactly(_, inputs):
    x = inputs["x"]
    return bf16(fp32(fp32(1 / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-5)) * x) * inputs["weight"])


def lanes_in_bf16(_, inputs):
    """Squares and sums in bf16, 16 lanes; rstd, normed and output in bf16."""
    x = inputs["x"]
    total = np.zeros((len(x), 16))
    for part in np.split(bf16(x * x), x.shape[1] // 16, axis=1):
        total = bf16(total + part)
    whole = total[:, 0]
    for lane in total.T[1:]:
        whole = bf16(whole + lane)
    rstd = bf16(1 / np.sqrt(whole[:, None] / x.shape[1] + inputs.get("eps", 1e-5)))
    return bf16(bf16(x * rstd) * inputs["weight"])


def relative(a, b):
    return np.abs(b - a)[a != 0] / np.abs(a)[a != 0]


def differ(a, b):
    return np.mean(a != b)


TWO, ONE = (norm, "normed hidden"), (norm, "hidden")
CASES = {
    "llada-largest": (TWO, ONE, lambda a, b: np.abs(b - a).max()),
    "llada-mean": (TWO, ONE, lambda a, b: np.abs(b - a).mean()),
    "published-weights": (TWO, ONE, differ),
    "row-of-4096": (TWO, ONE, lambda a, b: np.mean(a != b, -1)),
    "inner-rounding": (TWO, ONE, differ),
    "dropped-cast": (TWO, ONE, differ),
    "offset-large": ((norm, "offset hidden"), (norm, "offset offset_bf16 hidden"), differ),
    "offset-fixed": ((norm, "offset hidden"), (norm, "offset offset_bf16 hidden"), lambda a, b: np.abs(b - a).max()),
    "bf16-variance": ((norm, ""), (norm, "statistics variance hidden"), lambda a, b: 256 * relative(a, b).mean()),
    "bf16-output": ((norm, ""), ONE, lambda a, b: 256 * relative(a, b).mean()),
    "compiled-uniform": (TWO, ONE, lambda a, b: np.abs(b - a).max()),
    "compiled-fp64": ((exact, ""), (summed_exactly, ""), lambda a, b: np.abs(b - a).max()),
    "bf16-sum-nearest": ((exact, ""), (lanes_in_bf16, ""), lambda a, b: np.abs(b - a).mean() / np.abs(a).mean()),
}


@pytest.mark.parametrize("key", CASES)
def test_a_case(key):
    with open(PUBLISHED, newline="") as file:
        rows = list(csv.DictReader(file))
    case, claim = MEASURED[key], MEASURED[key].claim
    (row,) = (r for r in rows if r["source"] == claim.source and r["measure"] == claim.measure)
    rng, figures = torch.Generator().manual_seed(claim.case), {}
    (before, its), (after, others), pick = CASES[key]
    for _ in range(DRAWS.get(key, 6)):
        for setup, drawn in enumerate(case.draw(rng)):
            inputs = {n: t.double().numpy() if torch.is_tensor(t) else t for n, t in drawn.items()}
            found = pick(before(its.split(), inputs), after(others.split(), inputs))
            figures.setdefault(setup, []).extend(np.ravel(found))
    low = min(np.quantile(values, 0.025) for values in figures.values())
    high = max(np.quantile(values, 0.975) for values in figures.values())
    own = {"measured": np.quantile(figures[0], 0.5), "measured_low": low, "measured_high": high}
    for name, value in own.items():
        assert float(row[name]) == pytest.approx(value, rel=6e-6), name
