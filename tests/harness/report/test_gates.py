"""Planted faults as tables, from invented rows: what is said of each gate, of what none sees, and of other people's."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

import castpoint.harness.__main__ as cli
from castpoint.harness.conformance import gates as study
from castpoint.harness.conformance.cuda import problems_for
from castpoint.harness.conformance.faults import RIGHT as CONTROL
from castpoint.harness.report.gates import (
    RIGHT,
    alone,
    blind_spots,
    cell,
    few,
    matrix,
    peers_table,
    section,
    tolerances_section,
)
from castpoint.harness.report.studies import study_sections
from castpoint.harness.runs.frames import latest, load
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import GateRow, ToleranceRow
from castpoint.harness.runs.words import Check, Gate, Status, Verdict
from castpoint.variants.catalogue import HF

SEEN, UNSEEN, SAME = Verdict


def rows() -> list[GateRow]:
    """Two plans: proj and normed, seen by all; an accumulator, by the envelope in one plan; eps, by none, in one;
    cos_sin, which is no fault in one plan; and both plans unchanged."""
    verdicts = {
        ("proj", "a"): (SEEN, SEEN), ("proj", "b"): (SEEN, SEEN), ("normed", "a"): (SEEN, SEEN),
        ("short", "a"): (UNSEEN, SEEN), ("short", "b"): (UNSEEN, UNSEEN), ("eps", "b"): (UNSEEN, UNSEEN),
        ("cos_sin", "a"): (SAME, SAME), ("cos_sin", "b"): (UNSEEN, SEEN), (RIGHT, "a"): (UNSEEN, UNSEEN),
        (RIGHT, "b"): (UNSEEN, UNSEEN),
    }  # fmt: skip
    return [
        GateRow(
            plan=plan, fault=f"{kind} moved", kind=kind, gate=gate, elements=9000, verdict=verdict,
            differ=0 if kind in ("eps", RIGHT) else 1234, outside=7 * (verdict == SEEN),
        )
        for (kind, plan), pair in verdicts.items()
        for gate, verdict in zip((Gate.ONE_PRODUCT, Gate.ENVELOPE), pair, strict=True)
    ] + [GateRow(plan="a", fault="proj moved", kind="proj", gate="Liger: RMSNorm", verdict=UNSEEN)]  # fmt: skip


def others() -> list[ToleranceRow]:
    url = "https://github.com/a/b/blob/c/d.py"
    counts = {"right_kernels": 60, "right_refused": 0}
    return [
        ToleranceRow(peer="Loose", test="RMSNorm", atol=0.2, rtol=0.02, x="N(0, 1)", weight="1", norm_faults=18,
                     norm_passed=13, norm_hidden=3, chain_faults=829, chain_passed=527, passed="eps dropped; ties",
                     url=url, **counts),
        ToleranceRow(peer="Bits", test="q/k", atol=0.0, rtol=0.0, x="N(0, 1)", weight="1", norm_faults=23, url=url,
                     norm_passed=0, chain_faults=829, chain_passed=12, right_kernels=60, right_refused=43),
        ToleranceRow(peer="Near", test="RMSNorm", atol=0.001, rtol=0.001, x="N(0, 1)", weight="1", norm_faults=17,
                     norm_passed=1, chain_faults=829, chain_passed=22, passed="ties", url=url, **counts),
        ToleranceRow(peer="castpoint", test="all of them", chain_faults=829, chain_passed=36, **counts),
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    records = Records(tmp_path, {}, {})
    records.add(*rows())
    records.add(*others())
    records.finish()
    return tmp_path


@pytest.fixture
def frame(folder: Path) -> pd.DataFrame:
    return latest(folder, "gates")[1]


def test_the_kind_of_right_kernels_is_the_study_s() -> None:
    assert RIGHT == CONTROL.kind


def test_cells_say_all_none_or_how_many() -> None:
    assert [cell(pd.Series(v, dtype=str)) for v in ([SEEN], [UNSEEN] * 2, [SEEN, UNSEEN], [])] == [
        "all", "none", "1 of 2", "–",
    ]  # fmt: skip


def test_kinds_that_every_gate_answers_alike_share_a_row(frame: pd.DataFrame) -> None:
    table = matrix(frame)
    assert list(table.columns)[1:] == ["one product", "envelope", "any of them"]
    assert table.values.tolist() == [
        ["proj, normed", "all", "all", "all"],
        ["short", "none", "1 of 2", "1 of 2"],
        ["eps", "none", "none", "none"],
        ["cos_sin", "none", "all", "all"],
    ]


def test_what_no_gate_sees_is_named_with_its_plans(frame: pd.DataFrame) -> None:
    assert blind_spots(frame) == [
        "- **short moved** in b: up to 1,234 elements change, none beyond what is allowed",
        "- **eps moved** in b: no element changes there",
    ]


def test_what_one_kind_of_inputs_misses_is_named(frame: pd.DataFrame) -> None:
    assert alone(frame).values.tolist() == [
        ["short moved", "every plan", "b"], ["eps moved", "b", "b"], ["cos_sin moved", "b", "–"],
    ]  # fmt: skip
    assert few(list("abcde"), 6) == "5 plans" and few(list("abcd"), 6) == "a, b, c, d"


def test_the_section_counts_what_is_a_fault(frame: pd.DataFrame) -> None:
    text = section(frame)
    assert "**5 of 7 planted faults are seen**" in text and "of 4 looks at right kernels" in text
    assert "Seen by none, 2 of 7:" in text and "orders, 0 are refused" in text and "Liger" not in text
    refused = frame.assign(verdict=frame["verdict"].where(frame["kind"] != RIGHT, SEEN))
    assert "orders, 4 are refused" in section(refused)
    seen = section(frame[frame["kind"] == "proj"])
    assert "**2 of 2 planted" in seen and "Seen by none" not in seen and "by itself" not in seen


def test_binaries_are_checked_without_residual_and_bias_as_the_section_says() -> None:
    for check in (Check.EXACT, Check.ENVELOPE):
        for problem in problems_for(HF, check, "cpu", tokens=2):
            assert problem.residual is None and problem.bias is None


def test_other_people_s_tests_stand_above_ours_the_most_permissive_first(folder: Path) -> None:
    found = latest(folder, "tolerances")[1]
    table = peers_table(found)
    assert [name.partition(",")[0] for name in table["test"]] == [
        *(f"[{peer}](https://github.com/a/b/blob/c/d.py)" for peer in ("Loose", "Near", "Bits")), "castpoint",
    ]  # fmt: skip
    assert table.iloc[0].tolist()[1:] == [
        "0.2 + 0.02 · abs(y)", "64 %, 527 of 829", "13 of 18, 3 hidden", "x N(0, 1), w 1", "0 of 60",
    ]  # fmt: skip
    assert table.iloc[2].tolist()[1:] == ["equal bits", "1.4 %, 12 of 829", "0 of 23", "x N(0, 1), w 1", "43 of 60"]
    assert table.iloc[3].tolist()[1:] == ["–", "4.3 %, 36 of 829", "–", "–", "0 of 60"]
    assert "| castpoint, all of them |" in tolerances_section(found)


def test_both_sections_stand_in_a_report(folder: Path) -> None:
    found = [section.splitlines()[0] for section in study_sections(folder)]
    assert found == ["## Which gate sees which fault", "## What other people's tests let pass"]


def test_the_command_runs_the_study_and_says_what_is_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On one plan, with three of its faults; then with an envelope that sees the right kernel."""
    few = study.faults(study.PLANS["hf"].plan)[:3]
    monkeypatch.setattr(study, "PLANS", {"hf": study.PLANS["hf"]})
    monkeypatch.setattr(study, "faults", lambda plan: few)
    liger = study.tolerances()[:1]
    monkeypatch.setattr(study, "tolerances", lambda: liger)
    cli.study("gates", tmp_path)
    run_id, frame = latest(tmp_path, "gates")
    assert set(frame["status"]) == {Status.OK} and len(load(tmp_path, run_id)["tolerances"]) == 1 + len(study.OWN)
    out = capsys.readouterr().out
    assert "## Which gate sees which fault" in out and "## What failed" not in out

    def empty(*arguments: object) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        return {name: (high + 1, high) for name, (_, high) in study.envelope(*arguments).items()}

    monkeypatch.setitem(study.GATES, Gate.ENVELOPE, (study.drawn, empty))
    study.case.cache_clear()
    cli.study("gates", tmp_path)
    study.case.cache_clear()
    assert "hf, right kernel, none, envelope | red" in capsys.readouterr().out
