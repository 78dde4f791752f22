"""Our own loop beside the bare matmul, on a fake CUDA device whose clock is a script."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from fake_cuda import FakeCuda
from gpu_support import labelled, records_in, rows, seconds_by

import castpoint.harness.gpu.sweep
from castpoint.harness.conformance import cuda as gpu_checks
from castpoint.harness.gpu import arms
from castpoint.harness.gpu.sweep import sweep_gpu
from castpoint.harness.peers.chains import loop_name, loop_tile, pick_chains
from castpoint.harness.problems import grid
from castpoint.harness.problems.grid import COLD, Point
from castpoint.harness.runs.schema import Check, GpuCheckRow, Kind
from castpoint.kernels.config import Config
from castpoint.variants.catalogue import PLANS

# ---------------------------------------------------------------- our own loop

TILES = grid.loop_tiles(Point("qwen3-0.6b", 4096))
LOOPS = tuple(loop_name(tile) for tile in TILES)


def test_our_own_loop_is_asked_for_wherever_a_candidate_runs_it():
    """With the bare matmul's work, at cold points alone, and every such tile: no table chooses among them."""
    for point in grid.points():
        rows_of = {row.arm: row for row in arms.rows(point)}
        own = [row for row in rows_of.values() if row.kind == Kind.LOOP]
        assert len(own) == (0 if point.regime != COLD or point.tokens <= 32 else 1 if point.tokens <= 128 else 4)
        assert {row.work for row in own} <= {rows_of["P4 cuBLAS"].work} if own else True


def sweep_own_loop(folder: Path, monkeypatch: pytest.MonkeyPatch, times: dict[str, float], records=None) -> dict:
    """Rows of one point, with the tiles of a larger one, by arm. Without the check on drawn weights, for its time."""
    monkeypatch.setattr(grid, "loop_tiles", lambda point: TILES)
    monkeypatch.setattr(grid, "PLANS", {"one-rounding": PLANS["one-rounding"]})
    monkeypatch.setattr(gpu_checks, "AGAINST_SPEC", (Check.EXACT,))
    sweep_gpu([Point("tiny", 4)], records or records_in(folder), seconds_by(times))
    return {row["arm"]: row for row in rows(folder, "gpu_speed")}


def test_every_tile_of_our_own_loop_is_a_row_and_no_part_of_a_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    labelled(monkeypatch, {LOOPS[1]: RuntimeError("out of resource: shared memory")})
    records = records_in(tmp_path)
    third = "fused after hidden 128 x 128, 8 warps, 3 stages"
    checked = {"plan": LOOPS[2], "config": third, "tokens": gpu_checks.TOKENS, "check": "exact"}
    records.add(GpuCheckRow(**checked, status="red", reason="3 elements differ"))
    found = sweep_own_loop(tmp_path, monkeypatch, {LOOPS[0]: 1e-6, LOOPS[3]: 3e-5}, records)
    best = found[LOOPS[0]]
    assert best["kind"] == Kind.LOOP and best["config"] == "fused after hidden 128 x 64, 8 warps, 4 stages"
    assert (best["bytes"], best["flops"]) == (found["P4 cuBLAS"]["bytes"], found["P4 cuBLAS"]["flops"])
    assert float(best["p50_us"]) == pytest.approx(1) and float(found[LOOPS[3]]["p50_us"]) == pytest.approx(30)
    assert found[LOOPS[1]]["status"] == "failed" and "out of resource" in found[LOOPS[1]]["reason"]
    assert found[LOOPS[2]]["status"] == "red"
    assert found[LOOPS[2]]["reason"] == f"not timed: {third}, exact: 3 elements differ"
    assert found[LOOPS[1]]["p50_us"] == found[LOOPS[2]]["p50_us"] == ""
    assert found["one-rounding"]["status"] == "ok", "the grid did not go on"
    assert not [arm for arm in found if arm.startswith("P1") and "loop" in arm]  # though it was by far the fastest
    checks = {row["plan"]: row["status"] for row in records.rows("gpu_checks")}
    assert checks == {**dict.fromkeys(LOOPS, "ok"), LOOPS[2]: "red"}


@pytest.mark.parametrize("fault", ["one element", "two runs", "no compile"])
def test_a_loop_that_is_wrong_gets_no_time(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs = []

    def wrong(hidden, weight, head_dim, tile):
        if fault == "no compile":
            raise RuntimeError("no such\ninstruction")
        runs.append(tile)
        exact = (hidden.double() @ weight.double().T).to(torch.bfloat16)
        exact[69, 300] += 512 if fault == "one element" or len(runs) % 2 == 0 else 0
        return exact

    monkeypatch.setattr(gpu_checks, "matmul", wrong)
    labelled(monkeypatch)
    found = sweep_own_loop(tmp_path, monkeypatch, {})
    words = {
        "one element": "exact: 1 of 71680 elements differ where sums are exact",
        "two runs": "exact: two runs differ",
        "no compile": "exact: RuntimeError: no such instruction",
    }
    for name in LOOPS:
        assert found[name]["status"] == "red" and found[name]["p50_us"] == ""
        assert found[name]["reason"].endswith(words[fault])
    assert found["P4 cuBLAS"]["status"] == found["one-rounding"]["status"] == "ok"


def test_the_check_on_drawn_weights_passes_and_notices_truncation(monkeypatch: pytest.MonkeyPatch):
    tile = Config("fused", "hidden", 128, 64, 8, 3)
    monkeypatch.setattr(gpu_checks, "TOKENS", 5)
    assert gpu_checks.loop_checked(tile, Check.ENVELOPE, FakeCuda())["status"] == "ok"

    def truncated(hidden, weight, head_dim, tile):
        proj = hidden.float() @ weight.float().T
        return (proj.view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)

    monkeypatch.setattr(gpu_checks, "matmul", truncated)
    found = gpu_checks.loop_checked(tile, Check.ENVELOPE, FakeCuda())
    assert found["status"] == "red" and "lie outside the interval of fp32 sums" in found["reason"]


def test_a_loop_that_does_not_write_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its outputs are poisoned before and compared behind the timing, like those of every arm."""
    real = castpoint.harness.gpu.sweep.peers.loop_peer

    def idle(problems, tile):
        peer = real(problems, tile)

        def call(i):
            return peer.call(i)

        call.replayed = lambda i: (None,)
        return dataclasses.replace(peer, call=call)

    monkeypatch.setattr(castpoint.harness.gpu.sweep.peers, "loop_peer", idle)
    monkeypatch.setattr(castpoint.harness.gpu.sweep, "check_loops", lambda *rest: None)
    found = sweep_own_loop(tmp_path, monkeypatch, {})
    assert {found[name]["status"] for name in LOOPS} == {"red"} and "still hold NaN" in found[LOOPS[0]]["reason"]
    assert found["P4 cuBLAS"]["status"] == "ok"


def test_a_loop_faster_than_the_memory_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    labelled(monkeypatch)
    monkeypatch.setattr(FakeCuda, "name", lambda self: "NVIDIA H200")
    monkeypatch.setattr(castpoint.harness.gpu.sweep, "check_loops", lambda *rest: None)
    found = sweep_own_loop(tmp_path, monkeypatch, {LOOPS[0]: 1e-9})
    assert found[LOOPS[0]]["status"] == "red" and "TB/s of cold memory" in found[LOOPS[0]]["reason"]


def test_chains_are_not_made_of_our_own_loop():
    parts = {Kind.NORM: {"eager": 1e-6}, Kind.MATMUL: {"cuBLAS": 9e-6}, Kind.HEADS: {"eager": 1e-6}}
    parts[Kind.LOOP] = {loop_tile(TILES[0]): 1e-6}
    assert pick_chains(parts) == [("eager", "cuBLAS", "eager")]
