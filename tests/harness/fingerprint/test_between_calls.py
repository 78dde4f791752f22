"""What a callable keeps between calls, in which order it adds, and what gradients change: seen, or said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from norm_support import unit
from torch import Tensor

from castpoint.harness.fingerprint import facts
from castpoint.harness.fingerprint.norm import identify
from castpoint.harness.fingerprint.sizes import Sizes

MADE: dict[Any, Any] = {}


def hf(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * unit(x, eps).to(x.dtype)


def kept_by_identity(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Something made of a weight once, as long as that is the same tensor."""
    if MADE.get("of") is not weight:
        MADE.update(of=weight, wide=weight.float())
    return MADE["wide"].to(x.dtype) * unit(x, eps).to(x.dtype)


def kept_on_the_tensor(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if not hasattr(weight, "_wide"):
        weight._wide = weight.float()  # type: ignore[attr-defined]
    return weight._wide.to(x.dtype) * unit(x, eps).to(x.dtype)  # type: ignore[attr-defined]


def linear_kept(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float) -> Tensor:
    if not hasattr(weight, "_turned"):
        weight._turned = weight.t().contiguous()  # type: ignore[attr-defined]
    return hf(x, norm_weight, eps) @ weight._turned  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("fn", "kind"), [(kept_by_identity, "rmsnorm"), (kept_on_the_tensor, "head_norm"), (linear_kept, "norm_linear")]
)
def test_a_weight_written_in_place_is_seen(fn: Callable[..., Tensor], kind: str) -> None:
    answer = identify(fn, kind)
    assert answer.status == "none" and "with a weight that is written to between two calls" in answer.reason, answer


def aligned_weights(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return hf(x, weight.roll(weight.storage_offset()), eps)


def even_strides(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Rows begin where loads of two elements begin."""
    rows = torch.as_strided(x, x.shape, (x.stride(0) // 2 * 2, 1), x.storage_offset())
    return hf(rows, weight, eps)


@pytest.mark.parametrize(("fn", "why"), [(aligned_weights, "the weight alone"), (even_strides, "odd stride")])
def test_what_lies_at_odd_places_is_read_there(fn: Callable[..., Tensor], why: str) -> None:
    answer = identify(fn, "rmsnorm")
    assert answer.status == "none" and why in answer.reason, answer


def by_another_order(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Squares are added in blocks of 8 where there are many rows, else all one by one."""
    wide = x.float()
    parts = wide.square().unflatten(-1, (-1, 8))
    total = parts.sum(-1).sum(-1, keepdim=True) if len(x) > 32 else parts.sum(-2).sum(-1, keepdim=True)
    return weight * (wide * torch.rsqrt(total / x.shape[-1] + eps)).to(x.dtype)


def one_rounding_by_another_order(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    parts = wide.square().unflatten(-1, (-1, 16))
    total = parts.sum(-1).sum(-1, keepdim=True) if len(x) > 2 else parts.sum(-2).sum(-1, keepdim=True)
    return (wide * torch.rsqrt(total / x.shape[-1] + eps) * weight.float()).to(x.dtype)


def linear_by_another_order(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The matmul's sum is split in two where there are few rows."""
    hidden = hf(x, norm_weight, eps).float()
    half = x.shape[1] // 2 if len(x) < 16 else x.shape[1]
    return (
        hidden[:, :half] @ weight[:, :half].float().t() + hidden[:, half:] @ weight[:, half:].float().t()
    ).bfloat16()


@pytest.mark.parametrize(
    ("fn", "kind"),
    [
        (by_another_order, "rmsnorm"),
        (by_another_order, "head_norm"),
        (one_rounding_by_another_order, "rmsnorm"),
        (linear_by_another_order, "norm_linear"),
    ],
)
def test_another_order_of_a_sum_is_not_batch_invariant(fn: Callable[..., Tensor], kind: str) -> None:
    answer = identify(fn, kind)
    assert answer.status == "identified", answer.reason
    assert answer.facts["batch invariant"].startswith("no: "), answer.facts


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("width", [64, 96, 112, 128, 192, 768, 896, 1023, 1024, 1536, 3072, 6144, 7168, 8192])
def test_rows_near_a_tie_show_another_order(width: int, dtype: str) -> None:
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    x, eps = facts.rows_near_a_tie(width, torch.Generator().manual_seed(1), 64, dtype)
    rows, ones = x.to(kind), torch.ones(width, dtype=kind)
    assert torch.equal(rows.float(), x)
    other = torch.nn.functional.pad(rows, (0, width % 2)), torch.nn.functional.pad(ones, (0, width % 2))
    assert (in_pairs(*other, eps, width)[:, :width] != hf(rows, ones, eps)).any(1).sum() >= 16


CHAINS = [
    *(
        (other, most, dtype, 0, None)
        for other, most in (("", 0), ("q", 4), ("k", 100), ("x", 4))
        for dtype in ("bf16", "fp16")
    ),
    *((other, 4, "bf16", offset, only) for other in "qk" for offset, only in ((1, None), (0, 128))),
]


@pytest.mark.parametrize(("other", "most", "dtype", "offset", "only"), CHAINS)
def test_another_order_of_a_norms_sum_in_a_chain_is_not_batch_invariant(
    other: str, most: int, dtype: str, offset: int, only: int | None
) -> None:
    """Up to so many rows, with 1 + w, or for one head_dim; the projection is in float64, whose order does not show."""

    def fn(x, norm_weight, qkv_weight, q_norm_weight, k_norm_weight, eps, num_q_heads, num_kv_heads):
        if only and len(q_norm_weight) != only:
            raise ValueError(f"head_dim {only}")
        few = [name == other and len(x) <= most for name in "xqk"]
        norms = [in_pairs if apart else hf for apart in few]
        norm_weight, *heads = (offset + weight for weight in (norm_weight, q_norm_weight, k_norm_weight))
        hidden = norms[0](x, norm_weight, eps).double() @ qkv_weight.double().t()
        sizes = [num_q_heads, num_kv_heads, num_kv_heads]
        q, k, v = hidden.to(x.dtype).unflatten(1, (-1, len(q_norm_weight))).split(sizes, 1)
        return norms[1](q, heads[0], eps), norms[2](k, heads[1], eps), v

    answer = identify(fn, "qkv", sizes=Sizes(dtype=dtype))
    assert answer.status == "identified", answer
    assert answer.facts["batch invariant"].startswith("no: a row of 1024 " if other else "yes, in 64 "), answer.facts


def in_pairs(x: Tensor, weight: Tensor, eps: float, width: int = 0) -> Tensor:
    """hf's, whose sum is of the even channels and of the odd ones."""
    total = x.float().square().unflatten(-1, (-1, 2)).sum(-2).sum(-1, keepdim=True)
    return weight * (x.float() * torch.rsqrt(total / (width or x.shape[-1]) + eps)).to(x.dtype)


BUFFER = torch.empty(1 << 25, dtype=torch.bfloat16)


def into_one_buffer(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return BUFFER[: x.numel()].view(x.shape).copy_(hf(x, weight, eps))


def otherwise_in_training(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps) if torch.is_grad_enabled() else hf(x, weight, eps)


def with_its_roots(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return hf(x, weight, eps), torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)


def test_what_a_caller_must_know_is_said() -> None:
    assert "result" not in identify(hf, "rmsnorm").facts
    assert identify(hf, "rmsnorm").facts["with gradients"] == "the same"
    assert "written over" in identify(into_one_buffer, "rmsnorm").facts["result"]
    assert identify(otherwise_in_training, "rmsnorm").facts["with gradients"].startswith("another function")
    assert "float32 of 2 dimensions" in identify(with_its_roots, "rmsnorm").facts["beside y"]


def sum_first(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, hf(total, weight, eps)


def sum_in_x(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x += residual
    return hf(x, weight, eps), x


def swapped(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    x += residual
    residual.copy_(hf(x, weight, eps))


def swapped_and_returned(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    swapped(x, residual, weight, eps)
    return x, residual


@pytest.mark.parametrize(
    ("fn", "where"),
    [
        (sum_first, "is returned"),
        (sum_in_x, "is written into x"),
        (swapped, "is written into x"),
        (swapped_and_returned, "is written into x"),
    ],
)
def test_the_sum_is_found_wherever_it_is(fn: Callable[..., Any], where: str) -> None:
    answer = identify(fn, "rmsnorm")
    assert answer.plans[:1] == ["hf"] and answer.facts["x + residual"].startswith(where), answer
    assert answer.facts.get("y") == ("is written into residual" if fn in (swapped, swapped_and_returned) else None)


def a_sum_of_another_kind(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = hf(x + residual, weight, eps)
    residual.add_(x, alpha=2)
    return y


def test_what_is_written_and_is_no_sum_is_said() -> None:
    answer = identify(a_sum_of_another_kind, "rmsnorm")
    assert (
        answer.reason == "the callable writes into residual what is not x + residual, beside its result: give it a copy"
    )


def two_faced(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return hf(x, weight, eps) if torch.compiler.is_compiling() else F.rms_norm(x, (x.shape[-1],), weight, eps)


def test_a_compiled_function_is_never_asked_as_it_is_written() -> None:
    """Dynamo would run it so past eight shapes."""
    with torch._dynamo.config.patch(recompile_limit=8):
        answer = identify(torch.compile(two_faced, backend="eager"), "rmsnorm")
    assert answer.plans[:1] == ["hf"] and answer.facts["gaps between channels"] == "read as they lie", answer
    assert answer.facts["with gradients"] == "the same" and answer.facts["fp32 weights"].endswith("hidden=fp32")


BY_ADDRESS: dict[tuple[int, int], Tensor] = {}


def kept_by_address(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """An address may come again with the numbers that it had."""
    kept = BY_ADDRESS.setdefault((weight.data_ptr(), weight.numel()), weight.float())
    return (unit(x, eps) * kept).to(x.dtype)


class Version(torch.nn.Module):
    """Makes something of its weight again when that was written to."""

    def __init__(self, size: int = 256, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16)), eps
        self.made, self.version = torch.empty(0), -1

    def forward(self, x: Tensor) -> Tensor:
        if self.version != self.weight._version:
            self.made, self.version = self.weight.detach().clone(), self.weight._version
        return self.made * unit(x, self.eps).to(x.dtype)


def test_weights_kept_by_address_and_by_version() -> None:
    answer = identify(kept_by_address, "rmsnorm")
    assert not answer.candidates, answer
    assert identify(Version(), "rmsnorm", sizes=Sizes(width=256)).plans[:1] == ["hf"]


def in_place(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    residual.add_(x)
    x.copy_(hf(residual, weight, eps))


@torch.no_grad()
def cut_off(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return hf(x, weight, eps)


def other_eps_in_training(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return hf(x, weight, 0.0 if x.requires_grad else eps)


def linear_in_training(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float) -> Tensor:
    return hf(x, norm_weight, eps) @ weight.t() * (2 if x.requires_grad else 1)


def test_gradients_of_what_is_written_in_place_cut_off_or_of_a_chain() -> None:
    said = [identify(fn, "rmsnorm").facts["with gradients"] for fn in (in_place, cut_off, other_eps_in_training)]
    assert said[:2] == ["the same", "the same, but the result has none"], said
    assert said[2].startswith("another function"), said
    assert identify(linear_in_training, "norm_linear").facts["with gradients"].startswith("another function")


def of_9_to_16_rows(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    squares = x.float().square()
    total = squares.cumsum(-1)[..., -1:] if 9 <= len(x) <= 16 else squares.sum(-1, keepdim=True)
    return weight * (x.float() * torch.rsqrt(total / x.shape[-1] + eps)).to(x.dtype)


def of_few_wide_rows(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    squares, split = x.float().square(), len(x) <= 16 and x.shape[-1] >= 1024
    total = squares.cumsum(-1)[..., -1:] if split else squares.sum(-1, keepdim=True)
    return weight * (x.float() * torch.rsqrt(total / x.shape[-1] + eps)).to(x.dtype)


@pytest.mark.parametrize("fn", [of_9_to_16_rows, of_few_wide_rows])
def test_buckets_of_rows_and_wide_rows_are_asked(fn: Callable[..., Tensor]) -> None:
    answer = identify(fn, "rmsnorm")
    assert answer.plans[:1] == ["hf"] and answer.facts["batch invariant"].startswith("no: "), answer


def linear_with_the_sum_first(
    x: Tensor, residual: Tensor, norm_weight: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, hf(total, norm_weight, eps) @ weight.t()


def linear_with_the_sum_in_x(x: Tensor, residual: Tensor, norm_weight: Tensor, weight: Tensor, eps: float) -> Tensor:
    return hf(x.add_(residual), norm_weight, eps) @ weight.t()


@pytest.mark.parametrize(
    ("fn", "where"), [(linear_with_the_sum_first, "is returned"), (linear_with_the_sum_in_x, "is written into x")]
)
def test_the_sum_of_a_projection_is_found_wherever_it_is(fn: Callable[..., Any], where: str) -> None:
    answer = identify(fn, "norm_linear")
    assert answer.plans[:1] == ["hf"] and answer.facts["x + residual"].startswith(where), answer
