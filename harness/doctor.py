"""What is missing or in the way on this machine, and the cure."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from castpoint.harness.runs.environment import version

NEEDED = ("torch", "triton", "numpy", "safetensors", "pandas", "matplotlib")
EXTRAS = {  # of pyproject.toml -> what is imported of it
    "models": ("transformers", "tokenizers", "accelerate", "gguf", "huggingface_hub", "psutil"),
    "studies": ("jax", "flax", "liger_kernel", "fla"),
    "gpu": ("pynvml",),
}


@dataclass(frozen=True)
class Check:
    ok: bool
    what: str
    cure: str = ""


def checks() -> Iterator[Check]:
    """Every check, in the order in which a newcomer would meet its problem."""
    python = platform.python_version()
    yield Check(sys.version_info >= (3, 11), f"Python {python}", "use Python 3.11 or newer: make PYTHON=python3.11")
    found = {name: version(name) for name in NEEDED}
    for name, what in found.items():
        yield Check(what is not None, f"package {name} {what or 'is missing'}", cure_of(name) or "")
    yield compiler()
    if found["torch"] and found["triton"]:
        yield interpreter()
    if found["triton"] and found["numpy"]:
        yield interpreter_with_numpy()


def cure_of(package: str) -> str | None:
    """How a package that is missing here is installed; None for one that is none of ours, whose lack is a bug."""
    extra = next((extra for extra, names in EXTRAS.items() if package in names), None)
    if extra:
        return f"pip install 'castpoint[{extra}]'"
    return "pip install castpoint, or `make` in a checkout" if package in (*NEEDED, "rich") else None


def compiler() -> Check:
    """Inductor compiles C++ for CPUs with $CXX, g++ or clang++."""
    name = next((c for c in (os.environ.get("CXX"), "g++", "clang++") if c and shutil.which(c)), None)
    cure = "install g++ (Debian: apt-get install g++) or set CXX"
    return Check(name is not None, f"C++ compiler for Inductor: {name or 'none'}", cure)


def interpreter_with_numpy() -> Check:
    """NumPy 2.4 makes no int of an array of one element, by which Triton 3.6's interpreter counts a loop's steps."""
    found = {name: importlib.metadata.version(name) for name in ("triton", "numpy")}
    triton, numpy = (tuple(map(int, text.split(".")[:2])) for text in found.values())
    return Check(
        triton >= (3, 7) or numpy < (2, 4),
        f"Triton {found['triton']} interprets under NumPy {found['numpy']}",
        "pip install 'numpy<2.4', or Triton 3.7 or newer",
    )


def interpreter() -> Check:
    """Triton decides at import whether kernels are interpreted; a variable set later changes nothing."""
    import torch
    import triton

    if not torch.cuda.is_available() and "castpoint.kernels.norm_qkv" not in sys.modules:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    from castpoint.kernels.norm_qkv import norm_qkv_kernel

    interpreted = not isinstance(norm_qkv_kernel, triton.JITFunction)
    wanted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    what = f"kernels are {'interpreted' if interpreted else 'compiled'}, TRITON_INTERPRET={int(wanted)}"
    if interpreted and torch.cuda.is_available():
        return Check(False, what + " although there is a GPU", "unset TRITON_INTERPRET")
    return Check(interpreted == wanted, what, "set TRITON_INTERPRET before the kernels are imported, not after")
