"""A norm up to its weight, a chain as most engines write it, and the one candidate of an answer."""

from __future__ import annotations

import torch
from torch import Tensor

from castpoint.harness.fingerprint.answer import Answer
from castpoint.variants.eager import eager_norm


def unit(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) in fp32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def linear_chain(x, norm_weight, eps, qkv_weight, q_norm_weight, k_norm_weight, num_q_heads, num_kv_heads, bias=None):
    proj = torch.nn.functional.linear(eager_norm(x, norm_weight, eps, False), qkv_weight, bias)
    q, k, v = proj.unflatten(1, (num_q_heads + 2 * num_kv_heads, -1)).split([num_q_heads, *[num_kv_heads] * 2], dim=1)
    return eager_norm(q, q_norm_weight, eps, False), eager_norm(k, k_norm_weight, eps, False), v


def only(answer: Answer) -> dict[str, str]:
    """The words of an answer that must be identified."""
    assert answer.status == "identified", answer
    return answer.candidates[0]
