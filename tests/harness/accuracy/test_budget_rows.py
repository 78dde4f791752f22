"""Rows of the budget in a results folder: a plan that fails is one of them."""

from pathlib import Path

import pandas as pd
import pytest

import castpoint.harness.accuracy.budget as rows_of
from castpoint.harness.accuracy.budget import sweep_budget
from castpoint.harness.runs.records import Records, Settings
from castpoint.variants.catalogue import PLANS


def test_a_budget_that_fails_is_a_row_and_the_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(layers=(0,), tokens=4, kernel_tokens=4, plans=("hf", "one-rounding"))
    real = {name: getattr(rows_of, name) for name in ("budget", "order_of_sums")}

    def failing(name: str) -> object:
        def divided(plan: object, *rest: object) -> object:
            if plan == PLANS["hf"].plan:
                raise ValueError("only a finite\nerror can be divided")
            return real[name](plan, *rest)

        return divided

    for name in real:
        monkeypatch.setattr(rows_of, name, failing(name))
    records = Records(tmp_path, vars(settings), {"commit": "clean"})
    sweep_budget(settings, records)
    rows = pd.read_csv(tmp_path / "budget.csv", keep_default_na=False, dtype=str)
    failed = rows[rows["status"] == "failed"]
    assert set(failed["plan"]) == {"hf"} and set(failed["backend"]) == {"spec", "triton"}
    assert set(failed["reason"]) == {"ValueError: only a finite error can be divided"} and len(failed) == 3
    assert len(rows) > 2 * len(failed) and set(failed["rotated_from"]) == {"", "1000"}
    before = (tmp_path / "budget.csv").read_text()
    sweep_budget(settings, records)
    assert (tmp_path / "budget.csv").read_text() == before
