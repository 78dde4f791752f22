"""The chain with QKV weights in blocks: a problem whose W is what they say, so that spec and envelope hold for it.

The one rounding that a plan does not name is `weight`, how d * n is held for the matmul. It is made here, when the
problem is: whatever takes a Problem computes with W as the matmul reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from castpoint.kernels.checks import check_inputs
from castpoint.kernels.config import Config
from castpoint.kernels.plan import RNE, CastPlan
from castpoint.kernels.quantised import BLOCK, BLOCK_BYTES, quantised_norm_qkv
from castpoint.variants.eager import Outputs
from castpoint.variants.problem import Problem, check_finite, check_positions
from castpoint.variants.spec import check_offset, check_table, round_to, with_table


def dequantised(packed: Tensor, format: str) -> Tensor:
    """d * n of every weight, [rows, D] float64, nothing rounded. packed [rows, bytes] uint8, as the kernel takes it."""
    blocks = packed.reshape(packed.shape[0], -1, BLOCK_BYTES[format])
    scale = blocks[..., :2].contiguous().view(torch.float16).double()  # [rows, blocks, 1]
    values = blocks[..., 2:]
    if format == "q4_0":
        number = torch.cat([values % 16, values // 16], dim=-1).double() - 8
    else:
        number = values.contiguous().view(torch.int8).double()
    return (scale * number).reshape(packed.shape[0], -1)


def packed_of(scale: Tensor, number: Tensor, format: str) -> Tensor:
    """Blocks [rows, bytes] uint8 of scales d [rows, D / 32] fp16 and numbers n [rows, D], -8 to 7 or -128 to 127."""
    rows = number.reshape(*scale.shape, BLOCK)
    if format == "q4_0":
        lower, upper = (rows + 8).to(torch.uint8).chunk(2, dim=-1)
        values = lower + 16 * upper
    else:
        values = rows.to(torch.int8).view(torch.uint8)
    return torch.cat([scale.contiguous().view(torch.uint8).reshape(*scale.shape, 2), values], dim=-1).flatten(1)


@dataclass(frozen=True)
class QuantisedProblem(Problem):
    """A Problem whose qkv_weight [H * Dh, D] float32 holds what the matmul reads; made by quantised_problem.

    packed [H * Dh, bytes] uint8, format and weight: as kernels.quantised takes them.
    """

    packed: Tensor | None = None
    format: str = "q4_0"
    weight: str = RNE

    def __post_init__(self) -> None:
        check_inputs(**self.checked() | {"qkv_weight": self.qkv_weight.to(torch.bfloat16)})
        check_finite(self)
        check_positions(self)

    def inputs(self) -> dict[str, Any]:
        """As Problem's: qkv_weight is W as it is read, for the spec; the kernel takes packed in its place."""
        return {name: value for name, value in super().inputs().items() if name not in ("packed", "format", "weight")}


def quantised_problem(problem: Problem, packed: Tensor, format: str, weight: str = RNE) -> QuantisedProblem:
    """That problem with its W replaced by the blocks'. Raises ValueError for infinite scales and what does not fit."""
    read = round_to(dequantised(packed, format).to(torch.float32), weight)  # fp32 holds d * n, so this rounds once
    own = vars(problem) | {"qkv_weight": read, "packed": packed, "format": format, "weight": weight}
    return QuantisedProblem(**own)


def run_quantised(
    plan: CastPlan, problem: QuantisedProblem, *, config: Config | None = None, out: Outputs | None = None
) -> Outputs:
    """q, k, v of the kernel: compiled on a GPU, interpreted on a CPU. Raises ValueError where it cannot."""
    check_offset(plan, problem)
    check_table(plan, problem)
    inputs = with_table(plan, problem).inputs() | {
        "packed": problem.packed,
        "format": problem.format,
        "weight": problem.weight,
    }
    del inputs["qkv_weight"]
    return quantised_norm_qkv(**inputs, plan=plan, config=config, out=out)
