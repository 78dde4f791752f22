"""The kernels compiled ahead of time, for GPUs that are not there.

A launch specialises a kernel on its arguments: pointers and sizes divisible by 16, strides equal to 1, pointers that
are None; not on what the kernel names in do_not_specialize (tokens and heads). The same is declared here (contiguous
tensors), since loads are vectorised and pipelined only then: without it another kernel would be compiled than the
one that is launched.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from castpoint.kernels.config import Config, candidates, default_config, unsupported
from castpoint.kernels.head_norm import BLOCK_M, head_norm_kernel
from castpoint.kernels.main_loop import matmul_kernel
from castpoint.kernels.norm_qkv import launch_constants, norm_qkv_kernel
from castpoint.kernels.plan import DEFAULT, RNE, CastPlan, words
from castpoint.kernels.quantised import check_config, check_words, quantised_kernel
from castpoint.kernels.rms_norm import rms_norm_kernel, row_blocks
from castpoint.kernels.split_k import TOGETHER, split_k_kernel, statistics_blocks
from castpoint.variants.catalogue import PLANS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory a block may ask for. CUDA C++ Programming Guide, Technical Specifications per Compute
# Capability; CDNA3 ISA reference guide, local data share.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
ROPE_POINTERS = ("positions_ptr", "cos_sin_ptr")
POINTERS = {"positions_ptr": "i64", "rstd_ptr": "fp32", "sums_ptr": "fp32", "squares_ptr": "fp32", "counter_ptr": "i32"}
POINTERS |= {"scale_ptr": "fp16", "word_ptr": "i16"}
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
    plan: CastPlan, target: str, *, head_norm: str = "fused", head_dim: int = 128, tokens: int = 64, bias: bool = False,
    residual: bool = False, rope: bool = False, cache: str = "fp32", config: Config | None = None,
) -> Compiled:  # fmt: skip
    """The fused or the split-K kernel of that plan, with the tiles of a launch; config None: default_config.

    head_norm: `fused`, `later` (q and k are stored as proj) or `none`. cache: `fp32` or `bf16`, of RoPE's table.
    tokens: for split-K, which has another binary for one. The kernel of a config's pre-pass is compile_rms_norm's.
    Raises ValueError for kernel='separate', which has no such kernel, and for a config that cannot express the plan;
    and as compile_kernel does.
    """
    config = config or default_config(head_dim, plan, interpreted=False)
    if why := unsupported(config, plan):
        raise ValueError(why)
    if config.kernel == "separate":
        parts = "compile_rms_norm and compile_head_norm are its parts"
        raise ValueError(f"kernel='separate' has no matmul of its own: {parts}")
    constants = launch_constants(plan, config, head_dim, interpreted=False)
    constants |= {"HEAD_NORM": head_norm, "PREPASS": config.prepass}
    has_rstd = config.prepass == "rstd" or config.prepass == "hidden" and plan.scale != "prologue"
    given = {"residual_ptr": residual and config.prepass != "hidden", "bias_ptr": bias, "rstd_ptr": has_rstd}
    given |= dict.fromkeys(("q_norm_ptr", "k_norm_ptr"), head_norm != "none") | dict.fromkeys(ROPE_POINTERS, rope)
    qk = element(plan.proj if head_norm == "later" else plan.out)
    pointers = {"q_ptr": qk, "k_ptr": qk, "v_ptr": element(plan.out), "cos_sin_ptr": cache}
    if config.kernel == "fused":
        return compile_kernel(norm_qkv_kernel, target, constants, given, pointers)
    constants |= {**statistics_blocks(tokens, config.block_m), "STAGES": config.num_stages, "TOGETHER": TOGETHER}
    return compile_kernel(split_k_kernel, target, constants, given, pointers)


def compile_quantised(
    plan: CastPlan, target: str, *, format: str = "q4_0", weight: str = RNE, head_dim: int = 128, rope: bool = False,
    config: Config | None = None,
) -> Compiled:  # fmt: skip
    """The kernel that reads W in blocks, with the tiles of a launch; config None: default_config. Raises ValueError
    for what the launcher refuses, and as compile_kernel does."""
    check_words(plan, format, weight)
    config = config or default_config(head_dim, plan, interpreted=False)
    check_config(config)
    constants = launch_constants(plan, config, head_dim, interpreted=False)
    constants |= {"FORMAT": format, "WEIGHT": weight, "HEAD_NORM": "fused"}
    given = {"residual_ptr": False, "bias_ptr": False} | dict.fromkeys(ROPE_POINTERS, rope)
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), element(plan.out)) | {"cos_sin_ptr": "fp32"}
    return compile_kernel(quantised_kernel, target, constants, given, pointers)


def compile_rms_norm(
    plan: CastPlan, target: str, *, stores: str = "hidden", hidden_size: int = 4096, residual: bool = False
) -> Compiled:
    """The norm of a pre-pass, or of kernel='separate'. stores: `rstd`, `hidden` or `both`."""
    given = {"residual_ptr": residual, "rstd_ptr": stores != "hidden", "hidden_ptr": stores != "rstd"}
    constants = {"PLAN": words(plan), **row_blocks(hidden_size, interpreted=False)}
    return compile_kernel(rms_norm_kernel, target, constants, given, {})


def compile_head_norm(
    plan: CastPlan, target: str, *, head_dim: int = 128, packed: bool = False, rope: bool = False, cache: str = "fp32",
    norm: bool = True,
) -> Compiled:  # fmt: skip
    """The head norm as a kernel of its own, over proj as that plan stores it; packed: q's and k's heads in one launch;
    without norm: RoPE alone.

    One binary serves every number of tokens. Raises as compile_kernel does.
    """
    constants = {"PLAN": words(plan), "DH": head_dim, "BLOCK_M": BLOCK_M, "BLOCK_N": triton.next_power_of_2(head_dim)}
    given = {"weight_ptr": norm, "k_weight_ptr": norm and packed, "k_out_ptr": packed}
    given |= dict.fromkeys(ROPE_POINTERS, rope)
    out = element(plan.out)
    pointers = {"proj_ptr": element(plan.proj), "out_ptr": out, "k_out_ptr": out, "cos_sin_ptr": cache}
    return compile_kernel(head_norm_kernel, target, constants, given, pointers)


def compile_matmul(target: str, *, config: Config, head_dim: int = 128) -> Compiled:
    """The fused kernel's main loop by itself, of no plan. Raises as compile_kernel does."""
    constants = launch_constants(DEFAULT, config, head_dim, interpreted=False)
    return compile_kernel(matmul_kernel, target, constants, {}, {})


def compile_kernel(
    fn: Any, target: str, constants: dict[str, Any], given: dict[str, bool], pointers: dict[str, str]
) -> Compiled:
    """fn for one of TARGETS, on contiguous tensors, specialised as a launch specialises it.

    constants: its compile-time arguments, num_warps and num_stages, as a launch takes them. given: which of its
    optional tensors there are. pointers: types other than those in POINTERS, and else bf16. Raises RuntimeError where
    the kernels were imported interpreted, ValueError where constants are not the kernel's compile-time arguments,
    KeyError for an unknown target, and what Triton raises.
    """
    check_compilable(fn)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    if differ := {param.name for param in fn.params if param.is_constexpr} ^ set(constants):
        raise ValueError(f"compile-time arguments of {fn.__name__} differ: {sorted(differ)}")
    constants |= dict.fromkeys(name for name, there in given.items() if not there)
    signature, attrs = {}, {}
    for index, param in enumerate(fn.params):
        name = param.name
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("stride_") and name.endswith("k"):  # x, residual and weights are contiguous along D
            signature[name], constants[name] = "constexpr", 1
        else:
            pointer = name.endswith("_ptr")
            element_type = (POINTERS | pointers).get(name, "bf16")
            signature[name] = f"*{element_type}" if pointer else "fp32" if name == "eps" else "i32"
            if name != "eps" and not param.do_not_specialize and not param.do_not_specialize_on_alignment:
                attrs[(index,)] = [["tt.divisibility", 16]]
            if pointer and TARGETS[target].backend == "hip":  # tensors below 2 GiB, which take buffer loads
                attrs.setdefault((index,), []).append(["tt.pointer_range", 32])
    source = ASTSource(fn, signature, constants, attrs)
    return compile_source(fn.__name__, target, source, {**options, "enable_fp_fusion": False})


def compile_source(kernel: str, target: str, source: ASTSource, options: dict[str, Any]) -> Compiled:
    """A specialised kernel, called by that name, for one of TARGETS. Raises what Triton raises."""
    built = triton.compile(source, target=TARGETS[target], options=options)
    asm = {stage: text for stage, text in built.asm.items() if isinstance(text, str)}
    binary = next(built.asm[stage] for stage in ("cubin", "hsaco") if stage in built.asm)
    return Compiled(kernel, target, asm, binary, built.metadata.shared, *resources(asm, binary))


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


def binaries(target: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(kernel of COMPILERS, plan, keywords): fused kernel and head norm of every plan, a selection of other tiles and
    inputs, and of the kernels that configs ask for; split-K where a launch is not refused."""

    def each(kernel: str, *plans: str, **keywords: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
        return ((kernel, name, keywords) for name in plans)

    some = ("hf", "deferred", "folded", "truncating", "bf16-statistics", "gemma")
    yield from each("norm_qkv", *PLANS)
    yield from each("head_norm", *PLANS)
    yield from each("norm_qkv", "hf", "fp32", head_norm="later")
    yield from each("norm_qkv", "hf", "deferred", head_dim=256, residual=True)
    yield from each("norm_qkv", "hf", head_norm="none", head_dim=64, bias=True)
    yield from each("rms_norm", *some, "fp32-tf32x3", stores="rstd")
    yield from each("rms_norm", "hf", "truncating", "bf16-statistics", "gemma", stores="hidden", residual=True)
    yield from each("rms_norm", "deferred", "folded", stores="both", residual=True)
    yield from each("norm_qkv", "hf", "gemma", config=Config("fused", "rstd", 64, 64, 4, 3))
    yield from each("norm_qkv", "folded", config=Config("fused", "rstd", 64, 32, 4, 3), residual=True)
    yield from each("norm_qkv", "hf", "deferred", config=Config("fused", "hidden", 128, 64, 8, 3))
    yield from each("norm_qkv", "fp32-tf32x3", config=Config("fused", "rstd", 32, 32, 4, 2))
    yield from each("norm_qkv", "hf", "one-rounding", "truncating", "fp32", rope=True)
    yield from each("norm_qkv", "hf", rope=True, head_norm="none", head_dim=64, bias=True)
    yield from each("norm_qkv", "deferred", rope=True, head_dim=256)
    yield from each("norm_qkv", "hf", rope=True, config=Config("fused", "hidden", 128, 64, 8, 3))
    yield from each("head_norm", "hf", "one-rounding", "truncating", "fp32", rope=True, packed=True)
    yield from each("head_norm", "hf", "bf16-statistics", "gemma", packed=True)
    for format in ("q4_0", "q8_0"):
        yield from each("quantised", "hf", "deferred", "fp32-tf32x3", format=format)
        yield from each("quantised", "truncating", format=format, weight="bf16-rtz")
        yield from each("quantised", "fp32", format=format, weight="fp32")
        yield from each("quantised", "hf", format=format, config=Config("fused", "none", 16, 128, 4, 3))
    yield from each("quantised", "hf", format="q4_0", rope=True)
    if TARGETS[target].backend == "hip":
        return
    one, many = Config("split-k", "none", 16, 128, 8, 4), Config("split-k", "none", 64, 64, 8, 4)
    yield from each("norm_qkv", *some, config=one, tokens=1)
    yield from each("norm_qkv", "hf", rope=True, config=one, tokens=1)
    yield from each("norm_qkv", "deferred", config=many, residual=True)
    yield from each("norm_qkv", "hf", config=many, head_norm="later", bias=True)
    yield from each("norm_qkv", "hf", config=Config("split-k", "rstd", 16, 128, 8, 3))
    yield from each("norm_qkv", "deferred", config=Config("split-k", "hidden", 16, 128, 8, 3))
    yield from each("norm_qkv", "fp32-tf32x3", config=Config("split-k", "none", 32, 32, 4, 2))


COMPILERS = {"norm_qkv": compile_norm_qkv, "rms_norm": compile_rms_norm, "head_norm": compile_head_norm}
COMPILERS["quantised"] = compile_quantised


def config_binaries(targets: Iterable[str] = tuple(TARGETS)) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(kernel of COMPILERS or `matmul`, plan, target, keywords): each binary that the candidates need, once.

    keywords hold the config of norm_qkv, as one of a single share: the number of shares makes no other binary. Its main
    loop by itself, `matmul`, comes with the plan hf alone, whose words it does not read.
    """
    needed: dict[tuple[Config, bool], int] = {}  # and whether of one token: a number of tokens
    for tokens in (1, 16, 64, 256):
        for config in candidates(tokens, 4096, 32, 128):
            needed.setdefault((dataclasses.replace(config, splits=1), tokens == 1), tokens)
    for target, name in itertools.product(targets, ("hf", "deferred")):
        for (config, _), tokens in needed.items():
            if config.kernel == "separate" or unsupported(config, PLANS[name].plan):
                continue
            asked = {"config": config, "head_dim": 128, "tokens": tokens}
            yield "norm_qkv", name, target, asked
            if name == "hf":  # which rounds at each of RoPE's boundaries
                yield "norm_qkv", name, target, asked | {"rope": True}
            if name == "hf" and (config.kernel, config.prepass) == ("fused", "hidden"):
                yield "matmul", name, target, {"config": config, "head_dim": 128}
        for stores in ("rstd", "hidden", "both"):
            yield "rms_norm", name, target, {"stores": stores}
        yield "head_norm", name, target, {"head_dim": 128, "packed": True}
