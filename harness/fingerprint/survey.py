"""Fingerprints by the row, of implementations whose right answer was written down before they were asked."""

from __future__ import annotations

import json
from typing import Any

from castpoint.harness.fingerprint.answer import Answer
from castpoint.harness.fingerprint.norm import identify
from castpoint.harness.fingerprint.verdict import Verdict, verdict
from castpoint.harness.peers.implementations import implementations
from castpoint.harness.peers.running import TRITON, Implementation, describe_versions
from castpoint.harness.runs.errors import reason_of
from castpoint.harness.runs.progress import track
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import ImplementationRow
from castpoint.harness.runs.words import Status

EXECUTED = "triton, PTX for sm_90 run on a CPU"


def survey_implementations(records: Records, device: str) -> None:
    """One row an implementation: its fingerprint beside the right one, or why there is none here."""
    for row in track(implementations(), "implementations"):
        how = EXECUTED if (row.how, device) == (TRITON, "cpu") else row.how
        key = {"implementation": row.name, "kind": row.kind, "how": how}
        if not records.has(ImplementationRow, **key):
            status, columns = _fingerprint(row, device)
            columns |= {"package": row.package, "versions": describe_versions(row), "device": device}
            columns |= {"expected": row.right, "source": row.source}
            records.add(ImplementationRow(**key, **columns, status=status))


def _fingerprint(row: Implementation, device: str) -> tuple[str, dict[str, Any]]:
    try:
        answer = identify(row.make(device), row.kind, device)
    except ImportError as error:
        return Status.NOT_INSTALLED, {"reason": str(error)}
    except Exception as error:  # a package that fails on this machine is a row, and the survey goes on
        return Status.ERROR, {"reason": reason_of(error), "verdict": Verdict.WRONG}
    said = verdict(row.right, row.kind, answer)
    return answer.status, {**columns_of(answer), "plan": found_in(answer), "verdict": said}


def columns_of(answer: Answer) -> dict[str, Any]:
    """What rows say of an answer besides its status and what it found."""
    names = ("share_equal", "runner_up_share_equal", "reason", "seconds")
    return {name: getattr(answer, name) for name in names}


def found_in(answer: Answer) -> str:
    return json.dumps(answer.candidates or ([answer.nearest] if answer.nearest else []))
