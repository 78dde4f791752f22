"""What machine and versions a run is measured on, and by how many threads."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CODE = ("kernels", "variants", "harness", "castpoint")
DISPATCH = Path("kernels", "dispatch.csv")  # measured, not written: no part of the code
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
    """Versions, code and machine, as environment.json records them."""
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
        "sources": sources(),
        "dispatch": dispatch(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        facts["gpu"] = {
            "name": p.name,
            "multiprocessors": p.multi_processor_count,
            "memory_bytes": p.total_memory,
            "l2_bytes": p.L2_cache_size,
            "capability": f"{p.major}.{p.minor}",
            "cuda": torch.version.cuda,
            "driver": driver(),
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


def driver() -> str:
    """Version of the GPU's driver, as NVML says it; `unknown` where it says nothing."""
    try:
        import pynvml

        pynvml.nvmlInit()
        said = pynvml.nvmlSystemGetDriverVersion()
    except Exception:  # no package, no driver, no permission: a run's record does without
        return "unknown"
    return said.decode() if isinstance(said, bytes) else str(said)  # bytes: an older pynvml


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """CASTPOINT_COMMIT, where a copy of the tree is told whose it is; else the checkout's commit, with `+` behind it
    where code differs from it, files that git does not know included; else the installed version.

    Only git of this code's own root counts: an installed package may lie inside somebody else's repository.
    """
    if told := os.environ.get("CASTPOINT_COMMIT"):
        return told
    if not (ROOT / ".git").exists():
        return version("castpoint") or "unknown"
    head = _said("git", "rev-parse", "--short=12", "HEAD")
    changed = _said("git", "status", "--porcelain", "--", *CODE, f":(exclude){DISPATCH}")
    return "unknown" if head is None else head + ("" if changed == "" else "+")


def sources() -> str:
    """Which code this is, whatever git knows of it: 12 hex digits of a SHA-256 over paths and bytes of every .py file
    and every file of data, as they are on disk. The same in a checkout, a copy of it and an installed package.

    Without kernels/dispatch.csv: see dispatch.
    """
    found: dict[str, Path] = {}
    for name in CODE:
        inside = (ROOT / name) if (ROOT / name).exists() else ROOT  # installed, castpoint's own files lie in the root
        paths = inside.rglob("*") if inside != ROOT else inside.glob("*")
        found |= {f"{name}/{p.relative_to(inside).as_posix()}": p for p in paths if _counts(p)}
    digest = hashlib.sha256()
    for name, path in sorted(found.items()):
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12]


def dispatch() -> str:
    """The same of kernels/dispatch.csv, which decides how launches are cut; `none` where there is no such file."""
    path = ROOT / DISPATCH
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.exists() else "none"


def _counts(path: Path) -> bool:
    return path.is_file() and (path.suffix == ".py" or path.parent.name == "data" and path.suffix != ".md")


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


@contextmanager
def one_thread_but(fn: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """one_thread; what it gives is fn on as many as before."""
    import torch

    threads = torch.get_num_threads()

    @functools.wraps(fn)
    def on_its_own(*arguments: Any, **named: Any) -> Any:
        torch.set_num_threads(threads)
        try:
            return fn(*arguments, **named)
        finally:
            torch.set_num_threads(1)

    with one_thread():
        yield on_its_own


def without_limits_of_dynamo() -> None:
    """Has Dynamo, where it is loaded, compile for as many shapes and strides as come. Past 8 for a function, and
    256 in all, it would run the function as it is written, which rounds elsewhere, or raise where that is forbidden."""
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.config.recompile_limit = max(1024, dynamo.config.recompile_limit)
        dynamo.config.accumulated_recompile_limit = max(8192, dynamo.config.accumulated_recompile_limit)


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
