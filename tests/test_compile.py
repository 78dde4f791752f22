"""Every kernel of the catalogue compiles for every target, fits it and multiplies on its matrix units. Needs no GPU.

The kernels of this process may be interpreted, so each target compiles in a process of its own.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness.aot import TARGETS, cases
from variants.catalogue import PLANS

ROOT = Path(__file__).parent.parent
# Bytes of shared memory a block may ask for. CUDA C++ Programming Guide, Technical Specifications per Compute
# Capability; CDNA3 ISA reference guide, local data share.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# Bytes of registers a thread may spill with bf16 operands: eight, not an accumulator.
SPILLS = 32
# The matrix instruction that a target has for those operands; fp32 products are not exact on NVIDIA's.
WARP_BF16, WARP_TF32 = r"mma\.sync\..*\.bf16\.bf16\.f32", r"mma\.sync\..*\.tf32\.tf32\.f32"
WIDE_BF16 = {"sm_80": WARP_BF16, "sm_90": r"wgmma\..*\.bf16\.bf16", "sm_100": r"tcgen05\.mma\..*kind::f16"}
MFMA = {"bf16": r"v_mfma_f32_\w+_bf16", "tf32": r"v_mfma_f32_\w+_xf32", "fp32": r"v_mfma_f32_\d+x\d+x\d+_f32"}


def matrix_instruction(target: str, matmul: str) -> str | None:
    """Pattern of the only matrix instruction allowed there; None: no matrix instruction at all.

    The same for one token as for many: another instruction would sum otherwise, and bits would change with the batch.
    """
    operand = "tf32" if matmul == "tf32x3" else matmul
    if target == "gfx942":
        return MFMA[operand]
    if operand == "bf16":
        return WIDE_BF16[target]
    return WARP_TF32 if operand == "tf32" else None


def compile_all(target: str, cache: Path, **env: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "harness.aot", target],
        env={**kept, "TRITON_CACHE_DIR": str(cache), **env},  # an empty cache: nothing was compiled before
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(target, tmp_path):
    run = compile_all(target, tmp_path)
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    wanted = [{"target": target, "kernel": kernel, "plan": name, **keywords} for kernel, name, keywords in cases()]
    assert run.returncode == 0 and len(rows) == len(wanted), run.stderr[-2000:]
    assert {(row["kernel"], row["plan"]) for row in rows} >= {(k, p) for k in ("norm_qkv", "head_norm") for p in PLANS}

    faults = []
    for row, case in zip(rows, wanted, strict=True):
        assert row.items() >= case.items()
        faults += [f"{case}: {fault}" for fault in faults_of(row)]
    assert not faults, "\n".join(faults)


def faults_of(row: dict) -> list[str]:
    """What is wrong with a compiled kernel, one sentence each."""
    if "error" in row:
        return [row["error"]]
    faults, target, matmul = [], row["target"], PLANS[row["plan"]].plan.matmul
    if row["shared"] > SHARED[target]:
        faults.append(f"{row['shared']} bytes of shared memory, {target} has {SHARED[target]}")
    if row["spills"] is not None and row["spills"] > SPILLS and (matmul == "bf16" or row["kernel"] == "head_norm"):
        faults.append(f"{row['spills']} bytes of registers spilled, at most {SPILLS} are allowed")
    pattern = None
    if row["kernel"] == "norm_qkv":
        pattern = matrix_instruction(target, matmul)
    found = row["matrix"]
    if pattern is None and found or pattern and not (found and all(re.fullmatch(f"{pattern}.*", i) for i in found)):
        faults.append(f"matrix instructions {found} where {pattern} is due")
    return faults


def test_interpreted_kernels_are_refused(tmp_path):
    run = compile_all("sm_90", tmp_path, TRITON_INTERPRET="1")
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.strip().splitlines() == [
        "error: kernels imported with TRITON_INTERPRET=1 cannot be compiled: unset it in a new process"
    ]
