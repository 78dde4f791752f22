"""What no arm can beat: launches, memory bandwidth and matrix throughput, measured in the process that times the arms.

And what none may claim to beat: a number above the hardware's own peak is a bug of the measurement.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
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
from castpoint.harness.timing.rig import Arm, cold_copies, copies_that_fit, measure

Limit = tuple[float | None, str]  # what was measured, or None and why

KERNELS = (1, 3, 30, 300)  # empty kernels in a graph
SAMPLES, REPLAYS = 21, 50
READ_BLOCKS = (2048, 4096, 8192, 16384)  # words of 4 bytes a program: the fastest is the ceiling
COPY_BYTES, READ_BYTES, MATMUL_SIZE = 1 << 31, 100 << 20, 8192


# Published peaks, dense bf16 (half of what NVIDIA's data sheets give with sparsity), by how the name that the driver
# reports begins. Not by a part of it: a GH200, whose name holds H200 too, has another memory.
PEAKS = {
    "NVIDIA H200": Ceilings(4.8e12, 989e12),
    "NVIDIA H100 80GB HBM3": Ceilings(3.35e12, 989e12),  # SXM
    "NVIDIA H100 NVL": Ceilings(3.9e12, 835e12),
    "NVIDIA H100 PCIe": Ceilings(2.0e12, 756e12),
}


def implausible(gpu_name: str, seconds: float, cold_bytes: float = 0.0, flops: float = 0.0) -> str | None:
    """Why a time cannot be right on that GPU, or None (also for a GPU whose peaks are not listed).

    cold_bytes: what must come from memory in that time: 0 for a hot row; cold weights, not what a cache may hold.
    """
    peak = next((peak for name, peak in PEAKS.items() if gpu_name.startswith(name)), None)
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


@functools.lru_cache(maxsize=1)  # two of LIMITS are of it
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


def read_limit(gpu: Cuda) -> Limit:
    """Bytes/s at which a kernel reads weights as large as the largest and does nothing else, rotated over 3 x L2."""
    rng = torch.Generator(gpu.device).manual_seed(0)
    copies = copies_that_fit(cold_copies(READ_BYTES, gpu.l2_bytes()), READ_BYTES, gpu.free_bytes())
    half = READ_BYTES // 2
    weights = [torch.randn(half, device=gpu.device, generator=rng).to(torch.bfloat16) for _ in range(copies)]
    arms = [Arm(f"read {block}", lambda i, block=block: (read_sums(weights[i], block),)) for block in READ_BLOCKS]
    measured = measure(arms, gpu, copies=copies, budget_s=0.5)
    best = min((o.seconds.p50 for o in measured.outcomes.values() if o.seconds), default=None)
    if best is None:
        return None, "; ".join(f"{name}: {o.reason}" for name, o in measured.outcomes.items())
    return READ_BYTES / best, ""


def copy_limit(gpu: Cuda, size: int = COPY_BYTES) -> Limit:
    """Bytes/s of a copy of 2 GiB, bytes read plus bytes written."""
    return _rate(gpu, "copy", functools.cache(lambda: _copy(size, gpu.device)), 2 * size)


def matmul_limit(gpu: Cuda, size: int = MATMUL_SIZE) -> Limit:
    """FLOP/s of a bf16 matmul of 8192^3 on random data."""
    return _rate(gpu, "bf16 matmul", functools.cache(lambda: _matmul(size, gpu.device)), 2 * size**3)


def _rate(gpu: Cuda, name: str, made: Any, work: int) -> Limit:
    """work over seconds of that call, which the first call makes with its operands: where they do not fit, it is the
    arm that fails."""
    outcome = measure([Arm(name, lambda i: made()(i), values_differ)], gpu, copies=1, budget_s=0.5).outcomes[name]
    made.cache_clear()  # the copy's 4 GiB are not kept while the matmul is timed
    gpu.release()
    return (work / outcome.seconds.p50, "") if outcome.seconds else (None, outcome.reason)


def launch_limit(gpu: Cuda, what: str) -> Limit:
    """`per_kernel_s` or `per_replay_s` of launch_costs."""
    found = launch_costs(gpu)
    return found.get(what), found.get("unknown", "")


# What a GPU run measures first: name -> unit, and how. All raise DeviceLost as measure does.
LIMITS: dict[str, tuple[str, Callable[[Cuda], Limit]]] = {
    "copy": ("B/s", copy_limit),
    "read": ("B/s", read_limit),
    "bf16 matmul": ("FLOP/s", matmul_limit),
    "an empty kernel in a graph": ("s", functools.partial(launch_limit, what="per_kernel_s")),
    "replaying a graph": ("s", functools.partial(launch_limit, what="per_replay_s")),
}


def ceilings(gpu: Cuda) -> Ceilings:
    """Of copying and of matmuls. Raises UserError where one cannot be measured, since no share of it could be given;
    DeviceLost as measure does."""
    found = {name: LIMITS[name][1](gpu) for name in ("copy", "bf16 matmul")}
    if missing := [f"{name}: {reason}" for name, (value, reason) in found.items() if value is None]:
        raise UserError(f"the GPU's own limits could not be measured: {'; '.join(missing)}")
    return Ceilings(*(value for value, _ in found.values() if value is not None))


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
