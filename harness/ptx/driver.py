"""Triton kernels on CPU tensors: compiled for a GPU that is not there, their PTX run by ptx.machine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from castpoint.harness.compiled.compile import SHARED, TARGETS
from castpoint.harness.ptx.claims import Claimed
from castpoint.harness.ptx.machine import launch
from castpoint.harness.ptx.program import parse
from castpoint.harness.runs.errors import UserError

PROCESSORS = {"sm_80": 108, "sm_90": 132}  # of an A100 and an H200
launches = 0  # that were run by this process
compiles_only = False  # whether this process runs none


@contextmanager
def executed(target: str = "sm_90") -> Iterator[None]:
    """Inside, every launch compiles as it would on that target of compiled.compile.TARGETS, and runs on the CPU.

    Kernels must have been imported without TRITON_INTERPRET=1. Packages that look for a GPU while they are imported
    must be imported before. Launches raise what ptx.machine.launch raises. Times mean nothing. Raises
    UserError for another target than sm_80 and sm_90, whose matrix instructions are not known here.
    """
    check_target(target)
    with _active(_Driver(target)), _kernels_claimed():
        yield


@contextmanager
def compiled_only(target: str) -> Iterator[None]:
    """Inside, every launch compiles as it would on that target of compiled.compile.TARGETS, into Triton's cache, and
    does nothing else: a launch on such a GPU, by whatever process, finds it there."""
    with _active(_Compiler(target)):
        yield


@contextmanager
def _kernels_claimed() -> Iterator[None]:
    """Inside, kernels are claimed before they are compiled, unless the user has a cache of their own."""
    if mine := knobs.cache.manager_class is None:
        knobs.cache.manager_class = Claimed
    try:
        yield
    finally:
        if mine:
            del knobs.cache.manager_class


@contextmanager
def _active(mine: Any) -> Iterator[None]:
    before = driver._active
    driver.set_active(mine)
    try:
        yield
    finally:
        driver.set_active(before)


def is_target(target: str) -> bool:
    """Whether compiled_only knows it."""
    return target in TARGETS


def check_target(target: str) -> None:
    """Raises UserError unless executed knows that target."""
    if target not in PROCESSORS:
        known = " or ".join(PROCESSORS)
        raise UserError(f"target must be {known}, not {target!r}: other matrix products are not known")


class _Driver:
    """What Triton's runtime asks a driver for.

    ptxas runs at every compilation though nobody reads its binary: what it refuses runs nowhere. To leave it out by
    Triton's hook for stages would spoil the cache for real launches: Triton 3.6 has the hook, its cache's key has not.
    """

    def __init__(self, target: str) -> None:
        self.target = TARGETS[target]
        limits = {"max_shared_mem": SHARED[target], "multiprocessor_count": PROCESSORS.get(target, 132)}
        limits |= {"max_num_regs": 65536, "warpSize": 32}
        self.utils = SimpleNamespace(get_device_properties=lambda device: limits, load_binary=_load)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # Triton keeps one set of compiled kernels a device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., list[float]]:
        return lambda call, quantiles, **options: [1.0] * len(quantiles)  # so that autotuners take their first config

    @staticmethod
    def launcher_cls(source: Any, metadata: Any) -> Callable[..., None]:
        """Runs the kernel's PTX, which Triton's cache holds. Arguments behind the ninth are those of the kernel."""
        files = get_cache_manager(metadata.hash).get_group(f"{metadata.name}.json")
        program = parse(Path(files[f"{metadata.name}.ptx"]).read_text())
        passed = [n for n, name in enumerate(source.fn.arg_names) if source.signature[name] != "constexpr"]
        threads = metadata.num_warps * metadata.warp_size

        def run(*values: Any) -> None:
            global launches
            if compiles_only:
                return
            launches += 1
            arguments = values[9:]
            launch(program, values[:3], threads, metadata.shared, [arguments[n] for n in passed])

        return run


class _Compiler(_Driver):
    """Its launches do nothing."""

    @staticmethod
    def launcher_cls(source: Any, metadata: Any) -> Callable[..., None]:
        """Makes what Triton 3.6 compiles in C for each signature, where there is a driver to link with."""
        with contextlib.suppress(Exception):
            from triton.backends.nvidia.driver import CudaLauncher

            CudaLauncher(source, metadata)
        return lambda *values: None


def _load(name: str, binary: bytes, shared: int, device: int) -> tuple[None, None, int, int, int]:
    """No module, no function, registers, spills, most threads a program."""
    return None, None, 0, 0, 1024
