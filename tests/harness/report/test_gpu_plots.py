"""The plot of a GPU run, from records whose numbers are all invented."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from invented_gpu import CHAIN, FUSED, SEPARATE, SMALL, add, invent_cut_off, opened

from castpoint.harness.problems import grid
from castpoint.harness.problems.geometry import layer_work
from castpoint.harness.report.gpu import section
from castpoint.harness.report.gpu_plots import speedups
from castpoint.harness.report.gpu_runs import EXACT, newest, what_of
from castpoint.harness.report.plots import draw
from castpoint.harness.runs.words import Kind, Step
from castpoint.variants.catalogue import PLANS


def invent_whole(folder: Path) -> str:
    """A grid with most of its points, as shapes of curves alone: gains that shrink with tokens and with size."""
    records = opened(folder)
    for point in grid.points():
        key = (point.model, point.tokens, point.regime)
        if point.regime != grid.COLD or point.model == "qwen3-235b-a22b" or point.tokens == 512:
            continue
        work = layer_work(point.geometry, point.tokens)
        floor = work.floor_s(*grid.ASSUMED["h200"]) * 1e6
        p4 = 1.15 * floor + 2.5
        p1 = p4 + 3.0 + 0.02 * point.tokens**0.9
        add(records, key, CHAIN, p1, p1, roofline_share=floor / p1)
        add(records, key, "P4 cuBLAS", p4, roofline_share=floor / p4)
        if point.model in grid.GOAL_MODELS and point.tokens in (1, 256, 4096):
            add(records, key, CHAIN, p1, p1, step=Step.COMPILED)
            add(records, key, "P2 torch.compile", 1.1 * p1, p1, step=Step.COMPILED)
        for place, name in enumerate((*grid.MAIN_PLANS, *grid.other_plans(point))):
            us = (1.12 + 0.05 * math.log2(point.tokens) / 6) * floor + 2.3 + 0.12 * (place % 4)
            wide = PLANS[name].plan.matmul
            us *= {"bf16": 1, "tf32": 2, "tf32x3": 4, "fp32": 9}[wide]
            us *= 1.1 if name == "folded" and point.tokens > 64 else 1
            late = point.tokens >= 1024 and what_of(Kind.OWN, name) == EXACT
            add(records, key, name, us, p1, roofline_share=floor / us, config=SEPARATE if late else FUSED)
    records.finish()
    return records.run_id


def test_the_plot_is_drawn_and_the_same_every_time(tmp_path: Path) -> None:
    run_id = invent_whole(tmp_path)
    (plot,) = draw(tmp_path, run_id)
    assert plot.name == "gpu_speedup.png" and "(plots/gpu_speedup.png)" in section(tmp_path)
    first = plot.read_bytes()
    draw(tmp_path, run_id)
    assert plot.read_bytes() == first


def test_the_plot_of_a_run_that_was_cut_off_says_so(tmp_path: Path, by_hand: Path) -> None:
    """One panel of one point is a plot: its marker, and bands that are wide enough to be seen."""
    invent_cut_off(tmp_path, [(SMALL, 16, grid.COLD)])
    figure = speedups(newest(tmp_path))
    (panel,) = figure.axes
    assert figure.get_suptitle().endswith("CUT OFF: 1 of 152 points")
    assert "CUT OFF" not in speedups(newest(by_hand)).get_suptitle()
    bands = [band.get_paths()[0].get_extents() for band in panel.collections]
    assert len(bands) == 4 and all(band.width > 1 and band.height > 0.01 for band in bands)
    low, high = panel.get_ylim()
    assert low < 0.9 and high > 1.5
    assert draw(tmp_path, newest(tmp_path).run_id)[0].stat().st_size > 5000


def test_the_plot_of_a_grid_with_holes(by_hand: Path) -> None:
    """The red P1's speed-ups are not drawn."""
    figure = speedups(newest(by_hand))
    (panel,) = figure.axes
    assert panel.get_title(loc="left") == SMALL
    (missing,) = (text.get_text() for text in figure.texts if "without a time" in text.get_text())
    assert missing.removeprefix("without a time: ").split(", ") == [m for m in grid.MODELS if m != SMALL]
    heights = [y for line in panel.lines for y in line.get_ydata()]
    assert min(heights) == pytest.approx(0.75) and max(heights) == pytest.approx(1.6)
