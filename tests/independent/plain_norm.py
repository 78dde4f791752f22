"""Sides of the cases within one norm, in NumPy: functions of the drawn inputs, float64 arrays by name.

It imports nothing of the lab. Every type is made by scaling to whole numbers, fp32 by NumPy.
"""

import functools

import numpy as np
from plain_chain import cut, fp32


def bf16(value):
    return cut(fp32(value), 8, np.rint)


def bf16_truncated(value):
    return cut(fp32(value), 8, np.trunc)


def narrow(value, bits, least):
    """Of fp32, to so many significant bits, but in steps of no less than 2^least: ties to even."""
    steps = np.maximum(np.frexp(fp32(value))[1] - bits, least)
    return np.ldexp(np.rint(np.ldexp(fp32(value), -steps)), steps)


def norm(words):
    """RMSNorm of x (+ residual), its values kept in fp32, or in bf16 (`_rtz`: truncated) where they are named."""
    words = words.split()

    def store(value, name):
        return bf16(value) if name in words else bf16_truncated(value) if f"{name}_rtz" in words else fp32(value)

    def run(inputs):
        x, weight = inputs["x"], scale(words)(inputs)
        x = x if inputs.get("residual") is None else store(x + inputs["residual"], "x")
        squares = store(x * x, "statistics") if "statistics" in words else x * x
        variance = store(squares.mean(-1, keepdims=True), "variance")
        rstd = store(1 / np.sqrt(variance + inputs.get("eps", 1e-6)), "rstd")
        return store(store(x * rstd, "normed") * weight, "hidden")

    return run


def scale(words):
    """What a norm's stored weight stands for: w, or 1 + w in fp32 or in bf16."""

    def run(inputs):
        weight = inputs["weight"]
        weight = weight if "offset" not in words else fp32(1 + weight)
        return bf16(weight) if "offset_bf16" in words else weight

    return run


def fp8_of(side):
    """e4m3: four significant bits, below 2^-6 in steps of 2^-9. Each token's largest value is scaled to 448."""

    def run(inputs):
        value = side(inputs)
        return narrow(value * (448 / np.abs(value).max(-1, keepdims=True)), 4, -9)

    return run


# ---------------------------------------------------------------- a norm from a way to sum squares


def exact(inputs):
    x = inputs["x"]
    return x / np.sqrt(exact_sum(x) / x.shape[1] + inputs.get("eps", 1e-5)) * inputs["weight"]


def norm_of(total, rstd=fp32, normed=fp32, out=bf16):
    def run(inputs):
        x, by_name = inputs["x"], {"bf16-rne": bf16, "bf16-rtz": bf16_truncated}
        products = by_name.get(inputs.get("products"))
        root = rstd(1 / np.sqrt(total(x) / x.shape[1] + inputs.get("eps", 1e-5)))
        return (products or out)((products or normed)(x * root) * inputs["weight"])

    return run


def rstd_of(total):
    return lambda inputs: 1 / np.sqrt(total(inputs["x"]) / inputs["x"].shape[1] + 1e-6)


def exact_sum(x):
    return np.sum(x * x, -1, keepdims=True)


def lanes(store):
    """Sum of squares: each square and each sum stored, sixteen lanes, which are added last, from left to right."""

    def total(x):
        parts = np.split(store(x * x), x.shape[1] // 16, axis=1)
        by_lane = functools.reduce(lambda a, b: store(a + b), parts)
        return functools.reduce(lambda a, b: store(a + b), by_lane.T)[:, None]

    return total


def groups_in_fp32(number):
    """Sum of squares in fp32: neighbours of a group from left to right, then always the first half of the groups
    onto the second."""

    def total(x):
        groups = np.split(np.square(x, dtype=np.float32), number, axis=1)
        sums = [functools.reduce(np.add, group.T) for group in groups]
        while len(sums) > 1:
            half = len(sums) // 2
            sums = [a + b for a, b in zip(sums[:half], sums[half:], strict=True)]
        return sums[0].astype(np.float64)[:, None]

    return total


def mean_of_squares(x):
    return np.mean(x * x, -1, keepdims=True).astype(np.float32)


def eps_in_fp32(inputs):
    """One norm in fp32, its eps, root and reciprocal steps in fp32 too."""
    rstd = 1 / np.sqrt(mean_of_squares(inputs["x"]) + np.float32(inputs["eps"]))
    return bf16(fp32(inputs["x"] * rstd) * inputs["weight"])


def eps_in_fp64(inputs):
    """The same norm, but for these three, which are rounded once."""
    rstd = fp32(1 / np.sqrt(mean_of_squares(inputs["x"]).astype(np.float64) + inputs["eps"]))
    return bf16(fp32(inputs["x"] * rstd) * inputs["weight"])
