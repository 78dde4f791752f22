"""Kernels outside the family, and those that are another function at another shape: the fingerprint names no plan."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import castpoint.harness.fingerprint.rules as family
from castpoint.harness.fingerprint import survey
from castpoint.harness.fingerprint.chain import other_rows
from castpoint.harness.fingerprint.norm import identify, summary
from castpoint.harness.fingerprint.rules import Rule
from castpoint.kernels.plan import KEEP, RNE, RTZ, CastPlan
from castpoint.variants.catalogue import HF, ONE_ROUNDING
from castpoint.variants.eager import eager_norm
from castpoint.variants.spec import round_to

Norm = Callable[[Tensor, Tensor, float], Tensor]


def norm_with(
    *,
    mean: Callable[[Tensor], Tensor] = lambda x: x.pow(2).mean(-1, keepdim=True),
    root: Callable[[Tensor, float], Tensor] = lambda v, eps: torch.rsqrt(v + eps),
    normed: Callable[[Tensor], Tensor] = lambda n: n,
    weight: Callable[[Tensor], Tensor] = lambda w: w,
    out: Callable[[Tensor], Tensor] = lambda y: y.bfloat16(),
) -> Norm:
    def fn(x: Tensor, w: Tensor, eps: float) -> Tensor:
        x = x.float()
        return out(normed(x * root(mean(x), eps)) * weight(w.float()))

    return fn


def bf16_sum(x: Tensor) -> Tensor:
    total = torch.zeros_like(x[..., :1])
    for part in (x * x).split(1, dim=-1):
        total = (total + part).bfloat16().float()
    return total / x.shape[-1]


def one_column(n: Tensor) -> Tensor:
    rounded = n.bfloat16().float()
    rounded[..., -1] = n[..., -1]
    return rounded


OUTSIDERS: dict[str, Norm] = {
    "sum of squares accumulated in bf16": norm_with(mean=bf16_sum),
    "variance over D - 1": norm_with(mean=lambda x: x.pow(2).sum(-1, keepdim=True) / (x.shape[-1] - 1)),
    "eps outside the root": norm_with(root=lambda v, eps: 1 / (v.sqrt() + eps)),
    "eps a constant": norm_with(root=lambda v, eps: torch.rsqrt(v + 1e-6)),
    "normed in fp16": norm_with(normed=lambda n: n.half().float()),
    "1 + w in fp16": norm_with(weight=lambda w: (1 + w).half().float()),
    "normed cut to tf32": norm_with(normed=lambda n: (n.view(torch.int32) & -(1 << 13)).view(torch.float32)),
    "one column of normed not rounded": norm_with(normed=one_column),
    "rounded toward minus infinity": norm_with(
        out=lambda y: torch.where(
            y < 0, torch.nextafter(round_to(y, RTZ).bfloat16(), y.new_tensor(-1e30).bfloat16()), round_to(y, RTZ)
        ).bfloat16()
    ),
    "another function for few tokens": lambda x, w, eps: (
        eager_norm(x, w, eps, False) if len(x) > 16 else F.rms_norm(x, (x.shape[-1],), w, eps)
    ),
}


@pytest.mark.parametrize("name", OUTSIDERS)
def test_a_kernel_outside_the_family_is_none_of_these(name: str) -> None:
    answer = identify(OUTSIDERS[name], "rmsnorm")
    assert answer.status == "none" and answer.candidates == [], answer
    assert answer.nearest and answer.reason.startswith("none of these: the nearest plan leaves"), answer


def test_norms_that_no_one_plan_can_say_are_none_of_these() -> None:
    def gemma_heads(*args: object) -> tuple[Tensor, ...]:
        x, w_in, weight, q, k, eps, nq, nkv = args
        outputs = survey.chain(ONE_ROUNDING, "spec")(x, w_in, weight, q * 0 + 1, k * 0 + 1, eps, nq, nkv)
        return (outputs[0] * (1 + q), outputs[1] * (1 + k), outputs[2])

    answer = identify(gemma_heads, "qkv")
    assert answer.status == "none", answer


@pytest.mark.parametrize("residual", ["rounded", "kept"])
def test_a_fused_add_says_whether_the_sum_is_rounded(residual: str) -> None:
    def fn(x: Tensor, weight: Tensor, eps: float, residual_: Tensor | None = None, *, residual: Tensor) -> object:
        total = x.float() + residual.float()
        total = total.bfloat16().float() if rounded else total
        normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + eps)
        return (normed * weight.float()).bfloat16(), total.bfloat16()

    rounded = residual == "rounded"
    answer = identify(fn, "rmsnorm")
    assert answer.status == "identified" and answer.candidates[0]["x"] == (RNE if rounded else "fp32"), answer


@pytest.mark.parametrize("where", ["before", "after", "ignored by q and k"])
def test_where_a_bias_is_added(where: str) -> None:
    def fn(x: Tensor, w: Tensor, weight: Tensor, q_w: Tensor, k_w: Tensor, eps: float, nq: int, nkv: int, bias: Tensor):
        hidden = eager_norm(x, w, eps, False).float()
        proj = (hidden.double() @ weight.double().T).float()
        b = bias.float().clone()
        if where.startswith("ignored"):
            b[: (nq + nkv) * len(q_w)] = 0
        proj = (proj.bfloat16() + b.bfloat16()) if where == "after" else (proj + b).bfloat16()
        q, k, v = proj.reshape(len(x), -1, len(q_w)).split([nq, nkv, nkv], dim=1)
        return eager_norm(q, q_w, eps, False), eager_norm(k, k_w, eps, False), v

    answer = identify(fn, "qkv")
    if where.startswith("ignored"):
        assert answer.status == "none" and "bias" in answer.reason
    else:
        assert answer.status == "identified" and answer.candidates[0]["bias"] == where, answer


# ---------------------------------------------------------------- other shapes


def dispatching(other: Callable[[Tensor], bool]) -> Norm:
    """One rounding, or two where the shape is such."""

    def fn(x: Tensor, w: Tensor, eps: float) -> Tensor:
        if other(x):
            return eager_norm(x, w, eps, False)
        return F.rms_norm(x, (x.shape[-1],), w, eps)

    return fn


DISPATCHES = {
    "wide": ("rmsnorm", lambda x: x.shape[1] > 1024, ["[1, 8192]", "[600, 2048]"]),
    "no power of two": ("rmsnorm", lambda x: x.shape[1] % 256, ["[3, 1000]"]),
    "many tokens": ("rmsnorm", lambda x: len(x) > 512, ["[600, 2048]"]),
    "one token": ("head_norm", lambda x: len(x) == 1 and x.shape[1] > 4, ["[1, 16, 256]"]),
    "many heads' rows": ("head_norm", lambda x: x.shape[0] > 512, ["[600, 1, 64]"]),
}


@pytest.mark.parametrize("name", DISPATCHES)
def test_another_function_at_another_shape_is_found(name: str) -> None:
    kind, other, shapes = DISPATCHES[name]
    answer = identify(dispatching(other), kind)
    assert answer.status == "none" and answer.candidates == [] and answer.nearest and not answer.plans, answer
    assert [part.split(" it is another function: ")[0] for part in answer.reason.split("; ")] == [
        f"at {shape}" for shape in shapes
    ], answer.reason
    assert identify(dispatching(lambda x: False), kind).status == "identified"


def test_one_row_of_many_that_differs_is_found() -> None:
    def fn(x: Tensor, w: Tensor, eps: float) -> Tensor:
        y = F.rms_norm(x, (x.shape[-1],), w, eps)
        y[512:513] = eager_norm(x[512:513], w, eps, False)
        return y

    answer = identify(fn, "rmsnorm")
    assert answer.status == "none" and answer.reason.startswith("at [600, 2048] it is another function: 0."), answer


@pytest.mark.parametrize("where", ["many tokens", "wide", "wide heads"])
def test_another_chain_at_another_shape_is_found(where: str) -> None:
    plan = HF.replace(head_normed=KEEP) if where == "wide heads" else ONE_ROUNDING
    hf, other = survey.chain(HF, "eager"), survey.chain(plan, "eager")

    def fn(x: Tensor, *rest: object) -> tuple[Tensor, ...]:
        return (other if (len(x) > 512 if where == "many tokens" else x.shape[1] > 1024) else hf)(x, *rest)

    shape = "[600, 256]" if where == "many tokens" else "[1, 4096]"
    answer = identify(fn, "qkv")
    assert answer.status == "none" and answer.reason.startswith(f"at {shape} it is another function"), answer
    assert shape in summary(answer)


def test_a_shape_that_is_refused_is_left_out_and_one_that_breaks_is_an_error() -> None:
    def fn(x: Tensor, w: Tensor, eps: float) -> Tensor:
        if x.shape[1] % 256:
            raise RuntimeError("the width must be divisible by 256")
        return F.rms_norm(x, (x.shape[-1],), w, eps)

    answer = identify(fn, "rmsnorm")
    assert answer.status == "identified", answer
    assert answer.shapes == [[64, 256], [4, 256], [1, 8192], [600, 2048]] and "[3, 1000]" not in summary(answer)
    answer = identify(lambda x, w, eps: F.rms_norm(x, (x.shape[-1],), w, eps)[:512], "rmsnorm")
    assert answer.status == "error" and answer.reason == (
        "at [600, 2048]: the callable returned shape [512, 2048], expected [600, 2048]"
    )


@pytest.mark.parametrize("plan", survey.norm_plans()[3::97], ids=lambda plan: "-".join(plan.roundings()) or "none")
def test_other_rows_have_sums_that_are_exact_in_any_order(plan: CastPlan) -> None:
    rule = Rule(statistics=plan.statistics, variance=plan.variance, rstd=plan.rstd, normed=plan.normed)
    for width, residual in ((8192, False), (1000, False), (4096, False), (2048, True)):
        rows = other_rows(rule, 3, width, residual=residual)
        x = rows.x if rows.residual is None else rows.x + rows.residual
        squares = round_to(x * x, rule.statistics)
        exact = squares.double().sum(-1)
        for order in (squares, squares.flip(-1), squares.sort(-1).values):
            assert torch.equal(order.cumsum(-1)[:, -1].double(), exact)
            assert torch.equal(order.unfold(-1, 8, 8).sum(-1).sum(-1).double() if width % 8 == 0 else exact, exact)


def test_other_rows_are_those_that_an_approximate_root_does_not_change() -> None:
    """Of 32768 rows about ten lie that near to a boundary of rstd's rounding, and other rows take their place."""
    for rule in (Rule(rstd=RNE), Rule(variance=RTZ)):
        rows = other_rows(rule, 1 << 15, 64)
        assert len(rows.x) == 1 << 15
        mean = family.mean_of_squares(rule.replace(variance=KEEP), rows)
        stored = family.factor_of(rule, rows)
        for off in (1 - 2.0**-22, 1 + 2.0**-22):
            variance = round_to((mean * off).float(), rule.variance).double()
            assert torch.equal(family.scalar(rule, variance, rows.eps), stored)
