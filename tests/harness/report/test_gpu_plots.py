"""The plot of a GPU run, from records whose numbers are all invented."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from invented_gpu import CHAIN, FUSED, SEPARATE, SMALL, add, opened

from castpoint.harness.gpu import arms
from castpoint.harness.problems import grid
from castpoint.harness.report.gpu import EXACT, newest, section, what_of
from castpoint.harness.report.gpu_plots import speedups
from castpoint.harness.report.plots import draw
from castpoint.harness.runs.schema import Kind
from castpoint.variants.catalogue import PLANS


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


def test_the_plot_of_a_grid_with_holes(by_hand: Path) -> None:
    """The red P1's speed-ups are not drawn."""
    figure = speedups(newest(by_hand))
    panels = dict(zip(grid.MODELS, figure.axes, strict=True))
    empty = {model for model, axes in panels.items() if any(t.get_text() == "not measured" for t in axes.texts)}
    assert empty == set(grid.MODELS) - {SMALL}
    heights = [y for line in panels[SMALL].lines for y in line.get_ydata()]
    assert min(heights) == pytest.approx(0.75) and max(heights) == pytest.approx(1.6)
