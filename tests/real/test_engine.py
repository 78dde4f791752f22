"""The engine on Gemma 3 270M: transformers' text, and what fused plans write under K-norm weights of 96.5."""

from __future__ import annotations

from pathlib import Path

import pytest

from castpoint.harness.report import engine as page
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.words import How, KScale
from castpoint.harness.systems.engine import FUSED, SHORT, SHUFFLED, sweep


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Records:
    made = Records(tmp_path_factory.mktemp("engine"), {}, {})
    sweep(made, "", short=True)
    made.finish()
    return made


def of(records: Records, **wanted: str) -> list[dict[str, str]]:
    rows = records.rows("engine")
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def test_alone_it_writes_what_transformers_writes(records: Records) -> None:
    for plan in ("transformers", "gemma"):
        rows = of(records, plan=plan, how=How.ALONE)
        assert len(rows) == SHORT.prompts
        assert all(row["equal"] == row["tokens"] == str(SHORT.tokens) for row in rows)


def test_pages_are_reused_and_sequences_sent_back(records: Records) -> None:
    runs = {
        row["how"]: row
        for row in records.rows("engine_runs")
        if row["plan"] == "eager" and row["k_scale"] == "as it is"
    }
    assert int(runs[How.REUSED]["reused"]) == 16 * SHORT.prompts  # of prompts of 28 tokens the one full page
    assert int(runs[How.PREEMPTED]["preempted"]) > 0 and int(runs[How.PREEMPTED]["computed"]) > int(
        runs[How.BATCH]["computed"]
    )


def test_fused_plans_write_no_gibberish_where_the_function_stays(records: Records) -> None:
    """Their texts lie nearer to eager's than a tenth of the way to the same words in a drawn order."""
    for change in (KScale.OWN, KScale.BALANCED):
        nats = {
            plan: sum(float(row["nats"]) for row in of(records, plan=plan, how=How.BATCH, k_scale=change))
            for plan in ("eager", *FUSED, SHUFFLED)
        }
        for plan in FUSED:
            assert abs(nats[plan] - nats["eager"]) < 0.1 * (nats[SHUFFLED] - nats["eager"])


def test_without_the_balance_eager_itself_writes_worse(records: Records) -> None:
    """So that what is blamed on a plan is not what the weights did."""
    own, sharp = (
        sum(float(row["nats"]) for row in of(records, plan="eager", how=How.BATCH, k_scale=change))
        for change in (KScale.OWN, KScale.ALONE)
    )
    assert sharp > 2 * own


def test_its_page_says_so(records: Records, tmp_path: Path) -> None:
    said = page.page(records.folder)
    assert "What they write behind prompt" in said and (records.folder / "plots" / "engine.png").exists()
    assert page.headline(records.folder).startswith(f"{SHORT.prompts} of {SHORT.prompts} texts")
