"""Sides of the cases of sums and products, in NumPy: functions of the drawn inputs, float64 arrays by name.

It imports nothing of the lab.
"""

import numpy as np
from plain_chain import fp32, spacing
from plain_norm import bf16, narrow


def fp16(value):
    return narrow(value, 11, -24)


def summed(store):
    return lambda inputs: store(inputs["x"] + inputs["residual"])


def accumulated(store):
    """The residual after each call that adds its x to it."""

    def run(inputs):
        residuals = [inputs["residual"]]
        for x in inputs["calls"]:
            residuals.append(store(residuals[-1] + x))
        return np.stack(residuals[1:])

    return run


def shrinks(before, after):
    """Change of the residual's mean magnitude after each call."""
    sizes = [np.abs(residuals).reshape(len(residuals), -1).mean(1) for residuals in (before, after)]
    return sizes[1] / sizes[0] - 1


def reduced(store):
    """The ranks' parts summed, stored, added to the residual."""
    return lambda inputs: bf16(store(np.sum(inputs["parts"], 0)) + inputs["residual"])


def added(first):
    return lambda inputs: fp16(fp32(first(inputs["a"] + inputs["b"]) + inputs["c"]))


def product(store):
    return lambda inputs: store(inputs["a"] * inputs["b"])


def two_products(first, second):
    return lambda inputs: bf16(first(inputs["x0"] * inputs["f0"]) + second(inputs["x1"] * inputs["f1"]))


def turned(value, cos, sin):
    """RoPE: pairs of channels half a head apart turned by their angle."""
    a, b = np.split(value, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def norm_turned(norm):
    """Through RoPE with base 10,000; the first frequency is 1, so the first angle is the position."""

    def run(inputs):
        value, positions = norm(inputs), inputs["angle"][:, :1]
        angles = positions / 10_000 ** (np.arange(value.shape[1] // 2) / (value.shape[1] // 2))
        return bf16(turned(value, np.cos(angles), np.sin(angles)))

    return run


def value(store):
    return lambda inputs: store(inputs["value"])


# ---------------------------------------------------------------- what is measured


def moved(a, b):
    """In bf16 ulps of a, where a is not 0."""
    return (np.abs(b - a) / spacing(a))[a != 0]


def changes(a, b):
    """The columns that compare two outputs of a case."""
    return {
        "share_differ": np.mean(a != b),
        "max_ulp": moved(a, b).max(),
        "signed_bias": np.sum((b - a) * np.sign(a)) / np.sum(np.abs(a)),
    }


def slope(errors):
    """Of log(error) over log(call or layer), from the third on, by least squares."""
    return np.polyfit(np.log(np.arange(3, len(errors) + 1)), np.log(errors[2:]), 1)[0]


def moved_farther(ulps):
    """Of the elements that differ, the share that moves by more than so many ulps."""

    def pick(a, b):
        by = moved(a, b)
        return np.mean(by[by > 0] > ulps)

    return pick


def magnitude_bias(a, b):
    return np.mean((np.abs(b)[a != 0] - np.abs(a)[a != 0]) / np.abs(a)[a != 0])


def outside(a, b):
    return np.mean(np.abs(b - a) > 1e-3 + 1e-3 * np.abs(a))


def failing(a, b):
    """Normalised mean squared errors of the tests that exceed 1e-7."""
    errors = np.sum((b - a) ** 2, -1) / np.sum(a * a, -1)
    return errors[errors > 1e-7]


def runs_over(a, b):
    return np.mean(np.abs(b - a).max(-1) > 0.06)
