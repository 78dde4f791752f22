"""Norms that are right at one width, in one layout, or with one weight, and wrong elsewhere: none of them is passed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from norm_support import only, unit
from torch import Tensor, nn

from castpoint.harness.fingerprint.norm import identify

Eight = tuple[Tensor, Tensor]


def hf(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * unit(x, eps).to(x.dtype)


def in_blocks(x: Tensor, weight: Tensor, size: int, eps: float) -> Tensor:
    """The same weights for every block: its pointer stays."""
    blocks = -(-x.shape[-1] // size)
    return hf(x, weight[:size].repeat(blocks)[: x.shape[-1]], eps)


def blocks_of_1024(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return in_blocks(x, weight, 1024, eps)


def heads_of_128(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return in_blocks(x, weight, 128, eps)


def bias_in_blocks(x: Tensor, weight: Tensor, eps: float, bias: Tensor | None = None) -> Tensor:
    y = hf(x, weight, eps)
    return y if bias is None else y + bias[:1024].repeat(5)[: x.shape[-1]]


def gate_in_blocks(x: Tensor, weight: Tensor, eps: float, gate: Tensor) -> Tensor:
    return in_blocks(x, weight, 1024, eps) * torch.sigmoid(gate.float()).to(x.dtype)


def in_8_bits_in_blocks(x: Tensor, weight: Tensor, eps: float) -> Eight:
    return in_8_bits(in_blocks(x, weight, 1024, eps), 1)


@pytest.mark.parametrize(
    ("fn", "kind"),
    [
        (blocks_of_1024, "rmsnorm"),
        (heads_of_128, "head_norm"),
        (bias_in_blocks, "rmsnorm"),
        (gate_in_blocks, "rmsnorm"),
        (in_8_bits_in_blocks, "rmsnorm"),
    ],
)
def test_a_weight_that_begins_again_is_seen(fn: Callable[..., Tensor], kind: str) -> None:
    answer = identify(fn, kind)
    assert answer.status == "none" and "another function" in answer.reason, answer


def of_x_s_strides(value: Tensor, x: Tensor) -> Tensor:
    return torch.as_strided(value, x.shape, x.stride(), value.storage_offset())


def residual_as_x(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    held = of_x_s_strides(residual, x)
    held.copy_(x + held)
    return hf(held, weight, eps)


def residual_read_as_x(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return hf(x + of_x_s_strides(residual, x), weight, eps)


def out_as_x(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    of_x_s_strides(out, x).copy_(hf(x, weight, eps))


def contiguous_out(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    y = hf(x, weight, eps)
    return y if out is None else torch.as_strided(out, x.shape, (x.shape[-1], 1), out.storage_offset()).copy_(y)


@pytest.mark.parametrize("fn", [residual_as_x, residual_read_as_x, out_as_x, contiguous_out])
def test_strides_of_x_taken_for_another_s_are_seen(fn: Callable[..., Tensor]) -> None:
    answer = identify(fn, "rmsnorm")
    assert not answer.candidates and "rows of a packed buffer" in answer.reason, answer


class Keeps(nn.Module):
    """Makes 1 + w once."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps, self.applied = nn.Parameter(torch.zeros(size)), eps, None

    def forward(self, x: Tensor) -> Tensor:
        if self.applied is None:
            self.applied = 1 + self.weight.float()
        return (unit(x, self.eps) * self.applied).to(x.dtype)


class OfABuffer(nn.Module):
    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return hf(x, self.weight, self.eps)


class OfAnAttribute(nn.Module):
    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = torch.ones(size), eps

    def forward(self, x: Tensor) -> Tensor:
        return hf(x, self.weight, self.eps)


class OfTwoDimensions(nn.Module):
    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(1, size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return hf(x, self.weight[0], self.eps)


def test_a_class_that_keeps_its_first_weight_is_seen() -> None:
    assert "it keeps that of its first call" in identify(Keeps, "rmsnorm").reason


def test_a_weight_is_a_parameter_or_a_buffer() -> None:
    assert only(identify(OfABuffer, "rmsnorm"))["weight_offset"] == "none"
    for kind in (OfAnAttribute, OfTwoDimensions, OfAnAttribute(64)):
        answer = identify(kind, "rmsnorm")
        assert answer.status == "error" and "holds weight, which is no parameter or buffer" in answer.reason, answer


def in_8_bits(y: Tensor, part: int) -> Eight:
    """By the largest of the first part of each row."""
    wide = y.float()
    scale = (wide[..., : wide.shape[-1] // part].abs().amax(-1, keepdim=True) / 448).clamp(min=1e-12)
    return (wide / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


@pytest.mark.parametrize("part", [1, 2])
def test_what_a_scale_is_of_is_said(part: int) -> None:
    def norm(x: Tensor, weight: Tensor, eps: float) -> Eight:
        return in_8_bits(hf(x, weight, eps), part)

    said = identify(norm, "rmsnorm").facts["scales"]
    assert said.startswith("the largest result is 448") and ("beyond 448 it is cut" in said) == (part == 2), said


@torch.library.custom_op("castpoint_tests::norm", mutates_args=())
def as_custom_op(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return hf(x, weight, eps)


def test_an_operator_of_torch_library_is_asked() -> None:
    assert only(identify(as_custom_op, "rmsnorm"))["normed"] == "bf16-rne"


def test_a_call_that_would_not_be_taken_is_refused() -> None:
    assert "--call is for a function" in identify(Keeps, "rmsnorm", call="fn(x)").reason
    assert "--call is for norms" in identify(hf, "norm_linear", call="fn(x)").reason
