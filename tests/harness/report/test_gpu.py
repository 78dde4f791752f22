"""What a reader sees of a GPU run: its table and its checks, from records whose numbers are all invented."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pandas as pd
import pytest
from invented_gpu import AT, CHAIN, FUSED, LARGE, OWN_CHAIN, SMALL, add, invent_by_hand, opened

from castpoint.harness.problems import grid
from castpoint.harness.report import gpu
from castpoint.harness.report.failures import failures
from castpoint.harness.report.failures import section as what_failed
from castpoint.harness.report.gpu import (
    EXACT,
    FOLDED,
    GROUPS,
    LOOP,
    LOSS,
    NOISE,
    P1,
    P4,
    WIN,
    check_table,
    newest,
    section,
    speed_table,
)
from castpoint.harness.report.plots import draw
from castpoint.harness.report.readme import gpus
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import GpuCheckRow


def shown(folder: Path, regime: str = grid.COLD) -> pd.DataFrame:
    table = speed_table(newest(folder))
    return table[table["weights"].str.startswith(regime)].set_index(["model", "tokens"])


# ---------------------------------------------------------------- nothing measured


def test_without_a_gpu_run_there_is_no_section(tmp_path: Path) -> None:
    assert section(tmp_path / "none") == section(tmp_path) == ""
    bench = Records(tmp_path, {"model": SMALL}, {"device": "cpu"})
    bench.finish()
    assert section(tmp_path) == "" and draw(tmp_path, bench.run_id) == []
    for table in ("gpu_speed", "gpu_checks"):
        (tmp_path / f"{table}.csv").unlink()  # a folder of an older version
    assert draw(tmp_path, bench.run_id) == [] and section(tmp_path) == ""
    invent_by_hand(tmp_path)  # a run that never finished
    assert section(tmp_path) == ""


def test_the_readme_links_every_gpu_whatever_its_name(tmp_path: Path) -> None:
    for name in ("cpu", "h100", "h200"):
        (tmp_path / name).mkdir()
    assert gpus(tmp_path) == "No kernel has run on a GPU yet, only its PTX on a CPU."
    invent_by_hand(tmp_path / "h100").finish()
    invent_by_hand(tmp_path / "h200")  # never finished
    assert gpus(tmp_path) == f"Times on a GPU: [invented H200]({tmp_path}/h100/report.md#on-a-gpu)."
    assert section(tmp_path / "h100").startswith("## On a GPU\n")


# ---------------------------------------------------------------- what is shown, recomputed by hand


def check_by_hand(folder: Path) -> None:
    """What the table must say of the records above; every figure by hand."""
    run = newest(folder)
    found = {key: row["verdict"] for key, row in run.best.iterrows() if key[3] in GROUPS}
    assert found[*AT["1"], EXACT] == WIN and found[*AT["16"], EXACT] == NOISE
    assert found[*AT["16"], "deferred"] == LOSS and found[*AT["16"], FOLDED] == WIN
    assert found[*AT["4096"], EXACT] == LOSS and found[*AT["4096"], "deferred"] == LOSS
    table = shown(folder)
    first = table.loc[SMALL, "1"]
    assert first["exact"] == (
        "4 µs, 1.50 × (1.49–1.51) **win**, 1.000 of P4, roofline 50%; hf, split-k"  # 1.485 and 1.515
    )
    assert first["deferred"] == ("3.75 µs, 1.60 × (1.58–1.62) **win**, 0.938 of P4, roofline 50%; deferred, split-k")
    assert table.loc[SMALL, "16"][FOLDED].endswith("; folded, split-k")
    assert first["P2: torch.compile"] == "7.5 µs, 0.80 × (0.79–0.81) **loss**; torch.compile"
    assert first["P1: best separate chain"] == "6 µs; F.rms_norm | cuBLAS | head_norm kernel"
    assert first["P4: bare matmul"] == "4 µs; cuBLAS"
    assert "**noise**" in table.loc[SMALL, "16"]["exact"]
    assert "0.75 × (0.74–0.76) **loss**" in table.loc[SMALL, "4096"]["deferred"]


def test_tables_say_what_was_invented(by_hand: Path) -> None:
    check_by_hand(by_hand)


def test_losses_left_out_are_noticed(by_hand: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = gpu.best_rows
    monkeypatch.setattr(gpu, "best_rows", lambda rows: honest(rows)[lambda best: best["verdict"] != LOSS])
    with pytest.raises((AssertionError, KeyError)):
        check_by_hand(by_hand)


def test_noise_ignored_is_noticed(by_hand: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = gpu.verdict

    def careless(row: pd.Series) -> str:
        found = honest(row)
        return found if found != NOISE else WIN if row["speedup_p1_p50"] > 1 else LOSS

    monkeypatch.setattr(gpu, "verdict", careless)
    with pytest.raises(AssertionError):
        check_by_hand(by_hand)


def test_a_ratio_upside_down_is_noticed(tmp_path: Path) -> None:
    """By the check above, and by the report itself: it contradicts the times that stand beside it."""
    invent_by_hand(tmp_path, upside_down=True).finish()
    with pytest.raises(AssertionError):
        check_by_hand(tmp_path)
    best = newest(tmp_path).best
    assert best.loc[*AT["1"], EXACT]["verdict"] == "not judged: the speed-up contradicts the times"
    assert best.loc[*AT["4096"], "deferred"]["verdict"] == "not judged: the speed-up contradicts the times"
    assert not shown(tmp_path).map(lambda cell: "**win**" in cell or "1.50 × (" in cell).any(axis=None)


@pytest.mark.parametrize(
    ("ratio", "noise", "expected"),
    [
        (1.03, (0.98, 1.02), WIN),
        (1.02, (0.98, 1.02), NOISE),
        (0.98, (0.98, 1.02), NOISE),
        (0.97, (0.98, 1.02), LOSS),
        (1.005, (1.01, 1.02), NOISE),  # a noise floor that leaves 1 out: neither side of it is a finding
        (0.995, (1.01, 1.02), LOSS),
        (1.03, (math.nan, math.nan), "not judged: no noise floor"),
    ],
)
def test_win_loss_and_noise(ratio: float, noise: tuple, expected: str, tmp_path: Path) -> None:
    records = opened(tmp_path)
    add(records, AT["1"], CHAIN, 10.0, 10.0)
    add(records, AT["1"], "hf", 10.0 / ratio, 10.0, noise_p10=noise[0], noise_p90=noise[1])
    records.finish()
    assert newest(tmp_path).best.loc[*AT["1"], EXACT]["verdict"] == expected


def test_a_speed_up_counts_only_over_the_best_valid_p1(by_hand: Path, tmp_path: Path) -> None:
    best = newest(by_hand).best
    assert best.loc[*AT["256"], EXACT]["verdict"] == "not judged: no P1"
    red = best.loc[LARGE, 1, grid.COLD, EXACT]
    assert red["verdict"] == "not judged: not over the best P1"
    records = opened(tmp_path / "slower")
    add(records, AT["1"], CHAIN, 10.0, 10.0)
    add(records, AT["1"], OWN_CHAIN, 9.0, 10.0)
    add(records, AT["1"], "hf", 9.5, 10.0)  # a win over the slower of two
    records.finish()
    best = newest(tmp_path / "slower").best
    assert best.loc[*AT["1"], EXACT]["verdict"] == "not judged: not over the best P1"
    assert best.loc[*AT["1"], P1]["arm"] == OWN_CHAIN


@pytest.mark.parametrize("chains", [(CHAIN, OWN_CHAIN), (OWN_CHAIN, CHAIN)])
def test_of_two_chains_that_tie_the_one_that_speed_ups_are_over_counts(tmp_path: Path, chains: tuple[str, str]) -> None:
    records = opened(tmp_path)
    for chain in chains:
        add(records, AT["1"], chain, 10.0, 10.0)
    add(records, AT["1"], "hf", 8.0, 10.0)
    records.finish()
    assert newest(tmp_path).best.loc[*AT["1"], EXACT]["verdict"] == WIN


def test_what_has_no_time_is_shown_with_its_reason(by_hand: Path) -> None:
    table = shown(by_hand)
    assert table.loc[SMALL, "1"][FOLDED] == "red: not timed: 3 of 9 elements | differ"
    assert table.loc[SMALL, "256"]["P1: best separate chain"] == "failed: RuntimeError: no kernel"
    assert table.loc[SMALL, "256"][EXACT] == "9 µs, not judged: no P1, roofline 50%; hf, split-k"
    assert table.loc[SMALL, "256"]["deferred"] == "–"
    assert set(table.loc[LARGE, "4096"].drop("weights")) == {"failed: out of memory: 2 GiB"}
    lost = failures(by_hand, newest(by_hand).run_id)
    assert sorted(lost["table"]) == ["gpu_points"] + ["gpu_speed"] * 5
    whole = ("qwen3-32b, 4096 tokens cold", "out of memory: 2 GiB")
    assert whole in set(lost[["what", "reason"]].itertuples(index=False, name=None))
    for arm, reason in (("folded", "not timed: 3 of 9 elements | differ"), ("one-rounding", "wrong"),
                        (CHAIN, "RuntimeError: no kernel"), (OWN_CHAIN, "RuntimeError: no kernel"),
                        (CHAIN, "6.00 TB/s of cold memory: H200 has 4.8")):  # fmt: skip
        assert len(lost[lost["what"].str.contains(arm, regex=False) & (lost["reason"] == reason)]) == 1


def test_an_arm_that_was_not_tried_is_said(by_hand: Path, tmp_path: Path) -> None:
    records = opened(tmp_path)
    add(records, AT["1"], CHAIN, 10.0, 10.0)
    for point in (AT["1"], AT["16"]):
        add(records, point, "P2 peer", None, status="not installed", reason="no package")
    records.finish()
    assert "Without a time: P2 peer (not installed at 2 points: no package)." in section(tmp_path)
    assert shown(tmp_path).loc[SMALL, "1"]["P2: torch.compile"] == "not installed: no package"
    assert not len(failures(tmp_path, records.run_id)) and "Without a time" not in section(by_hand)


def test_every_row_of_a_table_has_as_many_cells_as_its_head(by_hand: Path) -> None:
    """Names of chains and reasons hold bars, which would end a cell."""
    lost = what_failed(failures(by_hand, newest(by_hand).run_id))
    tables = re.findall(r"(?:^\|.*\n?)+", f"{section(by_hand)}\n\n{lost}", re.MULTILINE)
    assert len(tables) == 2 and "F.rms_norm + cuBLAS" in tables[0] and "9 elements + differ" in tables[1]
    for table in tables:
        assert len({line.count("|") for line in table.strip().split("\n")}) == 1, table


def test_hot_rows_and_weights_that_were_not_cold_stand_apart(by_hand: Path, tmp_path: Path) -> None:
    assert list(speed_table(newest(by_hand))["weights"]) == [grid.COLD] * 6 + [grid.HOT]
    assert shown(by_hand, grid.HOT).loc[SMALL, "1"]["P4: bare matmul"] == "–"
    for arm, us in ((CHAIN, 10.0), ("hf", 5.0)):
        records = opened(tmp_path / "warm")
        add(records, AT["1"], arm, us, 10.0, cold=False)
    records.finish()
    assert list(shown(tmp_path / "warm")["weights"]) == ["cold (not cold)"]
    assert draw(tmp_path / "warm", records.run_id) == []


def test_conditions_are_those_of_the_run(by_hand: Path) -> None:
    text = section(by_hand)
    for words in (
        "invented H200: 132 processors, L2 60 MB, driver not recorded, CUDA 13.0, torch 2.13.0",
        "copy 4.2 TB/s",
    ):
        assert words in text
    assert (
        "reading 4.4 TB/s, bf16 matmul 760 TFLOP/s, an empty kernel in a graph 1.3 µs, replaying a graph 1 µs" in text
    )
    assert "500 to 500 W" in text and f"Of the grid's {len(grid.points())} points 7 were tried" in text
    assert "faster than this roofline" not in text


def test_limits_that_failed_and_throttling_are_said(tmp_path: Path) -> None:
    records = opened(tmp_path)
    records.note(limits={"copy_bytes_per_s": None, "bf16_flops_per_s": 7e14, "reason": "no memory",
                         "read": {"unknown": "no stream"}, "launch": {"unknown": "no graph"}})  # fmt: skip
    add(records, AT["1"], CHAIN, 10.0, 10.0, slowed_by="power cap", roofline_share=1.2)
    add(records, AT["1"], "hf", 8.0, 10.0, slowed_by="")
    records.finish()
    text = section(tmp_path)
    assert "copy not measured (no memory), reading not measured (no stream), bf16 matmul 700 TFLOP/s" in text
    assert "an empty kernel in a graph not measured (no graph)" in text
    assert (
        "slowed down: 1 rows by power cap, 1 rows do not say." in text
        and "**1 rows are faster than this roofline**" in text
    )


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
    records.add(GpuCheckRow(**key, config="default", check="interpreter", share_equal=0.99987, max_ulp=1.0))
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
    ]
    assert "| exact | deferred | c + d | red: 3 of 9 |" in section(tmp_path)
    lost = failures(tmp_path, records.run_id)
    folded = [f"folded, {config}, exact" for config in "xyz"]
    assert list(lost["what"]) == [
        *("deferred, c | d, exact", "deferred, c | d, envelope"), *folded, "hf, one fp32 chain, eager",
    ]  # fmt: skip


def test_words_are_kept_as_words(by_hand: Path) -> None:
    """frames.load takes columns that it does not know for numbers; a config is none."""
    row = newest(by_hand).best.loc[*AT["1"], EXACT]
    assert (row["config"], row["p1"], row["cold"], row["slowed_by"]) == (FUSED, CHAIN, True, "none")
    assert newest(by_hand).best.loc[*AT["1"], P4]["arm"] == "P4 cuBLAS"


# ---------------------------------------------------------------- our own loop


def test_our_own_loop_is_neither_p4_nor_a_plan(tmp_path: Path) -> None:
    """However fast it is, no comparison with the bare matmul or the chain changes; it has a column of its own, its
    fastest tile against the fastest P4."""
    records = opened(tmp_path)
    add(records, AT["4096"], CHAIN, 60.0, 60.0)
    add(records, AT["4096"], "hf", 120.0, 60.0)
    for arm, us in (("P4 cuBLASLt", 48.0), ("P4 cuBLAS", 40.0)):
        add(records, AT["4096"], arm, us)
    add(records, AT["4096"], "own loop 64 x 64, 4 warps, 4 stages", 1.3)
    add(records, AT["4096"], "own loop 128 x 64, 8 warps, 3 stages", 1.0)
    failed = {"status": "failed", "reason": "out of resource"}
    add(records, AT["1"], "own loop 64 x 64, 4 warps, 4 stages", None, **failed)
    records.finish()
    best, table = newest(tmp_path).best, shown(tmp_path)
    assert best.loc[*AT["4096"], P4]["arm"] == "P4 cuBLAS" and "3.00 of P4" in table.loc[SMALL, "4096"][EXACT]
    assert table.loc[SMALL, "4096"][LOOP] == "1 µs, 0.03 of P4; 128 x 64, 8 warps, 3 stages"
    assert table.loc[SMALL, "1"][LOOP] == "failed: out of resource"
