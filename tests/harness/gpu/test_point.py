"""A point made ready: how many copies of its weights, whether they are cold, and what none of its rows can say then."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_cuda import FakeCuda
from gpu_support import LIMITS, TINY, checked_as, records_in, rows, seconds_by, setting_at, stood_in

from castpoint.harness.conformance.cuda import Checks
from castpoint.harness.gpu.point import own_peer, prepared
from castpoint.harness.gpu.sweep import time_chains
from castpoint.harness.problems.grid import COLD, HOT, LAYERS, ROPE, Point
from castpoint.harness.timing.rig import MEMORY_SHARE, copy_bytes
from castpoint.kernels.config import Config

pytestmark = pytest.mark.usefixtures("tiny")
L2 = 1 << 17  # of the fake device here
WEIGHT = 2 * TINY.rows * TINY.hidden_size
ROTATED = 3 * L2 // WEIGHT + 1


def fake(free: int = 1 << 34) -> FakeCuda:
    found = FakeCuda(free=free)
    found.l2 = L2
    return found


@pytest.mark.parametrize(
    ("regime", "copies", "cold"),
    [(COLD, ROTATED, True), (ROPE, ROTATED, True), (LAYERS, TINY.num_layers, False), (HOT, 8, False)],
)  # fmt: skip
def test_copies_are_as_the_regime_wants(regime: str, copies: int, cold: bool, tmp_path: Path) -> None:
    """Three layers of so small a model lie in the cache, and the rows say so."""
    setting = setting_at(Point("tiny", 4, regime), records_in(tmp_path), fake())
    assert (len(setting.problems), setting.cold) == (copies, cold)
    places = {problem.qkv_weight.data_ptr() for problem in setting.problems}
    assert len(places) == (1 if regime == HOT else copies)
    assert {problem.tokens for problem in setting.problems} == {4}
    assert (setting.problems[0].positions is not None) == (regime == ROPE)


def test_memory_caps_copies_and_weights_that_do_not_fill_the_caches_are_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = Point("tiny", 4)
    whole = setting_at(point, records_in(tmp_path / "whole"), fake())
    each = copy_bytes(whole.problems[0], 20, 2)  # with all arms' outputs, the weights as they are, and folded
    for wanted in (1, 5, len(whole.problems)):
        gpu = fake(free=int((wanted + 0.5) * each / MEMORY_SHARE))
        setting = setting_at(point, records_in(tmp_path / f"{wanted}"), gpu)
        assert len(setting.problems) == wanted and setting.cold == (wanted * WEIGHT > 3 * L2)
    assert len(setting_at(point, records_in(tmp_path / "none"), fake(free=1)).problems) == 1
    stood_in(monkeypatch)
    checked_as(monkeypatch)
    time_chains(setting_at(point, records_in(tmp_path), fake(free=2 * each)))
    assert {(row["cold"], row["copies"]) for row in rows(tmp_path, "gpu_speed")} == {("False", "1")}


def test_limits_that_were_not_measured_leave_floors_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stood_in(monkeypatch)
    checked_as(monkeypatch)
    for limits, folder in ((LIMITS, tmp_path / "known"), (None, tmp_path / "unknown")):
        records, gpu = records_in(folder), seconds_by({})
        time_chains(prepared(Point("tiny", 4), records, gpu, Checks(records, gpu), limits, 20))
        found = rows(folder, "gpu_speed")
        assert {row["status"] for row in found} <= {"ok", "not installed", "not applicable"}
        assert all((row["floor_us"] == "") == (row["roofline_share"] == "") == (limits is None) for row in found)
        assert all(row["p50_us"] and row["bytes"] and row["gbps"] for row in found if row["status"] == "ok")


def test_weights_are_folded_once_for_all_configs_of_a_plan(tmp_path: Path) -> None:
    setting = setting_at(Point("tiny", 4), records_in(tmp_path), fake())
    (folded,) = {id(setting.weights_of(own_peer(setting, "folded", c).plan)[0]) for c in (Config(), Config(block_m=16))}
    assert folded != id(setting.problems[0].qkv_weight), "not folded"
    plain = own_peer(setting, "one-rounding", Config()).plan
    assert setting.weights_of(plain)[0] is setting.problems[0].qkv_weight
