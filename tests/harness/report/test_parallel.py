"""The page of the tensor-parallel decoder, from rows made by hand."""

from __future__ import annotations

from pathlib import Path

from castpoint.harness.report import parallel
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import ParallelCostRow, ParallelRow


def row(
    reduce: str, ranks: int, reference: str, stage: str, layer: int, apart: float, part: str = "prefill"
) -> ParallelRow:
    return ParallelRow(
        model="m", dtype="fp32", reduce=reduce, ranks=ranks, tokens=4, part=part, reference=reference, stage=stage,
        layer=layer, max_abs=apart, rms=apart, rel_rms=apart, share_equal=0.25 if apart else 1.0, first_equal=1.0,
        reference_max=1.0,
    )  # fmt: skip


def made(folder: Path, tree: float, fp32: float) -> str:
    records = Records(folder, {}, {})
    for reduce, ranks in ((reduce, ranks) for reduce in ("fp32", "tree") for ranks in (1, 2)):
        apart = 0.0 if ranks == 1 else tree if reduce == "tree" else fp32
        for reference in ("one process", "plain decoder"):
            records.add(
                *(row(reduce, ranks, reference, stage, at, apart) for stage in ("k", "hidden") for at in (0, 1))
            )
            records.add(*(row(reduce, ranks, reference, "logits", 2, apart, part) for part in ("prefill", "decode")))
        records.add(
            ParallelCostRow(
                model="m", dtype="fp32", reduce=reduce, ranks=ranks, tokens=4, repeats=1, prefill_ms=2.0 * ranks,
                prefill_low_ms=1.0, prefill_high_ms=3.0, decode_ms=1.0, sent_bytes=10**6, read_elements=10**6,
            )
        )  # fmt: skip
    records.finish()
    return parallel.page(folder)


def test_what_the_headline_says_follows_the_rows(tmp_path: Path) -> None:
    page = made(tmp_path / "right", 0.0, 2e-5)
    assert "K and logits equal one process in every bit on 2 ranks; with an all-reduce in fp32 K of some" in page
    assert "equals in as little as 25.0%. In an fp32 model logits then differ by at most 2e-05, within 0.001." in page
    assert (tmp_path / "right" / "plots" / "parallel.png").stat().st_size > 10_000
    wrong = made(tmp_path / "wrong", 1e-6, 2e-3)
    assert "K equals one process in 25" in wrong and "at most 0.002, beyond 0.001." in wrong


def test_a_folder_without_rows_has_no_page(tmp_path: Path) -> None:
    assert parallel.page(tmp_path) == parallel.headline(tmp_path) == ""
