"""What must hold before a kernel of a GPU is timed, and what the GPU's own arithmetic does.

Every plan as every config that a launch may take: bit-equal to its spec on inputs whose sums are exact, inside its
envelope on a layer with drawn weights; our own loop by itself likewise. Eager with cuBLAS as it is set by default, and
told to add in fp32. And how many bits compiled kernels share with the same kernels interpreted on a CPU.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from castpoint.harness.accuracy.errors import error_stats
from castpoint.harness.peers import chains as peers
from castpoint.harness.problems import grid
from castpoint.harness.problems.drawn import synthetic_problem, with_positions
from castpoint.harness.problems.exact import exact_problem
from castpoint.harness.runs.environment import ROOT
from castpoint.harness.runs.progress import track
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import Check, GpuCheckRow, Status
from castpoint.harness.timing.cuda import Cuda, reason_of
from castpoint.kernels.config import Config, unsupported
from castpoint.kernels.dispatch import fallback, read_table
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
DEFAULT = "default"  # the config of a launch that is given none
HEAD_DIM = 128  # of every model of the grid
KernelCheck = tuple[str, Config | None, Check, bool, int]  # plan, config, check, rope, tokens


def configs_of(plan: CastPlan) -> dict[str, Config | None]:
    """Every config that a launch of the plan may take on some shape and some GPU, by its words."""
    listed = [config for configs in read_table().values() for config in configs.values()]
    fit = {str(c): c for c in [fallback(HEAD_DIM, plan), *listed] if not unsupported(c, plan)}
    return {DEFAULT: None, **(fit if plan.matmul == "bf16" else {})}


def kernel_checks() -> Iterator[KernelCheck]:
    """Two of each plan and config, exact inputs and drawn ones; two more where the plan is timed with RoPE too; and for
    split-K, which has another binary for it, of one token."""
    turned = grid.own_plans(grid.Point(grid.MODELS[0], 1, grid.ROPE))
    for name, named in PLANS.items():
        for config in configs_of(named.plan).values():
            counts = (TOKENS, 1) if config and config.kernel == "split-k" else (TOKENS,)
            ropes = (False, True) if name in turned else (False,)
            for rope, tokens, check in itertools.product(ropes, counts, AGAINST_SPEC):
                yield name, config, check, rope, tokens


def check_kernels(
    records: Records, gpu: Cuda, asked: Iterable[KernelCheck] | None = None, row: type[Any] = GpuCheckRow, **target: str
) -> None:
    """One row for each of kernel_checks, or of those asked for. Raises DeviceLost if the context broke."""
    for name, config, check, rope, tokens in track(list(asked or kernel_checks()), target.get("target", "checks")):
        key = {**target, "plan": name, "config": str(config or DEFAULT), "rope": rope, "tokens": tokens, "check": check}
        if not records.has(row, **key):
            records.add(row(**key, **checked(PLANS[name].plan, config, check, gpu, rope, tokens)))


def check_loops(points: Sequence[grid.Point], records: Records, gpu: Cuda) -> None:
    """Two rows for each tile of our own loop at those points, named as its arm. Raises DeviceLost as check_kernels."""
    tiles = dict.fromkeys(tile for p in points for tile in grid.loop_tiles(p))
    for tile, check in itertools.product(tiles, AGAINST_SPEC):
        key = {"plan": peers.loop_name(tile), "config": str(tile), "rope": False, "tokens": TOKENS, "check": check}
        if not records.has(GpuCheckRow, **key):
            records.add(GpuCheckRow(**key, **loop_checked(tile, check, gpu)))


def red_plans(records: Records) -> dict[str, str]:
    """plan, or arm of our own loop -> reason, of those that a check found wrong in some config."""
    rows = [row for row in records.rows("gpu_checks") if row["check"] in AGAINST_SPEC and row["status"] != Status.OK]
    return {
        row["plan"]: f"{row['config']}{', RoPE' * (row['rope'] == str(True))}, {row['check']}: {row['reason']}"
        for row in rows
    }


def checked(
    plan: CastPlan, config: Config | None, check: str, gpu: Cuda, rope: bool = False, tokens: int = TOKENS
) -> dict[str, object]:
    """share_equal, status and reason of one check of one config, None for the default one."""
    try:
        problem = problem_for(plan, check, gpu.device, rope, tokens)
        expected = spec(plan, problem).outputs()
        runs = [run_triton(plan, problem, config=config) for _ in range(2)]
    except Exception as error:  # no compile, no launch, no memory: a row, and on
        return {"status": Status.FAILED, "reason": reason_of(gpu, "a check", error)}
    exact = check == Check.EXACT
    bounds = {name: (value, value) for name, value in expected.items()} if exact else envelope(plan, problem)
    what = "differ from the spec where no sum depends on order" if exact else "lie outside the envelope"
    return _judged(runs, list(expected.values()), [bounds[name] for name in expected], what)


def _judged(runs: list[Outputs], expected: list[Tensor], bounds: list[Interval], what: str) -> dict[str, object]:
    """share_equal, status and reason of two runs. what: is wrong with elements outside their bounds."""
    equal = torch.cat([(a.double() == e).flatten() for a, e in zip(runs[0], expected, strict=True)])
    wrong = sum(int(outside(a, allowed).sum()) for a, allowed in zip(runs[0], bounds, strict=True))
    reason = f"{wrong} of {equal.numel()} elements {what}" if wrong else ""
    if not all(torch.equal(a, b) for a, b in zip(*runs, strict=True)):
        reason += "; two runs differ"
    share = equal.double().mean().item()
    return {"share_equal": share, "status": Status.RED if reason else Status.OK, "reason": reason.removeprefix("; ")}


def problem_for(plan: CastPlan, check: str, device: str, rope: bool = False, tokens: int = TOKENS) -> Problem:
    """The problem of a check."""
    if check == Check.EXACT:
        return exact_problem(plan, tokens=tokens, hidden_size=1024, head_dim=HEAD_DIM, rope=rope).to(device)
    problem = synthetic_problem("qwen3-0.6b", 0, tokens, weight_offset=plan.weight_offset != "none").to(device)
    return with_positions(problem) if rope else problem


def loop_checked(tile: Config, check: str, gpu: Cuda) -> dict[str, object]:
    """checked, of our own loop: bit-equal on whole numbers, in the interval of an fp32 sum on drawn weights."""
    try:
        hidden, weight, (low, high) = loop_problem(check, gpu.device)
        runs = [(matmul(hidden, weight, HEAD_DIM, tile),) for _ in range(2)]
    except Exception as error:  # no compile, no launch, no memory: a row, and on
        return {"status": Status.FAILED, "reason": reason_of(gpu, "a check", error)}
    what = "differ where sums are exact" if check == Check.EXACT else "lie outside the interval of fp32 sums"
    return _judged(runs, [low], [(low, high)], what)


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
    problem = problem_for(plan, Check.ENVELOPE, gpu.device)
    for setting in peers.REDUCTIONS:
        key = {"plan": "hf", "config": setting, "rope": False, "tokens": TOKENS, "check": Check.EAGER}
        if records.has(GpuCheckRow, **key):
            continue
        try:
            with bf16_reduction(peers.REDUCTIONS[setting]):
                found = _compared(eager(problem), tuple(spec(plan, problem).outputs().values()))
        except Exception as error:  # a setting that this PyTorch does not know
            found = {"status": Status.FAILED, "reason": reason_of(gpu, "eager", error)}
        records.add(GpuCheckRow(**key, **found))


def check_interpreter(records: Records, gpu: Cuda) -> None:
    """Compiled kernels against the same kernels interpreted: sums in another order, and nothing else."""
    common = {"config": DEFAULT, "rope": False, "tokens": TOKENS, "check": Check.INTERPRETER}
    todo = [n for n in PLANS if not records.has(GpuCheckRow, plan=n, **common)]
    if not todo:
        return
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "castpoint.harness.conformance.cuda", folder, *todo]
        child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        for name in todo:
            path, plan = Path(folder) / f"{name}.pt", PLANS[name].plan
            lines = child.stderr.strip().splitlines() or [f"exit status {child.returncode}"]
            found = {"status": Status.FAILED, "reason": lines[-1]}
            if path.exists():
                try:
                    compiled = run_triton(plan, problem_for(plan, Check.ENVELOPE, gpu.device))
                    found = _compared(tuple(t.cpu() for t in compiled), torch.load(path, weights_only=True))
                except Exception as error:  # of a kernel that no GPU runs
                    found = {"status": Status.FAILED, "reason": reason_of(gpu, "a compiled kernel", error)}
            records.add(GpuCheckRow(plan=name, **common, **found))


def _compared(actual: Outputs, expected: tuple[Tensor, ...]) -> dict[str, object]:
    """Of q, k and v together: share of equal bits, and the largest difference in ulps."""
    rows = [error_stats(actual=a, reference=b.double()) for a, b in zip(actual, expected, strict=True)]
    sizes = [a.numel() for a in actual]
    share = sum(row.share_equal * size for row, size in zip(rows, sizes, strict=True)) / sum(sizes)
    return {"share_equal": share, "max_ulp": max(row.max_ulp for row in rows)}


if __name__ == "__main__":  # the interpreter's half of check_interpreter, in a process of its own
    for plan_name in sys.argv[2:]:
        outputs = run_triton(PLANS[plan_name].plan, problem_for(PLANS[plan_name].plan, Check.ENVELOPE, "cpu"))
        torch.save(list(outputs), Path(sys.argv[1]) / f"{plan_name}.pt")
