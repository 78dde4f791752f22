"""Every config of a plan is that plan's function: the nets of test_kernels.py, held to each way to cut a launch.

What these nets catch is shown in test_mutation.py. That a GPU runs the same, with its own order of stores and loads, no
interpreter can show: programs run one after another here, in the usual order and in random ones.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launches import CONFIGS, TINY, expressible
from nets import check_again, check_envelope, check_exact, check_exact_fp32, check_memory, check_order, random_case
from support import DEVICE, KERNELS, ROOT, assert_bit_equal, assert_inside, random_problem

import castpoint.kernels.rms_norm
import castpoint.kernels.split_k
from castpoint.kernels.config import Config, candidates, default_config, split_shares, unsupported
from castpoint.kernels.separate import fp32_sums
from castpoint.variants.backends import run_triton
from castpoint.variants.catalogue import PLANS

GEOMETRIES = {
    "one token": {**TINY, "tokens": 1, "num_q_heads": 4, "num_kv_heads": 2},
    "three tokens, heads of 20": {**TINY, "tokens": 3, "num_q_heads": 2, "head_dim": 20},
    "16 tokens, 40 channels": {**TINY, "tokens": 16, "hidden_size": 40, "head_dim": 32},
    "40 tokens without head norm": {**TINY, "tokens": 40, "head_norm": False},
}
RANDOM = {**TINY, "num_q_heads": 2, "hidden_size": 104}
SHAPES = {  # channels, heads, channels of a head
    "qwen3-0.6b": (1024, 32, 128),
    "qwen3-4b": (2560, 48, 128),
    "qwen3-32b": (5120, 80, 128),
    "qwen2.5-0.5b": (896, 18, 64),
    "gemma-3-270m": (640, 6, 256),
    "tiny": (48, 4, 16),
}


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(("plan", "config"), [pair for pair in expressible() if pair[1] != "fused, small tiles"])
def test_equals_the_spec_bit_for_bit(plan: str, config: str):
    if config == "separate":
        check_exact(KERNELS, plan, config=CONFIGS[config], separate=False, **TINY)
    else:  # stored as fp32 no ulp of any step hides under the last rounding
        check_exact_fp32(KERNELS, plan, config=CONFIGS[config], separate=False, **TINY)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("plan", ["hf", "folded", "fp32-tf32x3"])
def test_equals_the_spec_at_other_sizes(plan: str, geometry: str):
    for _plan, config in expressible((plan,)):
        if config in ("fused after hidden", "split-k", "separate"):
            check_exact(KERNELS, plan, config=CONFIGS[config], separate=False, **GEOMETRIES[geometry])


@pytest.mark.parametrize(("plan", "config"), expressible(("hf", "folded")))
def test_bias_and_residual_within_the_envelope(plan: str, config: str):
    check_envelope(KERNELS, plan, config=CONFIGS[config], **RANDOM)


@pytest.mark.parametrize("config", ["split-k", "split-k after hidden", "separate"])
def test_other_strides_within_the_envelope(config: str):
    check_envelope(KERNELS, "hf", config=CONFIGS[config], layout="every second channel", **RANDOM)


def test_folded_without_residual_reads_x_itself():
    check_envelope(KERNELS, "folded", config=CONFIGS["fused after hidden"], layout="transposed", residual=False, **TINY)


@pytest.mark.parametrize("tokens", [1, 17, 130])
def test_every_candidate_within_the_envelope(tokens: int):
    geometry = {**RANDOM, "tokens": tokens}
    problem, allowed = random_case(PLANS["hf"].plan, **geometry)
    for config in candidates(tokens, 200, 4, 16):
        actual = KERNELS.run(PLANS["hf"].plan, problem, config=config)
        assert_inside(actual=actual, allowed=allowed, what=str(config))


@pytest.mark.parametrize("prepass", ["rstd", "hidden"])
@pytest.mark.parametrize("plan", ["hf", "deferred"])
def test_rows_wider_than_a_block_of_the_norm(plan: str, prepass: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(castpoint.kernels.rms_norm, "ROW", 32)
    check_exact(KERNELS, plan, config=Config("fused", prepass, 32, 64), separate=False, **TINY)


@pytest.mark.parametrize("config", ["fused after hidden", "split-k"])
def test_fused_and_separate_head_norm_are_one_function(config: str):
    problem = random_problem(**TINY)
    fused, separate = (
        KERNELS.run(PLANS["hf"].plan, problem, separate=s, config=CONFIGS[config]) for s in (False, True)
    )
    for name in "qkv":
        assert_bit_equal(actual=separate[name], expected=fused[name], what=name)


def test_the_default_is_a_config_like_others():
    """config=None gives the bits of the config that it stands for, not of one with other steps."""
    problem = random_problem(tokens=5, hidden_size=600)
    plan = PLANS["bf16-operand"].plan.replace(out="fp32")
    default = default_config(32, "bf16", interpreted=True)
    expected = KERNELS.run(plan, problem)
    for name, actual in KERNELS.run(plan, problem, config=default).items():
        assert_bit_equal(actual=actual, expected=expected[name], what=name)
    other = KERNELS.run(plan, problem, config=dataclasses.replace(default, block_k=64))
    assert any(not torch.equal(other[name], expected[name]) for name in "qkv")


# ---------------------------------------------------------------- runs and memory


@pytest.mark.parametrize(("plan", "config"), [("hf", "split-k"), ("folded", "split-k"), ("hf", "separate")])
def test_a_second_launch_with_other_data(plan: str, config: str):
    check_again(KERNELS, plan, config=CONFIGS[config], **TINY)


@pytest.mark.parametrize(("plan", "config"), [("hf", "split-k after rstd"), ("deferred", "split-k")])
def test_bits_do_not_depend_on_who_comes_first(plan: str, config: str):
    check_order(KERNELS, plan, config=CONFIGS[config], **TINY)


@pytest.mark.parametrize("config", ["fused after hidden", "split-k", "separate"])
def test_writes_all_of_the_given_outputs_and_nothing_else(config: str):
    check_memory(KERNELS, "hf", config=CONFIGS[config])


def test_new_outputs_of_separate_are_parts_of_one_tensor():
    problem = random_problem(**TINY)
    q, k, v = KERNELS.run(PLANS["hf"].plan, problem, config=Config("separate")).values()
    packed = torch.cat([q, k, v], dim=1)
    assert q._base is k._base is v._base and torch.equal(packed, q._base)


def test_counters_are_made_once_for_a_size_and_not_shared_by_sizes():
    device = torch.device(DEVICE)
    few = castpoint.kernels.split_k.counters(device, castpoint.kernels.split_k.COUNTERS)
    assert few is castpoint.kernels.split_k.counters(device, castpoint.kernels.split_k.COUNTERS) and not few.any()
    assert castpoint.kernels.split_k.counters(device, 2 * castpoint.kernels.split_k.COUNTERS).numel() == 2 * few.numel()


@pytest.mark.parametrize("config", CONFIGS)
def test_no_tokens(config: str):
    problem = random_problem(**{**TINY, "tokens": 0, "num_q_heads": 2})
    outputs = run_triton(PLANS["hf"].plan, problem, config=CONFIGS[config])
    assert [tuple(value.shape) for value in outputs] == [(0, 2, 16), (0, 1, 16), (0, 1, 16)]


def test_split_k_is_refused_on_amd(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(ValueError, match="AMD.*take 'fused' or 'separate'"):
        KERNELS.run(PLANS["hf"].plan, random_problem(**TINY), config=CONFIGS["split-k"])


class Settings:
    """Stands for torch.backends.cuda.matmul of a PyTorch that has both settings, or the first alone."""

    def __init__(self, **values: bool) -> None:
        vars(self).update(values)


@pytest.mark.parametrize("split_k", [True, False, None])
@pytest.mark.parametrize("allowed", [True, False])
def test_cublas_is_kept_from_rounding_partial_sums(allowed: bool, split_k: bool | None, monkeypatch):
    name = "allow_bf16_reduced_precision_reduction"
    settings = Settings(**{name: allowed}, **({} if split_k is None else {f"{name}_split_k": split_k}))
    monkeypatch.setattr(torch.backends.cuda, "matmul", settings)
    with pytest.raises(ZeroDivisionError), fp32_sums(torch.device("cuda")):
        assert getattr(settings, name) is False
        raise ZeroDivisionError
    assert getattr(settings, name) == ((True, False) if allowed and split_k is False else allowed)


# ---------------------------------------------------------------- what a config cannot do


@pytest.mark.parametrize("plan", PLANS)
def test_unsupported_says_what_raises(plan: str):
    """Of every candidate of every shape, without a launch: there are no tokens."""
    plan = PLANS[plan].plan
    problem = random_problem(**{**TINY, "tokens": 0}, weight_offset=plan.weight_offset != "none")
    found = {c for tokens in (1, 16, 64, 256) for shape in SHAPES.values() for c in candidates(tokens, *shape)}
    for config in {*found, *CONFIGS.values()}:
        why = unsupported(config, plan.choices())
        assert "\n" not in why and len(why) < 300
        if why:
            with pytest.raises(ValueError) as error:
                run_triton(plan, problem, config=config)
            assert str(error.value) == why
        else:
            run_triton(plan, problem, config=config)


UNSUPPORTED = [  # plan, config, words of the reason
    ("fp32", "fused after hidden", ["prepass='hidden' stores bf16", "matmul='fp32'"]),
    ("deferred", "separate", ["scale must be 'prologue', not 'epilogue'"]),
    ("folded", "separate", ["scale must be 'prologue', not 'folded'"]),
    ("bf16-operand", "separate", ["proj must be 'bf16-rne', not 'fp32'"]),
    ("truncating", "separate", ["proj must be 'bf16-rne', not 'bf16-rtz'", "cuBLAS rounds to nearest"]),
    ("fp32-tf32", "separate", ["matmul must be 'bf16', not 'tf32'"]),
]


@pytest.mark.parametrize(("plan", "config", "words"), UNSUPPORTED)
def test_why_a_config_cannot_express_a_plan(plan: str, config: str, words: list[str]):
    why = unsupported(CONFIGS[config], PLANS[plan].plan.choices())
    assert not [word for word in words if word not in why], why


def test_what_each_config_can_express():
    """All that hidden, scale and proj allow: nothing is refused without need."""
    counts = {config: sum(1 for _plan, c in expressible() if c == config) for config in CONFIGS}
    bf16 = sum(entry.plan.matmul == "bf16" for entry in PLANS.values())
    assert counts["split-k"] == counts["split-k after rstd"] == counts["fused after rstd"] == len(PLANS)
    assert counts["fused after hidden"] == counts["split-k after hidden"] == bf16
    separate = [plan for plan, config in expressible() if config == "separate"]
    assert {"hf", "one-rounding", "separate-head-norm", "rstd-rounded", "bf16-statistics", "gemma"} <= set(separate)
    assert unsupported(CONFIGS["separate"], PLANS["hf"].plan.replace(out="fp32").choices())


BAD_CONFIGS = {
    "unknown kernel": ({"kernel": "splitk"}, ["kernel must be one of fused, split-k, separate", "'splitk'"]),
    "unknown prepass": ({"prepass": "norm"}, ["prepass must be one of none, rstd, hidden", "'norm'"]),
    "three warps": ({"num_warps": 3}, ["num_warps must be one of 1, 2, 4, 8, 16", "3"]),
    "tokens no power of two": ({"block_m": 48}, ["block_m must be a power of two of at least 16", "48"]),
    "channels too few": ({"block_k": 8}, ["block_k must be a power of two of at least 16", "8"]),
    "no stages": ({"num_stages": 0}, ["num_stages must be at least 1", "0"]),
    "no splits": ({"kernel": "split-k", "splits": 0}, ["splits must be at least 1", "0"]),
    "splits of the fused kernel": ({"splits": 2}, ["only kernel='split-k' divides D", "'fused'", "splits=1"]),
    "prepass of separate": ({"kernel": "separate", "prepass": "rstd"}, ["prepass must be 'none'", "'rstd'"]),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_bad_config_is_named_in_one_line(case: str):
    changes, words = BAD_CONFIGS[case]
    with pytest.raises(ValueError) as error:
        Config(**changes)
    message = str(error.value)
    assert "\n" not in message
    assert not [word for word in words if word not in message], message


# ---------------------------------------------------------------- candidates


@pytest.mark.parametrize("shape", SHAPES)
def test_candidates_fill_the_processors_and_leave_no_share_empty(shape: str):
    hidden_size, heads, head_dim = SHAPES[shape]
    for tokens in (1, 2, 8, 16, 17, 64, 128, 129, 512, 4096):
        found = candidates(tokens, hidden_size, heads, head_dim)
        assert len(set(found)) == len(found) <= 8 and found[-1] == Config("separate")
        for config in found:
            steps = -(-hidden_size // config.block_k)
            assert (config.splits - 1) * -(-steps // config.splits) < steps, f"{config}: the last share is empty"
        programs = [c.splits * heads * -(-tokens // c.block_m) for c in found if c.kernel == "split-k"]
        if shape.startswith("qwen3") and tokens <= 16:
            assert max(programs) >= 132, "a GPU of 132 processors is not filled"


def test_shares_of_d():
    assert split_shares(1, 1024, 32, 16, 128, 132) == 4  # 32 heads of four programs
    assert split_shares(1, 2560, 48, 16, 128, 264) == 5
    assert split_shares(1, 4096, 48, 16, 64, 528) == 11
    assert split_shares(1, 5120, 80, 16, 128, 132) == 1
    assert split_shares(1, 48, 4, 16, 16, 132) == 3  # not more than steps
    assert split_shares(1, 80, 4, 16, 16, 16) == 3  # not four of two steps, the last of which were empty


# ---------------------------------------------------------------- compiled ahead of time

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
from castpoint.variants.backends import triton_flags

launches, sources = [], []

def record(kernel, *args, grid, warmup, **options):
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(aot.TARGETS["sm_90"]))
    found = bind(*args, **options)[1]
    launches.append({p.name: [e[0], e[1] if e[0] == "constexpr" else e[1] or ""]
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
        rest = source.constants[(index,)] if constant else "D" if (index,) in source.attrs else ""
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
        castpoint.kernels.norm_qkv.norm_qkv(*inputs, **rest, **triton_flags(plan))
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
