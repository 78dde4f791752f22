"""A norm up to its weight, and the one candidate of an answer."""

from __future__ import annotations

import torch
from torch import Tensor

from castpoint.harness.fingerprint.answer import Answer


def unit(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) in fp32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def only(answer: Answer) -> dict[str, str]:
    """The words of an answer that must be identified."""
    assert answer.status == "identified", answer
    return answer.candidates[0]
