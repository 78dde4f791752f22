"""Figures of the field's cases of many layers, recomputed in NumPy on the inputs that each case draws.

A step is stream + W norm(stream): by the words of a plan, in float64, or over 8 ranks that each hold an eighth of W's
columns. Digits agree although NumPy adds in another order: a float64 sum moves no rounding here.
"""

from functools import cache

import numpy as np
import pytest
import torch
from plain_chain import PLANS, fp32
from plain_elementwise import changes, slope
from plain_norm import bf16, norm
from test_cases import row_of, verdict

from castpoint.harness.cases.run import MEASURED

EXACT = "every step in float64"


def exact_step(stream, weight, matrix, larger=1.0):
    rms = np.sqrt(np.mean(stream**2, -1, keepdims=True) + 1e-6)
    return stream + larger * (stream / rms * weight) @ matrix.T


def rounded_step(words, stream, weight, matrix):
    product = norm(words)({"x": stream, "weight": weight}) @ matrix.T
    return bf16(stream + (bf16(product) if "proj" in words.split() else fp32(product)))


def step_of_ranks(stored, stream, weight, matrix):
    operand, columns = norm("hidden")({"x": stream, "weight": weight}), np.split(np.arange(256), 8)
    return bf16(stream + bf16(sum(stored(operand[:, part] @ matrix[:, part].T) for part in columns)))


WAYS = {
    EXACT: exact_step,
    "every norm 0.3 % too large, nothing rounded": lambda *given: exact_step(*given, larger=1.003),
    "8 ranks' parts kept in fp32": lambda *given: step_of_ranks(fp32, *given),
    "8 ranks' parts stored in bf16": lambda *given: step_of_ranks(bf16, *given),
}


def step_of(side):
    """By a published side: a way, a plan, or `plan with value=bf16-rne, …`."""
    plan, _, others = side.partition(" with ")
    words = [other.removesuffix("=bf16-rne") for other in others.split(", ")]
    return WAYS.get(side) or (lambda *given: rounded_step(" ".join([PLANS[plan], *words]), *given))


@cache
def drawn(key):
    case, rng = MEASURED[key], torch.Generator().manual_seed(MEASURED[key].claim.case)
    return [inputs for _ in range(case.draws) for inputs in case.draw(rng)]  # one set-up


@cache
def streams(key, number, side):
    """Behind each layer, [L, T, D]."""
    inputs, step = drawn(key)[number], step_of(side)
    found = [inputs["x"].double().numpy()]
    for weight, matrix in zip(inputs["norms"], inputs["projections"], strict=True):
        found.append(step(found[-1], weight.double().numpy(), matrix.double().numpy()))
    return np.array(found[1:])


def rms(value):
    return np.sqrt(np.mean(value**2, (-2, -1)))


def apart(a, b):
    return 1 - np.mean(np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1), -1)


def of_both(before, after, _):
    return before, after


def of_errors(before, after, true):
    return before - true, after - true


# What is compared, the figure of it, what grows with depth, whether changes are counted.
STACK = {
    "llama-stream": (of_both, lambda a, b: np.mean(np.abs(b[-1] - a[-1]) > 0.01), lambda a, b: rms(b - a), True),
    "tp-stream": (of_both, lambda a, b: rms(b[-1] - a[-1]) / rms(a[-1]), lambda a, b: rms(b - a), True),
    "rstd-depth": (of_errors, lambda a, b: slope(rms(b)), lambda a, b: rms(b), False),
    "rstd-added": (of_errors, lambda a, b: slope(rms(b)) - slope(rms(a)), lambda a, b: rms(a), False),
    "rstd-coherent": (of_errors, lambda a, b: slope(rms(b)), lambda a, b: rms(b), False),
    "gemma-stream": (of_both, lambda a, b: apart(a[-1], b[-1]), apart, True),
}


@pytest.mark.parametrize("key", STACK)
def test_a_case(key):
    row = row_of(key)
    compared, pick, grows, counted = STACK[key]
    sides = row["before"], row["after"], EXACT
    pairs = [compared(*(streams(key, number, side) for side in sides)) for number in range(len(drawn(key)))]
    figures = [pick(*pair) for pair in pairs]
    low, middle, high = np.quantile(figures, [0.025, 0.5, 0.975])
    own = {"measured": middle, "measured_low": low, "measured_high": high, "growth": slope(grows(*pairs[0]))}
    own |= changes(*pairs[0]) if counted else {}
    assert [name for name in ("growth", "share_differ", "max_ulp", "signed_bias") if row[name]] == list(own)[3:]
    for name, value in own.items():
        assert float(row[name]) == pytest.approx(value, rel=6e-6), name
    assert row["verdict"] == verdict(own, row)
