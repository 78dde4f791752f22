"""What the GPU was doing: clocks, power, temperature and why it ran slower than it could, as nvidia-smi says."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

FIELDS = {  # nvidia-smi's name: column
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "power.draw": "watts",
    "temperature.gpu": "celsius",
}
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # today's name, and older drivers'
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

Run = Callable[[list[str]], str]


def gpu_state(gpu: str = "0", run: Run | None = None) -> dict[str, Any]:
    """Clocks in MHz, W, degrees C and slowdown reasons (words, joined by `, `; `none`); None where not said.

    gpu: index or UUID as nvidia-smi knows them, which ignores CUDA_VISIBLE_DEVICES. Never raises: where nvidia-smi
    is missing or fails the dict holds its reason under `unknown`.
    """
    run = run or _nvidia_smi
    error = ""
    for reasons in REASONS:
        query = ",".join([*FIELDS, reasons])
        try:
            text = run(["nvidia-smi", f"--id={gpu}", f"--query-gpu={query}", "--format=csv,noheader,nounits"])
        except FileNotFoundError:
            return {"unknown": "nvidia-smi is missing"}
        except (OSError, subprocess.SubprocessError) as failed:
            error = " ".join(str(getattr(failed, "stdout", None) or failed).split())[:200]
            continue
        values = [value.strip() for value in text.strip().split("\n")[0].split(",")]
        if len(values) != len(FIELDS) + 1:
            error = f"nvidia-smi answered {text.strip()[:200]!r}"
            continue
        numbers = {column: _number(value) for column, value in zip(FIELDS.values(), values[:-1], strict=True)}
        return numbers | {"slowed_by": reason_words(values[-1])}
    return {"unknown": error}


def reason_words(bits: str) -> str | None:
    """`0x0000000000000024` is `power cap, software thermal slowdown`; None for what is no number."""
    try:
        value = int(bits, 16)
    except ValueError:
        return None
    words = [word for bit, word in BITS.items() if value & bit]
    unknown = value & ~sum(BITS)
    return ", ".join(words + ([hex(unknown)] if unknown else [])) or "none"


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _nvidia_smi(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
