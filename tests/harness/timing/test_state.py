"""The GPU's state: what NVML says of the GPU that PyTorch runs on, whatever it says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
from fake_nvml import FIRST, SECOND, NVMLError, fake_nvml

from castpoint.harness.doctor import cure_of
from castpoint.harness.timing import state
from castpoint.harness.timing.state import gpu_state, reason_words

SECONDS = {"sm_mhz": 1980.0, "memory_mhz": 3201.0, "watts": 412.37, "celsius": 41.0, "slowed_by": "power cap"}


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """NVML's handle is kept for the life of a process."""
    state._first_gpu.cache_clear()
    yield
    state._first_gpu.cache_clear()


def test_state_is_that_of_the_gpu_that_pytorch_runs_on(monkeypatch) -> None:
    """With CUDA_VISIBLE_DEVICES=1 PyTorch's device 0 is the second GPU, and NVML's index 0 is still the first."""
    nvml = fake_nvml(monkeypatch, visible=SECOND)
    assert gpu_state() == SECONDS
    assert nvml.nvmlDeviceGetClockInfo(nvml.nvmlDeviceGetHandleByIndex(0), nvml.NVML_CLOCK_SM) == 345


def test_the_first_gpu_has_other_figures(monkeypatch) -> None:
    fake_nvml(monkeypatch, visible=FIRST)
    idle = {"sm_mhz": 345.0, "memory_mhz": 2619.0, "watts": 71.25, "celsius": 30.0, "slowed_by": "idle"}
    assert gpu_state() == idle


def test_nvml_is_started_once_and_again_only_after_a_failure(monkeypatch) -> None:
    nvml = fake_nvml(monkeypatch, visible="no such")
    assert gpu_state() == {"unknown": "NVMLError: Not Found"} and nvml.started == 1
    nvml = fake_nvml(monkeypatch)
    assert gpu_state() == gpu_state() and nvml.started == 1


@pytest.mark.parametrize("lacking", [None, NVMLError("Function Not Found")])
def test_older_versions_know_the_reasons_by_another_name(monkeypatch, lacking: Exception | None) -> None:
    """None: pynvml has no such function; an error: it has, and the driver's library has not."""
    fake_nvml(monkeypatch, visible=SECOND, CurrentClocksEventReasons=lacking)
    assert gpu_state() == SECONDS | {"slowed_by": "power cap, software thermal slowdown"}


def test_what_one_question_is_not_told_costs_no_other(monkeypatch) -> None:
    no = NVMLError("Not Supported")
    fake_nvml(monkeypatch, visible=SECOND, PowerUsage=no, CurrentClocksEventReasons=no, CurrentClocksThrottleReasons=no)
    unknown = "watts: NVMLError: Not Supported; slowed_by: NVMLError: Not Supported"
    assert gpu_state() == SECONDS | {"watts": None, "slowed_by": None, "unknown": unknown}


@pytest.mark.parametrize(
    ("answers", "unknown"),
    [
        ({"Init": NVMLError("NVML Shared Library Not Found")}, "NVMLError: NVML Shared Library Not Found"),
        ({"Init": PermissionError(13, "denied")}, "PermissionError: [Errno 13] denied"),
        ({"HandleByUUID": NVMLError("Insufficient\nPermissions")}, "NVMLError: Insufficient Permissions"),
    ],
)
def test_the_state_never_raises(monkeypatch, answers: dict[str, Any], unknown: str) -> None:
    fake_nvml(monkeypatch, **answers)
    assert gpu_state() == {"unknown": unknown}


def test_a_package_that_is_missing_is_named_with_its_cure(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_state() == {"unknown": f"the package pynvml is missing: {cure_of('pynvml')}"}


def test_this_machine_answers_something() -> None:
    assert gpu_state()


@pytest.mark.parametrize(
    ("bits", "words"), [(0x0, "none"), (0x24, "power cap, software thermal slowdown"), (0x201, "idle, 0x200")]
)
def test_reason_bits(bits: int, words: str) -> None:
    assert reason_words(bits) == words


def test_the_package_has_the_names_that_are_asked_for() -> None:
    nvml = pytest.importorskip("pynvml")
    asked = ("ClockInfo", "PowerUsage", "Temperature", "HandleByUUID")
    assert all(hasattr(nvml, f"nvmlDeviceGet{name}") for name in asked)
    assert any(hasattr(nvml, name) for name in state.REASONS) and hasattr(nvml, "nvmlSystemGetDriverVersion")
    assert (nvml.NVML_CLOCK_SM, nvml.NVML_CLOCK_MEM, nvml.NVML_TEMPERATURE_GPU) == (1, 2, 0)
    named = {
        getattr(nvml, name) for name in dir(nvml) if name.startswith("nvmlClocksEventReason") and name[21:] != "All"
    }
    assert named - {0} == set(state.BITS)
