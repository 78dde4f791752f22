"""A chain that is right at the deciding calls and wrong elsewhere is no plan: heads, KV heads, head sizes, widths,
tokens, layouts, values. Each part of the signature moves."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from castpoint.harness.fingerprint import known
from castpoint.harness.fingerprint.norm import identify, summary
from castpoint.harness.fingerprint.questions import ALONE
from castpoint.harness.fingerprint.sizes import Sizes
from castpoint.kernels.plan import KEEP
from castpoint.variants.catalogue import HF, ONE_ROUNDING
from castpoint.variants.eager import eager_norm

Chain = Callable[..., tuple[Tensor, ...]]
EAGER = known.chain(HF, "eager")


def where(wrong: Callable[..., bool], then: Chain | None = None) -> Chain:
    """hf, or another chain (k times 1.01) where x, the heads or the head size are such."""

    def fn(
        x: Tensor, w: Tensor, weight: Tensor, q_w: Tensor, k_w: Tensor, eps: float, heads: int, kv_heads: int
    ) -> tuple[Tensor, ...]:
        q, k, v = EAGER(x, w, weight, q_w, k_w, eps, heads, kv_heads)
        if not wrong(x=x, heads=heads, kv_heads=kv_heads, head_dim=len(q_w), eps=eps):
            return q, k, v
        return then(x, w, weight, q_w, k_w, eps, heads, kv_heads) if then else (q, k * 1.01, v)

    return fn


def split_k(x: Tensor, w: Tensor, weight: Tensor, q_w: Tensor, k_w: Tensor, eps: float, heads: int, kv: int) -> object:
    """Partial sums of 512 channels each, stored as bf16."""
    hidden = eager_norm(x, w, eps, False).float()
    parts = [h @ p.T for h, p in zip(hidden.split(512, 1), weight.float().split(512, 1), strict=True)]
    proj = sum(part.bfloat16() for part in parts) if len(parts) > 1 else parts[0].bfloat16()
    q, k, v = proj.reshape(len(x), -1, len(q_w)).split([heads, kv, kv], dim=1)
    return eager_norm(q, q_w, eps, False), eager_norm(k, k_w, eps, False), v


def second_head_copied(*arguments: object) -> tuple[Tensor, ...]:
    q, k, v = EAGER(*arguments)
    return q, k[:, :1].expand_as(k), v


def packed_rows_ignored(x: Tensor, *rest: object) -> tuple[Tensor, ...]:
    return EAGER(torch.as_strided(x, x.shape, (x.shape[1], 1)), *rest)


def head_eps_ignored(x: Tensor, w: Tensor, weight: Tensor, q_w: Tensor, k_w: Tensor, eps: float, *heads: int) -> object:
    _, _, v = EAGER(x, w, weight, q_w, k_w, eps, *heads)
    proj = (eager_norm(x, w, eps, False).double() @ weight.double().T).bfloat16().view(len(x), -1, len(q_w))
    q, k, _ = proj.split([heads[0], heads[1], heads[1]], dim=1)
    return eager_norm(q, q_w, 1e-6, False), eager_norm(k, k_w, 1e-6, False), v


def head_clamped(x: Tensor, w: Tensor, weight: Tensor, q_w: Tensor, k_w: Tensor, eps: float, *heads: int) -> object:
    """As EAGER, but that 1 / sqrt of a head is never above a thousand."""
    q, k, v = EAGER(x, w, weight, torch.ones_like(q_w), torch.ones_like(k_w), eps, *heads)
    proj = (eager_norm(x, w, eps, False).double() @ weight.double().T).bfloat16().view(len(x), -1, len(q_w))
    rstd = torch.rsqrt(proj.float().pow(2).mean(-1, keepdim=True) + eps)
    low = (proj.float() * rstd.clamp(max=1e3)).bfloat16()
    normed = torch.where(rstd > 1e3, low, torch.cat([q, k, v], 1))
    q, k, _ = normed.split([heads[0], heads[1], heads[1]], 1)
    return q * q_w, k * k_w, v


def normed_clamped(
    x: Tensor, w: Tensor, weight: Tensor, q_w: Tensor, k_w: Tensor, eps: float, *heads: int, most: float = 100.0,
    head_most: float = math.inf, hidden_most: float = math.inf,
) -> object:  # fmt: skip
    def normed(x: Tensor, w: Tensor, most: float) -> Tensor:
        return eager_norm(x, torch.ones_like(w), eps, False).clamp(-most, most) * w

    hidden = normed(x, w, most).clamp(-hidden_most, hidden_most)
    proj = (hidden.double() @ weight.double().T).bfloat16().view(len(x), -1, len(q_w))
    q, k, v = proj.split([heads[0], heads[1], heads[1]], dim=1)
    return normed(q, q_w, head_most), normed(k, k_w, head_most), v


def k_by_another_plan(*arguments: object) -> tuple[Tensor, ...]:
    q, _, v = EAGER(*arguments)
    return q, known.chain(HF.replace(head_normed=KEEP), "eager")(*arguments)[1], v


def added(wrong: str) -> Chain:
    """EAGER of x + residual, with a bias; of many heads each has the first one's bias, or rows of the residual follow
    each other whatever its stride."""

    def fn(
        x: Tensor, w: Tensor, weight: Tensor, q_w: Tensor, k_w: Tensor, eps: float, heads: int, kv_heads: int,
        bias: Tensor, residual: Tensor,
    ) -> object:  # fmt: skip
        bias = bias[: len(q_w)].repeat(heads + 2 * kv_heads) if wrong == "bias" and heads > 4 else bias
        residual = torch.as_strided(residual, x.shape, (x.shape[1], 1)) if wrong == "residual" else residual
        bias = bias.clamp(-16, 16) if wrong == "clamped" else bias
        residual = residual.clamp(-65504, 65504) if wrong == "saturated" else residual
        if wrong == "aligned" and residual.storage_offset() % 8 == 0:
            x = torch.as_strided(x, x.shape, x.stride(), x.storage_offset() // 8 * 8)
        hidden = eager_norm(x + residual, w, eps, False)
        proj = (hidden.double() @ weight.double().T + bias).bfloat16().view(len(x), -1, len(q_w))
        q, k, v = proj.split([heads, kv_heads, kv_heads], 1)
        return eager_norm(q, q_w, eps, False), eager_norm(k, k_w, eps, False), v

    return fn


def rest_dropped(x: Tensor, w: Tensor, weight: Tensor, q_w: Tensor, k_w: Tensor, eps: float, *heads: int) -> object:
    """A loop over blocks of 128 channels that ends at the last whole one, if there is one."""
    weight = weight.clone()
    weight[:, max(x.shape[1] // 128, 1) * 128 :] = 0
    return EAGER(x, w, weight, q_w, k_w, eps, *heads)


def root_at_most_8000(
    x: Tensor, w: Tensor, weight: Tensor, q_w: Tensor, k_w: Tensor, eps: float, *heads: int
) -> object:
    wide = x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    hidden = (wide * rstd.clamp(max=8000)).bfloat16() * w
    proj = (hidden.double() @ weight.double().T).bfloat16().view(len(x), -1, len(q_w))
    q, k, v = proj.split([heads[0], heads[1], heads[1]], 1)
    return eager_norm(q, q_w, eps, False), eager_norm(k, k_w, eps, False), v


def bias_after(
    x: Tensor, w: Tensor, weight: Tensor, q_w: Tensor, k_w: Tensor, eps: float, heads: int, kv_heads: int, bias: Tensor
) -> object:
    """Of q and k the bias is clamped."""
    few = (heads + kv_heads) * len(q_w)
    bias = torch.cat([bias[:few].clamp(-16, 16), bias[few:]])
    proj = (eager_norm(x, w, eps, False).double() @ weight.double().T).bfloat16() + bias
    q, k, v = proj.view(len(x), -1, len(q_w)).split([heads, kv_heads, kv_heads], 1)
    return eager_norm(q, q_w, eps, False), eager_norm(k, k_w, eps, False), v


FAULTS: dict[str, tuple[Chain, str]] = {
    "two kv heads": (second_head_copied, "16 and 8 heads of 128"),
    "split k from 1024 channels on": (split_k, "with x [1, 1024]"),
    "five heads": (where(lambda heads, **_: heads == 5), "with x [5, 2560]"),
    "heads of 80": (where(lambda head_dim, **_: head_dim == 80), "heads of 80"),
    "heads of 256": (where(lambda head_dim, **_: head_dim == 256), "heads of 256"),
    "one q head a kv head": (
        where(lambda heads, kv_heads, **_: heads == kv_heads),
        "with x [7, 4096], 1 and 1 heads of 128",
    ),
    "many heads": (where(lambda heads, **_: heads > 16), "64 and 8 heads of 128"),
    "many kv heads": (where(lambda kv_heads, **_: kv_heads > 8), "16 and 16 heads of 64"),
    "heads of 512": (where(lambda head_dim, **_: head_dim == 512), "1 and 1 heads of 512"),
    "thousands of tokens": (where(lambda x, **_: len(x) >= 2048), "with x [2049, 128]"),
    "the width of Qwen3 14B": (where(lambda x, **_: x.shape[1] == 5120), "with x [17, 5120]"),
    "a width of 896": (where(lambda x, **_: x.shape[1] == 896), "with x [33, 896]"),
    "another plan for many tokens": (
        where(lambda x, **_: len(x) > 512, known.chain(ONE_ROUNDING, "eager")),
        "with x [600, 256]",
    ),
    "another plan for one token": (
        where(lambda x, **_: len(x) == 1, known.chain(ONE_ROUNDING, "eager")),
        "with x [1, 1024]",
    ),
    "strides of x ignored": (packed_rows_ignored, "with rows of a packed buffer"),
    "normed clamped": (normed_clamped, f"with {ALONE}, 16384 channels, 1 and 1 heads of 64"),
    "hidden saturated as in fp16": (
        functools.partial(normed_clamped, most=math.inf, hidden_most=65504.0),
        f"with {ALONE}, 16384 channels, 1 and 1 heads of 64",
    ),
    "v saturated as in fp16": (
        lambda *a: (*EAGER(*a)[:2], EAGER(*a)[2].clamp(-65504, 65504)),
        f"with {ALONE}, 256 channels, 2 and 1 heads of 128",
    ),
    "normed of a head clamped": (
        functools.partial(normed_clamped, most=math.inf, head_most=20.0),
        f"with {ALONE}, 256 channels, 1 and 1 heads of 512",
    ),
    "weights of heads clamped": (
        lambda x, w, weight, q_w, k_w, *rest: EAGER(x, w, weight, q_w.clamp(max=150), k_w.clamp(max=150), *rest),
        "with norms' weights 1024 times as large",
    ),
    "weights of the input norm clamped": (
        lambda x, w, *rest: EAGER(x, w.clamp(max=150), *rest),
        "with norms' weights 1024 times as large",
    ),
    "x clamped": (lambda x, *rest: EAGER(x.clamp(-1e5, 1e5), *rest), "of q "),
    "an eps of its own": (where(lambda eps, **_: eps == 1e-5), "2 and 1 heads of 128, eps=1e-05"),
    "a head norm that ignores eps": (
        head_eps_ignored,
        "of q all is explained if it adds 1e-06 whatever eps is; of k all is",
    ),
    "many tokens of many kv heads": (where(lambda x, kv_heads, **_: len(x) > 16 and kv_heads > 2), "with x [65, 256]"),
    "1 / sqrt of a head clamped": (head_clamped, ", eps=1"),
    "the bias of many heads": (added("bias"), "with x [1, 1024], 16 and 8 heads"),
    "strides of the residual ignored": (added("residual"), "it reads x or residual as if it were contiguous"),
    "six kv heads": (where(lambda kv_heads, **_: kv_heads == 6), "with x [128, 128], 6 and 6 heads"),
    "ten kv heads": (where(lambda kv_heads, **_: kv_heads == 10), "40 and 10 heads of 64"),
    "heads of 192": (where(lambda head_dim, **_: head_dim == 192), "1 and 1 heads of 192"),
    "many tokens of many heads": (
        where(lambda x, heads, **_: len(x) >= 64 and heads >= 16),
        "with x [65, 256], 16 and",
    ),
    "many tokens of wide rows": (where(lambda x, **_: len(x) >= 32 and x.shape[1] >= 2048), "with x [130, 2880]"),
    "1024 tokens": (where(lambda x, **_: len(x) in (512, 1024)), "with x [1024, 128]"),
    "channels behind a multiple of 128": (rest_dropped, "with x [32, 576], 9 and 3 heads"),
    "zeros of weights are ones": (
        lambda x, w, *rest: EAGER(x, torch.where(w == 0, 1, w), *rest),
        "with norms' weights of zeros and near it",
    ),
    "1 / sqrt at most 8000": (root_at_most_8000, "with eps=1e-08, x of 2^-20"),
    "a bias clamped": (added("clamped"), "with a bias 64 times as large"),
    "a bias of what is rounded, clamped": (bias_after, "with a bias of up to 64 in q and k"),
    "a residual saturated": (added("saturated"), "with rows scaled by 2^-20 to 2^20"),
    "x alone aligned": (added("aligned"), "with x alone as a view at an offset of one element"),
    "k by another plan than q": (k_by_another_plan, "of k "),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_chain_that_is_wrong_somewhere_is_no_plan(name: str) -> None:
    fn, reason = FAULTS[name]
    answer = identify(fn, "qkv")
    assert answer.status == "none" and not answer.candidates and not answer.plans and answer.nearest, answer
    assert reason in answer.reason and len(answer.reason) < 900, answer.reason
    if name == "k by another plan than q":
        assert "of q " not in answer.reason, answer.reason


def test_a_bias_and_a_residual_that_are_added_everywhere() -> None:
    answer = identify(added(""), "qkv")
    assert answer.plans == ["hf"] and {c["result"] for c in answer.asked} == {"same"}, answer


def test_a_right_chain_lists_what_it_was_asked() -> None:
    answer = identify(EAGER, "qkv")
    assert answer.plans == ["hf"] and {c["result"] for c in answer.asked} == {"same"}
    said = summary(answer)
    for part in (
        "[1, 1024], 16 and 8 heads of 128",
        "[3, 16384], 1 and 1 heads of 64",
        "rows of a packed buffer",
        "1e-05",
    ):
        assert part in said
    others = {
        "NaN in x",
        "subnormal x",
        "gaps between channels",
        "transposed weight",
        "sliced weight",
        "with gradients",
    }
    assert set(answer.facts) == {"batch invariant", *others}


def test_a_chain_of_one_geometry_is_asked_there() -> None:
    def fn(
        x: Tensor, w: Tensor, weight: Tensor, q_w: Tensor, k_w: Tensor, eps: float, heads: int, kv_heads: int
    ) -> object:
        if (x.shape[1], heads, kv_heads, len(q_w)) != (640, 4, 2, 80) or len(x) != 16:
            raise ValueError("only 16 tokens of 640 channels")
        return EAGER(x, w, weight, q_w, k_w, eps, heads, kv_heads)

    answer = identify(fn, "qkv", sizes=Sizes(width=640, heads=(4, 2), head_dim=80, tokens=16))
    assert answer.plans == ["hf"], answer
    assert identify(fn, "qkv").reason == "the callable raised ValueError: only 16 tokens of 640 channels"
