"""What one matrix instruction of a GPU adds up to, against the published model of tensor_model.py, bit for bit.

A kernel makes a single step, D = A @ B.T + C with K = 16, on operands that are drawn so that the model's cuts decide
the result. A difference is a finding about the hardware, so its row says with which operands, and which other model
explains most.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from castpoint.harness.conformance.tensor_model import ALTERNATIVES, HOPPER, modelled
from castpoint.harness.runs.flight import in_flight
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import GpuCheckRow
from castpoint.harness.runs.words import Check, Status
from castpoint.harness.timing.cuda import Cuda, DeviceLost, reason_of

K = 16
SUMS = 1 << 14  # of each family
Operands = tuple[Tensor, Tensor, Tensor]  # bf16 a [tiles, M, K] and b [tiles, N, K], fp32 c [tiles, M, N]


@dataclass(frozen=True)
class Instruction:
    """A tile that compiles to that instruction once, by so many warps. opcode: as PTX has it."""

    name: str
    opcode: str
    rows: int
    columns: int
    warps: int


WGMMA = Instruction("wgmma m64n128k16", "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16", 64, 128, 4)
MMA = Instruction("mma.sync m16n8k16", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", 16, 8, 1)
INSTRUCTIONS = (WGMMA, MMA)


@triton.jit
def step_kernel(
    a_ptr,  # [tiles, M, K] bf16
    b_ptr,  # [tiles, N, K] bf16
    c_ptr,  # [tiles, M, N] fp32
    d_ptr,  # [tiles, M, N] fp32
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """D = A @ B.T + C of one tile a program, in one step along K."""
    tile = tl.program_id(0)
    rows, columns, ks = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + (tile * M + rows[:, None]) * K + ks[None, :])
    b = tl.load(b_ptr + (tile * N + columns[None, :]) * K + ks[:, None])  # [K, N]
    places = (tile * M + rows[:, None]) * N + columns[None, :]
    tl.store(d_ptr + places, tl.dot(a, b, tl.load(c_ptr + places)))


def added(instruction: Instruction, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """fp32 d [tiles, M, N] of that instruction. Raises RuntimeError where the kernel compiled to another one."""
    d = torch.full_like(c, float("nan"))
    sizes = {"M": instruction.rows, "N": instruction.columns, "K": K}
    compiled = step_kernel[(len(a),)](a, b, c, d, **sizes, num_warps=instruction.warps)
    if compiled.asm["ptx"].count(instruction.opcode) != 1:
        raise RuntimeError(f"the kernel is not one {instruction.opcode} a tile: its GPU or its Triton has another way")
    return d


# ---------------------------------------------------------------- operands


@dataclass(frozen=True)
class Family:
    """Lowest and highest exponent of numbers whose signs and fractions are any. c: of the accumulators, or of what they
    are the negative, rounded to fp32. lead: exponent of a's and of b's first number; above their range, mostly."""

    name: str
    a: tuple[int, int]
    b: tuple[int, int]
    c: tuple[int, int] | str
    lead: int = 0


FIRST, SUM = "the first product", "the sum of products"
FAMILIES = (
    Family("equal exponents", (0, 0), (0, 0), (0, 0)),
    Family("8 binades", (-4, 0), (-4, 0), (-8, 0)),
    Family("24 binades", (-12, 0), (-12, 0), (-24, 0)),
    Family("40 binades", (-20, 0), (-20, 0), (-40, 0)),
    Family("large accumulator", (-4, 0), (-4, 0), (10, 30)),
    Family("small accumulator", (-4, 0), (-4, 0), (-30, -10)),
    Family("large first product", (-4, 0), (-4, 0), (-8, 0), lead=11),  # the others lie 22 to 30 binades below
    Family("first product cancelled", (-4, 0), (-4, 0), FIRST, lead=11),
    Family("sum cancelled", (-12, 0), (-12, 0), SUM),
    Family("subnormal", (-140, -122), (-8, 20), (-140, -100)),  # below -126 all are subnormals
)


def operands(instruction: Instruction) -> Operands:
    """SUMS sums of each family, on the CPU: the same everywhere, since whole numbers alone are drawn."""
    tiles = SUMS // (instruction.rows * instruction.columns)
    drawn = [_drawn(family, seed, tiles, instruction) for seed, family in enumerate(FAMILIES)]
    a, b, c = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    return a, b, c


def _drawn(family: Family, seed: int, tiles: int, instruction: Instruction) -> Operands:
    rng = torch.Generator().manual_seed(seed)
    a = numbers(rng, (tiles, instruction.rows, K), family.a, torch.bfloat16, family.lead)
    b = numbers(rng, (tiles, instruction.columns, K), family.b, torch.bfloat16, family.lead)
    if not isinstance(family.c, str):
        return a, b, numbers(rng, (tiles, instruction.rows, instruction.columns), family.c, torch.float32)
    ks = 1 if family.c == FIRST else K  # float64 holds these sums whole, so that no order of adding shows
    return a, b, -(a[..., :ks].double() @ b[..., :ks].double().mT).float()


def numbers(
    rng: torch.Generator, shape: tuple[int, ...], exponents: tuple[int, int], dtype: torch.dtype, lead: int = 0
) -> Tensor:
    """bf16 or fp32 of any sign and fraction with exponents in that range, and of the last axis's first with exponent
    lead where it is not 0. Below -126: subnormals. No fp32 is zero."""
    width, fraction = (16, 7) if dtype == torch.bfloat16 else (32, 23)
    field = torch.randint(exponents[0], exponents[1] + 1, shape, generator=rng) + 127
    if lead:
        field[..., 0] = lead + 127
    digits = torch.randint(1 << fraction, shape, generator=rng) | (width == 32)
    sign = torch.randint(2, shape, generator=rng)
    bits = (field.clamp(min=0) << fraction | digits) - (sign << width - 1)
    return bits.to(torch.int16 if width == 16 else torch.int32).view(dtype)


# ---------------------------------------------------------------- the check


def check_tensor_cores(records: Records, gpu: Cuda) -> None:
    """A row for each of INSTRUCTIONS: hidden_size is K, tokens the rows of a tile. Raises DeviceLost if the context
    broke."""
    for instruction in INSTRUCTIONS:
        key = {"plan": instruction.name, "config": str(HOPPER), "check": Check.TENSOR_CORE}
        row = GpuCheckRow(**key, tokens=instruction.rows, hidden_size=K)
        if not records.has(GpuCheckRow, **vars(row)):
            with in_flight(records, {"a matrix instruction": row}, DeviceLost):
                found = step_checked(instruction, gpu)
            records.add(dataclasses.replace(row, **found))


def step_checked(instruction: Instruction, gpu: Cuda) -> dict[str, object]:
    """share_equal, status and reason of an instruction's sums against HOPPER's."""
    try:
        given = operands(instruction)
        a, b, c = (tensor.to(gpu.device) for tensor in given)
        came = added(instruction, a, b, c).cpu()
        model = modelled(a, b, c).cpu()
        equal = same(came, model)
        if equal.all():
            return {"share_equal": 1.0}
        shares = {other: same(came, modelled(a, b, c, other).cpu()).double().mean().item() for other in ALTERNATIVES}
    except Exception as error:  # no compile, no launch, no memory: a row, and on
        return {"status": Status.FAILED, "reason": reason_of(gpu, "a matrix instruction", error)}
    share = equal.double().mean().item()
    best = max(shares, key=lambda other: shares[other])
    other = f"`{best}` explains {shares[best]:.4%}" if shares[best] > share else "no other model explains more"
    differ = f"{int((~equal).sum())} of {equal.numel()} sums differ from `{HOPPER}`"
    reason = f"{differ}; {other}; {counterexample(given, came, model)}"
    return {"share_equal": share, "status": Status.RED, "reason": reason}


def same(x: Tensor, y: Tensor) -> Tensor:
    """Where bits are equal, of fp32."""
    return x.view(torch.int32) == y.view(torch.int32)


def counterexample(given: Operands, came: Tensor, model: Tensor) -> str:
    """The first sum that differs, its operands and both results as hexadecimal bits, and its family."""
    tile, row, column = (~same(came, model)).nonzero()[0].tolist()
    a, b, c = given
    family = FAMILIES[tile * len(FAMILIES) // len(a)].name
    terms = f"a {words(a[tile, row])}, b {words(b[tile, column])}, c {words(c[tile, row, column])}"
    place = f"tile {tile} row {row} column {column}"
    got, said = (words(d[tile, row, column]) for d in (came, model))
    return f"first, {family}, {place}: {terms} gave {got}, not {said}"


def words(x: Tensor) -> str:
    """Bits of bf16 or fp32, four or eight hexadecimal digits each."""
    width = 16 if x.dtype == torch.bfloat16 else 32
    bits = x.reshape(-1).view(torch.int16 if width == 16 else torch.int32).tolist()
    return " ".join(f"{value % (1 << width):0{width // 4}x}" for value in bits)
