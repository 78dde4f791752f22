"""Planted faults: kernels that are wrong in one place, as functions that return their q, k and v.

Each is variants/eager.py, a plan in ordinary fp32 arithmetic, which runs another plan than it was asked for or has one
place of its source changed. The file as it stands is the right kernel. What a fault does to memory, to launches or to
NaN shows in no output of such a function: those are planted in the kernels themselves, in tests/kernels.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from castpoint.harness.problems.drawn import residual_stream, synthetic_problem, with_positions
from castpoint.kernels.plan import BOUNDARIES, CHOICES, KEEP, RNE, ROPE_BOUNDARIES, RTZ, CastPlan
from castpoint.variants import eager
from castpoint.variants.backends import run_triton
from castpoint.variants.eager import Outputs, plan_weight
from castpoint.variants.problem import Problem

NEIGHBOURS = {KEEP: (RNE,), RNE: (KEEP, RTZ), RTZ: (RNE,)}
STEP = 16  # products that are summed before an accumulator is rounded, as on a tensor core
BITS = (8, 12, 16, 19, 22)  # of a short accumulator's significand; fp32 has 24
SHARES = (2, 4, 8)  # of D, each summed by itself
TOKENS, Q_HEADS, KV_HEADS = 33, 2, 1  # of the drawn layer
MANY_TOKENS = 512  # where a fault is tried that changes nothing at TOKENS


@dataclass(frozen=True)
class Fault:
    """One way to be wrong. move: a boundary or choice and its new word. changes: old and new text of eager.py.
    after: changes q, k and v, or the output of a single norm, in place.

    kind: what it is one of, a boundary's name for a move. of: what can show it, the `chain`, `positions` for what needs
    q and k rotated, or `norm` for what a single norm can show too.
    """

    name: str
    kind: str
    move: tuple[str, str] | None = None
    changes: tuple[tuple[str, str], ...] = ()
    after: Callable[[Tensor], object] | None = None
    of: str = "chain"

    def plan(self, plan: CastPlan) -> CastPlan | None:
        """The plan that is run where this one was asked for; None where the move contradicts it."""
        return moved(plan, *self.move) if self.move else plan

    def run(self, plan: CastPlan, problem: Problem) -> Outputs:
        """q, k and v of the wrong kernel. Raises ValueError where the move contradicts the plan."""
        if (run_as := self.plan(plan)) is None:
            raise ValueError(f"{self.name} contradicts {plan}")
        q, k, v = changed(self.changes).plan_eager(run_as, problem, plan_weight(run_as, problem))
        for value in (q, k, v):
            if self.after:
                self.after(value)
        return q, k, v

    def run_norm(
        self, plan: CastPlan, x: Tensor, weight: Tensor, eps: float, cos_sin: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """The plan's head norm by itself, wrong, over x [..., D] bf16; with cos and sin of x's shape rotated."""
        plan, module = self.plan(plan) or plan, changed(self.changes)
        value = module._head_norm(x.float(), weight, plan, eps)
        if cos_sin:
            value = module._rotated(value, SimpleNamespace(cos_sin=lambda: cos_sin), plan)
        value = module.round_to(value, plan.out).to(torch.float32 if plan.out == KEEP else torch.bfloat16)
        if self.after:
            self.after(value)
        return value


# ---------------------------------------------------------------- another plan


def moved(plan: CastPlan, name: str, word: str) -> CastPlan | None:
    """The plan with one choice made otherwise, and with it what must follow; None where no such plan exists."""
    if name == "hidden" and plan.scale != "folded" and KEEP in (word, plan.hidden):
        return plan.replace(hidden=word, matmul="fp32" if word == KEEP else "bf16")
    if name == "scale":
        if word != "prologue":
            plan = plan.replace(normed=KEEP)
        if word == "folded":
            return plan.replace(scale=word, hidden=KEEP, matmul="bf16")
        return plan.replace(scale=word, **({"hidden": RNE} if plan.scale == "folded" else {}))
    try:
        return plan.replace(**{name: word})
    except ValueError:
        return None


def moves(plan: CastPlan) -> Iterator[tuple[str, str]]:
    """Name and new word of every choice that can be made otherwise, next to the plan's own; some contradict it."""
    for name in (*BOUNDARIES, *CHOICES):
        now = getattr(plan, name)
        words = NEIGHBOURS[now] if name in BOUNDARIES else [word for word in CHOICES[name] if word != now]
        yield from ((name, word) for word in words)


def move_faults(plan: CastPlan) -> list[Fault]:
    """Every boundary and choice of that plan moved by itself."""
    return [
        Fault(
            f"{name}: {word} instead of {getattr(plan, name)}",
            name,
            (name, word),
            of="positions" if name in ROPE_BOUNDARIES else "chain",
        )
        for name, word in moves(plan)
        if moved(plan, name, word)
    ]


# ---------------------------------------------------------------- another source


@dataclass(frozen=True)
class Summed:
    """W as `hidden @ wide.T` meets it, in a matmul of its own: exact products, added as bits and shares say.

    bits: of the accumulator's significand, which is rounded to nearest or cut toward zero after every `step` products.
    shares: of D, each summed in fp32 by itself and kept in bf16, then added in fp32.
    """

    weight: Tensor
    bits: int = 24
    step: int = STEP
    cut: bool = False
    shares: int = 1

    @property
    def T(self) -> Summed:
        return self

    def __rmatmul__(self, hidden: Tensor) -> Tensor:
        if self.shares > 1:
            parts = zip(hidden.chunk(self.shares, -1), self.weight.chunk(self.shares, -1), strict=True)
            return sum(((h @ w.T).bfloat16().float() for h, w in parts), torch.zeros(()))
        total = torch.zeros(hidden.shape[0], self.weight.shape[0], dtype=torch.float64)
        for h, w in zip(hidden.double().split(self.step, -1), self.weight.double().split(self.step, -1), strict=True):
            total = rounded(total + h @ w.T, self.bits, self.cut)
        return total.float()


def rounded(value: Tensor, bits: int, cut: bool = False) -> Tensor:
    """float64 to the nearest value of so many significant bits, ties to even, or cut to them; any exponent will do."""
    mantissa, exponent = torch.frexp(value)
    digits = mantissa * 2.0**bits
    return torch.ldexp(digits.trunc() if cut else digits.round(), exponent - bits)


def away(value: Tensor, storage: str) -> Tensor:
    """spec.round_to with ties away from zero where it takes them to even."""
    if storage != RNE:
        return eager.round_to(value, storage)
    bits = value.view(torch.int32) + 0x8000 & -(1 << 16)
    return torch.where(value.isnan(), value, bits.view(torch.float32))


TERMS, OF_NORM, BESIDE = "channels left out of the sum", "eps, mean or rstd of a norm", "weights, bias or residual"
TIES, STORES, TURNED = "ties away from zero", "elements that are not stored", "turned otherwise"  # kinds

OWN_MATMUL = ('if plan.matmul == "bf16" and plan.proj == "bf16-rne" and plan.scale == "prologue":', "if False:")
WIDE = "wide = weight.float()"
NORM, HEAD = "_rstd(x, plan, p.eps, plan.rstd)", "_rstd(proj, plan, eps, plan.head_rstd)"
ROUND = "from castpoint.variants.spec import round_to, truncate_tf32"
HIDDEN = "proj = _project(plan, hidden, qkv_weight, rstd, p.bias)"
WEIGHTS = "zip((q, k), weights, strict=True)"


def in_matmul(name: str, kind: str, summed: str) -> Fault:
    return Fault(name, kind, changes=(OWN_MATMUL, (WIDE, f"wide = Summed(weight.float(), {summed})")))


def in_chain(name: str, kind: str, old: str, new: str, of: str = "chain") -> Fault:
    return Fault(name, kind, changes=((old, new),), of=of)


def in_norms(name: str, argument: str, head: str) -> list[Fault]:
    """The same fault in the layer's norm and in the head's. Text of _rstd's arguments."""
    return [
        in_chain(name, OF_NORM, NORM, f"_rstd({argument}, plan.rstd)"),
        in_chain(f"head norm: {name}", OF_NORM, HEAD, f"_rstd({head}, plan.head_rstd)", "norm"),
    ]


RIGHT = Fault("none", "right kernel")
RIGHTS = [  # orders of summation in fp32 that nobody would call wrong, one of them nearly a tensor core's
    RIGHT,
    in_matmul("none: fp32 sums by 16", RIGHT.kind, "bits=24"),
    in_matmul("none: fp32 sums one by one", RIGHT.kind, "step=1"),
    in_matmul("none: fp32 sums by 16, cut", RIGHT.kind, "cut=True"),
]
INTERPRETED = in_chain("none: Triton", RIGHT.kind, "x = p.x.float()", "return run_triton(plan, p)")
ACCUMULATORS = [
    in_matmul(f"accumulator of {bits} bits", f"accumulator of {bits} bits", f"bits={bits}") for bits in BITS
]
SPLITS = [in_matmul(f"split-K, {n} shares in bf16", "split-K with bf16 partial sums", f"shares={n}") for n in SHARES]
PLANTED = [
    *ACCUMULATORS,
    *SPLITS,
    in_chain("last channel left out", TERMS, HIDDEN, HIDDEN.replace("hidden,", "_short(hidden, 1),")),
    in_chain("last 16 channels left out", TERMS, HIDDEN, HIDDEN.replace("hidden,", "_short(hidden, 16),")),
    in_chain("last channel twice", TERMS, HIDDEN, HIDDEN.replace("hidden,", "_short(hidden, -1),")),
    *in_norms("eps dropped", "x, plan, 0.0", "proj, plan, 0.0"),
    *in_norms("eps doubled", "x, plan, 2 * p.eps", "proj, plan, 2 * eps"),
    *in_norms("mean over one channel more", "F.pad(x, (0, 1)), plan, p.eps", "F.pad(proj, (0, 1)), plan, eps"),
    *in_norms("last channel left out of the mean", "_short(x, 1), plan, p.eps", "_short(proj, 1), plan, eps"),
    in_chain("rstd of the first token for all", OF_NORM, NORM, f"{NORM}[:1].expand(len(x), 1)"),
    in_chain("rstd in fp16", OF_NORM, "torch.rsqrt(variance + eps)",
             "torch.rsqrt(variance + eps).half().float()", "norm"),
    Fault("variance of the sum before it is rounded", OF_NORM, changes=(
        ("x = p.x.float()", "x = whole = p.x.float()"),
        ("x = round_to(x + p.residual.float(), plan.x)", "whole = x + p.residual.float(); x = round_to(whole, plan.x)"),
        (NORM, "_rstd(whole, plan, p.eps, plan.rstd)"),
    )),
    in_chain("bias dropped", BESIDE, HIDDEN, HIDDEN.replace("p.bias", "None")),
    Fault("bias twice", BESIDE, changes=(OWN_MATMUL, ("proj + bias.float()", "proj + 2 * bias.float()"))),
    in_chain("residual dropped", BESIDE, "x + p.residual.float()", "x"),
    in_chain("k normed with q's weight", BESIDE, WEIGHTS, WEIGHTS.replace("weights", "weights[:1] * 2")),
    in_chain("weights of q and k exchanged", BESIDE, WEIGHTS, WEIGHTS.replace("weights", "weights[::-1]")),
    in_chain("weight of the channel before", BESIDE, "return head_normed * _applied_weight(weight, plan)",
             "return head_normed * _applied_weight(weight.roll(1), plan)", "norm"),
    in_chain(TIES, TIES, ROUND, "from castpoint.variants.spec import truncate_tf32", "norm"),
    Fault("one element in 500 zero", STORES, after=lambda y: y.masked_fill_(_one_in_500(y), 0.0), of="norm"),
    Fault("last token not written", STORES, after=lambda y: y[-1:].zero_(), of="norm"),
    Fault("last token holds the one before", STORES, after=lambda y: y[-1:].copy_(y[-2:][:1]), of="norm"),
    in_chain("one of two products not rounded", TURNED, "round_to(rotate_half(value) * sin, plan.products)",
             "rotate_half(value) * sin", "positions"),
    in_chain("turned the other way", TURNED, "+ round_to(rotate_half", "- round_to(rotate_half", "positions"),
    in_chain("angle of the first token for all", TURNED, "in p.cos_sin())\n    return",
             "in (c[:1] for c in p.cos_sin()))\n    return", "positions"),
]  # fmt: skip


def _one_in_500(value: Tensor) -> Tensor:
    return torch.arange(value.numel()).view(value.shape) % 500 == 0


def _short(value: Tensor, channels: int) -> Tensor:
    """That value without its last channels, zero there; with the last channel doubled for -1."""
    value = value.clone()
    value[..., -abs(channels) :] *= 0 if channels > 0 else 2
    return value


@functools.cache
def changed(changes: tuple[tuple[str, str], ...]) -> ModuleType:
    """variants/eager.py with those texts changed. Raises ValueError where one does not stand there."""
    text = inspect.getsource(eager)
    for old, new in changes:
        if old not in text:
            raise ValueError(f"variants/eager.py holds no {old!r}")
        text = text.replace(old, new)
    module = ModuleType("planted")
    module.__dict__.update(Summed=Summed, round_to=away, _short=_short, run_triton=run_triton)
    exec(compile(text, f"planted: {changes}", "exec"), module.__dict__)
    return module


def faults(plan: CastPlan) -> list[Fault]:
    """All that is planted in a kernel of that plan."""
    return list(itertools.chain(move_faults(plan), PLANTED))


# ---------------------------------------------------------------- on a layer


def drawn(plan: CastPlan, rope: bool, tokens: int = TOKENS) -> Problem:
    """The first layer of the drawn Qwen3-0.6B, all its channels and four of its heads, and a residual and a bias, which
    it has not, so that every boundary is there."""
    problem = _drawn(plan.weight_offset != "none", tokens)
    return with_positions(problem) if rope else problem


@functools.cache
def _drawn(weight_offset: bool, tokens: int) -> Problem:
    p = synthetic_problem("qwen3-0.6b", 0, tokens, weight_offset=weight_offset)
    first = [0, p.num_q_heads, p.num_q_heads + p.num_kv_heads]
    heads = [head + i for head, n in zip(first, (Q_HEADS, KV_HEADS, KV_HEADS), strict=True) for i in range(n)]
    weight = p.qkv_weight.view(p.num_heads, p.head_dim, -1)[heads].flatten(0, 1)
    rng = torch.Generator().manual_seed(1)
    return p.replace(
        qkv_weight=weight,
        num_q_heads=Q_HEADS,
        num_kv_heads=KV_HEADS,
        residual=residual_stream(tokens, p.hidden_size, 0, rng),
        bias=torch.randn(weight.shape[0], generator=rng).mul(0.3).to(torch.bfloat16),  # about the size of proj
    )


def same_function(plan: CastPlan, fault: Fault) -> bool:
    """Whether the fault changes no element of the layer stored in fp32, with many tokens, at its own size and where x
    and proj are so small that eps counts as much: it is then another name of the plan, as far as this shows. False for
    right kernels.
    """
    if fault.kind == RIGHT.kind:
        return False
    p = drawn(plan, fault.of == "positions", MANY_TOKENS)
    small = {n: (getattr(p, n) * 2.0**-8).bfloat16() for n in ("x", "residual", "qkv_weight", "bias")}
    plan = plan if fault.kind == "out" else plan.replace(out=KEEP)
    pairs = [zip(RIGHT.run(plan, q), fault.run(plan, q), strict=True) for q in (p, p.replace(**small))]
    return all(torch.equal(right, wrong) for pair in pairs for right, wrong in pair)
