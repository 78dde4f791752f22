"""The report's table of plans, from errors whose figures are known."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from castpoint.harness.report.page import plan_table
from castpoint.harness.runs.schema import TABLES


def row(layer: int, rel_rms: float, **other: object) -> dict[str, object]:
    found = {"plan": "hf", "backend": "spec", "output": "k", "reference": "truth", "layer": layer, "rel_rms": rel_rms}
    return found | {"share_equal": 0.5, "signed_mean": 0.0} | other


def test_a_plan_shows_its_least_and_greatest_layer() -> None:
    rows = [row(0, 0.003), row(1, 0.004), row(2, 0.005), row(0, 0.007, plan="fp32")]
    rows += [row(0, 9.0, output="q"), row(0, 9.0, reference="eager"), row(0, 9.0, backend="eager")]
    frames = {"errors": pd.DataFrame(rows).reindex(columns=list(TABLES["errors"]))}
    table = plan_table(frames | {"speed": pd.DataFrame(columns=list(TABLES["speed"]))}).set_index("plan")
    assert table.loc["hf", "K error, relative rms"] == pytest.approx(math.sqrt((9 + 16 + 25) / 3) / 1000)
    assert table["of one layer"].to_dict() == {"hf": "0.003 to 0.005", "fp32": "0.007"}
    none = {name: pd.DataFrame(columns=list(TABLES[name])) for name in ("errors", "speed")}
    assert not len(plan_table(none)), "a run without errors has no row"
