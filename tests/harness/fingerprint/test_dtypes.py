"""fp16 in place of bf16, x in fp32, and norm weights in fp32: each is named, and what is rounded to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from commands import command
from torch import Tensor

from castpoint.harness.fingerprint.answer import unmet
from castpoint.harness.fingerprint.norm import identify, summary
from castpoint.harness.fingerprint.sizes import Sizes
from castpoint.harness.fingerprint.stores import round_to
from castpoint.kernels.plan import KEEP, RNE
from castpoint.variants.eager import eager_norm

HALF = "fp16-rne"


def norm(**words: str) -> Callable[[Tensor, Tensor, float], Tensor]:
    """A norm with these roundings; of `hidden`, the dtype that it returns."""

    def held(name: str, value: Tensor) -> Tensor:
        return round_to(value, words.get(name, KEEP))

    def fn(x: Tensor, w: Tensor, eps: float) -> Tensor:
        x = held("x", x.float())
        mean = held("variance", held("statistics", x * x).mean(-1, keepdim=True))
        root = torch.rsqrt(mean + eps) if words.get("eps") != "float64" else torch.rsqrt(mean.double() + eps).float()
        normed = held("normed", x * held("rstd", root))
        y = held("hidden", normed * held("weight", w.float()))
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return y.to(dtype.get(words.get("hidden", KEEP)[:4], torch.float32))

    return fn


BOUNDARIES = ("statistics", "variance", "rstd", "normed", "hidden")


@pytest.mark.parametrize(
    ("boundary", "word"),
    [
        *((boundary, word) for boundary in BOUNDARIES for word in (HALF, "fp16-rtz")),
        *((boundary, "fp16-rna") for boundary in ("rstd", "normed", "hidden")),  # ties of a mean are too few to tell
    ],
)
def test_a_boundary_of_fp16_is_named(boundary: str, word: str) -> None:
    words = {"hidden": HALF, boundary: word}
    answer = identify(norm(**words), "rmsnorm", sizes=Sizes(dtype="fp16"))
    assert answer.status in ("identified", "undecided") and answer.candidates[0].items() >= words.items(), answer


@pytest.mark.parametrize("way", ["fp16-rne", "fp16-rna", "fp16-rnz"])
@pytest.mark.parametrize("statistics", [HALF, "fp16-rtz"])
def test_a_root_that_is_an_ulp_smaller_is_no_tie_toward_zero(statistics: str, way: str) -> None:
    words = {"statistics": statistics, "eps": "float64", "normed": way, "hidden": HALF}
    answer = identify(norm(**words), "rmsnorm", sizes=Sizes(dtype="fp16"))
    assert answer.candidates and all(found.items() >= words.items() for found in answer.candidates), answer


def test_fp16_has_the_names_of_plans() -> None:
    answer = identify(norm(normed=HALF, hidden=HALF), "rmsnorm", sizes=Sizes(dtype="fp16"))
    assert answer.plans == ["hf"] and not unmet(answer, "hf", "rmsnorm") and unmet(answer, "one-rounding", "rmsnorm")
    assert "= the norm of hf, with fp16 in place of bf16" in summary(answer)
    mixed = identify(norm(normed=RNE, hidden=HALF), "rmsnorm", sizes=Sizes(dtype="fp16"))
    assert mixed.status == "none", mixed  # bf16 between fp16
    heads = identify(norm(normed=HALF, hidden=HALF), "head_norm", sizes=Sizes(dtype="fp16"))
    assert heads.plans == ["hf", "separate-head-norm"]


@pytest.mark.parametrize("x", [KEEP, RNE])
def test_a_residual_stream_in_fp32_is_kept_or_rounded(x: str) -> None:
    answer = identify(norm(x=x, normed=RNE, hidden=RNE), "rmsnorm", sizes=Sizes(dtype="fp32"))
    assert answer.status == "identified" and answer.candidates[0]["x"] == x, answer


def promoted(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return eager_norm(x, w, eps, False)


def refusing(x: Tensor, w: Tensor, eps: float) -> Tensor:
    if w.dtype != x.dtype:
        raise TypeError("weight must have the dtype of x")
    return promoted(x, w, eps)


@pytest.mark.parametrize(
    ("fn", "said"),
    [
        (norm(hidden=RNE), "weight=fp32"),
        (norm(hidden=RNE, weight=RNE), "weight=bf16-rne"),
        (norm(hidden=RNE, weight="bf16-rtz"), "weight=bf16-rtz"),
        (promoted, "weight=fp32, hidden=fp32"),
        (lambda x, w, eps: F.rms_norm(x, (x.shape[-1],), w.to(x.dtype), eps), "weight=bf16-rne"),
        (refusing, "refused: the callable raised TypeError: weight must have the dtype of x"),
        (
            lambda x, w, eps: promoted(x, w, eps) * (1 + (w.dtype == torch.float32)),
            "another function, the nearest with",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_norm_weights_in_fp32_are_a_boundary(fn: Callable[..., Tensor], said: str) -> None:
    answer = identify(fn, "rmsnorm")
    assert answer.status == "identified" and answer.facts["fp32 weights"].startswith(said), answer.facts
    word = said.partition("=")[2].partition(",")[0] if said.startswith("weight=") else None
    assert answer.candidates[0].get("weight") == word


def sum_in_fp32(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x.float() + residual.float()
    return norm(hidden=RNE)(total, weight, eps), total


def sum_by_promotion(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return promoted(total, weight, eps), total


def sum_in_place(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    residual.add_(x)
    x.copy_(promoted(residual.bfloat16(), weight, eps))


def sum_in_bf16(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return promoted((x.float() + residual.float()).bfloat16(), weight, eps)


def residual_in_bf16(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return promoted(x + residual.bfloat16(), weight, eps)


def rounded_residual_beside_y(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual.bfloat16()
    return promoted(total, weight, eps), total


def residual_of_xs_dtype(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    if residual.dtype != x.dtype:
        raise TypeError("one dtype")
    return promoted(x + residual, weight, eps)


@pytest.mark.parametrize(
    ("fn", "said"),
    [
        (sum_in_fp32, "x=fp32, x + residual is returned"),
        (sum_by_promotion, "x=fp32, normed=fp32, hidden=fp32, x + residual is returned"),
        (sum_in_place, "x=bf16-rne, x + residual is written into residual"),
        (sum_in_bf16, "x=bf16-rne"),
        (residual_in_bf16, "another function, the nearest with x=bf16-rne: "),
        (
            rounded_residual_beside_y,
            "another function: the callable returns a tensor of x's shape beside its result, "
            "and it is not x + residual",
        ),
        (residual_of_xs_dtype, "refused: the callable raised TypeError: one dtype"),
    ],
)
def test_a_residual_in_fp32_beside_x_in_bf16(fn: Callable[..., Any], said: str) -> None:
    answer = identify(fn, "rmsnorm")
    assert answer.status == "identified", answer
    found = answer.facts["fp32 residual"]
    assert found.startswith(said) if said.endswith(": ") else found == said, answer.facts


# ---------------------------------------------------------------- chains in fp16


def chain(splits: int = 1, **words: str) -> Callable[..., tuple[Tensor, ...]]:
    """A chain in fp16 with these roundings; in so many partial sums, each stored in fp16 if they are several."""
    both = {name: words.get(name, KEEP) for name in ("statistics", "variance")}
    first = norm(**both, **{name: words.get(name, KEEP) for name in ("rstd", "normed")}, hidden=words["hidden"])
    heads = {"rstd": words.get("head_rstd", KEEP), "normed": words.get("head_normed", KEEP), "hidden": words["out"]}
    head = norm(**both, **heads)

    def fn(x: Tensor, norm_weight: Tensor, qkv_weight: Tensor, q_norm_weight: Tensor, k_norm_weight: Tensor,
           eps: float, num_q_heads: int, num_kv_heads: int) -> tuple[Tensor, ...]:  # fmt: skip
        parts = [
            (h.double() @ w.double().T).float()
            for h, w in zip(first(x, norm_weight, eps).chunk(splits, 1), qkv_weight.chunk(splits, 1), strict=True)
        ]
        total = sum((round_to(part, HALF) for part in parts), torch.zeros(1)) if splits > 1 else parts[0]
        proj = round_to(total, words.get("proj", KEEP)).unflatten(1, (-1, len(q_norm_weight)))
        q, k, v = proj.split([num_q_heads, num_kv_heads, num_kv_heads], 1)
        q, k = head(q, q_norm_weight, eps), head(k, k_norm_weight, eps)
        return q, k, round_to(v, words["out"]).to(q.dtype)

    return fn


EVERYWHERE = dict.fromkeys(("normed", "hidden", "proj", "head_normed", "out"), HALF)
HALF_CHAINS = [
    EVERYWHERE,
    {"hidden": HALF, "out": HALF},
    EVERYWHERE | {"out": KEEP},
    EVERYWHERE | {"proj": KEEP, "rstd": HALF, "head_rstd": "fp16-rtz"},
    EVERYWHERE | {"proj": "fp16-rtz", "statistics": HALF, "variance": "fp16-rtz"},
    {"hidden": HALF, "proj": "fp16-rtz", "out": "fp16-rtz"},
]


@pytest.mark.parametrize("planted", HALF_CHAINS, ids=str)
def test_a_chain_in_fp16(planted: dict[str, str]) -> None:
    answer = identify(chain(**planted), "qkv", sizes=Sizes(dtype="fp16"))
    assert answer.status == "identified", answer
    words = answer.candidates[0]
    rounded = {name: word for name, word in words.items() if word.startswith("fp16-")}
    assert rounded == {name: word for name, word in planted.items() if word != KEEP} and words["matmul"] == "fp16"
    assert ("hf" in answer.plans) == (planted == EVERYWHERE)


def _swapped(*arguments: Any) -> tuple[Tensor, ...]:
    q, k, v = chain(**EVERYWHERE)(*arguments)
    return q, k.roll(1, 0), v


def _in_bf16(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(part.bfloat16().half() for part in chain(**EVERYWHERE)(*arguments))


@pytest.mark.parametrize("fn", [chain(2, **EVERYWHERE), _swapped, _in_bf16], ids=["parts in fp16", "k late", "bf16"])
def test_a_wrong_chain_in_fp16(fn: Callable[..., tuple[Tensor, ...]]) -> None:
    assert identify(fn, "qkv", sizes=Sizes(dtype="fp16")).status == "none"


def test_the_command_takes_a_dtype() -> None:
    target = "torch.nn.functional:rms_norm"
    call = "rms_norm(x, [256], w, eps)"
    done = command(
        "identify", target, "--call", call, "--kind", "rmsnorm", "--dtype", "fp16", "--expect", "one-rounding"
    )
    assert done.returncode == 0 and "fp16 in place of bf16" in done.stdout, (done.stdout, done.stderr)
    done = command("identify", target, "--dtype", "fp8")
    assert done.returncode == 1 and "--dtype must be bf16, fp16 or fp32, not 'fp8'" in done.stderr
