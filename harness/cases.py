"""The field's cases: what moving one boundary did to people, measured on the lab's plans beside what they reported.

A case has two sides. `before` is what its thread holds up as right, `after` what it complains of, whichever came
first; differences are after - before. A side is a cast plan, or a Way where no plan expresses it (the order or the
precision of a sum, a compiler's contraction, an all-reduce). Both sides get the same drawn inputs, of the author's
shape and distribution where the thread gives them. What it leaves open (the weights, the residual's size) is drawn in
several set-ups, the likeliest first.

Sources are public threads, their figures the authors' own, claims retold in the lab's words. The threads of cases 3
and 12 and the 2.2 % of case 22 could not be read again: those figures are the ones of the list of cases that this
project began with.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.errors import bf16_ulp
from harness.problems import heavy_tailed, layer_statistics, residual_std, residual_stream
from kernels.checks import KEEP, RNE, RTZ
from variants.catalogue import FP32, HF, ONE_ROUNDING, PLANS, plan_named
from variants.plan import CastPlan
from variants.problem import Problem
from variants.spec import applied_weight, round_to, spec, store

FACTOR = 1.5
FITS, DIFFERS, DIRECTION, UNDECIDED = "fits", "does not fit", "same direction", "cannot be decided here"


@dataclass(frozen=True)
class Way:
    """One side of a case that no cast plan expresses: its words, and a function of the drawn inputs."""

    words: str
    run: Callable[..., Tensor]


Side = CastPlan | Way
Inputs = dict[str, object]


@dataclass(frozen=True)
class Claim:
    """What a thread says. low and high hold every number that would be printed as the claimed one.

    value NaN, low and high given: a direction, the effect lies between them. All NaN: nothing the lab can measure.
    """

    text: str
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan


def printed(text: str, value: float, step: float) -> Claim:
    """A figure whose last printed digit counts `step`."""
    return Claim(text, value, value - step / 2, value + step / 2)


def count(text: str, part: int, whole: int) -> Claim:
    """A share counted once: exact. How far such a count strays is the measured range's business."""
    return Claim(text, part / whole, part / whole, part / whole)


@dataclass(frozen=True)
class Measured:
    """A case's figure: the median over draws of the first set-up, and 95 % of the draws of any set-up.

    share_differ, max_ulp and signed_bias compare after with before on the first draw: elements that are not equal,
    bf16 ulps of before where it is not 0, and mean error along before's sign over mean |before|. growth is the
    exponent of the figure against calls or layers, fitted in logarithms. NaN: does not apply.
    """

    value: float
    low: float
    high: float
    share_differ: float = math.nan
    max_ulp: float = math.nan
    signed_bias: float = math.nan
    growth: float = math.nan


def hidden(
    plan: CastPlan,
    *,
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    weight_offset: bool = False,
) -> Tensor:
    """The norm's output, `hidden` of the plan's spec, [T, D] float64. x, residual [T, D] and weight [D] bf16."""
    p = Problem(
        x=x,
        norm_weight=weight,
        qkv_weight=torch.ones(3, x.shape[1], dtype=torch.bfloat16),  # only the norm is read: the least projection
        num_q_heads=1,
        num_kv_heads=1,
        residual=residual,
        eps=eps,
        weight_offset=weight_offset,
    )
    return spec(plan, p).hidden


def run_side(side: Side, inputs: Inputs) -> Tensor:
    """One side on the drawn inputs: the Way's function, or the plan's norm output. Float64."""
    return side.run(**inputs) if isinstance(side, Way) else hidden(side, **inputs)


@dataclass(frozen=True)
class Thread:
    """Where a case comes from: its number in the list of cases, the public threads, the boundary."""

    number: int
    source: str
    where: str


@dataclass(frozen=True)
class Figure:
    """What is measured: its words, its unit, and pick(before, after), one number or one a draw."""

    quantity: str
    unit: str
    pick: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One row. draw gives the inputs of every set-up; run makes a side's output of them; grow(before, after) is the
    exponent, if the case has calls or layers."""

    thread: Thread
    sides: tuple[Side, Side]  # before, after
    figure: Figure
    claim: Claim
    why: str
    draw: Callable[[torch.Generator], list[Inputs]]
    draws: int = 6
    outputs: bool = True  # False: what the sides return is no output in bf16, so it has no ulps and no share
    run: Callable[[Side, Inputs], Tensor] = run_side
    grow: Callable[[Tensor, Tensor], float] | None = None

    def measure(self, seed: int = 0) -> Measured:
        """Draws, runs both sides and compares, on one thread. The same seed gives the same figures."""
        with _one_thread():
            return self._measure(seed)

    def _measure(self, seed: int) -> Measured:
        rng = torch.Generator().manual_seed(7919 * seed + self.thread.number)
        figures: list[list[Tensor]] = []
        for number in range(self.draws):
            for setup, inputs in enumerate(self.draw(rng)):
                before, after = (self.run(side, inputs) for side in self.sides)
                if number == 0:
                    figures.append([])
                    if setup == 0:
                        first = (before, after)
                figures[setup].append(torch.as_tensor(self.figure.pick(before, after), dtype=torch.float64).flatten())
        pooled = [torch.cat(setup) for setup in figures]
        if any(not setup.isfinite().all() or setup.numel() == 0 for setup in pooled):
            raise ValueError("the figure is not a finite number on every draw: are both sides the same?")
        low, high = (extreme(f.quantile(q).item() for f in pooled) for extreme, q in ((min, 0.025), (max, 0.975)))
        growth = self.grow(*first) if self.grow else math.nan
        changes = _changes(*first) if self.outputs else {}
        return Measured(pooled[0].quantile(0.5).item(), low, high, **changes, growth=growth)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The cases are many small sums: two threads on a busy machine took 68 s for what one does in 8."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def verdict(measured: float, low: float, high: float, claimed: float, claimed_low: float, claimed_high: float) -> str:
    """The rule. NaN stands for what a claim does not have.

    fits            the measured range meets the claimed one, and the figure lies in it or within a factor of 1.5
    does not fit    the ranges are apart
    same direction  a claim without a figure, whose direction the whole measured range has
    cannot be decided here   the claim has nothing the lab measures; or the ranges meet only because the measured one
                    is wide: the figure itself is more than a factor of 1.5 off, or a direction is had by a part of it
    """
    if math.isnan(claimed_low):
        return UNDECIDED
    if high < claimed_low or low > claimed_high:
        return DIFFERS
    if math.isnan(claimed):
        return DIRECTION if claimed_low < low and high < claimed_high else UNDECIDED
    near = claimed_low <= measured <= claimed_high or (claimed and 1 / FACTOR <= measured / claimed <= FACTOR)
    return FITS if near else UNDECIDED


def verdict_of(row: dict[str, str | float]) -> str:
    """The verdict of a row from its own numbers; empty cells count as NaN."""
    names = ("measured", "measured_low", "measured_high", "claimed", "claimed_low", "claimed_high")
    return verdict(*(math.nan if row[name] == "" else float(row[name]) for name in names))


def described(side: Side) -> str:
    """A side in words: a Way's own, a plan's name, or how it departs from the plan nearest to it."""
    if isinstance(side, Way):
        return side.words
    choices = side.choices()
    departs = {
        name: [f"{key}={word}" for key, word in choices.items() if named.plan.choices()[key] != word]
        for name, named in PLANS.items()
    }
    nearest = min(departs, key=lambda name: len(departs[name]))
    return " with ".join([nearest, ", ".join(departs[nearest])] if departs[nearest] else [nearest])


def run_cases(seed: int = 0) -> Iterator[dict[str, str | float]]:
    """One row a case, as it is measured; empty cells where something does not apply. About 10 s.

    A case that raises becomes a row with status `failed` and the reason; the others go on.
    """
    for case in CASES:
        thread, claim, (before, after) = case.thread, case.claim, case.sides
        measured, status, reason = Measured(math.nan, math.nan, math.nan), "ok", ""
        try:
            measured = case.measure(seed)
        except Exception as error:  # a case that cannot run is a row, and the cases after it go on
            status, reason = "failed", f"{type(error).__name__}: {error}"
        row = {
            "case": thread.number,
            "source": thread.source,
            "where": thread.where,
            "before": described(before),
            "after": described(after),
            "measure": case.figure.quantity,
            "measured": measured.value,
            "unit": case.figure.unit,
            "measured_low": measured.low,
            "measured_high": measured.high,
            "claimed": claim.value,
            "claimed_low": claim.low,
            "claimed_high": claim.high,
            "claimed_text": claim.text,
            "verdict": "",
            "why": case.why,
            "share_differ": measured.share_differ,
            "max_ulp": measured.max_ulp,
            "signed_bias": measured.signed_bias,
            "growth": measured.growth,
            "status": status,
            "reason": reason,
        }
        row = {name: "" if isinstance(cell, float) and math.isnan(cell) else cell for name, cell in row.items()}
        yield row if status == "failed" else row | {"verdict": verdict_of(row)}


# ---------------------------------------------------------------- drawing


def normal(rng: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal values of that deviation, bf16: drawn in the type they are stored in."""
    return (torch.randn(*shape, generator=rng) * scale).bfloat16()


def uniform(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=rng).bfloat16()


def near_one(rng: torch.Generator, size: int) -> Tensor:
    return (1 + 0.1 * torch.randn(size, generator=rng)).bfloat16()


def ones(rng: torch.Generator, size: int) -> Tensor:
    return torch.ones(size, dtype=torch.bfloat16)


def calibrated(layer: int) -> Callable[[torch.Generator, int], Tensor]:
    """Input-norm weights with the published mean and deviation of that layer of Qwen3-0.6B."""
    row = layer_statistics()[layer]
    mean, std = row["input_layernorm_mean"], row["input_layernorm_std"]
    return lambda rng, size: heavy_tailed(size, mean, std, None, rng).bfloat16()


def norm_inputs(
    tokens: int, size: int, *weights: Callable[..., Tensor], **fixed: object
) -> Callable[..., list[Inputs]]:
    """x [tokens, size] ~ N(0, 1), one set-up for each way to draw the weight."""

    def draw(rng: torch.Generator) -> list[Inputs]:
        x = normal(rng, tokens, size)
        return [{"x": x, "weight": weight(rng, size), **fixed} for weight in weights]

    return draw


def sum_inputs(
    tokens: int, size: int, *scales: tuple[float, float], weight: Callable[..., Tensor] = ones
) -> Callable[..., list[Inputs]]:
    """x and residual [tokens, size], normal, one set-up for each pair of deviations."""

    def draw(rng: torch.Generator) -> list[Inputs]:
        return [
            {"x": normal(rng, tokens, size, scale=a), "residual": normal(rng, tokens, size, scale=b), "weight": w}
            for w in [weight(rng, size)]
            for a, b in scales
        ]

    return draw


def values(n: int, *names: str) -> Callable[..., list[Inputs]]:
    """n normal bf16 values for each name."""
    return lambda rng: [{name: normal(rng, n) for name in names}]


# ---------------------------------------------------------------- figures


def share(before: Tensor, after: Tensor) -> Tensor:
    return (after != before).double().mean()


def share_by_row(before: Tensor, after: Tensor) -> Tensor:
    return (after != before).double().mean(-1)


def largest(before: Tensor, after: Tensor) -> Tensor:
    return (after - before).abs().max()


def mean_abs(before: Tensor, after: Tensor) -> Tensor:
    return (after - before).abs().mean()


def largest_relative(before: Tensor, after: Tensor) -> Tensor:
    return ((after - before).abs() / before.abs())[before != 0].max()


def ulps(before: Tensor, after: Tensor) -> Tensor:
    """|after - before| in bf16 ulps of before, where before is not 0."""
    return ((after - before).abs() / bf16_ulp(before))[before != 0]


def beyond_ulps(limit: float, before: Tensor, after: Tensor) -> Tensor:
    """Of the elements that differ, the share that moves by more than `limit` ulps."""
    moved = ulps(before, after)
    return (moved[moved > 0] > limit).double().mean()


def magnitude_bias(before: Tensor, after: Tensor) -> Tensor:
    return ((after.abs() - before.abs()) / before.abs())[before != 0].mean()


def relative_l1(before: Tensor, after: Tensor) -> Tensor:
    return (after - before).abs().mean() / before.abs().mean()


def outside(before: Tensor, after: Tensor) -> Tensor:
    """Share outside rtol = atol = 1e-3, the test of the kernel that met the truncating multiply."""
    return ((after - before).abs() > 1e-3 + 1e-3 * before.abs()).double().mean()


def exponent(errors: Tensor) -> float:
    """Slope of log(errors) against log(1, 2, 3, …), the first two left out: 1 is linear, 0.5 a square root."""
    log_n = torch.arange(1, len(errors) + 1, dtype=torch.float64).log()[2:]
    log_e = errors.log()[2:]
    log_n = log_n - log_n.mean()
    return ((log_n * (log_e - log_e.mean())).sum() / log_n.square().sum()).item()


def _changes(before: Tensor, after: Tensor) -> dict[str, float]:
    moved = ulps(before, after)
    size = before.abs().mean()
    return {
        "share_differ": share(before, after).item(),
        "max_ulp": moved.max().item() if len(moved) else 0.0,
        "signed_bias": ((after - before) * before.sign()).mean().item() / size.item() if size else math.nan,
    }


# ---------------------------------------------------------------- sides


def summed(plan: Side, inputs: Inputs) -> Tensor:
    """x + residual as the plan stores it, [T, D]: the first line of its spec."""
    return store(inputs["x"].double() + inputs["residual"].double(), plan.x)


def offset_weight(plan: Side, inputs: Inputs) -> Tensor:
    return applied_weight(inputs["weight"], plan)


def fp8_codes(plan: Side, inputs: Inputs) -> Tensor:
    """The norm's output in FP8 (e4m3), scaled a token at a time so that its largest value becomes 448."""
    value = hidden(plan, **inputs)
    return (value * (448 / value.abs().amax(-1, keepdim=True))).float().to(torch.float8_e4m3fn).double()


def rotated(plan: Side, inputs: Inputs) -> Tensor:
    """The norm's output through RoPE in fp32, rounded to bf16."""
    value = hidden(plan, x=inputs["x"], weight=inputs["weight"])
    cos, sin = inputs["angle"].double().cos(), inputs["angle"].double().sin()
    a, b = value.chunk(2, -1)
    return store(torch.cat([a * cos - b * sin, b * cos + a * sin], -1), RNE)


def accumulated(plan: Side, inputs: Inputs) -> Tensor:
    """The residual after each call, [calls, T, D]: residual = x + residual, stored as the plan says."""
    residual, after = inputs["residual"], []
    for x in inputs["calls"]:
        residual = summed(plan, {"x": x, "residual": residual})
        after.append(residual)
    return torch.stack(after)


def norm_of_sum(sum_of_squares: Callable[[Tensor], Tensor], store_as: tuple[str, str, str]) -> Callable[..., Tensor]:
    """A norm from a way to sum squares; rstd, normed and output stored as store_as says, unless inputs name `products`,
    which then says it for the last two."""

    def run(x: Tensor, weight: Tensor, eps: float = 1e-5, products: str | None = None) -> Tensor:
        x, weight = x.double(), weight.double()
        normed, out = (products, products) if products else store_as[1:]
        rstd = store((sum_of_squares(x) / x.shape[-1] + eps).rsqrt(), store_as[0])
        return store(store(x * rstd, normed) * weight, out)

    return run


def exact_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, **_: object) -> Tensor:
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


def exact_sum(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True)


def fp32_sum(groups: int, x: Tensor) -> Tensor:
    """Sum of squares in fp32: within each of 2^k groups of neighbours from left to right, then the groups in pairs."""
    squares = x.float().square().reshape(*x.shape[:-1], groups, -1)
    total = functools.reduce(torch.add, squares.unbind(-1))
    while total.shape[-1] > 1:
        first, second = total.chunk(2, -1)
        total = first + second
    return total.double()


def bf16_sum(storage: str, x: Tensor) -> Tensor:
    """Sum of squares in 16 lanes, every square and every partial sum stored in bf16; the lanes are added last."""

    def add(total: Tensor, value: Tensor) -> Tensor:
        return round_to(total + value, storage)

    squares = round_to(x.float().square(), storage).reshape(*x.shape[:-1], -1, 16)
    lanes = functools.reduce(add, squares.unbind(-2))
    return functools.reduce(add, lanes.unbind(-1)).unsqueeze(-1).double()


def eps_kept(x: Tensor, weight: Tensor, eps: float, wide: bool) -> Tensor:
    """A norm in fp32 whose eps, root and reciprocal are fp32 steps, or fp64 rounded once."""
    mean = x.float().square().mean(-1, keepdim=True)
    rstd = (1 / (mean.double() + eps).sqrt()).float() if wide else 1 / (mean + torch.tensor(eps)).sqrt()
    return ((x.float() * rstd) * weight.float()).bfloat16().double()


def reduced(parts: list[Tensor], residual: Tensor, storage: str) -> Tensor:
    """Ranks' parts summed in fp32, stored, then added to the residual and rounded to bf16."""
    total = store(sum(part.double() for part in parts), storage)
    return store(total + residual.double(), RNE)


def rope(x0: Tensor, x1: Tensor, f0: Tensor, f1: Tensor, first: str, second: str) -> Tensor:
    """x0 f0 + x1 f1, each product stored as it says, the sum rounded to bf16."""
    x0, x1, f0, f1 = (value.double() for value in (x0, x1, f0, f1))
    return store(store(x0 * f0, first) + store(x1 * f1, second), RNE)


def exact_step(stream: Tensor, weight: Tensor, projection: Tensor, scale: float = 1.0) -> Tensor:
    """stream + scale * W norm(stream) in float64. [T, D], [D], [D, D]."""
    normed = stream * (stream.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    return stream + scale * (normed @ projection.double().T)


def plan_step(plan: CastPlan, stream: Tensor, weight: Tensor, projection: Tensor) -> Tensor:
    """The same by the plan's spec: W norm(stream) stored as proj, the sum as x."""
    p = Problem(x=stream.bfloat16(), norm_weight=weight, qkv_weight=projection, num_q_heads=2, num_kv_heads=1)
    return store(stream + spec(plan, p).proj.flatten(1), plan.x)


def parallel_step(stream: Tensor, weight: Tensor, projection: Tensor, storage: str) -> Tensor:
    """The same over 8 tensor-parallel ranks: each rank's part of W norm(stream) stored, their sum rounded to bf16."""
    normed = hidden(ONE_ROUNDING, x=stream.bfloat16(), weight=weight)
    parts = zip(normed.chunk(8, -1), projection.double().chunk(8, -1), strict=True)
    return store(stream + store(sum(store(h @ w.T, storage) for h, w in parts), RNE), RNE)


def stack(side: Side, inputs: Inputs) -> Tensor:
    """The residual stream after each of L steps, [L, T, D]. A Way's function is its step."""
    step = side.run if isinstance(side, Way) else functools.partial(plan_step, side)
    streams = [inputs["x"].double()]
    for weight, projection in zip(inputs["norms"], inputs["projections"], strict=True):
        streams.append(step(streams[-1], weight, projection))
    return torch.stack(streams[1:])


def stack_errors(side: Side, inputs: Inputs) -> Tensor:
    """The side's stream less the float64 one's, [L, T, D]."""
    return stack(side, inputs) - stack(EXACT_STEP, inputs)


def stack_inputs(
    layers: int, *, published: bool = False, massive: bool = False, tokens: int = 16, size: int = 256
) -> Callable[..., list[Inputs]]:
    """Inputs of a stack. Deltas keep the size of the first stream; published: they let the stream grow as
    Qwen3-0.6B's; massive: the stream of its layer 8, whose first token and four channels stand out."""

    def draw(rng: torch.Generator) -> list[Inputs]:
        sizes = [residual_std(layer) if published else 1.0 for layer in range(layers + 1)]
        steps = [math.sqrt(b * b - a * a) if published else 1.0 for a, b in zip(sizes, sizes[1:], strict=False)]
        x = normal(rng, tokens, size, scale=sizes[0])
        if massive:
            x = residual_stream(tokens, size, 8, rng)
            steps = [x.double()[1:].square().mean().sqrt().item()] * layers
        return [
            {
                "x": x,
                "norms": [near_one(rng, size) for _ in steps],
                "projections": [normal(rng, size, size, scale=step / math.sqrt(size)) for step in steps],
            }
        ]

    return draw


def depth_exponent(errors: Tensor) -> Tensor:
    return torch.tensor(exponent(errors.square().mean((1, 2)).sqrt()))


def outlier_ratio(before: Tensor, after: Tensor) -> Tensor:
    """rms relative error of rstd on the tokens with an outlier over that on those without."""
    error = (after / before - 1).square().mean(-1)
    return (error[1::2].mean() / error[::2].mean()).sqrt()


def outlier_inputs(outlier: float) -> Callable[..., list[Inputs]]:
    """x ~ N(0, 1) [512, D], D = 5376 or 1024; every other token has one channel of that size, anywhere."""

    def draw(rng: torch.Generator) -> list[Inputs]:
        setups = []
        for size in (5376, 1024):
            x = normal(rng, 512, size)
            x[range(1, 512, 2), torch.randint(size, (256,), generator=rng)] = outlier
            setups.append({"x": x})
        return setups

    return draw


def residual_calls(rng: torch.Generator) -> list[Inputs]:
    """72 additions of x ~ N(0, 1) [4, 4096] to a residual of the same size; x new each call, x the same, x a third."""
    residual, same = normal(rng, 4, 4096), normal(rng, 4, 4096)
    steps = [[normal(rng, 4, 4096, scale=scale) for _ in range(72)] for scale in (1.0, 0.3)]
    return [{"residual": residual, "calls": calls} for calls in (steps[0], [same] * 72, steps[1])]


def shrink(before: Tensor, after: Tensor) -> Tensor:
    """Change of the mean magnitude after each call, [calls]."""
    return after.abs().mean((1, 2)) / before.abs().mean((1, 2)) - 1


def add_add(rng: torch.Generator) -> list[Inputs]:
    """a, b, c fp16 uniform in -1 … 1, 500 tests of 64·5·4·3 elements."""
    return [{name: (2 * torch.rand(500, 3840, generator=rng) - 1).half() for name in "abc"}]


def failing_nmse(before: Tensor, after: Tensor) -> Tensor:
    """Normalised mean squared error of those tests that exceed the cap of 1e-7: only such a test is reported."""
    errors = (after - before).square().sum(-1) / before.square().sum(-1)
    return errors[errors > 1e-7]


def indexer_outputs(rng: torch.Generator) -> list[Inputs]:
    """1,000 runs of 37 x 128 outputs: LayerNorm with normal weight and bias, RoPE with normal cos and sin on half."""
    x = normal(rng, 1000, 37, 128).float()
    centred = x - x.mean(-1, keepdim=True)
    normed = centred * (centred.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    value = normed * torch.randn(1000, 1, 128, generator=rng) + torch.randn(1000, 1, 128, generator=rng)
    cos, sin = torch.randn(2, 1000, 37, 32, generator=rng)
    a, b, rest = value.split([32, 32, 64], -1)
    return [{"value": torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1).flatten(1)}]


def all_reduce_inputs(ranks: int, *residuals: float) -> Callable[..., list[Inputs]]:
    """A part ~ N(0, 1) [64, 4096] from every rank and a residual, one set-up for each deviation of it."""
    return lambda rng: [
        {"parts": [normal(rng, 64, 4096) for _ in range(ranks)], "residual": normal(rng, 64, 4096, scale=scale)}
        for scale in residuals
    ]


# ---------------------------------------------------------------- the cases

TRUNCATED = ONE_ROUNDING.replace(x=RTZ)
BF16_VARIANCE = ONE_ROUNDING.replace(statistics=RNE, variance=RNE)
FP32_SUM = Way("sum of squares exact, one rounding", norm_of_sum(exact_sum, (KEEP, KEEP, RNE)))
FP32_SUM_PRODUCTS = Way("sum of squares in fp32, products in bf16", norm_of_sum(exact_sum, (KEEP, RTZ, RTZ)))
EXACT_NORM = Way("float64", exact_norm)
BF16_SUM, BF16_SUM_TRUNCATED = (
    Way(f"squares and sums in bf16 {how}, 16 lanes", norm_of_sum(functools.partial(bf16_sum, mode), (mode, mode, mode)))
    for how, mode in (("to nearest", RNE), ("truncated", RTZ))
)
RSTD_OF_EXACT_SUM = Way("rstd, squares summed exactly", lambda x: (exact_sum(x.double()) / x.shape[-1] + 1e-6).rsqrt())
RSTD_OF_BF16_SUM = Way(
    "rstd, squares and sums in bf16, 16 lanes", lambda x: (bf16_sum(RNE, x) / x.shape[-1] + 1e-6).rsqrt()
)
EXACT_STEP = Way("every step in float64", exact_step)
ROUNDED_PRODUCTS = Way("both RoPE products in bf16", functools.partial(rope, first=RNE, second=RNE))
ONE_PRODUCT = Way("one RoPE product kept (addcmul, fma)", functools.partial(rope, first=RNE, second=KEEP))
KEPT_PRODUCTS = Way("RoPE in fp32, rounded once", functools.partial(rope, first=KEEP, second=KEEP))
TRUNCATED_PRODUCTS = Way("both RoPE products truncated", functools.partial(rope, first=RTZ, second=RTZ))
LLADA = norm_inputs(128, 2048, near_one, normal, uniform)
ROPE_VALUES = values(1 << 20, "x0", "x1", "f0", "f1")
ADD_SCALES = ((1.0, 1.0), (1.0, 30.0), (3.0, 3.0))


def grouped(groups: int) -> Way:
    """A norm with one rounding whose squares are summed in that many groups."""
    run = norm_of_sum(functools.partial(fp32_sum, groups), (KEEP, KEEP, RNE))
    return Way(f"squares summed in fp32 in {groups} groups", run)


def angles(rng: torch.Generator, tokens: int, size: int) -> Tensor:
    """Positions up to 4,096 times RoPE's frequencies with base 10,000, [tokens, size / 2]."""
    positions = torch.randint(4096, (tokens, 1), generator=rng)
    return positions * 10000.0 ** (-torch.arange(size // 2) * 2 / size)


def rope_inputs(rng: torch.Generator) -> list[Inputs]:
    """Activations ~ N(0, 1), cos and sin of real angles, bf16, [2048, 64] each."""
    angle = angles(rng, 2048, 128)
    x0, x1 = normal(rng, 2, 2048, 64)
    return [{"x0": x0, "x1": x1, "f0": angle.cos().bfloat16(), "f1": angle.sin().bfloat16()}]


CASES: tuple[Case, ...] = (
    Case(
        Thread(1, "vllm #42325, #42379", "normed"),
        sides=(HF, ONE_ROUNDING),
        figure=Figure("largest difference in one call", "absolute", largest),
        claim=printed("a reproduction prints a maximum of 3.125e-2", 3.125e-2, 1e-5),
        why="norm of N(0, 1) with weights near 1, or normal, or uniform: one bf16 ulp of the largest outputs, 4 to 8",
        draw=LLADA,
    ),
    Case(
        Thread(1, "vllm #42379", "normed"),
        sides=(HF, ONE_ROUNDING),
        figure=Figure("mean difference of an element in one call", "absolute", mean_abs),
        claim=printed("about 0.03 error for every element and layer", 0.03, 0.01),
        why="the same norm: 0.03 is what the worst of its elements does, three in four do not differ at all",
        draw=LLADA,
    ),
    Case(
        Thread(3, "TensorRT-LLM #14464", "hidden before FP8"),
        sides=(ONE_ROUNDING, FP32),
        figure=Figure("FP8 codes that differ", "share", share),
        claim=Claim("GSM8K falls from 93.0 to 83.5"),
        why="N(0, 1) through the norm to e4m3, scaled a token at a time; the benchmark on the checkpoint would decide",
        draw=norm_inputs(128, 2048, near_one),
        run=fp8_codes,
    ),
    Case(
        Thread(4, "verl-omni #637", "normed"),
        sides=(HF, ONE_ROUNDING),
        figure=Figure("elements that differ", "share", share),
        claim=printed("norm and q/k norm are 74 % equal", 0.26, 0.01),
        why="N(0, 1), hidden size 2048, weights of the published spread of Qwen3-0.6B's layers 14, 0, 27, or near 1",
        draw=norm_inputs(128, 2048, calibrated(14), calibrated(0), calibrated(27), near_one),
    ),
    Case(
        Thread(5, "TransformerEngine #1132, transformers #33133", "normed"),
        sides=(HF, ONE_ROUNDING),
        figure=Figure(
            "elements of the stream that differ by more than 0.01 after 27 layers",
            "share",
            lambda before, after: ((after[-1] - before[-1]).abs() > 0.01).double().mean(),
        ),
        claim=Claim("80 % of hidden values differ by more than 0.01"),
        why="a drawn stack whose stream grows as Qwen3-0.6B's; the share follows its size, so Llama 3 would decide",
        draw=stack_inputs(27, published=True),
        draws=2,
        run=stack,
        grow=lambda before, after: depth_exponent(after - before).item(),
    ),
    Case(
        Thread(6, "vllm #49616, #49639", "normed"),
        sides=(HF, ONE_ROUNDING),
        figure=Figure("elements that differ in one row of 4,096", "share", share_by_row),
        claim=count("1,208 of 4,096 elements", 1208, 4096),
        why="single rows of N(0, 1): they share one rstd, so a row's share strays 12 times as far as 4,096 draws would",
        draw=norm_inputs(150, 4096, near_one, normal, uniform),
        draws=2,
    ),
    Case(
        Thread(7, "vllm #52104, vllm.cpp #3103", "x + residual"),
        sides=(ONE_ROUNDING.replace(x=KEEP), ONE_ROUNDING),
        figure=Figure("norm outputs that differ in one row of 128", "share", share_by_row),
        claim=count("33 of 128 values of the first norm", 33, 128),
        why="single rows, x ~ N(0, 1), the residual 0.3, 1 or 3 times as large: the sum rounded before the variance",
        draw=sum_inputs(400, 128, (1.0, 1.0), (1.0, 0.3), (1.0, 3.0), weight=near_one),
        draws=2,
    ),
    Case(
        Thread(9, "vllm #53203", "weight offset"),
        sides=(plan_named("gemma"), plan_named("gemma-bf16-offset")),
        figure=Figure("error of the scale 1 + w at w = 0.05", "relative", largest_relative),
        claim=printed("about 0.3 % scale error at w = 0.05", 0.003, 0.001),
        why="1 + w formed in bf16 against fp32, w = 0.05 as bf16 holds it: exact, nothing is drawn",
        draw=lambda rng: [{"weight": torch.tensor([0.05], dtype=torch.bfloat16)}],
        draws=1,
        outputs=False,
        run=offset_weight,
    ),
    Case(
        Thread(9, "vllm #29810", "weight offset"),
        sides=(plan_named("gemma"), plan_named("gemma-bf16-offset")),
        figure=Figure("outputs that differ where w = 15.8125", "share", share),
        claim=Claim("weights such as 15.8125 make it visible", low=0.0, high=1.0),
        why="norm of N(0, 1) with that weight: the scale errs by 0.37 %, 1.2 times as much as at w = 0.05, so it shows "
        "in absolute differences, not in ulps",
        draw=lambda rng: [
            {"x": normal(rng, 64, 1024), "weight": torch.full([1024], 15.8125).bfloat16(), "weight_offset": True}
        ],
    ),
    Case(
        Thread(10, "vllm #57123", "rstd"),
        sides=(
            Way("eps, root and reciprocal in fp32", functools.partial(eps_kept, wide=False)),
            Way("eps, root and reciprocal in fp64, then fp32", functools.partial(eps_kept, wide=True)),
        ),
        figure=Figure("elements that differ", "share", share),
        claim=printed("about 1e-5 of the output elements", 1e-5, 1e-5),
        why="578 tokens of N(0, 1) of hidden size 4096 a draw, eps 1e-5; a GPU's approximate root would add to it",
        draw=norm_inputs(578, 4096, near_one, normal, eps=1e-5),
        draws=8,
    ),
    Case(
        Thread(12, "vllm #37838", "normed"),
        sides=(HF, ONE_ROUNDING),
        figure=Figure("elements that differ when a norm loses its inner rounding", "share", share),
        claim=Claim("a few elements in millions, the compiler removes the rounding", 3e-6, 1e-6, 1e-5),
        why="thread not read again; a removed rounding moves a quarter of all elements, a few in millions is what the "
        "order of a sum does (next row)",
        draw=norm_inputs(128, 4096, near_one, uniform),
    ),
    Case(
        Thread(12, "vllm #37838", "order of the sum"),
        sides=(FP32_SUM, grouped(128)),
        figure=Figure("elements that differ when only the order of the sum changes", "share", share),
        claim=Claim("a few elements in millions", 3e-6, 1e-6, 1e-5),
        why="one norm of N(0, 1) [512, 4096], no boundary moved",
        draw=norm_inputs(512, 4096, near_one),
    ),
    Case(
        Thread(14, "aiter #5151", "x + residual"),
        sides=(ONE_ROUNDING, TRUNCATED),
        figure=Figure("mean change of the magnitude of x + residual, both N(0, 1)", "relative", magnitude_bias),
        claim=printed("mean signed magnitude error, smaller end: -1.53e-3", -1.53e-3, 1e-5),
        why="the thread's own inputs (128 of its 512 rows a draw): a sum of two bf16 values of a size is often exact",
        draw=sum_inputs(128, 4096, ADD_SCALES[0], ADD_SCALES[2]),
        draws=4,
        run=summed,
    ),
    Case(
        Thread(14, "aiter #5151", "x + residual"),
        sides=(ONE_ROUNDING, TRUNCATED),
        figure=Figure("elements of x + residual that differ, residual ~ N(0, 30)", "share", share),
        claim=printed("27 to 50 % of residual_out, larger end", 0.50, 0.01),
        why="the thread's own inputs, the residual 30 times as large, where the most sums are inexact",
        draw=sum_inputs(128, 4096, ADD_SCALES[1]),
        draws=4,
        run=summed,
    ),
    Case(
        Thread(14, "aiter #5151", "hidden"),
        sides=(ONE_ROUNDING, ONE_ROUNDING.replace(hidden=RTZ)),
        figure=Figure("elements of the norm's output that differ", "share", share),
        claim=printed("27 to 50 % of residual_out, larger end", 0.50, 0.01),
        why="the call's other output, whose products are never exact: the 50 % fit it, not the sum of the row above",
        draw=sum_inputs(128, 4096, *ADD_SCALES),
        draws=2,
    ),
    Case(
        Thread(14, "aiter #5151", "x + residual"),
        sides=(ONE_ROUNDING, TRUNCATED),
        figure=Figure("largest step of one call", "bf16 ulp", lambda before, after: ulps(before, after).max()),
        claim=Claim("at most 1 ulp a call", 1.0, 0.0, 1.0),
        why="the thread's own inputs: what every tolerance passes",
        draw=sum_inputs(128, 4096, *ADD_SCALES),
        draws=2,
        run=summed,
    ),
    Case(
        Thread(14, "aiter #5151", "x + residual"),
        sides=(ONE_ROUNDING, TRUNCATED),
        figure=Figure(
            "change of the residual's mean magnitude after 72 calls",
            "relative",
            lambda before, after: shrink(before, after)[-1],
        ),
        claim=printed("the residual shrinks by 8.98 %", -0.0898, 1e-4),
        why="x ~ N(0, 1) new in each call, or the same, or a third of it, onto a residual ~ N(0, 1)",
        draw=residual_calls,
        draws=2,
        run=accumulated,
        grow=lambda before, after: exponent(shrink(before, after).abs()),
    ),
    Case(
        Thread(15, "aiter #3806", "statistics, variance"),
        sides=(FP32, BF16_VARIANCE),
        figure=Figure(
            "mean distance to fp32 if the variance is formed in bf16",
            "2^-8 of the value",
            lambda before, after: ((after - before).abs() / before.abs())[before != 0].mean() * 256,
        ),
        claim=printed("bf16 accumulation: mean 0.36 ulp, max 1.00", 0.36, 0.01),
        why="the least bf16 variance there is, squares and mean rounded once, is already farther off than reported",
        draw=norm_inputs(1024, 1024, ones),
    ),
    Case(
        Thread(15, "aiter #3806", "out alone"),
        sides=(FP32, ONE_ROUNDING),
        figure=Figure(
            "mean distance to fp32 if nothing but the output is rounded",
            "2^-8 of the value",
            lambda before, after: ((after - before).abs() / before.abs())[before != 0].mean() * 256,
        ),
        claim=printed("bf16 accumulation: mean 0.36 ulp, max 1.00", 0.36, 0.01),
        why="a correctly rounded norm: 1 / (4 ln 2) = 0.3607 and at most 1, so the figures show no bf16 accumulation",
        draw=norm_inputs(1024, 1024, ones),
    ),
    Case(
        Thread(16, "aiter #2586", "all-reduce"),
        sides=(
            Way("sum of ranks to bf16, then + residual", functools.partial(reduced, storage=RNE)),
            Way("sum of ranks kept, then + residual", functools.partial(reduced, storage=KEEP)),
        ),
        figure=Figure("elements of the new residual that differ", "share", share),
        claim=printed("about 25 % of the elements", 0.25, 0.01),
        why="4 ranks' parts ~ N(0, 1), the residual as large as one part, a quarter or four times it",
        draw=all_reduce_inputs(4, 1.0, 0.25, 4.0),
        draws=4,
    ),
    Case(
        Thread(16, "aiter #2586, sglang #28226", "all-reduce"),
        sides=(
            Way("sum of ranks to bf16, then + residual", functools.partial(reduced, storage=RNE)),
            Way("sum of ranks kept, then + residual", functools.partial(reduced, storage=KEEP)),
        ),
        figure=Figure(
            "of the elements that differ, those that move by more than 4 ulps",
            "share",
            functools.partial(beyond_ulps, 4),
        ),
        claim=Claim("1 to 4 ulps; elsewhere: exactly 1 ulp", 0.0, 0.0, 0.0),
        why="the same sums; where sum and residual cancel, half an ulp of the sum is many ulps of the result",
        draw=all_reduce_inputs(4, 1.0, 0.25, 4.0),
        draws=4,
    ),
    Case(
        Thread(16, "TransformerEngine #1761", "all-reduce"),
        sides=(
            Way("8 ranks' parts kept in fp32", functools.partial(parallel_step, storage=KEEP)),
            Way("8 ranks' parts stored in bf16", functools.partial(parallel_step, storage=RNE)),
        ),
        figure=Figure(
            "relative rms difference of the stream after 32 layers",
            "relative",
            lambda before, after: (after[-1] - before[-1]).square().mean().sqrt() / before[-1].square().mean().sqrt(),
        ),
        claim=Claim("an average logit error of 15 % between TP degrees"),
        why="a drawn stack, whose layers hardly amplify; logits of a checkpoint at two TP degrees would decide",
        draw=stack_inputs(32),
        draws=2,
        run=stack,
        grow=lambda before, after: depth_exponent(after - before).item(),
    ),
    Case(
        Thread(17, "amd/IRON #139", "rstd, normed"),
        sides=(ONE_ROUNDING, ONE_ROUNDING.replace(rstd=RNE, normed=RNE)),
        figure=Figure(
            "exponent of the error's growth with depth, rstd in bf16",
            "exponent",
            lambda before, after: depth_exponent(after),
        ),
        claim=Claim("with rstd in bf16 the error grows linearly with depth", 1.0, 0.75, 1.25),
        why="rms error against float64 over 36 additions of a drawn stack; halfway to a square root counts as linear",
        draw=stack_inputs(36),
        draws=3,
        outputs=False,
        run=stack_errors,
        grow=lambda before, after: depth_exponent(after).item(),
    ),
    Case(
        Thread(17, "amd/IRON #139", "rstd, normed"),
        sides=(ONE_ROUNDING, ONE_ROUNDING.replace(rstd=RNE, normed=RNE)),
        figure=Figure(
            "what rounding rstd adds to that exponent",
            "exponent",
            lambda before, after: depth_exponent(after) - depth_exponent(before),
        ),
        claim=Claim("without it the error grows as the root of depth: half less", 0.5, 0.25, 0.75),
        why="the same stack with and without: rounding the stream itself, which grows as a root, is linear already",
        draw=stack_inputs(36),
        draws=3,
        outputs=False,
        run=stack_errors,
        grow=lambda before, after: depth_exponent(before).item(),
    ),
    Case(
        Thread(17, "amd/IRON #139", "rstd"),
        sides=(
            EXACT_STEP,
            Way("every norm 0.3 % too large, nothing rounded", functools.partial(exact_step, scale=1.003)),
        ),
        figure=Figure(
            "exponent of the growth of a coherent error of rstd alone",
            "exponent",
            lambda before, after: depth_exponent(after),
        ),
        claim=Claim("an error of one direction in every norm adds up linearly", 1.0, 0.75, 1.25),
        why="the same stack: the error stays the same share of a stream whose drawn deltas do not line up",
        draw=stack_inputs(36),
        draws=3,
        outputs=False,
        run=stack_errors,
        grow=lambda before, after: depth_exponent(after).item(),
    ),
    Case(
        Thread(18, "triton #11217, #11227", "one product"),
        sides=(
            Way("a·b to nearest", lambda a, b: store(a.double() * b.double(), RNE)),
            Way("a·b truncated", lambda a, b: store(a.double() * b.double(), RTZ)),
        ),
        figure=Figure("products of 2^20 random pairs that differ", "share", share),
        claim=Claim("52.58 % and 52.54 % are equal", 1 - 0.5256, 1 - 0.52585, 1 - 0.52535),
        why="normal bf16 pairs: half of all products are rounded up, less those that are exact or tie downwards",
        draw=values(1 << 20, "a", "b"),
        draws=4,
    ),
    Case(
        Thread(18, "triton #11217", "RoPE products"),
        sides=(KEPT_PRODUCTS, TRUNCATED_PRODUCTS),
        figure=Figure("RoPE outputs outside 1e-3 of fp32, products truncated", "share", outside),
        claim=printed("about 41 % on AMD", 0.41, 0.01),
        why="activations and factors normal as in that kernel's test, the reference rounded to bf16, atol = rtol",
        draw=ROPE_VALUES,
        draws=4,
    ),
    Case(
        Thread(18, "triton #11217", "RoPE products"),
        sides=(KEPT_PRODUCTS, ROUNDED_PRODUCTS),
        figure=Figure("RoPE outputs outside 1e-3 of fp32, the same formula to nearest", "share", outside),
        claim=printed("about 14 % for the same formula in eager torch", 0.14, 0.01),
        why="the same test: the formula with both products rounded; eager's addcmul is another formula (next row)",
        draw=ROPE_VALUES,
        draws=4,
    ),
    Case(
        Thread(18, "triton #11217", "RoPE products"),
        sides=(KEPT_PRODUCTS, ONE_PRODUCT),
        figure=Figure("RoPE outputs outside 1e-3 of fp32, addcmul to nearest", "share", outside),
        claim=printed("about 14 % for the same formula in eager torch", 0.14, 0.01),
        why="the same test: eager keeps the second product, so part of 41 against 14 is a boundary, not truncation",
        draw=ROPE_VALUES,
        draws=4,
    ),
    Case(
        Thread(19, "sglang #34347, #34505", "RoPE products"),
        sides=(ROUNDED_PRODUCTS, ONE_PRODUCT),
        figure=Figure(
            "of the outputs that differ, those that move by more than 1 ulp", "share", functools.partial(beyond_ulps, 1)
        ),
        claim=Claim("the contracted result differs by one ulp", 0.0, 0.0, 0.0),
        why="N(0, 1) turned by real angles: where the products cancel, half an ulp of one is many ulps of the result",
        draw=rope_inputs,
    ),
    Case(
        Thread(20, "sglang #27540", "sum of squares"),
        sides=(RSTD_OF_EXACT_SUM, RSTD_OF_BF16_SUM),
        figure=Figure("rstd's error on tokens with a massive activation over that on others", "ratio", outlier_ratio),
        claim=Claim("massive activations cost a bf16 sum of squares its precision", low=1.0, high=math.inf),
        why="one channel of 1,800 times the rms, as a public sample of Qwen2.5 has it: its square outweighs all "
        "that the sum loses, so such tokens err less",
        draw=outlier_inputs(1800.0),
        draws=4,
        outputs=False,
    ),
    Case(
        Thread(20, "sglang #27540", "sum of squares"),
        sides=(RSTD_OF_EXACT_SUM, RSTD_OF_BF16_SUM),
        figure=Figure(
            "rstd's error on tokens with an outlier of 32 times the rms over that on others", "ratio", outlier_ratio
        ),
        claim=Claim("massive activations cost a bf16 sum of squares its precision", low=1.0, high=math.inf),
        why="the same with outliers too small to be called massive: they swallow what is added to them, and do cost",
        draw=outlier_inputs(32.0),
        draws=4,
        outputs=False,
    ),
    Case(
        Thread(20, "sglang #27540", "statistics, variance"),
        sides=(HF, HF.replace(statistics=RNE, variance=RNE)),
        figure=Figure(
            "1 - mean cosine of the streams after 58 layers",
            "1 - cosine",
            lambda before, after: 1 - torch.cosine_similarity(before[-1], after[-1], dim=-1).mean(),
        ),
        claim=Claim("cosine per layer falls from 0.913 to 0.513"),
        why="a drawn stack with massive activations; an error of rstd is a common factor: gemma-4 itself would decide",
        draw=stack_inputs(58, massive=True),
        draws=1,
        run=stack,
        grow=lambda before, after: exponent(1 - torch.cosine_similarity(before, after, dim=-1).mean(-1)),
    ),
    Case(
        Thread(22, "pytorch #141727", "out"),
        sides=(EXACT_NORM, FP32_SUM),
        figure=Figure("largest error against float64", "absolute", largest),
        claim=printed("0.0311 eager and compiled", 0.0311, 1e-4),
        why="the thread's own inputs, x and scale normal, [314, 4096]: half an ulp at 8 to 16, one rounding's all",
        draw=norm_inputs(314, 4096, normal),
        draws=8,
    ),
    Case(
        Thread(22, "pytorch #158699", "normed"),
        sides=(HF.replace(x=KEEP), ONE_ROUNDING.replace(x=KEEP)),
        figure=Figure("largest difference", "absolute", largest),
        claim=printed("at most 0.0078, compiled against eager", 0.0078, 1e-4),
        why="the thread's own inputs, all uniform in 0 to 1: outputs stay below 2, where one ulp is 0.0078",
        draw=lambda rng: [
            {
                "x": uniform(rng, 128, 2048),
                "residual": uniform(rng, 128, 2048),
                "weight": uniform(rng, 2048),
                "eps": 1e-5,
            }
        ],
    ),
    Case(
        Thread(22, "pytorch #141727, #158699", "normed"),
        sides=(HF, ONE_ROUNDING),
        figure=Figure("elements that differ when Inductor drops the inner cast", "share", share),
        claim=Claim("2.2 % of the elements"),
        why="a dropped inner cast moves a quarter; the passage with 2.2 % was not found again: its inputs would decide",
        draw=norm_inputs(128, 4096, near_one, uniform),
    ),
    Case(
        Thread(25, "Megatron-LM #6459", "order of the sum"),
        sides=(grouped(1), grouped(128)),
        figure=Figure("largest relative difference", "relative", largest_relative),
        claim=Claim("within one ulp, at most 7.6e-3", 7.6e-3, 0.0, 7.65e-3),
        why="512 tokens, 16 heads of 128: one ulp of a few elements; a moved cast stays at 7.8e-3 too, in a quarter of "
        "the elements, so this bound tells no order of sums from an order of casts",
        draw=norm_inputs(512 * 16, 128, near_one),
    ),
    Case(
        Thread(26, "llama.cpp #28719", "a + b"),
        sides=(
            Way("a + b to fp16, + c to fp16", lambda a, b, c: ((a + b) + c).double()),
            Way("a + b in fp32, + c to fp16", lambda a, b, c: (a.float() + b.float() + c.float()).half().double()),
        ),
        figure=Figure("NMSE of the tests that exceed the cap of 1e-7", "NMSE", failing_nmse),
        claim=printed("1.02e-7, over a cap of 1e-7", 1.02e-7, 1e-9),
        why="the test's own shape, uniform in -1 to 1: its mean is 9.0e-8, the cap lies two deviations above",
        draw=add_add,
        draws=3,
        outputs=False,
    ),
    Case(
        Thread(27, "Liger-Kernel #1462", "weight offset"),
        sides=(plan_named("gemma"), plan_named("gemma-bf16-offset")),
        figure=Figure("largest difference, [128, 4096]", "absolute", largest),
        claim=printed("0.0625 before the fix, 0 after it", 0.0625, 1e-4),
        why="x normal, w normal or uniform: one ulp at 8 to 16",
        draw=norm_inputs(128, 4096, normal, uniform, weight_offset=True),
    ),
    Case(
        Thread(28, "flashinfer #3148", "hidden before RoPE"),
        sides=(ONE_ROUNDING, FP32),
        figure=Figure("RoPE outputs that differ when the rounding before it is left out", "share", share),
        claim=Claim("without the rounding results differ from the reference", low=0.0, high=1.0),
        why="the norm of N(0, 1) [512, 128] turned by real angles in fp32",
        draw=lambda rng: [
            {"x": normal(rng, 512, 128), "weight": near_one(rng, 128), "angle": angles(rng, 512, 128)},
        ],
        run=rotated,
    ),
    Case(
        Thread(29, "mlir-air #1679", "sum of squares"),
        sides=(EXACT_NORM, BF16_SUM),
        figure=Figure("relative L1 error, sum of squares in bf16 to nearest", "relative L1", relative_l1),
        claim=printed("6.9e-2 with the sum in bf16", 6.9e-2, 1e-3),
        why="x and w normal, hidden size 2048, 1024 or 4096: rounding to nearest is an order of magnitude short",
        draw=lambda rng: [
            {"x": normal(rng, 64, size), "weight": normal(rng, size), "eps": 1e-5} for size in (2048, 1024, 4096)
        ],
        draws=3,
    ),
    Case(
        Thread(29, "mlir-air #1679", "sum of squares"),
        sides=(EXACT_NORM, BF16_SUM_TRUNCATED),
        figure=Figure("relative L1 error, sum of squares in bf16 truncated", "relative L1", relative_l1),
        claim=printed("6.9e-2 with the sum in bf16", 6.9e-2, 1e-3),
        why="the same with truncation, that hardware's default: the loss is the rounding mode's at least as much",
        draw=lambda rng: [
            {"x": normal(rng, 64, size), "weight": normal(rng, size), "eps": 1e-5} for size in (2048, 1024, 4096)
        ],
        draws=3,
    ),
    Case(
        Thread(29, "mlir-air #1679", "sum of squares"),
        sides=(EXACT_NORM, FP32_SUM_PRODUCTS),
        figure=Figure("relative L1 error, sum of squares in fp32", "relative L1", relative_l1),
        claim=printed("4.2e-3 with the sum in fp32", 4.2e-3, 1e-4),
        why="hidden size 2048, both products truncated like the hardware's default, or to nearest, which makes 1.9e-3",
        draw=lambda rng: [
            {"x": normal(rng, 64, 2048), "weight": normal(rng, 2048), "products": products} for products in (RTZ, RNE)
        ],
        draws=3,
    ),
    Case(
        Thread(30, "sglang #35795", "out"),
        sides=(
            Way("fp32", lambda value: value.double()),
            Way("rounded to bf16", lambda value: store(value.double(), RNE)),
        ),
        figure=Figure(
            "runs of 37 x 128 outputs with an element over the tolerance of 0.06",
            "share",
            lambda before, after: ((after - before).abs() > 0.06).any(-1).double().mean(),
        ),
        claim=printed("flaky at roughly 1 %", 0.01, 0.01),
        why="the test's own distributions: half an ulp at 16 to 32 is 0.0625, and a quarter of the runs gets there",
        draw=indexer_outputs,
        draws=5,
    ),
)
