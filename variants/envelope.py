"""The envelope of a plan: the values that summation in fp32, in any usual order, can produce, element by element.

Two correct implementations of one plan differ only where a value lies so near a rounding tie that the
error of an fp32 sum can push it across. So each value of the chain is carried as an interval: the spec's
value, widened by the error of the sums, and rounded at both ends as the plan rounds. Rounding is monotone,
so the interval's ends are values the plan can produce. Most elements come out with both ends equal: there
an implementation must agree with the spec bit for bit. Widths follow from the number of terms and the data, under
the model below; one constant is chosen, the six standard deviations that are allowed.

Error of a sum in fp32 (Higham, Accuracy and Stability of Numerical Algorithms, ch. 4, with rounding errors taken as
independent, Higham & Mary 2019): rounding the k-th partial sum s_k errs by at most u |s_k|, rms u |s_k| / sqrt(3),
u = 2^-24; all n together by rms u sqrt(n / 3) rms(s_k), of which six are allowed. rms(s_k) is bounded by the data t, as
the largest of three: from the first term to the last, from the last to the first, and in random order. There k of n
terms with the sum S have the mean k S / n and the variance k (n - k) / (n - 1) (|t|^2 / n - S^2 / n^2), which over all
k makes a mean square below S^2 / 3 + |t|^2 / 6. Blocks, trees, lanes and the shares of a split K err less than these.

Tensor cores truncate toward zero, which does not cancel. Allowed for it on top is the mean of what Ampere cuts, the
coarser (24 fraction bits, steps of 8; Hopper 25 and 16): u |s_k| of every 8th sum, and of each product, cut at 2^-24 of
the largest operand, u |s_k| / 2 with the product's own sign (MMA-Sim, arXiv 2511.10909; Khattak & Mikaitis, arXiv
2512.07004). tf32 gets the same, which is Hopper's steps of 8. fp32 is not multiplied by tensor cores.

How often a right kernel is red: a sum leaves its interval with probability 2e-9 (`false_red`), if errors are
independent, so that six deviations are a normal distribution's. Measured, with additions rounded to nearest, their rms
is 0.19 to 0.54 of what is assumed, the largest of 2.7 million 2.9 of the six (Gaussian, uniform, one sign; 64 to 1024
terms). Where they are not independent: equal terms err equally, so of n terms as many are taken to move together as
x's and W's repetitions, if they fall independently, repeat a product; a constant row is covered by that. Squares far
below u of their sum may be lost whole, and are allowed to be.

Right, and yet red: one chain of fp32 additions over the squares of 1024 bf16 values of torch.rand, whose low bits are
alike (7.6 deviations; in 8 and more chains side by side at most 1.1), or over terms of one sign behind one that is
2^20 to 2^25 times as large; lanes that part what alternates in sign at their own stride; results flushed to zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from castpoint.kernels.plan import KEEP, RNE, CastPlan
from castpoint.variants.problem import Problem, rotate_half
from castpoint.variants.spec import applied_weight, check_offset, check_table, cos_sin, matmul_operand, store

U = 2.0**-24  # unit roundoff of fp32
SIGMAS = 6.0
RSQRT_ULPS = 2.0  # rsqrt.approx on NVIDIA GPUs errs by up to 2 ulp, 1 / sqrt(x) in fp32 by 1.5

Interval = tuple[Tensor, Tensor]


def envelope(plan: CastPlan, problem: Problem) -> dict[str, Interval]:
    """Lowest and highest value of each element of q, k and v that an implementation of the plan may return.

    float64 tensors of the outputs' shapes. Raises ValueError if plan and problem do not fit together.
    """
    check_offset(plan, problem)
    check_table(plan, problem)
    return outputs_interval(plan, problem, proj_interval(plan, problem))


def proj_interval(plan: CastPlan, problem: Problem, columns: slice = slice(None)) -> Interval:
    """Those columns of proj [T, columns], float64, before it is rounded as plan.proj. Norm weights are read
    as the plan has them, however the problem says they are stored."""
    p = problem
    x = p.x.to(torch.float64)
    if p.residual is not None:
        x = store(x + p.residual.to(torch.float64), plan.x)
    rstd = _rstd((x, x), plan, p.eps, plan.rstd)
    hidden: Interval = (x, x)
    early = plan.scale == "prologue" and not _keeps_hidden(plan)
    if early:
        hidden = stored(product(hidden, rstd), plan.normed)
    weight = p.qkv_weight[columns].to(torch.float64)
    w_in = applied_weight(p.norm_weight, plan)
    if plan.scale == "folded":
        weight = store(weight * w_in, RNE)
    elif _keeps_hidden(plan):
        hidden = widened(product(hidden, (w_in, w_in)), 2 * U)  # two products in fp32, whichever comes first
    else:
        hidden = stored(product(hidden, (w_in, w_in)), plan.hidden)
    proj = dot_interval((matmul_operand(hidden[0], plan), matmul_operand(hidden[1], plan)), weight, plan.matmul)
    if not early:
        proj = widened(product(proj, rstd), U)
    if p.bias is not None:
        bias = p.bias[columns].to(torch.float64)
        proj = widened((proj[0] + bias, proj[1] + bias), U)
    return proj


def outputs_interval(plan: CastPlan, problem: Problem, proj: Interval) -> dict[str, Interval]:
    """envelope, from proj_interval of all columns."""
    p = problem
    q, k, v = zip(*(p.split_heads(end) for end in stored(proj, plan.proj)), strict=True)
    if weights := p.head_weights:
        w_q, w_k = (applied_weight(weight, plan) for weight in weights)
        q, k = _head_norm(q, w_q, plan, p.eps), _head_norm(k, w_k, plan, p.eps)
    if p.positions is not None:
        q, k = _rotated(q, p, plan), _rotated(k, p, plan)
    return {name: stored(ends, plan.out) for name, ends in (("q", q), ("k", k), ("v", v))}


def false_red(sums: int) -> float:
    """Largest probability, under the model, that fp32 sums so many in number are not all in their intervals."""
    return min(1.0, sums * math.erfc(SIGMAS / math.sqrt(2)))


def _keeps_hidden(plan: CastPlan) -> bool:
    """Nothing between rstd and the sums is rounded but in fp32: rstd's error is one factor of a whole row, which taken
    channel by channel would widen proj by |terms|_1, as if each channel had its own."""
    return plan.scale != "folded" and plan.normed == plan.hidden == KEEP and plan.matmul == "fp32"


def outside(actual: Tensor, envelope: Interval) -> Tensor:
    """Which elements of an output the envelope does not explain; NaN is explained by NaN. Bool, actual's shape."""
    low, high = envelope
    actual = actual.to(torch.float64)
    inside = (low <= actual) & (actual <= high)
    return ~(inside | (actual.isnan() & (low.isnan() | high.isnan())))


def stored(ends: Interval, storage: str) -> Interval:
    """Both ends as that storage holds them."""
    return store(ends[0], storage), store(ends[1], storage)


def widened(ends: Interval, relative: float) -> Interval:
    """Ends that a relative error moves apart."""
    return ends[0] - relative * ends[0].abs(), ends[1] + relative * ends[1].abs()


def product(a: Interval, b: Interval) -> Interval:
    """Every product of a value of a and one of b."""
    corners = [i * j for i in a for j in b]
    low, high = corners[0], corners[0]
    for corner in corners[1:]:
        low, high = torch.minimum(low, corner), torch.maximum(high, corner)
    return low, high


def _squares(ends: Interval) -> Interval:
    low, high = (end * end for end in ends)
    straddles = (ends[0] <= 0) & (ends[1] >= 0)
    return torch.where(straddles, 0.0, torch.minimum(low, high)), torch.maximum(low, high)


def variance_interval(value: Interval, statistics: str, variance: str) -> Interval:
    """Mean of the squares of value [..., n] as a plan with those words stores both, [..., 1]."""
    squares = _squares(value)
    if statistics != KEEP:
        squares = stored(squares, statistics)
    low, high = (end.mean(-1, keepdim=True) for end in squares)
    error = sum_error(squares[1]) / squares[1].shape[-1] + 3 * U * high  # and squaring, dividing by n, adding eps
    return stored(((low - error).clamp(min=0), high + error), variance)


def _rstd(value: Interval, plan: CastPlan, eps: float, storage: str) -> Interval:
    variance = variance_interval(value, plan.statistics, plan.variance)
    low, high = ((end + eps).rsqrt() for end in reversed(variance))
    return stored(widened((low, high), 2 * RSQRT_ULPS * U), storage)


def _rotated(value: Interval, p: Problem, plan: CastPlan) -> Interval:
    """Both channels of a pair vary by themselves here; of one head's rstd they share the error, so this is wider."""
    low, high = stored(value, plan.unrotated)
    cos, sin = cos_sin(plan, p)
    crossed = product((rotate_half(low), rotate_half(high)), (sin, sin))  # corners, whichever end is the lower
    own, crossed = stored(product((low, high), (cos, cos)), plan.products), stored(crossed, plan.products)
    return own[0] + crossed[0], own[1] + crossed[1]


def dot_interval(hidden: Interval, weight: Tensor, matmul: str = "bf16") -> Interval:
    """Lowest and highest hidden @ weight^T [T, rows], summed in fp32; float64 hidden [T, D] and weight [rows, D].

    matmul: precision of the operands, a word of the plan; tensor cores multiply all but fp32.
    """
    middle, radius = (hidden[0] + hidden[1]) / 2, (hidden[1] - hidden[0]) / 2
    n = weight.shape[1]
    total, size = _partial_sums(middle, weight)
    short, short_weight = middle.float(), weight.float()  # for what asks of no digits
    repeated = _repeats(short)[:, None] * _repeats(short_weight) / n
    error = SIGMAS * (n / 3 * (1 + repeated)).sqrt()
    if matmul != "fp32":
        one_sign = (short.sign() @ short_weight.sign().T).abs()  # so many more terms have the one sign
        error = error + n / 8 + one_sign / 2
    error = radius @ weight.T.abs() + U * size * error
    return total - error, total + error


def _partial_sums(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """hidden @ weight^T, and the rms of the partial sums on the way there, forward, backward or in random order,
    whichever is the largest. Seen at the ends of about sqrt(D) blocks."""
    n = weight.shape[1]
    block = 2 ** round(math.log2(n) / 2)
    total, sums, squares = (hidden.new_zeros(len(hidden), len(weight)) for _ in range(3))
    for part, rows in zip(hidden.split(block, dim=1), weight.split(block, dim=1), strict=True):
        total.addmm_(part, rows.T)
        sums += total
        squares.addcmul_(total, total)
    blocks = math.ceil(n / block)
    forward = squares / blocks
    backward = ((blocks + 1) * total.square() - 2 * total * sums + squares) / blocks  # of total - total so far
    in_any = total.square() / 3 + hidden.square() @ weight.square().T / 6
    return total, torch.maximum(torch.maximum(forward, backward), in_any).sqrt()


def sum_error(terms: Tensor) -> Tensor:
    """Error of the sum of terms >= 0 [..., n], which is no dot product on tensor cores; [..., 1]."""
    total, forward = terms.sum(-1, keepdim=True), terms.cumsum(-1)
    backward = total - forward + terms
    in_any = total.square() / 3 + terms.square().sum(-1, keepdim=True) / 6
    mean_square = torch.stack([*(sums.square().mean(-1, keepdim=True) for sums in (forward, backward)), in_any]).amax(0)
    lost = torch.where(terms < U * total, terms, 0.0).sum(-1, keepdim=True)
    n = terms.shape[-1]
    error = SIGMAS * U * (mean_square * n / 3 * (1 + _repeats(terms)[..., None] ** 2 / n)).sqrt() + lost
    return error.nan_to_num(0.0)  # of an infinite sum


def _repeats(terms: Tensor) -> Tensor:
    """How many of the terms [..., n] equal the one before and are not zero; [...]."""
    return ((terms[..., 1:] == terms[..., :-1]) & (terms[..., 1:] != 0)).sum(-1, dtype=torch.int32)


def _head_norm(proj: Interval, weight: Tensor, plan: CastPlan, eps: float) -> Interval:
    head_normed = stored(product(proj, _rstd(proj, plan, eps, plan.head_rstd)), plan.head_normed)
    return product(head_normed, (weight, weight))
