"""Chains without a head norm: a norm and a projection, as Llama's qkv, a gate_up or an output head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from castpoint.harness.fingerprint.blackbox import Way
from castpoint.harness.fingerprint.command import by_files
from castpoint.harness.fingerprint.comparison import compare
from castpoint.harness.fingerprint.kinds import guessed_kind
from castpoint.harness.fingerprint.norm import identify
from castpoint.harness.fingerprint.sizes import ANY
from castpoint.kernels.plan import KEEP, CastPlan
from castpoint.variants.backends import run
from castpoint.variants.catalogue import PLANS
from castpoint.variants.problem import Problem


def planned(plan: CastPlan) -> Callable[..., Tensor]:
    def fn(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, bias: Tensor | None = None) -> Tensor:
        heads = len(weight) // 64
        kv = heads // 4 if heads % 4 == 0 else 1
        offset = plan.weight_offset != "none"
        problem = Problem(x, norm_weight, weight, num_q_heads=heads - 2 * kv, num_kv_heads=kv, eps=eps,
                          weight_offset=offset, bias=bias)  # fmt: skip
        y = torch.cat([part.flatten(1) for part in run(plan, problem, "spec")], 1)
        return y.to(torch.float32 if plan.out == KEEP else torch.bfloat16)

    return fn


@pytest.mark.parametrize("name", ["hf", "one-rounding", "deferred", "fp32-tf32", "gemma", "folded", "fp32"])
def test_a_norm_and_a_projection(name: str) -> None:
    answer = identify(planned(PLANS[name].plan), "norm_linear")
    assert answer.status == "identified" and name in answer.plans, answer
    assert not {"proj", "head_rstd", "head_normed"} & set(answer.candidates[0])
    assert answer.candidates[0]["bias"] in ("before", "before or after")


def test_by_heads() -> None:
    chain = planned(PLANS["hf"].plan)

    def by_heads(
        x: Tensor, norm_weight: Tensor, qkv_weight: Tensor, eps: float, num_q_heads: int, num_kv_heads: int
    ) -> Any:
        y = chain(x, norm_weight, qkv_weight, eps)
        size = y.shape[1] // (num_q_heads + 2 * num_kv_heads)
        return y.split([size * num_q_heads, size * num_kv_heads, size * num_kv_heads], 1)

    assert guessed_kind(by_heads) == guessed_kind(chain) == "norm_linear"
    assert identify(by_heads, "norm_linear").plans == ["hf"]


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def _product(hidden: Tensor, weight: Tensor) -> Tensor:
    return (hidden.double() @ weight.double().T).to(hidden.dtype)


def split_k(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float) -> Tensor:
    hidden, half = _norm(x, norm_weight, eps), x.shape[1] // 2
    parts = [_product(hidden[:, at], weight[:, at]) for at in (slice(half), slice(half, None))]
    return parts[0] + parts[1]


def wrong_last_column(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = _product(_norm(x, norm_weight, eps), weight)
    y[:, -1] *= 2
    return y


def wrong_for_many_columns(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = _product(_norm(x, norm_weight, eps), weight)
    y[:, 2048:] = 0
    return y


def ignores_eps(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _product(_norm(x, norm_weight, 1e-6), weight)


def test_it_is_compared_and_asked_through_files() -> None:
    hf, one = planned(PLANS["hf"].plan), planned(PLANS["one-rounding"].plan)
    found = compare(hf, one, "norm_linear", "cpu", ANY)
    assert found.same is False and found.parts.startswith("normed"), found

    def run(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        weights = (tensors["norm_weight"], tensors["weight"])
        return {"y": hf(tensors["x"], *weights, tensors["eps"].item(), tensors.get("bias"))}

    answer = identify(by_files(run, "norm_linear", ("residual", "bias")), "norm_linear", way=Way(files=True))
    assert answer.plans == ["hf"] and "bias" in answer.candidates[0], answer


def wrong_for_few_columns(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _product(_norm(x, norm_weight, eps), weight) * (1 + (len(weight) < 128))


def columns_behind_a_multiple_of_16(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = _product(_norm(x, norm_weight, eps), weight)
    y[:, len(weight) // 16 * 16 :] = 0
    return y


def packed_rows(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows = torch.as_strided(weight, weight.shape, (weight.shape[1], 1)) if weight.stride(1) == 1 else weight
    return _product(_norm(x, norm_weight, eps), rows)


def test_rows_of_a_weight_that_do_not_follow_each_other_are_said() -> None:
    answer = identify(packed_rows, "norm_linear")
    assert answer.plans == ["hf"] and answer.facts["transposed weight"] == "read as they lie", answer
    assert answer.facts["sliced weight"].startswith("not read as they lie, and not refused: "), answer


WRONG = (split_k, wrong_last_column, wrong_for_many_columns, wrong_for_few_columns, columns_behind_a_multiple_of_16)


@pytest.mark.parametrize("fn", [*WRONG, ignores_eps])
def test_a_wrong_one(fn: Callable[..., Tensor]) -> None:
    answer = identify(fn, "norm_linear")
    assert answer.status == "none", answer
