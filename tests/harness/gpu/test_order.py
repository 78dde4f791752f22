"""What a run does, in which order: by worth, everything once; and what it compiles and says before it measures."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import pytest
from support import ROOT

from castpoint.harness.conformance.cuda import binary_of
from castpoint.harness.gpu.order import CARDS, SEPARATE, Item, binaries, clock, compiled_peers, order, tiles, work_of
from castpoint.harness.problems import grid
from castpoint.harness.problems.grid import COLD, HOT, LAYERS, ROPE, Point
from castpoint.harness.runs.words import Kind, Step
from castpoint.variants.catalogue import PLANS

ORDER = order()
MODELS = "qwen3-0.6b", "qwen3-8b", "qwen3-4b", "qwen3-32b"  # as the issue names them
GOALS = [Point(model, tokens) for tokens in (1, 16, 256, 4096) for model in MODELS]
BEFORE_TIMES = [Step.LIMITS, Step.EAGER]  # ceilings, what a launch costs, and how cuBLAS adds


def test_the_grid_is_the_issues() -> None:
    points = grid.points()
    assert len(set(points)) == len(points) and points[:16] == GOALS
    assert {p.regime for p in points} == {COLD, ROPE, HOT, LAYERS}
    cold = {(p.model, p.tokens) for p in points if p.regime == COLD}
    assert cold == {(model, tokens) for model in grid.MODELS for tokens in grid.TOKENS} and len(grid.MODELS) == 8
    for regime in (ROPE, HOT, LAYERS):
        assert {Point(p.model, p.tokens) for p in points if p.regime == regime} == set(GOALS)


def test_what_says_most_comes_first() -> None:
    """A run that is cut off has the best: ceilings, then all of a point before the next one, torch.compile last."""
    begin = [Item(step) for step in BEFORE_TIMES]
    begin += [Item(step, point) for point in GOALS for step in (Step.PARTS, Step.TUNING, Step.CHAINS)]
    assert ORDER[: len(begin)] == begin
    steps = [item.step for item in ORDER]
    compiled = steps.index(Step.COMPILED)
    assert set(steps[compiled:]) == {Step.COMPILED}, "a run of half an hour has nothing that waits for it"
    (counters,) = (n for n, step in enumerate(steps) if step == Step.COUNTERS)
    first_of = {
        regime: next(n for n, i in enumerate(ORDER) if i.point and i.point.regime == regime) for regime in (HOT, ROPE)
    }
    assert len(begin) <= counters < min(first_of.values()), "what decides designs goes before the rest of the grid"


def test_every_point_has_its_steps_exactly_once() -> None:
    assert max(Counter(ORDER).values()) == 1 and len({tuple(item.key.values()) for item in ORDER}) == len(ORDER)
    assert {item.step for item in ORDER if item.point is None} == {
        Step.LIMITS, Step.EAGER, Step.TENSOR_CORES, Step.OUTPUTS, Step.COUNTERS,
    }  # fmt: skip
    wanted = {
        COLD: [Step.PARTS, Step.TUNING, Step.CHAINS, Step.PLANS], ROPE: [Step.PARTS, Step.CHAINS],
        HOT: [Step.CHAINS], LAYERS: [Step.CHAINS],
    }  # fmt: skip
    found: dict[Point, list[Step]] = {}
    for item in ORDER:
        if item.point:
            found.setdefault(item.point, []).append(item.step)
    assert found.keys() == set(grid.points())
    for point, steps in found.items():
        compiled = [Step.COMPILED] if compiled_peers(point) else []
        assert steps == wanted[point.regime] + compiled, (
            f"{point}: parts and tuning say what chains and plans are made of"
        )
    plans = {name for point in GOALS for name in (*grid.MAIN_PLANS, *grid.other_plans(point))}
    assert plans == set(PLANS), "a plan has no time anywhere"


def test_torch_compile_is_timed_at_the_points_that_say_most() -> None:
    found = {(p.model, p.tokens, p.regime): compiled_peers(p) for p in grid.points() if compiled_peers(p)}
    cold = {(model, tokens, COLD) for model in MODELS for tokens in (1, 256, 4096)}
    assert cold <= found.keys() and {regime for _, _, regime in found} == {COLD, ROPE}
    assert {key[0] for key, peers in found.items() if "torch.compile, PDL" in peers} == {"qwen3-0.6b"}


@pytest.mark.parametrize(("model", "megabytes", "at_1", "at_4096"), [
    ("qwen3-0.6b", 8.4, 1.95, 43.5), ("qwen3-1.7b", 16.8, 3.90, 87), ("qwen3-30b-a3b", 21.0, 4.88, 109),
    ("qwen3-4b", 31.5, 7.32, 163), ("qwen3-8b", 50.3, 11.7, 261), ("qwen3-14b", 73.4, 17.1, 381),
    ("qwen3-235b-a22b", 75.5, 17.6, 391), ("qwen3-32b", 104.9, 24.4, 544),
])  # fmt: skip
def test_floors_as_published(model: str, megabytes: float, at_1: float, at_4096: float) -> None:
    """Weight bytes and floors in us at 4.3 TB/s and 790 TFLOP/s, computed elsewhere by hand."""
    for tokens, floor_us in ((1, at_1), (4096, at_4096)):
        point = Point(model, tokens)
        assert work_of(point, Kind.OWN).floor_s(*grid.ASSUMED["h200"]) * 1e6 == pytest.approx(floor_us, rel=0.01)
        assert 2 * point.geometry.rows * point.geometry.hidden_size / 1e6 == pytest.approx(megabytes, rel=0.01)


# ---------------------------------------------------------------- what is compiled ahead


def test_whatever_tuning_may_choose_is_compiled_before_it() -> None:
    for point in (item.point for item in ORDER if item.step == Step.TUNING):
        compiled = binaries(Item(Step.TUNING, point))
        for scale, name in grid.STANDS_FOR.items():
            for config in (*tiles(point, name), *([SEPARATE] if scale == "prologue" else [])):
                assert binary_of(name, config, point.tokens, point.geometry.hidden_size) in compiled
        assert len(set(compiled)) == len(compiled)


def test_the_clock_has_no_gap_and_compiles_each_binary_once() -> None:
    estimates = list(clock(ORDER, CARDS["h100"]))
    assert [e.item for e in estimates] == ORDER
    for before, after in zip(estimates, estimates[1:], strict=False):
        assert after.start == pytest.approx(before.start + before.seconds) and min(after.check, after.compile) >= 0
    twice = list(clock([*ORDER, *ORDER], CARDS["h100"]))[len(ORDER) :]
    assert not any(e.compile or e.check for e in twice) and all(e.measure > 0 for e in twice)


# ---------------------------------------------------------------- the dry run


def test_a_dry_run_lists_every_step_once_and_touches_no_gpu() -> None:
    """Torch does not even look for one: a process that did could not fork the one that measures."""
    code = (
        "import sys, torch\ntorch.cuda._lazy_init = torch.cuda.is_available = lambda: sys.exit('a GPU was asked for')\n"
    )
    code += "from castpoint.harness.__main__ import app\napp(['gpu', '--dry-run'])"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, _, head, *lines = done.stdout.splitlines()
    assert first.startswith("# Estimated, not measured") and "h100 floor us" in head and "h200 floor us" in head
    listed = [" ".join(line.split()[4:]) for line in lines if line[0] != "#"]
    assert len(listed) == len(ORDER)
    for item, words in zip(ORDER, listed, strict=True):
        at = f" {item.point.model} {item.point.tokens} {item.point.regime} " if item.point else ""
        assert words.startswith(f"{item.step}{at}")
        if item.point:
            arms, *floors_us = words.split()[-3:]
            for card, floor_us in zip(("h100", "h200"), floors_us, strict=True):
                floor_s = work_of(item.point, Kind.OWN).floor_s(*grid.ASSUMED[card])
                assert int(arms) >= 2 and float(floor_us) == pytest.approx(floor_s * 1e6, abs=0.01)
    after = [line for line in lines if line.startswith("# after")]
    assert [line.split(":")[0] for line in after] == [f"# after {n} minutes" for n in (5, 10, 28)]
    assert all(f"of {len(ORDER)} steps" in line for line in after)
