"""The envelope of a plan: the values that summation in fp32, in any usual order, can produce, element by element.

Two correct implementations of one plan differ only where a value lies so near a rounding tie that the
error of an fp32 sum can push it across. So each value of the chain is carried as an interval: the spec's
value, widened by the error of the sums, and rounded at both ends as the plan rounds. Rounding is monotone,
so the interval's ends are values the plan can produce. Most elements come out with both ends equal: there
an implementation must agree with the spec bit for bit. Widths follow from the number of terms and the data, under
the model below; one constant is chosen, the six standard deviations that are allowed.

Error of a sum (Higham, Accuracy and Stability of Numerical Algorithms, ch. 4, with rounding errors
taken as independent, Higham & Mary 2019): rounding the k-th partial sum s_k errs by at most u |s_k|, rms
u |s_k| / sqrt(3), u = 2^-24. For n terms of random sign the partial sums grow as sqrt(k), for positive ones
as k, so that the rms error is u sqrt(n / 6) |terms|_2 and u sqrt(n) / 3 * sum. Six of those are allowed; a
sum in blocks errs less. Tensor cores do not round but truncate, once every 16 terms (Hopper) or 8 (Ampere), which
always errs toward zero: a matmul is allowed 2u |s_k| for each step of 16 on top, with |terms|_2 for |s_k|
(MMA-Sim, arXiv 2511.10909; Khattak & Mikaitis, arXiv 2512.07004).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from castpoint.kernels.plan import KEEP, RNE, CastPlan
from castpoint.variants.problem import Problem, rotate_half
from castpoint.variants.spec import applied_weight, check_offset, matmul_operand, store

U = 2.0**-24  # unit roundoff of fp32
SIGMAS = 6.0
RSQRT_ULPS = 2.0  # rsqrt.approx on NVIDIA GPUs errs by up to 2 ulp, 1 / sqrt(x) in fp32 by 1.5

Interval = tuple[Tensor, Tensor]


def envelope(plan: CastPlan, problem: Problem) -> dict[str, Interval]:
    """Lowest and highest value of each element of q, k and v that an implementation of the plan may return.

    float64 tensors of the outputs' shapes. Raises ValueError if plan and problem do not fit together.
    """
    check_offset(plan, problem)
    p = problem
    x = p.x.to(torch.float64)
    if p.residual is not None:
        x = store(x + p.residual.to(torch.float64), plan.x)
    rstd = _rstd((x, x), plan, p.eps, plan.rstd)
    hidden: Interval = (x, x)
    if plan.scale == "prologue":
        hidden = _stored(_product(hidden, rstd), plan.normed)
    weight = p.qkv_weight.to(torch.float64)
    w_in = applied_weight(p.norm_weight, plan)
    if plan.scale == "folded":
        weight = store(weight * w_in, RNE)
    else:
        hidden = _stored(_product(hidden, (w_in, w_in)), plan.hidden)
    proj = dot_interval((matmul_operand(hidden[0], plan), matmul_operand(hidden[1], plan)), weight)
    if plan.scale != "prologue":
        proj = _widened(_product(proj, rstd), U)
    if p.bias is not None:
        bias = p.bias.to(torch.float64)
        proj = _widened((proj[0] + bias, proj[1] + bias), U)
    proj = _stored(proj, plan.proj)

    q, k, v = zip(*(p.split_heads(end) for end in proj), strict=True)
    if weights := p.head_weights:
        w_q, w_k = (applied_weight(weight, plan) for weight in weights)
        q, k = _head_norm(q, w_q, plan, p.eps), _head_norm(k, w_k, plan, p.eps)
    if p.positions is not None:
        q, k = _rotated(q, p, plan), _rotated(k, p, plan)
    return {name: _stored(ends, plan.out) for name, ends in (("q", q), ("k", k), ("v", v))}


def outside(actual: Tensor, envelope: Interval) -> Tensor:
    """Which elements of an output the envelope does not explain; NaN is explained by NaN. Bool, actual's shape."""
    low, high = envelope
    actual = actual.to(torch.float64)
    inside = (low <= actual) & (actual <= high)
    return ~(inside | (actual.isnan() & (low.isnan() | high.isnan())))


def _stored(ends: Interval, storage: str) -> Interval:
    return store(ends[0], storage), store(ends[1], storage)


def _widened(ends: Interval, relative: float) -> Interval:
    return ends[0] - relative * ends[0].abs(), ends[1] + relative * ends[1].abs()


def _product(a: Interval, b: Interval) -> Interval:
    corners = [i * j for i in a for j in b]
    low, high = corners[0], corners[0]
    for corner in corners[1:]:
        low, high = torch.minimum(low, corner), torch.maximum(high, corner)
    return low, high


def _squares(ends: Interval) -> Interval:
    low, high = (end * end for end in ends)
    straddles = (ends[0] <= 0) & (ends[1] >= 0)
    return torch.where(straddles, 0.0, torch.minimum(low, high)), torch.maximum(low, high)


def _rstd(value: Interval, plan: CastPlan, eps: float, storage: str) -> Interval:
    squares = _squares(value)
    if plan.statistics != KEEP:
        squares = _stored(squares, plan.statistics)
    n = squares[0].shape[-1]
    error = SIGMAS * U * math.sqrt(n) / 3 + 3 * U  # the sum; squaring, dividing by n and adding eps
    means = squares[0].mean(-1, keepdim=True), squares[1].mean(-1, keepdim=True)
    variance = _stored(_widened(means, error), plan.variance)
    low, high = ((end + eps).rsqrt() for end in reversed(variance))
    return _stored(_widened((low, high), 2 * RSQRT_ULPS * U), storage)


def _rotated(value: Interval, p: Problem, plan: CastPlan) -> Interval:
    """Both channels of a pair vary by themselves here; of one head's rstd they share the error, so this is wider."""
    low, high = _stored(value, plan.unrotated)
    cos, sin = (store(factor.to(torch.float64), plan.cos_sin) for factor in p.cos_sin())
    crossed = _product((rotate_half(low), rotate_half(high)), (sin, sin))  # corners, whichever end is the lower
    own, crossed = _stored(_product((low, high), (cos, cos)), plan.products), _stored(crossed, plan.products)
    return own[0] + crossed[0], own[1] + crossed[1]


def dot_interval(hidden: Interval, weight: Tensor) -> Interval:
    middle, radius = (hidden[0] + hidden[1]) / 2, (hidden[1] - hidden[0]) / 2
    proj = middle @ weight.T
    terms = (middle.square() @ weight.T.square()).sqrt()  # 2-norm of the terms
    n = weight.shape[1]
    error = radius @ weight.T.abs() + (SIGMAS * math.sqrt(n / 6) + 2 * n / 16) * U * terms
    return proj - error, proj + error


def _head_norm(proj: Interval, weight: Tensor, plan: CastPlan, eps: float) -> Interval:
    head_normed = _stored(_product(proj, _rstd(proj, plan, eps, plan.head_rstd)), plan.head_normed)
    return _product(head_normed, (weight, weight))
