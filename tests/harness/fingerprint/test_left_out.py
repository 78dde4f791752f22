"""Norms with a bias, and with an output that the caller may give: what is added or written is held to the answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from norm_support import only, unit
from torch import Tensor

from castpoint.harness.fingerprint.norm import identify
from castpoint.harness.fingerprint.questions import NORM_SHAPES
from castpoint.harness.fingerprint.stores import round_to
from castpoint.kernels.plan import KEEP, RNE, RTZ


@pytest.mark.parametrize("word", [KEEP, RNE, RTZ])
def test_a_bias_is_added(word: str) -> None:
    def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return (round_to(unit(x, eps) * weight.float(), word) + bias.float()).to(x.dtype)

    answer = identify(norm, "rmsnorm")
    if word == RTZ:  # cut, and then to nearest: no word has both
        assert answer.status == "none" and "a bias " in answer.reason, answer
        return
    assert only(answer)["hidden"] == RNE, answer
    assert answer.facts["bias"] == f"is added {'before' if word == KEEP else 'after'} the last rounding"
    asked = [c["what"] for c in answer.asked if c["about"] == "argument"]
    assert asked[0] == "a bias" and len(asked) == 1 + len(NORM_SHAPES)
    for what, shape in zip(asked[1:], NORM_SHAPES, strict=True):
        assert what.startswith(f"a bias, x {shape}, eps=")


def _no_bias(x: Tensor, weight: Tensor, eps: float, bias: Tensor | None = None) -> Tensor:
    return (unit(x, eps) * weight).to(x.dtype)


def _the_next_bias(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return (unit(x, eps) * weight + bias.roll(1)).to(x.dtype)


@pytest.mark.parametrize("fn", [_no_bias, _the_next_bias])
def test_a_wrong_bias(fn: Callable[..., Any]) -> None:
    answer = identify(fn, "rmsnorm")
    assert answer.status == "none" and "a bias " in answer.reason, answer


def test_a_bias_in_8_bits_is_said_not_to_be_asked() -> None:
    def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y = unit(x, eps) * weight.float()
        scale = (y.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-12)
        return (y / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale

    assert identify(norm, "rmsnorm").facts["bias"] == "not asked: it is zero"


@pytest.mark.parametrize("wrong", ["", "doubled", "left", "kept"])
def test_an_output_that_may_be_left_out(wrong: str) -> None:
    kept: list[Tensor] = []

    def norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        y = (unit(x, eps) * weight).to(x.dtype)
        if out is None or wrong == "left":
            return y
        return out.copy_(y * (2 if wrong == "doubled" else 1))

    def must(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        kept.append(out)
        kept[0].resize_(x.shape).copy_(unit(x, eps) * weight)
        return kept[0]

    answer = identify(must if wrong == "kept" else norm, "rmsnorm")
    if not wrong:
        assert only(answer)["normed"] == KEEP
        assert {"about": "argument", "what": "out given", "result": "same"} in answer.asked
    elif wrong == "doubled":
        assert answer.status == "none" and "out given 100.00% of the elements differ" in answer.reason, answer
    else:
        assert answer.status == "error" and "leaves as it is what was taken for an output" in answer.reason, answer
