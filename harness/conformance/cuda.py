"""What must hold before a kernel of a GPU is timed, and what the GPU's own arithmetic does.

Each binary is checked once, when it is first wanted: bit-equal to its spec on inputs whose sums are exact, with one
product a sum and with many, inside its envelope on a layer with drawn weights; our own loop by itself likewise. Eager
with cuBLAS as it is set by default, and told to add in fp32. Outputs are kept for whoever compares them, elsewhere,
with the same kernels on a CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from safetensors.torch import save_file
from torch import Tensor

from castpoint.harness.accuracy.errors import error_stats
from castpoint.harness.peers import chains as peers
from castpoint.harness.peers.parts import cublaslt
from castpoint.harness.problems.drawn import digest, synthetic_problem, with_positions
from castpoint.harness.problems.exact import PRODUCTS, exact_problem
from castpoint.harness.runs.flight import in_flight
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import GpuCheckRow
from castpoint.harness.runs.words import Check, Status
from castpoint.harness.timing.cuda import Cuda, DeviceLost, reason_of
from castpoint.kernels.config import Config, default_config
from castpoint.kernels.main_loop import matmul
from castpoint.kernels.plan import RNE, CastPlan
from castpoint.kernels.separate import bf16_reduction
from castpoint.variants.backends import run_triton
from castpoint.variants.catalogue import PLANS
from castpoint.variants.eager import Outputs, eager
from castpoint.variants.envelope import Interval, dot_interval, envelope, outside
from castpoint.variants.problem import Problem
from castpoint.variants.spec import spec, store

TOKENS = 70  # of the checks: more than one tile of 64 or of 16, and not whole ones
AGAINST_SPEC = (Check.EXACT, Check.ENVELOPE)
HEAD_DIM = 128  # of every model of the grid
SHARES = 3  # of a checked split-K: they make no other binary, and of 8 steps one share is shorter
WIDTHS = {  # channels that a program of rms_norm holds -> the model, and its width, that such a binary is checked at
    1024: ("qwen3-0.6b", 1024), 2048: ("qwen3-1.7b", 2048), 4096: ("qwen3-4b", 2560), 8192: ("qwen3-14b", 5120),
}  # fmt: skip
# Of a results folder: what kernels of this GPU return, for `compared` elsewhere.
OUTPUTS, OUTPUT_TOKENS = "outputs.safetensors", 8


@dataclass(frozen=True)
class Binary:
    """What is compiled for a launch, whatever its shape. plan: its name; empty for our own loop by itself.
    tokens: 1 where one token has a binary of its own. hidden_size: width of the problem that it is checked on."""

    plan: str
    config: Config
    rope: bool = False
    tokens: int = TOKENS
    hidden_size: int = 1024

    @property
    def key(self) -> dict[str, Any]:
        """Of its rows of gpu_checks, but for the check."""
        config = dataclasses.replace(self.config, splits=SHARES) if self.config.splits > 1 else self.config
        name = self.plan or peers.loop_name(config)
        return {"plan": name, "config": str(config), **{n: getattr(self, n) for n in ("rope", "tokens", "hidden_size")}}


def binary_of(plan: str, config: Config, tokens: int, hidden_size: int, rope: bool = False) -> Binary:
    """The binary that a launch of that shape takes."""
    split = config.kernel == "split-k"
    config = dataclasses.replace(config, splits=SHARES) if split else config
    before = plan and (config.kernel == "separate" or config.prepass != "none")
    width = WIDTHS.get(triton.next_power_of_2(hidden_size), ("", hidden_size))[1] if before else 1024
    return Binary(plan, config, rope, 1 if split and tokens == 1 else TOKENS, width)


@dataclass
class Checks:
    """Which binaries of this run are wrong, and why. Each is checked when it is first asked for, and has two rows."""

    records: Records
    gpu: Cuda
    found: dict[tuple[str, ...], str] = field(default_factory=dict)  # key of a row -> why it is wrong, or empty
    kept: dict[str, tuple[Any, Reference]] = field(default_factory=dict)  # of the last plan, which many configs share

    def __post_init__(self) -> None:
        for row in self.records.rows("gpu_checks"):
            self.found[GpuCheckRow.key_of(**row)] = "" if row["status"] == Status.OK else row["reason"]

    def why_red(self, binary: Binary) -> str:
        """Why that binary gets no time; empty where it is right. Raises DeviceLost if the context broke."""
        for check in AGAINST_SPEC:
            row = GpuCheckRow(**binary.key, check=check)
            key = row.key_of(**vars(row))
            if key not in self.found:
                with in_flight(self.records, {"a check": row}, DeviceLost):
                    row = dataclasses.replace(row, **self._checked(binary, check))
                self.records.add(row)
                self.found[key] = "" if row.status == Status.OK else row.reason
            if why := self.found[key]:
                return f"{binary.config}{', RoPE' * binary.rope}, {check}: {why}"
        return ""

    def _checked(self, binary: Binary, check: str) -> dict[str, Any]:
        if not binary.plan:
            return loop_checked(binary.config, check, self.gpu)
        shared = (binary.plan, binary.rope, binary.tokens, binary.hidden_size)
        if self.kept.get(check, (None,))[0] != shared:
            plan = PLANS[binary.plan].plan
            self.kept[check] = shared, reference(plan, check, problems_for(plan, check, self.gpu.device, *shared[1:]))
        return checked(PLANS[binary.plan].plan, binary.config, self.kept[check][1], check, self.gpu)


# ---------------------------------------------------------------- one check


@dataclass(frozen=True)
class Reference:
    """Problems, what q, k and v of each should be, and the bounds of each element."""

    problems: list[Problem]
    expected: list[Tensor]
    bounds: list[Interval]


def reference(plan: CastPlan, check: str, problems: list[Problem]) -> Reference:
    """What that check asks of those problems."""
    expected = [value for problem in problems for value in spec(plan, problem).outputs().values()]
    if check == Check.EXACT:
        return Reference(problems, expected, [(value, value) for value in expected])
    return Reference(problems, expected, [ends for p in problems for ends in envelope(plan, p).values()])


def checked(
    plan: CastPlan, config: Config | None, wanted: Reference, check: str, gpu: Cuda, runs: int = 2,
    run: Callable[..., Outputs] | None = None,
) -> dict[str, object]:  # fmt: skip
    """share_equal, elements, status and reason of one check of one config, None for the default one. runs: of each
    problem, which must give the same bits. run: run_quantised for problems in blocks; None: run_triton."""
    exact = check == Check.EXACT
    what = "differ from the spec where no sum depends on order" if exact else "lie outside the envelope"
    try:
        made = run or run_triton
        ran = [[out for p in wanted.problems for out in made(plan, p, config=config)] for _ in range(runs)]
        return _judged(ran, wanted.expected, wanted.bounds, what)
    except Exception as error:  # no compile, no memory, or a launch whose fault shows when its outputs are read
        return {"status": Status.FAILED, "reason": reason_of(gpu, "a check", error)}


def _judged(
    runs: Sequence[Sequence[Tensor]], expected: list[Tensor], bounds: list[Interval], what: str
) -> dict[str, object]:
    """share_equal, elements, status and reason of runs. what: is wrong with elements outside their bounds."""
    equal = torch.cat([(a.double() == e).flatten() for a, e in zip(runs[0], expected, strict=True)])
    wrong = sum(int(outside(a, allowed).sum()) for a, allowed in zip(runs[0], bounds, strict=True))
    reason = f"{wrong} of {equal.numel()} elements {what}" if wrong else ""
    if not all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True)):
        reason += "; two runs differ"
    found = {"share_equal": equal.double().mean().item(), "elements": equal.numel()}
    return found | {"status": Status.RED if reason else Status.OK, "reason": reason.removeprefix("; ")}


def problems_for(
    plan: CastPlan, check: str, device: str, rope: bool = False, tokens: int = TOKENS, hidden_size: int = 1024
) -> list[Problem]:
    """The problems of a check. hidden_size: of the drawn one, one of WIDTHS."""
    if check != Check.EXACT:
        return [drawn_problem(plan, device, rope, tokens, hidden_size)]
    shape = {"tokens": tokens, "hidden_size": hidden_size, "head_dim": HEAD_DIM, "rope": rope}
    return [exact_problem(plan, products=products, **shape).to(device) for products in PRODUCTS]


def drawn_problem(
    plan: CastPlan, device: str, rope: bool = False, tokens: int = TOKENS, hidden_size: int = 1024
) -> Problem:
    """The first layer of the model of WIDTHS with so many channels."""
    model = next(model for model, width in WIDTHS.values() if width == hidden_size)
    problem = _drawn(model, tokens, plan.weight_offset != "none", device)
    return with_positions(problem) if rope else problem


@functools.lru_cache(maxsize=8)  # plans and configs share it, and a wide one takes a second to draw
def _drawn(model: str, tokens: int, weight_offset: bool, device: str) -> Problem:
    return synthetic_problem(model, 0, tokens, weight_offset=weight_offset).to(device)


def loop_checked(tile: Config, check: str, gpu: Cuda) -> dict[str, object]:
    """checked, of our own loop: bit-equal on whole numbers, in the interval of an fp32 sum on drawn weights."""
    what = "differ where sums are exact" if check == Check.EXACT else "lie outside the interval of fp32 sums"
    try:
        hidden, weight, (low, high) = loop_problem(check, gpu.device)
        runs = [(matmul(hidden, weight, HEAD_DIM, tile),) for _ in range(2)]
        return _judged(runs, [low], [(low, high)], what)
    except Exception as error:  # as in checked
        return {"status": Status.FAILED, "reason": reason_of(gpu, "a check", error)}


def loop_problem(check: str, device: str) -> tuple[Tensor, Tensor, Interval]:
    """hidden, W, and the lowest and highest proj that sums in fp32, rounded once, can give.

    Exact: whole numbers up to 8, whose sums fp32 holds in any order and bf16 mostly does not, many of them ties; the
    last block of tokens and the last step of D are not whole at any tile.
    """
    if check == Check.EXACT:
        rng = torch.Generator().manual_seed(0)
        shapes = (2 * TOKENS, 1008), (4 * HEAD_DIM, 1008)
        hidden, weight = (torch.randint(-8, 9, s, generator=rng).to(device, torch.bfloat16) for s in shapes)
        proj = hidden.double() @ weight.double().T
        return hidden, weight, (store(proj, RNE), store(proj, RNE))
    p = synthetic_problem("qwen3-0.6b", 0, TOKENS).to(device)
    return p.x, p.qkv_weight, proj_bounds(p.x, p.qkv_weight)


def proj_bounds(hidden: Tensor, weight: Tensor) -> Interval:
    """Lowest and highest bf16 proj [T, rows], in float64, that sums in fp32 over these operands can give."""
    low, high = dot_interval((hidden.double(), hidden.double()), weight.double())
    return store(low, RNE), store(high, RNE)


# ---------------------------------------------------------------- the GPU's own arithmetic


def check_eager(records: Records, gpu: Cuda) -> None:
    """Eager against the spec of its plan, with partial sums in bf16 allowed (PyTorch's default) and not."""
    plan = PLANS["hf"].plan
    problem = drawn_problem(plan, gpu.device)
    for setting in peers.REDUCTIONS:
        row = GpuCheckRow(plan="hf", config=setting, tokens=TOKENS, check=Check.EAGER)
        if records.has(GpuCheckRow, **vars(row)):
            continue
        with in_flight(records, {"eager": row}, DeviceLost):
            try:
                with blas(setting), bf16_reduction(peers.REDUCTIONS[setting]):
                    found = compared(eager(problem), tuple(spec(plan, problem).outputs().values()))
            except Exception as error:  # a setting that this PyTorch does not know
                found = {"status": Status.FAILED, "reason": reason_of(gpu, "eager", error)}
        records.add(dataclasses.replace(row, **found))


def blas(setting: str) -> contextlib.AbstractContextManager[None]:
    """The library that knows the setting: only cuBLASLt does not split D, as torch 2.11 says on a GPU."""
    told = isinstance(peers.REDUCTIONS[setting], tuple) and torch.version.cuda is not None
    return cublaslt() if told else contextlib.nullcontext()


def store_outputs(records: Records, gpu: Cuda) -> None:
    """OUTPUTS in the results folder: q, k and v of every plan's fused kernel on drawn weights, the bits that a CPU
    elsewhere compares with the same kernel interpreted, and with its PTX run there. Raises DeviceLost as Checks do."""
    kept: dict[str, Tensor] = {}
    for name, row in outputs_rows(Check.PTX).items():
        if records.has(GpuCheckRow, **vars(row)):  # it failed here before
            continue
        with in_flight(records, {"a kernel": row}, DeviceLost):
            try:
                outputs = [tensor.cpu().contiguous() for tensor in fused_outputs(name, gpu.device)]
            except Exception as error:
                why = reason_of(gpu, "a kernel", error)
                records.add(dataclasses.replace(row, status=Status.FAILED, reason=why))
                continue
        kept |= {f"{name} {i}": tensor for i, tensor in enumerate(outputs)}
    save_file(kept, records.folder / OUTPUTS, {"inputs": inputs_digest()})


def fused_outputs(name: str, device: str) -> Outputs:
    """q, k and v of that plan's fused kernel with its default tiles, on drawn weights."""
    plan = PLANS[name].plan
    problem = drawn_problem(plan, device, tokens=OUTPUT_TOKENS)
    return run_triton(plan, problem, config=default_config(HEAD_DIM, plan, False))


def inputs_digest() -> str:
    """Of the inputs of those kernels, norm weights stored as w and as w - 1: the same on every machine."""
    problems = [drawn_problem(PLANS[name].plan, "cpu", tokens=OUTPUT_TOKENS) for name in ("hf", "gemma")]
    return digest(value for problem in problems for value in vars(problem).values() if torch.is_tensor(value))


def outputs_rows(check: Check, names: Iterable[str] = tuple(PLANS)) -> dict[str, GpuCheckRow]:
    """Rows of gpu_checks for a comparison of those outputs, by plan."""
    configs = {name: default_config(HEAD_DIM, PLANS[name].plan, False) for name in names}
    return {n: GpuCheckRow(plan=n, config=str(c), tokens=OUTPUT_TOKENS, check=check) for n, c in configs.items()}


def compared(actual: Outputs, expected: tuple[Tensor, ...]) -> dict[str, Any]:
    """Of q, k and v together: share of equal bits, and the largest difference in ulps."""
    rows = [error_stats(actual=a, reference=b.double()) for a, b in zip(actual, expected, strict=True)]
    sizes = [a.numel() for a in actual]
    share = sum(row.share_equal * size for row, size in zip(rows, sizes, strict=True)) / sum(sizes)
    return {"share_equal": share, "max_ulp": max(row.max_ulp for row in rows)}
