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
from castpoint.harness.fingerprint.evidence import Miss, settled
from castpoint.harness.fingerprint.layouts import HEADS_FIRST, ODD, OFFSET, ROWS, UPDATED, WEIGHTS_OFFSET, X_ALONE
from castpoint.harness.fingerprint.rules import Rows, Rule
from castpoint.harness.fingerprint.sizes import Sizes
from castpoint.harness.fingerprint.stores import MOST, round_to

# Kernels dispatch on the number of tokens and on the width. Together: every width of Qwen3 (0.6B to Coder 480B) and
# Llama (1B to 405B), one that is no multiple of 16, and numbers of tokens on both sides of powers of two, facts.COUNTS
# among them.
WIDTHS = (1024, 2048, 4096, 5120, 2560, 3072, 6144, 8192, 16384)
NORM_SHAPES = (
    *([1, 4096], [2, 1024], [3, 1000], [5, 5120], [7, 2560], [8, 8192], [9, 6144], [3, 16384], [17, 3072], [33, 640]),
    *([100, 896], [129, 2048], [257, 1536], [600, 2048], [1025, 256], [1, 256], [2, 2048]),
    *([63, 320], [65, 320], [128, 256], [2049, 128], [4097, 128], [2, 18432], [2, 7168]),
)
HEAD_SHAPES = (
    *([1, 16, 256], [600, 1, 64], [600, 16, 128], [1, 1, 128], [2, 8, 80], [3, 5, 96], [7, 40, 128], [17, 3, 256]),
    *([33, 32, 64], [130, 2, 112], [9, 128, 128], [8, 4, 96], [63, 2, 64], [65, 4, 128], [128, 1, 128]),
    *([257, 1, 64], [4097, 1, 64], [2, 1, 512]),
)
# x whose normed, at most the root of the channels, is large: of norms, of norms of heads.
LARGEST = (([1, 4096], [3, 16384]), ([17, 3, 256], [2, 1, 512]))
LARGE_WEIGHT = {"bf16": 1024, "fp16": 32}  # times one of up to 100; a result of bf16 is beyond fp16's 65504 then
ALONE = "one channel that is not zero"
EPS = (1e-5, 1e-6, 1.5625e-7, 2.0**-23, 1e-8)  # Llama, Qwen3, GLM, torch's default, Moshi
LAYOUTS = (ROWS, ODD, OFFSET)
WEIGHTS = (WEIGHTS_OFFSET, UPDATED)
FEWEST = 4  # rows of each shape, in as many calls as it takes
DRAWN = 1 << 16  # elements of rows drawn to choose settled ones from
EXACT = 300  # rows whose sums are exact, of which those of any shape are taken


Ask = Callable[
    [Rows, list[int] | None, str], Miss
]  # rows, given as x of that shape (None: of the first), in that layout


def questions(
    rule: Rule, weight: Tensor, shape: list[int], sizes: Sizes, residual: bool, ask: Ask
) -> Iterator[Question]:
    """All that a norm is held to which was found to be the rule at that shape of x with that weight [D]."""
    draw, heads, width = Draw(rule, weight, residual, sizes.dtype), len(shape) == 3, shape[-1]
    count = max(probes.ROWS, math.prod(shape[:-1]))

    def question(
        about: str, what: str, rows: Rows, shape: list[int] | None = None, layout: str = "contiguous"
    ) -> Question:
        return Question(about, what, functools.partial(ask, rows, shape, layout))

    yield question("x", str(shape), draw.mixed(count, width))
    for other in HEAD_SHAPES if heads else NORM_SHAPES:
        yield question("x", str(other), draw.mixed(rows_of(other), other[-1]), other)
    for layout in (*LAYOUTS, *([HEADS_FIRST] if heads else []), *([X_ALONE] if residual else [])):
        yield question("memory", layout, draw.gaussian(count, width), layout=layout)
    for layout in WEIGHTS:
        yield question("weights", layout, draw.gaussian(count, width), layout=layout)
    in_8_bits = rule.out[:4] in MOST  # which such values would be beyond
    if not in_8_bits:
        times = LARGE_WEIGHT[rule.narrow]
        large = dataclasses.replace(draw, weight=times * weight)
        yield question("weights", f"a weight {times} times as large", large.gaussian(count, width))
    for what, rows in draw.values(count, width):
        yield question("values", what, rows)
    for other in () if in_8_bits else LARGEST[heads]:
        rows = dict(draw.values(rows_of(other), other[-1]))[ALONE]
        yield question("values", f"{ALONE}, x {other}", rows, other)
    for value in dict.fromkeys((*(() if sizes.eps is None else (sizes.eps,)), *EPS)):
        scale = 2.0 ** round(math.log2(value or 1) / 2)
        yield question("eps", f"{value:g}", draw.gaussian(count, width, scale=scale, eps=value))


def rows_of(shape: list[int]) -> int:
    """How many rows are asked as x of that shape: FEWEST at least, and two calls, since one may keep what it stores."""
    at_once = math.prod(shape[:-1])
    return at_once * max(2, math.ceil(FEWEST / at_once))


@dataclass(frozen=True)
class Draw:
    """Rows on which an error of a few fp32 ulps, in the mean or the root, leaves what the rule rounds of them as it is.
    The weight begins as that of the deciding calls."""

    rule: Rule
    weight: Tensor
    residual: bool
    dtype: str = "bf16"  # of x

    def gaussian(self, count: int, width: int, *, scale: float = 1.0, eps: float = probes.EPS_SMALL) -> Rows:
        """Gaussian rows of that standard deviation, whose sums are rounded."""
        rng = torch.Generator().manual_seed(count * width)
        x = probes.gaussian([self._drawn(count, width), width], rng, self.dtype, scale)
        return self._settled(x, count, eps, rng, scale)

    def mixed(self, count: int, width: int) -> Rows:
        """Gaussian rows, and after each one whose sums are exact in any order: of its squares bf16 rounds most up or
        down, which a sum of many Gaussian ones would hide."""
        rng = torch.Generator().manual_seed(count * width + 1)
        x = probes.gaussian([self._drawn(count, width), width], rng, self.dtype)
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
        powers = 2.0 ** torch.tensor([-12, 12, -8, 8, -4, 4]).float()
        for what, rows in (
            ("one channel of 30 sigma", spike),
            ("rows scaled by 2^-12 to 2^12", spike * powers[torch.arange(len(x)) % 6, None]),
            ("one channel of 2^10 to 2^18", massive),
            (ALONE, alone),
            ("rows of zeros", gaps),
        ):
            held = rows if self.dtype == "fp32" else round_to(rows, f"{self.dtype}-rne")
            yield what, self._settled(held.nan_to_num(posinf=6e4, neginf=-6e4), count, probes.EPS_SMALL, rng)

    def _drawn(self, count: int, width: int) -> int:
        return max(count, min(64, DRAWN // width), 8)

    def _settled(self, x: Tensor, count: int, eps: float, rng: torch.Generator, scale: float = 1.0) -> Rows:
        weight = probes.weight_of_width(self.weight, x.shape[1])
        residual = probes.gaussian(x.shape, rng, self.dtype, scale) if self.residual else None
        if residual is not None:  # in three of four rows zero where x is
            residual[torch.arange(len(x)) % 4 != 2] *= x[torch.arange(len(x)) % 4 != 2] != 0
        rows = Rows(x, weight, eps, x.shape[1], residual, exact=False)
        firm = settled(self.rule, rows).nonzero()[:, 0]
        firm = torch.arange(len(x)) if not len(firm) else firm
        chosen = firm[torch.arange(count) % len(firm)]
        return dataclasses.replace(rows, x=x[chosen], residual=None if residual is None else residual[chosen])
