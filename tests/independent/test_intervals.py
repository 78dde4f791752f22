"""Ratios, correlations and intervals that the report prints, again from the records, by other ways to the same."""

import csv
import math
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
REPORT = (ROOT / "results/cpu/report.md").read_text()
DRAWN, REAL = (
    part.split("\n## ")[0] for part in re.split(r"What the K-norm weights amplify\n|### Its K-norm", REPORT)[1:]
)


@cache
def rows(table):
    with open(ROOT / f"results/cpu/{table}.csv", newline="") as file:
        found = [row for row in csv.DictReader(file) if row["status"] == "ok"]
    return found


def numbers(cell):
    return [float(number) for number in re.findall(r"[-+]?\d+(?:\.\d+)?(?:e[-+]\d+)?", cell)]


def cells(section, name):
    (line,) = re.findall(rf"^\| {re.escape(name)} \|(.*)\|$", section, re.MULTILINE)
    return [cell.strip() for cell in line.split("|")]


def printed(cell, own):
    """Whether these numbers, each to its last printed digit."""
    found = re.findall(r"[-+]?\d+(?:\.\d+)?", cell)
    assert len(found) == len(own), cell
    for text, value in zip(found, own, strict=True):
        assert abs(float(text) - value) <= 0.5001 * 10.0 ** -len(text.partition(".")[2]), (cell, own)


# ---------------------------------------------------------------- multiples


ARMS = ("own", "near 1", "all the largest", "largest alone", "without the largest")
MULTIPLES = {
    "K, largest error: multiple": "k_max_abs",
    "logits, rms error: multiple": "logit_rms_error",
    "logits, relative error: multiple": "logit_rel_error",
    "softmax total variation, mean: multiple": "softmax_tv_mean",
}


def by_arm(model, column):
    """Arm -> layer -> the column over that of K-norm weights near 1, of every draw or text."""
    found = {}
    for row in rows("k_norms"):
        if row["model"].startswith(model) and row["q_norm"] == "own":
            found[row["k_norm"], row["layer"], row["sample"]] = float(row[column])
    ratios = {arm: {} for arm in ARMS}
    for (arm, layer, sample), value in found.items():
        ratios[arm].setdefault(layer, []).append(value / found["near 1", layer, sample])
    return ratios


@pytest.mark.parametrize("name", MULTIPLES)
def test_multiples_of_drawn_weights(name):
    for cell, (_, of) in zip(cells(DRAWN, name), by_arm("qwen3-0.6b", MULTIPLES[name]).items(), strict=False):
        (ratios,) = of.values()
        low, middle, high = np.quantile(ratios, [0.1, 0.5, 0.9])
        assert len(ratios) == 20
        printed(cell, (middle, low, high) if "(" in cell else (1,))


@pytest.mark.parametrize("name", MULTIPLES)
def test_multiples_of_a_real_model(name):
    for cell, (_, of) in zip(cells(REAL, name), by_arm("gemma", MULTIPLES[name]).items(), strict=False):
        layers = [np.median(ratios) for ratios in of.values()]
        assert len(layers) == 18
        printed(cell, (np.median(layers), min(layers), max(layers)) if "(" in cell else (1,))


def test_the_finding_says_what_the_tables_say():
    finding = next(line for line in (ROOT / "README.md").read_text().splitlines() if "multiply logits" in line)
    said = re.search(r"rms error by (\S+) to (\S+), their relative error by (\S+) to (\S+) .*own by (\S+),", finding)
    ends = [numbers(cells(DRAWN, f"logits, {of} error: multiple")[0])[1:] for of in ("rms", "relative")]
    assert [float(number) for number in said.groups()[:4]] == sum(ends, [])
    assert float(said[5]) == pytest.approx(numbers(cells(REAL, "logits, rms error: multiple")[0])[0], abs=0.05)


# ---------------------------------------------------------------- correlations


def z_of(level):
    """Beyond which, on both sides together, a normal number lies with that chance; by halving."""
    low, high = 0.0, 10.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if math.erfc(middle / math.sqrt(2)) > level else (low, middle)
    return low


def by_fisher(found, variance, level):
    width = z_of(level) * math.sqrt(variance)
    return found, *(math.tanh(math.atanh(found) + side * width) for side in (-1, 1))


def test_correlations_of_the_logits_error():
    own = [
        row
        for row in rows("k_norms")
        if row["model"] == "qwen3-0.6b" and (row["k_norm"], row["q_norm"]) == ("own", "own")
    ]
    near = {
        r["sample"]: r
        for r in rows("k_norms")
        if r["model"] == "qwen3-0.6b" and (r["k_norm"], r["q_norm"]) == ("near 1", "own")
    }
    columns = {
        "prediction": "logit_terms",
        "weights alone": "gain_predicted",
    }
    multiple = [float(r["logit_rms_error"]) / float(near[r["sample"]]["logit_rms_error"]) for r in own]
    for words, column in columns.items():
        against = [float(r[column]) / float(near[r["sample"]][column]) for r in own]
        check_correlation(words, multiple, against)
    check_correlation("K's largest", multiple, [float(r["q_norm_there"]) for r in own])


def check_correlation(words, a, b):
    a, b = (np.array(v) - np.mean(v) for v in (a, b))
    found = a @ b / np.sqrt(a @ a * (b @ b))
    said = re.search(rf"{words}(?: is)? ([\d.]+ \([\d.]+ to [\d.]+\))", DRAWN)[1]
    printed(said, by_fisher(found, 1 / (len(a) - 3), 0.05))


def ranks(values):
    """Means over the places that equal values take."""
    values = np.array(values)
    return np.array([np.mean(np.flatnonzero(np.sort(values) == value)) for value in values])


def test_rank_correlations_with_the_largest_weight():
    """With what is left of the ranks when a straight line through the layers' is taken off."""
    columns = ("k_max_abs", "attention_logit_rms", "k_rel_rms", "k_p99_ulp")
    found = [r for r in rows("model_layers") if r["arm"] == "eager" and r["reference"] == "float64"]
    layers = sorted({int(r["layer"]) for r in found})
    said = REPORT.split("for all four together leaves")[1].splitlines()[4].strip("| ").split(" | ")

    def left(column):
        means = [np.mean([float(r[column]) for r in found if int(r["layer"]) == layer]) for layer in layers]
        value = ranks(means)
        return value - np.polyval(np.polyfit(ranks(layers), value, 1), ranks(layers))

    weight = left("k_norm_max")
    for column, cell in zip(columns, said, strict=True):
        error = left(column)
        partial = weight @ error / np.sqrt(weight @ weight * (error @ error))
        own = by_fisher(partial, 1.06 / (len(layers) - 4), 0.05 / len(columns))
        printed(cell.removesuffix(")").replace(", may be 0", ""), own)
        assert (", may be 0" in cell) == (own[1] < 0 < own[2])


# ---------------------------------------------------------------- sign flips


def not_rejected(values, level):
    """Means m that a sign-flip test lets stand: of flipped values - m, tried by so many flips, and by halving for m."""
    signs = np.random.default_rng(1).choice([-1.0, 1.0], (1 << 15, len(values)))

    def chance(m):
        shifted = values - m
        return np.mean(np.abs(signs @ shifted) >= abs(shifted.sum()))

    ends = []
    for side in (-1, 1):
        inside, outside = values.mean(), values.mean() + side * 10 * values.std()
        for _ in range(30):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if chance(middle) > level else (inside, middle)
        ends.append(inside)
    return ends


@pytest.mark.parametrize("arm", ["hf", "cast-after-matmul", "fp32", "truncating", "float32", "4-bit weights"])
def test_what_a_sign_flip_test_leaves(arm):
    """To half of the second digit, which is the last that is printed, and 2 % of the width for the flips not tried."""
    kl = {}
    for row in rows("model_tokens"):
        if row["reference"] == "float64" and row["arm"] in ("eager", arm):
            kl.setdefault((row["text"], row["prompt"]), {})[row["arm"]] = 1000 * float(row["kl_mean"])
    values = np.array([both[arm] - both["eager"] for both in kl.values()])
    table = REPORT.split("| arm | KL to float64, less eager's |")[1]
    cell = cells(table.split("\n\n")[0], arm)[0]
    mean, low, high = numbers(cell)
    assert len(values) == 32 and mean == pytest.approx(values.mean(), rel=0.05)
    moved = 2 if arm in ("float32", "4-bit weights") else 4  # which are taken together: one plan is eager's own
    for end, own in zip((low, high), not_rejected(values, 0.05 / moved), strict=True):
        digit = 10.0 ** (math.floor(math.log10(abs(own))) - 1)
        assert end == pytest.approx(own, rel=0, abs=digit / 2 + 0.02 * (high - low))
    assert ("told apart" in cell) == (low > 0 or high < 0)
