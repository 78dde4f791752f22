"""What a reader sees of a GPU run's times, from records whose numbers are all invented."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from invented_gpu import AT, CHAIN, ENVIRONMENT, FUSED, LARGE, OWN_CHAIN, P4_BEST, SMALL, add, invent_by_hand, opened

from castpoint.harness.problems import grid
from castpoint.harness.report import gpu_runs
from castpoint.harness.report.failures import failures
from castpoint.harness.report.failures import section as what_failed
from castpoint.harness.report.gpu import section, speed_table
from castpoint.harness.report.gpu_runs import EXACT, FOLDED, GROUPS, LOOP, LOSS, NOISE, P1, P2, P4, WIN, newest
from castpoint.harness.report.plots import draw
from castpoint.harness.runs.schema import GpuLimitRow
from castpoint.harness.runs.words import Kind, Step


def shown(folder: Path, regime: str = grid.COLD) -> pd.DataFrame:
    table = speed_table(newest(folder))
    return table[table["weights"].str.startswith(regime)].set_index(["model", "tokens"])


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
        "4 µs, 1.50 × (1.49–1.51) **win**, 1.000 of P4, roofline 50%; hf, fused, split-k"  # 1.485 and 1.515
    )
    assert first["deferred"] == ("3.75 µs, 1.60 × (1.58–1.62) **win**, 0.938 of P4, roofline 50%; deferred, split-k")
    assert table.loc[SMALL, "16"][FOLDED].endswith("; folded, split-k")
    assert first["P2: torch.compile"] == "8.25 µs, 0.80 × (0.79–0.81) **loss**; torch.compile"
    assert first["P1: best separate chain"] == "6 µs; F.rms_norm | cuBLAS | head_norm kernel"
    assert first["P4: bare matmul"] == "4 µs; cuBLAS"
    assert table.loc[SMALL, "16"]["exact"].startswith("6 µs, 1.010 × (1.000–1.020) **noise**, 1.20 of P4, ")
    assert " of P4" not in table.loc[SMALL, "16"]["deferred"]
    assert "0.75 × (0.74–0.76) **loss**" in table.loc[SMALL, "4096"]["deferred"]


def test_tables_say_what_was_invented(by_hand: Path) -> None:
    check_by_hand(by_hand)


def test_losses_left_out_are_noticed(by_hand: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = gpu_runs.best_rows
    monkeypatch.setattr(gpu_runs, "best_rows", lambda rows: honest(rows)[lambda best: best["verdict"] != LOSS])
    with pytest.raises((AssertionError, KeyError)):
        check_by_hand(by_hand)


def test_noise_ignored_is_noticed(by_hand: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = gpu_runs.verdict

    def careless(row: pd.Series) -> str:
        found = honest(row)
        return found if found != NOISE else WIN if row["speedup_p1_p50"] > 1 else LOSS

    monkeypatch.setattr(gpu_runs, "verdict", careless)
    with pytest.raises(AssertionError):
        check_by_hand(by_hand)


@pytest.mark.parametrize("fault", ["one step for all", "by arm"])
def test_steps_mixed_and_arms_for_plans_are_noticed(by_hand: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    if fault == "one step for all":
        monkeypatch.setattr(gpu_runs, "MEASURED", gpu_runs.POINT)
    else:
        what_of = gpu_runs.what_of
        monkeypatch.setattr(gpu_runs, "what_of", lambda kind, name: what_of(kind, f"{name}, fused"))
    with pytest.raises((AssertionError, KeyError)):
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
        (0.995, (1.01, 1.02), NOISE),  # 1 lies in its own p10 to p90, 1 % around
        (1.005, (0.99, 0.999), NOISE),
        (0.98, (1.01, 1.02), LOSS),
        (1.03, (math.nan, math.nan), "not judged: no noise floor"),
    ],
)
def test_win_loss_and_noise(ratio: float, noise: tuple, expected: str, tmp_path: Path) -> None:
    records = opened(tmp_path)
    add(records, AT["1"], CHAIN, 10.0, 10.0)
    add(records, AT["1"], "hf", 10.0 / ratio, 10.0, noise_p10=noise[0], noise_p90=noise[1])
    records.finish()
    assert newest(tmp_path).best.loc[*AT["1"], EXACT]["verdict"] == expected


def test_arms_that_are_alike_neither_win_nor_lose() -> None:
    """Ten rounds, the fewest there are, of times that vary by 3 %: A/A's own p10 and p90 are then far from sure."""
    rng = np.random.default_rng(0)
    times = 1 + rng.uniform(-0.03, 0.03, (4, 2000, 10))
    p1, arm, a, again = times
    columns = {}
    for name, ratios in (("speedup_p1", p1 / arm), ("noise", a / again)):
        columns |= dict(
            zip((f"{name}_p10", f"{name}_p50", f"{name}_p90"), np.quantile(ratios, [0.1, 0.5, 0.9], 1), strict=True)
        )
    for name, samples in (("p1_p{}_us", p1), ("p{}_us", arm)):
        columns |= {name.format(q): np.quantile(samples, q / 100, 1) for q in (10, 50, 90)}
    rows = pd.DataFrame(columns).assign(p1="P1", p1_arm="P1")
    found = rows.apply(gpu_runs.verdict, axis=1).value_counts(normalize=True)
    assert found[NOISE] > 0.99


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


def test_arms_are_judged_within_their_step(tmp_path: Path) -> None:
    """A step whose P1 failed has none to be judged by, whatever another step has; the fastest row of all is shown."""
    records = opened(tmp_path)
    add(records, AT["1"], CHAIN, 10.0, 10.0, 5.0)
    add(records, AT["1"], P4_BEST, 5.0, None, 5.0)
    add(records, AT["1"], "deferred", 8.0, 10.0, 5.0)
    add(records, AT["1"], CHAIN, 14.0, 14.0, step=Step.PLANS)
    add(records, AT["1"], "hf", 7.0, 14.0, step=Step.PLANS)  # 2.0 within its step; 1.43 over the other's P1
    add(records, AT["1"], "P2 torch.compile", 9.0, None, step=Step.COMPILED)
    records.finish()
    best = newest(tmp_path).best
    assert best.loc[*AT["1"], EXACT]["verdict"] == WIN and best.loc[*AT["1"], EXACT]["p1_p50_us"] == 14.0
    assert best.loc[*AT["1"], P1]["p50_us"] == 10.0
    assert best.loc[*AT["1"], P2]["verdict"] == "not judged: no P1"
    cells = shown(tmp_path).loc[SMALL, "1"]
    assert "2.00 × (" in cells[EXACT] and " of P4" not in cells[EXACT] and "1.60 of P4" in cells["deferred"]


def test_a_time_over_p4_counts_only_over_the_best_of_its_step_and_where_it_fits(tmp_path: Path) -> None:
    records = opened(tmp_path)
    for point, p4_us, over in ((AT["1"], 4.0, 4.0), (AT["16"], 4.0, 2.0), (AT["256"], None, 4.0)):
        add(records, point, CHAIN, 10.0, 10.0)
        add(records, point, P4_BEST, p4_us, status="ok" if p4_us else "red", reason="" if p4_us else "impossible")
        add(records, point, "hf", 8.0, 10.0, over)
    records.finish()
    table = shown(tmp_path)
    assert "2.00 of P4" in table.loc[SMALL, "1"][EXACT]
    assert "time over P4's contradicts the times" in table.loc[SMALL, "16"][EXACT]
    assert "not over the best P4" in table.loc[SMALL, "256"][EXACT]


def test_what_launches_cost_stands_behind_the_bare_matmul(tmp_path: Path) -> None:
    """With the ratio to the P4 of its own step, which may have been another minute than that of the time beside it."""
    records = opened(tmp_path)
    for us, step in ((4.0, Step.PARTS), (4.25, Step.CHAINS)):
        add(records, AT["1"], P4_BEST, us, None, us, step=step)
    empty = {"kind": Kind.LAUNCHES, "function": ""}
    for point, us in ((AT["1"], 5.1), (AT["16"], None)):
        more = {} if us else {"status": "failed", "reason": "no kernel"}
        add(records, point, f"{P4_BEST} + 2 empty kernels", us, None, 4.25, **empty, **more)
        add(records, point, CHAIN, 10.0, 10.0)
    records.finish()
    table = shown(tmp_path)
    assert table.loc[SMALL, "1"]["P4: bare matmul"] == "4 µs; cuBLAS + 2 empty kernels 5.1 µs, 1.20 of P4"
    assert table.loc[SMALL, "16"]["P4: bare matmul"] == "–"
    assert newest(tmp_path).best.loc[*AT["1"], P4]["arm"] == P4_BEST, "it is no bare matmul"


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
    whole = table.loc[LARGE, "4096"].drop("weights")
    assert set(whole.drop(LOOP)) == {"failed: out of memory: 2 GiB"} and whole[LOOP] == "–", "no step of it failed"
    lost = failures(by_hand, newest(by_hand).run_id)
    assert sorted(lost["table"]) == ["gpu_speed"] * 5 + ["gpu_steps"] * 2
    whole = ("qwen3-32b, chains, 4096 tokens cold", "out of memory: 2 GiB")
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
        "invented H200, 6 of 152 points: 132 processors, L2 60 MB, driver not recorded, CUDA 13.0, torch 2.13.0",
        "commit c0ffee, sources 5e5e5e5e5e5e",
        "copy 4.2 TB/s",
    ):
        assert words in text
    assert "read 4.4 TB/s, bf16 matmul 760 TFLOP/s, an empty kernel in a graph 1.3 µs, replaying a graph 1 µs" in text
    assert "500 to 500 W" in text and len(grid.points()) == 152 and "Continued" not in text
    assert "faster than this roofline" not in text


def test_limits_that_failed_and_throttling_are_said(tmp_path: Path) -> None:
    records = opened(tmp_path, limits=False)
    records.add(GpuLimitRow(limit="copy", unit="B/s", status="failed", reason="no memory"))
    records.add(GpuLimitRow(limit="bf16 matmul", unit="FLOP/s", value=7e14))
    records.add(GpuLimitRow(limit="another", unit="B/s", value=5e12))
    records.note(continued_on=[ENVIRONMENT | {"commit": "unknown", "processor": "two"}])
    add(records, AT["1"], CHAIN, 10.0, 10.0, slowed_by="power cap", roofline_share=1.2)
    add(records, AT["1"], "hf", 8.0, 10.0, slowed_by="")
    records.finish()
    text = section(tmp_path)
    assert "copy not measured (no memory), read not measured (not tried), bf16 matmul 700 TFLOP/s" in text
    assert "replaying a graph not measured (not tried), another 5 TB/s." in text
    assert "Continued on 1 other machine; what differs: commit, processor." in text
    assert (
        "slowed down: 1 rows by power cap, 1 rows do not say." in text
        and "**1 rows are faster than this roofline**" in text
    )


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
    add(records, AT["4096"], "hf", 120.0, 60.0, 40.0)
    for arm, us in (("P4 cuBLASLt", 48.0), (P4_BEST, 40.0)):
        add(records, AT["4096"], arm, us)
        add(records, AT["4096"], arm, us + 1, step=Step.PARTS)
    add(records, AT["4096"], "own loop 64 x 64, 4 warps, 4 stages", 1.3, None, 41.0, Step.PARTS)
    add(records, AT["4096"], "own loop 128 x 64, 8 warps, 3 stages", 1.0, None, 41.0, Step.PARTS)
    failed = {"status": "failed", "reason": "out of resource"}
    add(records, AT["1"], "own loop 64 x 64, 4 warps, 4 stages", None, step=Step.PARTS, **failed)
    records.finish()
    best, table = newest(tmp_path).best, shown(tmp_path)
    assert best.loc[*AT["4096"], P4]["arm"] == "P4 cuBLAS" and "3.00 of P4" in table.loc[SMALL, "4096"][EXACT]
    assert table.loc[SMALL, "4096"][LOOP] == "1 µs, 0.02 of P4; 128 x 64, 8 warps, 3 stages"
    assert table.loc[SMALL, "1"][LOOP] == "failed: out of resource"
