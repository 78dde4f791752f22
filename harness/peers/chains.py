"""What the fused kernels are compared with, each as a call on the i-th of a list of rotated problems.

P1  three kernels in a row: the best norm and the best matmul there are, and our head norm, q's and k's in one launch
P2  torch.compile with all its tuning
P4  the matmul alone, x @ W^T: norms for free; beside it the matmul with two empty kernels, matmul_with_launches, since
    their launches are not; and our fused kernel's loop alone, loop_peer

norm_peers, matmul_peers (P4) and head_norm_peer are the parts of P1, timed by themselves; pick_chains says which
chains of them are worth timing, chain_peer makes one. A peer that cannot run here says why. In a part's time its input
is where the part before would leave it: in the cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from castpoint.harness.peers import parts
from castpoint.harness.peers.parts import NO_HEAD_NORM, OWN_KERNEL
from castpoint.harness.runs.errors import reason_of
from castpoint.harness.runs.words import Kind, Status
from castpoint.harness.timing.cuda import Call
from castpoint.harness.timing.limits import empty_kernel
from castpoint.harness.timing.outputs import Differs, bits_differ, values_differ
from castpoint.harness.timing.rig import Arm
from castpoint.kernels.config import Config
from castpoint.kernels.main_loop import matmul
from castpoint.kernels.plan import KEEP, RNE, ROPE_BOUNDARIES, CastPlan
from castpoint.variants.catalogue import PLANS
from castpoint.variants.eager import Outputs, eager, rope_table
from castpoint.variants.problem import Problem

P2 = ("torch.compile", "torch.compile, PDL")
EMPTY_KERNELS = 2  # as many as a chain has norms
LABELS = {  # how the names of arms begin
    Kind.NORM: "norm", Kind.MATMUL: "P4", Kind.LAUNCHES: "P4", Kind.HEADS: "heads", Kind.LOOP: "own loop",
    Kind.CHAIN: "P1",
    Kind.COMPILED: "P2", Kind.EAGER: "eager", Kind.OWN: "",
}  # fmt: skip

REDUCTIONS: dict[str, bool | tuple[bool, bool]] = {  # kernels.separate.bf16_reduction
    "default": True,  # split-K partial sums may be stored and added in bf16
    "fp32 partials": False,
    "one fp32 chain": (False, False),  # no split-K either
}


@dataclass(frozen=True)
class Peer:
    """One arm; one that cannot run has another status than `ok`, a reason and no call.

    what: of its kind, as chain_peer takes it: `eager` names a norm.
    call(i) returns (q, k, v) for whole chains, else what the part makes: hidden, proj, or (q, k).
    plan: the numerical function of the whole chain, up to the order of sums; None for parts and where it is not known.
    differs: how outputs inside a graph are judged. A BLAS chooses its kernel by itself and may add in another order
    there, so what holds a matmul is judged by values. rope: q and k are rotated, and the plan's words on it count.
    config: how our own kernels are cut.
    """

    kind: Kind
    what: str
    call: Call | None
    plan: CastPlan | None = None
    status: Status = Status.OK
    reason: str = ""
    differs: Differs = bits_differ
    rope: bool = False
    config: Config | None = None

    @property
    def name(self) -> str:
        return arm_name(self.kind, self.what)

    def arm(self) -> Arm:
        """For timing.rig.measure. Raises ValueError for a peer that cannot run."""
        if self.call is None:
            raise ValueError(f"{self.name} cannot be timed: {self.status}, {self.reason}")
        return Arm(self.name, self.call, self.differs)

    @property
    def function(self) -> str:
        """The plan's name, or what it rounds to bf16; `not known` without a plan."""
        if self.plan is None:
            return "not known"
        for name, known in PLANS.items():
            if self.plan == known.plan or not self.rope and self.plan.without_rope() == known.plan.without_rope():
                return name
        rounded = self.plan.roundings() + (self.plan.rope_roundings() if self.rope else [])
        return "rounds " + ", ".join(rounded) + ", not x + residual" * (self.plan.x == KEEP)


def arm_name(kind: Kind, what: str) -> str:
    """`norm eager`: for people, and to tell arms of one measurement apart. What an arm does says its kind."""
    return f"{LABELS[kind]} {what}".strip()


# ---------------------------------------------------------------- peers


def norm_peers(problems: Sequence[Problem]) -> list[Peer]:
    """The norms by themselves: call(i) returns (hidden,)."""

    def make(name: str) -> Call:
        norm = parts.norm_of(name, problems[0])
        return lambda i: (norm(_input(problems[i]), problems[i].norm_weight, problems[i].eps),)

    return [_peer(Kind.NORM, name, make) for name in parts.NORMS]


def matmul_peers(problems: Sequence[Problem]) -> list[Peer]:
    """P4: the matmul by itself, on x as it is, with the bias where there is one. call(i) returns (proj,)."""

    def make(name: str) -> Call:
        return lambda i: (parts.MATMULS[name](problems[i].x, problems[i].qkv_weight, problems[i].bias),)

    return [_peer(Kind.MATMUL, name, make, differs=values_differ) for name in parts.MATMULS]


def matmul_with_launches(problems: Sequence[Problem], matmul: str) -> Peer:
    """P4 and two empty kernels behind it: what a chain of three kernels costs at least where its norms are free and
    its launches are not. call(i) returns (proj,). Raises KeyError for a name that is no matmul."""
    linear = parts.MATMULS[matmul]

    def call(i: int) -> tuple[Tensor]:
        proj = linear(problems[i].x, problems[i].qkv_weight, problems[i].bias)
        for _ in range(EMPTY_KERNELS):
            empty_kernel[(1,)]()
        return (proj,)

    return Peer(Kind.LAUNCHES, f"{matmul} + {EMPTY_KERNELS} empty kernels", call, differs=values_differ)


def loop_peer(problems: Sequence[Problem], config: Config) -> Peer:
    """The fused kernel's loop by itself with those tiles, on x as it is, without bias. call(i) returns (proj,)."""

    def call(i: int) -> tuple[Tensor]:
        return (matmul(problems[i].x, problems[i].qkv_weight, problems[i].head_dim, config),)

    return Peer(Kind.LOOP, loop_tile(config), call, config=config)


def loop_tile(config: Config) -> str:
    """`128 x 64, 8 warps, 4 stages`: what our own loop takes of a config."""
    return f"{config.block_m} x {config.block_k}, {config.num_warps} warps, {config.num_stages} stages"


def loop_name(config: Config) -> str:
    return arm_name(Kind.LOOP, loop_tile(config))


def head_norm_peer(problems: Sequence[Problem], plan: CastPlan) -> Peer:
    """The head norm by itself, on one proj that all calls share, as it would lie in the cache behind a matmul.

    plan: what our own kernel takes, which with positions rotates too. call(i) returns (q, k). `not applicable` where
    the problems have neither.
    """
    first = problems[0]
    if not parts.finishes_heads(first):
        return Peer(Kind.HEADS, NO_HEAD_NORM, None, None, Status.NOT_APPLICABLE, "no head norm in this problem")
    proj = _heads_of_qk(first, F.linear(first.x, first.qkv_weight, first.bias))
    heads = parts.heads_of(plan, first)
    return Peer(Kind.HEADS, OWN_KERNEL, lambda i: heads(problems[i], proj))


def chain_peer(problems: Sequence[Problem], norm: str, matmul: str, plan: CastPlan) -> Peer:
    """P1: that norm, that matmul and our head norm in a row, three kernels; two where there is nothing to do to heads.

    The head norm writes where proj lies, and rounds as the plan says. Raises KeyError for a name that is no part.
    """
    first, linear = problems[0], parts.MATMULS[matmul]
    finishes = parts.finishes_heads(first)

    def make(what: str) -> Call:
        normalise, heads = parts.norm_of(norm, first), parts.heads_of(plan, first)

        def call(i: int) -> Outputs:
            p = problems[i]
            hidden = normalise(_input(p), p.norm_weight, p.eps)
            proj = linear(hidden, p.qkv_weight, p.bias)
            q, k, v = p.split_heads(proj)
            if finishes:
                heads(p, _heads_of_qk(p, proj), out=(q, k))
            return q, k, v

        return call

    what = f"{norm} | {matmul} | {OWN_KERNEL if finishes else NO_HEAD_NORM}"
    whole = chain_plan(norm, plan, first.weight_offset)
    return _peer(Kind.CHAIN, what, make, plan=whole, differs=values_differ, rope=first.positions is not None)


def compiled_peers(problems: Sequence[Problem], names: Sequence[str] = P2) -> list[Peer]:
    """P2: eager through torch.compile, without and with programmatic dependent launch.

    Its plan is what Inductor makes of eager's: it cancels the roundings inside a norm, and that of x + residual, and
    stores proj in bf16. So on a CPU; on a GPU tuning may choose another matmul: check it. With positions it is no plan:
    of the two products under a rotated value one then takes the head as it is, the other one rounded to bf16.
    """
    first, table = problems[0], rope_table(problems[0])
    x, offset = RNE if first.residual is None else KEEP, "fp32" if first.weight_offset else "none"
    plan = CastPlan(x=x, proj=RNE, weight_offset=offset) if first.positions is None else None

    def make(name: str) -> Call:
        function = parts.tuned(eager, pdl=name == P2[1])
        return lambda i: function(problems[i], table=table)

    return [_peer(Kind.COMPILED, name, make, plan=plan, differs=values_differ) for name in names]


def eager_peer(problems: Sequence[Problem]) -> Peer:
    """Hugging Face's own arithmetic, op by op: the plan `hf`, or `gemma` for weights stored as w - 1."""
    first = problems[0]
    plan, table = PLANS["gemma" if first.weight_offset else "hf"].plan, rope_table(first)
    return Peer(Kind.EAGER, "", lambda i: eager(problems[i], table=table), plan, differs=values_differ)


def chain_plan(norm: str, plan: CastPlan, offset: bool) -> CastPlan | None:
    """The numerical function of a chain that begins with that norm; None where the norm's is not known.

    Also where our head norm rounds its statistics, which no plan does in one norm and not in the other.
    """
    inner = parts.NORMS[norm].inner
    if inner is None or (plan.statistics, plan.variance) != (KEEP, KEEP):
        return None
    heads = {name: getattr(plan, name) for name in ("head_rstd", "head_normed", *ROPE_BOUNDARIES)}
    normed = RNE if inner and not offset else KEEP
    return CastPlan(normed=normed, proj=RNE, weight_offset="fp32" if offset else "none", **heads)


def pick_chains(
    seconds: Mapping[Kind, Mapping[str, float]], within: float = 0.03, at_most: int = 4
) -> list[tuple[str, str]]:
    """The chains (norm, matmul) worth timing whole, best sum of parts first; what chain_peer takes.

    seconds: of the parts that have a time, by kind and what. The parts hardly touch one another, so the best
    chain is made of the best parts, up to what overlaps at their borders: every chain whose sum, head norm included,
    lies within 3 % of the best is taken, four at most. None where no norm or no matmul has a time.
    """
    norms, matmuls = seconds.get(Kind.NORM, {}), seconds.get(Kind.MATMUL, {})
    heads = min(seconds.get(Kind.HEADS, {}).values(), default=0.0)
    sums = {(n, m): norms[n] + matmuls[m] + heads for n, m in itertools.product(norms, matmuls)}
    best = min(sums.values(), default=0.0)
    return sorted((chain for chain in sums if sums[chain] <= best * (1 + within)), key=sums.__getitem__)[:at_most]


def _heads_of_qk(p: Problem, proj: Tensor) -> Tensor:
    """[T, Hq + Hkv, Dh] of proj [T, H * Dh]."""
    return proj.view(p.tokens, p.num_heads, p.head_dim)[:, : p.num_q_heads + p.num_kv_heads]


def _input(p: Problem) -> Tensor:
    return p.x if p.residual is None else p.x + p.residual


def _peer(kind: Kind, what: str, make: Callable[[str], Call], **facts: Any) -> Peer:
    """The peer whose call make(what) is; where it raises, one that says why there is none. facts: more of Peer."""
    try:
        return Peer(kind, what, make(what), **facts)
    except ImportError as error:
        status, reason = Status.NOT_INSTALLED, str(error)
    except ValueError as error:
        status, reason = Status.NOT_APPLICABLE, str(error)
    except Exception as error:  # a package that is broken under this torch belongs into its row
        status, reason = Status.FAILED, reason_of(error)
    return Peer(kind, what, None, status=status, reason=reason, **facts)
