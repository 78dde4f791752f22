"""RMSNorm over each head, and RoPE: the epilogue of the fused kernel, and a kernel of its own.

head_rstd   = (mean(proj^2) + eps)^-1/2      over the Dh channels of one head
head_normed = proj * head_rstd
out         = head_normed * weight           or, where q and k are rotated, what is below

unrotated   = head_normed * weight
products    = unrotated[i] * cos[i], unrotated[i + Dh/2] * sin[i], and so on
out[i]        = unrotated[i] * cos[i] - unrotated[i + Dh/2] * sin[i]          for i < Dh/2
out[i + Dh/2] = unrotated[i + Dh/2] * cos[i] + unrotated[i] * sin[i]

That is the half-split layout of Llama, Qwen and GPT-NeoX; RoFormer (arXiv 2104.09864) pairs neighbours instead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import (
    check_count,
    check_eps,
    check_no_grad,
    check_outputs,
    check_plain,
    check_plan,
    check_rope,
    check_tensor,
)
from .plan import DEFAULT, CastPlan, words
from .rounding import applied_weight, narrow, round_to, widen

BLOCK_M = 16  # tokens of one program of head_norm_kernel


@triton.jit
def rsqrt_rn(x):
    """1 / sqrt(x) in two correctly rounded steps: the same bits on every device, unlike rsqrt.approx."""
    return tl.div_rn(1.0, tl.sqrt_rn(x))


@triton.jit
def normalize_head(proj, weight, eps, PLAN: tl.constexpr, DH: tl.constexpr):
    """[M, N] fp32: the head norm of whole heads, proj [M, N] fp32 (zero beyond DH), by weight [N] fp32 as applied.

    Rounded as PLAN says; the result is not.
    """
    squares = round_to(proj * proj, PLAN.statistics)
    variance = round_to(tl.div_rn(tl.sum(squares, axis=1), DH * 1.0), PLAN.variance)  # [M]
    head_rstd = round_to(rsqrt_rn(variance + eps), PLAN.head_rstd)
    head_normed = round_to(proj * head_rstd[:, None], PLAN.head_normed)
    return head_normed * weight[None, :]


@triton.jit
def rotate(value, positions_ptr, cos_sin_ptr, offs_m, T, PLAN: tl.constexpr, DH: tl.constexpr, BLOCK_M: tl.constexpr):
    """[M, DH] fp32: each channel turned together with that half a head away; the sums are not rounded.

    In halves, because both share cos and sin: with whole tiles of either the fused kernel needed 255 registers a
    thread and spilled on sm_90, where it needs 166 so.
    """
    HALF: tl.constexpr = DH // 2
    value = round_to(value, PLAN.unrotated)
    first, second = tl.split(tl.permute(tl.reshape(value, [BLOCK_M, 2, HALF]), (0, 2, 1)))  # [M, HALF]
    position = tl.load(positions_ptr + offs_m, mask=offs_m < T, other=0)  # [M] int64
    cos_ptrs = cos_sin_ptr + position[:, None] * DH + tl.arange(0, HALF)[None, :]
    mask = (offs_m < T)[:, None]
    cos = round_to(widen(tl.load(cos_ptrs, mask=mask, other=0.0)), PLAN.cos_sin)
    sin = round_to(widen(tl.load(cos_ptrs + HALF, mask=mask, other=0.0)), PLAN.cos_sin)
    turned_first = round_to(first * cos, PLAN.products) - round_to(second * sin, PLAN.products)
    turned_second = round_to(second * cos, PLAN.products) + round_to(first * sin, PLAN.products)
    return tl.reshape(tl.permute(tl.join(turned_first, turned_second), (0, 2, 1)), [BLOCK_M, DH])


@triton.jit
def store_head(ptrs, value, mask):
    """Stores an fp32 tile to fp32 memory, or to bf16 memory if it holds bf16 values already."""
    if ptrs.dtype.element_ty == tl.bfloat16:
        tl.store(ptrs, narrow(value), mask=mask)
    else:
        tl.store(ptrs, value, mask=mask)


@triton.jit(do_not_specialize=["T", "HQ"], do_not_specialize_on_alignment=["positions_ptr"])
def head_norm_kernel(
    proj_ptr,  # [T, H, DH] bf16 or fp32
    weight_ptr,  # [DH] bf16, or None: no norm, RoPE alone
    positions_ptr,  # [T] int64, or None
    cos_sin_ptr,  # [positions, DH] fp32 or bf16, cos in the first half of a row; None: no RoPE
    out_ptr,  # [T, HQ, DH] bf16 or fp32
    k_weight_ptr,  # [DH] bf16, of the heads from HQ on; None where all heads have one weight
    k_out_ptr,  # [T, H - HQ, DH] as out; None with k_weight_ptr
    T, HQ, eps, stride_pm, stride_ph, stride_om, stride_oh, stride_km, stride_kh,
    PLAN: tl.constexpr,  # Words of a CastPlan
    DH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,  # power of two >= DH
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    head = tl.program_id(1).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)  # [N]
    mask = (offs_m < T)[:, None] & (offs_n < DH)[None, :]
    value = widen(
        tl.load(proj_ptr + offs_m[:, None] * stride_pm + head * stride_ph + offs_n[None, :], mask=mask, other=0.0)
    )
    if weight_ptr is not None:
        stored = tl.load(weight_ptr + offs_n, mask=offs_n < DH, other=0.0)
        if k_weight_ptr is not None:
            if head >= HQ:
                stored = tl.load(k_weight_ptr + offs_n, mask=offs_n < DH, other=0.0)
        weight = applied_weight(stored, PLAN.weight_offset)
        value = normalize_head(value, weight, eps, PLAN, DH)
    if cos_sin_ptr is not None:
        value = rotate(value, positions_ptr, cos_sin_ptr, offs_m, T, PLAN, DH, BLOCK_M)
    out = round_to(value, PLAN.out)
    out_ptrs = out_ptr + offs_m[:, None] * stride_om + head * stride_oh + offs_n[None, :]
    if k_out_ptr is None:
        store_head(out_ptrs, out, mask)
    elif head < HQ:  # two stores: pointers that differ by branch, Triton 3.6 does not compile for AMD
        store_head(out_ptrs, out, mask)
    else:
        k_ptrs = k_out_ptr + offs_m[:, None] * stride_km + (head - HQ) * stride_kh + offs_n[None, :]
        store_head(k_ptrs, out, mask)


def head_norm(
    proj: Tensor, weight: Tensor | None, eps: float = 1e-6, positions: Tensor | None = None,
    cos_sin_cache: Tensor | None = None, *, plan: CastPlan = DEFAULT, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """RMSNorm of every head of proj [T, H, Dh] (bf16 or fp32, last dimension contiguous), and RoPE.

    weight [Dh] bf16, or None: no norm. positions [T] int64 and cos_sin_cache [positions, Dh] fp32 or bf16, as
    norm_qkv takes them, or neither: no RoPE. plan: of it count statistics, variance, head_rstd, head_normed, RoPE's
    boundaries, out and weight_offset. Returns out [T, H, Dh]: bf16, or float32 for plan.out='fp32'. Raises ValueError
    for shapes, dtypes or devices that do not fit.
    """
    tokens, heads, head_dim = _check_heads(proj, eps, positions, cos_sin_cache, plan, weight=weight)
    out = output_tensor("out", out, (tokens, heads, head_dim), plan.out, like=proj, first="proj")
    weight, positions = _contiguous(weight, positions)
    launch_head_norm(proj, weight, out, plan, eps, (positions, cos_sin_cache))
    return out


def qk_norm(
    proj: Tensor, q_norm_weight: Tensor | None, k_norm_weight: Tensor | None, num_q_heads: int, eps: float = 1e-6,
    positions: Tensor | None = None, cos_sin_cache: Tensor | None = None, *, plan: CastPlan = DEFAULT,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """head_norm of q's and k's heads in one launch: proj [T, Hq + Hk, Dh], q's heads first.

    q_norm_weight and k_norm_weight [Dh] bf16, or both None: RoPE alone. out: (q, k) to write to, which may be proj's
    own heads; or None. The rest is head_norm's. Returns q [T, Hq, Dh] and k [T, Hk, Dh]. Raises ValueError as head_norm
    does, for one weight without the other, and where num_q_heads leaves q or k no head.
    """
    if (q_norm_weight is None) != (k_norm_weight is None):
        raise ValueError("q_norm_weight and k_norm_weight must be given together, or neither")
    weights = {"q_norm_weight": q_norm_weight, "k_norm_weight": k_norm_weight}
    tokens, heads, head_dim = _check_heads(proj, eps, positions, cos_sin_cache, plan, **weights)
    check_count("num_q_heads", num_q_heads)
    if not 0 < num_q_heads < heads:
        raise ValueError(f"num_q_heads must leave heads of {heads} to both q and k, not be {num_q_heads}")
    q, k = (
        output_tensor(name, one, (tokens, count, head_dim), plan.out, like=proj, first="proj")
        for name, one, count in zip("qk", check_outputs(out, "qk"), (num_q_heads, heads - num_q_heads), strict=True)
    )
    q_norm_weight, k_norm_weight, positions = _contiguous(q_norm_weight, k_norm_weight, positions)
    launch_head_norm(proj, q_norm_weight, q, plan, eps, (positions, cos_sin_cache), k_norm_weight, k)
    return q, k


def _check_heads(
    proj: Tensor, eps: float, positions: Tensor | None, cos_sin_cache: Tensor | None, plan: CastPlan,
    **weights: Tensor | None,
) -> tuple[int, int, int]:  # fmt: skip
    """Shape of proj. Raises ValueError for shapes, dtypes or devices that do not fit."""
    check_plan(plan)
    for name, tensor in {"proj": proj, **weights}.items():
        if tensor is not None or name == "proj":
            check_plain(name, tensor)
    if proj.ndim != 3 or proj.stride(2) != 1:
        raise ValueError(f"proj must be [tokens, heads, head size] with contiguous heads, not {list(proj.shape)}")
    if proj.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"proj must be torch.bfloat16 or torch.float32, not {proj.dtype}")
    tokens, heads, head_dim = proj.shape
    check_tensor("proj", proj, [tokens, heads, head_dim], like=proj, dtype=proj.dtype)
    for name, weight in weights.items():
        if weight is not None:
            check_tensor(name, weight, [head_dim], like=proj, first="proj")
    check_eps(eps)
    check_rope(positions, cos_sin_cache, tokens, head_dim, like=proj, first="proj")
    check_no_grad(proj=proj, **weights)
    check_device("proj", proj, head_norm_kernel)
    return tokens, heads, head_dim


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def launch_head_norm(
    proj: Tensor, weight: Tensor | None, out: Tensor, plan: CastPlan, eps: float,
    rope: tuple[Tensor | None, Tensor | None], k_weight: Tensor | None = None, k_out: Tensor | None = None,
) -> None:  # fmt: skip
    """head_norm of proj [T, H, Dh] without its checks; with k_out, q's and k's heads in one launch.

    Weights and positions are contiguous. rope: positions and cos_sin_cache, or two None. out [T, Hq, Dh] takes the
    first heads, k_out [T, H - Hq, Dh] those behind; both may lie where proj lies.
    """
    tokens, heads, head_dim = proj.shape
    if tokens == 0:
        return
    head_norm_kernel[(triton.cdiv(tokens, BLOCK_M), heads)](
        proj, weight, *rope, out, k_weight, k_out, tokens, out.shape[1], float(eps),
        *proj.stride()[:2], *out.stride()[:2], *(out if k_out is None else k_out).stride()[:2],
        PLAN=words(plan), DH=head_dim, BLOCK_M=BLOCK_M, BLOCK_N=triton.next_power_of_2(head_dim),
        enable_fp_fusion=False,
    )  # fmt: skip


def check_device(name: str, tensor: Tensor, kernel: object) -> bool:
    """Whether the kernel is interpreted. Raises ValueError for a tensor on the CPU where it is not, unless Triton's
    active driver runs compiled kernels there."""
    interpreted = not isinstance(kernel, triton.JITFunction)
    if tensor.device.type == "cpu" and not interpreted and not _compiles_for_cpu():
        raise ValueError(
            f"{name} is on the CPU, where Triton runs only interpreted: set TRITON_INTERPRET=1 before the kernels "
            "are imported, or move the tensors to a GPU"
        )
    return interpreted


def _compiles_for_cpu() -> bool:
    try:
        return triton.runtime.driver.active.get_active_torch_device().type == "cpu"
    except RuntimeError:  # no driver
        return False


def output_tensor(
    name: str, out: Tensor | None, shape: tuple[int, ...], storage: str, *, like: Tensor, first: str = "x"
) -> Tensor:
    """out if it fits, else a new tensor: bf16, or float32 for storage 'fp32'. Raises ValueError if it does not fit."""
    dtype = torch.float32 if storage == "fp32" else torch.bfloat16
    if out is None:
        return torch.empty(shape, dtype=dtype, device=like.device)
    check_plain(name, out, codes=True)
    if out.dtype != dtype:  # converted it would be another tensor, and theirs stays empty
        raise ValueError(f"{name} must be {dtype}, which the plan stores, not {out.dtype}: make it with that dtype")
    check_tensor(name, out, list(shape), like=like, first=first, dtype=dtype)
    check_no_grad(**{name: out})
    if out.stride(-1) != 1:
        raise ValueError(f"{name} must have contiguous heads (stride 1 in its last dimension), not {out.stride()}")
    return out
