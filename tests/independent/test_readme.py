"""The README's table, recomputed from the records by the definitions beneath it; and that plain code is independent."""

import ast
import csv
import math
import re
from pathlib import Path

import pytest
import test_cases
import test_norms
import test_published
import test_stack_cases

from castpoint.harness.report import checks
from castpoint.variants.envelope import false_red

ROOT = Path(__file__).parents[2]
ONE_ROUNDING = 2**-7 / math.sqrt(32 * math.log(2))  # rms relative error of rounding to bf16, log-uniform significands


@pytest.fixture(scope="module")
def block():
    return re.search(
        r"<!-- generated from results/cpu, run (\S+): begin -->(.*?)generated: end",
        (ROOT / "README.md").read_text(),
        re.S,
    )


def ends(values):
    return min(values), max(values)


def numbers(cell):
    return [float(number) for number in re.findall(r"[\d.]+", cell)]


def test_the_table_of_plans(block):
    with open(ROOT / "results/cpu/errors.csv", newline="") as file:
        rows = [
            r for r in csv.DictReader(file) if r["run_id"] == block[1] and r["backend"] == "spec" and r["output"] == "k"
        ]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in block[2].splitlines() if line.startswith("|")
    ]
    assert cells[0][0] == "plan" and len(cells) == 10
    for plan, _, _, error, equal in cells[2:]:
        own = [r for r in rows if r["plan"] == plan and r["weights"].startswith("calibrated")]
        to_truth = [float(r["rel_rms"]) for r in own if r["reference"] == "truth"]
        to_eager = [float(r["share_equal"]) for r in own if r["reference"] == "eager"]
        assert len(to_truth) == len(to_eager) == 28
        rms = math.sqrt(sum(v * v for v in to_truth) / 28)
        assert error == "{:.2f} ({:.2f}–{:.2f})".format(*(v / ONE_ROUNDING for v in (rms, *ends(to_truth))))
        whole = sum(to_eager) / 28
        assert numbers(equal) == pytest.approx([100 * v for v in (whole, *ends(to_eager))], abs=0.0051)


def test_one_rounding_is_what_the_table_says():
    """By trying: every significand of a fine grid, weighted as if its logarithm were uniform."""
    total = weight = 0.0
    for n in range(1 << 14):
        value = 2 ** ((n + 0.5) / (1 << 14))
        total += (round(value * 128) / 128 / value - 1) ** 2
        weight += 1
    assert math.sqrt(total / weight) == pytest.approx(ONE_ROUNDING, rel=5e-3)


PLAIN = sorted(path.name for path in Path(__file__).parent.glob("plain_*.py"))


@pytest.mark.parametrize("name", PLAIN)
def test_plain_code_imports_nothing_of_the_lab(name):
    tree = ast.parse((Path(__file__).parent / name).read_text())
    found = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    found |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    others = {name.removesuffix(".py") for name in PLAIN}
    assert found <= {"functools", "math", "numpy", "torch", "torch.nn.functional"} | others


def test_the_report_counts_what_is_recomputed_here():
    assert checks.LAYERS == "{}, {} and {}".format(*test_published.LAYERS)
    assert (checks.CASES, checks.NORMS, checks.BUDGETS) == (
        len(test_cases.CASES | test_stack_cases.STACK),
        len(test_norms.NORMS),
        len(test_published.BUDGETS),
    )
    assert f"{false_red(1):.0e}" == f"{checks.FALSE_RED:.0e}"
