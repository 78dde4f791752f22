"""The parts that separate chains are made of: norms and matmuls by name, and the one head norm."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from castpoint.harness.peers.implementations import implementations
from castpoint.harness.peers.running import TRITON, Norm, compiled
from castpoint.kernels.head_norm import qk_norm
from castpoint.kernels.plan import RNE, CastPlan
from castpoint.variants.eager import eager_norm
from castpoint.variants.problem import Problem
from castpoint.variants.spec import with_table

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Heads = Callable[..., tuple[Tensor, Tensor]]  # (problem, q's and k's heads of proj, out=None) -> q, k normalised

TUNED = "max-autotune-no-cudagraphs"  # the rig captures graphs itself
PDL = "triton.enable_pdl"  # Inductor's programmatic dependent launch, between the kernels that it writes itself
NO_HEAD_NORM, OWN_KERNEL = "none", "head_norm kernel"


@dataclass(frozen=True)
class NormPart:
    """A norm over the last dimension. inner: x * rstd is rounded before the weight; None: not known, or by version.

    offset: whether it takes weights stored as w (False), as w - 1 (True), or both (None).
    make(device, offset) raises ImportError where a package is missing, ValueError where it cannot run on the device.
    """

    inner: bool | None
    offset: bool | None
    make: Callable[[str, bool], Norm]


def _quack(device: str, offset: bool) -> Norm:
    from quack.rmsnorm import rmsnorm

    if device == "cpu":
        raise ValueError("quack needs a GPU")
    return lambda x, weight, eps: rmsnorm(x, weight, eps=eps)


def _public(name: str, device: str, offset: bool) -> Norm:
    """The Triton kernel of that name among the public implementations."""
    (row,) = (row for row in implementations() if (row.name, row.how) == (name, TRITON))
    return row.make(device)


_PUBLIC = {  # name: inner, offset
    "LigerRMSNorm, casting mode llama": (True, False),
    "LigerRMSNorm, casting mode gemma": (False, True),
    "flash-linear-attention RMSNorm": (False, False),
    "FlagGems rms_norm": (None, False),  # versions differ in this
}
NORMS = {
    # Gemma's formula, for weights stored as w - 1, rounds once
    "eager": NormPart(True, None, lambda device, offset: functools.partial(eager_norm, weight_offset=offset)),
    "F.rms_norm": NormPart(False, False, lambda device, offset: lambda x, w, eps: F.rms_norm(x, w.shape, w, eps)),
    **{name: NormPart(*words, functools.partial(_public, name)) for name, words in _PUBLIC.items()},
    "quack rmsnorm": NormPart(False, False, _quack),
}


@contextlib.contextmanager
def cublaslt() -> Iterator[None]:
    """cuBLASLt's first heuristic, where by default PyTorch asks cuBLAS.

    torch.backends.cuda.preferred_blas_library is documented as experimental, and holds for the process: it is set
    within this alone, which in a graph is the capture. No search over heuristics is to be had: of TunableOp
    (torch.cuda.tunable) torch 2.13 says that CUDA builds know no other solution than the default.
    """
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


def linear_cublaslt(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with cublaslt():
        return F.linear(x, weight, bias)


MATMULS: dict[str, Linear] = {"cuBLAS": F.linear, "cuBLASLt": linear_cublaslt}


def heads_of(plan: CastPlan, problem: Problem) -> Heads:
    """q's and k's head norm, and RoPE where there are positions, in one launch of our own kernel.

    There is no other: all public norms take one weight, so q and k would be two launches, and none of them rotates.
    """
    own = plan.replace(out=RNE, weight_offset="fp32" if problem.weight_offset else "none")

    def heads(p: Problem, proj: Tensor, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        weights = p.q_norm_weight, p.k_norm_weight
        table = with_table(own, p)
        rope = table.positions, table.cos_sin_cache
        return qk_norm(proj, *weights, p.num_q_heads, p.eps, *rope, plan=own, out=out)

    return heads


def finishes_heads(problem: Problem) -> bool:
    """Whether there is anything to do between q and k of the projection and those of the chain."""
    return problem.has_head_norm or problem.positions is not None


def norm_of(name: str, problem: Problem) -> Norm:
    part = NORMS[name]
    if part.offset not in (None, problem.weight_offset):
        stored = "w - 1" if problem.weight_offset else "w"
        raise ValueError(f"{name} does not take norm weights stored as {stored}")
    return part.make(problem.x.device.type, problem.weight_offset)


@functools.cache
def tuned(function: Callable, pdl: bool = False) -> Callable:
    """function through Inductor in its mode max-autotune-no-cudagraphs, with programmatic dependent launch or without.

    Raises ValueError where this version of Inductor has no such launch.
    """
    options = dict(torch._inductor.list_mode_options(TUNED))
    if pdl:
        if PDL not in torch._inductor.list_options():
            raise ValueError(f"Inductor of torch {torch.__version__} has no option {PDL}")
        options[PDL] = True
    return compiled(function, options)
