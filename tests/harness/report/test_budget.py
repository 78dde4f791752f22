"""The error budget as rows, tables and bars: they say what the numbers say, made up or measured."""

from functools import cache

import matplotlib
import pandas as pd
import pytest
from support import small

from castpoint.harness.accuracy.budget import budget_rows, order_rows, ways_to_rotate
from castpoint.harness.report.budget import mean_shares, rope_shares, rope_table, section, share_table
from castpoint.harness.runs.records import TABLES
from castpoint.harness.runs.words import FP32, MEASURES, ORDER_OF_SUMS, PLAYERS
from castpoint.kernels.plan import ROPE_BOUNDARIES

matplotlib.use("agg")

from castpoint.harness.report.budget_plot import budget_bars  # noqa: E402

pytestmark = pytest.mark.usefixtures("alone")


@cache
def frame() -> pd.DataFrame:
    names = ["hf", "one-rounding", "bf16-operand", "fp32", "rstd-rounded"]
    rows = [row for name in names for row in budget_rows(name, small())]
    rows += [row for name in ("hf", "fp32") for row in order_rows(name, small())]
    rows += budget_rows("gemma", small(weight_offset=True))
    return pd.DataFrame(rows, columns=list(TABLES["budget"])).assign(status="ok")


def test_rows_alone_draw_the_bars() -> None:
    parts = frame()[frame()["shapley"].notna()]
    sums = parts.groupby(["plan", "measure"]).agg(
        shapley=("shapley", "sum"), share=("share", "sum"), total=("total", "first")
    )
    assert len(sums) == 12
    assert list(sums["shapley"]) == pytest.approx(list(sums["total"]), rel=1e-9)
    assert list(sums["share"]) == pytest.approx([1.0] * 12, rel=1e-9)
    assert set(parts["backend"]) == {"spec"} and set(parts["tokens"]) == {9}
    assert not frame().duplicated(["weights", "layer", "tokens", "plan", "measure", "player"]).any()


def test_order_of_sums_is_no_part_of_the_sum() -> None:
    rows = frame()[frame()["player"] == ORDER_OF_SUMS]
    assert len(rows) == 4 and rows[["shapley", "share"]].isna().all(axis=None) and set(rows["backend"]) == {"triton"}
    assert list(rows["kernel_vs_spec_share"]) == list(rows["kernel_vs_spec"] / rows["total"])
    totals = frame().groupby(["plan", "measure"])["total"].agg(["min", "max"]).loc[["hf", "fp32"]]
    assert list(totals["min"]) == pytest.approx(list(totals["max"]), rel=1e-12), "the same tokens, the same whole"
    assert frame()[frame()["player"] != ORDER_OF_SUMS]["kernel_vs_spec"].isna().all()


def rows_of(
    shares: dict[str, dict[str, float]], layer: int = 0, rotated_from: int | None = None
) -> list[dict[str, object]]:
    """Rows of both measures with these shares of a total that falls from plan to plan."""
    key = {"model": "m", "weights": "calibrated", "rotated_from": rotated_from, "layer": layer, "tokens": 64}
    key |= {"backend": "spec", "status": "ok"}
    return [
        {**key, "plan": plan, "measure": measure, "player": player, "shapley": share / 2**i, "share": share,
         "total": 0.5**i}
        for i, (plan, parts) in enumerate(shares.items())
        for measure in MEASURES
        for player, share in {**parts, FP32: 0.0}.items()
    ]  # fmt: skip


MADE_UP = {
    "bf16-statistics": {"variance": -0.125, "normed": 0.5, "hidden": 0.25, "out": 0.375},
    "hf": {"normed": 0.25, "hidden": 0.375, "proj": 0.125, "out": 0.25},
    "folded": {"scale": 0.75, "out": 0.25},
    "fp32": {"out": 1.0},
}


def test_the_table_follows_the_numbers() -> None:
    table = share_table(pd.DataFrame(rows_of(MADE_UP)), "k_rel_ms").set_index("plan")
    assert list(table.index) == ["bf16-statistics", "hf", "folded", "fp32"]
    assert list(table.loc["hf"]) == [0.5**0.5, "–", "25%", "38%", "–", "12%", "25%", "0%"]
    assert table.loc["folded", "W·w_in folded"] == "75%" and table.loc["bf16-statistics", "variance"] == "-12%"
    text = section(pd.DataFrame(rows_of(MADE_UP)))
    assert "(layer 0, 64 tokens)" in text and "Order of sums" not in text
    assert "| hf | 0.707 | – | 25% | 38% | – | 12% | 25% | 0% |" in text and text.count("| fp32 |") == 2
    assert "Order of sums comes on top: at most" in section(frame())


def test_shares_are_means_over_layers_without_rope() -> None:
    half = {"bf16-operand": {"hidden": 0.5, "out": 0.5}}
    rows = rows_of({"bf16-operand": {"hidden": 0.75, "out": 0.25}}, 0) + rows_of(half, 1)
    rows += rows_of({"bf16-operand": {"hidden": 0.0, "out": 1.0}}, 0, 1000)
    text = section(pd.DataFrame(rows))
    assert "(mean of 2 layers, 64 tokens)" in text and "| bf16-operand | 1 | 62% | 38% | 0% |" in text


def test_a_share_that_rounds_to_nothing_has_no_sign() -> None:
    rows = rows_of({"hf": {"normed": -0.001, "out": 1.001}})
    assert list(share_table(pd.DataFrame(rows), "k_rel_ms").iloc[0])[2:] == ["0%", "100%", "0%"]


def test_rope_is_told_apart_and_compared_on_the_same_layers() -> None:
    plain = rows_of(MADE_UP, 0) + rows_of({"hf": {"normed": 1.0}}, 5)  # layer 5 was not rotated
    turned = {"fp32": {"out": 1.0}, "hf": {"unrotated": 0.25, "cos_sin": 0.125, "products": 0.125, "out": 0.5}}
    rows = pd.DataFrame(plain + rows_of(turned, 0, 1000))
    shares = rope_shares(rows)
    assert list(shares.index) == ["fp32", "hf"]  # by the error behind: 1 and 0.5
    assert shares.loc["hf", ["before", "behind"]].tolist() == pytest.approx([0.5**0.5, 0.5**0.5])
    assert shares.loc["hf"].drop(["before", "behind"]).to_dict() == {
        "unrotated": 0.25,
        "cos_sin": 0.125,
        "products": 0.125,
    }
    assert shares.loc["fp32", "before"] == pytest.approx(0.125**0.5) and shares.loc["fp32"].isna().sum() == 3
    assert "| hf | 0.707 | 0.707 | 0.707 | 0.707 | 25% | 12% | 12% |" in rope_table(rows)
    assert "| fp32 | 0.354 | 1 | 0.354 | 1 | – | – | – |" in rope_table(rows) and rope_table(rows) in section(rows)
    assert mean_shares(rows, MEASURES[0]).equals(mean_shares(pd.DataFrame(plain), MEASURES[0]))
    assert rope_table(pd.DataFrame(plain)) == ""


def test_a_plan_for_each_way_to_round_in_rope() -> None:
    assert ways_to_rotate(["hf", "bf16-statistics", "fp32", "deferred", "one-rounding"]) == [
        "hf",
        "fp32",
        "one-rounding",
    ]


def test_nothing_to_say_and_nothing_to_draw() -> None:
    empty = pd.DataFrame([], columns=list(TABLES["budget"]))
    assert "|" not in section(empty) and budget_bars(empty) is None
    only_store = pd.DataFrame(rows_of({"fp32": {"out": 1.0}}))
    assert "| fp32 | 1 | 100% | 0% |" in section(only_store) and budget_bars(only_store) is not None


def bars(axes: matplotlib.axes.Axes) -> dict[float, list[tuple[float, float]]]:
    """Where each bar's segments begin and end, by the bar's height."""
    segments: dict[float, list[tuple[float, float]]] = {}
    for patch in axes.patches:
        place = round(patch.get_y() + patch.get_height() / 2, 6)
        segments.setdefault(place, []).append((patch.get_x(), patch.get_x() + patch.get_width()))
    return segments


def test_bars_are_the_shares_largest_error_on_top_and_negative_ones_left_of_zero() -> None:
    figure = budget_bars(pd.DataFrame(rows_of(MADE_UP)))
    for axes in figure.axes:
        drawn = bars(axes)
        assert drawn[3] == [(-0.125, 0.0), (0.0, 0.5), (0.5, 0.75), (0.75, 1.125)]
        assert drawn[2] == [(0.0, 0.25), (0.25, 0.625), (0.625, 0.75), (0.75, 1.0)]
        assert drawn[0] == [(0.0, 1.0)]
        low, high = axes.get_xlim()
        assert low <= -0.125 and high >= 1.125
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        "fp32",
        "folded",
        "hf",
        "bf16-statistics",
    ]
    matplotlib.pyplot.close(figure)


def test_a_player_has_one_look_and_no_two_look_the_same() -> None:
    from castpoint.harness.report.budget_plot import STYLES

    drawn = [player for player in PLAYERS if player not in ROPE_BOUNDARIES]  # bars are of problems without positions
    assert list(STYLES) == drawn and len(set(STYLES.values())) == len(drawn)


def test_the_plot_draws_what_was_measured() -> None:
    figure = budget_bars(frame())
    shares = mean_shares(frame(), "k_rel_ms")
    drawn = bars(figure.axes[0])
    for place, plan in enumerate(reversed(shares.index)):
        assert sum(right - left for left, right in drawn[place]) == pytest.approx(
            shares.loc[plan].abs().sum(), rel=1e-6
        )
    matplotlib.pyplot.close(figure)
