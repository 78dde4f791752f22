"""What the machine allows: launches, ceilings and implausible numbers on a scripted GPU; the kernels that find them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda
from support import ROOT

from castpoint.harness.timing import limits as rig_limits
from castpoint.harness.timing.cuda import DeviceLost, Graph
from castpoint.harness.timing.limits import (
    READ_BLOCKS,
    ceilings,
    empty_kernel,
    implausible,
    launch_costs,
    read_ceiling,
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


def test_ceilings_of_a_scripted_gpu():
    weights = [torch.randn(64, 64).to(torch.bfloat16).roll(i, 1) for i in range(COPIES)]
    assert read_ceiling(FakeCuda(), weights)["bytes_per_s"] == pytest.approx(8192 / 1e-5)
    found = ceilings(FakeCuda(), copy_bytes=1024, size=8)
    assert found == pytest.approx({"copy_bytes_per_s": 2048 / 1e-5, "bf16_flops_per_s": 1024 / 1e-5, "reason": ""})


def test_read_ceilings_that_fail_are_a_reason(monkeypatch: pytest.MonkeyPatch):
    def broken(weight: torch.Tensor, block: int) -> torch.Tensor:
        raise RuntimeError(f"no block of {block}")

    monkeypatch.setattr(rig_limits, "read_sums", broken)
    found = read_ceiling(FakeCuda(), [torch.ones(8, 8, dtype=torch.bfloat16)])
    each = [f"read {block}: RuntimeError: no block of {block}" for block in READ_BLOCKS]
    assert found == {"unknown": "; ".join(each)}


def test_a_ceiling_without_memory_is_a_reason(monkeypatch: pytest.MonkeyPatch):
    def no_memory(size: int, device: str) -> None:
        raise torch.OutOfMemoryError("2 GiB")

    monkeypatch.setattr(rig_limits, "_copy", no_memory)
    found = ceilings(FakeCuda(), size=8)
    assert found["copy_bytes_per_s"] is None and found["bf16_flops_per_s"]
    assert found["reason"] == "out of memory: 2 GiB"


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
