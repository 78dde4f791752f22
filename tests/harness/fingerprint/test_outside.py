"""Kernels outside the family: the fingerprint names no plan."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from castpoint.harness.fingerprint import known
from castpoint.harness.fingerprint.norm import identify
from castpoint.kernels.plan import RNE, RTZ
from castpoint.variants.catalogue import ONE_ROUNDING
from castpoint.variants.eager import eager_norm
from castpoint.variants.spec import round_to

Norm = Callable[[Tensor, Tensor, float], Tensor]


def norm_with(
    *,
    mean: Callable[[Tensor], Tensor] = lambda x: x.pow(2).mean(-1, keepdim=True),
    root: Callable[[Tensor, float], Tensor] = lambda v, eps: torch.rsqrt(v + eps),
    normed: Callable[[Tensor], Tensor] = lambda n: n,
    weight: Callable[[Tensor], Tensor] = lambda w: w,
    out: Callable[[Tensor], Tensor] = lambda y: y.bfloat16(),
) -> Norm:
    def fn(x: Tensor, w: Tensor, eps: float) -> Tensor:
        x = x.float()
        return out(normed(x * root(mean(x), eps)) * weight(w.float()))

    return fn


def bf16_sum(x: Tensor) -> Tensor:
    total = torch.zeros_like(x[..., :1])
    for part in (x * x).split(1, dim=-1):
        total = (total + part).bfloat16().float()
    return total / x.shape[-1]


def one_column(n: Tensor) -> Tensor:
    rounded = n.bfloat16().float()
    rounded[..., -1] = n[..., -1]
    return rounded


OUTSIDERS: dict[str, Norm] = {
    "sum of squares accumulated in bf16": norm_with(mean=bf16_sum),
    "variance over D - 1": norm_with(mean=lambda x: x.pow(2).sum(-1, keepdim=True) / (x.shape[-1] - 1)),
    "variance about the mean": norm_with(
        mean=lambda x: x.var(-1, correction=0, keepdim=True), normed=lambda n: n.bfloat16().float()
    ),
    "eps outside the root": norm_with(root=lambda v, eps: 1 / (v.sqrt() + eps)),
    "eps times D": norm_with(root=lambda v, eps: torch.rsqrt(v + 256 * eps)),
    "eps a constant": norm_with(root=lambda v, eps: torch.rsqrt(v + 1e-6)),
    "normed in fp16": norm_with(normed=lambda n: n.half().float()),
    "1 + w in fp16": norm_with(weight=lambda w: (1 + w).half().float()),
    "normed cut to tf32": norm_with(normed=lambda n: (n.view(torch.int32) & -(1 << 13)).view(torch.float32)),
    "one column of normed not rounded": norm_with(normed=one_column),
    "rounded toward minus infinity": norm_with(
        out=lambda y: torch.where(
            y < 0, torch.nextafter(round_to(y, RTZ).bfloat16(), y.new_tensor(-1e30).bfloat16()), round_to(y, RTZ)
        ).bfloat16()
    ),
    "LayerNorm": lambda x, w, eps: F.layer_norm(x, (x.shape[-1],), w, None, eps),
    "no weight": lambda x, w, eps: F.rms_norm(x, (x.shape[-1],), None, eps),
    "a scale of attention": lambda x, w, eps: (
        F.rms_norm(x.float(), (x.shape[-1],), w.float(), eps) * 128**-0.5
    ).bfloat16(),
    "the L2 norm": lambda x, w, eps: F.normalize(x.float(), dim=-1).bfloat16() * w,
    "1 + w, and no norm": lambda x, w, eps: x * (1 + w),
    "weight before the mean": lambda x, w, eps: F.rms_norm(
        (x.float() * w.float()), (x.shape[-1],), None, eps
    ).bfloat16(),
    "LayerNorm with 1 + w": lambda x, w, eps: F.layer_norm(
        x.float(), (x.shape[-1],), 1 + w.float(), None, eps
    ).bfloat16(),
}
MISSING = {  # what the answer says would explain it
    "variance over D - 1": "the mean is over one channel less",
    "eps outside the root": "eps is added to the root, not under it",
    "eps times D": "eps is multiplied by the number of channels",
    "eps a constant": "it adds 1e-06 whatever eps is",
    "normed in fp16": "normed is rounded to fp16",
    "1 + w in fp16": "weight_offset is rounded to fp16",
    "normed cut to tf32": "normed is cut to 11 bits, as tf32 and fp16 have them",
    "a scale of attention": "the result is 0.0884 times as large",
    "the L2 norm": "it is the L2 norm",
    "one column of normed not rounded": "they gather in column 255 of 256",
    "LayerNorm": "the mean is subtracted: it is LayerNorm",
    "no weight": "no weight is applied",
    "rounded toward minus infinity": "",
    "1 + w, and no norm": "",
    "weight before the mean": "the weight is applied before the mean is taken",
    "LayerNorm with 1 + w": "the mean is subtracted: it is LayerNorm, with 1 + w",
}


@pytest.mark.parametrize("name", OUTSIDERS)
def test_a_kernel_outside_the_family_is_none_of_these(name: str) -> None:
    answer = identify(OUTSIDERS[name], "rmsnorm")
    assert answer.status == "none" and answer.candidates == [], answer
    assert answer.nearest and answer.reason.startswith("none of these: the nearest plan leaves"), answer
    assert MISSING.get(name, "elements differ") in answer.reason, answer.reason
    assert (answer.runner_up_share_equal or 0.0) <= answer.share_equal


def test_norms_that_no_one_plan_can_say_are_none_of_these() -> None:
    def gemma_heads(*args: object) -> tuple[Tensor, ...]:
        x, w_in, weight, q, k, eps, nq, nkv = args
        outputs = known.chain(ONE_ROUNDING, "spec")(x, w_in, weight, q * 0 + 1, k * 0 + 1, eps, nq, nkv)
        return (outputs[0] * (1 + q), outputs[1] * (1 + k), outputs[2])

    answer = identify(gemma_heads, "qkv")
    assert answer.status == "none", answer


@pytest.mark.parametrize("residual", ["rounded", "kept"])
def test_a_fused_add_says_whether_the_sum_is_rounded(residual: str) -> None:
    def fn(x: Tensor, weight: Tensor, eps: float, residual_: Tensor | None = None, *, residual: Tensor) -> object:
        total = x.float() + residual.float()
        total = total.bfloat16().float() if rounded else total
        normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + eps)
        return (normed * weight.float()).bfloat16(), total.bfloat16()

    rounded = residual == "rounded"
    answer = identify(fn, "rmsnorm")
    assert answer.status == "identified" and answer.candidates[0]["x"] == (RNE if rounded else "fp32"), answer


@pytest.mark.parametrize("where", ["before", "after", "ignored by q and k"])
def test_where_a_bias_is_added(where: str) -> None:
    def fn(x: Tensor, w: Tensor, weight: Tensor, q_w: Tensor, k_w: Tensor, eps: float, nq: int, nkv: int, bias: Tensor):
        hidden = eager_norm(x, w, eps, False).float()
        proj = (hidden.double() @ weight.double().T).float()
        b = bias.float().clone()
        if where.startswith("ignored"):
            b[: (nq + nkv) * len(q_w)] = 0
        proj = (proj.bfloat16() + b.bfloat16()) if where == "after" else (proj + b).bfloat16()
        q, k, v = proj.reshape(len(x), -1, len(q_w)).split([nq, nkv, nkv], dim=1)
        return eager_norm(q, q_w, eps, False), eager_norm(k, k_w, eps, False), v

    answer = identify(fn, "qkv")
    if where.startswith("ignored"):
        assert answer.status == "none" and "bias" in answer.reason
    else:
        assert answer.status == "identified" and answer.candidates[0]["bias"] == where, answer
