"""Outputs that a GPU run kept, compared on a CPU: what is found of them, and when nothing is compared.

In place of a GPU the interpreter of this process returns them.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from castpoint.harness.conformance import cuda, outputs
from castpoint.harness.conformance.execute import HERE
from castpoint.harness.conformance.outputs import OUTPUTS_STEP, compare_outputs
from castpoint.harness.runs.environment import sources
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import GpuStepRow
from castpoint.harness.runs.words import Check


def opened(folder: Path, capability: str = "9.0", **facts: object) -> Records:
    environment = {"device": "cuda", "sources": sources(), "gpu": {"name": "none", "capability": capability}}
    return Records(folder, {"command": "gpu"}, environment | facts)


def checks(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    with open(folder / "gpu_checks.csv", newline="") as file:
        return {(row["plan"], row["check"]): row for row in csv.DictReader(file)}


def never(*_: object) -> None:
    raise AssertionError("computed again")


def test_a_row_says_how_many_bits_are_equal_and_by_how_much_others_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One element of q is moved by three ulps: the interpreter's row says just that, the PTX's at least that."""
    records = opened(tmp_path)
    rows, honest = cuda.outputs_rows, cuda.fused_outputs
    monkeypatch.setattr(cuda, "outputs_rows", lambda check: rows(check, ("hf", "truncating")))

    def moved(name: str, device: str) -> tuple[torch.Tensor, ...]:
        if name == "hf":
            raise RuntimeError("no such kernel")
        q, k, v = honest(name, device)
        at = q.abs().flatten().argmax()
        q.view(torch.int16).flatten()[at] += 3  # away from zero
        return q, k, v

    monkeypatch.setattr(cuda, "fused_outputs", moved)
    cuda.store_outputs(records, HERE)
    records.add(GpuStepRow(**OUTPUTS_STEP))
    records.finish()
    before = (tmp_path / "environment.json").read_bytes()
    assert compare_outputs(tmp_path, records.run_id) == 2
    found = checks(tmp_path)
    assert set(found) == {("hf", "ptx"), ("truncating", "interpreter"), ("truncating", "ptx")}
    assert found["hf", "ptx"]["reason"] == "RuntimeError: no such kernel", "of the run itself"
    count = 8 * 32 * 128
    same, compiled = found["truncating", "interpreter"], found["truncating", "ptx"]
    assert float(same["share_equal"]) == float(f"{1 - 1 / count:.6g}") and float(same["max_ulp"]) == 3
    assert 0.99 < float(compiled["share_equal"]) <= float(same["share_equal"]) and float(compiled["max_ulp"]) >= 2
    assert {row["status"] for row in (same, compiled)} == {"ok"} and {r["run_id"] for r in found.values()} == {
        records.run_id
    }
    assert (tmp_path / "environment.json").read_bytes() == before, "it is the same run, finished as it was"
    monkeypatch.setattr(outputs, "_Child", never)
    assert compare_outputs(tmp_path, records.run_id) == 0


def test_what_cannot_be_computed_here_is_a_failed_row(tmp_path: Path) -> None:
    """A plan of which a part is missing; and on a GPU whose PTX does not run here the whole process of that check."""
    records = opened(tmp_path, "7.0")
    save_file({"hf 0": torch.zeros(1)}, tmp_path / cuda.OUTPUTS, {"inputs": cuda.inputs_digest()})
    records.add(GpuStepRow(**OUTPUTS_STEP))
    assert compare_outputs(tmp_path, records.run_id) == 2
    found = checks(tmp_path)
    assert {row["status"] for row in found.values()} == {"failed"}
    assert "hf 1" in found["hf", Check.INTERPRETER]["reason"]
    assert "exit status 1: " in found["hf", Check.PTX]["reason"]
    assert "target must be sm_80 or sm_90, not 'sm_70'" in found["hf", Check.PTX]["reason"]


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("step", "has not come to its step `outputs`"),
        ("sources", "of other sources, 5e5e5e5e5e5e, than those here"),
        ("inputs", "its inputs are drawn otherwise here"),
        ("damaged", "outputs.safetensors cannot be read (SafetensorError: "),
        ("missing", "outputs.safetensors cannot be read (FileNotFoundError: "),
    ],
)
def test_what_is_not_comparable_is_not_compared(
    what: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "_Child", never)
    records = opened(tmp_path, **({"sources": "5e5e5e5e5e5e"} if what == "sources" else {}))
    path = tmp_path / cuda.OUTPUTS
    save_file({"hf 0": torch.zeros(1)}, path, {"inputs": "0" if what == "inputs" else cuda.inputs_digest()})
    if what == "damaged":
        path.write_bytes(path.read_bytes()[:20])
    elif what == "missing":
        path.unlink()
    if what != "step":
        records.add(GpuStepRow(**OUTPUTS_STEP))
    assert says in compare_outputs(tmp_path, records.run_id)
    assert not (tmp_path / "gpu_checks.csv").exists()
