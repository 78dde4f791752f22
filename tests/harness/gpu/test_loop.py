"""Our own loop beside the bare matmul, on a fake CUDA device whose clock is a script."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_cuda import FakeCuda
from gpu_support import checked_as, labelled, records_in, rows, seconds_by, setting_at, stood_in

import castpoint.harness.gpu.sweep
from castpoint.harness.conformance import cuda as gpu_checks
from castpoint.harness.conformance.cuda import Binary
from castpoint.harness.gpu.order import work_of
from castpoint.harness.gpu.sweep import time_chains, time_parts
from castpoint.harness.peers.chains import loop_name, loop_tile, pick_chains
from castpoint.harness.problems import grid
from castpoint.harness.problems.grid import COLD, Point
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.words import Check, Kind

TILES = grid.loop_tiles(Point("qwen3-0.6b", 4096))
LOOPS = tuple(loop_name(tile) for tile in TILES)


@pytest.fixture(autouse=True)
def tiles_of_a_larger_point(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no check on drawn weights, for its time."""
    monkeypatch.setattr(grid, "loop_tiles", lambda point: TILES)
    monkeypatch.setattr(gpu_checks, "AGAINST_SPEC", (Check.EXACT,))


def timed(folder: Path, times: dict[str, float], records: Records | None = None) -> dict[str, dict[str, str]]:
    """Rows of one point's parts, by arm."""
    time_parts(setting_at(Point("tiny", 4), records or records_in(folder), seconds_by(times)))
    return {row["arm"]: row for row in rows(folder, "gpu_speed")}


def test_our_own_loop_is_asked_for_wherever_a_candidate_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bare matmul's work, at cold points alone, and every such tile: no table chooses among them."""
    monkeypatch.undo()
    for point in grid.points():
        wanted = 0 if point.regime != COLD or point.tokens <= 32 else 1 if point.tokens <= 128 else 4
        assert len(grid.loop_tiles(point)) == wanted
        assert work_of(point, Kind.LOOP) == work_of(point, Kind.MATMUL)


def test_every_tile_of_our_own_loop_is_a_row_and_no_part_of_a_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stood_in(monkeypatch, {LOOPS[1]: RuntimeError("out of resource: shared memory")})
    checked_as(monkeypatch, {Binary("", TILES[2]): "3 elements differ"})
    records = records_in(tmp_path)
    found = timed(tmp_path, {LOOPS[0]: 1e-6, LOOPS[3]: 3e-5}, records)
    best = found[LOOPS[0]]
    assert best["kind"] == Kind.LOOP and best["config"] == "fused after hidden 128 x 64, 8 warps, 4 stages"
    assert (best["bytes"], best["flops"]) == (found["P4 cuBLAS"]["bytes"], found["P4 cuBLAS"]["flops"])
    assert float(best["p50_us"]) == pytest.approx(1) and float(found[LOOPS[3]]["p50_us"]) == pytest.approx(30)
    assert found[LOOPS[1]]["status"] == "failed" and "out of resource" in found[LOOPS[1]]["reason"]
    third = "fused after hidden 128 x 128, 8 warps, 3 stages"
    assert found[LOOPS[2]]["status"] == "red"
    assert found[LOOPS[2]]["reason"] == f"not timed: {third}, exact: 3 elements differ"
    assert found[LOOPS[1]]["p50_us"] == found[LOOPS[2]]["p50_us"] == ""
    assert found["P4 cuBLAS"]["status"] == "ok", "the step did not go on"
    assert {row["p4"] for row in found.values() if row["p50_us"]} == {"P4 cuBLAS"}, (
        "though our loop is by far the fastest"
    )
    checks = {row["plan"]: row["status"] for row in records.rows("gpu_checks")}
    assert checks == {**dict.fromkeys(LOOPS, "ok"), LOOPS[2]: "red"}
    time_chains(setting_at(Point("tiny", 4), records, seconds_by({})))
    assert not [row for row in rows(tmp_path, "gpu_speed") if row["step"] == "chains" and "loop" in row["arm"]]


@pytest.mark.parametrize("fault", ["one element", "two runs", "no compile"])
def test_a_loop_that_is_wrong_gets_no_time(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def wrong(hidden, weight, head_dim, tile):
        if fault == "no compile":
            raise RuntimeError("no such\ninstruction")
        runs.append(tile)
        exact = (hidden.double() @ weight.double().T).to(torch.bfloat16)
        exact[69, 300] += 512 if fault == "one element" or len(runs) % 2 == 0 else 0
        return exact

    monkeypatch.setattr(gpu_checks, "matmul", wrong)
    stood_in(monkeypatch)
    found = timed(tmp_path, {})
    words = {
        "one element": "exact: 1 of 71680 elements differ where sums are exact",
        "two runs": "exact: two runs differ",
        "no compile": "exact: RuntimeError: no such instruction",
    }
    for name in LOOPS:
        assert found[name]["status"] == "red" and found[name]["p50_us"] == ""
        assert found[name]["reason"].endswith(words[fault])
    assert found["P4 cuBLAS"]["status"] == "ok"


@pytest.mark.usefixtures("alone")
def test_the_check_on_drawn_weights_passes_and_notices_truncation(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = gpu_checks.synthetic_problem("qwen3-0.6b", 0, 5)
    few = SimpleNamespace(x=layer.x, qkv_weight=layer.qkv_weight[-256:])  # of its 32 heads, for the interpreter's time
    monkeypatch.setattr(gpu_checks, "synthetic_problem", lambda *of: SimpleNamespace(to=lambda device: few))
    assert gpu_checks.loop_checked(TILES[1], Check.ENVELOPE, FakeCuda())["status"] == "ok"

    def truncated(hidden, weight, head_dim, tile):
        proj = hidden.float() @ weight.float().T
        return (proj.view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)

    monkeypatch.setattr(gpu_checks, "matmul", truncated)
    found = gpu_checks.loop_checked(TILES[1], Check.ENVELOPE, FakeCuda())
    assert found["status"] == "red" and "lie outside the interval of fp32 sums" in found["reason"]


def test_a_loop_that_does_not_write_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its outputs are poisoned before and compared behind the timing, like those of every arm."""
    real = castpoint.harness.gpu.sweep.peers.loop_peer

    def idle(problems, tile):
        def call(i):
            return real(problems, tile).call(i)

        call.replayed = lambda i: (None,)
        return dataclasses.replace(real(problems, tile), call=call)

    monkeypatch.setattr(castpoint.harness.gpu.sweep.peers, "loop_peer", idle)
    monkeypatch.setattr(grid, "loop_tiles", lambda point: TILES[:1])
    checked_as(monkeypatch)
    found = timed(tmp_path, {})
    assert found[LOOPS[0]]["status"] == "red" and "still hold NaN" in found[LOOPS[0]]["reason"]
    assert found["P4 cuBLAS"]["status"] == "ok"


def test_the_loop_that_is_timed_is_the_one_that_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its own tiles, on x as it is, every copy by its own weights."""
    labelled(monkeypatch)
    asked = checked_as(monkeypatch)
    setting = setting_at(Point("tiny", 4), records_in(tmp_path), seconds_by({}))
    time_parts(setting)
    assert asked == [Binary("", tile) for tile in TILES]
    peer = castpoint.harness.gpu.sweep.peers.loop_peer(setting.problems, TILES[0])
    for i in (0, 1):
        low, high = gpu_checks.proj_bounds(setting.problems[i].x, setting.problems[i].qkv_weight)
        (proj,) = peer.call(i)
        assert ((low <= proj.double()) & (proj.double() <= high)).all()


def test_a_loop_faster_than_the_memory_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stood_in(monkeypatch)
    checked_as(monkeypatch)
    monkeypatch.setattr(FakeCuda, "name", lambda self: "NVIDIA H200")
    found = timed(tmp_path, {LOOPS[0]: 1e-9})
    assert found[LOOPS[0]]["status"] == "red" and "TB/s of cold memory" in found[LOOPS[0]]["reason"]


def test_chains_are_not_made_of_our_own_loop() -> None:
    parts = {Kind.NORM: {"eager": 1e-6}, Kind.MATMUL: {"cuBLAS": 9e-6}, Kind.HEADS: {"eager": 1e-6}}
    parts[Kind.LOOP] = {loop_tile(TILES[0]): 1e-6}
    assert pick_chains(parts) == [("eager", "cuBLAS")]
