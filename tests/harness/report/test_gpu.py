"""What a reader sees of a GPU run: tables, sentences, goals and plots, from records whose numbers are all invented.

No number below was measured. They lie in a temporary folder, and their run says `invented` for a GPU.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import pandas as pd
import pytest

from castpoint.harness.gpu import arms
from castpoint.harness.problems import grid
from castpoint.harness.report import gpu as gpu_report
from castpoint.harness.report import gpu_plots, gpu_rows
from castpoint.harness.report.gpu import regime_table, section, speed_table, without_time
from castpoint.harness.report.gpu_findings import sentences
from castpoint.harness.report.gpu_goals import ABOVE, GOALS, OF_P4, SPEEDUP, Goal, break_even, goal_status, goals
from castpoint.harness.report.gpu_rows import EXACT, FOLDED, LOSS, NOISE, P1, P4, WIN, newest
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import ErrorRow, GpuCheckRow, GpuPointRow, GpuSpeedRow, Kind
from castpoint.variants.catalogue import PLANS

CHAIN, OWN_CHAIN = "P1 F.rms_norm | cuBLAS | head_norm kernel", "P1 own kernels | cuBLAS"
FUSED, SEPARATE = "split-k 16 x 128, 8 splits, 8 warps, 4 stages", "separate"
ENVIRONMENT = {
    "commit": "c0ffee",
    "versions": {"torch": "2.13.0", "triton": "3.9.0"},
    "gpu": {"name": "invented H200", "multiprocessors": 132, "l2_bytes": 60_000_000, "cuda": "13.0"},
}
LIMITS = {
    "copy_bytes_per_s": 4.2e12,
    "bf16_flops_per_s": 760e12,
    "reason": "",
    "read": {"bytes_per_s": 4.4e12, "seconds": 1e-6},
    "launch": {"graph_s": {1: 4e-6, 3: 5e-6, 30: 40e-6, 300: 391e-6}, "per_kernel_s": 1.3e-6, "per_replay_s": 1e-6},
}


def opened(folder: Path) -> Records:
    records = Records(folder, {"model": "qwen3-0.6b"}, ENVIRONMENT)
    records.note(command="gpu", limits=LIMITS)
    return records


def add(records: Records, point: tuple, arm: str, us: float | None, p1_us: float | None = None, **more: object) -> None:
    """A row of gpu_speed: p10 and p90 1 % beside the median, the speed-up p1_us / us, noise of 2 %."""
    model, tokens, regime = point
    starts = {"P1": Kind.CHAIN, "P2": Kind.COMPILED, "P4": Kind.MATMUL, "own loop": Kind.LOOP}
    kind = next((kind for start, kind in starts.items() if arm.startswith(start)), Kind.OWN)
    config = more.pop("config", FUSED if kind == Kind.OWN else "")
    row = {"kind": kind, "cold": regime != grid.HOT, "config": config, "kernel": config.split(" ")[0]}
    row |= {"prepass": "none" if config else "", "slowed_by": "none"}
    row |= {"noise_p10": 0.98, "noise_p90": 1.02, "sm_mhz": 1980.0, "watts": 500.0, "celsius": 50.0}
    if us is not None:
        row |= {"p10_us": 0.99 * us, "p50_us": us, "p90_us": 1.01 * us, "floor_us": us / 2, "roofline_share": 0.5}
        row |= {"tflops": 79.0}
    if us is not None and p1_us is not None:
        ratio = p1_us / us
        row |= {"p1": CHAIN, "speedup_p1_p10": 0.99 * ratio, "speedup_p1_p50": ratio, "speedup_p1_p90": 1.01 * ratio}
    records.add(GpuSpeedRow(model=model, tokens=tokens, regime=regime, arm=arm, **(row | more)))


SMALL, LARGE = "qwen3-0.6b", "qwen3-32b"
AT = {name: (SMALL, tokens, grid.COLD) for name, tokens in (("1", 1), ("16", 16), ("256", 256), ("4096", 4096))}


def invent_by_hand(folder: Path, upside_down: bool = False) -> Records:
    """Six points, each with something of its own; see the comments."""
    records = opened(folder)

    def chain(point: tuple, us: float, p4_us: float | None = None) -> None:
        add(records, point, CHAIN, us, us)
        add(records, point, OWN_CHAIN, 1.1 * us, us)
        if p4_us:
            add(records, point, "P4 cuBLASLt", 1.2 * p4_us)
            add(records, point, "P4 cuBLAS", p4_us)
        records.add(GpuPointRow(**dict(zip(("model", "tokens", "regime"), point, strict=True))))

    def own(point: tuple, arm: str, us: float, p1_us: float | None, **more: object) -> None:
        if upside_down and p1_us is not None:
            more["speedup_p1_p50"] = us / p1_us
        add(records, point, arm, us, p1_us, **more)

    chain(AT["1"], 6.0, 4.0)  # wins; folded is red; fp32 is in no group
    own(AT["1"], "one-rounding", 4.5, 6.0)
    own(AT["1"], "hf", 4.0, 6.0)  # 1.5
    own(AT["1"], "deferred", 3.75, 6.0)  # 1.6
    add(records, AT["1"], "folded", None, status="red", reason="not timed: 3 of 9 elements | differ")
    own(AT["1"], "fp32", 3.0, 6.0)  # the fastest, and no match for a bf16 matmul
    add(records, AT["1"], "P2 torch.compile", 7.5, 6.0)  # 0.8
    chain(AT["16"], 6.06, 5.0)  # noise, loss, win
    own(AT["16"], "hf", 6.0, 6.06)  # 1.01
    add(records, AT["16"], "one-rounding", 1.0, 6.06, status="red", reason="wrong")  # whatever its time says
    own(AT["16"], "deferred", 6.6, 6.06)  # 0.918
    own(AT["16"], "folded", 5.0, 6.06)  # 1.212
    for arm in (CHAIN, OWN_CHAIN):  # no P1
        add(records, AT["256"], arm, None, status="failed", reason="RuntimeError: no kernel")
    own(AT["256"], "hf", 9.0, None)
    records.add(GpuPointRow(model=SMALL, tokens=256, regime=grid.COLD))
    chain(AT["4096"], 60.0, 50.0)  # a loss of a plan that ran unfused; the dearest loss is deferred's
    own(AT["4096"], "one-rounding", 62.0, 60.0, config=SEPARATE)  # 0.968
    own(AT["4096"], "deferred", 80.0, 60.0)  # 0.75
    red = (LARGE, 1, grid.COLD)  # its P1 turned out to be impossible
    add(records, red, CHAIN, None, status="red", reason="6.00 TB/s of cold memory: H200 has 4.8")
    add(records, red, OWN_CHAIN, 33.0, 17.0)
    own(red, "hf", 30.0, 17.0)
    failed = {"status": "failed", "reason": "out of memory: 2 GiB"}
    records.add(GpuPointRow(model=LARGE, tokens=4096, regime=grid.COLD, **failed))
    add(records, (SMALL, 1, grid.HOT), CHAIN, 5.0, 5.0)
    add(records, (SMALL, 1, grid.HOT), "one-rounding", 4.0, 5.0)
    return records


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("invented")
    invent_by_hand(folder).finish()
    return folder


# ---------------------------------------------------------------- nothing measured


def test_without_a_gpu_run_it_says_so_and_nothing_else(tmp_path: Path) -> None:
    for folder in (tmp_path / "none", tmp_path):
        assert speed_table(folder) == gpu_report.NOT_MEASURED and "`make gpu`" in gpu_report.NOT_MEASURED
        assert section(folder) == "" and sentences(folder) == []
    bench = Records(tmp_path, {"model": SMALL}, {"device": "cpu"})
    bench.finish()
    assert speed_table(tmp_path) == gpu_report.NOT_MEASURED and gpu_plots.draw(tmp_path, bench.run_id) == []
    for table in ("gpu_speed", "gpu_checks"):
        (tmp_path / f"{table}.csv").unlink()  # a folder of an older version
    assert gpu_plots.draw(tmp_path, bench.run_id) == [] and section(tmp_path) == ""
    invent_by_hand(tmp_path)  # a run that never finished
    assert speed_table(tmp_path) == gpu_report.NOT_MEASURED
    assert "|" not in gpu_report.NOT_MEASURED and not re.search(r"\d+ µs", gpu_report.NOT_MEASURED)


# ---------------------------------------------------------------- what is shown, recomputed by hand


def check_by_hand(folder: Path) -> None:
    """What the tables must say of the records above; every figure by hand."""
    run = newest(folder)
    found = {key: row["verdict"] for key, row in run.best.iterrows() if key[3] in gpu_rows.GROUPS}
    assert found[*AT["1"], EXACT] == WIN and found[*AT["16"], EXACT] == NOISE
    assert found[*AT["16"], "deferred"] == LOSS and found[*AT["16"], FOLDED] == WIN
    assert found[*AT["4096"], EXACT] == LOSS and found[*AT["4096"], "deferred"] == LOSS
    table = regime_table(run, grid.COLD).set_index(["model", "tokens"])
    first = table.loc[SMALL, "1"]
    assert first["exact"] == (
        "4 µs, 1.50 × (1.49–1.51) **win**, 1.000 of P4, roofline 50%; hf, split-k"  # 1.485 and 1.515
    )
    assert first["deferred"].startswith("3.75 µs, 1.60 × (1.58–1.62) **win**, 0.938 of P4")
    assert first["P2: torch.compile"] == "7.5 µs, 0.80 × (0.79–0.81) **loss**"
    assert first["P1: best separate chain"] == "6 µs: F.rms_norm + cuBLAS + head_norm kernel"
    assert first["P4: bare matmul"] == "4 µs: cuBLAS"
    assert "**noise**" in table.loc[SMALL, "16"]["exact"]
    assert "0.75 × (0.74–0.76) **loss**" in table.loc[SMALL, "4096"]["deferred"]
    text = section(folder)
    assert "Here, of 9 comparisons of a group with P1 3 are wins, 3 losses, 1 lie within the noise, 2 cannot be" in text
    first_sentence = sentences(folder)[0]
    assert "Largest win: 1.60 × (1.58–1.62), `deferred` (split-k), qwen3-0.6b at 1 token: 3.75 µs against 6" in (
        first_sentence
    )
    assert "Largest loss: 0.75 × (0.74–0.76), `deferred` (split-k), qwen3-0.6b at 4096 tokens: 80 µs" in first_sentence


def test_tables_say_what_was_invented(by_hand: Path) -> None:
    check_by_hand(by_hand)


def test_losses_left_out_are_noticed(by_hand: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = gpu_rows.best_rows
    monkeypatch.setattr(gpu_rows, "best_rows", lambda rows: honest(rows[rows["verdict"] != LOSS]))
    with pytest.raises((AssertionError, KeyError)):
        check_by_hand(by_hand)


def test_noise_ignored_is_noticed(by_hand: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = gpu_rows.verdict

    def careless(row: pd.Series, p1: object, best_us: float | None) -> str:
        found = honest(row, p1, best_us)
        return found if found != NOISE else WIN if row["speedup_p1_p50"] > 1 else LOSS

    monkeypatch.setattr(gpu_rows, "verdict", careless)
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
    assert "**win**" not in speed_table(tmp_path) and "1.50 × (" not in section(tmp_path)


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
    assert red["verdict"] == "not judged: its P1 has no valid time"
    records = opened(tmp_path / "slower")
    add(records, AT["1"], CHAIN, 10.0, 10.0)
    add(records, AT["1"], OWN_CHAIN, 9.0, 10.0)
    add(records, AT["1"], "hf", 9.5, 10.0)  # a win over the slower of two
    records.finish()
    best = newest(tmp_path / "slower").best
    assert best.loc[*AT["1"], EXACT]["verdict"] == "not judged: another P1 was faster"
    assert best.loc[*AT["1"], P1]["arm"] == OWN_CHAIN


def test_what_has_no_time_is_shown_with_its_reason(by_hand: Path) -> None:
    run = newest(by_hand)
    table = regime_table(run, grid.COLD).set_index(["model", "tokens"])
    assert table.loc[SMALL, "1"][FOLDED] == "red: not timed: 3 of 9 elements + differ"
    assert table.loc[SMALL, "256"]["P1: best separate chain"] == "failed: RuntimeError: no kernel"
    assert table.loc[SMALL, "256"][EXACT] == "9 µs, not judged: no P1, roofline 50%; hf, split-k"
    assert table.loc[SMALL, "256"]["deferred"] == "not measured"
    assert table.loc[SMALL, "16"]["P2: torch.compile"] == "–"  # the grid does not ask for it there
    assert set(table.loc[LARGE, "4096"]) == {"failed: out of memory: 2 GiB"}
    lost = without_time(run).set_index("arm")
    assert lost.loc["folded", "reason"] == "not timed: 3 of 9 elements + differ"
    assert lost.loc["the whole point", "at"] == "qwen3-32b 4096 cold"
    chains = {name.replace(" | ", " + ") for name in (CHAIN, OWN_CHAIN)}
    assert set(lost.index) == {"one-rounding", "folded", "the whole point", *chains}
    text = section(by_hand)
    others = ", ".join(model for model in grid.MODELS if model not in (SMALL, LARGE))
    assert f"qwen3-0.6b at 2–8, 32–128, 512–2048 tokens · {others} at 1–4096 tokens · qwen3-32b at 2–2048 tok" in text


def test_every_row_of_a_table_has_as_many_cells_as_its_head(by_hand: Path) -> None:
    """Names of chains and reasons hold bars, which would end a cell."""
    for text in (section(by_hand), speed_table(by_hand)):
        tables = re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)
        assert tables
        for table in tables:
            assert len({line.count("|") for line in table.strip().split("\n")}) == 1, table


def test_hot_rows_and_weights_that_were_not_cold_count_for_nothing(by_hand: Path, tmp_path: Path) -> None:
    run = newest(by_hand)
    assert set(run.counted()["regime"]) == {grid.COLD}
    hot = regime_table(run, grid.HOT)
    assert list(hot["tokens"]) == ["1"] and "P4: bare matmul" not in hot  # the grid does not ask for it there
    records = opened(tmp_path / "warm")
    for arm, us in ((CHAIN, 10.0), ("hf", 5.0)):
        add(records, AT["1"], arm, us, 10.0, cold=False)
    records.finish()
    warm = newest(tmp_path / "warm")
    assert not len(warm.counted()) and sentences(tmp_path / "warm") == []
    assert list(regime_table(warm, grid.COLD)["tokens"]) == ["1 (weights not cold)"]
    assert "weights not cold" in speed_table(tmp_path / "warm")
    assert set(goals(warm)["answer"]) == {"not measured"}
    assert gpu_plots.draw(tmp_path / "warm", warm.run_id) == []


def test_the_readme_table_shows_goal_points_alone(by_hand: Path) -> None:
    lines = [line for line in speed_table(by_hand).split("\n") if line.startswith("| qwen3")]
    assert len(lines) == 16
    assert "| 6 | 3.75 (deferred, split-k) | 1.60 × (1.58–1.62) **win** | 4 | 50% |" in lines[0]
    assert "| 60 | 62 (one-rounding, separate) | 0.968 × (0.958–0.977) **loss** | 50 | 50% |" in lines[3]
    assert lines[2].startswith(
        "| qwen3-0.6b | 256 | failed: RuntimeError: no kernel | 9 (hf, split-k) | not judged: no P1"
    )
    assert lines[4] == "| qwen3-4b | 1 | not measured | not measured | – | not measured | – |"


def test_conditions_are_those_of_the_run(by_hand: Path) -> None:
    text = section(by_hand)
    for words in (
        "invented H200: 132 processors, L2 60 MB, driver not recorded, CUDA 13.0, torch 2.13.0",
        "copy 4.2 TB/s",
    ):
        assert words in text
    assert (
        "reading 4.4 TB/s, bf16 matmul 760 TFLOP/s; an empty kernel in a graph 1.3 µs, replaying a graph 1 µs" in text
    )
    assert "1: 4 µs, 3: 5 µs, 30: 40 µs, 300: 391 µs" in text and "500 to 500 W" in text
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
    assert "1 rows by power cap (1 of 2 rows do not say)" in text and "**1 rows are faster than this roofline**" in text
    assert not any("Launches" in line for line in sentences(tmp_path))


# ---------------------------------------------------------------- sentences


def test_sentences_say_those_figures(by_hand: Path) -> None:
    extremes, pays, exact, launches, reached = sentences(by_hand)
    assert extremes.startswith("**invented H200, against the best separate chain,** cold weights: of 9 comparisons of")
    # 4096 ran unfused; at 16 the fastest plan is folded; 256 and the larger model have no P1 to be judged by
    assert pays.endswith(": qwen3-0.6b at 1–16; not at 4096.")
    # exact / deferred: 4 / 3.75, 6 / 6.6, 62 / 80; exact / folded: 6 / 5
    assert (
        "0.909 of `deferred`'s time in the median of 3 points (0.78 to 1.067, the most at qwen3-0.6b, 1 token)" in exact
    )
    assert "1.20 of `folded`'s time in the median of 1 points" in exact
    assert "1.30 µs a kernel" in launches and "so 2.60 for the two" in launches
    assert "at 1 token, µs: qwen3-0.6b +2.25, qwen3-32b +3.00" in launches
    assert f"of {len(GOALS)}, 8 not met, 4 open, 23 not measured." in reached


def test_a_fused_plan_that_wins_by_noise_does_not_pay(tmp_path: Path) -> None:
    records = opened(tmp_path)
    for tokens, ratio, config in ((1, 1.3, FUSED), (2, 1.01, FUSED), (4, 1.3, SEPARATE), (8, 1.3, FUSED)):
        add(records, (SMALL, tokens, grid.COLD), CHAIN, 10.0, 10.0)
        add(records, (SMALL, tokens, grid.COLD), "hf", 10.0 / ratio, 10.0, config=config)
    records.finish()
    assert "qwen3-0.6b at 1, 8; not at 2–4." in sentences(tmp_path)[1]


# ---------------------------------------------------------------- goals


def goal(measure: str, **more: object) -> Goal:
    return Goal(**({"measure": measure, "tokens": (1, 2), "models": ("a", "b"), "target": 1.5} | more))


@pytest.mark.parametrize(
    ("asked", "values", "expected"),
    [
        (goal(SPEEDUP), {}, "not measured"),
        (goal(SPEEDUP), {("a", 1): 1.5, ("a", 2): 1.6, ("b", 1): 1.7, ("b", 2): 1.5}, "met"),
        (goal(SPEEDUP), {("a", 1): 1.5, ("a", 2): 1.49, ("b", 1): 1.7, ("b", 2): 1.5}, "not met"),
        (goal(SPEEDUP), {("a", 1): 1.4}, "not met"),  # whatever the rest may be
        (goal(SPEEDUP), {("a", 1): 9.0}, "open: 1 of 4 points"),
        (goal(SPEEDUP, stretch=1.6, models=("a",)), {("a", 1): 1.6, ("a", 2): 1.7}, "stretch met"),
        (goal(SPEEDUP, stretch=1.6, models=("a",)), {("a", 1): 1.55, ("a", 2): 1.7}, "met"),
        (goal(OF_P4), {("a", 1): 1.5, ("a", 2): 1.0, ("b", 1): 1.0, ("b", 2): 1.0}, "met"),
        (goal(OF_P4), {("a", 1): 1.6, ("a", 2): 1.0, ("b", 1): 1.0, ("b", 2): 1.0}, "not met"),
        (goal(OF_P4, shapes=1), {("a", 1): 1.6, ("a", 2): 1.0, ("b", 1): 1.0, ("b", 2): 1.0}, "met"),
        (goal(OF_P4, shapes=1), {("a", 1): 1.6, ("a", 2): 1.0, ("b", 1): 1.0}, "open: 3 of 4 points"),
        (goal(OF_P4, shapes=1), {("a", 1): 1.6, ("b", 1): 1.6}, "not met"),
    ],
)
def test_a_goal_is_met_by_its_worst_point(asked: Goal, values: dict, expected: str) -> None:
    assert goal_status(asked, values) == expected


def test_goals_are_those_that_were_set() -> None:
    """Typed once more, from the table of goals: tokens, model, target, stretch."""
    of_model = {(g.tokens[0], g.models): (g.target, g.stretch) for g in GOALS if g.measure == SPEEDUP and not g.group}
    for model, expected in {
        "qwen3-0.6b": {1: (1.8, 2.2), 16: (1.75, 2.15), 256: (1.3, 1.6), 1024: (1.12, 1.22)},
        "qwen3-4b": {1: (1.4, 1.5), 16: (1.35, 1.45), 256: (1.12, 1.25), 1024: (1.05, 1.1)},
        "qwen3-8b": {1: (1.25, 1.35), 16: (1.2, 1.3), 32: (1.15, 1.3), 256: (1.05, 1.15), 1024: (1.02, 1.06)},
        "qwen3-32b": {1: (1.1, 1.18), 16: (1.05, 1.13), 32: (1.08, 1.15), 256: (1.0, 1.08), 1024: (1.0, 1.03)},
    }.items():
        assert {tokens: of_model[tokens, (model,)] for tokens in expected} == expected
    assert of_model[32, ("qwen3-0.6b", "qwen3-1.7b", "qwen3-30b-a3b", "qwen3-4b")] == (1.3, 1.5)
    heavy = next(g for g in GOALS if g.measure == "share of roofline" and g.tokens == (32, 64, 128))
    assert set(grid.MODELS) - set(heavy.models) == {"qwen3-0.6b", "qwen3-1.7b", "qwen3-30b-a3b"}
    limits = [(g.tokens[0], g.target, g.shapes) for g in GOALS if g.measure == OF_P4]
    assert limits == [(1, 1.0, 6), (16, 1.05, 0), (32, 1.1, 0), (256, 1.1, 0), (1024, 1.08, 0)]


def test_goals_stand_beside_what_was_reached(by_hand: Path) -> None:
    table = goals(newest(by_hand))
    small = table[(table["models"] == "0.6b") & (table["measure"] == SPEEDUP)].set_index("tokens")
    assert list(small.loc["1–8", ["reached, worst", "answer"]]) == ["1.60 × (qwen3-0.6b, 1)", "not met"]
    assert small.loc["256", "answer"] == "not measured"  # no P1
    assert small.loc["1024–4096", "answer"] == "not met"
    never = table[table["measure"] == f"{SPEEDUP}, deferred"].iloc[0]
    assert (never["goal"], never["reached, worst"]) == ("≥ 0.980 ×", "0.75 × (qwen3-0.6b, 4096)")
    assert never["answer"] == "not met"
    above = table[(table["measure"] == ABOVE) & (table["tokens"] == "1–8")].iloc[0]
    assert above["reached, worst"] == "15.00 µs (qwen3-32b, 1)"  # 30 less its floor, half of it
    assert set(table[table["measure"].str.startswith("4-bit")]["answer"]) == {"not measured"}


# ---------------------------------------------------------------- checks


def test_checks_name_every_config_that_is_not_ok(tmp_path: Path) -> None:
    records = opened(tmp_path)
    add(records, AT["1"], CHAIN, 10.0, 10.0)
    for plan, config, check, status in (
        *(("hf", config, check, "ok") for config in ("default", "a", "b") for check in ("exact", "envelope")),
        ("deferred", "default", "exact", "ok"), ("deferred", "default", "envelope", "ok"),
        ("deferred", "c | d", "exact", "red"), ("deferred", "c | d", "envelope", "failed"),
    ):  # fmt: skip
        reason = "" if status == "ok" else "3 of 9"
        found = {"share_equal": 0.5, "status": status, "reason": reason}
        records.add(GpuCheckRow(plan=plan, config=config, tokens=70, check=check, **found))
    key = {"plan": "hf", "tokens": 70}
    for setting, share, ulp in (("default", 0.75, 8.0), ("fp32 partials", 0.999, 1.0)):
        records.add(GpuCheckRow(**key, config=setting, check="eager", share_equal=share, max_ulp=ulp))
    records.add(GpuCheckRow(**key, config="one fp32 chain", check="eager", status="failed", reason="unknown"))
    records.add(GpuCheckRow(**key, config="default", check="interpreter", share_equal=0.99987, max_ulp=1.0))
    records.finish()
    text = section(tmp_path)
    assert "| hf | default and 2 others | ok | ok |" in text and "| deferred | default | ok | ok |" in text
    assert "| deferred | c + d | red: 3 of 9 | failed: 3 of 9 |" in text
    assert "| default | 75.0000% | 8 |" in text and "| one fp32 chain | failed: unknown | – |" in text
    assert "| hf | 99.9870% | 1 |" in text


# ---------------------------------------------------------------- plots


def invent_whole(folder: Path) -> str:
    """A grid with most of its points, as shapes of curves alone: gains that shrink with tokens and with size."""
    records = opened(folder)
    for point in grid.points():
        key = (point.model, point.tokens, point.regime)
        if point.regime != grid.COLD or point.model == "qwen3-235b-a22b" or point.tokens == 512:
            continue
        floor = next(row for row in arms.rows(point) if row.arm == "P1 best").floor_s() * 1e6
        p4 = 1.15 * floor + 2.5
        p1 = p4 + 3.0 + 0.02 * point.tokens**0.9
        add(records, key, CHAIN, p1, p1, roofline_share=floor / p1)
        add(records, key, "P4 cuBLAS", p4, roofline_share=floor / p4)
        for row in arms.rows(point):
            if row.arm.startswith("P2 "):
                add(records, key, row.arm, 1.1 * p1, p1)
        for place, name in enumerate(grid.own_plans(point)):
            us = (1.12 + 0.05 * math.log2(point.tokens) / 6) * floor + 2.3 + 0.12 * (place % 4)
            wide = PLANS[name].plan.matmul
            us *= {"bf16": 1, "tf32": 2, "tf32x3": 4, "fp32": 9}[wide]
            us *= 1.1 if name == "folded" and point.tokens > 64 else 1
            late = point.tokens >= 1024 and gpu_rows.group_of(name) == EXACT
            add(records, key, name, us, p1, roofline_share=floor / us, config=SEPARATE if late else FUSED)
    for place, name in enumerate(PLANS):
        error = {"model": SMALL, "weights": "calibrated", "tokens": 64, "seed": 0, "plan": name, "backend": "spec"}
        for layer, size in ((0, 1e-3), (1, 1.1e-3)):
            error |= {"layer": layer, "rel_rms": size * (1.66 + (place % 7) ** 2 / 9)}
            records.add(ErrorRow(output="k", reference="truth", **error))
    records.finish()
    return records.run_id


def test_plots_are_drawn_and_the_same_every_time(tmp_path: Path) -> None:
    run_id = invent_whole(tmp_path)
    plots = gpu_plots.draw(tmp_path, run_id)
    assert [path.stem for path in plots] == ["gpu_speedup", "gpu_roofline", "gpu_speed_error"]
    first = {path: path.with_suffix(".svg").read_bytes() for path in plots}
    gpu_plots.draw(tmp_path, run_id)
    assert all(path.with_suffix(".svg").read_bytes() == content for path, content in first.items())


def test_plots_of_a_grid_with_holes(by_hand: Path) -> None:
    """No errors, no plot of them; the red P1's speed-ups are not drawn."""
    run = newest(by_hand)
    assert [path.stem for path in gpu_plots.draw(by_hand, run.run_id)] == ["gpu_speedup", "gpu_roofline"]
    shown = re.findall(r"\(plots/(\w+)\.png\)", section(by_hand))
    assert shown == ["gpu_speedup", "gpu_roofline"]  # and no picture that is not there
    figure = gpu_plots.speedups(run)
    panels = dict(zip(grid.MODELS, figure.axes, strict=True))
    empty = {model for model, axes in panels.items() if any(t.get_text() == "not measured" for t in axes.texts)}
    assert empty == set(grid.MODELS) - {SMALL}
    heights = [y for line in panels[SMALL].lines for y in line.get_ydata()]
    assert min(heights) == pytest.approx(0.75) and max(heights) == pytest.approx(1.6)


def test_the_time_against_error_is_that_over_p1(tmp_path: Path) -> None:
    """3 us of a chain of 6 are 0.5 of its time, drawn at the plan's error over both layers."""
    records = opened(tmp_path)
    add(records, AT["1"], CHAIN, 6.0, 6.0)
    add(records, AT["1"], "hf", 3.0, 6.0)
    for model, layer, error in ((SMALL, 0, 3e-3), (SMALL, 1, 4e-3), (LARGE, 0, 9e-3)):
        key = {"model": model, "weights": "w", "layer": layer, "tokens": 4, "seed": 0, "plan": "hf", "backend": "spec"}
        records.add(ErrorRow(**key, output="k", reference="truth", rel_rms=error))
    records.finish()
    run = newest(tmp_path)
    errors = gpu_plots.latest(tmp_path, "errors")[1]
    left, right = gpu_plots.speed_error(run, errors).axes
    assert left.collections[0].get_offsets().tolist() == [[pytest.approx(math.sqrt((9e-6 + 16e-6) / 2)), 0]]
    assert [line.get_xdata().tolist() for line in right.lines if line.get_marker() == "o"] == [[0.5]]


def test_words_are_kept_as_words(by_hand: Path) -> None:
    """frames.load takes columns that it does not know for numbers; a config is none."""
    row = newest(by_hand).best.loc[*AT["1"], EXACT]
    assert (row["config"], row["p1"], row["cold"], row["slowed_by"]) == (FUSED, CHAIN, True, "none")
    assert newest(by_hand).best.loc[*AT["1"], P4]["arm"] == "P4 cuBLAS"


# ---------------------------------------------------------------- our own loop


def add_loop(records: Records, model: str, p1_us: float, p4_us: float, loop_us: float | None, **more: object) -> None:
    """The best chain, two bare matmuls and two tiles of our own loop at 4096 tokens."""
    point = (model, 4096, grid.COLD)
    add(records, point, CHAIN, p1_us, p1_us)
    add(records, point, "hf", 2 * p1_us, p1_us)
    for arm, us in (("P4 cuBLASLt", 1.2 * p4_us), ("P4 cuBLAS", p4_us)):
        add(records, point, arm, us)
    add(records, point, "own loop 64 x 64, 4 warps, 4 stages", loop_us and 1.3 * loop_us, **more)
    add(records, point, "own loop 128 x 64, 8 warps, 3 stages", loop_us, **more)


@pytest.mark.parametrize(
    ("loop_us", "share", "answer", "more"),
    [
        (50.0, "80.0%", "fusion can win", {}),  # of P4's 40 us; P1 takes 60
        (58.0, "69.0%", "fusion can win", {}),  # its p90 58.6, P1's p10 59.4
        (59.0, "67.8%", "within noise", {}),  # 59.6 and 59.4 overlap
        (61.0, "65.6%", "within noise", {}),
        (62.0, "64.5%", "fusion cannot win with this loop", {}),
        (80.0, "50.0%", "fusion cannot win with this loop", {}),
        (50.0, "80.0%", "within noise", {"noise_p90": 1.25}),  # of a ratio of 1.2
        (80.0, "50.0%", "within noise", {"noise_p10": 0.7}),  # of 0.75
        (50.0, "80.0%", "within noise", {"p90_us": 59.5}),  # P1's p10 is 59.4
        (80.0, "50.0%", "within noise", {"p10_us": 60.5}),  # P1's p90 is 60.6
        (50.0, "80.0%", "not judged: no noise floor", {"noise_p90": None}),
    ],
)
def test_break_even_is_computed_from_the_same_run(
    loop_us: float, share: str, answer: str, more: dict, tmp_path: Path
) -> None:
    records = opened(tmp_path)
    add_loop(records, SMALL, 60.0, 40.0, loop_us, **more)
    add_loop(records, LARGE, 800.0, 720.0, 10 * loop_us, **more)
    records.finish()
    table = break_even(newest(tmp_path)).set_index("model")
    assert list(table.index) == [SMALL, LARGE]
    assert list(table.loc[SMALL, ["share of P4's speed", "break-even", "answer"]]) == [share, "66.7%", answer]
    assert table.loc[SMALL, "own loop, µs"] == f"{loop_us:.3g} (128 x 64, 8 warps, 3 stages)"
    assert (table.loc[SMALL, "P4, µs"], table.loc[LARGE, "break-even"]) == ("40 (cuBLAS)", "90.0%")


def test_break_even_shows_nothing_that_was_not_measured(by_hand: Path, tmp_path: Path) -> None:
    assert not len(break_even(newest(by_hand))) and "Can fusion pay" not in section(by_hand)
    assert not any("Before any fusing" in line for line in sentences(by_hand))
    records = opened(tmp_path)
    add_loop(records, SMALL, 60.0, 40.0, 50.0)
    add_loop(records, "qwen3-4b", 60.0, 40.0, None, status="failed", reason="out of resource")
    add_loop(records, "qwen3-8b", 60.0, 40.0, 50.0, cold=False)
    add(records, (LARGE, 4096, grid.COLD), "own loop 64 x 64, 4 warps, 4 stages", 50.0, kind="part")  # no P1, no P4
    records.finish()
    text = section(tmp_path)
    assert list(break_even(newest(tmp_path))["model"]) == [SMALL]
    assert "### Can fusion pay at 4096 tokens?" in text and "| 80.0% | 66.7% | fusion can win |" in text
    assert "| own loop 64 x 64, 4 warps, 4 stages | failed | out of resource | qwen3-4b 4096 cold |" in text


def test_the_sentence_on_our_own_loop(tmp_path: Path) -> None:
    records = opened(tmp_path)
    add_loop(records, SMALL, 60.0, 40.0, 50.0)
    add_loop(records, LARGE, 800.0, 720.0, 900.0)
    records.finish()
    (said,) = [line for line in sentences(tmp_path) if "Before any fusing" in line]
    assert said.endswith(
        "qwen3-0.6b 80.0% (break-even 66.7%: fusion can win), "
        "qwen3-32b 80.0% (break-even 90.0%: fusion cannot win with this loop)."
    )


def test_our_own_loop_is_neither_p4_nor_a_plan(tmp_path: Path) -> None:
    """However fast it is, no comparison with the bare matmul or the chain changes."""
    records = opened(tmp_path)
    add_loop(records, SMALL, 60.0, 40.0, 1.0)
    records.finish()
    run = newest(tmp_path)
    assert run.at(*AT["4096"], P4)["arm"] == "P4 cuBLAS" and run.own(SMALL, 4096)["arm"] == "hf"
    assert run.at(*AT["4096"], EXACT)["against_p4"] == 3 and set(run.counted()["what"]) == {EXACT}
