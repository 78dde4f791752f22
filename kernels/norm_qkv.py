"""RMSNorm -> QKV projection -> Q and K head norm (-> RoPE) in one kernel, one head per tile of N.

    rstd   = (mean(x^2) + eps)^-1/2
    hidden = x * rstd * w_in                    `prologue`
             x * w_in                           `epilogue` (deferred: rstd moves behind the matmul)
             x                                  `folded`   (w_in was folded into W ahead of time as well)
    proj   = hidden @ W^T (* rstd) (+ bias)
    q, k   = proj * (mean(proj^2) + eps)^-1/2 * w_head        v = proj        (and RoPE, see head_norm.py)

rstd commutes with the matmul because it is one number a token (FlashNorm, arXiv 2407.09577); the roundings
do not commute, and so the three are three numerical functions.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chain import finish_head, multiply, row_rstd, row_squares
from .checks import check_inputs, check_no_grad, check_outputs, check_plain, check_plan, check_tensor
from .config import Config, check_config_type, head_block, unsupported
from .dispatch import launch_config
from .head_norm import check_device, launch_head_norm, output_tensor
from .plan import DEFAULT, RNE, CastPlan, words
from .rms_norm import launch_rms_norm
from .separate import launch_separate
from .split_k import launch_split_k


# One binary for all models of a head size, and for every slice of a batch's positions.
@triton.jit(do_not_specialize=["T", "HQ", "HKV"], do_not_specialize_on_alignment=["positions_ptr"])
def norm_qkv_kernel(
    x_ptr,  # [T, D] bf16
    residual_ptr,  # [T, D] bf16, or None
    norm_weight_ptr,  # [D] bf16
    qkv_weight_ptr,  # [H * DH, D] bf16, rows q, k, v
    bias_ptr,  # [H * DH] bf16, or None
    q_norm_ptr,  # [DH] bf16, or None
    k_norm_ptr,  # [DH] bf16, or None
    positions_ptr,  # [T] int64, or None
    cos_sin_ptr,  # [positions, DH] fp32 or bf16, cos in the first half of a row; None: no RoPE
    rstd_ptr,  # [T] fp32, or None
    q_ptr,  # [T, HQ, DH] bf16 or fp32
    k_ptr,  # [T, HKV, DH] bf16 or fp32
    v_ptr,  # [T, HKV, DH] bf16 or fp32
    T, D, HQ, HKV, eps, stride_xm, stride_xk, stride_rm, stride_rk, stride_wn, stride_wk,
    stride_qm, stride_qh, stride_km, stride_kh, stride_vm, stride_vh,
    PLAN: tl.constexpr,  # Words of a CastPlan
    DH: tl.constexpr, HEAD_NORM: tl.constexpr, PREPASS: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,  # power of two >= DH
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    head = tl.program_id(1).to(tl.int64)
    rstd = tl.zeros([BLOCK_M], dtype=tl.float32)
    if PREPASS != "none":
        if rstd_ptr is not None:
            rstd = tl.load(rstd_ptr + offs_m, mask=offs_m < T, other=0.0)
    elif PLAN.scale == "prologue":  # hidden needs rstd, so the rows are read twice
        sum_of_squares = row_squares(
            x_ptr, residual_ptr, offs_m, T, D, stride_xm, stride_xk, stride_rm, stride_rk, PLAN, BLOCK_M, BLOCK_K, None
        )
        rstd = row_rstd(sum_of_squares, D, eps, PLAN)

    acc, sum_of_squares = multiply(
        x_ptr, residual_ptr, norm_weight_ptr, qkv_weight_ptr, rstd, offs_m, head, 0, D, T, D,
        stride_xm, stride_xk, stride_rm, stride_rk, stride_wn, stride_wk, PLAN, DH, PREPASS, INTERPRETED,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip

    if PLAN.scale != "prologue" and PREPASS == "none":
        rstd = row_rstd(sum_of_squares, D, eps, PLAN)
    finish_head(
        acc, rstd, bias_ptr, q_norm_ptr, k_norm_ptr, positions_ptr, cos_sin_ptr, q_ptr, k_ptr, v_ptr, offs_m, head,
        T, HQ, HKV, eps, stride_qm, stride_qh, stride_km, stride_kh, stride_vm, stride_vh, PLAN, DH, HEAD_NORM,
        BLOCK_M, BLOCK_N,
    )  # fmt: skip


def norm_qkv(
    x: Tensor,
    norm_weight: Tensor,
    qkv_weight: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    positions: Tensor | None = None,
    cos_sin_cache: Tensor | None = None,
    *,
    plan: CastPlan = DEFAULT,
    separate_head_norm: bool = False,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm -> QKV -> head norm (-> RoPE) of T tokens, rounding where the plan says.

    x              [T, D] bf16, any strides, T >= 0
    norm_weight    [D] bf16, w_in; not read for scale='folded'
    qkv_weight     [(Hq + 2 Hkv) * Dh, D] bf16, any strides, rows ordered q, k, v; for scale='folded' the
                   result of fold_norm_weight, made once, ahead of time
    q_norm_weight, k_norm_weight   [Dh] bf16, or None: no head norm (Qwen2, Llama)
    bias           [(Hq + 2 Hkv) * Dh] bf16 or None, added in fp32
    residual       [T, D] bf16 or None, added to x first
    eps            added to every mean of squares, > 0
    positions      [T] int64, each below the rows of cos_sin_cache (not checked), or None: q and k are not rotated
    cos_sin_cache  [positions, Dh] fp32 or bf16, contiguous: a row holds cos of Dh / 2 angles, then their sin, as in
                   vLLM, SGLang and FlashInfer; or None. Channels i and i + Dh / 2 turn together

    plan           where values are rounded, where rstd is applied, and the matmul's operands (kernels.plan)
    separate_head_norm   True: the head norm runs as a second kernel, over proj as stored. Same function
    out            (q, k, v) to write to, last dimension contiguous; or None
    config         how the launch is cut into programs (kernels.config); None: dispatch.launch_config, by the GPU,
                   the shape and T. Same function up to the order of fp32 sums; unsupported(config, plan) says which
                   plans it cannot express

    Returns q [T, Hq, Dh], k [T, Hkv, Dh], v [T, Hkv, Dh]: bf16, or float32 for plan.out='fp32'. Contiguous, but
    for kernel='separate', whose new outputs are views of one tensor [T, (Hq + 2 Hkv) * Dh].

    Run to run deterministic (kernel='separate': as far as cuBLAS is). With one config other than `separate`, tiles do
    not depend on T, so a row's bits do not depend on its batch, for one memory layout; separate_head_norm may add a
    head's squares in another order. With config=None, compiled on an NVIDIA GPU, they may: other T, other tiles, other
    order of sums. For batch invariance pass one config to every launch: default_config(head_dim, plan, False).

    Launches with kernel='split-k' share counters and must be ordered on a device, as in one stream, and the first one
    cannot be captured into a CUDA graph. config=None takes split-K for few tokens: there both hold too, so launch once
    with as many tokens before a capture. On a CPU it runs only interpreted (TRITON_INTERPRET=1 set before the import).
    There is no backward. Raises ValueError for inputs that do not fit or wait for a gradient, and for a config that
    cannot express the plan.
    """
    check_plan(plan)
    check_inputs(
        x, norm_weight, qkv_weight, num_q_heads, num_kv_heads, q_norm_weight, k_norm_weight, bias, residual, eps,
        positions, cos_sin_cache,
    )  # fmt: skip
    check_no_grad(
        x=x, norm_weight=norm_weight, qkv_weight=qkv_weight, q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight,
        bias=bias, residual=residual,
    )  # fmt: skip
    check_config_type(config)
    given = check_outputs(out, "qkv")
    interpreted = check_device("x", x, norm_qkv_kernel)
    tokens, hidden_size = x.shape
    head_dim = qkv_weight.shape[0] // (num_q_heads + 2 * num_kv_heads)
    heads = (num_q_heads, num_kv_heads, num_kv_heads)
    if config is None:
        shape = (hidden_size, num_q_heads, num_kv_heads, head_dim)
        config = launch_config(x.device, shape, tokens, plan, interpreted)
    if why := unsupported(config, plan):
        raise ValueError(why)
    packed = None
    if config.kernel == "separate" and out is None:
        packed = torch.empty(tokens, sum(heads), head_dim, dtype=torch.bfloat16, device=x.device)
        given = packed.split(heads, dim=1)
    q, k, v = (
        output_tensor(name, one, (tokens, count, head_dim), plan.out, like=x)
        for name, one, count in zip("qkv", given, heads, strict=True)
    )
    if tokens == 0:
        return q, k, v
    bias, q_norm_weight, k_norm_weight, positions = (
        None if tensor is None else tensor.contiguous() for tensor in (bias, q_norm_weight, k_norm_weight, positions)
    )
    norm_weight = norm_weight.contiguous()
    rope = (positions, cos_sin_cache)
    if config.kernel == "separate":
        launch_separate(
            x, residual, norm_weight, qkv_weight, bias, q_norm_weight, k_norm_weight, rope, (q, k, v), packed,
            plan, eps,
        )  # fmt: skip
        return q, k, v

    rstd_row = None
    if config.prepass != "none":
        x, residual, rstd_row = launch_prepass(x, residual, norm_weight, config, plan, eps)
    later = separate_head_norm and q_norm_weight is not None
    q_store, k_store = (output_tensor("proj", None, tuple(t.shape), plan.proj, like=x) if later else t for t in (q, k))
    stored = (q_store, k_store, v)
    tensors = (x, residual, norm_weight, qkv_weight, bias, q_norm_weight, k_norm_weight, *rope, rstd_row, *stored)
    strided = (x, x if residual is None else residual, qkv_weight, *stored)
    strides = [stride for tensor in strided for stride in tensor.stride()[:2]]
    numbers = (tokens, hidden_size, num_q_heads, num_kv_heads, float(eps), *strides)
    constants = launch_constants(plan, config, head_dim, interpreted) | {"PREPASS": config.prepass}
    constants["HEAD_NORM"] = "none" if q_norm_weight is None else "later" if later else "fused"
    if config.kernel == "split-k":
        launch_split_k(tensors, numbers, constants, config, sum(heads))
    else:
        grid = (triton.cdiv(tokens, config.block_m), sum(heads))
        norm_qkv_kernel[grid](*tensors, *numbers, **constants, enable_fp_fusion=False)
    if later:
        for store, weight, result in ((q_store, q_norm_weight, q), (k_store, k_norm_weight, k)):
            launch_head_norm(store, weight, result, plan, eps, rope)
    return q, k, v


def launch_prepass(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, config: Config, plan: CastPlan, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What the main kernel reads after its pre-pass: x or hidden [T, D], the residual, and rstd [T] fp32, or None
    where hidden has it already. Folded without residual, hidden is x itself."""
    rstd = hidden = None
    if config.prepass == "rstd" or plan.scale != "prologue":
        rstd = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    if config.prepass == "hidden" and (plan.scale != "folded" or residual is not None):
        hidden = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    launch_rms_norm(x, residual, norm_weight, hidden, rstd, plan, eps)
    if config.prepass == "hidden":
        x, residual = x if hidden is None else hidden, None
    return x, residual, rstd


def launch_constants(plan: CastPlan, config: Config, head_dim: int, interpreted: bool) -> dict[str, Any]:
    """Plan, tiles and options of a launch of the fused or the split-K kernel, or of their loop alone."""
    constants = {"PLAN": words(plan), "DH": head_dim, "INTERPRETED": interpreted}
    constants |= {"BLOCK_M": config.block_m, "BLOCK_N": head_block(head_dim), "BLOCK_K": config.block_k}
    return constants if interpreted else {**constants, "num_warps": config.num_warps, "num_stages": config.num_stages}


def fold_norm_weight(qkv_weight: Tensor, norm_weight: Tensor, plan: CastPlan) -> Tensor:
    """W' = bf16(W * w_in), [rows, D] bf16, for a plan with scale='folded'; done once, when a model is loaded.

    qkv_weight [rows, D] bf16, norm_weight [D] bf16. Raises ValueError for others.
    """
    check_plan(plan)
    check_plain("qkv_weight", qkv_weight)
    check_plain("norm_weight", norm_weight)
    if qkv_weight.ndim != 2:
        raise ValueError(f"qkv_weight must be [rows, hidden size], not {list(qkv_weight.shape)}")
    check_tensor("qkv_weight", qkv_weight, list(qkv_weight.shape), like=qkv_weight)
    check_tensor("norm_weight", norm_weight, [qkv_weight.shape[1]], like=qkv_weight)
    weight = norm_weight.float()
    if plan.weight_offset != "none":
        weight = 1 + weight
        weight = weight.to(torch.bfloat16).float() if plan.weight_offset == RNE else weight
    return (qkv_weight.float() * weight).to(torch.bfloat16)
