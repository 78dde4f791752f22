"""The page on what was checked how: its numbers are those of the studies, and every check says what it cannot see."""

import re
from pathlib import Path

import pandas as pd
from support import ROOT

from castpoint.harness.report.checks import CHECKS, HEADING, of_audit, of_fingerprints, of_gates, section
from castpoint.harness.runs.frames import latest
from castpoint.harness.runs.schema import TABLES
from castpoint.harness.runs.words import Gate, Verdict


def test_every_check_says_what_it_cannot_see(tmp_path: Path) -> None:
    assert all(figures and how and unseen for figures, _, how, _, unseen in CHECKS)
    assert {table for _, table, *_ in CHECKS} - {""} <= set(TABLES)
    empty = section(tmp_path)  # nothing was studied: nothing is counted
    assert empty.startswith(f"## {HEADING}") and empty.count("\n| ") == len(CHECKS) + 2


def gate_row(plan: str, kind: str, fault: str, gate: str, verdict: str) -> dict[str, object]:
    return {"plan": plan, "kind": kind, "fault": fault, "gate": gate, "verdict": verdict, "differ": 1, "elements": 9}


def test_faults_are_counted_once_and_right_kernels_apart() -> None:
    one, two = Gate.ONE_PRODUCT, Gate.ENVELOPE
    rows = [
        gate_row("hf", "proj", "moved", one, Verdict.UNSEEN),
        gate_row("hf", "proj", "moved", two, Verdict.SEEN),
        gate_row("hf", "proj", "short", one, Verdict.UNSEEN),
        gate_row("hf", "proj", "short", two, Verdict.UNSEEN),
        gate_row("hf", "right kernel", "backwards", one, Verdict.UNSEEN),
        gate_row("hf", "right kernel", "backwards", two, Verdict.SEEN),
    ]
    assert of_gates(pd.DataFrame(rows)) == (
        "Of 2 kernels with a planted fault 1 are seen; of 2 looks at right ones 1 were refused."
    )


def test_counts_of_published_studies_are_those_of_their_records() -> None:
    folder = ROOT / "results" / "cpu"
    audit, fingerprints = (latest(folder, table)[1] for table in ("audit", "fingerprints"))
    assert of_audit(audit) == f"{(audit['status'] == 'ok').sum()} of {len(audit)} kernels."
    right, planted = map(int, reversed(re.findall(r"\d+", of_fingerprints(fingerprints))))
    assert planted == len(fingerprints) >= right > 0.9 * planted
    text = section(folder)
    assert of_audit(audit) in text and of_fingerprints(fingerprints) in text
