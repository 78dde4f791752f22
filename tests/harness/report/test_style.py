"""Names at the ends of lines: each where it can be read, none taken for another's."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
from matplotlib.axes import Axes

from castpoint.harness.report.style import label_ends, panels


@pytest.fixture
def axes() -> Axes:
    figure, axes = panels((1, 1), (6, 4), (0.1, 0.6, 0.5, 0.5), "invented")
    axes.set(xlim=(0, 1), ylim=(0, 10))
    yield axes
    plt.close(figure)


def heights(axes: Axes) -> dict[str, tuple[float, float]]:
    """Where each label begins and ends, in pixels."""
    axes.figure.canvas.draw()
    boxes = {text.get_text(): text.get_window_extent() for text in axes.texts}
    return {words: (box.y0, box.y1) for words, box in boxes.items()}


def test_names_are_in_the_order_of_their_lines_and_none_covers_another(axes: Axes) -> None:
    label_ends(axes, 1, {"b": 5.01, "a": 5.0, "top": 10, "c": 5.02, "bottom": 0}, lambda name: "red")
    found = heights(axes)
    order = sorted(found, key=found.__getitem__)
    assert order == ["bottom", "a", "b", "c", "top"]
    assert all(found[low][1] <= found[high][0] for low, high in zip(order, order[1:], strict=False))
    assert {text.get_color() for text in axes.texts} == {"red"} and len(axes.lines) == 5


def test_equal_ends_share_a_label_and_so_do_near_ones_where_asked(axes: Axes) -> None:
    ends = {"b": 5.0, "a": 5.0, "near": 5.1, "far": 8.0}
    label_ends(axes, 1, ends, lambda name: "red")
    assert set(heights(axes)) == {"b = a", "near", "far"}
    assert {text.get_text(): text.get_color() for text in axes.texts}["b = a"] == "black"
    label_ends(axes, 1, ends, lambda name: "red", within=0.04)
    assert "3 lines end within 2%:\nb, a, near" in heights(axes)
