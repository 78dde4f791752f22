"""The story above the claims: twelve sentences, every figure of a record, and none where one was not measured."""

from __future__ import annotations

import pandas as pd
import pytest

from castpoint.harness.report.story import Figures, jax, kernel, story, tensor_parallel

ROWS = [
    ("A2", "first layer's output projection", "unloaded bias"),
    ("A2", "logits, largest", "unloaded bias"),
    ("A2", "logits, largest", "one ulp on K"),
    ("A3", "what float64 changes of a draw", "unloaded bias"),
    ("A4", "logits, largest", "unloaded bias"),
    ("A5", "behind layer 3", "unloaded bias"),
    ("A2", "logits, largest, before the biases were loaded", "forgotten q, k, v biases"),
    ("B1", "largest difference of a layer's RMSNorm", "rsqrt, fp32 statistics"),
    ("B1", "largest difference of a layer's RMSNorm", "rsqrt, all in bf16"),
    ("B2", "layer 0's attention output", "float16 chain"),
    ("B2", "logits", "rounding to bf16"),
    ("B3", "logits", "fp32"),
    ("B3", "logits", "fp64, PyTorch's angles"),
    ("C3", "relative error, times", "drawn"),
    ("C4", "KL from eager, mean of a text", "Gemma, its own weights: fp32"),
    ("C4", "KL of eager, token by token, from eager", "Gemma, its own weights: eager"),
    ("C5", "K unequal to PyTorch's: bf16-operand", "drawn"),
    ("C5", "K unequal to PyTorch's: cast-after-matmul", "drawn"),
    ("C7", "largest gain of a channel, K norm outside", "drawn"),
    ("C7", "largest gain of a channel, K norm inside", "drawn"),
    ("C8", "K's relative error: Q4_0", "drawn"),
    ("C8", "K's relative error: hf", "drawn"),
    ("C8", "GB/s that 400 tokens/s read", "bf16"),
]


def frame(rows: list[tuple[str, str, str]]) -> pd.DataFrame:
    """Each with a figure of its own."""
    numbers = [101 + ROWS.index(row) for row in rows]
    columns = pd.DataFrame(rows, columns=["claim", "what", "cause"])
    return columns.assign(measured_low=numbers, measured_high=numbers, measured=numbers)


def test_there_are_twelve_sentences() -> None:
    figures = Figures(frame(ROWS))
    assert [len(list(part(figures))) for part in (tensor_parallel, jax, kernel)] == [4, 3, 5]


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_every_figure_is_told(row: int) -> None:
    other = frame(ROWS)
    other.loc[row, ["measured_low", "measured_high"]] = 987.0
    assert story(other) != story(frame(ROWS))


def test_a_report_is_told_as_far_as_it_was_measured() -> None:
    assert story(frame([])) == ""
    alone = story(frame([row for row in ROWS if row[0].startswith("B")]))
    assert alone.startswith("**003.**") and "\n\n" not in alone
    some = story(frame([row for row in ROWS if row[0] == "A2"]))
    assert "float32 ulp on K" in some and "float64" not in some
