"""Callables of the other kinds, written here from public code or reports: with a gate, without a weight or with one a
head, with a scaled sum, in 8 bits, a norm and a projection. Each with its right answer, and where it is from."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from castpoint.harness.peers.reports import CONSTRUCTED, Store, bf16, cut, kept, squares
from castpoint.harness.peers.running import EAGER, OWN, Implementation

E4M3 = torch.float8_e4m3fn


def unit(x: Tensor, eps: float) -> Tensor:
    return squares(x.float(), lambda mean: torch.rsqrt(mean + eps))


def hf(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return unit(x, eps).to(x.dtype) * weight


# ---------------------------------------------------------------- gates


def gate_last(x: Tensor, weight: Tensor, z: Tensor, eps: float, ungated: Store = kept, gate: Store = kept) -> Tensor:
    return (ungated(unit(x, eps) * weight.float()) * gate(F.silu(z.float()))).to(x.dtype)


def cast_first(x: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    return (hf(x, weight, eps) * F.silu(gate.float())).to(x.dtype)


def gate_first(x: Tensor, weight: Tensor, z: Tensor, eps: float) -> Tensor:
    return weight * unit(x.float() * F.silu(z.float()), eps).to(x.dtype)


def gate_shifted(x: Tensor, weight: Tensor, z: Tensor, eps: float) -> Tensor:
    return gate_last(x, weight, z.roll(1, -1), eps)


# ---------------------------------------------------------------- weights, sums


def without_weight(x: Tensor, eps: float) -> Tensor:
    return unit(x, eps).type_as(x)


def one_for_each_head(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if weight.shape != x.shape[1:]:
        raise ValueError("weight must be [H, Dh]")
    return hf(x, weight, eps)


def multiplied(x: Tensor, residual: Tensor, weight: Tensor, eps: float, residual_multiplier: float = 1.0) -> Any:
    total = residual + x * residual_multiplier
    return hf(total, weight, eps), total


def multiplied_twice(x: Tensor, residual: Tensor, weight: Tensor, eps: float, residual_multiplier: float = 1.0) -> Any:
    return multiplied(x * residual_multiplier, residual, weight, eps, residual_multiplier)


# ---------------------------------------------------------------- 8 bits


def static_fp8(result: Tensor, input: Tensor, weight: Tensor, scale: Tensor, epsilon: float) -> None:
    result.copy_((hf(input, weight, epsilon).float() / scale).clamp(-448, 448).to(E4M3))


def dynamic_fp8(result: Tensor, input: Tensor, weight: Tensor, scales: Tensor, epsilon: float, hidden: Store) -> None:
    y = hidden(unit(input, epsilon) * weight.float())
    scales.copy_((y.abs().amax(-1, keepdim=True) / 448).clamp(min=2.0**-20))
    result.copy_((y / scales).clamp(-448, 448).to(E4M3))


def to_int8(x: Tensor, weight: Tensor, eps: float, hidden: Store = kept) -> tuple[Tensor, Tensor]:
    y = hidden(unit(x, eps) * weight.float())
    scales = (y.abs().amax(-1, keepdim=True) / 127).clamp(min=2.0**-20)
    return (y / scales).round().to(torch.int8), scales


def of_another_row(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, scales = to_int8(x, weight, eps)
    return y, scales.roll(1, 0)


def bound(fn: Callable[..., Any], **words: Any) -> Callable[..., Any]:
    """dynamic_fp8 with its words, and no more arguments than an engine's."""

    def norm(result: Tensor, input: Tensor, weight: Tensor, scales: Tensor, epsilon: float) -> None:
        fn(result, input, weight, scales, epsilon, **words)

    return norm


# ---------------------------------------------------------------- a norm and a projection


def linear(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, normed: Store = bf16) -> Tensor:
    rows = bf16(normed(unit(x, eps)) * norm_weight.float())
    return (rows.double() @ weight.double().T).float().to(x.dtype)


def rstd_behind(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows = bf16(x.float() * norm_weight.float())
    rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return ((rows.double() @ weight.double().T).float() * rstd).to(x.dtype)


def two_parts(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows, half = hf(x, norm_weight, eps).double(), x.shape[1] // 2
    parts = [rows[:, at] @ weight[:, at].double().T for at in (slice(half), slice(half, None))]
    return parts[0].to(x.dtype) + parts[1].to(x.dtype)


# ---------------------------------------------------------------- head norms with RoPE


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, Dh] by cos and sin [T, Dh] that hold each angle twice, in the dtype that these promote to."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def in_types_of_torch(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return rotate(hf(q, q_weight, eps), cos, sin), rotate(hf(k, k_weight, eps), cos, sin)


def of_positions(
    qkv: Tensor, num_heads_q: int, num_heads_k: int, num_heads_v: int, head_dim: int, eps: float, q_weight: Tensor,
    k_weight: Tensor, base: float, position_ids: Tensor, inv_freq: Store = kept, late: int = 0,
) -> None:  # fmt: skip
    """In place, one rounding, angles made here."""
    steps = inv_freq(base ** (-torch.arange(0, head_dim, 2).double() / head_dim).float())
    heads = qkv.unflatten(1, (-1, head_dim))
    parts = heads.split([num_heads_q, num_heads_k, num_heads_v], 1)
    for part, weight, shift in ((parts[0], q_weight, 0), (parts[1], k_weight, late)):
        angles = torch.outer(position_ids.roll(shift).double(), steps.double()).repeat(1, 2)
        turned = rotate(unit(part, eps) * weight.float(), angles.cos().float(), angles.sin().float())
        part.copy_(turned)


def packed(**words: Any) -> Callable[..., None]:
    """of_positions with its words, and no more arguments than an engine's."""

    def fn(
        qkv: Tensor, num_heads_q: int, num_heads_k: int, num_heads_v: int, head_dim: int, eps: float, q_weight: Tensor,
        k_weight: Tensor, base: float, position_ids: Tensor,
    ) -> None:  # fmt: skip
        heads = (num_heads_q, num_heads_k, num_heads_v, head_dim)
        of_positions(qkv, *heads, eps, q_weight, k_weight, base, position_ids, **words)

    return fn


TABLE: tuple[tuple[str, str, Callable[..., Any], str, str], ...] = (  # kind, name, callable, right, source
    ("rmsnorm", "norm, cast first, then a gate", cast_first, "hf, ungated=bf16-rne, gate=fp32", CONSTRUCTED),
    ("rmsnorm", "norm, then a gate, one rounding", gate_last, "one-rounding, ungated=fp32, gate=fp32",
     "mamba_ssm layer_norm_gated"),
    ("rmsnorm", "norm, then a gate in bf16", partial(gate_last, ungated=bf16, gate=bf16),
     "one-rounding, ungated=bf16-rne, gate=bf16-rne", CONSTRUCTED),
    ("rmsnorm", "a gate, then a norm", gate_first, "hf, gated=fp32, gate=fp32", "transformers MambaRMSNormGated"),
    ("rmsnorm", "another channel's gate", gate_shifted, "none", CONSTRUCTED),
    ("head_norm", "norm without a weight", without_weight, "one-rounding, weight=none", CONSTRUCTED),
    ("rmsnorm", "nn.RMSNorm without a weight", nn.RMSNorm(256, eps=1e-6, elementwise_affine=False),
     "one-rounding, weight=none", "torch 2.13"),
    ("head_norm", "a weight for each head", one_for_each_head, "hf", CONSTRUCTED),
    ("rmsnorm", "sum of x times a multiplier", multiplied, "hf, x=bf16-rne", "transformers GraniteDecoderLayer"),
    ("rmsnorm", "a multiplier twice", multiplied_twice, "error: with alpha=0.22", CONSTRUCTED),
    ("rmsnorm", "fp8, a scale for all", static_fp8, "hf, out=e4m3-rne", "vllm rms_norm_static_fp8_quant"),
    ("rmsnorm", "fp8, a scale a token", bound(dynamic_fp8, hidden=kept), "fp32, out=e4m3-rne", CONSTRUCTED),
    ("rmsnorm", "fp8, a scale a token, of bf16", bound(dynamic_fp8, hidden=bf16), "one-rounding, out=e4m3-rne",
     CONSTRUCTED),
    ("rmsnorm", "int8 of bf16", partial(to_int8, hidden=bf16), "one-rounding, out=int8-rne", CONSTRUCTED),
    ("rmsnorm", "int8 of cut bf16", partial(to_int8, hidden=cut), "one-rounding, hidden=bf16-rtz, out=int8-rne",
     CONSTRUCTED),
    ("rmsnorm", "int8, another row's scale", of_another_row, "none", CONSTRUCTED),
    ("norm_linear", "norm and projection, cast first", linear, "hf", CONSTRUCTED),
    ("norm_linear", "norm and projection, one rounding", partial(linear, normed=kept), "one-rounding", CONSTRUCTED),
    ("norm_linear", "norm behind the projection", rstd_behind, "deferred", CONSTRUCTED),
    ("norm_linear", "sums of two parts in bf16", two_parts, "none", "aiter #2586"),
    ("qk_norm_rope", "head norms, then RoPE, by torch in bf16", in_types_of_torch, "hf", "transformers Qwen3Attention"),
    ("qk_norm_rope", "head norms and RoPE in place, one rounding", packed(), "bf16-operand", CONSTRUCTED),
    ("qk_norm_rope", "inv_freq in bf16", packed(inv_freq=bf16), "bf16-operand, inv_freq=bf16-rne", CONSTRUCTED),
    ("qk_norm_rope", "k by the position of another token", packed(late=1), "none", CONSTRUCTED),
)  # fmt: skip
MODULES = (  # kind, model, class, how it is made: None as the class, right
    ("rmsnorm", "qwen3_next", "Qwen3NextRMSNormGated", None, "hf, ungated=bf16-rne, gate=fp32"),
    ("head_norm", "gemma4", "Gemma4RMSNorm", {"dim": 128, "with_scale": False}, "one-rounding, weight=none"),
    ("rmsnorm", "llama4", "Llama4TextL2Norm", {}, "one-rounding, weight=none"),
)


def other_rows() -> list[Implementation]:
    """In the order of a table."""
    written = [
        Implementation(f"written: {name}", OWN, kind, EAGER, lambda device, fn=fn: fn, right, source)
        for kind, name, fn, right, source in TABLE
    ]
    modules = [
        Implementation(
            f"{name}, the module",
            "transformers",
            kind,
            EAGER,
            partial(_module, model, name, made),
            right,
            "its forward",
        )
        for kind, model, name, made, right in MODULES
    ]
    return [*written, *modules]


def _module(model: str, name: str, made: dict[str, Any] | None, device: str) -> Any:
    kind = getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name)
    return kind if made is None else kind(**made).to(device)
