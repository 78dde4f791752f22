"""What the tests of the audit share: kernels of this process may be interpreted, so what compiles runs in its own."""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from forks import rows_of_fork

from castpoint.harness.audit.kernels import audit_case, audit_compiled
from castpoint.harness.compiled import compile as compiling
from castpoint.harness.compiled.compile import Compiled
from castpoint.variants.catalogue import PLANS

ROOT = Path(__file__).parents[2]  # as in support.py, whose imports would cost each process 1.5 s


def in_process(function: Callable[..., Iterator[dict]], *args: str, cache: Path, **env: str) -> list[dict]:
    """Rows that a function of a test module yields in a process whose kernels compile, in an empty folder. What it
    compiles is kept for all tests of a run: Triton knows a kernel by its text, its arguments and its options."""
    return rows_of_fork(function, *args, folder=cache, **env)


# ---------------------------------------------------------------- planted faults

ADDEND = r"(add\.s32 +\t%r\d+, %r\d+, )"


def replace_one(pattern: str, new: str, which: int = 0) -> Callable[[str], str]:
    """The text with one match of the pattern replaced."""

    def change(text: str) -> str:
        match = list(re.finditer(pattern, text, re.M))[which]
        return text[: match.start()] + match.expand(new) + text[match.end() :]

    return change


def other_addend(which: int = 0) -> Callable[[str], str]:
    """PTX in which one rounding to nearest adds half an ulp of bf16 instead of a bit less."""
    return replace_one(ADDEND + "32767;", r"\g<1>32768;", which)


NVIDIA, AMD = "sm_90", "gfx942"


def changed(fault: str, right: Compiled, change: Callable[[str], str], keywords: dict) -> dict:
    """The row of a right kernel of the plan `hf` with its machine code changed."""
    stage = "ptx" if "ptx" in right.asm else "amdgcn"
    asm = right.asm | {stage: change(right.asm[stage])}
    return {"fault": fault, **audit_compiled(dataclasses.replace(right, asm=asm), PLANS["hf"].plan, keywords)}


@dataclasses.dataclass(frozen=True)
class Planted:
    """A change of the kernels' source, and a pattern of what the audit must say about it."""

    file: str
    old: str
    new: str
    plan: str
    says: str
    kernel: str = "head_norm"
    keywords: dict = dataclasses.field(default_factory=dict)
    count: int = 1  # how often the old text stands in the file
    also: tuple[str, str] = ("", "")  # a second change of the same file


QKV, HEAD, ROUNDING = "chain.py", "head_norm.py", "rounding.py"
RMS, FUSED, SPLIT = "rms_norm.py", "norm_qkv.py", "split_k.py"


def lost(role: str, to: str) -> str:
    return rf"TTIR: {role} is not rounded on its way to {to}, the plan says bf16-rne"


def instead(role: str, kind: str, to: str, due: str = "bf16-rne") -> str:
    return rf"TTIR: {role} is rounded {kind} on its way to {to}, the plan says {due}"


def kept(role: str, to: str) -> str:
    return rf"TTIR: {role} is rounded \(bf16-rne\) on its way to {to}, the plan keeps it"


def planted(target: str, faults: dict[str, Planted]) -> Iterator[dict]:
    """Each of these faults in a copy of the kernels, audited; first an unchanged copy."""
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, folder)
        for index, (name, fault) in enumerate([("unchanged", None), *faults.items()]):
            package = Path(folder) / f"planted_{index}"
            package.mkdir()
            for source in (ROOT / "kernels").glob("*.py"):
                text = source.read_text()
                if fault and source.name == fault.file:
                    assert text.count(fault.old) == fault.count, f"{fault.old!r} stands {text.count(fault.old)} times"
                    text = text.replace(*fault.also).replace(fault.old, fault.new)
                (package / source.name).write_text(text)
            for module in ("norm_qkv", "split_k", "rms_norm", "head_norm"):
                kernel = f"{module}_kernel"
                setattr(compiling, kernel, getattr(importlib.import_module(f"{package.name}.{module}"), kernel))
            case = (fault.kernel, fault.plan, fault.keywords) if fault else ("norm_qkv", "hf", {})
            yield {"fault": name, **audit_case(target, *case)}
