"""Callables written here from public reports: what engines did wrong or otherwise, each as the report tells it, and
what no RMSNorm may do. `source` names the thread; a row that is right by construction has none."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from castpoint.harness.peers.running import EAGER, OWN, Implementation, Norm

Store = Callable[[Tensor], Tensor]  # fp32 -> fp32
CONSTRUCTED = "by construction"


def bf16(value: Tensor) -> Tensor:
    return value.bfloat16().float()


def cut(value: Tensor) -> Tensor:
    """Toward zero."""
    return (value.view(torch.int32) & -65536).view(torch.float32)


def away(value: Tensor) -> Tensor:
    """To nearest, ties away from zero: half an ulp added to the bits, then cut."""
    return cut((value.view(torch.int32) + 0x8000).view(torch.float32))


def kept(value: Tensor) -> Tensor:
    return value


def half(value: Tensor) -> Tensor:
    return value.half().float()


def squares(x: Tensor, root: Callable[[Tensor], Tensor]) -> Tensor:
    """x [.., D] fp32 times the root of the mean of its squares."""
    return x * root(x.square().mean(-1, keepdim=True))


def rounded(
    x: Tensor, weight: Tensor, eps: float, *, square: Store = kept, variance: Store = kept, rstd: Store = kept,
    normed: Store = kept, weights: Store = kept, offset: float = 0.0, out: Store = bf16,
) -> Tensor:  # fmt: skip
    """An RMSNorm in fp32 that stores these values as told."""
    wide = x.float()
    mean = variance(square(wide.square()).mean(-1, keepdim=True))
    values = normed(wide * rstd(torch.rsqrt(mean + eps)))
    return out(values * weights(weights(weight.float()) + offset)).bfloat16()


def of_root(
    x: Tensor, weight: Tensor, eps: float, factor: Callable[[Tensor, float], Tensor], normed: Store = kept
) -> Tensor:
    """One rounding, and x times factor(mean of squares, eps)."""
    wide = x.float()
    return (normed(wide * factor(wide.square().mean(-1, keepdim=True), eps)) * weight.float()).bfloat16()


hf = partial(rounded, normed=bf16)
one = rounded


# ---------------------------------------------------------------- sums under the norm


def rounds_the_sum(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return hf(total, weight, eps), total


def keeps_the_sum(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
    total = x.float() + residual.float()
    return hf(total, weight, eps), total.bfloat16()


def keeps_the_sum_for_the_mean(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of the sum in fp32, the values of the one in bf16."""
    total = x.float() + residual.float()
    values = bf16(total) * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    return (bf16(values) * weight.float()).bfloat16(), total.bfloat16()


def adds_in_place(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> None:
    """y in x, x + residual in residual, as fused_add_rms_norm is called."""
    residual += x
    x.copy_(hf(residual, weight, eps))


def forgets_the_residual(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    return hf(x, weight, eps)


# ---------------------------------------------------------------- other arithmetic


def divides(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Its root is rounded correctly: torch 2.13's own in float32 is not for 19 % of numbers, on an AMD EPYC."""
    wide = x.float()
    root = (wide.square().mean(-1, keepdim=True) + eps).double().sqrt().float()
    return (wide / root * weight.float()).bfloat16()


def weight_first(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * (torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float())).bfloat16()


def rstd_last(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * weight.float() * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).bfloat16()


def eps_in_float64(mean: Tensor, eps: float) -> Tensor:
    return (mean.double() + eps).rsqrt().float()


def in_bf16(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Every operation stored in bf16."""
    mean = bf16(bf16(x.float().square()).mean(-1, keepdim=True))
    return x * torch.rsqrt(bf16(mean + eps)).bfloat16() * weight


def by_torch_in_bf16(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Every operation on bf16 tensors."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def newton(mean: Tensor, eps: float) -> Tensor:
    """1 / sqrt by its bits and one step of Newton's, 2^-9 off."""
    value = mean + eps
    guess = (0x5F3759DF - (value.view(torch.int32) >> 1)).view(torch.float32)
    return guess * (1.5 - 0.5 * value * guess * guess)


def in_fp16(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Squares in fp16, those past its largest number at that number."""
    wide = x.float()
    mean = half(wide.square().clamp(max=65504.0)).mean(-1, keepdim=True)
    return (wide * torch.rsqrt(mean + eps) * weight.float()).bfloat16()


def partial_sums(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The sum of squares from four parts, each rounded to bf16."""
    wide = x.float()
    parts = [bf16(part.square().sum(-1, keepdim=True)) for part in wide.chunk(4, -1)]
    mean = bf16(bf16(bf16(parts[0] + parts[1]) + parts[2]) + parts[3]) / x.shape[-1]
    return (wide * torch.rsqrt(mean + eps) * weight.float()).bfloat16()


def half_up(value: Tensor) -> Tensor:
    """To nearest, ties up: away from zero where positive, toward it where negative."""
    return torch.where(value < 0, cut((value.view(torch.int32) + 0x7FFF).view(torch.float32)), away(value))


def by_token_count(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Another kernel from 256 tokens on."""
    return (one if len(x) >= 256 else hf)(x, weight, eps)


# ---------------------------------------------------------------- no RMSNorm, or a broken one


def layer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], weight.float(), None, eps).bfloat16()


def weight_ignored(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], None, eps)


def weight_before(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float() * weight.float(), x.shape[-1:], None, eps).bfloat16()


def l2(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return of_root(x, weight, eps, lambda mean, eps: torch.rsqrt(mean * x.shape[-1]))


def without_bias(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The mean of one channel less."""
    return of_root(x, weight, eps, lambda mean, eps: torch.rsqrt(mean * x.shape[-1] / (x.shape[-1] - 1) + eps))


def summed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return of_root(x, weight, eps, lambda mean, eps: torch.rsqrt(mean * x.shape[-1] + eps))


def eps_to_the_sum(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return of_root(x, weight, eps, lambda mean, eps: torch.rsqrt(mean + eps / x.shape[-1]))


def ignores_strides(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Reads memory from x's first element on."""
    return hf(x.as_strided(x.shape, torch.empty(x.shape).stride()), weight, eps)


def whole_blocks(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Only whole blocks of 64 channels count for the mean."""
    wide = x.float()
    mean = wide[..., : x.shape[-1] // 64 * 64].square().sum(-1, keepdim=True) / x.shape[-1]
    return (bf16(wide * torch.rsqrt(mean + eps)) * weight.float()).bfloat16()


def wrong_for_one(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (partial(hf, offset=1.0) if len(x) == 1 else hf)(x, weight, eps)


def first_head_alone(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The first head's root for every head."""
    wide = x.float()
    rstd = torch.rsqrt(wide[:, :1].square().mean(-1, keepdim=True) + eps)
    return (bf16(wide * rstd) * weight.float()).bfloat16()


class Stateful:
    """Counts its calls, and lets each change a bit."""

    def __init__(self) -> None:
        self.calls = itertools.count()

    def __call__(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return hf(x, weight, eps) * (1 + 2.0**-7 * (next(self.calls) % 2))


def writes_weight(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    weight += 1
    return hf(x, weight - 1, eps)


# ---------------------------------------------------------------- chains


def chain(
    x: Tensor, norm_weight: Tensor, qkv_weight: Tensor, q_norm_weight: Tensor, k_norm_weight: Tensor, eps: float,
    num_q_heads: int, num_kv_heads: int, *, normed: Store = kept, hidden: Store = bf16, head_normed: Store = kept,
    splits: int = 1,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The norm, q, k and v in one matmul, stored in bf16, and the heads' norms. splits: of the matmul's sum, whose
    parts are stored in bf16 where there are several."""
    wide = x.float()
    left = hidden(normed(squares(wide, lambda mean: torch.rsqrt(mean + eps))) * norm_weight.float())
    parts = zip(left.chunk(splits, -1), qkv_weight.float().chunk(splits, -1), strict=True)
    proj = torch.zeros(())
    for a, b in parts:
        proj = bf16(proj + bf16(a @ b.T))
    heads = proj.unflatten(-1, (num_q_heads + 2 * num_kv_heads, len(q_norm_weight)))
    q, k, v = heads.split([num_q_heads, num_kv_heads, num_kv_heads], 1)
    q, k = (
        (head_normed(squares(h, lambda mean: torch.rsqrt(mean + eps))) * w.float()).bfloat16()
        for h, w in ((q, q_norm_weight), (k, k_norm_weight))
    )
    return q, k, v.bfloat16()


# ---------------------------------------------------------------- the table

NORMS: tuple[tuple[str, Norm, str, str], ...] = (  # name, callable, right, source
    ("residual sum rounded before the variance", rounds_the_sum, "hf, x=bf16-rne", "vllm #52104"),
    ("residual sum kept for the variance", keeps_the_sum, "hf, x=fp32", "vllm #52243"),
    ("residual sum kept for the variance alone", keeps_the_sum_for_the_mean, "none", "xformers rms_norm_add"),
    ("fused_add_rms_norm in place", adds_in_place, "hf, x=bf16-rne", "vllm fused_add_rms_norm"),
    ("residual forgotten", forgets_the_residual, "none", CONSTRUCTED),
    ("weight product after the cast", hf, "hf", "transformers #33133"),
    ("weight product in fp32", one, "one-rounding", "vllm #42325"),
    ("1 + w in fp32", partial(one, offset=1.0), "gemma", "Liger-Kernel #92"),
    ("1 + w in bf16", partial(one, weights=bf16, offset=1.0), "gemma-bf16-offset", "vllm #53203"),
    ("all in bf16", in_bf16, "bf16-statistics, eps=bf16 sum", "nki-llama #22"),
    # on a CPU torch.rsqrt of bf16 rounds the root as well in what is no whole vector: of few rows, each
    ("all in bf16, by torch.rsqrt", by_torch_in_bf16, "none: with x [1, ", "torch 2.13's ops"),
    ("variance in bf16", partial(one, variance=bf16), "one-rounding, variance=bf16-rne", "sglang #27540"),
    ("squares in bf16", partial(one, square=bf16), "one-rounding, statistics=bf16-rne", "tt-metal #31048"),
    ("squares cut", partial(one, square=cut), "one-rounding, statistics=bf16-rtz", "tt-metal #57408"),
    ("rstd in bf16", partial(one, rstd=bf16), "one-rounding, rstd=bf16-rne", "amd/IRON #139"),
    ("x / sqrt", divides, "one-rounding, root=sqrt", CONSTRUCTED),
    ("rstd times the weight first", weight_first, "one-rounding, order=x*(rstd*w)", "flax"),
    ("rstd last", rstd_last, "one-rounding, order=(x*w)*rstd", "FlashNorm"),
    ("eps as fp64", partial(of_root, factor=eps_in_float64), "one-rounding, eps=float64", "vllm #57123"),
    ("eps as fp64, cast first", partial(of_root, factor=eps_in_float64, normed=bf16), "hf, eps=float64", "vllm #57123"),
    ("stores cut", partial(one, out=cut), "one-rounding, hidden=bf16-rtz", "aiter #5151"),
    ("all roundings cut", partial(one, normed=cut, out=cut), "truncating", "aiter #5151"),
    ("ties away from zero", partial(hf, out=away), "hf, hidden=bf16-rna", "PTX cvt.rna"),
    ("ties up", partial(hf, out=half_up), "none", CONSTRUCTED),
    ("weights in bf16", partial(one, weights=bf16), "one-rounding, weight=bf16-rne", "aiter #3451"),
    ("another kernel from 256 tokens on", by_token_count, "none: with x [257, ", CONSTRUCTED),
    ("x * rstd in fp16", partial(one, normed=half), "none: normed is rounded to fp16", CONSTRUCTED),
    ("squares in fp16", in_fp16, "none", CONSTRUCTED),
    ("partial sums in bf16", partial_sums, "none", "aiter #3806"),
    ("rsqrt by Newton's step", partial(of_root, factor=newton), "none", CONSTRUCTED),
    ("eps beside the root", partial(of_root, factor=lambda mean, eps: 1 / (mean.sqrt() + eps)),
     "none: eps is added to the root", CONSTRUCTED),
    ("eps left out", partial(of_root, factor=lambda mean, eps: torch.rsqrt(mean + 1e-30)), "none: eps is not used",
     CONSTRUCTED),
    ("eps of its own", partial(of_root, factor=lambda mean, eps: torch.rsqrt(mean + 1e-5)),
     "none: it adds 1e-05 whatever eps is", CONSTRUCTED),
    ("eps as the least variance", partial(of_root, factor=lambda mean, eps: torch.rsqrt(mean.clamp(min=eps))),
     "none: eps is the least variance", CONSTRUCTED),
    ("eps added to the sum", eps_to_the_sum, "none: eps is added to the sum of squares", CONSTRUCTED),
    ("mean of one channel less", without_bias, "none: the mean is over one channel less", CONSTRUCTED),
    ("sum in place of the mean", summed, "none: squares are summed up", CONSTRUCTED),
    ("LayerNorm by the name of RMSNorm", layer_norm, "none: LayerNorm", CONSTRUCTED),
    ("L2 norm", l2, "none: L2 norm", CONSTRUCTED),
    ("weight ignored", weight_ignored, "none: no weight is applied", CONSTRUCTED),
    ("weight before the mean", weight_before, "none: before the mean is taken", CONSTRUCTED),
    ("strides ignored", ignores_strides, "none: contiguous", CONSTRUCTED),
    ("odd widths wrong", whole_blocks, "none: with x [", CONSTRUCTED),
    ("one token wrong", wrong_for_one, "none: with x [1, ", CONSTRUCTED),
    ("two calls differ", Stateful(), "error: not deterministic", CONSTRUCTED),
    ("another shape", lambda x, weight, eps: hf(x, weight, eps)[..., :-1], "error: returned shape", CONSTRUCTED),
    ("fp64", lambda x, weight, eps: hf(x, weight, eps).double(), "error: returned torch.float64", CONSTRUCTED),
    ("writes into the weight", writes_weight, "error: writes into its inputs", CONSTRUCTED),
    ("NaN", lambda x, weight, eps: hf(x, weight, eps) * float("nan"), "error: NaN", CONSTRUCTED),
)  # fmt: skip
HEADS = (
    ("head norm, cast first", hf, "hf", "verl-omni #637"),
    ("head norm, weight product in fp32", one, "one-rounding", "verl-omni #637"),
    ("every head by the first one's root", first_head_alone, "none", CONSTRUCTED),
)
CHAINS = (
    ("chain, cast first", partial(chain, normed=bf16, head_normed=bf16), "hf", "transformers Qwen3Attention"),
    ("chain, one rounding a norm", chain, "one-rounding", "SGLang's norms"),
    ("chain, cast after the matmul", partial(chain, hidden=kept), "cast-after-matmul, matmul=fp32", CONSTRUCTED),
    ("chain, sums of four parts in bf16", partial(chain, splits=4), "none", "aiter #2586"),
)


def report_rows() -> list[Implementation]:
    """In the order of a table."""
    kinds = (("rmsnorm", NORMS), ("head_norm", HEADS), ("qkv", CHAINS))
    return [_row(kind, *row) for kind, table in kinds for row in table]


def _row(kind: str, name: str, fn: Any, right: str, source: str) -> Implementation:
    return Implementation(f"written: {name}", OWN, kind, EAGER, lambda device: fn, right, source)
