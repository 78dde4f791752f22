"""The kernels compiled ahead of time, for GPUs that are not there.

A launch specialises a kernel on its arguments: pointers and sizes divisible by 16, strides equal to 1. The same
is declared here (contiguous tensors), since loads are vectorised and pipelined only then: without it another
kernel would be compiled than the one that is launched.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.head_norm import BLOCK_M, head_norm_kernel
from kernels.norm_qkv import block_sizes, norm_qkv_kernel
from variants.catalogue import PLANS
from variants.plan import CastPlan

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MATRIX_INSTRUCTION = re.compile(r"\b((?:wgmma\.mma_async|tcgen05\.mma|mma\.sync)[.\w:]*|v_mfma_\w+)")


@dataclass(frozen=True)
class Compiled:
    """A kernel as one target runs it. registers and spills are None where the disassembler is missing."""

    kernel: str
    target: str
    asm: dict[str, str]  # text of each stage: ttir, ttgir, llir, and ptx or amdgcn
    binary: bytes  # cubin or hsaco
    shared: int  # bytes a block
    registers: int | None  # a thread
    spills: int | None  # bytes of local memory a thread; no kernel here has arrays, so all of it is spilled

    def matrix_instructions(self) -> list[str]:
        """Names of the matrix instructions in the PTX or the AMD assembly."""
        return sorted(set(MATRIX_INSTRUCTION.findall(self.asm.get("ptx") or self.asm["amdgcn"])))


def compile_norm_qkv(
    plan: CastPlan,
    target: str,
    *,
    head_norm: str = "fused",
    head_dim: int = 128,
    tokens: int = 64,
    bias: bool = False,
    residual: bool = False,
) -> Compiled:
    """The fused kernel of that plan, with the tiles of a launch.

    head_norm: `fused`, `later` (q and k are stored as proj) or `none`. Raises as compile_kernel does.
    """
    blocks = block_sizes(head_dim, plan.matmul, interpreted=False)
    options = {name: blocks.pop(name) for name in ("num_warps", "num_stages")}
    constants = {
        **{name.upper(): word for name, word in plan.choices().items()},
        **{"HQ": 16, "HKV": 8, "DH": head_dim, "HAS_RESIDUAL": residual, "HAS_BIAS": bias, "HEAD_NORM": head_norm},
        "INTERPRETED": False,
        **blocks,
    }
    qk = element(plan.proj if head_norm == "later" else plan.out)
    pointers = {"q_ptr": qk, "k_ptr": qk, "v_ptr": element(plan.out)}
    return compile_kernel(norm_qkv_kernel, target, constants, pointers, tokens, options)


def compile_head_norm(plan: CastPlan, target: str, *, head_dim: int = 128, tokens: int = 64) -> Compiled:
    """The head norm as a kernel of its own, over proj as that plan stores it. Raises as compile_kernel does."""
    names = {param.name for param in getattr(head_norm_kernel, "params", ())}
    constants = {name.upper(): word for name, word in plan.choices().items() if name.upper() in names}
    constants |= {"DH": head_dim, "BLOCK_M": BLOCK_M, "BLOCK_N": triton.next_power_of_2(head_dim)}
    pointers = {"proj_ptr": element(plan.proj), "out_ptr": element(plan.out)}
    return compile_kernel(head_norm_kernel, target, constants, pointers, tokens, {})


def compile_kernel(
    fn: Any, target: str, constants: dict[str, Any], pointers: dict[str, str], tokens: int, options: dict[str, int]
) -> Compiled:
    """fn for one of TARGETS, on contiguous tensors: bf16 where pointers names no other type.

    Raises RuntimeError where the kernels were imported interpreted, ValueError where constants are not the
    kernel's compile-time arguments, KeyError for an unknown target, and what Triton raises.
    """
    check_compilable(fn)
    wanted = {param.name for param in fn.params if param.is_constexpr}
    if wanted != set(constants):
        raise ValueError(f"compile-time arguments of {fn.__name__} differ: {sorted(wanted ^ set(constants))}")
    signature, attrs, constants = {}, {}, dict(constants)
    for index, name in enumerate(fn.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("stride_") and name.endswith("k"):  # x, residual and weights are contiguous along D
            signature[name], constants[name] = "constexpr", 1
        else:
            pointer = name.endswith("_ptr")
            signature[name] = f"*{pointers.get(name, 'bf16')}" if pointer else "fp32" if name == "eps" else "i32"
            if name != "eps" and (name != "T" or tokens % 16 == 0):
                attrs[(index,)] = [["tt.divisibility", 16]]
            if pointer and TARGETS[target].backend == "hip":  # tensors below 2 GiB, which take buffer loads
                attrs[(index,)].append(["tt.pointer_range", 32])
    source = ASTSource(fn, signature, constants, attrs)
    built = triton.compile(source, target=TARGETS[target], options={**options, "enable_fp_fusion": False})
    asm = {stage: text for stage, text in built.asm.items() if isinstance(text, str)}
    binary = next(built.asm[stage] for stage in ("cubin", "hsaco") if stage in built.asm)
    registers, spills = resources(asm, binary)
    return Compiled(fn.__name__, target, asm, binary, built.metadata.shared, registers, spills)


def check_compilable(fn: Any) -> None:
    """Raises RuntimeError where fn was imported interpreted."""
    if not isinstance(fn, triton.JITFunction):
        raise RuntimeError("kernels imported with TRITON_INTERPRET=1 cannot be compiled: unset it in a new process")


def element(storage: str) -> str:
    """Triton's type of the memory that holds values of that storage."""
    return "fp32" if storage == "fp32" else "bf16"


def resources(asm: dict[str, str], binary: bytes) -> tuple[int | None, int | None]:
    """Registers and bytes of spills a thread; (None, None) where cuobjdump is missing."""
    if "amdgcn" in asm:
        text, patterns = asm["amdgcn"], (r"\.vgpr_count:\s+(\d+)", r"\.private_segment_fixed_size:\s+(\d+)")
    else:
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if not tool.exists():
            return None, None
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary)
            file.flush()
            command = [tool, "--dump-resource-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        patterns = (r"\bREG:(\d+)", r"\b(?:STACK|LOCAL):(\d+)")
    registers, spills = ([int(n) for n in re.findall(pattern, text)] for pattern in patterns)
    return max(registers), sum(spills)


def cases() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(kernel, plan, keywords): both kernels of every plan, and a selection of the other tiles and inputs."""
    for name in PLANS:
        yield "norm_qkv", name, {}
        yield "head_norm", name, {}
    for name in ("hf", "fp32"):
        yield "norm_qkv", name, {"head_norm": "later"}
        yield "norm_qkv", name, {"tokens": 1}
    for name in ("hf", "deferred"):
        yield "norm_qkv", name, {"head_dim": 256, "residual": True}
    yield "norm_qkv", "hf", {"head_norm": "none", "head_dim": 64, "bias": True}
