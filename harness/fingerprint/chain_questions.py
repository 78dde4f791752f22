"""What an answer about a chain is held to beside the calls that decide it: geometries of models, layouts, values, eps.
Each is a dense Gaussian call, held to the envelope of the plan that was found, and small geometries are asked exactly
too."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from castpoint.harness.fingerprint import facts, probes
from castpoint.harness.fingerprint.answer import Question
from castpoint.harness.fingerprint.blackbox import Refused
from castpoint.harness.fingerprint.calls import ChainCalls, in_parts
from castpoint.harness.fingerprint.evidence import Call, Miss, beyond, missed, settled
from castpoint.harness.fingerprint.heads import Geometry
from castpoint.harness.fingerprint.layouts import TURNED, X_ALONE
from castpoint.harness.fingerprint.questions import ALONE, EPS, FEWEST, LAYOUTS, WEIGHTS, Draw
from castpoint.harness.fingerprint.rules import Rule
from castpoint.harness.fingerprint.sizes import Sizes
from castpoint.harness.fingerprint.stores import round_to, ulp
from castpoint.kernels.plan import KEEP, CastPlan
from castpoint.variants.envelope import envelope
from castpoint.variants.problem import Problem

# Tokens and geometry: every width of Qwen3 (0.6B to Coder 480B) and Llama (1B to 405B), head sizes 64 to 512, one to 64
# heads, one to 16 of k and v; Qwen3 0.6B, Qwen2.5 0.5B and Gemma 3 270M as they are.
GEOMETRIES = (
    (1, Geometry(1024, 16, 8, 128)),
    (3, Geometry(2048, 4, 2, 64)),
    (5, Geometry(2560, 5, 1, 80)),
    (7, Geometry(4096, 2, 2, 96)),
    (17, Geometry(5120, 3, 1, 128)),
    (2, Geometry(3072, 1, 1, 256)),
    (9, Geometry(6144, 1, 1, 128)),
    (4, Geometry(8192, 2, 1, 64)),
    (3, Geometry(16384, 1, 1, 64)),
    (33, Geometry(896, 14, 2, 64)),
    (130, Geometry(640, 4, 1, 256)),
    (600, Geometry(256, 2, 1, 128)),
    (2049, Geometry(256, 1, 1, 64)),
    (2, Geometry(256, 64, 8, 128)),
    (100, Geometry(1536, 2, 2, 128)),
    (8, Geometry(256, 16, 16, 64)),
    (2, Geometry(256, 1, 1, 512)),
    (65, Geometry(512, 8, 4, 64)),
    *((tokens, Geometry(256, 2, 1, 64)) for tokens in (63, 128, 257)),
)
LARGEST = (Geometry(16384, 1, 1, 64), Geometry(256, 1, 1, 512))  # normed is at most the root of the channels
LARGE_NORMS = 1024  # times Gaussian weights
# Scale and norms of Dense with which hidden and v of bf16 are beyond fp16's 65504.
LARGE = {"bf16": (256.0, LARGE_NORMS), "fp16": (1.0, 1.0)}
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


def chain_questions(calls: ChainCalls, found: Found, sizes: Sizes) -> Iterator[Question]:
    base = (probes.ROWS, calls.geometry)
    for tokens, geometry in dict.fromkeys((base, *GEOMETRIES)):
        outputs = str(geometry).partition(", ")[2] if found.head else f"{geometry.columns} columns"
        what = f"[{tokens}, {geometry.width}], {outputs}"
        yield Question("x", what, functools.partial(_at, calls.at(geometry), found, tokens))
    tokens, geometry = base
    dense = Dense(calls, found)
    x = dense.x(tokens)
    for layout in (*LAYOUTS, *([X_ALONE] if calls.box.takes("residual") else [])):
        yield Question("memory", layout, functools.partial(dense.ask, x, layout=layout))
    for layout in WEIGHTS:
        yield Question("weights", layout, functools.partial(dense.ask, x, layout=layout))
    large = dataclasses.replace(dense, norms=LARGE_NORMS)
    yield Question("weights", f"norms' weights {LARGE_NORMS} times as large", functools.partial(large.ask, x))
    draw = Draw(found.norm, dense.weights()[0].float(), False, calls.box.narrow)
    for what, rows in draw.values(tokens, geometry.width):
        yield Question("values", what, functools.partial(dense.ask, rows.x))
    for other in dict.fromkeys((geometry, *LARGEST)):
        cancelling = Dense(calls.at(other), found, *LARGE[calls.box.narrow], cancelling=True)
        alone = torch.eye(FEWEST, other.width) * torch.tensor([[1.0], [-3.0], [0.5], [-100.0]])
        yield Question("values", f"{ALONE}, {other}", functools.partial(cancelling.ask, alone))
    for eps in dict.fromkeys((*(() if sizes.eps is None else (sizes.eps,)), *EPS)):
        scale = 2.0 ** round(math.log2(eps or 1) / 2)
        both = scale if found.head and calls.box.narrow == "bf16" else 1.0  # fp16 would hold few bits of such weights
        small = dataclasses.replace(dense, scale=both)
        yield Question("eps", f"{eps:g}", functools.partial(small.ask, x * scale, eps=eps))


def _at(calls: ChainCalls, found: Found, tokens: int) -> Miss:
    """What is left unexplained of dense rows there, or else of exact ones."""
    geometry, dense = calls.geometry, Dense(calls, found)
    miss = dense.ask(dense.x(tokens))
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


@dataclass(frozen=True)
class Dense:
    """Gaussian weights of a geometry, the projection's times scale, the norms' times norms, and what a plan's envelope
    leaves unexplained of calls with them. cancelling: each channel's weight is less its neighbour's, so that another
    order of a sum shows, the last heads of q and k are x's first channels, and the norms' factors ones."""

    calls: ChainCalls
    found: Found
    scale: float = 1.0
    norms: float = 1.0
    cancelling: bool = False

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
        return tuple(map(self.held, (norm * self.norms, weight * self.scale, *(each * self.norms for each in heads))))

    def bias(self) -> Tensor | None:
        """[columns] Gaussian, where the chain takes one; not where it is rounded before that and under a head norm."""
        if "bias" not in self.found.words or (self.found.head and self.found.words["bias"] == "after"):
            return None
        rng = torch.Generator().manual_seed(6)
        return self.held(torch.randn(self.calls.geometry.columns, generator=rng) * self.scale).float()

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
        """Of x as it is, or as the sum of 2 x and a residual -x, of large ones of halves: exact in both types."""
        norm, weight, q_norm, k_norm = self.weights()
        heads, box, bias = self.calls.geometry.heads, self.calls.box, self.bias()
        residual = torch.where(x.abs() > 1e4, x / 2, -x) if box.takes("residual") else torch.zeros_like(x)

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
            turned, large = (
                functools.partial(dense.ask, x, TURNED),
                functools.partial(dense.ask, x, eps=probes.EPS_LARGE),
            )
            if found.head and kinds < 3 and said["batch invariant"].startswith("yes"):
                said["batch invariant"] += "; the order of the head norms' sums was not asked"
            said["transposed weight"] = facts.as_it_lies(turned)
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
