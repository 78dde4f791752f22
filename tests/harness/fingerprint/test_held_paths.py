"""A kernel has paths: for decoding and for many tokens, with each optional argument, that write a sum back or do not.
Each of these wrong ones was once taken for its plan, each of the right ones refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from norm_support import unit
from torch import Tensor, nn
from torch.nn import functional

from castpoint.harness.fingerprint.norm import identify
from castpoint.variants.eager import eager_norm


def hf(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return eager_norm(x, w, eps, False)


def one(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return (unit(x, eps) * w.float()).to(x.dtype)


def of_first(x: Tensor, w: Tensor, eps: float, channels: int) -> Tensor:
    """hf, whose mean is of the first channels alone."""
    wide = x.float()
    variance = wide[..., :channels].square().sum(-1, keepdim=True) / x.shape[-1]
    return (wide * torch.rsqrt(variance + eps)).bfloat16() * w


# ---------------------------------------------------------------- many tokens


def one_block(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """256 threads of eight channels each from 256 tokens on."""
    return of_first(x, w, eps, 2048 if len(x) >= 256 else x.shape[1])


def kept_weights(x: Tensor, w: Tensor, eps: float) -> Tensor:
    again = len(x) >= 64 and len(w) > 4096
    return hf(x, w[torch.arange(len(w)) % 4096] if again else w, eps)


def of_128(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return of_first(x, w, eps, 128 if len(x) >= 64 else x.shape[-1])


def no_tail(by: int, of: int) -> Callable[..., Tensor]:
    """Widths that `of` divides lose what `by` does not, of many rows."""

    def fn(x: Tensor, w: Tensor, eps: float) -> Tensor:
        width = x.shape[1]
        return of_first(x, w, eps, width // by * by if len(x) > 32 and width % of == 0 else width)

    return fn


NORMS: dict[str, tuple[str, Callable[..., Tensor], str]] = {
    "one block of 2,048 channels": ("rmsnorm", one_block, "[257, 4096]"),
    "4,096 weights are kept": ("rmsnorm", kept_weights, "[100, 6144]"),
    "heads of 128": ("head_norm", of_128, "[128, 3, 256]"),
    "a tail behind 64": ("rmsnorm", no_tail(64, 8), "[63, 1000]"),
    "a tail behind 8": ("rmsnorm", no_tail(8, 4), "[65, 1004]"),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_path_for_many_tokens(name: str) -> None:
    kind, fn, shape = NORMS[name]
    answer = identify(fn, kind)
    assert answer.status == "none" and f"with x {shape}" in answer.reason, answer


def chain(
    norm: Callable[..., Tensor] = hf, tile: int = 1 << 30, turned: bool = False, columns: int = 1
) -> Callable[..., tuple[Tensor, ...]]:
    """hf's with that input norm; of more than 128 tokens heads of at most tile channels, v of another head."""

    def fn(
        x: Tensor, nw: Tensor, qkvw: Tensor, qw: Tensor, kw: Tensor, eps: float, hq: int, hkv: int
    ) -> tuple[Tensor, ...]:
        many, size, read = len(x) > 128, len(qw), x.shape[1] // columns * columns
        q, k, v = (norm(x, nw, eps)[:, :read] @ qkvw.T[:read]).split([hq * size, hkv * size, hkv * size], -1)
        tiled = min(tile, size) if many else size
        ones = torch.ones(tiled, dtype=x.dtype)
        q, k = (hf(y.unflatten(-1, (-1, tiled)), ones, eps).flatten(1).unflatten(-1, (-1, size)) for y in (q, k))
        v = v.unflatten(-1, (-1, size))
        return q * qw, k * kw, v.roll(1, 1) if turned and many and hq > hkv > 1 else v

    return fn


CHAINS = {
    "one block of 1,024 channels": (
        chain(lambda x, w, e: of_first(x, w, e, 1024 if len(x) > 128 else 1 << 20)),
        "2880",
    ),
    "a tile of columns for a head": (chain(tile=64), "257, 256], 4 and 2 heads of 128"),
    "another kv head": (chain(turned=True), "257, 256], 4 and 2 heads of 128"),
    "no tail behind 64": (chain(columns=64), "5, 712]"),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_with_a_path_for_many_tokens(name: str) -> None:
    fn, what = CHAINS[name]
    answer = identify(fn, "qkv")
    assert answer.status == "none" and what in answer.reason, answer
    assert name != "another kv head" or identify(chain(), "qkv").plans[0] == "hf"


# ---------------------------------------------------------------- x + residual at every call


def copied(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    total = residual.contiguous()  # another tensor, where it is strided
    total.add_(x)
    x.copy_(hf(total, weight, eps))


def written(where: Callable[[Tensor], bool]) -> Callable[..., None]:
    def fn(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
        total = x + residual
        if where(x):
            residual.copy_(total)
        x.copy_(hf(total, weight, eps))

    return fn


def returned(where: Callable[[Tensor], bool]) -> Callable[..., Any]:
    def fn(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Any:
        total = x + residual
        return (hf(total, weight, eps), total) if where(x) else hf(total, weight, eps)

    return fn


def projected(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, residual: Tensor) -> Tensor:
    total = x + residual
    if len(x) < 100:
        residual.copy_(total)
    return one(total, norm_weight, eps) @ weight.T


SUMS = {
    "a copy": (copied, "rmsnorm", "with rows of a packed buffer: x + residual is written into residual at other calls"),
    "not of few rows": (written(lambda x: len(x) > 8), "rmsnorm", "with x [1, 4096]: x + residual is written into"),
    "of few rows alone": (written(lambda x: len(x) < 9), "rmsnorm", "is written into residual at this call, at others"),
    "not of wide rows": (
        returned(lambda x: x.shape[1] < 5000),
        "rmsnorm",
        "with x [5, 5120]: x + residual is returned",
    ),
    "of wide rows alone": (returned(lambda x: x.shape[1] > 5000), "rmsnorm", "is returned at this call, at others not"),
    "of a projection": (projected, "norm_linear", "with x [130, 2880]"),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_that_is_left_out_at_some_calls(name: str) -> None:
    fn, kind, reason = SUMS[name]
    answer = identify(fn, kind)
    assert answer.status == "error" and reason in answer.reason, answer


@pytest.mark.parametrize("fn", [written(lambda x: True), returned(lambda x: True), returned(lambda x: False)])
def test_a_sum_at_every_call_or_at_none(fn: Callable[..., Any]) -> None:
    assert identify(fn, "rmsnorm").plans[0] == "hf"


# ---------------------------------------------------------------- what else it takes


def biased(x: Tensor, weight: Tensor, eps: float, bias: Tensor | None = None) -> Tensor:
    return one(x, weight, eps) if bias is None else (unit(x, 1e-6) * weight.float() + bias.float()).to(x.dtype)


def scaled(x: Tensor, residual: Tensor, weight: Tensor, eps: float, alpha: float = 1.0) -> tuple[Tensor, Tensor]:
    total = x + residual * alpha
    return one(total, weight, eps if alpha == 1 else 1e-6), total


def given(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    return one(x, weight, eps) if out is None else out.copy_(one(x, weight, 1e-6))


def divided(out: Tensor, input: Tensor, weight: Tensor, scale: Tensor, epsilon: float) -> None:  # noqa: A002
    out.copy_((hf(input, weight, epsilon).float() / scale.bfloat16().float()).clamp(-448, 448).to(out.dtype))


@pytest.mark.parametrize(
    ("fn", "what"),
    [
        (biased, "with a bias, x "),
        (scaled, "with alpha=0.22, x "),
        (given, "with out given, x "),
        (divided, "with scale=4.01"),
    ],
)
def test_a_path_of_an_argument_with_an_eps_or_a_scale_of_its_own(fn: Callable[..., Any], what: str) -> None:
    answer = identify(fn, "rmsnorm")
    assert answer.status == "none" and f"the first calls: {what}" in answer.reason, answer


def interleaved(fault: str) -> Callable[..., None]:
    """In place, packed; without is_neox with that fault."""

    def fn(
        qkv: Tensor, num_heads_q: int, num_heads_k: int, num_heads_v: int, head_dim: int, eps: float, q_weight: Tensor,
        k_weight: Tensor, cos_sin_cache: Tensor, is_neox: bool, position_ids: Tensor,
    ) -> None:  # fmt: skip
        cos, sin = (each[:, None].float() for each in cos_sin_cache[position_ids].chunk(2, -1))
        heads, k = qkv.view(len(qkv), -1, head_dim), num_heads_q + num_heads_k
        for each, weight in ((slice(0, num_heads_q), q_weight), (slice(num_heads_q, k), k_weight)):
            y = unit(heads[:, each], 1e-6 if fault == "eps" and not is_neox else eps) * weight.float()
            a, b = y.chunk(2, -1) if is_neox else (y[..., ::2], y[..., 1::2])
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -2 if is_neox else -1).flatten(-2)
            if fault == "heads" and not is_neox:
                turned[:, 8:] = y[:, 8:]
            heads[:, each] = turned.to(qkv.dtype)

    return fn


@pytest.mark.parametrize("fault", ["eps", "heads"])
def test_the_other_rotation_is_held_at_other_heads_and_eps(fault: str) -> None:
    answer = identify(interleaved(fault), "qk_norm_rope")
    assert answer.status == "none" and "the first calls: with is_neox=False, " in answer.reason, answer


def test_what_is_not_looked_at_is_said() -> None:
    def out_of_residual(
        x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, residual_out: Tensor | None = None
    ) -> Tensor:
        return hf(x if residual is None else x + residual, weight, eps)

    def two_beside(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        y = hf(x, weight, eps)
        return y, y.to(torch.float8_e4m3fn), torch.ones(len(x), 1)

    assert identify(out_of_residual, "rmsnorm").facts["not asked"] == "residual_out=None, as it is by default"
    beside = "torch.float8_e4m3fn of 2 dimensions and torch.float32 of 2 dimensions, which are not looked at"
    assert identify(two_beside, "rmsnorm").facts["beside y"] == beside


# ---------------------------------------------------------------- right ones


def of_ascend(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    total = x1 + x2
    rstd = torch.rsqrt(total.float().square().mean(-1, keepdim=True) + epsilon)
    return (total.float() * rstd).to(x1.dtype) * gamma, rstd, total


def of_fla(
    x: Tensor, g: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "swish",
    residual: Tensor | None = None, eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    total = x if residual is None else x + residual
    y = unit(total, eps) * weight.float() + (0 if bias is None else bias.float())
    return (y * functional.silu(g.float())).to(x.dtype)


class Within(nn.Module):
    """A norm in a module that keeps no eps."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Biased(nn.Module):
    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self._eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    @property
    def eps(self) -> float:
        return self._eps

    def forward(self, x: Tensor) -> Tensor:
        return (unit(x, self._eps) * self.weight.float() + self.bias.float()).to(x.dtype)


def by_groups(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Groups of 128, the last one cut short."""
    y = one(x, weight, eps).float()
    groups = functional.pad(y, (0, -y.shape[1] % 128)).unflatten(1, (-1, 128))
    scales = groups.abs().amax(-1).clamp(min=1e-4) / 448
    return (groups / scales[..., None]).to(torch.float8_e4m3fn).flatten(1)[:, : y.shape[1]].contiguous(), scales


RIGHT = {"Ascend's names": of_ascend, "fla's gate": of_fla, "a norm within": Within, "one within": Within(256)}
RIGHT |= {"a module with a bias": Biased, "one with a bias": Biased(256), "groups": by_groups}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_is_identified(name: str) -> None:
    answer = identify(RIGHT[name], "rmsnorm")
    hidden = "bf16-rne" if name != "fla's gate" else "fp32"
    assert answer.plans and answer.candidates[0].get("ungated", hidden) == hidden, answer
    assert ("bias" in answer.facts) == ("with a bias" in name or "fla" in name), answer


class Shifted(Biased):
    def forward(self, x: Tensor) -> Tensor:
        return (unit(x, self._eps) * self.weight.float() + 1.02 * self.bias.float()).to(x.dtype)


def test_the_bias_of_a_module_is_asked() -> None:
    assert "with a bias" in identify(Shifted, "rmsnorm").reason


@pytest.mark.parametrize(
    ("names", "what"),
    [
        ("x, delta, weight, eps", "delta is no name that is known, and weight is no second argument"),
        ("hidden_states, gating, weight, eps", "gating is no name that is known"),
        ("x, w, weight, eps", "several of its names are a weight's"),
        ("gamma, x", "none is eps, and gamma is no second argument"),
        ("weight, eps", "none is x, "),
    ],
)
def test_names_that_lie_elsewhere_and_do_not_tell_are_said(names: str, what: str) -> None:
    scope: dict[str, Any] = {}
    exec(f"def fn({names}): return x", scope)  # noqa: S102
    answer = identify(scope["fn"], "rmsnorm")
    assert answer.status == "error" and answer.reason.startswith(f"it takes ({names}): {what}"), answer
    assert answer.reason.endswith("give --call 'fn(out, x, w, eps)', with x, w, eps, residual, out and constants")
