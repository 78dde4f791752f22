"""The tables of known plans: rows as they are written, of few plans and captures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from castpoint.harness.fingerprint import known
from castpoint.harness.runs.frames import load_table
from castpoint.harness.runs.records import Records


def test_planted_plans_and_captures_of_them_become_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subjects = [next(known.known_subjects())]
    norms, chains = known.norm_plans()[:5], known.drawn_chains(2)
    monkeypatch.setattr(known, "known_subjects", lambda: iter(subjects))
    monkeypatch.setattr(known, "norm_plans", lambda: norms)
    monkeypatch.setattr(known, "drawn_chains", lambda count: chains)
    monkeypatch.setattr(known, "TOKENS", (4,))
    records = Records(tmp_path, {}, {})
    for _ in range(2):  # the second time nothing is left
        known.survey_known(records)
        known.survey_captures(records)
    asked = load_table(tmp_path, records.run_id, "fingerprints")
    assert list(asked["status"]) == ["identified"]
    assert json.loads(asked["answered"][0])[0].items() >= json.loads(asked["planted"][0]).items()
    found = load_table(tmp_path, records.run_id, "captures").set_index("kind")
    assert list(found["plans"][["qkv", "rmsnorm"]]) == [2, 1] and not found["lost"].any()
    assert found["told_apart"].between(0, 1).all()
