"""What an arm says otherwise than its reference, by hand; planted faults are noticed."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from castpoint.harness.model import study as impact
from castpoint.harness.model.passes import Pass
from castpoint.harness.model.study import (
    following,
    layer_errors,
    parting,
    token_errors,
)


def test_layer_errors_by_hand() -> None:
    """Two tokens, two channels, one head. Of K one element is off by a bf16 ulp at 2, 2^-6; of hidden one by 1."""
    q = torch.tensor([[[1.0, 0.0]], [[0.0, 4.0]]])
    k = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
    hidden = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    reference = Pass(hidden=[hidden], q=[q], k=[k], logits=hidden)
    off = torch.tensor([[3.0, 5.0], [0.0, 2.0]])
    k_off = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0 + 2**-6]]])
    found = layer_errors(Pass(hidden=[off], q=[q], k=[k_off], logits=off), reference, 0)
    expected = {
        "max_abs": 1.0,
        "rms": 0.5,
        "rel_rms": math.sqrt((1 / 25 + 0) / 2),
        "one_minus_cosine": (1 - 29 / (5 * math.sqrt(34))) / 2,
        "k_max_abs": 2**-6,
        "k_rel_rms": 2**-7 / math.sqrt(2),
        "k_p99_ulp": 1.0,
        "attention_logit_rms": 4 * 2**-6 / math.sqrt(2) / math.sqrt(3),  # three causal logits, one of them off
    }
    assert found == pytest.approx(expected, rel=1e-14)
    assert layer_errors(reference, reference, 0) == pytest.approx(dict.fromkeys(expected, 0.0))


P = torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.06, 0.04], [0.3, 0.3001, 0.2, 0.1, 0.0599, 0.04]], dtype=torch.float64)
Q = torch.tensor([[0.4, 0.3, 0.1, 0.06, 0.04, 0.1], [0.3001, 0.3, 0.2, 0.1, 0.0599, 0.04]], dtype=torch.float64)


def saying(logits: Tensor) -> Pass:
    return Pass([], [], [], logits)


def check_token_errors(function: Callable[..., tuple[dict[str, float], Tensor]]) -> None:
    """Q said where P is the reference; the token behind the first position is 1. Both rows' most likely token swaps in
    the second only; of the five most likely the first row has 4 in common."""
    says, said = saying(Q.log() + 3), saying(P.log())  # logits may be shifted: 3 shows in logit_max alone
    row, change = function(says, said, [0, 1])
    kl = [
        sum(p * math.log(p / q) for p, q in zip(a, b, strict=True)) for a, b in zip(P.tolist(), Q.tolist(), strict=True)
    ]
    moved = abs(math.log(0.3 / 0.2))
    expected = {
        "logit_max": 3 + math.log(2.5),
        "kl_mean": sum(kl) / 2,
        "kl_max": max(kl),
        "top1": 0.5,
        "top5": (4 / 5 + 1) / 2,
        "dlogp_p50": moved,
        "dlogp_p99": moved,
        "dlogp_max": moved,
    }
    assert row == pytest.approx(expected, rel=1e-9) and change.tolist() == pytest.approx([moved])


def test_token_errors_by_hand() -> None:
    check_token_errors(token_errors)


def test_faulty_metrics_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):  # KL the other way round
        check_token_errors(lambda says, said, ids: token_errors(said, says, ids))
    monkeypatch.setattr(impact, "following", lambda log_p, ids: log_p[:-1].gather(1, torch.tensor([ids[:-1]]).T)[:, 0])
    with pytest.raises(AssertionError):  # log p of the token itself instead of the next
        check_token_errors(token_errors)


def test_positions_behind_the_first_chunk_count(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(70, 16, generator=torch.Generator().manual_seed(0))
    moved = logits.clone()
    moved[69] = moved[69].flip(0)
    row, _ = token_errors(saying(moved), saying(logits), list(range(16)) * 4 + [0] * 6)
    expected = F.kl_div(moved[69].double().log_softmax(-1), logits[69].double().softmax(-1), reduction="sum").item()
    assert row["kl_max"] == pytest.approx(expected) and row["kl_mean"] == pytest.approx(expected / 70)


def test_following_and_parting_by_hand() -> None:
    log_p = torch.arange(12.0).reshape(4, 3)
    assert following(log_p, [2, 0, 1, 2]).tolist() == [0.0, 4.0, 8.0]
    logits = F.one_hot(torch.tensor([0, 2, 1, 0, 2]), 3)  # a prompt of two tokens; its last position chooses 2
    assert parting(logits, 2, [2, 1, 0]) == 3
    assert parting(logits, 2, [2, 0, 0]) == 1 and parting(logits, 2, [0, 1, 0]) == 0 and parting(logits, 1, [0]) == 1
