"""What the GPU was doing: clocks, power, temperature and why it ran slower than it could, as NVML says."""

from __future__ import annotations

import functools
from typing import Any

REASONS = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")  # today's, and older
# Bits of that field, as NVML names them in nvml.h (nvmlClocksEventReason...).
BITS = {
    0x1: "idle",
    0x2: "clocks set by an application",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clocks",
}


def gpu_state() -> dict[str, Any]:
    """Clocks in MHz, W, degrees C and slowdown reasons (words, joined by `, `; `none`); None where not said.

    Asks NVML about the first GPU that PyTorch sees. W are a mean of the last second (nvml.h, nvmlDeviceGetPowerUsage).
    Never raises: what is not said has its reason under `unknown`, by itself where NVML as a whole says nothing.
    """
    try:
        nvml, gpu = _first_gpu()
    except ModuleNotFoundError:
        return {"unknown": "the package pynvml is missing: pip install 'castpoint[gpu]'"}
    except Exception as error:  # no driver, no permission, no GPU of that name
        return {"unknown": _line(error)}
    questions = {
        "sm_mhz": lambda: float(nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM)),
        "memory_mhz": lambda: float(nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM)),
        "watts": lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,  # it says mW
        "celsius": lambda: float(nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU)),
        "slowed_by": lambda: reason_words(_reasons(nvml, gpu)),
    }
    facts: dict[str, Any] = {}
    unknown = []
    for column, ask in questions.items():
        try:
            facts[column] = ask()
        except Exception as error:  # this GPU, this driver or this pynvml does not know it
            facts[column] = None
            unknown.append(f"{column}: {_line(error)}")
    return facts | ({"unknown": "; ".join(unknown)} if unknown else {})


def reason_words(bits: int) -> str:
    """0x24 is `power cap, software thermal slowdown`; bits without a name stay a number."""
    words = [word for bit, word in BITS.items() if bits & bit]
    unknown = bits & ~sum(BITS)
    return ", ".join(words + ([hex(unknown)] if unknown else [])) or "none"


@functools.cache
def _first_gpu() -> tuple[Any, Any]:
    """NVML and its handle of PyTorch's device 0, by UUID: NVML counts GPUs without CUDA_VISIBLE_DEVICES, and in another
    order. Kept once it is had; a failure is not, and the next call tries again."""
    import pynvml
    import torch

    pynvml.nvmlInit()
    uuid = torch.cuda.get_device_properties(0).uuid
    return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")


def _reasons(nvml: Any, gpu: Any) -> int:
    """The field's bits. Either name may be missing: in an older pynvml, or in an older driver's library."""
    try:
        return getattr(nvml, REASONS[0])(gpu)
    except Exception:
        return getattr(nvml, REASONS[1])(gpu)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
