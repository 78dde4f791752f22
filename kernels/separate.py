"""RMSNorm, QKV projection and head norm (with RoPE) as three kernels, the projection by cuBLAS: where fusion loses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .head_norm import launch_head_norm
from .plan import CastPlan
from .rms_norm import launch_rms_norm


@contextlib.contextmanager
def bf16_reduction(allowed: bool | tuple[bool, bool]) -> Iterator[None]:
    """Sets whether cuBLAS may round partial sums of bf16 matmuls to bf16, by default True, and restores what was. A
    second word says whether it may split D at all. A graph keeps what held while it was captured. Raises what torch
    raises where its version lacks a setting."""
    matmul = torch.backends.cuda.matmul
    name = "allow_bf16_reduced_precision_reduction"
    before = getattr(matmul, name)
    if hasattr(matmul, f"{name}_split_k"):
        before = (before, getattr(matmul, f"{name}_split_k"))
    setattr(matmul, name, allowed)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def fp32_sums(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Where cuBLAS may round partial sums to bf16 it may not: proj is rounded once."""
    rounds = device.type == "cuda" and torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    return bf16_reduction(False) if rounds else contextlib.nullcontext()


def launch_separate(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, qkv_weight: Tensor, bias: Tensor | None,
    q_norm_weight: Tensor | None, k_norm_weight: Tensor | None, rope: tuple[Tensor | None, Tensor | None],
    outputs: tuple[Tensor, Tensor, Tensor], packed: Tensor | None, plan: CastPlan, eps: float,
) -> None:  # fmt: skip
    """norm_qkv's launch of three kernels. packed [T, Hq + 2 Hkv, Dh] bf16 where outputs are its parts: cuBLAS writes
    there, q and k are normed in place and v is done. None: proj has memory of its own, and v is copied."""
    heads = tuple(out.shape[1] for out in outputs)
    hidden = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    launch_rms_norm(x, residual, norm_weight, hidden, None, plan, eps)
    proj = packed
    if proj is None:
        proj = torch.empty(x.shape[0], sum(heads), outputs[0].shape[2], dtype=torch.bfloat16, device=x.device)
    rows = proj.view(x.shape[0], -1)
    with fp32_sums(x.device):
        if bias is None:
            torch.mm(hidden, qkv_weight.T, out=rows)
        else:
            torch.addmm(bias, hidden, qkv_weight.T, out=rows)
    finished = q_norm_weight is not None or rope[0] is not None
    copied = (2,) if finished else range(3)
    if finished:
        q, k, _v = outputs
        launch_head_norm(proj[:, : heads[0] + heads[1]], q_norm_weight, q, plan, eps, rope, k_norm_weight, k)
    if packed is None:
        parts = proj.split(heads, dim=1)
        for i in copied:
            outputs[i].copy_(parts[i])
