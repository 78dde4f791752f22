"""Parts that do not run here say why; the best of those that do make the chains; and settings hold for a call alone."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support import random_problem

from castpoint.harness.peers import chains as peers
from castpoint.harness.peers import parts as peers_parts
from castpoint.harness.peers.chains import (
    REDUCTIONS,
    chain_peer,
    compiled_peers,
    eager_peer,
    head_norm_peer,
    matmul_peers,
    matmul_with_launches,
    norm_peers,
    pick_chains,
)
from castpoint.harness.peers.parts import MATMULS, NORMS, OWN_KERNEL, linear_cublaslt
from castpoint.harness.runs.environment import version
from castpoint.harness.runs.words import Kind
from castpoint.harness.timing.rig import rotated
from castpoint.kernels.separate import bf16_reduction
from castpoint.variants.catalogue import plan_named
from castpoint.variants.problem import Problem

HERE = ("eager", "F.rms_norm")  # norms that run on a CPU
HF = plan_named("hf")
PACKAGES = {
    "LigerRMSNorm, casting mode llama": "liger_kernel",
    "flash-linear-attention RMSNorm": "fla",
    "FlagGems rms_norm": "flag_gems",
    "quack rmsnorm": "quack",
}


@functools.cache
def problems(weight_offset: bool = False, head_norm: bool = True) -> list[Problem]:
    return rotated(random_problem(weight_offset=weight_offset, head_norm=head_norm), 2)


# ---------------------------------------------------------------- what does not run


@pytest.mark.parametrize("name", PACKAGES)
def test_missing_packages_are_named(name: str, monkeypatch: pytest.MonkeyPatch):
    package = PACKAGES[name]
    for module in [m for m in sys.modules if m == package or m.startswith(package + ".")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not there
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    peer = peers._peer(Kind.NORM, name, lambda name: NORMS[name].make("cuda", False))
    assert peer.status == "not installed" and package in peer.reason and peer.call is None
    with pytest.raises(ValueError, match=f"{name} cannot be timed: not installed"):
        peer.arm()


def test_what_is_not_installed_is_a_row():
    rows = {peer.name: peer for peer in norm_peers(problems())}
    assert set(rows) == {f"norm {name}" for name in NORMS}
    for name in NORMS:
        peer = rows[f"norm {name}"]
        assert (peer.status == "ok") == (name in HERE) and bool(peer.reason) == (name not in HERE)
    if version("quack-kernels") is None:
        assert rows["norm quack rmsnorm"].status == "not installed"
        whole = chain_peer(problems(), "quack rmsnorm", "cuBLAS", HF)
        assert whole.status == "not installed" and whole.call is None


def test_norms_of_the_other_storage_are_not_applicable():
    rows = {peer.name: peer for peer in norm_peers(problems(weight_offset=True))}
    assert rows["norm F.rms_norm"].reason == "F.rms_norm does not take norm weights stored as w - 1"
    rows = {peer.name: peer for peer in norm_peers(problems())}
    gemma = rows["norm LigerRMSNorm, casting mode gemma"]
    assert gemma.reason == "LigerRMSNorm, casting mode gemma does not take norm weights stored as w"


def test_a_broken_package_is_a_row():
    def broken(name: str) -> None:
        raise RuntimeError("built for another\ntorch")

    peer = peers._peer(Kind.NORM, "x", broken)
    assert (peer.status, peer.reason) == ("failed", "RuntimeError: built for another torch")


def test_unknown_parts_are_errors():
    with pytest.raises(KeyError):
        chain_peer(problems(), "eager", "cuBLOS", HF)


def test_arms_that_hold_a_matmul_are_judged_by_values():
    for peer in (eager_peer(problems()), *compiled_peers(problems()), *matmul_peers(problems())):
        assert peer.arm().differs is peers.values_differ
    for peer in (*norm_peers(problems()), head_norm_peer(problems(), HF)):
        assert peer.differs is peers.bits_differ


def test_the_matmul_with_launches_launches_two_empty_kernels(monkeypatch: pytest.MonkeyPatch):
    launched = []

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[[], None]:
            return lambda: launched.append(grid)

    monkeypatch.setattr(peers, "empty_kernel", Counted())
    peer, p = matmul_with_launches(problems(), "cuBLAS"), problems()[1]
    assert (peer.name, peer.kind) == ("P4 cuBLAS + 2 empty kernels", Kind.LAUNCHES)
    (proj,) = peer.call(1)
    assert torch.equal(proj, F.linear(p.x, p.qkv_weight, p.bias)) and launched == [(1,), (1,)]
    assert matmul_peers(problems())[0].call(1) and len(launched) == 2, "the bare matmul is bare"
    monkeypatch.undo()
    assert torch.equal(peer.call(1)[0], proj), "the kernels run"
    with pytest.raises(KeyError):
        matmul_with_launches(problems(), "cuBLOS")


# ---------------------------------------------------------------- picking


def test_the_best_parts_make_the_best_chain():
    seconds = {
        Kind.NORM: {"eager": 9e-6, "F.rms_norm": 3e-6},
        Kind.MATMUL: {"cuBLAS": 6e-6, "cuBLASLt": 5e-6},
        Kind.HEADS: {OWN_KERNEL: 2e-6},
    }
    assert pick_chains(seconds) == [("F.rms_norm", "cuBLASLt")]
    near = seconds | {Kind.MATMUL: {"cuBLAS": 5.2e-6, "cuBLASLt": 5e-6}}
    near[Kind.NORM] = seconds[Kind.NORM] | {"quack rmsnorm": 3.05e-6}
    assert pick_chains(near) == [
        ("F.rms_norm", "cuBLASLt"),
        ("quack rmsnorm", "cuBLASLt"),
        ("F.rms_norm", "cuBLAS"),
        ("quack rmsnorm", "cuBLAS"),
    ]
    assert pick_chains(near, at_most=2) == pick_chains(near)[:2]
    assert pick_chains(near, within=0.0) == pick_chains(seconds)
    assert len(pick_chains(seconds | {Kind.NORM: dict.fromkeys("abcdef", 1e-6)}, within=10.0)) == 4
    without = near | {Kind.HEADS: {}}  # 8.25 lies within 3 % of 8, as 10.25 of 10, but not 8.27
    near[Kind.MATMUL] = without[Kind.MATMUL] = {"cuBLAS": 5.27e-6, "cuBLASLt": 5e-6}
    assert ("F.rms_norm", "cuBLAS") in pick_chains(near) and ("F.rms_norm", "cuBLAS") not in pick_chains(without)


def test_without_a_norm_or_a_matmul_there_is_no_chain():
    norm, matmul, heads = {Kind.NORM: {"eager": 1e-6}}, {Kind.MATMUL: {"cuBLAS": 1e-6}}, {Kind.HEADS: {"x": 1e-6}}
    assert pick_chains(norm | matmul) == [("eager", "cuBLAS")]
    launches = {Kind.LAUNCHES: {"cuBLAS + 2 empty kernels": 1e-7}}
    assert pick_chains(norm | matmul | launches) == [("eager", "cuBLAS")], "what is no part makes no chain"
    for seconds in ({}, norm, norm | heads, matmul | heads, norm | {Kind.MATMUL: {}}):
        assert pick_chains(seconds) == []


# ---------------------------------------------------------------- settings


def test_cublaslt_is_preferred_for_its_own_call_alone(monkeypatch: pytest.MonkeyPatch):
    held, seen = ["default"], []

    def preferred(backend: str | None = None) -> str:
        held[0] = backend or held[0]
        return held[0]

    def linear(*inputs: torch.Tensor) -> torch.Tensor:
        seen.append(held[0])
        if inputs[0] is None:
            raise RuntimeError("no memory")
        return inputs[0]

    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", preferred)
    monkeypatch.setattr(peers_parts.F, "linear", linear)
    assert linear_cublaslt(torch.ones(1), None, None) == 1
    assert seen == ["cublaslt"] and held == ["default"]
    with pytest.raises(RuntimeError, match="no memory"):
        linear_cublaslt(None, None, None)
    assert held == ["default"]
    assert list(MATMULS) == ["cuBLAS", "cuBLASLt"]


@pytest.mark.parametrize("setting", REDUCTIONS)
def test_reduced_precision_is_set_and_restored(setting: str):
    matmul = torch.backends.cuda.matmul

    def current() -> tuple[bool, bool]:
        name = "allow_bf16_reduced_precision_reduction"
        return getattr(matmul, name), getattr(matmul, f"{name}_split_k")

    inside = {"default": (True, True), "fp32 partials": (False, True), "one fp32 chain": (False, False)}
    before = current()
    for outer in REDUCTIONS:  # whatever held before holds after, also after an error
        with bf16_reduction(REDUCTIONS[outer]):
            with pytest.raises(RuntimeError, match="on purpose"), bf16_reduction(REDUCTIONS[setting]):
                assert current() == inside[setting]
                raise RuntimeError("on purpose")
            assert current() == inside[outer]
    assert current() == before


def test_a_torch_without_split_k_settings(monkeypatch: pytest.MonkeyPatch):
    matmul = SimpleNamespace(allow_bf16_reduced_precision_reduction=True)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    with bf16_reduction(False):
        assert matmul.allow_bf16_reduced_precision_reduction is False
    assert matmul.allow_bf16_reduced_precision_reduction is True
