"""What no arm can beat: launches, memory bandwidth and matrix throughput, measured in the process that times the arms.

And what none may claim to beat: a number above the hardware's own peak is a bug of the measurement.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from castpoint.harness.runs.errors import UserError
from castpoint.harness.timing.cpu import Ceilings
from castpoint.harness.timing.cuda import Cuda, reason_of
from castpoint.harness.timing.outputs import values_differ
from castpoint.harness.timing.rig import Arm, laps_for, measure

KERNELS = (1, 3, 30, 300)  # empty kernels in a graph
SAMPLES, REPLAYS = 21, 50
READ_BLOCKS = (2048, 4096, 8192, 16384)  # words of 4 bytes a program: the fastest is the ceiling
COPY_BYTES, MATMUL_SIZE = 1 << 31, 8192


# Published peaks, dense bf16: NVIDIA's data sheet, SXM. By part of the name that the driver reports.
PEAKS = {"H200": Ceilings(4.8e12, 989e12)}


def implausible(gpu_name: str, seconds: float, cold_bytes: float = 0.0, flops: float = 0.0) -> str | None:
    """Why a time cannot be right on that GPU, or None (also for a GPU whose peaks are not listed).

    cold_bytes: what must come from memory in that time: 0 for a hot row; cold weights, not what a cache may hold.
    """
    peak = next((peak for part, peak in PEAKS.items() if part in gpu_name), None)
    if peak is None:
        return None
    if not seconds > 0:
        return f"{seconds} s is no time"
    if cold_bytes / seconds > peak.bytes_per_s:
        return f"{cold_bytes / seconds / 1e12:.2f} TB/s of cold memory: {gpu_name} has {peak.bytes_per_s / 1e12:g}"
    if flops / seconds > peak.bf16_flops_per_s:
        return f"{flops / seconds / 1e12:.0f} TFLOP/s: {gpu_name} has {peak.bf16_flops_per_s / 1e12:g}"
    return None


# ---------------------------------------------------------------- launches


@triton.jit
def empty_kernel():
    pass


def launch_costs(gpu: Cuda) -> dict[str, Any]:
    """Seconds of replaying graphs of 1, 3, 30 and 300 empty kernels, and what follows from them.

    graph_s       {kernels: seconds of one replay}, medians, replays back to back
    per_kernel_s  slope between the two longest: short graphs may wait for the host between replays
    per_replay_s  what is left of the second longest without its kernels: the cost of a replay itself
    Or only `unknown`, the reason why there is none. Raises DeviceLost where the CUDA context broke.
    """

    def launch(i: int) -> tuple[Tensor, ...]:
        empty_kernel[(1,)]()
        return ()

    samples: dict[int, list[float]] = {kernels: [] for kernels in KERNELS}
    try:
        graphs = {kernels: gpu.capture(launch, kernels) for kernels in KERNELS}
        for _ in range(SAMPLES):
            for kernels, graph in graphs.items():
                samples[kernels].append(gpu.seconds(graph, REPLAYS) * kernels)
    except Exception as error:
        return {"unknown": reason_of(gpu, "empty kernels", error)}
    graph_s = {kernels: float(np.median(values)) for kernels, values in samples.items()}
    *_, few, many = KERNELS
    per_kernel_s = (graph_s[many] - graph_s[few]) / (many - few)
    return {"graph_s": graph_s, "per_kernel_s": per_kernel_s, "per_replay_s": graph_s[few] - few * per_kernel_s}


# ---------------------------------------------------------------- memory and matrices


@triton.jit
def read_kernel(
    words_ptr,  # [n] int32
    sums_ptr,  # [programs] int32
    n,
    BLOCK: tl.constexpr,
):
    """The sum of each block, modulo 2^32: it needs every word, so no load can be left out."""
    pid = tl.program_id(0)
    offs = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    words = tl.load(words_ptr + offs, mask=offs < n, other=0)
    tl.store(sums_ptr + pid, tl.sum(words, axis=0))


def read_sums(weight: Tensor, block: int) -> Tensor:
    """[blocks] int32: sums of a contiguous bf16 tensor's bits, read as int32. Raises ValueError for an odd size."""
    if weight.numel() % 2:
        raise ValueError(f"bf16 elements are read in pairs: their number must be even, not {weight.numel()}")
    words = weight.reshape(-1).view(torch.int32)
    sums = torch.empty(triton.cdiv(words.numel(), block), dtype=torch.int32, device=weight.device)
    read_kernel[(sums.numel(),)](words, sums, words.numel(), BLOCK=block, num_warps=8)
    return sums


def read_ceiling(gpu: Cuda, weights: Sequence[Tensor], expected_bytes_per_s: float = 4e12) -> dict[str, Any]:
    """Bytes/s at which a kernel reads these weights and does nothing else, rotated as the arms rotate them.

    expected_bytes_per_s only sets how often the rotation is captured. Raises DeviceLost as measure does.
    """
    arms = [Arm(f"read {block}", lambda i, block=block: (read_sums(weights[i], block),)) for block in READ_BLOCKS]
    size = weights[0].numel() * 2
    laps = laps_for(len(weights), size / expected_bytes_per_s)
    measured = measure(arms, gpu, copies=len(weights), laps=laps, budget_s=0.5)
    best = min((o.seconds.p50 for o in measured.outcomes.values() if o.seconds), default=None)
    if best is None:
        return {"unknown": "; ".join(f"{name}: {o.reason}" for name, o in measured.outcomes.items())}
    return {"bytes_per_s": size / best, "seconds": best}


def ceilings(gpu: Cuda, copy_bytes: int = COPY_BYTES, size: int = MATMUL_SIZE) -> dict[str, Any]:
    """copy_bytes_per_s (bytes read plus bytes written, 2 GiB) and bf16_flops_per_s (8192^3, random data).

    None for what could not be measured; `reason` says why. Raises DeviceLost as measure does.
    """
    found: dict[str, Any] = {"reason": ""}
    for key, made, work in (  # operands are made by the first call, and where they do not fit, it is the arm that fails
        ("copy_bytes_per_s", functools.cache(lambda: _copy(copy_bytes, gpu.device)), 2 * copy_bytes),
        ("bf16_flops_per_s", functools.cache(lambda: _matmul(size, gpu.device)), 2 * size**3),
    ):
        arm = Arm(key, lambda i, made=made: made()(i), values_differ)
        outcome = measure([arm], gpu, copies=1, budget_s=0.5).outcomes[key]
        found[key] = work / outcome.seconds.p50 if outcome.seconds else None
        found["reason"] += outcome.reason
    return found


def found_ceilings(found: dict[str, Any]) -> Ceilings:
    """What `ceilings` found. Raises UserError where one is missing, since no share of it could be given."""
    if found["reason"]:
        raise UserError(f"the GPU's own limits could not be measured: {found['reason']}")
    return Ceilings(found["copy_bytes_per_s"], found["bf16_flops_per_s"])


def _copy(size: int, device: str) -> Any:
    source = torch.randint(-128, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)

    def call(i: int) -> tuple[Tensor, ...]:
        target.copy_(source)
        return ()  # 2 GiB of outputs that nobody compares

    return call


def _matmul(size: int, device: str) -> Any:
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    return lambda i: (a @ b,)
