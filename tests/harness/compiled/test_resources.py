"""Records of tiles compiled ahead of time: what fits, what does not, what fails and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from castpoint.harness.compiled import resources as configs
from castpoint.harness.compiled.compile import Compiled
from castpoint.harness.report.studies import configs_section
from castpoint.harness.runs.frames import load
from castpoint.harness.runs.records import Records
from castpoint.kernels.config import Config

FUSED, SPLIT = Config("fused"), Config("split-k")
BUILT = Compiled("norm_qkv_kernel", "", {"ptx": "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16"}, b"", 0, 90, 8)
BYTES = {"sm_90": 200 * 1024, "gfx942": 80 * 1024}


def compiler(plan: object, target: str, **keywords: object) -> Compiled:
    if keywords.get("stores") == "rstd":
        raise RuntimeError("no such\ninstruction")
    return dataclasses.replace(BUILT, target=target, shared=BYTES[target])


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], dict[str, str]]:
    cases = [
        (kernel, "hf", target, keywords)
        for target in BYTES
        for kernel, keywords in (
            ("norm_qkv", {"config": FUSED, "tokens": 64}),
            ("norm_qkv", {"config": SPLIT, "tokens": 1}),
            ("rms_norm", {"stores": "rstd"}),
        )
    ]
    monkeypatch.setattr(configs, "config_binaries", lambda targets: cases)
    monkeypatch.setattr(configs, "COMPILERS", dict.fromkeys(("norm_qkv", "rms_norm"), compiler))
    records = Records(tmp_path, {"command": "configs"}, {})
    configs.sweep_configs(records)
    configs.sweep_configs(records)  # has them already
    assert len(records.rows("configs")) == len(cases)
    return {(row["target"], row["keywords"]): row for row in records.rows("configs")} | {"folder": tmp_path}


def test_every_outcome_has_its_words(rows):
    fit = rows["sm_90", f"{FUSED}, tokens 64"]
    assert (fit["status"], fit["registers"], fit["spills"], fit["shared"]) == ("ok", "90", "8", str(200 * 1024))
    assert fit["matrix"].startswith("wgmma.mma_async")
    large = rows["gfx942", f"{FUSED}, tokens 64"]
    assert large["status"] == "does not fit" and "gfx942 has 65536 bytes" in large["reason"]
    assert rows["sm_90", f"{SPLIT}, tokens 1"]["status"] == "ok"
    assert rows["gfx942", f"{SPLIT}, tokens 1"]["status"] == "refused"
    failed = rows["sm_90", "stores rstd"]
    assert (failed["status"], failed["reason"]) == ("failed", "RuntimeError: no such instruction")


def test_the_section_shows_numbers_or_the_status(rows):
    folder = rows["folder"]
    run_id = rows["sm_90", "stores rstd"]["run_id"]
    lines = configs_section(load(folder, run_id)["configs"]).splitlines()
    (fused,) = [line for line in lines if f"| {FUSED}, tokens 64 |" in line]
    assert "| 90 / 8 / 200.0 |" in fused and "| does not fit |" in fused
    (split,) = [line for line in lines if f"| {SPLIT}, tokens 1 |" in line]
    assert "| refused |" in split
