"""Forms that engines have beside the usual ones: other outputs, other shapes, constants that are types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from norm_support import unit
from rope_kernels import turned
from torch import Tensor

from castpoint.harness.fingerprint import pairs, rope
from castpoint.harness.fingerprint.comparison import compare
from castpoint.harness.fingerprint.forms import adapted
from castpoint.harness.fingerprint.kinds import guessed_kind
from castpoint.harness.fingerprint.norm import identify
from castpoint.harness.fingerprint.sizes import ANY


def hf(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * unit(x, eps).to(x.dtype)


def sum_apart(
    out: Tensor, input: Tensor, residual_in: Tensor, residual_out: Tensor, weight: Tensor, epsilon: float
) -> None:
    """As AITER's rmsnorm2d_fwd_with_add."""
    residual_out.copy_(input + residual_in)
    out.copy_(hf(residual_out, weight, epsilon))


def wrong_sum_apart(
    out: Tensor, input: Tensor, residual_in: Tensor, residual_out: Tensor, weight: Tensor, epsilon: float
) -> None:
    residual_out.copy_(input)
    out.copy_(hf(input + residual_in, weight, epsilon))


def in_batches(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _, _, _ = x.shape
    return hf(x, weight, eps)


def wrong_in_batches(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Right of the first 128 tokens."""
    _, _, _ = x.shape
    return torch.cat([hf(x[:, :128], weight, eps), 2 * hf(x[:, 128:], weight, eps)], dim=1)


def with_options(x: Tensor, *, weight: Tensor, eps: float, **options: Any) -> Tensor:
    assert not options
    return hf(x, weight, eps)


def to_a_type(x: Tensor, w: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return hf(x, w, eps).to(dtype)


@pytest.mark.parametrize(
    ("fn", "call", "said"),
    [
        (sum_apart, "", ("x + residual", "is written into residual_out")),
        (in_batches, "", ("x", "is taken as [1, T, D] alone")),
        (with_options, "", ("NaN in x", "makes its row NaN")),
        (to_a_type, "fn(x, w, eps, torch.bfloat16)", ("NaN in x", "makes its row NaN")),
        (to_a_type, "fn(x, w, eps, dtype=torch.float32)", ("NaN in x", "makes its row NaN")),
    ],
)
def test_a_norm_is_asked_in_its_form(fn: Callable[..., Any], call: str, said: tuple[str, str]) -> None:
    answer = identify(fn, "rmsnorm", call=call)
    assert answer.facts.get(said[0]) == said[1], answer
    assert answer.plans[:1] == ["hf"] or "float32" in call, answer


def test_what_is_wrong_in_its_form_is_seen() -> None:
    assert "is not x + residual" in identify(wrong_sum_apart, "rmsnorm").reason
    assert identify(wrong_in_batches, "rmsnorm").status == "none"
    assert "is no constant" in identify(to_a_type, "rmsnorm", call="fn(x, w, eps, torch.nonsense)").reason


def with_a_residual(x: Tensor, residual: Tensor, norm_weight: Tensor, weight: Tensor, eps: float) -> Tensor:
    return hf(x + residual, norm_weight, eps) @ weight.t()


def weight_as_it_should_lie(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float) -> Tensor:
    return hf(x, norm_weight, eps) @ torch.as_strided(weight, weight.shape, (weight.shape[1], 1)).t()


def test_a_projection_with_a_residual_and_its_weight_in_memory() -> None:
    assert guessed_kind(adapted(with_options)) == "rmsnorm" and guessed_kind(with_a_residual) == "norm_linear"
    answer = identify(with_a_residual, "norm_linear")
    assert answer.plans[:1] == ["hf"] and answer.facts["transposed weight"] == "read as they lie", answer
    other = identify(weight_as_it_should_lie, "norm_linear").facts["transposed weight"]
    assert other.startswith("not read as they lie, and not refused"), other


def heads_flat(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, head_dim: int
) -> list[Tensor]:
    """q [T, Hq * Dh], k [T, Hkv * Dh], as a split of qkv has them."""
    half = head_dim // 2
    return [
        turned(hf(part.view(len(part), -1, head_dim), weight, eps).float(), cos[:, :half], sin[:, :half], {})
        .to(part.dtype)
        .flatten(1)
        for part, weight in ((q, q_weight), (k, k_weight))
    ]


def angles_as_they_should_lie(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> list[Tensor]:
    cos, sin = (torch.as_strided(part, part.shape, (part.shape[1], 1)) for part in (cos, sin))
    half = q.shape[2] // 2
    return [
        turned(hf(part, weight, eps).float(), cos[:, :half], sin[:, :half], {}).to(part.dtype)
        for part, weight in ((q, q_weight), (k, k_weight))
    ]


def angles_of_a_table(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, positions: Tensor, cos_sin_cache: Tensor
) -> list[Tensor]:
    cos, sin = cos_sin_cache[positions.long()].chunk(2, dim=1)
    return heads_flat(q.flatten(1), k.flatten(1), q_weight, k_weight, cos, sin, eps, q.shape[2])


def table_as_it_should_lie(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, positions: Tensor, cos_sin_cache: Tensor
) -> list[Tensor]:
    """Rows of the table where they would lie if it were contiguous."""
    rows = torch.as_strided(cos_sin_cache, cos_sin_cache.shape, (cos_sin_cache.shape[1], 1))[positions.long()]
    cos, sin = rows.chunk(2, dim=1)
    return heads_flat(q.flatten(1), k.flatten(1), q_weight, k_weight, cos, sin, eps, q.shape[2])


def test_a_table_and_positions_as_they_lie() -> None:
    read = rope.identify(angles_of_a_table).facts[pairs.APART]
    assert read == "read as they lie"
    answer = rope.identify(table_as_it_should_lie)
    assert answer.status == "identified" and answer.facts[pairs.APART].startswith("not read as they lie, and not"), (
        answer
    )


def test_flat_heads_and_views_of_angles() -> None:
    answer = rope.identify(heads_flat)
    assert answer.status == "identified" and answer.candidates[0]["rotation"] == "half", answer
    wrong = rope.identify(angles_as_they_should_lie)
    assert wrong.status == "none" and "as views of a wider buffer" in wrong.reason, wrong


def gated(x: Tensor, weight: Tensor, eps: float, gate: Tensor) -> Tensor:
    return hf(x, weight, eps) * torch.sigmoid(gate)


def gated_by_itself(x: Tensor, weight: Tensor, eps: float, gate: Tensor) -> Tensor:
    return hf(x, weight, eps) * torch.nn.functional.silu(gate)


def weight_first(w: Tensor, x: Tensor, e: float) -> Tensor:
    return hf(x, w, e)


def test_gates_calls_and_types_are_compared() -> None:
    assert compare(gated, gated, "rmsnorm", "cpu", ANY).same is True
    assert compare(gated, gated_by_itself, "rmsnorm", "cpu", ANY).same is False
    assert compare(hf, weight_first, "rmsnorm", "cpu", ANY, ("", "fn(w, x, eps)")).same is True
