"""What x is held to, every other input is: large and small values, places in memory; and numbers of tokens, widths and
heads together. Each of these was once taken for its plan, and what is right here once refused."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from norm_support import unit
from torch import Tensor
from torch.nn import functional

from castpoint.harness.fingerprint.norm import identify
from castpoint.harness.fingerprint.sizes import Sizes
from castpoint.kernels.plan import RNE
from castpoint.variants.eager import eager_norm


def hf(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return eager_norm(x, w, eps, False)


def rooted(x: Tensor, w: Tensor, eps: float, root: Callable[[Tensor], Tensor]) -> Tensor:
    """hf, with what root makes of its 1 / sqrt(variance + eps), or before of the variance."""
    wide = x.float()
    return (wide * root(wide.square().mean(-1, keepdim=True) + eps)).bfloat16() * w


def aligned(value: Tensor) -> Tensor:
    """As a kernel reads it that loads 16 bytes at once, from an address that it rounds down."""
    return torch.as_strided(value, value.shape, value.stride(), value.storage_offset() // 8 * 8)


def packed(value: Tensor) -> Tensor:
    return torch.as_strided(value, value.shape, torch.empty(value.shape, device="meta").stride())


# ---------------------------------------------------------------- x + residual


def added(make: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., object]:
    """hf of x and what make makes of x and the residual."""

    def fn(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> Tensor:
        return hf(x + make(x, residual), weight, eps)

    return fn


def returned(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual.clamp(-1000, 1000)
    return hf(total, weight, eps), total


RESIDUALS = {
    "saturated as in fp16": (added(lambda x, r: r.clamp(-65504, 65504)), "none", "2^20"),
    "clamped, and the sum returned": (returned, "error", "it is not x + residual"),
    "16 bytes at once where x is aligned": (
        added(lambda x, r: r if x.storage_offset() % 8 else aligned(r)),
        "none",
        "with the residual alone as a view at an offset of one element",
    ),
    "packed where x is": (
        added(lambda x, r: packed(r) if x.is_contiguous() else r),
        "none",
        "with the residual alone as rows of a packed buffer",
    ),
}


@pytest.mark.parametrize("name", RESIDUALS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_residual_that_is_not_read_as_it_is(name: str, dtype: str) -> None:
    fn, status, reason = RESIDUALS[name]
    if dtype == "fp16" and "fp16" in name:
        status = "identified"  # it has no such values
        reason = ""
    answer = identify(fn, "rmsnorm", sizes=Sizes(dtype=dtype))
    assert answer.status == status and reason in answer.reason, answer


def test_a_residual_of_heads_that_is_clamped() -> None:
    answer = identify(added(lambda x, r: r.clamp(-20, 20)), "head_norm")
    assert answer.status == "none" and "with x [16, 4, 128]" in answer.reason, answer


def kept_wide(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
    total = x.float() + residual.float()
    return unit(total, eps).half() * weight, total.half()


def sum_not_returned(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> Tensor:
    return unit(x + residual, eps).half() * weight


def in_place(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> Tensor:
    residual.add_(x)
    return unit(residual, eps).half() * weight


@pytest.mark.parametrize(
    ("fn", "word"),
    [(kept_wide, "fp32"), (sum_not_returned, "fp16-rne"), (in_place, "fp16-rne"), (sum_not_returned, "")],
)
def test_sums_of_fp16_show_their_rounding(fn: Callable[..., object], word: str) -> None:
    truncated = functools.wraps(fn)(lambda x, weight, eps, residual: fn(_toward_zero(x, residual), weight, eps, x * 0))
    answer = identify(fn if word else truncated, "rmsnorm", sizes=Sizes(dtype="fp16"))
    assert answer.status == "identified", answer
    assert answer.candidates[0]["x"] == (word or "fp16-rtz") and (answer.plans == ["hf"]) == (word == "fp16-rne")


def _toward_zero(x: Tensor, residual: Tensor) -> Tensor:
    from castpoint.harness.fingerprint.stores import round_to

    return round_to(x.float() + residual.float(), "fp16-rtz").half()


def test_a_result_that_is_returned_and_written_into_x() -> None:
    def fn(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> Tensor:
        residual.add_(x)
        y = hf(residual, weight, eps)
        x.copy_(y)
        return y

    answer = identify(fn, "rmsnorm")
    assert answer.plans == ["hf"] and answer.facts["y"] == "is returned, and written into x", answer
    assert answer.facts["x + residual"] == "is written into residual"


# ---------------------------------------------------------------- a gate, a bias, a weight, a root


def by_gate(x: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    return (unit(x, eps) * weight.float() * functional.silu(gate.float())).bfloat16()


def overflowing(x: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    power = gate.float().exp()
    return (unit(x, eps) * weight.float() * gate.float() * power / (1 + power)).bfloat16()


def x_aligned_as_the_gate(x: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    return by_gate(x if gate.storage_offset() % 8 else aligned(x), weight, gate, eps)


def gated_first(x: Tensor, weight: Tensor, gate: Tensor, eps: float, most: float = 40.0) -> Tensor:
    return (unit(x * functional.silu(gate.float().clamp(-most, most)), eps) * weight.float()).bfloat16()


GATED = {
    "power of e beyond fp32": (overflowing, "error", "with a gate of 1 to 16384: the callable returned NaN"),
    "clamped": (lambda x, weight, gate, eps: by_gate(x, weight, gate.clamp(-40, 40), eps), "none", "with a gate of 1"),
    "clamped before the norm": (gated_first, "none", "with a gate of 1 to 16384"),
    "x alone": (x_aligned_as_the_gate, "none", "x alone as a view at an offset of one element"),
    "gate alone": (
        lambda x, weight, gate, eps: by_gate(x, weight, gate if x.storage_offset() % 8 else aligned(gate), eps),
        "none",
        "it does not read the gate from where it begins, so let it clone() a view first",
    ),
}


@pytest.mark.parametrize("name", GATED)
def test_a_gate_that_is_not_read_as_it_is(name: str) -> None:
    fn, status, reason = GATED[name]
    answer = identify(fn, "rmsnorm")
    assert answer.status == status and reason in answer.reason, answer


ACTS = {
    "silu": lambda gate: gate / (1 + torch.exp(-gate)),
    "sigmoid": lambda gate: 0.5 + 0.5 * torch.tanh(0.5 * gate),
    "gelu": lambda gate: 0.5 * gate * (1 + torch.erf(gate * 0.5**0.5)),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("first", [False, True])
def test_gates_as_other_arithmetic_has_them(act: str, first: bool) -> None:
    def fn(x: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
        factor = ACTS[act](gate.float())
        y = unit(x * factor, eps) * weight.float() if first else unit(x, eps) * weight.float() * factor
        return y.bfloat16()

    answer = identify(fn, "rmsnorm")
    assert "one-rounding" in answer.plans and act in answer.facts["gate"], answer


ROOTS: dict[str, tuple[Callable[[Tensor, Tensor, float], Tensor], str]] = {
    "variance at least 1e-8": (
        lambda x, w, eps: rooted(x, w, 0.0, lambda v: torch.rsqrt(v.clamp(min=1e-8) + eps)),
        "x of 2^-20",
    ),
    "1 / sqrt at most 8000": (
        lambda *a: rooted(*a, lambda v: torch.rsqrt(v).clamp(max=8000)),
        "with eps=1e-08, x of 2^-20 100.00% of",
    ),
    "1 / sqrt that fp16 has": (
        lambda *a: rooted(*a, lambda v: torch.where(torch.rsqrt(v) < 2.0**-14, 0, torch.rsqrt(v))),
        "with rows scaled by 2^-20 to 2^20",
    ),
    "a weight of zero is none": (lambda x, w, eps: hf(x, torch.where(w == 0, 1, w), eps), "a weight of zeros and near"),
    "small weights flushed": (lambda x, w, eps: hf(x, w * (w.abs() > 9e-4), eps), "with a weight of zeros and near it"),
}


@pytest.mark.parametrize("name", ROOTS)
def test_small_values_of_weights_and_roots(name: str) -> None:
    fn, reason = ROOTS[name]
    answer = identify(fn, "rmsnorm")
    assert answer.status == "none" and reason in answer.reason, answer


def test_a_bias_that_is_clamped() -> None:
    def fn(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return (unit(x, eps) * weight.float() + bias.float().clamp(-8, 8)).bfloat16()

    answer = identify(fn, "rmsnorm")
    assert answer.status == "none" and "with a bias" in answer.reason, answer


@pytest.mark.parametrize("ulps", [-2, -1, 1, 2])
@pytest.mark.parametrize("kind", ["rmsnorm", "head_norm"])
def test_a_root_that_is_off_by_ulps_and_rounded_is_not_refused(ulps: int, kind: str) -> None:
    fn = functools.partial(rooted, root=lambda v: (torch.rsqrt(v) * (1 + ulps * 2.0**-23)).bfloat16().float())
    answer = identify(lambda x, weight, eps: fn(x, weight, eps), kind)
    assert answer.candidates and {words.get("rstd", words.get("head_rstd")) for words in answer.candidates} == {RNE}


# ---------------------------------------------------------------- what is said


def to_8_bits(x: Tensor, weight: Tensor, eps: float, low: float, high: float) -> tuple[Tensor, Tensor]:
    y = unit(x, eps) * weight.float()
    scale = (y.abs().amax(-1, keepdim=True) / 448).clamp(low, high)
    return (y / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (1e-30, 1e30, "the largest result is 448 times its scale"),
        (1e-30, 20.0, "scale; with a weight 2^10 times as large the largest result is 4.54e+03 to 7.86e+03"),
        (
            1e-5,
            1e30,
            "scale; with a weight 2^-20 times as large the largest result is 8.46 to 14.6 times its",
        ),
    ],
)
def test_the_ends_of_a_scale_are_said(low: float, high: float, said: str) -> None:
    answer = identify(lambda x, weight, eps: to_8_bits(x, weight, eps, low, high), "rmsnorm")
    assert answer.status == "identified" and said in answer.facts["scales"], answer
    assert ";" in said or ";" not in answer.facts["scales"]


def test_x_as_out_is_said() -> None:
    def right(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
        out.copy_(hf(x, weight, eps))

    def cleared(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
        out.zero_().copy_(hf(x, weight, eps))

    assert identify(right, "rmsnorm").facts["x as out"] == "the same"
    said = identify(cleared, "rmsnorm")
    assert said.plans == ["hf"] and said.facts["x as out"].startswith("another function, 100.00% of the elements")
    assert "y" not in said.facts


def test_a_view_is_not_said_to_lack_contiguous() -> None:
    answer = identify(lambda x, w, eps: hf(aligned(x), w, eps), "rmsnorm")
    assert answer.reason.endswith(
        "it does not read x from where it begins, so let it clone() a view first, or refuse it"
    )


# ---------------------------------------------------------------- shapes


def where(shape: Callable[..., bool]) -> Callable[..., Tensor]:
    return lambda x, w, eps: hf(x, w, eps) * (1 + shape(*x.shape))


def cut(count: Callable[[int], int]) -> Callable[..., Tensor]:
    def fn(x: Tensor, w: Tensor, eps: float) -> Tensor:
        y = hf(x, w, eps).clone()
        y[:, count(x.shape[1]) :] = 0
        return y

    return fn


SHAPES: dict[str, tuple[str, Callable[..., Tensor], str]] = {
    "wide rows of many tokens": ("rmsnorm", where(lambda t, d: t >= 32 and d >= 3072), "with x [32, 4096]"),
    "thousands of tokens": ("rmsnorm", where(lambda t, d: t >= 5000), "with x [8193, 64]"),
    "4 tokens": ("rmsnorm", where(lambda t, d: t == 4), "with x [4, 2304]"),
    "16 and 32 tokens": ("rmsnorm", where(lambda t, d: t in (16, 32)), "with x [16, 5376]"),
    "256 to 1024 tokens": ("rmsnorm", where(lambda t, d: t in (256, 512, 1024)), "with x [256, 640]"),
    "a quarter behind 1024": ("rmsnorm", cut(lambda d: d - 256 * (d > 1024 and d % 1024 == 256)), "with x [4, 2304]"),
    "channels behind a multiple of 8": ("rmsnorm", cut(lambda d: d // 8 * 8), "with x [6, 1001]"),
    "many heads of many tokens": ("head_norm", where(lambda t, h, d: h >= 32 and t >= 64), "with x [66, 32, 64]"),
    "heads of 160": ("head_norm", where(lambda t, h, d: d == 160), "with x [4, 12, 160]"),
    "heads of 192": ("head_norm", where(lambda t, h, d: d == 192), "with x [5, 6, 192]"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_together(name: str) -> None:
    kind, fn, reason = SHAPES[name]
    answer = identify(fn, kind)
    assert answer.status == "none" and reason in answer.reason, answer
