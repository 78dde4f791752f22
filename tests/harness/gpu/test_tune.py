"""Which configs tuning times, and which of them enter the table."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_cuda import FakeCuda
from gpu_support import SHAPE, TINY, checked_as, records_in, rows, setting_at, stood_in

from castpoint.harness.conformance.cuda import binary_of
from castpoint.harness.gpu import tune
from castpoint.harness.gpu.order import SEPARATE
from castpoint.harness.gpu.tune import fastest_fused, table_of, time_candidates
from castpoint.harness.problems.grid import STANDS_FOR, Point
from castpoint.harness.timing.rig import AGAIN
from castpoint.kernels.config import Config
from castpoint.kernels.dispatch import Table
from castpoint.variants.catalogue import plan_named

ONE, TWO = Config("fused", "hidden", 16, 64), Config("split-k", block_m=16, block_k=32, splits=2)
NOISE = 1.04  # separate's two graphs differ by so much, always
POINT = Point("tiny", 4)


@pytest.fixture(autouse=True)
def stands_in(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two candidates, of arms that compute nothing."""
    stood_in(monkeypatch)
    monkeypatch.setattr(tune, "tiles", lambda point, plan: [ONE, TWO])


def tuned(folder: Path, one: float, two: float, point: Point = POINT) -> Table:
    """The table where `separate` takes 25 us, and those two as long as given, in us."""
    times = {str(ONE): one * 1e-6, str(TWO): two * 1e-6, "separate": 25e-6}

    def seconds(name: str, now: float) -> float:
        second_graph = name.count(AGAIN) % 2 and name.startswith("separate")
        return times[name.split(AGAIN)[0]] / (NOISE if second_graph else 1)

    time_candidates(setting_at(point, records_in(folder), FakeCuda(seconds)))
    return table_of(rows(folder, "tuning"), "Fake GPU")


def test_what_beats_separate_by_more_than_the_noise_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked_as(monkeypatch)
    table = tuned(tmp_path / "wins", one=30, two=20)
    assert table == {("Fake GPU", SHAPE, scale): {4: TWO} for scale in STANDS_FOR}
    wanted = {(str(SEPARATE), scale) for scale in STANDS_FOR} | {(str(c), s) for c in (ONE, TWO) for s in STANDS_FOR}
    found = {(row["config"], row["scale"]): row for row in rows(tmp_path / "wins", "tuning")}
    assert found.keys() == wanted and {row["status"] for row in found.values()} == {"ok"}
    best = found[str(TWO), "epilogue"]
    assert (best["p50_us"], best["speedup_separate"], best["noise_p90"], best["splits"]) == ("20", "1.25", "1.04", "2")
    for folder, fastest in (("loses", 29), ("within the noise", 25 / 1.03)):
        table = tuned(tmp_path / folder, one=30, two=fastest)
        assert table["Fake GPU", SHAPE, "prologue"] == {4: SEPARATE}, f"a fused config that {folder} was taken"
        assert table["Fake GPU", SHAPE, "epilogue"] == {4: TWO}, "separate cannot apply rstd behind the matmul"
    assert tuned(tmp_path / "beyond it", one=30, two=25 / 1.05)["Fake GPU", SHAPE, "prologue"] == {4: TWO}


def test_a_config_that_is_wrong_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong for one plan, in its binary for one token alone: fastest, and taken wherever it is right."""
    asked = checked_as(monkeypatch, {binary_of("deferred", TWO, 1, TINY.hidden_size): "7 elements differ"})
    one, more = (tuned(tmp_path, one=30, two=2, point=Point("tiny", tokens)) for tokens in (1, 4))
    assert one == {("Fake GPU", SHAPE, s): {1: ONE if s == "epilogue" else TWO} for s in STANDS_FOR}
    assert more == {("Fake GPU", SHAPE, s): {**one["Fake GPU", SHAPE, s], 4: TWO} for s in STANDS_FOR}
    red = [row for row in rows(tmp_path, "tuning") if row["status"] != "ok"]
    assert [(r["tokens"], r["scale"], r["config"], r["p50_us"]) for r in red] == [("1", "epilogue", str(TWO), "")]
    assert red[0]["reason"].endswith("exact: 7 elements differ")
    assert sum(binary == binary_of("one-rounding", SEPARATE, 4, TINY.hidden_size) for binary in asked) == 2, "again"


def test_without_a_time_of_separate_nothing_is_known_to_beat_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked_as(monkeypatch, {binary_of("one-rounding", SEPARATE, 4, TINY.hidden_size): "7 elements differ"})
    found = tuned(tmp_path, one=30, two=20)  # behind the matmul the fastest stands all the same
    assert found == {("Fake GPU", SHAPE, scale): {4: TWO} for scale in ("epilogue", "folded")}
    assert {row["status"] for row in rows(tmp_path, "tuning") if row["config"] != "separate"} == {"ok"}


def test_the_fastest_fused_config_expresses_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked_as(monkeypatch)
    tuned(tmp_path, one=20, two=30)
    found = rows(tmp_path, "tuning")
    assert fastest_fused(found, POINT, plan_named("one-rounding")) == ONE, "though it may be slower than separate"
    assert fastest_fused(found, POINT, plan_named("fp32")) == TWO, "a stored hidden is bf16"
    assert fastest_fused(found, Point("tiny", 1), plan_named("one-rounding")) is None
    failed = [row | {"status": "failed"} if row["config"] == str(ONE) else row for row in found]
    assert fastest_fused(failed, POINT, plan_named("one-rounding")) == TWO
