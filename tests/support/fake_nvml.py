"""NVML without a GPU: two of them, by index and by UUID, and what each says."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

FIRST, SECOND = "00000000-1111-2222-3333-444444444444", "55555555-6666-7777-8888-999999999999"  # as PyTorch says them


class NVMLError(Exception):
    """As pynvml's: every failure is one of its subclasses."""


def fake_nvml(monkeypatch: pytest.MonkeyPatch, visible: str = FIRST, **answers: Any) -> ModuleType:
    """pynvml of a machine with two GPUs, of which PyTorch's device 0 is the visible one.

    answers: of a function, by its name without `nvmlDeviceGet`, in place of what it says of any GPU: a value, or an
    exception that it raises. None takes the function away.
    """
    nvml = ModuleType("pynvml")
    nvml.NVML_CLOCK_SM, nvml.NVML_CLOCK_MEM, nvml.NVML_TEMPERATURE_GPU = 1, 2, 0
    handles = {f"GPU-{FIRST}": "first", f"GPU-{SECOND}": "second"}
    clocks = {("first", 1): 345, ("first", 2): 2619, ("second", 1): 1980, ("second", 2): 3201}
    nvml.started = 0

    def start() -> None:
        nvml.started += 1

    def handle(uuid: str) -> str:
        if uuid not in handles:
            raise NVMLError("Not Found")
        return handles[uuid]

    said: dict[str, Any] = {
        "HandleByUUID": handle,
        "HandleByIndex": lambda index: list(handles.values())[index],
        "ClockInfo": lambda gpu, clock: clocks[gpu, clock],
        "PowerUsage": lambda gpu: {"first": 71250, "second": 412370}[gpu],
        "Temperature": lambda gpu, sensor: {"first": 30, "second": 41}[gpu],
        "CurrentClocksEventReasons": lambda gpu: {"first": 0x1, "second": 0x4}[gpu],
        "CurrentClocksThrottleReasons": lambda gpu: {"first": 0x1, "second": 0x24}[gpu],
    }
    for name, usual in said.items():
        if name not in answers or answers[name] is not None:
            setattr(nvml, f"nvmlDeviceGet{name}", answering(answers[name]) if name in answers else usual)
    nvml.nvmlInit = answering(answers["Init"]) if "Init" in answers else start
    nvml.nvmlSystemGetDriverVersion = answering(answers.get("DriverVersion", "580.159.04"))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    facts = {"name": "NVIDIA H200", "multi_processor_count": 132, "total_memory": 150 << 30, "L2_cache_size": 60 << 20}
    device = SimpleNamespace(**facts, major=9, minor=0, uuid=visible)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    return nvml


def answering(answer: Any) -> Callable[..., Any]:
    def answered(*arguments: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    return answered
