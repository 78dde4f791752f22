"""The GPU's state: read from nvidia-smi's answer and decoded, whatever the answer."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from castpoint.harness.timing.state import gpu_state, reason_words


def test_state_is_read_and_decoded():
    asked = []

    def run(command: list[str]) -> str:
        asked.append(command)
        return "1980, 3201, 412.37, 41, 0x0000000000000004\n"

    assert gpu_state("0", run) == {
        "sm_mhz": 1980.0,
        "memory_mhz": 3201.0,
        "watts": 412.37,
        "celsius": 41.0,
        "slowed_by": "power cap",
    }
    assert "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active" in asked[0]


def test_older_drivers_know_the_reasons_by_another_name():
    def run(command: list[str]) -> str:
        if "clocks_event_reasons" in command[2]:
            raise subprocess.CalledProcessError(2, command, output='Field "clocks_event_reasons.active" is not valid')
        return "1980, 3201, [N/A], 41, 0x0000000000000000"

    assert gpu_state("0", run)["slowed_by"] == "none" and gpu_state("0", run)["watts"] is None


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (FileNotFoundError(2, "nvidia-smi"), "nvidia-smi is missing"),
        (PermissionError(13, "denied"), "[Errno 13] denied"),
        (subprocess.TimeoutExpired(["nvidia-smi"], 10), "Command '['nvidia-smi']' timed out after 10 seconds"),
        (subprocess.CalledProcessError(9, "x", output="No devices were found\n"), "No devices were found"),
        ("", "nvidia-smi answered ''"),
    ],
)
def test_the_state_never_raises(answer: Any, expected: str):
    def run(command: list[str]) -> str:
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert gpu_state("0", run) == {"unknown": expected}


def test_this_machine_answers_something():
    assert gpu_state()


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        ("0x0000000000000000", "none"),
        ("0x0000000000000024", "power cap, software thermal slowdown"),
        ("0x0000000000000201", "idle, 0x200"),
        ("[N/A]", None),
        ("Not Active", None),
    ],
)
def test_reason_bits(bits: str, words: str | None):
    assert reason_words(bits) == words
