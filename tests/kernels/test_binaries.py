"""Every way to cut a launch, compiled ahead of time: resources, instructions, and that a launch takes that binary."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

COMPILE = """
import json
from castpoint.harness.compiled.compile import compile_head_norm, compile_norm_qkv, compile_rms_norm
from castpoint.kernels.config import Config, candidates
from castpoint.variants.catalogue import PLANS

def show(compiled, config=None):
    print(json.dumps({"kernel": compiled.kernel, "target": compiled.target, "config": str(config),
                      "block_m": config and config.block_m, "spills": compiled.spills, "shared": compiled.shared,
                      "matrix": compiled.matrix_instructions(), "machine": compiled.asm.get("ptx", ""),
                      "ttgir": compiled.asm["ttgir"]}))

hf, deferred = PLANS["hf"].plan, PLANS["deferred"].plan
for plan, tokens, chosen in ((hf, 1, (0, 2)), (deferred, 16, (1,)), (hf, 64, (1,)), (hf, 4096, (0, 2, 4))):
    found = candidates(tokens, 1024, 32, 128)
    for config in (found[i] for i in chosen):
        show(compile_norm_qkv(plan, "sm_90", config=config, tokens=tokens, residual=True), config)
show(compile_rms_norm(hf, "sm_90", residual=True))
show(compile_head_norm(hf, "sm_90", packed=True))
for target in ("sm_80", "sm_100"):
    config = Config("split-k", "none", 16, 64, 4, 4, 8)
    show(compile_norm_qkv(deferred, target, config=config, tokens=16), config)
for config in (Config("fused", "hidden", 128, 64, 8, 3), Config("fused", "rstd", 64, 64, 4, 3)):
    show(compile_norm_qkv(hf, "gfx942", config=config), config)
"""
# What each launch and the same kernel compiled ahead of time are specialised on: type and divisibility by 16, or a
# constant. Launches are recorded, not run, so that tensors may lie on a CPU.
LAUNCH = """
import json, torch, triton
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
import castpoint.harness.compiled.compile as aot, castpoint.kernels.norm_qkv
from castpoint.kernels.config import Config
from castpoint.variants.catalogue import PLANS

launches, sources = [], []

def record(kernel, *args, grid, warmup, **options):
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(aot.TARGETS["sm_90"]))
    found = bind(*args, **options)[1]
    launches.append({p.name: [e[0], str(e[1]) if e[0] == "constexpr" else e[1] or ""]
                     for p, e in zip(kernel.params, found, strict=True)})

class Stop(Exception):
    pass

def keep(source, target, options):
    sources.append(source)
    raise Stop

def ahead(compile, *args, **keywords):
    try:
        compile(*args, **keywords)
    except Stop:
        source = sources.pop()
    found = {}
    for index, name in enumerate(source.fn.arg_names):
        constant = (index,) in source.constants
        rest = str(source.constants[(index,)]) if constant else "D" if (index,) in source.attrs else ""
        found[name] = ["constexpr" if constant else source.signature[name], rest]
    return found

def zeros(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)

triton.JITFunction.run, aot.triton.compile = record, keep
castpoint.kernels.norm_qkv.check_device = lambda *args: False
hf, deferred = PLANS["hf"].plan, PLANS["deferred"].plan
cases = (
    (hf, None, False),
    (hf, Config("fused", "hidden", 128, 64, 8, 3), True),
    (deferred, Config("fused", "rstd", 64, 64, 4, 3), False),
    (deferred, Config("split-k", "none", 16, 128, 8, 3, 4), True),
    (hf, Config("separate"), False),
)
for plan, config, bias in cases:
    separate = config is not None and config.kernel == "separate"
    stores = "hidden" if separate else config and config.prepass
    for tokens, hidden_size, q, kv in ((2, 2560, 16, 8), (16, 4096, 32, 8), (33, 3584, 40, 4)):
        launches.clear()
        weight, rows = zeros((q + 2 * kv) * 128, hidden_size), zeros((q + 2 * kv) * 128)
        inputs = zeros(tokens, hidden_size), zeros(hidden_size), weight, q, kv, zeros(128), zeros(128)
        rest = {"residual": zeros(tokens, hidden_size), "bias": rows if bias else None, "config": config}
        castpoint.kernels.norm_qkv.norm_qkv(*inputs, **rest, plan=plan)
        wanted = []
        if stores in ("rstd", "hidden"):
            sizes = {"stores": stores, "hidden_size": hidden_size}
            wanted.append(ahead(aot.compile_rms_norm, plan, "sm_90", residual=True, **sizes))
        if separate:
            wanted.append(ahead(aot.compile_head_norm, plan, "sm_90", packed=True))
        else:
            chosen = {"config": config, "bias": bias, "tokens": tokens}
            wanted.append(ahead(aot.compile_norm_qkv, plan, "sm_90", residual=True, **chosen))
        print(json.dumps({"config": str(config), "launched": launches, "ahead": wanted}))
"""
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Kernels as GPUs would run them, compiled in a process of its own: here they are interpreted."""
    return rows_of(COMPILE, tmp_path_factory.mktemp("triton"))


def rows_of(script: str, cache: Path) -> list[dict]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = {**kept, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache)}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_no_spills_and_no_more_shared_memory_than_there_is(compiled: list[dict]):
    rows = compiled
    assert {row["target"] for row in rows} == set(SHARED) and len(rows) == 13
    for row in rows:
        name = f"{row['kernel']} {row['config']} on {row['target']}"
        assert (row["spills"] or 0) <= 8, name  # one slot of a stack, where `ptxas -v` reports no spilled byte
        assert row["shared"] <= SHARED[row["target"]], name


def test_hopper_multiplies_blocks_of_64_tokens_with_wgmma(compiled: list[dict]):
    rows = [row for row in compiled if row["target"] == "sm_90" and row["block_m"]]
    assert {row["block_m"] for row in rows} == {16, 64, 128}
    for row in rows:
        due = "wgmma" if row["block_m"] >= 64 else "mma.sync"
        assert row["matrix"] and all(name.startswith(due) for name in row["matrix"]), row["config"]


def test_hidden_goes_to_wgmma_from_shared_memory(compiled: list[dict]):
    """After the pre-pass `hidden` no element of A passes through registers; otherwise hidden is computed there."""
    rows = [row for row in compiled if row["target"] == "sm_90" and row["block_m"] and row["block_m"] >= 64]
    for row in rows:
        products = [line for line in row["ttgir"].splitlines() if "ttng.warp_group_dot " in line]
        left = [line.split(" : ")[-1].split(" * ")[0] for line in products]
        assert left and all(("memdesc" in each) == ("hidden" in row["config"]) for each in left), row["config"]
    assert {"hidden" in row["config"] for row in rows} == {True, False}


def test_all_stores_come_before_the_one_atomic(compiled: list[dict]):
    """Of each split-K program: its sums, a barrier, an atomic that releases and acquires; then loads past L1."""
    rows = [row for row in compiled if row["kernel"] == "split_k_kernel" and row["machine"]]
    assert len(rows) >= 4
    for row in rows:
        before, atomic, after = row["machine"].partition("atom.global.gpu.acq_rel.add")
        assert atomic and "atom." not in after
        stores = before.rindex("st.global")
        assert "bar.sync" in before[stores:], "no barrier between the stores and the atomic"
        assert "bar.sync" in after.partition("ld.global")[0], "the others read before they know"
        assert "ld.global.cg" in after


def test_one_binary_serves_all_models_of_a_head_size_and_is_the_one_compiled_ahead(tmp_path: Path):
    """What is launched for other tokens, channels and heads is the same binary, and the one whose registers are
    counted ahead of time."""
    rows = rows_of(LAUNCH, tmp_path)
    assert len(rows) == 15
    for row in rows:
        assert row["launched"] == row["ahead"], row["config"]
    for config in {row["config"] for row in rows}:
        launched = [row["launched"] for row in rows if row["config"] == config]
        assert len(launched) == 3 and launched[0] == launched[1] == launched[2], config
    assert len({len(row["launched"]) for row in rows}) == 2, "with and without a pre-pass"
