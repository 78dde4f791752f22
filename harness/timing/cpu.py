"""Times of one call on a CPU and the machine's own limits, measured in the same process. timing.rig is for GPUs.

Arms are interleaved, one measurement of each in turn, so that a machine that slows down slows all of them. Weights
rotate: every call, of whatever arm, reads the next ones, so that none finds its weights in the cache where the last
call left them.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils import benchmark

from castpoint.harness.problems.geometry import Work, chain_work
from castpoint.variants.problem import Problem

MIN_ROUNDS, MAX_ROUNDS = 10, 50
LONG_S = 0.02  # of a matmul of 512 x 512; one of 2048 x 2048 takes 64 times as long, or more


@dataclass(frozen=True)
class Ceilings:
    """Limits of this machine: copy bandwidth in bytes/s (read plus written) and FLOP/s of a large matmul."""

    bytes_per_s: float
    bf16_flops_per_s: float
    fp32_flops_per_s: float = 0.0  # where it was measured

    def floor_s(self, work: Work) -> float:
        """Seconds below which no implementation can run here, by bytes or by FLOPs."""
        return work.floor_s(self.bytes_per_s, max(self.bf16_flops_per_s, self.fp32_flops_per_s))


def work_of(problem: Problem) -> Work:
    """What the chain needs at least on that problem."""
    p = problem
    small = [t for t in (p.norm_weight, p.residual, p.bias, p.q_norm_weight, p.k_norm_weight) if t is not None]
    return chain_work(p.tokens, p.hidden_size, p.qkv_weight.shape[0], sum(t.numel() for t in small))


def keep_freed_memory() -> None:
    """Lets glibc keep freed buffers of up to 32 MiB, as the allocators of serving engines do.

    By default it may return them to the system at every call and fault them in again at the next: 3 ms for 16 MiB,
    at some calls and not at others. Elsewhere than on glibc nothing is changed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, its largest value
    mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def measure_ceilings() -> Ceilings:
    """Medians of a large copy and of large square matmuls on random data, on the CPU."""
    size = 1 << 28
    source = torch.randint(-128, 127, (size,), dtype=torch.int8)
    target = torch.empty_like(source)
    copy_s = _median_s(partial(target.copy_, source))
    del source, target
    return Ceilings(2 * size / copy_s, _matmul_flops_per_s(torch.bfloat16), _matmul_flops_per_s(torch.float32))


def _matmul_flops_per_s(dtype: torch.dtype) -> float:
    """Of matrices of 2048 x 2048, or of smaller ones where those would take long: 60 s a matmul where PyTorch has no
    fast bf16 for the CPU, at a quarter of the rate of those of 512."""
    for n in (512, 2048):
        a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
        seconds = _median_s(partial(torch.mm, a, b))
        if seconds > LONG_S:
            break
    return 2 * n**3 / seconds


def interleaved_times(arms: dict[str, Callable[[], object]], budget_s: float) -> dict[str, list[float]]:
    """Seconds of single calls of each arm, taken in turns until the budget is spent (10 to 50 rounds)."""
    timers = {name: _timer(arm) for name, arm in arms.items()}
    times: dict[str, list[float]] = {name: [] for name in arms}
    start = time.monotonic()
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.monotonic() - start > budget_s:
            break
        names = list(arms) if done % 2 == 0 else list(reversed(arms))  # A B ... B A
        for name in names:
            times[name].append(timers[name].timeit(1).median)
    return times


def rotating(call: Callable[[int], object], turn: Iterator[int]) -> Callable[[], object]:
    """A function that calls call with the next index. Arms share the turn: each reads what none has read lately."""
    return lambda: call(next(turn))


def _median_s(call: Callable[[], object]) -> float:
    return _timer(call).adaptive_autorange(min_run_time=0.2, max_run_time=2.0).median


def _timer(call: Callable[[], object]) -> benchmark.Timer:
    return benchmark.Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
