"""Public implementations in single files of LMDeploy, LightLLM, FlagGems, xFormers and Unsloth, read and launched as
those of engines are."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from castpoint.harness.peers.files_of_wheels import load_file, module_of, of_rows, row_of_file
from castpoint.harness.peers.packages import load_function
from castpoint.harness.peers.running import EAGER, TRITON, Implementation, Norm, bound_once, by_triton

ONE, OFFSET = "one-rounding", "gemma"


def library_rows() -> list[Implementation]:
    """In the order of a table."""
    default, kernel = "lmdeploy/pytorch/backends/default/norm.py", "lmdeploy/pytorch/kernels/cuda/rms_norm.py"
    gems, unsloth = "flag_gems/ops/rms_norm.py", "unsloth/kernels/rms_layernorm.py"
    gems_add, gemma = "flag_gems/fused/fused_add_rms_norm.py", partial(unsloth_norm, "_gemma_rms_layernorm_forward")
    former, light = "xformers/ops/_triton/rmsnorm_kernels.py", "lightllm/models/llama/triton_kernel/rmsnorm.py"
    return [
        row_of_file("LMDeploy DefaultRMSNormImpl", EAGER, lmdeploy_default, f"{ONE}, x=bf16-rne", default),
        row_of_file("LMDeploy rms_norm", TRITON, lmdeploy_kernel, f"{ONE}, x=bf16-rne", kernel),
        # its output, empty_like(x), has other strides than the view of x by which it is written
        row_of_file("LightLLM rmsnorm_forward", TRITON, lightllm, "error: beyond", light),
        row_of_file("LightLLM rmsnorm_forward, contiguous x", TRITON, partial(lightllm, True), ONE, light),
        Implementation("FlagGems rms_norm", "flag-gems", "rmsnorm", TRITON, flag_gems, ONE, gems),
        row_of_file("FlagGems fused_add_rms_norm", TRITON, flag_gems_add, f"{ONE}, x=fp32", gems_add),
        row_of_file("FlagGems rmsnorm, experimental", TRITON, flag_gems_experimental, ONE,
             "flag_gems/experimental_ops/rmsnorm.py"),
        row_of_file("xFormers rms_norm", TRITON, xformers, ONE, former),
        # takes the mean of the sum in fp32, and normalises the sum that it stored in bf16
        row_of_file("xFormers rms_norm_add", TRITON, xformers_add, "none", former),
        row_of_file("Unsloth rms_layernorm", TRITON, partial(unsloth_norm, "_rms_layernorm_forward"), "hf", unsloth),
        row_of_file("Unsloth rms_layernorm, Gemma", TRITON, gemma, OFFSET, unsloth),
    ]  # fmt: skip


def lmdeploy_default() -> Norm:
    implementation = load_file("lmdeploy", "lmdeploy/pytorch/backends/default/norm.py").DefaultRMSNormImpl

    def norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Any:
        return implementation(x.shape[-1], eps).forward(x, weight, residual)

    return norm


def lmdeploy_kernel() -> Norm:
    """As on a GPU of 132 multiprocessors, each with 64 warps and 32 blocks."""
    limits = {"multi_processor_count": 132, "warps_per_sm": 64, "blocks_per_sm": 32}
    utils = module_of("lmdeploy.pytorch.kernels.cuda.utils", get_device_props=lambda index: limits)
    rms_norm = load_file("lmdeploy", "lmdeploy/pytorch/kernels/cuda/rms_norm.py", utils).rms_norm

    def norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Any:
        return rms_norm(x, weight, eps, residual)

    return norm


def lightllm(contiguous: bool = False) -> Norm:
    forward = load_file("lightllm", "lightllm/models/llama/triton_kernel/rmsnorm.py").rmsnorm_forward
    return lambda x, weight, eps: forward(x.contiguous() if contiguous else x, weight, eps)


FLAG_GEMS = module_of("flag_gems.utils", libentry=lambda: lambda kernel: kernel, triton_lang_extension=tl)


def flag_gems(device: str) -> Norm:
    """By the package itself on a GPU, without which it cannot be imported."""
    if device == "cuda":
        return by_triton("FlagGems rms_norm", lambda: bound_once(load_function("flag_gems")), device)
    return by_triton("FlagGems rms_norm", flag_gems_kernel, device)


def flag_gems_kernel() -> Norm:
    kernel = load_file("flag-gems", "flag_gems/ops/rms_norm.py", FLAG_GEMS).rms_norm_kernel

    def launch(x: Tensor, weight: Tensor, y: Tensor, eps: float, rows: int, width: int, block: int) -> None:
        rstd = x.new_empty(rows, dtype=torch.float32)
        kernel[(rows,)](y, rstd, x, weight, width, 1, width, 1, width, eps, block)

    return of_rows(launch)


def flag_gems_add() -> Norm:
    kernel = load_file("flag-gems", "flag_gems/fused/fused_add_rms_norm.py", FLAG_GEMS).fused_add_rms_norm_kernel

    def norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
        x, residual, width = x.clone(), residual.clone(), x.shape[-1]  # its launcher writes into both where they lie
        block = triton.next_power_of_2(width)
        kernel[(len(x),)](x, residual, weight, width, 1, width, 1, width, eps, block)
        return x, residual

    return norm


def flag_gems_experimental() -> Norm:
    kernel = load_file("flag-gems", "flag_gems/experimental_ops/rmsnorm.py").rmsnorm_kernel

    def launch(x: Tensor, weight: Tensor, y: Tensor, eps: float, rows: int, width: int, block: int) -> None:
        block = min(4096, max(128, block))
        kernel[(rows,)](x, weight, y, rows, width, eps, BLOCK_SIZE=block, num_warps=4 if block <= 1024 else 8)

    return of_rows(launch)


def _xformers_file() -> ModuleType:
    importing = module_of("xformers.triton.importing", libdevice_find=lambda name: getattr(libdevice, name))
    return load_file("xformers", "xformers/ops/_triton/rmsnorm_kernels.py", importing)


def xformers() -> Norm:
    kernel = _xformers_file()._rms_norm_kernel

    def launch(x: Tensor, weight: Tensor, y: Tensor, eps: float, rows: int, width: int, block: int) -> None:
        block = min(max(block, 128), 8192)
        kernel[(rows,)](x, y, weight, eps, width, width, block, True, num_warps=min(max(block // 256, 1), 8))

    return of_rows(launch)


def xformers_add() -> Norm:
    kernel = _xformers_file()._rms_norm_add_kernel

    def norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
        total, residual, y = x.clone(), residual.contiguous(), torch.empty_like(x)
        width, block = x.shape[-1], min(max(triton.next_power_of_2(x.shape[-1]), 128), 8192)
        warps = min(max(block // 256, 1), 8)
        kernel[(len(x),)](total, residual, y, weight, eps, width, width, block, True, num_warps=warps)
        return y, total

    return norm


def unsloth_norm(name: str) -> Norm:
    kernel = getattr(load_file("unsloth", "unsloth/kernels/rms_layernorm.py"), name)

    def launch(x: Tensor, weight: Tensor, y: Tensor, eps: float, rows: int, width: int, block: int) -> None:
        rstd = x.new_empty(rows, dtype=torch.float32)
        warps = 32 if block >= 32768 else 16 if block >= 8192 else 8 if block >= 2048 else 4
        kernel[(rows,)](y, x, weight, rstd, width, width, 1, 1, width, eps, False, block, num_warps=warps)

    return of_rows(launch)
