"""What the machine allows: launches, ceilings and implausible numbers on a scripted GPU; the kernels that find them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda
from support import ROOT

from castpoint.harness.runs.errors import UserError
from castpoint.harness.timing import limits as rig_limits
from castpoint.harness.timing.cuda import DeviceLost, Graph
from castpoint.harness.timing.limits import (
    READ_BLOCKS,
    ceilings,
    copy_limit,
    empty_kernel,
    implausible,
    launch_costs,
    launch_limit,
    matmul_limit,
    read_limit,
    read_sums,
)

COPIES = 3


def test_launch_costs_of_a_scripted_gpu():
    class Launches(FakeCuda):
        def seconds(self, graph: Graph, replays: int) -> float:
            return max(9e-6, 4e-6 + 1.3e-6 * graph.calls) / graph.calls  # short ones wait for the host

    found = launch_costs(Launches())
    assert found["per_kernel_s"] == pytest.approx(1.3e-6) and found["per_replay_s"] == pytest.approx(4e-6)
    assert found["graph_s"] == pytest.approx({1: 9e-6, 3: 9e-6, 30: 43e-6, 300: 394e-6})


def test_implausible_numbers():
    name, weights = "NVIDIA H200", 8_388_608
    assert implausible(name, weights / 4.7e12, weights) is None
    assert implausible(name, weights / 4.9e12, weights) == "4.90 TB/s of cold memory: NVIDIA H200 has 4.8"
    assert implausible(name, weights / 9.9e12, 0) is None, "hot weights may be faster than memory"
    assert implausible(name, 1e-3, flops=0.98e12) is None
    assert implausible(name, 1e-3, flops=1e12) == "1000 TFLOP/s: NVIDIA H200 has 989"
    assert implausible(name, 0.0) == "0.0 s is no time"
    assert implausible("NVIDIA GeForce", 1e-12, 1e9) is None, "its peaks are not known"


@pytest.mark.parametrize(
    ("name", "tb_per_s", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 3.35, 989),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 3.35, 989),
        ("NVIDIA H100 NVL", 3.9, 835),
        ("NVIDIA H100 PCIe", 2, 756),
        ("NVIDIA H200", 4.8, 989),
    ],
)
def test_peaks_of_each_card(name: str, tb_per_s: float, tflops: float):
    size, flops = 1e9, 1e12
    assert implausible(name, 1.01 * size / (tb_per_s * 1e12), size) is None
    assert implausible(name, 0.99 * size / (tb_per_s * 1e12), size).endswith(f"{name} has {tb_per_s:g}")
    assert implausible(name, 1.01 * flops / (tflops * 1e12), flops=flops) is None
    assert implausible(name, 0.99 * flops / (tflops * 1e12), flops=flops).endswith(f"{name} has {tflops}")


@pytest.mark.parametrize("name", ["NVIDIA GH200 480GB", "NVIDIA H100 64GB HBM2", "NVIDIA A100-SXM4-80GB"])
def test_other_cards_have_no_peaks_here(name: str):
    assert implausible(name, 1e-12, 1e9, 1e15) is None


@pytest.mark.parametrize("block", READ_BLOCKS[:1])
@pytest.mark.parametrize("size", [2, 4096, 2 * 2048 * 3 + 2])
def test_the_read_kernel_reads_every_word(size: int, block: int):
    weight = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    words = weight.view(torch.int32).long()
    sums = read_sums(weight, block)
    assert sums.shape == (math.ceil(size / 2 / block),)
    for i, part in enumerate(words.split(block)):
        assert sums[i] == (part.sum() + 2**31) % 2**32 - 2**31
    with pytest.raises(ValueError, match="even"):
        read_sums(weight[:-1], block)


def test_launches_that_fail_are_a_reason():
    class Broken(FakeCuda):
        def capture(self, call: Any, copies: int, laps: int = 1) -> Graph:
            raise RuntimeError("no kernel image")

    assert launch_costs(Broken()) == {"unknown": "RuntimeError: no kernel image"}
    lost = Broken()
    lost.dead = True
    with pytest.raises(DeviceLost, match="empty kernels"):
        launch_costs(lost)


def test_ceilings_of_a_scripted_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rig_limits, "READ_BYTES", 8192)
    assert read_limit(FakeCuda()) == (pytest.approx(8192 / 1e-5), "")
    assert copy_limit(FakeCuda(), 1024) == (pytest.approx(2048 / 1e-5), "")
    assert matmul_limit(FakeCuda(), 8) == (pytest.approx(1024 / 1e-5), "")
    value, reason = launch_limit(FakeCuda(), "per_kernel_s")
    assert value == pytest.approx(1e-5) and not reason


def test_limits_are_read_cold(monkeypatch: pytest.MonkeyPatch):
    """Over as many copies as exceed three times the L2 cache."""
    monkeypatch.setattr(rig_limits, "READ_BYTES", 8192)
    read: set[int] = set()
    real = rig_limits.read_sums
    monkeypatch.setattr(rig_limits, "read_sums", lambda w, block: read.add(w.data_ptr()) or real(w, block))
    gpu = FakeCuda()
    read_limit(gpu)
    assert len(read) * 8192 > 3 * gpu.l2_bytes()


@pytest.mark.parametrize("limit", [copy_limit, matmul_limit])
def test_operands_are_given_back(limit: Any, monkeypatch: pytest.MonkeyPatch):
    """Before what comes next is timed: 4 GiB of the copy, and the allocator gives back what nobody holds."""
    made: list[weakref.ref[torch.Tensor]] = []

    def operands(size: int, device: str) -> Any:
        source = torch.ones(size)
        made.append(weakref.ref(source))
        return lambda i: (source * 1,)

    for name in ("_copy", "_matmul"):
        monkeypatch.setattr(rig_limits, name, operands)
    gpu, held = FakeCuda(), []
    monkeypatch.setattr(gpu, "release", lambda: held.append(made[0]() is not None))
    assert limit(gpu, 8)[0]
    assert held[-1] is False


def test_limits_that_fail_are_a_reason(monkeypatch: pytest.MonkeyPatch):
    def broken(weight: torch.Tensor, block: int) -> torch.Tensor:
        raise RuntimeError(f"no block of {block}")

    monkeypatch.setattr(rig_limits, "READ_BYTES", 8192)
    monkeypatch.setattr(rig_limits, "read_sums", broken)
    each = [f"read {block}: RuntimeError: no block of {block}" for block in READ_BLOCKS]
    assert read_limit(FakeCuda()) == (None, "; ".join(each))


def test_a_limit_without_memory_is_a_reason(monkeypatch: pytest.MonkeyPatch):
    def no_memory(size: int, device: str) -> None:
        raise torch.OutOfMemoryError("2 GiB")

    monkeypatch.setattr(rig_limits, "_copy", no_memory)
    assert copy_limit(FakeCuda(), 8) == (None, "out of memory: 2 GiB")
    monkeypatch.setitem(rig_limits.LIMITS, "bf16 matmul", ("FLOP/s", lambda gpu: (1e12, "")))
    with pytest.raises(UserError, match="could not be measured: copy: out of memory: 2 GiB"):
        ceilings(FakeCuda())


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from castpoint.harness.timing.limits import empty_kernel, read_kernel

target = GPUTarget("cuda", 90, 32)
empty = triton.compile(ASTSource(empty_kernel, {}), target=target)
print("empty", "ret;" in empty.asm["ptx"], "ld.global" in empty.asm["ptx"], len(empty.asm["cubin"]) > 0)
signature = {"words_ptr": "*i32", "sums_ptr": "*i32", "n": "i32", "BLOCK": "constexpr"}
aligned = {(i,): [["tt.divisibility", 16]] for i in range(3)}
for block in (2048, 4096, 8192, 16384):
    source = ASTSource(read_kernel, signature, {"BLOCK": block}, aligned)
    read = triton.compile(source, target=target, options={"num_warps": 8})
    print(block, read.asm["ptx"].count("ld.global.v4"), len(read.asm["cubin"]) > 0)
"""


def test_kernels_compile_for_hopper():
    """A block of 4096 words over 256 threads is 4 vectors of 4 words a thread: wide loads, and none left out."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    read = [f"{block} {block // 1024} True" for block in READ_BLOCKS]
    assert result.stdout.splitlines() == ["empty True False True", *read]


def test_the_empty_kernel_runs():
    empty_kernel[(1,)]()
