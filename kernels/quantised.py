"""RMSNorm -> QKV -> head norm (-> RoPE) from QKV weights in ggml's blocks, read as they lie in a file.

    q4_0   18 bytes for 32 weights of a row: fp16 d, then 16 bytes of two nibbles n; weight = d * (n - 8). The lower
           nibble of byte i is weight i, the upper one weight i + 16
    q8_0   34 bytes for 32: fp16 d, then 32 int8 n; weight = d * n

(ggml, ggml-common.h: block_q4_0 and block_q8_0; ggml-quants.c: dequantize_row_q4_0 and _q8_0.) d * (n - 8) has at most
11 + 4 bits and d * n 11 + 8, so fp32 holds both exactly. What is done to it next is a rounding of its own, before the
matmul: `weight`, a word beside the plan. All other roundings are the plan's, made by the chain's own device functions.

The activation stays what the plan says. llama.cpp quantises it too, to Q8_0 or Q8_1 blocks, before it multiplies
integers: that is another numerical function, and is not here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chain import dot, finish_head, load_x, row_rstd, row_squares, scaled
from .checks import check_inputs, check_no_grad, check_outputs, check_plain, check_plan, described
from .config import Config, check_config_type, default_config
from .head_norm import check_device, output_tensor
from .norm_qkv import launch_constants
from .plan import DEFAULT, KEEP, RNE, STORAGE, CastPlan
from .rounding import narrow, round_to

BLOCK = 32  # weights that share a scale
BLOCK_BYTES = {"q4_0": 18, "q8_0": 34}


@triton.jit
def load_weight(
    scale_ptr, word_ptr, rows, start, in_head, D, stride_wn, FORMAT: tl.constexpr, WEIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[K, N] fp32: channels from start on of rows [N] of W, rounded as WEIGHT says; zero outside.

    Both pointers are to the first block, of fp16 and of int16: a block is its scale and then WORDS words of two bytes.
    Each word is loaded once, and K is put together from the axes (block, word, byte) and, for q4_0, (half of a block).
    """
    WORDS: tl.constexpr = 8 if FORMAT == "q4_0" else 16
    blocks = start // 32 + tl.arange(0, BLOCK_K // 32).to(tl.int64)  # [B]
    offs = rows[None, :] * stride_wn + blocks[:, None] * (WORDS + 1)  # [B, N], in words
    mask = (blocks < D // 32)[:, None] & in_head[None, :]
    scale = tl.load(scale_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    word_ptrs = word_ptr + offs[:, None, :] + (1 + tl.arange(0, WORDS))[None, :, None]
    word = tl.load(word_ptrs, mask=mask[:, None, :], other=0).to(tl.int32)  # [B, WORDS, N], sign extended
    if FORMAT == "q4_0":
        lower = tl.join(word & 15, (word >> 8) & 15)  # [B, WORDS, N, byte]
        upper = tl.join((word >> 4) & 15, (word >> 12) & 15)
        number = tl.permute(tl.join(lower, upper), (0, 4, 1, 3, 2)) - 8  # [B, half, WORDS, byte, N]
    else:
        number = tl.permute(tl.join((word << 24) >> 24, word >> 8), (0, 1, 3, 2))  # [B, WORDS, byte, N]
    number = tl.reshape(number, [BLOCK_K // 32, 32, BLOCK_N]).to(tl.float32)
    weight = round_to(scale[:, None, :] * number, WEIGHT)
    return tl.reshape(weight, [BLOCK_K, BLOCK_N])


# One binary for all models of a head size, and for every slice of a batch's positions.
@triton.jit(do_not_specialize=["T", "HQ", "HKV"], do_not_specialize_on_alignment=["positions_ptr"])
def quantised_kernel(
    x_ptr,  # [T, D] bf16
    residual_ptr,  # [T, D] bf16, or None
    norm_weight_ptr,  # [D] bf16
    scale_ptr,  # [H * DH, stride_wn] fp16: the blocks' memory, of which every ninth or seventeenth is a scale
    word_ptr,  # [H * DH, stride_wn] int16, the same memory
    bias_ptr,  # [H * DH] bf16, or None
    q_norm_ptr,  # [DH] bf16, or None
    k_norm_ptr,  # [DH] bf16, or None
    positions_ptr,  # [T] int64, or None
    cos_sin_ptr,  # [positions, DH] fp32 or bf16, cos in the first half of a row; None: no RoPE
    q_ptr,  # [T, HQ, DH] bf16 or fp32
    k_ptr,  # [T, HKV, DH] bf16 or fp32
    v_ptr,  # [T, HKV, DH] bf16 or fp32
    T, D, HQ, HKV, eps, stride_xm, stride_xk, stride_rm, stride_rk, stride_wn,
    stride_qm, stride_qh, stride_km, stride_kh, stride_vm, stride_vh,
    PLAN: tl.constexpr,  # Words of a CastPlan
    FORMAT: tl.constexpr, WEIGHT: tl.constexpr,
    DH: tl.constexpr, HEAD_NORM: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,  # power of two >= DH
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    head = tl.program_id(1).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)  # [N] channels of this head
    rstd = tl.zeros([BLOCK_M], dtype=tl.float32)
    if PLAN.scale == "prologue":  # hidden needs rstd, so the rows are read twice
        whole = row_squares(
            x_ptr, residual_ptr, offs_m, T, D, stride_xm, stride_xk, stride_rm, stride_rk, PLAN, BLOCK_M, BLOCK_K, None
        )
        rstd = row_rstd(whole, D, eps, PLAN)

    sum_of_squares = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        x = load_x(x_ptr, residual_ptr, offs_m, offs_k, T, D, stride_xm, stride_xk, stride_rm, stride_rk, PLAN)
        if PLAN.scale != "prologue":
            sum_of_squares += tl.sum(round_to(x * x, PLAN.statistics), axis=1)
        hidden = scaled(x, rstd, norm_weight_ptr, offs_k, D, PLAN)
        weight = load_weight(
            scale_ptr, word_ptr, head * DH + offs_n, start, offs_n < DH, D, stride_wn, FORMAT, WEIGHT, BLOCK_N, BLOCK_K
        )
        if WEIGHT != "fp32":
            weight = narrow(weight)
        acc = dot(hidden, weight, acc, PLAN, INTERPRETED)

    if PLAN.scale != "prologue":
        rstd = row_rstd(sum_of_squares, D, eps, PLAN)
    finish_head(
        acc, rstd, bias_ptr, q_norm_ptr, k_norm_ptr, positions_ptr, cos_sin_ptr, q_ptr, k_ptr, v_ptr, offs_m, head,
        T, HQ, HKV, eps, stride_qm, stride_qh, stride_km, stride_kh, stride_vm, stride_vh, PLAN, DH, HEAD_NORM,
        BLOCK_M, BLOCK_N,
    )  # fmt: skip


def quantised_norm_qkv(
    x: Tensor,
    norm_weight: Tensor,
    packed: Tensor,
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
    format: str = "q4_0",
    weight: str = RNE,
    plan: CastPlan = DEFAULT,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """norm_qkv.norm_qkv with W in blocks; what is not named here is as there.

    packed  [(Hq + 2 Hkv) * Dh, bytes] uint8, contiguous: rows of D / 32 blocks, rows ordered q, k, v, as gguf's reader
            and quants.quantize have them. D must be a multiple of 32
    format  `q4_0` or `q8_0`
    weight  how d * n is held for the matmul: `bf16-rne`, `bf16-rtz`, or `fp32` (kept, for matmul='fp32' alone: the
            operands of the others have fewer bits than a weight of 15 or 19)
    config  kernel='fused' without a pre-pass, block_k a multiple of 32; None: default_config, whatever the GPU and T.
            One config for every launch, so that a row's bits do not depend on its batch

    One program multiplies one block of tokens and one head, for one token too: few tokens fill few processors.
    Scales are not looked at: an infinite d makes NaN of its zeros, as in ggml. Raises ValueError for inputs that do not
    fit, and for scale='folded': w_in must be in W before it is quantised.
    """
    check_plan(plan)
    check_words(plan, format, weight)
    hidden_size = check_packed(x, packed, format)
    like = torch.empty(1, dtype=torch.bfloat16, device=packed.device).expand(packed.shape[0], hidden_size)
    check_inputs(
        x, norm_weight, like, num_q_heads, num_kv_heads, q_norm_weight, k_norm_weight, bias, residual, eps,
        positions, cos_sin_cache, weight_name="packed",
    )  # fmt: skip
    check_no_grad(
        x=x, norm_weight=norm_weight, q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight, bias=bias,
        residual=residual,
    )  # fmt: skip
    interpreted = check_device("x", x, quantised_kernel)
    tokens, heads = x.shape[0], (num_q_heads, num_kv_heads, num_kv_heads)
    head_dim = packed.shape[0] // sum(heads)
    check_config_type(config)
    config = config or default_config(head_dim, plan, interpreted)
    check_config(config)
    q, k, v = (
        output_tensor(name, one, (tokens, count, head_dim), plan.out, like=x)
        for name, one, count in zip("qkv", check_outputs(out, "qkv"), heads, strict=True)
    )
    if tokens == 0:
        return q, k, v
    norm_weight = norm_weight.contiguous()
    bias, q_norm_weight, k_norm_weight, positions = (
        None if tensor is None else tensor.contiguous() for tensor in (bias, q_norm_weight, k_norm_weight, positions)
    )
    constants = launch_constants(plan, config, head_dim, interpreted) | {"FORMAT": format, "WEIGHT": weight}
    constants["HEAD_NORM"] = "none" if q_norm_weight is None else "fused"
    strides = [*x.stride(), *(x if residual is None else residual).stride(), packed.shape[1] // 2]
    strides += [stride for tensor in (q, k, v) for stride in tensor.stride()[:2]]
    quantised_kernel[(triton.cdiv(tokens, config.block_m), sum(heads))](
        x, residual, norm_weight, packed.view(torch.float16), packed.view(torch.int16), bias, q_norm_weight,
        k_norm_weight, positions, cos_sin_cache, q, k, v, tokens, hidden_size, num_q_heads, num_kv_heads, float(eps),
        *strides, **constants, enable_fp_fusion=False,
    )  # fmt: skip
    return q, k, v


def check_words(plan: CastPlan, format: str, weight: str) -> None:
    """Raises ValueError for an unknown word, and for a plan that these weights cannot have."""
    for name, word, allowed in (("format", format, tuple(BLOCK_BYTES)), ("weight", weight, STORAGE)):
        if not isinstance(word, str) or word not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {described(word)}")
    if weight == KEEP and plan.matmul != "fp32":
        raise ValueError(
            f"weight={KEEP!r} keeps 15 or 19 bits, which matmul={plan.matmul!r} does not read: weight must be rounded"
        )
    if plan.scale == "folded":
        raise ValueError("scale='folded' multiplies w_in into W before it is quantised: scale must be another")


def check_packed(x: Tensor, packed: Tensor, format: str) -> int:
    """D. Raises ValueError unless packed holds rows of whole blocks of as many channels as x."""
    check_plain("x", x)
    check_plain("packed", packed, codes=True)
    if packed.dtype != torch.uint8 or packed.ndim != 2 or not packed.is_contiguous():
        raise ValueError(
            "packed must be a contiguous torch.uint8 tensor [rows, bytes], not "
            f"{packed.dtype} {list(packed.shape)} of strides {packed.stride()}"
            + (": norm_qkv takes bf16 weights" if packed.dtype == torch.bfloat16 else "")
        )
    if x.ndim != 2 or x.shape[1] == 0 or x.shape[1] % BLOCK:
        raise ValueError(f"x must be [tokens, hidden size], the hidden size a multiple of {BLOCK}, not {list(x.shape)}")
    size = x.shape[1] // BLOCK * BLOCK_BYTES[format]
    if packed.shape[1] != size:
        raise ValueError(f"{format} rows of {x.shape[1]} weights have {size} bytes, not {packed.shape[1]}")
    if packed.data_ptr() % 2:
        raise ValueError("packed must begin at an even address, since its scales have two bytes")
    return x.shape[1]


def check_config(config: Config) -> None:
    """Raises ValueError for a config that this kernel does not have."""
    if (config.kernel, config.prepass) != ("fused", "none") or config.block_k % BLOCK:
        right = f"kernel='fused', prepass='none' and block_k a multiple of {BLOCK}"
        raise ValueError(f"weights in blocks need {right}, not {config}")
