"""Plans whose answer is known, each planted in a callable and asked: which was answered? And how much captures tell."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from castpoint.harness.fingerprint.answer import words_of
from castpoint.harness.fingerprint.capture import Capture, Chain
from castpoint.harness.fingerprint.capture import Norm as RecordedNorm
from castpoint.harness.fingerprint.captured import explain, holds
from castpoint.harness.fingerprint.norm import identify
from castpoint.harness.fingerprint.rules import OFFSETS
from castpoint.harness.fingerprint.sizes import Sizes
from castpoint.harness.fingerprint.survey import EXECUTED, columns_of, found_in
from castpoint.harness.problems.drawn import synthetic_problem
from castpoint.harness.ptx.driver import executed
from castpoint.harness.runs.progress import track
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import CaptureRow, FingerprintRow
from castpoint.kernels.head_norm import head_norm
from castpoint.kernels.plan import KEEP, STORAGE, CastPlan
from castpoint.variants.backends import run
from castpoint.variants.catalogue import PLANS
from castpoint.variants.problem import Problem
from castpoint.variants.spec import round_to, spec

NOISY = 1e-3  # share of elements that noise moves by one ulp
TOKENS = (1, 4, 16, 64, 256)  # of captures
Norm = Callable[[Tensor, Tensor, float], Tensor]


def norm_plans() -> list[CastPlan]:
    """Every plan of a single norm, 729: five boundaries kept, rounded or truncated, and the weight offset."""
    names = ("statistics", "variance", "rstd", "normed", "hidden", "weight_offset")
    drawn = [dict(zip(names, words, strict=True)) for words in itertools.product(*[STORAGE] * 5, OFFSETS)]
    return [CastPlan(**choices, matmul="fp32" if choices["hidden"] == KEEP else "bf16") for choices in drawn]


def spec_norm(plan: CastPlan) -> Norm:
    """The plan's first norm by its spec, as kind `rmsnorm`."""

    def fn(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        unused = torch.zeros(3, x.shape[1], dtype=torch.bfloat16)
        offset = plan.weight_offset != "none"
        problem = Problem(x, weight, unused, num_q_heads=1, num_kv_heads=1, eps=eps, weight_offset=offset)
        return spec(plan, problem).hidden.to(torch.float32 if plan.hidden == KEEP else torch.bfloat16)

    return fn


def as_head(plan: CastPlan) -> CastPlan:
    """The plan whose head norm is that plan's first: its head_rstd, head_normed and out are rstd, normed and hidden."""
    same = {name: getattr(plan, name) for name in ("statistics", "variance", "weight_offset")}
    return CastPlan(head_rstd=plan.rstd, head_normed=plan.normed, out=plan.hidden, **same)


def triton_head_norm(plan: CastPlan) -> Norm:
    """The same norm by the Triton kernel, as kind `head_norm`."""
    return functools.partial(head_norm, plan=as_head(plan))


def chain(plan: CastPlan, backend: str) -> Callable[..., tuple[Tensor, ...]]:
    """The plan's whole chain on one of variants.backends.BACKENDS, as kind `qkv`."""

    def fn(
        x: Tensor, norm_weight: Tensor, qkv_weight: Tensor, q_norm_weight: Tensor, k_norm_weight: Tensor, eps: float,
        num_q_heads: int, num_kv_heads: int,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        offset = plan.weight_offset != "none"
        heads = (num_q_heads, num_kv_heads, q_norm_weight, k_norm_weight)
        problem = Problem(x, norm_weight, qkv_weight, *heads, eps=eps, weight_offset=offset)
        dtype = torch.float32 if plan.out == KEEP else torch.bfloat16
        return tuple(output.to(dtype) for output in run(plan, problem, backend))

    return fn


def with_noise(fn: Norm) -> Norm:
    """fn with NOISY of its elements one ulp off, the same in every call."""

    def noisy(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = fn(x, weight, eps)
        rng = torch.Generator().manual_seed(y.numel())
        step = torch.randint(0, 2, y.shape, generator=rng) * 2 - 1
        hit = (torch.rand(y.shape, generator=rng) < NOISY) & (y != 0)  # from 0 a step of bits leads to NaN
        integers = torch.int16 if y.dtype == torch.bfloat16 else torch.int32
        return (y.view(integers) + (step * hit).to(integers)).view(y.dtype)

    return noisy


def expected(plan: CastPlan, kind: str) -> dict[str, str]:
    """The words that a fingerprint of this plan must answer: of a single norm by as_head's names if it is a head's."""
    return words_of(as_head(plan) if kind == "head_norm" else plan, kind)


def numpy_half(value: Tensor, word: str) -> Tensor:
    """fp32 value in fp16 and back, by NumPy's conversion: a step back toward zero where that truncates."""
    if word == KEEP:
        return value
    given = value.numpy()
    with np.errstate(over="ignore"):
        half = given.astype(np.float16)
    if word == "fp16-rtz":
        half = np.where(np.abs(half.astype(np.float32)) > np.abs(given), np.nextafter(half, np.float16(0)), half)
    return torch.from_numpy(half.astype(np.float32))


def norm_in(plan: CastPlan, dtype: torch.dtype, weight_word: str = KEEP) -> Norm:
    """The plan's first norm with values of that dtype, bf16 or fp16, and a weight that is held so; kind `rmsnorm`."""
    half = dtype == torch.float16

    def hold(value: Tensor, word: str) -> Tensor:
        return numpy_half(value, word.replace("bf16", "fp16")) if half else round_to(value, word)

    def fn(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide, w = x.float(), hold(weight.float(), weight_word)
        w = w if plan.weight_offset == "none" else hold(1 + w, plan.weight_offset)
        squares = hold(wide * wide, plan.statistics)
        variance = hold(squares.double().mean(-1, keepdim=True).float(), plan.variance)
        rstd = hold((variance.double() + eps).rsqrt().float(), plan.rstd)
        hidden = hold(hold(wide * rstd, plan.normed) * w, plan.hidden)
        return hidden if plan.hidden == KEEP else hidden.to(dtype)

    return fn


@dataclass(frozen=True)
class Known:
    """A callable in which words are planted: by what it is made, its kind, and the dtype in which it is asked."""

    source: str
    kind: str
    planted: dict[str, str]
    fn: Callable[..., Any]
    dtype: str = "bf16"


def known_subjects() -> Iterator[Known]:
    """Every norm plan by spec, a tenth of them by kernel, a third with noise, another third in fp16, and some with each
    word of a weight given in fp32; every named chain by spec and by kernel, and drawn chains by spec."""
    compiled = executed("sm_90")
    for place, plan in enumerate(norm_plans()):
        turn = (place + place // 3) % 3  # place % 3 is the offset's word
        yield Known("spec", "rmsnorm", expected(plan, "rmsnorm"), spec_norm(plan))
        if place % 10 == 0:
            yield Known(EXECUTED, "head_norm", expected(plan, "head_norm"), compiled(triton_head_norm(plan)))
        if turn == 0:
            yield Known("spec with noise", "rmsnorm", expected(plan, "rmsnorm"), with_noise(spec_norm(plan)))
        if turn == 1:
            half = {name: word.replace("bf16", "fp16") for name, word in expected(plan, "rmsnorm").items()}
            yield Known("NumPy in fp16", "rmsnorm", half, norm_in(plan, torch.float16), "fp16")
        if place % 28 == 0:
            for word in STORAGE:
                planted = expected(plan, "rmsnorm") | {"weight": word}
                yield Known("torch with fp32 weights", "rmsnorm", planted, norm_in(plan, torch.bfloat16, word))
    for plan in [named.plan for named in PLANS.values()] + drawn_chains(40):
        yield Known("spec", "qkv", expected(plan, "qkv"), chain(plan, "spec"))
    for named in PLANS.values():
        yield Known(EXECUTED, "qkv", expected(named.plan, "qkv"), compiled(chain(named.plan, "triton")))


def drawn_chains(count: int) -> list[CastPlan]:
    """Plans of the whole chain, which has 137,781: each choice drawn from the words that it may take."""
    rng = torch.Generator().manual_seed(0)

    def draw(words: tuple[str, ...]) -> str:
        return words[int(torch.randint(0, len(words), [1], generator=rng))]

    plans: list[CastPlan] = []
    while len(plans) < count:
        names = ("statistics", "variance", "rstd", "normed", "hidden", "proj", "head_rstd", "head_normed", "out")
        words = {name: draw(STORAGE) for name in names}
        words |= {"scale": draw(("prologue", "epilogue", "folded")), "weight_offset": draw(OFFSETS)}
        words["matmul"] = "bf16" if words["hidden"] != KEEP else draw(("tf32", "tf32x3", "fp32"))
        if words["scale"] != "prologue":
            words["normed"] = KEEP
        if words["scale"] == "folded":
            words |= {"hidden": KEEP, "matmul": "bf16"}
        plans.append(CastPlan(**words))
    return plans


def survey_known(records: Records) -> None:
    """One row a known subject: what was planted, what was answered."""
    for known in track(list(known_subjects()), "known plans"):
        key = {"source": known.source, "kind": known.kind, "planted": json.dumps(known.planted)}
        if records.has(FingerprintRow, **key):
            continue
        answer = identify(known.fn, known.kind, sizes=Sizes(dtype=known.dtype))
        records.add(FingerprintRow(**key, **columns_of(answer), status=answer.status, answered=found_in(answer)))


def survey_captures(records: Records) -> None:
    """One row a kind and number of tokens: how many planted plans a capture tells apart, and loses."""
    subjects = {"qkv": (drawn_chains(40), recorded_chain), "rmsnorm": (norm_plans()[4::18], recorded_norm)}
    for kind, tokens in track(list(itertools.product(subjects, TOKENS)), "captures"):
        if not records.has(CaptureRow, kind=kind, tokens=tokens):
            plans, record = subjects[kind]
            told, lost = told_apart(plans, tokens, record)
            records.add(CaptureRow(kind=kind, tokens=tokens, plans=len(plans), told_apart=told, lost=lost))


# ---------------------------------------------------------------- captures of plans that are known


def recorded_chain(plan: CastPlan, tokens: int) -> Chain:
    """The plan's spec on a cut of Qwen3-0.6B's calibrated first layer: 256 channels, 2 + 1 + 1 heads of 128."""
    p = synthetic_problem(tokens=tokens)
    first = [p.qkv_weight[start : start + count, :256] for start, count in ((0, 256), (2048, 128), (3072, 128))]
    cut = p.replace(x=p.x[:, :256], norm_weight=p.norm_weight[:256], qkv_weight=torch.cat(first), num_q_heads=2,
                    num_kv_heads=1)  # fmt: skip
    outputs = spec(plan, cut.replace(weight_offset=plan.weight_offset != "none")).outputs()
    return Chain(cut, {name: _as_stored(value, plan.out) for name, value in outputs.items()})


def recorded_norm(plan: CastPlan, tokens: int) -> RecordedNorm:
    """The plan's first norm by its spec on that layer's input, 1024 channels."""
    p = synthetic_problem(tokens=tokens)
    y = spec_norm(plan)(p.x, p.norm_weight, p.eps)
    return RecordedNorm(p.x, p.norm_weight, p.eps, {"y": y})


def _as_stored(value: Tensor, storage: str) -> Tensor:
    return value.to(torch.float32 if storage == KEEP else torch.bfloat16)


def told_apart(plans: list[CastPlan], tokens: int, record: Callable[[CastPlan, int], Capture]) -> tuple[float, float]:
    """Of captures of so many tokens of each plan: the share whose answer is that plan alone, or with plans that such
    inputs cannot tell from it, and the share whose answer leaves the plan out."""
    told = lost = 0
    for plan in plans:
        capture = record(plan, tokens)
        answer = explain(capture)
        there = any(holds(words, words_of(plan, capture.kind)) for words in answer.candidates)
        told, lost = told + (there and answer.status == "identified"), lost + (not there)
    return told / len(plans), lost / len(plans)
