"""Times of one call and the machine's own limits, measured in the same process.

CPU: torch.utils.benchmark. GPU: CUDA events around the replay of a CUDA graph. Arms are interleaved, one
measurement of each in turn, so that a machine that slows down slows all of them. Weights rotate: every call, of
whatever arm, reads the next ones, so that none finds its weights in the cache where the last call left them.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils import benchmark

from variants.problem import Problem

MIN_ROUNDS, MAX_ROUNDS = 10, 50
REPLAYS = 10  # of a CUDA graph between two events, so that the host's latency at the first is spread thin


@dataclass(frozen=True)
class Ceilings:
    """Limits of this machine: copy bandwidth in bytes/s (read plus written) and FLOP/s of a large matmul."""

    bytes_per_s: float
    bf16_flops_per_s: float
    fp32_flops_per_s: float

    def floor_s(self, problem: Problem) -> float:
        """Seconds below which no implementation of the chain can run here, by bytes or by FLOPs."""
        rate = max(self.bf16_flops_per_s, self.fp32_flops_per_s)
        return max(count_bytes(problem) / self.bytes_per_s, count_flops(problem) / rate)


def count_bytes(problem: Problem) -> int:
    """Fewest bytes the chain moves: every input read once, q, k and v written once, all in bf16."""
    p = problem
    elements = p.x.numel() + p.qkv_weight.numel() + p.norm_weight.numel() + p.tokens * p.qkv_weight.shape[0]
    optional = (p.residual, p.bias, p.q_norm_weight, p.k_norm_weight)
    return 2 * (elements + sum(t.numel() for t in optional if t is not None))


def count_flops(problem: Problem) -> int:
    """Operations of the matmul, two a multiply-add; the norms' are below 1 % of them at every shape here."""
    return 2 * problem.tokens * problem.qkv_weight.numel()


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


def measure_ceilings(device: str) -> Ceilings:
    """Medians of a large copy and of large square matmuls on random data (zeros run faster on GPUs)."""
    size, n = (1 << 31, 8192) if device == "cuda" else (1 << 28, 2048)
    source = torch.randint(-128, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy_s = _median_s(partial(target.copy_, source))
    del source, target
    rates = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        rates[dtype] = 2 * n**3 / _median_s(partial(torch.mm, a, b))
    return Ceilings(2 * size / copy_s, rates[torch.bfloat16], rates[torch.float32])


def interleaved_times(arms: dict[str, Callable[[], object]], device: str, budget_s: float) -> dict[str, list[float]]:
    """Seconds of each arm, taken in turns until the budget is spent (10 to 50 rounds).

    On a CPU a value is one call. On a GPU an arm must be graph_timer's function, whose value is a mean of calls.
    """
    measure = {name: _one_call(arm, device) for name, arm in arms.items()}
    times: dict[str, list[float]] = {name: [] for name in arms}
    start = time.monotonic()
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.monotonic() - start > budget_s:
            break
        names = list(arms) if done % 2 == 0 else list(reversed(arms))  # A B ... B A
        for name in names:
            times[name].append(measure[name]())
    return times


def rotating(call: Callable[[int], object], turn: Iterator[int]) -> Callable[[], object]:
    """A function that calls call with the next index. Arms share the turn: each reads what none has read lately."""
    return lambda: call(next(turn))


def graph_timer(call: Callable[[int], object], count: int) -> Callable[[], float]:
    """Captures call(0) ... call(count - 1) in one CUDA graph. The function replays it 10 times: mean seconds a call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # whatever compiles or loads at a first call does so here, not while capturing
        for i in range(count):
            call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            call(i)

    def replay() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / (count * REPLAYS)

    replay()
    return replay


def _one_call(arm: Callable[[], object], device: str) -> Callable[[], float]:
    if device == "cuda":
        return arm  # graph_timer's functions time themselves
    timer = benchmark.Timer("arm()", globals={"arm": arm}, num_threads=torch.get_num_threads())
    return lambda: timer.timeit(1).median


def _median_s(call: Callable[[], object]) -> float:
    """torch.utils.benchmark synchronizes with the device by itself."""
    timer = benchmark.Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.adaptive_autorange(min_run_time=0.2, max_run_time=2.0).median
