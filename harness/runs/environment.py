"""What machine and versions a run is measured on, and by how many threads."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "triton", "numpy", "transformers")
ISAS = (  # oneDNN's words for instruction sets, in its order
    *("sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni", "avx512_core_bf16"),
    *("avx512_core_fp16", "avx512_core_amx", "avx512_core_amx_fp16"),
)


def machine_name(device: str) -> str:
    """Name of the results folder: `cpu`, or the GPU's short name (`NVIDIA H200` is h200)."""
    if device == "cpu":
        return "cpu"
    import torch

    return short_name(torch.cuda.get_device_name())


def short_name(gpu: str) -> str:
    """`h200` of NVIDIA H200."""
    words = re.findall(r"[a-z]+\d+\w*|\d+\w*", gpu.lower())
    return words[0] if words else "gpu"


def describe(device: str) -> dict[str, Any]:
    """Versions, commit and machine, as environment.json records them."""
    import torch

    facts: dict[str, Any] = {
        "device": device,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "last_cache_bytes": last_cache_bytes(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **matmul_arithmetic(),
        "python": platform.python_version(),
        "commit": commit(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"
        facts["gpu"] = {
            "name": p.name,
            "multiprocessors": p.multi_processor_count,
            "memory_bytes": p.total_memory,
            "l2_bytes": p.L2_cache_size,
            "capability": f"{p.major}.{p.minor}",
            "cuda": torch.version.cuda,
            "driver": driver.split()[0],
            "bf16_reduced_precision_reduction": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        }
    return facts


def matmul_arithmetic() -> dict[str, Any]:
    """What eager's bf16 matmul on this CPU is made by, so that runs of two arithmetics are never continued as one.

    onednn: whether PyTorch asks it. onednn_isa: the best instructions that it may use, the processor's unless
    ONEDNN_MAX_CPU_ISA allows less; below avx512_core PyTorch multiplies bf16 by itself. native_bf16: by instructions
    for bf16, which add in another order, and some of which let a NaN reach other rows.
    """
    import torch

    probes = {
        "avx2": torch.cpu._is_avx2_supported,
        "avx512_core": torch.cpu._is_avx512_supported,
        "avx512_core_bf16": torch.cpu._is_avx512_bf16_supported,
        "avx512_core_amx": torch.cpu._is_amx_tile_supported,
    }
    best = max((ISAS.index(name) for name, has in probes.items() if has()), default=0)
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).lower()
    best = min(best, ISAS.index(limit)) if limit in ISAS else best  # oneDNN takes another word for no limit
    onednn = torch._C._has_mkldnn and torch._C._get_mkldnn_enabled()
    native = onednn and best >= ISAS.index("avx512_core_bf16")
    return {"onednn": onednn, "onednn_isa": ISAS[best], "native_bf16": native}


def last_cache_bytes(device: str) -> int:
    """Size of the last cache before memory: the GPU's L2, or the CPU's largest; 0 where the system does not say."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_properties(0).L2_cache_size
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=0)


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The checkout's commit, with `+` behind it where tracked code differs from it; else the installed version.

    Only git of this code's own root counts: an installed package may lie inside somebody else's repository.
    """
    if not (ROOT / ".git").exists():
        return version("castpoint") or "unknown"
    head = _said("git", "rev-parse", "--short=12", "HEAD")
    clean = _said("git", "diff", "--quiet", "HEAD", "--", "kernels", "variants", "harness") is not None
    return "unknown" if head is None else head + ("" if clean else "+")


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread inside, as many as before behind it: matrices of a few MB are slower on two as soon as
    another process is busy."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _said(*command: str) -> str | None:
    """What a command prints, here in the checkout; None where it fails, hangs or is not there."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", path.read_text() if path.exists() else "", re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()
