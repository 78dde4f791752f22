"""The page of JAX beside PyTorch, from rows made by hand."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from castpoint.harness.report import jax
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import JaxCauseRow, JaxStageRow


def stage(model: str, dtype: str, reading: str, name: str, layer: int, share: float) -> JaxStageRow:
    return JaxStageRow(
        model=model, dtype=dtype, how="op by op", reading=reading, layer=layer, stage=name, tokens=4, elements=100,
        share_equal=share, max_abs=1e-5 if share < 1 else 0.0, p999=1e-5, max_ulp=2.0, ulps_of_largest=1.0,
        rel_rms=1e-7, largest=4.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    "hidden, said",
    [
        (1.0, "its bits are all equal: q_rotated, hidden."),
        (0.5, "its bits are all equal: q_rotated. **Without a cause: hidden, n,"),
    ],
)
def test_a_stage_without_a_cause_is_said(tmp_path: Path, hidden: float, said: str) -> None:
    """Of one model hidden has a cause, of the other it may need one."""
    records = Records(tmp_path, {}, {})
    for model, dtype in itertools.product("mn", ("fp32", "bf16")):
        shares = {"normed": 0.7, "q_rotated": 1.0, "hidden": 0.9 if model == "m" else hidden}
        for reading in ("alone", "end to end"):
            records.add(*(stage(model, dtype, reading, name, 0, share) for name, share in shares.items()))
            records.add(stage(model, dtype, reading, "logits", 1, 0.5))
        causes = [("normed", "rsqrt", 1), ("logits", "matmul, exact sums", 0), ("hidden", "rsqrt", 10)]
        for name, part, differ in causes if model == "m" else causes[:2]:
            about = {"model": model, "dtype": dtype, "stage": name, "by_jax": part, "tokens": 4}
            records.add(JaxCauseRow(**about, elements=10**6, differ=differ, share_equal=1.0))
    records.finish()
    page = jax.page(tmp_path)
    assert said in page and "| hidden | rsqrt | 100 %, but 10 | 100 %, but 10 | – | – |" in page
    assert "| logits | matmul, exact sums | all | all | all | all |" in page
    assert "at most 1e-05 to 1e-05 in fp32, 1e-05 to 1e-05 in bf16 from PyTorch's" in page
    assert (tmp_path / "plots" / "jax.png").stat().st_size > 10_000


def test_a_folder_without_rows_has_no_page(tmp_path: Path) -> None:
    assert jax.page(tmp_path) == jax.headline(tmp_path) == ""
