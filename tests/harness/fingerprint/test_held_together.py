"""What is right at one shape is asked at all: each eps, other weights, layouts, a bias, a scaled sum, scales of 8 bits;
and gates in fp16, without a weight, with and without a residual. Each of these was once passed, or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from norm_support import unit
from torch import Tensor
from torch.nn import functional

from castpoint.harness.fingerprint.layouts import CONTIGUOUS
from castpoint.harness.fingerprint.norm import identify
from castpoint.harness.fingerprint.questions import EPS, LAYOUTS, moved
from castpoint.harness.fingerprint.sizes import ANY, Sizes
from castpoint.variants.eager import eager_norm


def hf(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return eager_norm(x, w, eps, False)


def second_pass(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """Of wide rows x is read again, as if its rows followed each other."""
    rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    wide = x.shape[1] > 1024
    again = torch.as_strided(x, x.shape, (x.shape[1], 1), x.storage_offset()) if wide else x
    return (again.float() * rstd).bfloat16() * w


def kept_by_shape() -> Callable[..., Tensor]:
    weights: dict[torch.Size, Tensor] = {}

    def fn(x: Tensor, w: Tensor, eps: float) -> Tensor:
        return hf(x, weights.setdefault(w.shape, w.clone()) if len(w) > 256 else w, eps)

    return fn


def heads_in_turn(x: Tensor, w: Tensor, eps: float) -> Tensor:
    many, (_, heads, size) = x.shape[1] >= 16, x.shape
    return hf(torch.as_strided(x, x.shape, (heads * size, size, 1), x.storage_offset()) if many else x, w, eps)


FAULTS: dict[str, tuple[str, Callable[..., Tensor], str]] = {
    "eps of one token": ("rmsnorm", lambda x, w, eps: hf(x, w, eps if len(x) > 1 else 1e-6), "x [1, 4096], eps=1e-05"),
    "eps of wide rows": (
        "rmsnorm",
        lambda x, w, eps: hf(x, w, eps if x.shape[1] < 5000 else 1e-6),
        "x [5, 5120], eps=",
    ),
    "eps of heads of 64": ("head_norm", lambda x, w, eps: hf(x, w, 1e-6 if x.shape[2] == 64 else eps), ", 64], eps="),
    "a second pass": ("rmsnorm", second_pass, "x [4, 2304], eps=1.5625e-07, rows of an odd stride, another weight "),
    "weights kept by their shape": ("rmsnorm", kept_by_shape(), "x [1, 4096], eps=1e-05, contiguous, another weight"),
    "strides of many heads": ("head_norm", heads_in_turn, "[600, 16, 128], eps="),
    "heads of 72": ("head_norm", lambda x, w, eps: hf(x, w, eps) * (1 + (x.shape[2] == 72)), "with x [3, 4, 72] "),
    "heads beyond 512": ("head_norm", lambda x, w, eps: hf(x, w, eps) * (1 + (x.shape[2] > 512)), "[2, 2, 576] "),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_at_other_shapes_alone(name: str) -> None:
    kind, fn, reason = FAULTS[name]
    answer = identify(fn, kind)
    assert answer.status == "none" and reason in answer.reason, answer


def test_a_layout_that_is_refused_is_not_asked_again() -> None:
    def fn(x: Tensor, w: Tensor, eps: float) -> Tensor:
        if not x.is_contiguous():
            raise ValueError("x must be contiguous")
        return hf(x, w, eps) if eps != 1e-8 or x.shape[1] != 5376 else hf(x, w, 1e-6)

    answer = identify(fn, "rmsnorm")
    assert answer.status == "none" and "with x [16, 5376], eps=1e-08, " in answer.reason, answer
    assert not [c for c in answer.asked if c["about"] == "together" and c["result"].startswith("refused")]


# ---------------------------------------------------------------- a bias, a scaled sum


def biased(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def fn(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return (unit(x, eps) * weight.float() + change(bias, x).float()).bfloat16()

    return fn


BIASES = {
    "its tail": (lambda bias, x: bias * (torch.arange(len(bias)) < len(bias) // 128 * 128), "a bias, x [6, 1001]"),
    "of one token": (lambda bias, x: bias * (len(x) > 1), "with a bias, x [1, 4096]"),
    "of wide rows": (lambda bias, x: bias * (torch.arange(len(bias)) < 6144), "with a bias, x [8, 8192]"),
    "16 bytes at once": (
        lambda bias, x: torch.as_strided(bias, bias.shape, bias.stride(), bias.storage_offset() // 8 * 8),
        "it does not read the bias from where it begins",
    ),
}


@pytest.mark.parametrize("name", BIASES)
def test_a_bias_is_asked_at_every_shape(name: str) -> None:
    change, reason = BIASES[name]
    answer = identify(biased(change), "rmsnorm")
    assert answer.status == "none" and reason in answer.reason, answer


def with_fma(x: Tensor, weight: Tensor, eps: float, residual: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    factor = torch.tensor(alpha).double()
    total = (x.double() + residual.double() * factor).bfloat16()
    return hf(total, weight, eps), total


def without(x: Tensor, weight: Tensor, eps: float, residual: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    total = x + residual * alpha
    return hf(total, weight, eps), total


@pytest.mark.parametrize(("fn", "word"), [(with_fma, "not rounded"), (without, "bf16-rne")])
def test_a_scaled_sum_and_how_its_product_is_held(fn: Callable[..., object], word: str) -> None:
    answer = identify(fn, "rmsnorm")
    assert answer.plans == ["hf"] and f"residual * alpha is {word} before the sum" in answer.facts["alpha"], answer
    assert answer.facts["x + residual"] == "is returned" and "beside y" not in answer.facts


def another_sum(x: Tensor, weight: Tensor, eps: float, residual: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    return hf(x + residual * alpha, weight, eps), x + residual


def another_in_place(x: Tensor, weight: Tensor, eps: float, residual: Tensor, alpha: float) -> Tensor:
    y = hf(x + residual * alpha, weight, eps)
    residual.add_(x)
    return y


def of_narrow_rows(x: Tensor, weight: Tensor, eps: float, residual: Tensor, alpha: float) -> Tensor:
    return hf(x + residual * (alpha if x.shape[1] < 8192 else 1.0), weight, eps)


@pytest.mark.parametrize(
    ("fn", "said"),
    [
        (
            another_sum,
            "with alpha=0.22: the callable returns a tensor of x's shape beside its result, and it is not x",
        ),
        (another_in_place, "with alpha=0.22: the callable writes into residual what is not x + residual"),
        (of_narrow_rows, "with alpha=0.22, x [8, 8192], eps="),
    ],
)
def test_a_scaled_sum_that_is_another(fn: Callable[..., object], said: str) -> None:
    answer = identify(fn, "rmsnorm")
    assert not answer.candidates and said in answer.reason, answer


# ---------------------------------------------------------------- 8 bits


def by_row(columns: int | None = None, few: float = 1.0) -> Callable[..., tuple[Tensor, Tensor]]:
    def fn(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y = unit(x, eps) * weight.float()
        scale = y[..., :columns].abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448
        scale = scale * few if len(x) <= 4 else scale
        return (y / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale

    return fn


def to_powers(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y = unit(x, eps) * weight.float()
    scale = 2.0 ** torch.ceil(torch.log2(y.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448))
    return (y / scale).to(torch.float8_e4m3fn), scale


def of_all(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y = unit(x, eps) * weight.float()
    scale = y.abs().amax().reshape(1) / 448
    return (y / scale).to(torch.float8_e4m3fn), scale


def unscaled(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (unit(x, eps) * weight.float()).clamp(-448, 448).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("fn", [by_row(), to_powers, of_all, unscaled])
def test_scales_that_follow_the_results(fn: Callable[..., object]) -> None:
    assert identify(fn, "rmsnorm").status == "identified"


@pytest.mark.parametrize(
    ("fn", "said"),
    [
        (by_row(4096), "times its scale, at the first calls 448 times"),
        (by_row(few=0.5), "with x [1, 4096] 100.00% of the scales differ, the largest result is 896 times its scale"),
        (by_row(few=2.0), "with x [1, 4096] 100.00% of the scales differ, the largest result is 224 times its scale"),
    ],
)
def test_scales_that_do_so_at_some_shapes_alone(fn: Callable[..., object], said: str) -> None:
    answer = identify(fn, "rmsnorm")
    assert answer.status == "none" and said in answer.reason, answer


def test_heads_in_8_bits() -> None:
    def fixed(x: Tensor, weight: Tensor, eps: float, scale: Tensor) -> Tensor:
        return (unit(x, eps) * weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)

    for fn in (fixed, by_row()):
        answer = identify(fn, "head_norm")
        words = answer.candidates[0]
        assert answer.status == "identified" and (words["out"], words["stored"]) == ("fp32", "e4m3-rne"), answer
        assert words["head_normed"] == "fp32" and answer.plans == []


# ---------------------------------------------------------------- gates

ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "sigmoid": torch.sigmoid,
    "gelu": functional.gelu,
    "relu": torch.relu,
    "": lambda gate: gate,
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("first", [False, True])
def test_gates_in_fp16(act: str, first: bool) -> None:
    def fn(x: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
        factor = ACTS[act](gate.float())
        y = unit(x.float() * factor, eps) if first else unit(x, eps) * factor
        return (y * weight.float()).half()

    answer = identify(fn, "rmsnorm", sizes=Sizes(dtype="fp16"))
    assert answer.status == "identified" and act in answer.facts["gate"], answer


@pytest.mark.parametrize("kind", ["rmsnorm", "head_norm"])
def test_a_gate_without_a_weight(kind: str) -> None:
    def fn(x: Tensor, gate: Tensor, eps: float) -> Tensor:
        return (unit(x, eps) * functional.silu(gate.float())).bfloat16()

    answer = identify(fn, kind)
    assert answer.status == "identified" and answer.facts["gate"] == "norm(x) * silu(gate)", answer
    assert answer.candidates[0]["weight"] == "none"


def test_a_gate_that_is_another_with_a_residual() -> None:
    def fn(x: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        y = unit(x if residual is None else x + residual, eps) * weight.float()
        act = functional.silu if residual is None else torch.sigmoid
        return (y if gate is None else y * act(gate.float())).bfloat16()

    answer = identify(fn, "rmsnorm")
    assert answer.status == "none" and answer.reason == (
        "two functions: with residual and gate norm(x) * sigmoid(gate), with gate norm(x) * silu(gate)"
    )


def test_a_gate_beside_8_bits_is_said_not_to_be_asked() -> None:
    def fn(x: Tensor, weight: Tensor, gate: Tensor, eps: float, scale: Tensor) -> Tensor:
        y = unit(x, eps) * weight.float() * functional.silu(gate.float())
        return (y / scale).clamp(-448, 448).to(torch.float8_e4m3fn)

    answer = identify(fn, "rmsnorm")
    assert answer.status == "error" and answer.reason.startswith("a gate beside a result of 8 bits is not asked"), (
        answer
    )


# ---------------------------------------------------------------- what it costs


@pytest.mark.parametrize(("more", "pairs"), [(0, len(EPS)), (1, len(EPS)), (3, 2 * len(EPS))])
def test_each_eps_and_each_layout_in_few_pairs(more: int, pairs: int) -> None:
    """torch.compile makes a program of each pair, for a second or more."""
    taken = dict.fromkeys((CONTIGUOUS, *LAYOUTS, *map(str, range(more))))
    asked = {(eps, layout) for _, eps, _, layout in (moved(i, taken, ANY) for i in range(40))}
    assert len(asked) == pairs
    assert {eps for eps, _ in asked} == set(EPS) and {layout for _, layout in asked} == set(taken)


# ---------------------------------------------------------------- what is said


def test_what_is_not_asked_is_said() -> None:
    def fn(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, casting_mode: str = "llama") -> Tensor:
        return hf(x, weight, eps)

    facts = identify(fn, "rmsnorm").facts
    assert facts["not asked"] == "offset=0.0, casting_mode='llama', as it is by default"
    assert "not asked" not in identify(hf, "rmsnorm").facts


def test_x_of_three_dimensions_is_said() -> None:
    def in_turn(x: Tensor, w: Tensor, eps: float) -> Tensor:
        if x.ndim == 3:
            x = torch.as_strided(x, x.shape, (x.shape[1] * x.stride(1), x.stride(1), 1), x.storage_offset())
        return hf(x, w, eps)

    def flat(x: Tensor, w: Tensor, eps: float) -> Tensor:
        if x.ndim != 2:
            raise ValueError("x has two dimensions")
        return hf(x, w, eps)

    said = [identify(fn, "rmsnorm").facts["x [B, S, D] of longer rows"] for fn in (hf, in_turn, flat)]
    assert said[0] == "the same" and said[1].startswith("another function, ") and said[2].startswith("refused: ")
