"""Eager's noise floor as ranges over layers and instruction sets, and the mark of what is a machine's."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from castpoint.harness.report import readme
from castpoint.harness.report.findings import findings
from castpoint.harness.report.page import machine_note, noise_floor_table, plan_table, tables
from castpoint.harness.runs.frames import Frames, between_machines, differing, load
from castpoint.harness.runs.holds import MARK
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import EagerRow, ErrorRow

ALONE = "eager, batch of 1"
SHARES = {  # (isa, backend, plan) -> share of equal elements in layers 0 and 1
    ("avx2", ALONE, "hf"): (1.0, 1.0),
    ("avx2", "spec", "hf"): (0.9999, 0.9997),
    ("avx2", "spec", "one-rounding"): (0.40, 0.36),
    ("avx512_core", ALONE, "hf"): (0.99987, 0.99969),
    ("avx512_core", "eager, avx2", "hf"): (0.9998, 0.9998),
    ("avx512_core", "spec", "hf"): (0.9996, 0.9997),
    ("avx512_core", "spec", "one-rounding"): (0.41, 0.37),
}
KERNELS = {"avx2": "PyTorch's own", "avx512_core": "gemm:jit:bf16"}


def invented(folder: Path, shares: dict = SHARES) -> Frames:
    """A bench with these shares, where avx512_core is the machine's own, and no AMX."""
    settings = {"model": "qwen3-0.6b", "checkpoint": None, "layers": [0, 1], "tokens": 8}
    records = Records(folder, settings, {"processor": "p", "native_bf16": False})
    row = {"model": "qwen3-0.6b", "weights": "calibrated", "tokens": 8, "seed": 0}
    for (isa, backend, plan), by_layer in shares.items():
        for layer, share in enumerate(by_layer):
            named = {"isa": isa, "kernel": KERNELS[isa], "backend": backend, "plan": plan}
            records.add(EagerRow(**row, **named, layer=layer, share_equal=share))
    reason = {"status": "not applicable", "reason": "this CPU has avx512_core at most"}
    records.add(EagerRow(**row, layer=0, isa="avx512_core_amx", plan="hf", backend="eager", **reason))
    for plan in ("hf", "one-rounding"):
        for layer, share in enumerate(SHARES["avx512_core", "spec", plan]):
            for reference in ("truth", "eager"):
                named = {"plan": plan, "backend": "spec", "output": "k", "reference": reference, "layer": layer}
                records.add(ErrorRow(**row, **named, rel_rms=0.003, signed_mean=0.0, share_equal=share))
    return load(folder, records.run_id)


def test_ranges_are_over_layers_and_instruction_sets(tmp_path: Path) -> None:
    eager = invented(tmp_path)["eager"]
    assert differing(eager, ALONE) == pytest.approx((0, 0.00031))
    assert differing(eager, "spec", "one-rounding") == pytest.approx((0.59, 0.64))
    assert differing(eager, "eager, 3 threads") is None
    assert between_machines(eager).to_dict() == pytest.approx({"hf": 0.00015, "one-rounding": 0.01})


def test_the_finding_and_the_table_say_ranges(tmp_path: Path) -> None:
    frames = invented(tmp_path)
    (finding,) = findings(tmp_path, frames)
    assert "changes 59 to 64 % of K's elements; eager read token by token changes 0 to 0.031 % of" in finding.text
    table = noise_floor_table(frames["eager"]).set_index("K elements that differ, over layers")
    assert list(table) == ["eager on avx2: PyTorch's own", "eager on avx512_core: gemm:jit:bf16"]
    assert list(table.index) == [ALONE, "eager, avx2", "hf's spec", "one-rounding's spec"]
    assert list(table.iloc[:, 1]) == ["0.013 to 0.031 %", "0.02 %", "0.03 to 0.04 %", "59 to 63 %"]
    assert list(table.loc[ALONE]) == ["0 %", "0.013 to 0.031 %"] and pd.isna(table.loc["eager, avx2"].iloc[0])


def test_figures_of_a_machine_are_marked_and_no_others(tmp_path: Path) -> None:
    frames = invented(tmp_path)
    assert [name for name in plan_table(frames) if MARK in name] == [f"K equal to eager, % {MARK}"]
    note = machine_note(frames["eager"])
    assert note.startswith(MARK) and "(avx2, avx512_core)" in note
    assert note.endswith("at most 1 percentage points (`one-rounding`).")
    assert f"equal to spec {MARK}" in tables(frames)["kernels"].splitlines()[0]
    assert f"| K's error | K equal to PyTorch's, % {MARK} |" in readme.headline(frames)


def test_one_instruction_set_says_nothing_of_others(tmp_path: Path) -> None:
    only = {key: shares for key, shares in SHARES.items() if key[0] == "avx2"}
    assert machine_note(invented(tmp_path / "one", only)["eager"]) == f"{MARK} Of this machine's PyTorch."
    none = invented(tmp_path / "none", {})
    assert machine_note(none["eager"]) == "" and findings(tmp_path / "none", none) == []
