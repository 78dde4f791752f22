"""The page of JAX beside PyTorch, from rows made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from castpoint.harness.report import jax
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import JaxCauseRow, JaxStageRow


def stage(dtype: str, reading: str, name: str, layer: int, share: float) -> JaxStageRow:
    return JaxStageRow(
        model="m", dtype=dtype, how="op by op", reading=reading, layer=layer, stage=name, tokens=4, elements=100,
        share_equal=share, max_abs=1e-5, p999=1e-5, max_ulp=2.0, ulps_of_largest=1.0, rel_rms=1e-7, largest=4.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    "rotated, said", [(1.0, "equal without that: q_rotated."), (0.5, "Without a cause: q_rotated")]
)
def test_a_stage_without_a_cause_is_said(tmp_path: Path, rotated: float, said: str) -> None:
    records = Records(tmp_path, {}, {})
    for dtype in ("fp32", "bf16"):
        for reading in ("alone", "end to end"):
            shares = {"normed": 0.7, "q_rotated": rotated}
            records.add(*(stage(dtype, reading, name, at, share) for name, share in shares.items() for at in (0, 1)))
            records.add(stage(dtype, reading, "logits", 2, 0.5))
        for name, part, share in (("normed", "rsqrt", 0.8), ("logits", "matmul, exact sums", 1.0)):
            cause = JaxCauseRow(
                model="m", dtype=dtype, stage=name, by_jax=part, tokens=4, elements=9, share_equal=share
            )
            records.add(cause)
    records.finish()
    page = jax.page(tmp_path)
    assert said in page and "| normed | rsqrt | 80 % | 80 % |" in page
    assert "at most 1e-05 in fp32, 1e-05 in bf16 from PyTorch's" in page
    assert (tmp_path / "plots" / "jax.png").stat().st_size > 10_000


def test_a_folder_without_rows_has_no_page(tmp_path: Path) -> None:
    assert jax.page(tmp_path) == jax.headline(tmp_path) == ""
