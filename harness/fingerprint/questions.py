"""What an answer about a norm is held to beside the calls that decide it: the shapes, the layouts in memory, the values
and the eps of public models. Each question changes one thing, so that a reason can name it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from castpoint.harness.fingerprint import probes
from castpoint.harness.fingerprint.answer import Question
from castpoint.harness.fingerprint.calls import NormCalls
from castpoint.harness.fingerprint.evidence import Miss, settled
from castpoint.harness.fingerprint.forms import QUANT_SCALE
from castpoint.harness.fingerprint.layouts import (
    CONTIGUOUS,
    HEADS_FIRST,
    ODD,
    OFFSET,
    ROWS,
    UPDATED,
    WEIGHTS_OFFSET,
    each_alone,
)
from castpoint.harness.fingerprint.rules import Rows, Rule, predict
from castpoint.harness.fingerprint.sizes import Sizes
from castpoint.harness.fingerprint.stores import ENDS, round_to
from castpoint.kernels.plan import KEEP

# Kernels dispatch on the number of tokens and on the width. Together: every width of Qwen3 (0.6B to Coder 480B) and
# Llama (1B to 405B), some that are no multiple of 8, 16 or 1024, powers of two of tokens and numbers on both sides of
# them, facts.COUNTS among them, and wide rows of few and of many tokens.
WIDTHS = (1024, 2048, 4096, 5120, 2560, 3072, 6144, 8192, 16384)
NORM_SHAPES = (
    *([1, 4096], [2, 1024], [4, 2304], [5, 5120], [6, 1001], [7, 2560], [8, 8192], [9, 6144], [3, 16384], [16, 5376]),
    *([17, 3072], [32, 4096], [33, 896], [100, 6144], [129, 2048], [256, 640], [257, 4096], [512, 384], [600, 2048]),
    *([1024, 128], [1025, 256], [1, 256], [63, 1000], [65, 1004], [128, 256], [2049, 128], [8193, 64], [2, 18432]),
    [2, 7168],
)
HEAD_SHAPES = (
    *([1, 16, 256], [600, 1, 64], [600, 16, 128], [1, 1, 128], [2, 8, 80], [3, 5, 96], [7, 40, 128], [17, 3, 256]),
    *([66, 32, 64], [130, 2, 112], [9, 128, 128], [8, 4, 96], [63, 2, 64], [65, 4, 128], [128, 3, 256], [4, 12, 160]),
    *([5, 6, 192], [32, 7, 100], [33, 10, 64], [256, 3, 64], [257, 1, 64], [512, 1, 512], [1024, 1, 64], [8193, 1, 64]),
    *([2, 1, 512], [2, 2, 576], [3, 4, 72], [4, 3, 48]),
)
LONGEST = ([65537, 16], [65537, 1, 16])  # of norms, of norms of heads: where a grid may end
# x whose normed, at most the root of the channels, is large: of norms, of norms of heads.
LARGEST = (([1, 4096], [3, 16384]), ([17, 3, 256], [2, 1, 512]))
LARGE_WEIGHT = {"bf16": 1024, "fp16": 32}  # times one of up to 100; a result of bf16 is beyond fp16's 65504 then
SMALL_WEIGHT = {"bf16": 2.0**-20, "fp16": 2.0**-4}  # times one of at least 0.001; fp16 ends at 2^-24
WIDE_BIAS = 64  # times every other Gaussian one
ALONE, MASSIVE = "one channel that is not zero", "one channel of 2^10 to 2^18"
EPS = (1e-5, 1e-6, 1.5625e-7, 2.0**-23, 1e-8)  # Llama, Qwen3, GLM, torch's default, Moshi
LAYOUTS = (ROWS, ODD, OFFSET)
WEIGHTS = (WEIGHTS_OFFSET, UPDATED)
FEWEST = 2  # rows of each shape, in as many calls as it takes
DRAWN = 1 << 16  # elements of rows drawn to choose settled ones from
EXACT = 300  # rows whose sums are exact, of which those of any shape are taken


Ask = Callable[
    [Rows, list[int] | None, str], Miss
]  # rows, given as x of that shape (None: of the first), in that layout


def questions(
    rule: Rule, weight: Tensor, asked: NormCalls, sizes: Sizes, fixed: bool, ask: Ask, takes_all: bool = False
) -> Iterator[Question]:
    """All that a norm, as it is asked, is held to which was found to be the rule with that weight [D]. fixed: its
    results are divided by a scale that is given, so that large ones are beyond 8 bits. takes_all: every layout is
    thought to be taken before it is asked for."""
    box, shape, width, heads = asked.box, asked.shape(probes.ROWS), asked.width, asked.heads is not None
    residual = box.takes("residual")
    layouts = (*LAYOUTS, *([HEADS_FIRST] if heads else []), *(each_alone("the residual") if residual else []))
    taken = dict.fromkeys((CONTIGUOUS, *layouts) if takes_all else (CONTIGUOUS,))
    most = ENDS[rule.out[:4]] * QUANT_SCALE if fixed else math.inf
    draw = Draw(rule, weight, residual, sizes.dtype, box.divided, most=most)
    count = max(probes.ROWS, math.prod(shape[:-1]))

    def question(
        about: str, what: str, rows: Rows, shape: list[int] | None = None, layout: str = CONTIGUOUS
    ) -> Question:
        return Question(about, what, functools.partial(noting, taken, layout, functools.partial(ask, rows, shape)))

    yield question("x", str(shape), draw.mixed(count, width))
    for layout in layouts:
        yield question("memory", layout, draw.gaussian(count, width), layout=layout)
    grids = box.device != "cpu"  # where a program is no function's loop, nor run thread by thread
    for i, other in enumerate((*(HEAD_SHAPES if heads else NORM_SHAPES), *([LONGEST[heads]] if grids else []))):
        yield question("x", str(other), draw.mixed(rows_of(other), other[-1]), other)
        what, eps, scale, layout = moved(i, taken, sizes)
        another = dataclasses.replace(draw, weight=weight.roll(1 + i))
        rows = another.gaussian(rows_of(other), other[-1], scale=scale, eps=eps)
        yield question("together", f"x {other}{what}, another weight", rows, other, layout)
    for layout in WEIGHTS:
        yield question("weights", layout, draw.gaussian(count, width), layout=layout)
    exact = box.gain == 1  # else results below fp16's normal numbers are rounded twice
    if not fixed and exact:
        times = LARGE_WEIGHT[rule.narrow]
        large, few = (dataclasses.replace(draw, weight=each) for each in (times * weight, _few(weight, rule)))
        yield question("weights", f"a weight {times} times as large", large.gaussian(count, width))
        yield question("weights", "a weight of zeros and near it", few.gaussian(count, width))
    for what, rows in draw.values(count, width):
        if what != MASSIVE or exact:
            yield question("values", what, rows)
    for other in () if fixed else LARGEST[heads]:
        rows = dict(dataclasses.replace(draw, gain=box.gain).values(rows_of(other), other[-1]))[ALONE]
        yield question("values", f"{ALONE}, x {other}", rows, other)
    for what, value, scale in eps_asked(sizes):
        yield question("eps", what, draw.gaussian(count, width, scale=scale, eps=value))


def eps_asked(sizes: Sizes) -> Iterator[tuple[str, float, float]]:
    """What to say of each eps, the eps, and the standard deviation of x beside which it weighs; at last one beside
    which x is nothing, so that a root is as large as it gets."""
    for value in dict.fromkeys((*(() if sizes.eps is None else (sizes.eps,)), *EPS)):
        yield f"{value:g}", value, 2.0 ** round(math.log2(value or 1) / 2)
    if sizes.dtype != "fp16":  # which has no such x
        yield f"{min(EPS):g}, x of 2^-20", min(EPS), 2.0**-20


def noting(taken: dict[str, None], layout: str, ask: Callable[[str], Miss]) -> Miss:
    """What ask makes of the layout, which is taken if nothing is left unexplained."""
    if not (miss := ask(layout)):
        taken[layout] = None
    return miss


def moved(i: int, taken: dict[str, None], sizes: Sizes) -> tuple[str, float, float, str]:
    """The i-th of eps and of the layouts that it takes, together: what to say of them, eps, the standard deviation of x
    beside which it weighs, and the layout. In few pairs: a compiled function is compiled again for each."""
    _, eps, scale = [*eps_asked(sizes)][i % len(EPS)]
    period = len(EPS) * math.ceil(len(taken) / len(EPS))
    layout = [*taken][i % period % len(taken)]
    return f", eps={eps:g}, {layout}", eps, scale, layout


def _few(weight: Tensor, rule: Rule) -> Tensor:
    """The weight, every other of it zero, the rest times SMALL_WEIGHT."""
    return weight * SMALL_WEIGHT[rule.narrow] * (torch.arange(len(weight)) % 2)


def rows_of(shape: list[int]) -> int:
    """How many rows are asked as x of that shape, twice: FEWEST at least."""
    at_once = math.prod(shape[:-1])
    return at_once * math.ceil(FEWEST / at_once)


@functools.lru_cache(maxsize=128)  # of up to 5 MB: another path, and k's norm beside q's, are asked the same
def _gaussian(count: int, width: int, seed: int, dtype: str, scale: float) -> tuple[Tensor, Tensor]:
    """Gaussian rows, to be read only, and the state of the generator that drew them."""
    rng = torch.Generator().manual_seed(seed)
    return probes.gaussian([count, width], rng, dtype, scale), rng.get_state()


@dataclass(frozen=True)
class Draw:
    """Rows on which an error of a few fp32 ulps, in the mean or the root, leaves what the rule rounds of them as it is.
    The weight begins as that of the deciding calls."""

    rule: Rule
    weight: Tensor
    residual: bool
    dtype: str = "bf16"  # of x
    divided: float = 1.0  # x by so much is what dtype holds
    gain: float = 1.0  # weights are by so much smaller
    most: float = math.inf  # no row has a larger result, if there are such rows

    def gaussian(self, count: int, width: int, *, scale: float = 1.0, eps: float = probes.EPS_SMALL) -> Rows:
        """Gaussian rows of that standard deviation, whose sums are rounded."""
        x, rng = self._gaussian(count, width, count * width, scale)
        return self._settled(self._held(x), count, eps, rng, scale)

    def mixed(self, count: int, width: int) -> Rows:
        """Gaussian rows, and after each one whose sums are exact in any order: of its squares bf16 rounds most up or
        down, which a sum of many Gaussian ones would hide."""
        x, rng = self._gaussian(count, width, count * width + 1)
        x = self._held(x).clone()
        exact = probes.norm_rows(width, rng, count=min(2 * len(x), EXACT), narrow=self.rule.narrow).x
        biased = exact[torch.arange(len(exact)) % 3 > 0]
        x[1::2] = pad(biased[torch.arange(len(x) // 2) % len(biased)], (0, width - exact.shape[1]))
        return self._settled(x, count, probes.EPS_SMALL, rng)

    def values(self, count: int, width: int) -> Iterator[tuple[str, Rows]]:
        """Rows as streams of real models have them, and those that clamps, fp16 and fast paths change."""
        rng = torch.Generator().manual_seed(2)
        x = probes.gaussian([self._drawn(count, width), width], rng)
        one = torch.arange(len(x)), torch.randint(0, width, [len(x)], generator=rng)
        spike, massive, alone, gaps = x.clone(), x.clone(), torch.zeros_like(x), x.clone()
        spike[one] = 30 * x[one].sign()
        massive[one] = 2.0 ** (10 + 8 * torch.rand(len(x), generator=rng)) * x[one].sign()
        alone[one] = x[one]
        gaps[::2] = 0
        most = 12 if self.dtype == "fp16" else 20
        powers = 2.0 ** torch.tensor([-most, most, -12, 12, -4, 4]).float()
        for what, rows in (
            ("one channel of 30 sigma", spike),
            (f"rows scaled by 2^-{most} to 2^{most}", spike * powers[torch.arange(len(x)) % 6, None]),
            (MASSIVE, massive),
            (ALONE, alone),
            ("rows of zeros", gaps),
        ):
            most = 6e4 if self.dtype == "fp16" else torch.inf
            yield what, self._settled(self._held(rows).clamp(-most, most), count, probes.EPS_SMALL, rng)

    def _held(self, x: Tensor) -> Tensor:
        """x, where it is given divided."""
        return x if self.dtype == "fp32" else round_to(x / self.divided, f"{self.dtype}-rne") * self.divided

    def _gaussian(self, count: int, width: int, seed: int, scale: float = 1.0) -> tuple[Tensor, torch.Generator]:
        x, state = _gaussian(self._drawn(count, width), width, seed, self.dtype, scale)
        return x, torch.Generator().set_state(state)

    def _drawn(self, count: int, width: int) -> int:
        return max(count, min(64, DRAWN // width), 8)

    def _settled(self, x: Tensor, count: int, eps: float, rng: torch.Generator, scale: float = 1.0) -> Rows:
        weight = probes.weight_of_width(self.weight, x.shape[1])
        weight = weight if self.gain == 1 else round_to(weight / self.gain, f"{self.rule.narrow}-rne")
        residual = probes.gaussian(x.shape, rng, self.dtype, scale) if self.residual else None
        if residual is not None:  # in three of four rows zero where x is; in turns the one is the other
            residual[torch.arange(len(x)) % 4 != 2] *= x[torch.arange(len(x)) % 4 != 2] != 0
            turned = torch.arange(len(x))[:, None] % 2 == 1
            x, residual = torch.where(turned, residual, x), torch.where(turned, x, residual)
        rows = Rows(x, weight, eps, x.shape[1], residual, exact=False)
        firm = settled(self.rule, rows)
        if self.most < math.inf:
            firm &= predict(self.rule.replace(out=KEEP), rows).abs().amax(1) <= self.most
        firm = firm.nonzero()[:, 0]
        firm = torch.arange(len(x)) if not len(firm) else firm
        chosen = firm[torch.arange(count) % len(firm)]
        return dataclasses.replace(rows, x=x[chosen], residual=None if residual is None else residual[chosen])
