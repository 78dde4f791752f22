"""A capture: one call recorded from real traffic, what went in and what came out, in safetensors; checked here.

A chain's holds

    x              [T, D] bf16                the residual stream
    norm_weight    [D] bf16
    qkv_weight     [(Hq + 2 Hkv) * Dh, D]     bf16, rows ordered q, k, v
    q_norm_weight  [Dh] bf16                  with k_norm_weight, where there are head norms
    bias           [(Hq + 2 Hkv) * Dh] bf16   where there is one
    residual       [T, D] bf16                added to x, where it is
    positions      [T] integers               with cos_sin_cache, where q and k were rotated: of each token its row in
    cos_sin_cache  [P, Dh] bf16 or fp32       cos of Dh / 2 angles, then their sin
    q, k, v        [T, heads, Dh] or [T, heads * Dh], bf16 or fp32

and a norm's, each bf16 or fp32, or fp16 or fp32,

    x, y               [T, D] or [T, H, Dh]
    weight             [D] or [Dh]
    residual           of x's shape               added to x, where it is
    residual_out       of x's shape               x + residual as it was returned, where it was

A batch, [B, T, D] with D above 512 or of a chain, or [B, T, H, Dh], counts as B T tokens. eps, num_q_heads and
num_kv_heads stand in the file's metadata, or the user gives them; heads also follow from three-dimensional q and k.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from castpoint.harness.fingerprint.sizes import ANY, Sizes
from castpoint.harness.fingerprint.stores import storages
from castpoint.harness.problems.files import open_safetensors
from castpoint.harness.runs.errors import UserError, mistakes
from castpoint.variants.problem import Problem

NORM = {"x": True, "weight": True, "residual": False, "y": True, "residual_out": False}  # whether it must be there
CHAIN = {
    "x": True, "norm_weight": True, "qkv_weight": True, "q_norm_weight": False, "k_norm_weight": False,
    "bias": False, "residual": False, "positions": False, "cos_sin_cache": False, "q": True, "k": True, "v": True,
}  # fmt: skip
OF_CHAIN = ("q", "k", "v")
WIDE = (*OF_CHAIN, "cos_sin_cache")  # of a chain, which may be fp32
WHOLE = (torch.int64, torch.int32)
HEAD = 512  # channels of a head, at most: of [B, T, D] more than these are a row's
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Norm:
    """A recorded norm: x [T, D] or [T, H, Dh], residual and outputs of its shape, weight; bf16 or fp16, and fp32."""

    x: Tensor
    weight: Tensor
    eps: float
    outputs: dict[str, Tensor]  # y, and residual_out where x + residual was returned
    residual: Tensor | None = None

    @property
    def kind(self) -> str:
        return "rmsnorm" if self.x.ndim == 2 else "head_norm"

    @property
    def tokens(self) -> int:
        return len(self.x)

    @property
    def narrow(self) -> str:
        """What is rounded to: fp16 where any of it is, else bf16."""
        recorded = (self.x, self.weight, self.residual, *self.outputs.values())
        return "fp16" if any(tensor is not None and tensor.dtype == FP16 for tensor in recorded) else "bf16"

    @property
    def storages_of_x(self) -> tuple[str, ...]:
        """How the row that is normalised may be held: open where it is a sum, or fp32."""
        words = storages(self.narrow)
        return words[1:2] if self.residual is None and self.x.dtype != FP32 else words

    @property
    def storages_of_weight(self) -> tuple[str, ...]:
        """How the weight may be held as it is used: open where it is fp32."""
        return storages(self.narrow)[: 3 if self.weight.dtype == FP32 else 1]

    @property
    def sums(self) -> int:
        """Sums whose order is not known."""
        return self.x.numel() // self.x.shape[-1]

    def cut(self, first: int, last: int) -> Norm:
        """Those tokens of it."""
        residual = None if self.residual is None else self.residual[first:last]
        outputs = _cut(self.outputs, first, last)
        return dataclasses.replace(self, x=self.x[first:last], residual=residual, outputs=outputs)

    def like(self, tokens: int) -> Norm:
        """Tokens like those recorded, without outputs."""
        x, residual = _like([self.x, self.residual], tokens)
        return dataclasses.replace(self, x=x, residual=residual, outputs={})


@dataclass(frozen=True)
class Chain:
    """A recorded chain: what went in, norm weights taken as w, and q, k, v [T, heads, Dh], bf16 or fp32."""

    problem: Problem
    outputs: dict[str, Tensor]
    kind: str = "qkv"

    @property
    def tokens(self) -> int:
        return self.problem.tokens

    @property
    def sums(self) -> int:
        """Sums whose order is not known: of x's squares, of products, and of the squares of heads with a norm."""
        p = self.problem
        heads = p.num_q_heads + p.num_kv_heads if p.has_head_norm else 0
        return p.tokens * (1 + p.num_heads * p.head_dim + heads)

    def cut(self, first: int, last: int) -> Chain:
        """Those tokens of it."""
        p = self.problem
        residual, positions = (None if v is None else v[first:last] for v in (p.residual, p.positions))
        part = p.replace(x=p.x[first:last], residual=residual, positions=positions)
        return Chain(part, _cut(self.outputs, first, last))

    def like(self, tokens: int) -> Chain:
        """Tokens like those recorded, without outputs."""
        p = self.problem
        x, residual = _like([p.x, p.residual], tokens)
        positions = None if p.positions is None else p.positions[torch.arange(tokens) % len(p.positions)]
        return Chain(p.replace(x=x, residual=residual, positions=positions), {})


Capture = Norm | Chain


def _cut(outputs: dict[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
    return {name: output[first:last] for name, output in outputs.items()}


def _like(values: list[Tensor | None], tokens: int) -> list[Any]:
    """So many rows of each that is there, in turn, scaled by factors from 1 to 2: the same values, elsewhere on the
    grid to which they are rounded."""
    factors = 1 + torch.rand(tokens, generator=torch.Generator().manual_seed(0))

    def like(value: Tensor) -> Tensor:
        rows = torch.arange(tokens) % len(value)
        return (value[rows].float() * factors.reshape(-1, *[1] * (value.ndim - 1))).to(value.dtype)

    return [None if value is None else like(value) for value in values]


def read(path: Path, sizes: Sizes = ANY) -> Capture:
    """The capture of that file; eps and heads of sizes where the file does not say them.

    Raises UserError for a file that is none, a tensor that is missing, unknown, of another shape or dtype or not
    finite, and where eps or the heads are not said, or said twice and differently.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file: --capture takes a safetensors file with the tensors of one call")
    stored, metadata = open_safetensors(path)
    is_norm = "y" in stored
    wanted = NORM if is_norm else CHAIN
    missing = [name for name, must in wanted.items() if must and name not in stored]
    if missing:
        tensors = ", ".join(name for name, must in wanted.items() if must)
        other = "" if is_norm else "; a norm's: x, weight, y"
        raise UserError(f"{path} has no {', '.join(missing)}: a {'norm' if is_norm else 'chain'}'s capture holds "
                        f"{tensors}{other}")  # fmt: skip
    if unknown := [name for name in stored if name not in wanted]:
        raise UserError(f"{path} holds {', '.join(unknown)}, which is no part of a capture: {', '.join(wanted)}")
    tensors = {name: stored[name].read() for name in wanted if name in stored}
    _check_tensors(path, tensors)
    tensors = _by_token(tensors)
    eps = _eps(path, metadata, sizes)
    if is_norm:
        return _norm(path, tensors, eps)
    return _chain(path, tensors, eps, _heads(path, tensors, metadata, sizes))


def _check_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """dtypes, tokens and NaN: what is said of every tensor alike."""
    for name, tensor in tensors.items():
        allowed = (BF16, FP16, FP32) if "y" in tensors else (BF16, FP32) if name in WIDE else (BF16,)
        allowed = WHOLE if name == "positions" else allowed
        if tensor.dtype not in allowed:
            raise UserError(f"{path}: {name} is {_word(tensor.dtype)}, expected {' or '.join(map(_word, allowed))}")
        if name in OF_CHAIN and tensor.dtype != tensors["q"].dtype:
            raise UserError(f"{path}: {name} and q differ in dtype, expected one for all outputs")
        if not tensor.numel():
            raise UserError(f"{path}: {name} is empty, of shape {list(tensor.shape)}")
        if wrong := int((~tensor.isfinite()).sum()):
            raise UserError(f"{path}: {name} holds NaN or infinity in {wrong} elements: record a call without")
    half, brain = ([name for name, tensor in tensors.items() if tensor.dtype == dtype] for dtype in (FP16, BF16))
    if half and brain:
        raise UserError(f"{path}: {half[0]} is float16 and {brain[0]} bfloat16: a call rounds to one of them")


def _by_token(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with one axis of tokens where they were recorded in batches."""
    x = tensors["x"]
    if x.ndim != 4 and not (x.ndim == 3 and ("y" not in tensors or x.shape[-1] > HEAD)):
        return tensors
    batch = list(x.shape[:2])
    return {name: v.flatten(0, 1) if v.ndim > 2 and list(v.shape[:2]) == batch else v for name, v in tensors.items()}


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _norm(path: Path, tensors: dict[str, Tensor], eps: float) -> Norm:
    x, weight = tensors["x"], tensors["weight"]
    if x.ndim not in (2, 3):
        raise UserError(f"{path}: x has shape {list(x.shape)}, expected [T, D] or [T, H, Dh]")
    if "residual_out" in tensors and "residual" not in tensors:
        raise UserError(f"{path} has no residual: residual_out is x + residual as it was returned")
    for name, tensor in tensors.items():
        shape = [x.shape[-1]] if name == "weight" else list(x.shape)
        if list(tensor.shape) != shape:
            raise UserError(f"{path}: {name} has shape {list(tensor.shape)}, expected {shape} as x has")
    outputs = {name: tensors[name] for name in ("y", "residual_out") if name in tensors}
    return Norm(x, weight, eps, outputs, tensors.get("residual"))


def _chain(path: Path, tensors: dict[str, Tensor], eps: float, heads: tuple[int, int]) -> Chain:
    outputs = {name: tensors.pop(name) for name in OF_CHAIN}
    if ("positions" in tensors) != ("cos_sin_cache" in tensors):
        raise UserError(f"{path} holds one of positions and cos_sin_cache: q and k were rotated by both, or by none")
    if "positions" in tensors:
        tensors["positions"] = tensors["positions"].long()
    theta = 1.0 if "positions" in tensors else None  # of truth's angles, which no capture is held to
    with mistakes(ValueError, about=str(path)):
        problem = Problem(**tensors, num_q_heads=heads[0], num_kv_heads=heads[1], eps=eps, theta=theta)
    for name, count in (("q", heads[0]), ("k", heads[1]), ("v", heads[1])):
        shape = [problem.tokens, count, problem.head_dim]
        if list(outputs[name].shape) not in (shape, [shape[0], shape[1] * shape[2]]):
            raise UserError(f"{path}: {name} has shape {list(outputs[name].shape)}, expected {shape} or flat")
        outputs[name] = outputs[name].reshape(shape)
    return Chain(problem, outputs)


def _number(path: Path, metadata: dict[str, str], name: str, given: float | None, option: str) -> float | None:
    """What the metadata says of it, or the user; None: neither."""
    if name not in metadata:
        return given
    with mistakes(ValueError, about=f"{path}: {name} of its metadata is no number"):
        said = float(metadata[name])
    if given is not None and said != given:
        raise UserError(f"{path} was recorded with {name}={said:g}, and {option} says {given:g}: leave it out")
    return said


def _eps(path: Path, metadata: dict[str, str], sizes: Sizes) -> float:
    eps = _number(path, metadata, "eps", sizes.eps, "--eps")
    if eps is None:
        raise UserError(f"{path} does not say eps: put it into the file's metadata, or give --eps")
    if not (math.isfinite(eps) and eps > 0):
        raise UserError(f"{path}: eps must be a positive number, not {eps:g}")
    return eps


def _heads(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], sizes: Sizes) -> tuple[int, int]:
    """Heads of q, and of k and v: as said, else by the shapes of q and k, else by the size of a head."""
    given = sizes.heads or (None, None)
    dim = len(tensors["q_norm_weight"]) if tensors.get("q_norm_weight", torch.zeros(())).ndim == 1 else None
    found: list[int] = []
    for output, name, option in (("q", "num_q_heads", given[0]), ("k", "num_kv_heads", given[-1])):
        said, shape = _number(path, metadata, name, option, "--heads"), list(tensors[output].shape)
        by_shape = shape[1] if len(shape) == 3 else shape[1] // dim if len(shape) == 2 and dim else None
        heads = by_shape if said is None else said
        if heads is None:
            raise UserError(f"{path} does not say {name}, and a flat {output} does not: put it into the file's "
                            "metadata, or give --heads")  # fmt: skip
        if heads < 1 or heads != int(heads):
            raise UserError(f"{path}: {name} must be a positive whole number, not {heads:g}")
        found.append(int(heads))
    return found[0], found[1]
