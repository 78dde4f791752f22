"""Public implementations in single files of vLLM and SGLang, read from where these are installed, without what they
import (files_of_wheels).

A kernel whose own launcher asks for a CUDA tensor or for its package is launched here, with the grid, block and warps
that it has there. What its launcher does besides (views, checks) is not part of the row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.func import functional_call

from castpoint.harness.peers.files_of_wheels import load_file, module_of, of_rows, row_of_file
from castpoint.harness.peers.running import EAGER, TRITON, Implementation, Norm

Make = Callable[[], Norm]
ONE, OFFSET = "one-rounding", "gemma"
LAYERS, DIFFUSION, NORMS = "vllm/model_executor", "sglang/kernels/ops/diffusion/norm", "sglang/kernels/ops/layernorm"


def engine_rows() -> list[Implementation]:
    """In the order of a table."""
    return [*_vllm(), *_sglang()]


def _vllm() -> list[Implementation]:
    ops, layers = "vllm/ir/ops/layernorm.py", f"{LAYERS}/layers/layernorm.py"
    agnostic, invariant = f"{LAYERS}/hw_agnostic/layers/layernorm.py", f"{LAYERS}/determinism/batch_invariant.py"
    gated = f"{LAYERS}/layers/mamba/ops/layernorm_gated.py"
    plain = partial(vllm_module, layers, "LayerNorm", bias=False)
    return [
        row_of_file("vLLM ir rms_norm", EAGER, vllm_rms_norm, "hf", ops),
        row_of_file("vLLM ir fused_add_rms_norm", EAGER, vllm_fused_add, "hf, x=fp32", ops),
        row_of_file(
            "vLLM GemmaRMSNorm", EAGER, partial(vllm_module, layers, "GemmaRMSNorm"), f"{OFFSET}, x=fp32", layers
        ),
        row_of_file("vLLM LayerNorm", EAGER, plain, "none: LayerNorm", layers),
        row_of_file("vLLM RMSNormGated, no gate", EAGER, vllm_gated, ONE, layers),
        row_of_file(
            "vLLM RMSNorm, hw_agnostic", EAGER, partial(vllm_module, agnostic, "RMSNorm"), "hf, x=fp32", agnostic
        ),
        row_of_file("vLLM rms_norm_batch_invariant", TRITON, vllm_batch_invariant, ONE, invariant),
        row_of_file("vLLM Mamba rms_norm_gated, no gate", TRITON, vllm_mamba, ONE, gated),
    ]


def _sglang() -> list[Implementation]:
    layers, minimax = "sglang/srt/layers/layernorm.py", f"{NORMS}/minimax_m3_rmsnorm.py"
    invariant = "sglang/srt/batch_invariant_ops/batch_invariant_ops.py"
    first = {"cast_x_before_out_mul": True}
    own, minimax_add = partial(sglang_module, layers), partial(sglang_minimax, "gemma_fused_add_rmsnorm")
    return [
        row_of_file("SGLang RMSNorm", EAGER, partial(own, "RMSNorm"), f"{ONE}, x=fp32", layers),
        row_of_file("SGLang RMSNorm, cast first", EAGER, partial(own, "RMSNorm", **first), "hf, x=fp32", layers),
        row_of_file("SGLang GemmaRMSNorm", EAGER, partial(own, "GemmaRMSNorm"), f"{OFFSET}, x=bf16-rne", layers),
        row_of_file("SGLang Gemma3RMSNorm", EAGER, partial(own, "Gemma3RMSNorm"), f"{OFFSET}, x=bf16-rne", layers),
        row_of_file("SGLang Gemma4RMSNorm", EAGER, partial(own, "Gemma4RMSNorm"), ONE, layers),
        row_of_file("SGLang rmsnorm_fp32", TRITON, sglang_fp32, ONE, f"{NORMS}/rmsnorm_fp32.py"),
        # its launcher passes no stride and does not ask for contiguous rows
        row_of_file("SGLang fused_rmsnorm", TRITON, sglang_fused, "none: contiguous", f"{NORMS}/fused_rmsnorm.py"),
        row_of_file("SGLang fused_rmsnorm, contiguous x", TRITON, partial(sglang_fused, True), f"{ONE}, root=sqrt",
             f"{NORMS}/fused_rmsnorm.py"),
        row_of_file("SGLang MiniMax gemma_rmsnorm", TRITON, partial(sglang_minimax, "gemma_rmsnorm"), OFFSET, minimax),
        row_of_file("SGLang MiniMax gemma_fused_add_rmsnorm", TRITON, minimax_add, f"{OFFSET}, x=fp32", minimax),
        row_of_file("SGLang rms_norm, batch invariant", TRITON, sglang_invariant, ONE, invariant),
        row_of_file("SGLang one-pass rms_norm", TRITON, sglang_onepass, ONE, f"{DIFFUSION}/rmsnorm_onepass_triton.py"),
        # tl.sum of bf16 squares adds in bf16 (add.bf16), in an order of its own
        row_of_file("SGLang rmsnorm_scale, bf16-native", TRITON, sglang_bf16, "none",
             f"{DIFFUSION}/native_bf16_rmsnorm_triton.py"),
        # which adds them in fp32
        row_of_file("SGLang Z-Image qk_rmsnorm", TRITON, sglang_zimage, "bf16-statistics, eps=bf16 sum",
             f"{DIFFUSION}/zimage_qk_rmsnorm_triton.py", "head_norm"),
    ]  # fmt: skip


# ---------------------------------------------------------------- vLLM

TRITON_UTILS = module_of("vllm.triton_utils", tl=tl, triton=triton)


def _registered(fn: Any = None, **options: Any) -> Any:
    """In place of vLLM's register_op: the function itself."""
    if fn is None:
        return _registered
    fn.register_input_generator = lambda other: other
    fn.override_tolerance = lambda *_, **__: None
    fn.maybe_inplace = fn
    return fn


OP = module_of("vllm.ir.op", register_op=_registered)


def vllm_ops() -> ModuleType:
    return load_file("vllm", "vllm/ir/ops/layernorm.py", OP)


def vllm_rms_norm() -> Norm:
    rms_norm = vllm_ops().rms_norm
    return lambda x, weight, eps: rms_norm(x, weight, eps)


def vllm_fused_add() -> Norm:
    add = vllm_ops().fused_add_rms_norm
    return lambda x, weight, eps, residual: add(x, residual, weight, eps)


def vllm_layers(path: str) -> ModuleType:
    return load_file("vllm", path, _vllm_ir())


@functools.cache
def _vllm_ir() -> ModuleType:
    return module_of("vllm", ir=module_of("vllm.ir", ops=vllm_ops()), envs=None, __path__=[])


def vllm_module(path: str, name: str, **options: Any) -> Norm:
    return _native(getattr(vllm_layers(path), name), **options)


def vllm_gated() -> Norm:
    forward = vllm_layers(f"{LAYERS}/layers/layernorm.py").RMSNormGated.forward_static
    return lambda x, weight, eps: forward(x, None, weight, eps, x.dtype)


def vllm_batch_invariant() -> Norm:
    return load_file("vllm", f"{LAYERS}/determinism/batch_invariant.py", TRITON_UTILS).rms_norm_batch_invariant


def vllm_mamba() -> Norm:
    file = load_file("vllm", f"{LAYERS}/layers/mamba/ops/layernorm_gated.py", TRITON_UTILS)
    kernel = file._layer_norm_fwd_1pass_kernel

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        (rows, width), y = x.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rstd, block = x.new_empty(rows, dtype=torch.float32), triton.next_power_of_2(width)
        kernel[(rows, 1)](
            x, y, weight, None, None, None, rstd, x.stride(0), y.stride(0), 0, rows, width, eps, BLOCK_N=block,
            NORM_BEFORE_GATE=True, IS_RMS_NORM=True, num_warps=min(max(block // 256, 1), 8),
        )  # fmt: skip
        return y

    return norm


def _native(module_class: type[nn.Module], **options: Any) -> Norm:
    """forward_native of a module class, with a residual where it takes one."""

    def call(x: Tensor, weight: Tensor, eps: float, *residual: Tensor) -> Any:
        module = module_class(x.shape[-1], eps=eps, **options)
        module.forward = module.forward_native  # type: ignore[method-assign]
        return functional_call(module, {"weight": weight}, (x, *residual))

    def adds(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Any:
        return call(x, weight, eps, *([] if residual is None else [residual]))

    def alone(x: Tensor, weight: Tensor, eps: float) -> Any:
        return call(x, weight, eps)

    return adds if "residual" in module_class.forward_native.__code__.co_varnames else alone  # type: ignore[attr-defined]


# ---------------------------------------------------------------- SGLang


def sglang_module(path: str, name: str, **options: Any) -> Norm:
    return _native(getattr(load_file("sglang", path), name), **options)


def sglang_fp32() -> Norm:
    kernel = load_file("sglang", f"{NORMS}/rmsnorm_fp32.py")._rmsnorm_fp32_kernel
    return of_rows(lambda x, weight, y, eps, rows, width, block: kernel[(rows,)](
        x, weight, y, width, eps, block, num_warps=4, enable_fp_fusion=False))  # fmt: skip


def sglang_fused(contiguous: bool = False) -> Norm:
    norm = load_file("sglang", f"{NORMS}/fused_rmsnorm.py").fused_rmsnorm
    return lambda x, weight, eps: norm(x.contiguous() if contiguous else x, weight, eps)


def sglang_minimax(name: str) -> Norm:
    norm = getattr(load_file("sglang", f"{NORMS}/minimax_m3_rmsnorm.py"), name)
    if "add" not in name:
        return norm
    return lambda x, weight, eps, residual: norm(x, residual, weight, eps)


def sglang_invariant() -> Norm:
    return load_file("sglang", "sglang/srt/batch_invariant_ops/batch_invariant_ops.py").rms_norm


def sglang_onepass() -> Norm:
    kernel = load_file("sglang", f"{DIFFUSION}/rmsnorm_onepass_triton.py")._rms_norm_tiled_onepass

    def launch(x: Tensor, weight: Tensor, y: Tensor, eps: float, rows: int, width: int, block: int) -> None:
        at_once = min(16, triton.next_power_of_2(max(1, rows // 512)))
        kernel[(triton.cdiv(rows, at_once),)](
            y, x, weight, rows, width, eps, BLOCK_SIZE_DIM=block, BLOCK_SIZE_SEQ=at_once
        )

    return of_rows(launch)


def sglang_bf16() -> Norm:
    """Times a scale, which is one here."""
    kernel = load_file("sglang", f"{DIFFUSION}/native_bf16_rmsnorm_triton.py")._rmsnorm_scale_kernel

    def launch(x: Tensor, weight: Tensor, y: Tensor, eps: float, rows: int, width: int, block: int) -> None:
        kernel[(rows,)](y, x, weight, torch.ones_like(x), width, width, 1, width, eps, block_dim=block, num_warps=8)

    return of_rows(launch)


def sglang_zimage() -> Norm:
    kernel = load_file("sglang", f"{DIFFUSION}/zimage_qk_rmsnorm_triton.py")._qk_rmsnorm_native_kernel

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        tokens, heads, width = x.shape
        if width != 128:
            raise ValueError("heads must have 128 channels")
        x, count, at_once = x.contiguous(), tokens * heads, 8
        y = torch.empty_like(x)
        kernel[(triton.cdiv(count, at_once),)](
            y, x, weight, heads * width, heads, count, width, eps, at_once, num_warps=8
        )
        return y

    return norm
