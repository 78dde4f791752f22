"""The report's table of plans, from errors whose figures are known."""

from __future__ import annotations

import math

import pandas as pd

from castpoint.harness.report.page import plan_table
from castpoint.harness.runs.schema import TABLES


def row(layer: int, rel_rms: float, **other: object) -> dict[str, object]:
    found = {"plan": "hf", "backend": "spec", "output": "k", "reference": "truth", "layer": layer, "rel_rms": rel_rms}
    return found | {"share_equal": 0.5, "signed_mean": 0.0} | other


def test_a_plan_shows_its_least_and_greatest_layer() -> None:
    rows = [
        row(0, 0.003, share_equal=0.45),
        row(1, 0.004, share_equal=0.57),
        row(2, 0.005, share_equal=0.48),
        row(0, 0.007, plan="fp32"),
    ]
    rows += [row(0, 9.0, output="q"), row(0, 9.0, reference="eager"), row(0, 9.0, backend="eager")]
    frames = {"errors": pd.DataFrame(rows).reindex(columns=list(TABLES["errors"]))}
    table = plan_table(frames | {"speed": pd.DataFrame(columns=list(TABLES["speed"]))}).set_index("plan")
    rms = math.sqrt((9 + 16 + 25) / 3) / 1000
    assert table["K error, relative rms"].to_dict() == {"hf": f"{rms:.3g} (0.003 to 0.005)", "fp32": "0.007"}
    assert table["K correctly rounded, %"].to_dict() == {"hf": "50 (45 to 57)", "fp32": "50"}
    assert table.loc["hf", "K bias"] == "+0.0e+00"
    none = {name: pd.DataFrame(columns=list(TABLES[name])) for name in ("errors", "speed")}
    assert not len(plan_table(none)), "a run without errors has no row"
