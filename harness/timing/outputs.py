"""Whether a graph writes what it should: poisoned outputs, one replay, a comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from castpoint.harness.timing.cuda import Cuda, Graph

Differs = Callable[[Tensor, Tensor], str | None]  # (actual, expected) -> how they differ, or None


def bits_differ(actual: Tensor, expected: Tensor) -> str | None:
    """The criterion of a deterministic arm: all bits. NaN equals NaN here, which wrong_outputs judges by itself."""
    differ = (actual != expected) | (torch.signbit(actual) != torch.signbit(expected))
    differ &= ~(actual.isnan() & expected.isnan())
    return f"{int(differ.sum())} of {differ.numel()} elements differ" if differ.any() else None


def values_differ(actual: Tensor, expected: Tensor) -> str | None:
    """The criterion for a BLAS or a compiler that may add in another order inside a graph (bf16 outputs, last dim Dh).

    Each of the three roundings behind a sum (proj, head_normed, out) may move by one bf16 step, at most 2^-7 of the
    value, so 3 x 2^-7; and where partial sums are stored in bf16, an element that cancels to little may be off by
    2^-7 of its head's rms. It tells the same function from another result, no more: errors are measured elsewhere.
    """
    a, b = actual.double(), expected.double()
    allowed = 3 * 2.0**-7 * torch.maximum(a.abs(), b.abs()) + 2.0**-7 * b.square().mean(-1, keepdim=True).sqrt()
    differ = ~((a - b).abs() <= allowed) & ~(a.isnan() & b.isnan())
    return f"{int(differ.sum())} of {differ.numel()} elements differ beyond rounding" if differ.any() else None


def poison(graph: Graph) -> None:
    """Fills every output with NaN, integers with their smallest number."""
    for outputs in graph.outputs:
        for tensor in outputs:
            tensor.fill_(math.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)


def wrong_outputs(gpu: Cuda, graph: Graph, expected: Sequence[tuple[Tensor, ...]], differs: Differs) -> str | None:
    """Poisons the outputs, runs the graph once and says what is wrong with them, or None."""
    poison(graph)
    gpu.replay(graph)
    gpu.synchronize()
    for copy, (outputs, references) in enumerate(zip(graph.outputs, expected, strict=True)):
        for index, (actual, reference) in enumerate(zip(outputs, references, strict=True)):
            where = f"output {index} of copy {copy}"
            if actual.shape != reference.shape or actual.dtype != reference.dtype:
                return f"{where} is {actual.dtype} {list(actual.shape)}, was {reference.dtype} {list(reference.shape)}"
            unwritten = actual.isnan() & ~reference.isnan()
            if unwritten.any():
                return f"{where}: {int(unwritten.sum())} of {unwritten.numel()} elements still hold NaN"
            difference = differs(actual, reference)
            if difference:
                return f"{where}: {difference}"
    return None
