"""Checks and counters of a GPU run, as a reader sees them; from records whose numbers are all invented."""

from __future__ import annotations

from pathlib import Path

from invented_gpu import AT, CHAIN, add, opened

from castpoint.harness.report.failures import failures
from castpoint.harness.report.gpu import check_table, section
from castpoint.harness.report.gpu_runs import newest
from castpoint.harness.runs.schema import GpuCheckRow, GpuCounterRow

# ---------------------------------------------------------------- checks


def test_checks_name_every_config_that_is_not_ok(tmp_path: Path) -> None:
    records = opened(tmp_path)
    add(records, AT["1"], CHAIN, 10.0, 10.0)
    for plan, config, check, status in (
        *(("hf", config, check, "ok") for config in ("default", "a", "b") for check in ("exact", "envelope")),
        ("deferred", "default", "exact", "ok"), ("deferred", "default", "envelope", "ok"),
        ("deferred", "c | d", "exact", "red"), ("deferred", "c | d", "envelope", "failed"),
        *(("folded", config, "exact", "red") for config in "xyz"),
    ):  # fmt: skip
        found = {"share_equal": 0.5, "status": status, "reason": "" if status == "ok" else "3 of 9"}
        records.add(GpuCheckRow(plan=plan, config=config, tokens=70, check=check, **found))
    key = {"plan": "hf", "tokens": 70}
    for setting, share, ulp in (("default", 0.75, 8.0), ("fp32 partials", 0.999, 1.0)):
        records.add(GpuCheckRow(**key, config=setting, check="eager", share_equal=share, max_ulp=ulp))
    records.add(GpuCheckRow(**key, config="one fp32 chain", check="eager", status="failed", reason="unknown"))
    for check in ("interpreter", "ptx"):
        records.add(GpuCheckRow(**key, config="default", check=check, share_equal=0.99987, max_ulp=1.0))
    key = {"tokens": 64, "config": "25 bits, truncated", "check": "tensor core"}
    records.add(GpuCheckRow(plan="wgmma", **key, share_equal=1.0))
    records.add(GpuCheckRow(plan="mma", **key, share_equal=0.5, status="red", reason="1 of 2 sums differ"))
    records.finish()
    found = [" | ".join(row) for row in check_table(newest(tmp_path).frames["gpu_checks"]).itertuples(index=False)]
    assert found == [
        "exact | hf | default and 2 others | ok",
        "envelope | hf | default and 2 others | ok",
        "exact | deferred | default | ok",
        "envelope | deferred | default | ok",
        "exact | deferred | c | d | red: 3 of 9",
        "envelope | deferred | c | d | failed: 3 of 9",
        "exact | folded | x; y; z | red: 3 of 9",
        "eager | hf | default | 75.0000% of bits equal, at most 8 ulp",
        "eager | hf | fp32 partials | 99.9000% of bits equal, at most 1 ulp",
        "eager | hf | one fp32 chain | failed: unknown",
        "interpreter | hf | default | 99.9870% of bits equal, at most 1 ulp",
        "ptx | hf | default | 99.9870% of bits equal, at most 1 ulp",
        "tensor core | wgmma | 25 bits, truncated | 100.0000% of bits equal",
        "tensor core | mma | 25 bits, truncated | red: 1 of 2 sums differ",
    ]
    assert "| exact | deferred | c + d | red: 3 of 9 |" in section(tmp_path)
    lost = failures(tmp_path, records.run_id)
    folded = [f"folded, {config}, exact" for config in "xyz"]
    assert list(lost["what"]) == [
        *("deferred, c | d, exact", "deferred, c | d, envelope"), *folded, "hf, one fp32 chain, eager",
        "mma, 25 bits, truncated, tensor core",
    ]  # fmt: skip


# ---------------------------------------------------------------- counters


def test_counters_show_what_follows_from_them_or_why_there_are_none(tmp_path: Path) -> None:
    def counted(folder: Path, *rows: dict) -> str:
        records = opened(folder)
        for row in rows:
            records.add(GpuCounterRow(**row))
        return section(folder).partition("### Counters")[2]

    kernel = {"kernel": "qwen3-8b, 4096 tokens, one-rounding: fused"}
    derived = [kernel | {"counter": "bytes_per_clock_and_sm", "value": 32.0, "unit": "byte/cycle"}]
    derived += [kernel | {"counter": "issue_share", "value": 0.375, "unit": "share"}]
    derived += [kernel | {"counter": "smsp__inst_executed.sum", "value": 7e6, "unit": "inst"}]
    assert f"| {kernel['kernel']} | 32 | 37.5 % |" in counted(tmp_path / "whole", *derived)
    none = {"kernel": "all", "counter": "all", "unit": "", "status": "failed", "reason": "ncu is not installed"}
    assert counted(tmp_path / "none", none).strip() == "Not counted: all, all (failed: ncu is not installed)."
    assert counted(tmp_path / "not tried") == ""
    assert list(failures(tmp_path / "none", "no run")["what"]) == ["all"]
