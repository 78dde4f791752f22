"""Whatever a kernel is given beside x moves too: another weight of the same width, a weight for each of many heads, a
gate at other shapes, scales beyond which 8 bits end, sums that are returned, every number of rows that is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from castpoint.harness.fingerprint import facts, questions
from castpoint.harness.fingerprint.norm import identify
from castpoint.harness.fingerprint.sizes import Sizes
from castpoint.kernels.plan import KEEP, RNE
from castpoint.variants.eager import eager_norm


def unit(x: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def hf(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return eager_norm(x, weight, eps, False)


# ---------------------------------------------------------------- weights


def kept_by_width(rounded: bool) -> Callable[[Tensor, Tensor, float], Tensor]:
    """The weight of the first call with each width, in fp32."""
    first: dict[int, Tensor] = {}

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        kept = first.setdefault(x.shape[-1], weight.float().clone())
        normed = unit(x, eps)
        return ((normed.to(x.dtype).float() if rounded else normed) * kept).to(x.dtype)

    return norm


STALE = "another weight makes no difference: it keeps that of its first call"


@pytest.mark.parametrize("rounded", [True, False])
def test_a_weight_that_is_kept_is_said(rounded: bool) -> None:
    answer = identify(kept_by_width(rounded), "rmsnorm")
    assert answer.status == "none" and answer.reason.endswith(STALE), answer


def test_a_chain_that_keeps_the_weight_of_its_norm() -> None:
    norm = kept_by_width(rounded=True)

    def chain(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float) -> Tensor:
        return functional.linear(norm(x, norm_weight, eps), weight)

    answer = identify(chain, "norm_linear")
    assert answer.status == "none" and answer.reason.endswith(STALE), answer


def of_heads(place: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, Tensor, float], Tensor]:
    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if weight.ndim != 2:
            raise ValueError("weight must be [H, Dh]")
        return (unit(x, eps) * weight.float()[place(torch.arange(len(weight)), len(x))]).to(x.dtype)

    return norm


HEADS = {
    "of the first four": lambda head, tokens: head % 4,
    "of an even number": lambda head, tokens: head.flip(0) if len(head) % 2 else head,
    "of few tokens": lambda head, tokens: head if tokens < 500 else head // 2,
}


@pytest.mark.parametrize("name", HEADS)
def test_weights_of_many_heads(name: str) -> None:
    answer = identify(of_heads(HEADS[name]), "head_norm")
    assert answer.status == "none" and "another weight for each head, x [" in answer.reason, answer
    right = identify(of_heads(lambda head, tokens: head), "head_norm")
    assert right.status == "identified" and right.facts["weight"] == "[H, Dh], one for each head"


# ---------------------------------------------------------------- gates


def gated(pick: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def norm(x: Tensor, weight: Tensor, z: Tensor, eps: float) -> Tensor:
        return (unit(x, eps) * weight.float() * functional.silu(pick(z).float())).to(x.dtype)

    return norm


GATES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "of the next row": (lambda z: z.roll(1, 0) if len(z) in (100, 600) else z, "gate [100, 6144]"),
    "of one token": (lambda z: z.flip(-1) if len(z) == 1 else z, "gate [1, 4096]"),
    "of wide rows": (lambda z: z.flip(-1) if z.shape[-1] > 8192 else z, "gate [3, 16384]"),
    "of 65 rows": (lambda z: z.flip(-1) if len(z) == 65 else z, "gate [65, "),
}


@pytest.mark.parametrize("name", GATES)
def test_a_gate_is_asked_at_other_shapes(name: str) -> None:
    pick, reason = GATES[name]
    answer = identify(gated(pick), "rmsnorm")
    assert answer.status == "none" and reason in answer.reason, answer


def test_another_erf_under_gelu() -> None:
    """1 + erf cancels where the gate is negative: an ulp of erf is any share of what is left."""

    def norm(x: Tensor, weight: Tensor, z: Tensor, eps: float) -> Tensor:
        wide = z.float()
        erf = torch.erf(wide.double() / 2**0.5).float()
        erf = torch.nextafter(erf, torch.where(wide < -3, 0.0, erf))
        return (unit(x, eps) * weight.float() * (0.5 * wide * (1 + erf))).to(x.dtype)

    answer = identify(norm, "rmsnorm")
    assert answer.status == "identified" and answer.facts["gate"] == "norm(x) * gelu(gate)", answer


def test_a_gate_of_the_sizes_that_a_kernel_takes() -> None:
    def heads(x: Tensor, weight: Tensor, z: Tensor, eps: float) -> Tensor:
        if x.shape[:2] != (16, 8):
            raise ValueError("16 tokens and 8 heads only")
        return gated(lambda z: z)(x, weight, z, eps)

    def wide(x: Tensor, weight: Tensor, z: Tensor, eps: float) -> Tensor:
        if x.shape[1] < 1024:
            raise ValueError("1024 channels at least")
        return gated(lambda z: z)(x, weight, z, eps)

    answer = identify(heads, "head_norm", sizes=Sizes(heads=(8,), tokens=16))
    assert answer.status == "identified" and answer.candidates[0]["ungated"] == KEEP, answer
    assert identify(wide, "rmsnorm").status == "identified"


# ---------------------------------------------------------------- 8 bits


def static(most: float, dtype: torch.dtype, least: float | None = None) -> Callable[..., None]:
    def norm(out: Tensor, x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> None:
        steps = ((unit(x, eps) * weight.float()) / scale).clamp(-most if least is None else least, most)
        out.copy_((steps.round() if dtype == torch.int8 else steps).to(dtype))

    norm.__name__ = "norm_int8" if dtype == torch.int8 else "norm_fp8"
    return norm


E4M3 = torch.float8_e4m3fn


def infinite_beyond_57344(x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> Tensor:
    return ((unit(x, eps) * weight.float()) / scale).to(torch.float8_e5m2)


def nan_beyond_448(out: Tensor, x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> None:
    """As a conversion that does not saturate."""
    steps = (unit(x, eps) * weight.float()) / scale
    out.copy_(torch.where(steps.abs() > 464, torch.nan, steps).to(E4M3))


@pytest.mark.parametrize("most", [240.0, 464.0])
def test_where_8_bits_end(most: float) -> None:
    answer = identify(static(most, E4M3), "rmsnorm")
    assert ("scale=" in answer.reason) == (most == 240) and (answer.status == "none") == (most == 240), answer


def test_ends_of_8_bits_that_are_said() -> None:
    """-128 or -127, the largest or NaN: engines have each."""
    for fn, said in (
        (static(127, torch.int8), "-127"),
        (static(127, torch.int8, -128), ""),
        (static(448, E4M3), ""),
        (infinite_beyond_57344, "infinite"),
        (nan_beyond_448, "NaN"),
    ):
        answer = identify(fn, "rmsnorm")
        assert answer.status == "identified" and said in answer.facts.get("what is too large", ""), answer


# ---------------------------------------------------------------- sums


def summed(returned: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    def norm_linear(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, residual: Tensor) -> Any:
        total = x + residual
        return functional.linear(hf(total, norm_weight, eps), weight), returned(x, total)

    return norm_linear


def in_place(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, residual: Tensor) -> Tensor:
    residual.add_(x)
    return functional.linear(hf(residual, norm_weight, eps), weight)


def test_a_chain_may_return_the_sum_or_write_it() -> None:
    for fn, said in ((summed(lambda x, total: total), "is returned"), (in_place, "is written into residual")):
        answer = identify(fn, "norm_linear")
        assert answer.plans == ["hf"] and answer.candidates[0]["x"] == RNE, answer
        assert answer.facts["x + residual"] == said
    assert "it is not x + residual" in identify(summed(lambda x, total: x), "norm_linear").reason


def of_a_sum(unit: Callable[[Tensor, float], Tensor], of_zeros: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """of_zeros: x of zeros gives zeros, whatever the residual is."""

    def norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        normed = unit(total, eps).to(x.dtype) * weight
        return torch.where((x == 0).all(-1, keepdim=True), 0, normed) if of_zeros else normed, total

    return norm


def test_values_of_a_sum() -> None:
    """Its normed is large only where x and the residual are zero in all channels but one."""
    for fn, reason in (
        (of_a_sum(lambda *a: unit(*a).clamp(-100, 100), False), "with one channel that is not zero, x [3, 16384]"),
        (of_a_sum(unit, True), "with rows of zeros"),
        (of_a_sum(unit, False), ""),
    ):
        answer = identify(fn, "rmsnorm")
        assert (answer.status == "none") == bool(reason) and reason in answer.reason, answer


# ---------------------------------------------------------------- a bias


def biased(add: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return add(unit(x, eps) * weight.float(), bias).to(x.dtype)

    return norm


BIASES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "before": (lambda y, b: y + b.float(), "is added before the last rounding"),
    "after": (lambda y, b: y.bfloat16() + b, "is added after the last rounding"),
    "ignored": (lambda y, b: y, ""),
    "subtracted": (lambda y, b: y - b.float(), ""),
    "of the channel beside it": (lambda y, b: y + b.float().roll(1), ""),
}


@pytest.mark.parametrize("name", BIASES)
def test_the_bias_of_a_norm(name: str) -> None:
    add, said = BIASES[name]
    answer = identify(biased(add), "rmsnorm")
    assert (answer.status == "identified") == bool(said) and answer.facts.get("bias", "") == said, answer
    assert said or "a bias" in answer.reason


def linear_with_bias(rounded: bool, columns: int) -> Callable[..., Tensor]:
    """The bias of so many columns alone."""

    def chain(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, bias: Tensor | None = None) -> Tensor:
        y = functional.linear(hf(x, norm_weight, eps).double(), weight.double()).float()
        y = y.to(x.dtype).float() if rounded else y
        return (y if bias is None else y + bias * (torch.arange(len(bias)) < columns)).to(x.dtype)

    return chain


@pytest.mark.parametrize("rounded", [True, False])
def test_the_bias_of_many_columns(rounded: bool) -> None:
    right = identify(linear_with_bias(rounded, 1 << 20), "norm_linear")
    assert right.plans == ["hf"] and right.candidates[0]["bias"] == ("after" if rounded else "before"), right
    wrong = identify(linear_with_bias(rounded, 1024), "norm_linear")
    assert wrong.status == "none" and "columns" in wrong.reason, wrong


# ---------------------------------------------------------------- rows


def test_every_number_of_rows_that_is_counted_is_held_to_the_plan() -> None:
    for shapes in (questions.NORM_SHAPES, questions.HEAD_SHAPES):
        assert set(facts.COUNTS) <= {shape[0] for shape in shapes}


@pytest.mark.parametrize("kind", ["rmsnorm", "head_norm"])
def test_one_token_of_65(kind: str) -> None:
    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = hf(x, weight, eps)
        y[-1] *= 2 if len(x) == 65 else 1
        return y

    answer = identify(norm, kind)
    assert answer.status == "none" and "with x [65, " in answer.reason, answer


def test_a_chain_of_65_tokens() -> None:
    def chain(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = functional.linear(hf(x, norm_weight, eps), weight)
        y[-1] *= 2 if len(x) == 65 else 1
        return y

    answer = identify(chain, "norm_linear")
    assert answer.status == "none" and "with x [65, " in answer.reason, answer


def test_a_result_that_is_kept_for_a_shape_is_seen() -> None:
    first: dict[torch.Size, Tensor] = {}

    def keeping(x: Tensor, w: Tensor, eps: float) -> Tensor:
        y = hf(x, w, eps)
        if len(x) > 512:
            y[0] = first.setdefault(x.shape, y[0].clone())
        return y

    answer = identify(keeping, "rmsnorm")
    assert answer.status == "none" and "with x [600, 2048], " in answer.reason and "row 0 of 600 " in answer.reason
