"""What an answer about a chain is held to beside the calls that decide it: geometries of models, layouts, values, eps.
Each is a dense Gaussian call, held to the envelope of the plan that was found, and small geometries are asked exactly
too."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from castpoint.harness.fingerprint import facts, probes
from castpoint.harness.fingerprint.answer import Question
from castpoint.harness.fingerprint.blackbox import Refused
from castpoint.harness.fingerprint.calls import ChainCalls, in_parts
from castpoint.harness.fingerprint.evidence import Call, Miss, beyond, missed, settled
from castpoint.harness.fingerprint.heads import Geometry
from castpoint.harness.fingerprint.layouts import CONTIGUOUS, ODD, OFFSET, SLICED, TURNED, each_alone
from castpoint.harness.fingerprint.questions import (
    ALONE,
    LAYOUTS,
    SMALL_WEIGHT,
    WEIGHTS,
    WIDE_BIAS,
    Draw,
    eps_asked,
    moved,
    noting,
)
from castpoint.harness.fingerprint.rules import Rule
from castpoint.harness.fingerprint.sizes import Sizes
from castpoint.harness.fingerprint.stores import round_to, ulp
from castpoint.kernels.plan import KEEP, CastPlan
from castpoint.variants.envelope import envelope
from castpoint.variants.problem import Problem

# Tokens and geometry: every width of Qwen3 (0.6B to Coder 480B) and Llama (1B to 405B), SmolLM2's and gpt-oss's, which
# no 128 divides; head sizes 64 to 512, one to 64 heads, one to 16 of k and v; Qwen3 0.6B, Qwen2.5 0.5B, SmolLM2 and
# Gemma 3 270M as they are; many tokens of wide rows, and of many heads.
GEOMETRIES = (
    (1, Geometry(1024, 16, 8, 128)),
    (3, Geometry(2048, 2, 1, 128)),
    (5, Geometry(2560, 5, 1, 80)),
    (7, Geometry(4096, 1, 1, 128)),
    (17, Geometry(5120, 1, 1, 128)),
    (2, Geometry(3072, 1, 1, 256)),
    (9, Geometry(6144, 1, 1, 64)),
    (4, Geometry(8192, 1, 1, 64)),
    (3, Geometry(16384, 1, 1, 64)),
    (10, Geometry(1536, 1, 1, 64)),
    (33, Geometry(896, 14, 2, 64)),
    (32, Geometry(576, 9, 3, 64)),
    (16, Geometry(960, 15, 5, 64)),
    (36, Geometry(640, 4, 1, 256)),
    (130, Geometry(2880, 1, 1, 64)),
    (600, Geometry(256, 2, 1, 64)),
    (2, Geometry(256, 64, 8, 128)),
    (8, Geometry(256, 16, 16, 64)),
    (6, Geometry(256, 40, 10, 64)),
    (63, Geometry(256, 7, 7, 64)),
    (65, Geometry(256, 16, 4, 64)),
    (12, Geometry(256, 2, 2, 96)),
    (11, Geometry(256, 2, 1, 160)),
    (5, Geometry(712, 1, 1, 192)),
    (2, Geometry(256, 1, 1, 512)),
    (257, Geometry(256, 4, 2, 128)),
    (128, Geometry(128, 6, 6, 64)),
    *((tokens, Geometry(128, 1, 1, 64)) for tokens in (256, 512, 1024, 2049)),
)
COLUMNS = ((5, Geometry(512, 1, 1, 24)), (70, Geometry(256, 1, 1, 37)))  # few, and no multiple of 16, without heads
LARGEST = (Geometry(16384, 1, 1, 64), Geometry(256, 1, 1, 512))  # normed is at most the root of the channels
LARGE_NORMS = 1024  # times Gaussian weights
# Scale and norms of Dense with which hidden and v of bf16 are beyond fp16's 65504.
LARGE = {"bf16": (256.0, (LARGE_NORMS,)), "fp16": (1.0, (1.0,))}
EXACT = 1 << 19  # weights up to which a geometry is asked exactly too


@dataclass(frozen=True)
class Found:
    """A chain's input norm, its head norm, and the words of its plan."""

    norm: Rule
    head: Rule | None  # None: it has no head norm
    words: dict[str, str]

    @property
    def plan(self) -> CastPlan:
        """As an envelope knows it: without the ways of ties, a matmul of fp16 as one of bf16."""
        first = {name: word.split(" or ")[0] for name, word in self.words.items() if name in vars(CastPlan())}
        first["matmul"] = first["matmul"].replace("fp16", "bf16")
        words = {name: word.replace("-rna", "-rne").replace("-rnz", "-rne") for name, word in first.items()}
        return Envelope(**words) if self.norm.narrow == "fp16" else CastPlan(**words)


@dataclass(frozen=True)
class Envelope(CastPlan):
    """Words that an envelope knows and no plan of the lab has: those of fp16."""

    def __post_init__(self) -> None:
        pass


def chain_questions(
    calls: ChainCalls, found: Found, sizes: Sizes, known: Sequence[str] = (CONTIGUOUS,)
) -> Iterator[Question]:
    """known: layouts that it takes, before it is asked for others."""
    base = (probes.ROWS, calls.geometry)
    tokens, geometry = base
    dense, taken = Dense(calls, found), dict.fromkeys(known)
    x = dense.x(tokens)
    for layout in (*LAYOUTS, *(each_alone("the residual") if calls.box.takes("residual") else [])):
        yield Question("memory", layout, functools.partial(noting, taken, layout, functools.partial(dense.ask, x)))
    for i, (count, other) in enumerate(dict.fromkeys((base, *GEOMETRIES, *(() if found.head else COLUMNS)))):
        outputs = str(other).partition(", ")[2] if found.head else f"{other.columns} columns"
        # in other layouts a Triton kernel is compiled again for each geometry
        aligned = {layout: None for layout in taken if layout != ODD and OFFSET not in layout}
        what, eps, scale, layout = moved(i, aligned, sizes)
        there = dataclasses.replace(dense, calls=calls.at(other), scale=dense.beside(scale))
        ask = functools.partial(_at, there, count, scale, eps, layout)
        yield Question("x", f"[{count}, {other.width}], {outputs}{what}", ask)
    for layout in WEIGHTS:
        yield Question("weights", layout, functools.partial(dense.ask, x, layout=layout))
    few = (0.0, SMALL_WEIGHT[calls.box.narrow])
    for what, norms in ((f"{LARGE_NORMS} times as large", (LARGE_NORMS,)), ("of zeros and near it", few)):
        other = dataclasses.replace(dense, norms=norms)
        yield Question("weights", f"norms' weights {what}", functools.partial(other.ask, x))
    if dense.bias() is not None:
        wide = dataclasses.replace(dense, wide=WIDE_BIAS)
        yield Question("argument", f"a bias {WIDE_BIAS} times as large", functools.partial(wide.ask, x))
    if dense.of_v_alone:
        ask = functools.partial(_biased_heads, calls, found)
        yield Question("argument", f"a bias of up to {WIDE_BIAS} in q and k", ask)
    draw = Draw(found.norm, dense.weights()[0].float(), False, calls.box.narrow)
    for what, rows in draw.values(tokens, geometry.width):
        yield Question("values", what, functools.partial(dense.ask, rows.x))
    for other in dict.fromkeys((geometry, *LARGEST)):
        cancelling = Dense(calls.at(other), found, *LARGE[calls.box.narrow], cancelling=True)
        alone = torch.eye(4, other.width) * torch.tensor([[1.0], [-3.0], [0.5], [-100.0]])
        yield Question("values", f"{ALONE}, {other}", functools.partial(cancelling.ask, alone))
    for what, eps, scale in eps_asked(sizes):
        small = dataclasses.replace(dense, scale=dense.beside(scale))
        yield Question("eps", what, functools.partial(small.ask, x * scale, eps=eps))


def _at(dense: Dense, tokens: int, scale: float, eps: float, layout: str) -> Miss:
    """What is left unexplained of dense rows there, which lie so, or else of exact ones."""
    calls, found, geometry = dense.calls, dense.found, dense.calls.geometry
    miss = dense.ask(dense.x(tokens) * scale, layout, eps)
    if (miss and not calls.box.in_rounds) or geometry.columns * geometry.width > EXACT:
        return miss  # in rounds its answer, and so miss, may not be there yet
    rng = torch.Generator().manual_seed(1)
    readout = probes.general_readout(rng, geometry.width, geometry.head_dim)
    rows = probes.norm_rows(geometry.width, rng, residual=calls.box.takes("residual"), narrow=calls.box.narrow)
    firm = settled(found.norm, rows).nonzero()[:, 0]
    rows = dataclasses.replace(rows.of(firm[torch.arange(tokens) % len(firm)]), readout=readout)
    v = calls.v(rows)
    qk = calls.qk(found.norm, rng, probes.EPS_SMALL, tokens=tokens)[1] if found.head else None
    if miss:
        return miss
    if miss := missed(found.norm, v):
        return dataclasses.replace(miss, why=f"{miss.why} in v" if miss.why else "in v")
    if found.head is None or qk is None:
        return miss
    places = torch.arange(len(qk.stored)) % len(qk.rows.x)
    firm = settled(found.head, qk.rows)[places]
    known = Call(qk.rows.of(places[firm]), qk.stored[firm], qk.dtype)
    miss = missed(found.head, known)
    return dataclasses.replace(miss, why=f"{miss.why} in q and k" if miss.why else "in q and k") if miss else miss


def _biased_heads(calls: ChainCalls, found: Found) -> Miss:
    """What is left unexplained of q and k with a large bias, which is added to what is rounded."""
    assert found.head is not None
    rng = torch.Generator().manual_seed(1)
    given, call = calls.qk(found.norm, rng, probes.EPS_SMALL, biased=True, wide=WIDE_BIAS)
    rows = dataclasses.replace(given.with_bias(call.rows, round_to(given.proj, found.head.x)), exact=False)
    firm = settled(found.head, rows)
    return missed(found.head, Call(rows.of(firm.nonzero()[:, 0]), call.stored[firm], call.dtype))


@dataclass(frozen=True)
class Dense:
    """Gaussian weights of a geometry, the projection's times scale, the norms' times norms in turn, every other bias
    times wide, and what a plan's envelope leaves unexplained of calls with them. cancelling: each channel's weight is
    less its neighbour's, so that another order of a sum shows, the last heads of q and k are x's first channels, and
    the norms' factors ones."""

    calls: ChainCalls
    found: Found
    scale: float = 1.0
    norms: tuple[float, ...] = (1.0,)
    wide: float = 1.0
    cancelling: bool = False

    def beside(self, scale: float) -> float:
        """The scale with which a head norm's eps weighs as the first one's does beside x of that size."""
        half = self.calls.box.narrow == "fp16"  # which would hold few bits of such weights
        return scale if self.found.head and not half else 1.0

    def x(self, tokens: int) -> Tensor:
        rng = torch.Generator().manual_seed(tokens)
        return probes.gaussian([tokens, self.calls.geometry.width], rng)

    def weights(self) -> tuple[Tensor, ...]:
        g, (norm, weight, *heads) = self.calls.geometry, drawn_weights(self.calls.geometry)
        if self.cancelling:
            one = 1.0 - (self.found.words["weight_offset"] != "none")
            norm, weight = torch.full_like(norm, one), torch.stack([weight[:, ::2], -weight[:, ::2]], dim=-1).flatten(1)
            if self.found.head:
                heads = [torch.full_like(each, one) for each in heads]
                for end in (g.heads[0], sum(g.heads)):
                    weight[(end - 1) * g.head_dim : end * g.head_dim] = torch.eye(g.head_dim, g.width)
        norms = [w * torch.tensor(self.norms)[torch.arange(len(w)) % len(self.norms)] for w in (norm, *heads)]
        return tuple(map(self.held, (norms[0], weight * self.scale, *norms[1:])))

    @property
    def of_v_alone(self) -> bool:
        """Whether a bias is added to what is rounded, under a head norm, which an envelope does not know."""
        return self.found.head is not None and self.found.words.get("bias") == "after"

    def bias(self) -> Tensor | None:
        """[columns] Gaussian, where the chain takes one."""
        if "bias" not in self.found.words:
            return None
        bias = torch.randn(self.calls.geometry.columns, generator=torch.Generator().manual_seed(6)) * self.scale
        bias[1::2] *= self.wide
        if self.of_v_alone:
            bias[: sum(self.calls.geometry.heads) * self.calls.geometry.head_dim] = 0
        return self.held(bias).float()

    def held(self, value: Tensor) -> Tensor:
        """bf16 values; of a kernel in fp16 those that both types have, since problems are of bf16."""
        value = value.bfloat16()
        return value.half().bfloat16() if self.calls.box.narrow == "fp16" else value

    def ask(self, x: Tensor, layout: str = "contiguous", eps: float = probes.EPS_SMALL) -> Miss:
        """What the plan's envelope leaves unexplained of x [T, D], given in as many calls as it takes."""
        g, plan = self.calls.geometry, self.found.plan
        norm, weight, q_norm, k_norm = self.weights()
        offset = self.found.words["weight_offset"] != "none"
        heads = (q_norm, k_norm) if self.found.head else (None, None)
        x = self.held(x).float()
        bias, after = self.bias(), self.found.words.get("bias") == "after"
        inside = None if bias is None or after else bias.bfloat16()
        problem = Problem(x.bfloat16(), norm, weight, *g.heads, *heads, eps=eps, weight_offset=offset, bias=inside)
        stored = self.stored(x, eps, layout)
        last = 0
        for name, ends in envelope(plan, problem).items():
            low, high = (end.flatten(1) for end in ends)
            first, last = last, last + low.shape[1]
            if after and bias is not None:
                low, high = (round_to((end + bias[first:last]).float(), plan.out).double() for end in (low, high))
            if miss := _outside(stored[name].flatten(1).double(), low, high, plan):
                return dataclasses.replace(miss, why=f"{miss.why} in {name}" if miss.why else f"in {name}")
        return Miss(0, 1)

    def stored(self, x: Tensor, eps: float, layout: str = "contiguous", finite: bool = True) -> dict[str, Tensor]:
        """Of x as it is, or as the sum of 2 x and a residual -x, or of -x and 2 x; in fp16 of halves where x is large.
        Both types hold all of these."""
        norm, weight, q_norm, k_norm = self.weights()
        heads, box, bias = self.calls.geometry.heads, self.calls.box, self.bias()
        residual = torch.zeros_like(x)
        if box.takes("residual"):
            residual = torch.where((x.abs() > 1e4) & (box.narrow == "fp16"), x / 2, -x)
            residual = torch.where(x.sum(1, keepdim=True) < 0, x - residual, residual)

        def ask(part: Tensor) -> tuple[Tensor, ...]:
            given = (x[part] - residual[part], norm, weight, q_norm, k_norm, eps, *heads, residual[part], bias)
            return box.qkv(*given, layout=layout, finite=finite)

        return dict(zip("qkv", in_parts(len(x), self.calls.tokens, ask), strict=True))


@functools.lru_cache(maxsize=2)  # a question asks for them twice
def drawn_weights(geometry: Geometry) -> tuple[Tensor, ...]:
    """Gaussian weights of the input norm, of the projection, of q's and k's norms; bf16."""
    g, rng = geometry, torch.Generator().manual_seed(5)
    sizes = (g.width, g.head_dim, g.head_dim)
    norm, q, k = ((torch.randn(size, generator=rng).abs() + 0.5).bfloat16() for size in sizes)
    return norm, (torch.randn(g.columns, g.width, generator=rng) / g.width**0.5).bfloat16(), q, k


def _outside(stored: Tensor, low: Tensor, high: Tensor, plan: CastPlan) -> Miss:
    """Elements [T, C] outside of what sums in fp32 explain, if more or farther away than noise may be."""
    nearest = stored.clamp(low, high)
    wrong = (nearest != stored) & ~(low.isnan() | high.isnan())  # NaN: it does not say
    size = torch.maximum(stored.abs(), nearest.abs())
    unit = ulp(size, plan.out)
    roundings = sum(getattr(plan, name) != KEEP for name in ("proj", "head_rstd", "head_normed", "out"))
    far = ((stored - nearest).abs() / unit.clamp(min=2.0**-133)).nan_to_num(nan=math.inf)
    why = beyond(wrong, far, 2 * max(roundings, 1), stored, nearest)
    return Miss(int(wrong.sum()) if why else 0, wrong.numel(), why.strip())


def chain_facts(calls: ChainCalls, found: Found) -> dict[str, str]:
    """facts.all_facts of q, k and v at once, with 1024 channels and few heads if it takes them."""
    for geometry in (Geometry(1024, 2, 1, 64), Geometry(1024, 2, 1, 128), calls.geometry):
        dense = Dense(calls.at(geometry), found)
        cancelling = dataclasses.replace(dense, cancelling=True)
        x, eps, kinds = _rows_near_ties(cancelling)

        def stored(x: Tensor, finite: bool, dense: Dense = cancelling, eps: float = eps) -> Tensor:
            outputs = dense.stored(x, eps, finite=finite)
            return torch.cat([output.flatten(1) for output in outputs.values()], dim=1)

        with contextlib.suppress(Refused):
            said = facts.all_facts(stored, dense.ask, x, calls.tokens, calls.box.narrow, 4 * kinds)
            large = functools.partial(dense.ask, x, eps=probes.EPS_LARGE)
            if found.head and kinds < 3 and said["batch invariant"].startswith("yes"):
                said["batch invariant"] += "; the order of the head norms' sums was not asked"
            for name, layout in (("transposed weight", TURNED), ("sliced weight", SLICED)):
                said[name] = facts.as_it_lies(functools.partial(dense.ask, x, layout))
            return said | {"with gradients": facts.gradients(calls.box, large)}
    return {}


def _rows_near_ties(cancelling: Dense) -> tuple[Tensor, float, int]:
    """x [T, D] and eps: rows on which another order of a sum shows, in turn that of the input norm, of the projection
    and, if there is one, of the head norms; and how many kinds these are."""
    calls, g, rng = cancelling.calls, cancelling.calls.geometry, torch.Generator().manual_seed(3)
    tokens, narrow = calls.tokens or probes.ROWS, calls.box.narrow
    tokens += tokens % 2
    tied, eps = facts.rows_near_a_tie(g.width, rng, tokens, narrow)
    pairs = probes.gaussian([tokens, g.width // 2], rng).repeat_interleave(2, dim=1)
    pairs[:, 1::2] *= 1 + 2.0**-5 * torch.rand(pairs[:, ::2].shape, generator=rng)
    kinds = [tied, cancelling.held(pairs).float()]
    if cancelling.found.head and g.width >= 6 * g.head_dim:
        heads, _ = facts.rows_near_a_tie(g.head_dim, rng, tokens, narrow)
        rest = g.width - g.head_dim - 1  # halves, some ones, and a last one, so that the root of the whole is one
        left = g.width * (1 - eps) - heads.square().sum(1, keepdim=True) - rest / 4
        ones = ((left - 0.25) / 0.75).floor()
        last = round_to((left - 0.75 * ones).sqrt(), f"{narrow}-rne")
        kinds.append(torch.cat([heads, torch.where(torch.arange(rest) < ones, 1.0, 0.5), last], dim=1))
    in_twos = torch.stack([rows.unflatten(0, (-1, 2)) for rows in kinds], dim=1)  # odd rows are neighbours in facts
    return in_twos.flatten(0, 2)[: calls.tokens or probes.ROWS], eps, len(kinds)
