"""Fills Triton's cache for what a run is about to launch, in processes that never touch the GPU, while it measures.

A launch compiles for a second or more, one after the other, and the GPU waits. Here each binary is launched under a
driver that only compiles (ptx.driver.compiled_only), on a small problem that specialises it as the real one does.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from castpoint.harness.conformance.cuda import HEAD_DIM, TOKENS, Binary
from castpoint.harness.problems.drawn import with_positions
from castpoint.harness.ptx.driver import compiled_only, is_target
from castpoint.harness.runs.process import die_with_parent
from castpoint.kernels.main_loop import matmul
from castpoint.variants.backends import run_triton
from castpoint.variants.catalogue import plan_named
from castpoint.variants.problem import Problem

Q_HEADS, KV_HEADS = 2, 1
LONG_S = 60.0


class Compilers:
    """Processes that compile. They are forked here: before CUDA is touched, which no fork may inherit in use.

    target: to be set once the GPU is known; one that is not known here: nothing is compiled ahead.
    """

    def __init__(self, processes: int | None = None) -> None:
        fork = multiprocessing.get_context("fork")
        self.processes = processes or max(1, len(os.sched_getaffinity(0)) - 1)  # one is for the process that measures
        self.pool = ProcessPoolExecutor(self.processes, mp_context=fork, initializer=_begin, initargs=(os.getpid(),))
        self.pool.submit(os.getpid).result()  # the first job forks them all
        self.target = ""
        self.jobs: dict[Binary, Future[None]] = {}

    def start(self, binaries: Iterable[Binary]) -> None:
        """In this order, behind what was asked for before. A compiler that crashed took the others along, and no fork
        can follow: from there on launches compile."""
        with contextlib.suppress(BrokenProcessPool):
            for binary in binaries if is_target(self.target) else ():
                if binary not in self.jobs:
                    self.jobs[binary] = self.pool.submit(compile_binary, binary, self.target)

    def wait(self, binaries: Iterable[Binary]) -> None:
        """Until they are compiled, or long should be. One that cannot be is no error here: its launch will say so."""
        for binary in binaries:
            if job := self.jobs.get(binary):
                with contextlib.suppress(TimeoutError):
                    job.exception(LONG_S)

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


def compile_binary(binary: Binary, target: str) -> None:
    """Into Triton's cache. Raises what Triton raises."""
    with compiled_only(target):
        if not binary.plan:
            matmul(_ones(TOKENS, 1024), _ones(HEAD_DIM, 1024), HEAD_DIM, binary.config)
            return
        plan = plan_named(binary.plan)
        problem = small_problem(binary, plan.weight_offset != "none")
        run_triton(plan, problem, config=binary.config)


def small_problem(binary: Binary, weight_offset: bool) -> Problem:
    """Numbers that do not matter, shapes that do: those which a launch is specialised on."""
    problem = Problem(
        _ones(binary.tokens, binary.hidden_size), _ones(binary.hidden_size),
        _ones((Q_HEADS + 2 * KV_HEADS) * HEAD_DIM, binary.hidden_size), num_q_heads=Q_HEADS, num_kv_heads=KV_HEADS,
        q_norm_weight=_ones(HEAD_DIM), k_norm_weight=_ones(HEAD_DIM), weight_offset=weight_offset,
    )  # fmt: skip
    return with_positions(problem) if binary.rope else problem


def _ones(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.bfloat16)


def _begin(parent: int) -> None:
    """One thread each, behind the process that measures, and none outlives it."""
    torch.set_num_threads(1)
    os.nice(19)
    die_with_parent(parent)
