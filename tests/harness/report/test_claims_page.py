"""The page of claims, for any of them and any figures."""

from __future__ import annotations

from pathlib import Path

from castpoint.harness.report import claims
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import ClaimFigureRow, ClaimRow


def recorded(folder: Path, *named: str, figures: tuple[ClaimFigureRow, ...] = ()) -> Path:
    records = Records(folder, {"command": "claims"}, {"device": "cpu", "commit": "abc"})
    verdicts = ("explained otherwise", "reproduced", "cannot be decided here")
    for at, claim in enumerate(named):
        told = {
            "how": "by hand",
            "figure": "1 of 2",
            "conditions": "a model",
            "decides": "castpoint x" if at == 2 else "",
        }
        row = ClaimRow(claim=claim, source="000", said="a | b", verdict=verdicts[at % 3], **told)
        records.add(row)
    records.add(*figures)
    records.finish()
    return folder


def figure(
    claim: str, cause: str, measured: float, claimed: float | None = 2.0, what: str = "logits"
) -> ClaimFigureRow:
    low, high = measured / 2, measured * 2
    return ClaimFigureRow(
        claim=claim, what=what, cause=cause, claimed=claimed, measured=measured, measured_low=low, measured_high=high,
        samples=3, unit="nats",
    )  # fmt: skip


def test_nothing_where_nothing_was_judged(tmp_path: Path) -> None:
    assert claims.page(tmp_path) == "" and claims.headline(tmp_path) == ""


def test_a_claim_without_figures_has_no_picture(tmp_path: Path) -> None:
    page = claims.page(recorded(tmp_path, "B1"))
    assert page.startswith("# ") and "[B1](#b1)" in page and "png" not in page
    assert claims.headline(tmp_path) == "1 claims judged: 1 explained otherwise."


def test_every_claim_has_its_row_its_section_and_what_decides_it(tmp_path: Path) -> None:
    made = (figure("A1", "a bias", 2.0), figure("A1", "rounding", 1e-4), figure("C4", "nothing", 0.0, None, "text"))
    page = claims.page(recorded(tmp_path, "A1", "C4", "B3", figures=made))
    assert [line for line in page.splitlines() if line.startswith("## ")] == ["## A1", "## C4", "## B3"]
    assert "| logits, nats | a bias | 2 | 2 | 1 to 4 | 3 | yes |" in page
    assert "| logits, nats | rounding | 2 | 0.0001 | 5e-05 to 0.0002 | 3 | no |" in page
    assert "| text, nats | nothing | – | 0 | 0 | 3 |  |" in page
    assert page.count("Decided by: `castpoint x`.") == 1
    assert (tmp_path / "plots" / "claims.png").stat().st_size > 10_000
    assert "3 claims judged: 1 reproduced, 1 explained otherwise, 1 cannot be decided here." in page


def test_panels_are_the_figures_of_most_causes(tmp_path: Path) -> None:
    many = [figure("A5", f"cause {n}", 1.0, what=what) for what in ("output", "hidden", "logits") for n in range(8)]
    made = (figure("A1", "one", 1.0, what="k"), *many, figure("A5", "one", 0.0, 0.0, "zero"))
    _, rows, figures = claims.frames(recorded(tmp_path, "A1", "A5", figures=made))
    assert claims._panels(rows, figures) == [("A1", "k"), ("A5", "output"), ("A5", "logits")]
