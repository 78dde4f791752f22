"""The nets of test_kernels.py catch a kernel that is wrong: copies of the kernels with one line changed.

A net that such a kernel passes would prove nothing about the right one. Kernels that run another plan than they are
asked for: test_moved.py.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from nets import (
    check_addressing,
    check_again,
    check_envelope,
    check_exact,
    check_exact_fp32,
    check_far_positions,
    check_memory,
    check_nonfinite,
    check_order,
)
from rounding_net import check_rounding
from support import ROOT, Kernels

from castpoint.kernels.config import Config

TINY = {"tokens": 33, "hidden_size": 200, "num_q_heads": 1, "num_kv_heads": 1, "head_dim": 32}


@dataclass(frozen=True)
class Mutation:
    """One change of the source, and the net that must catch it."""

    file: str
    old: str
    new: str
    net: Callable[[Kernels], None]
    count: int = 1  # how often the old text stands in the file


def exact(plan: str, **options: object) -> Callable[[Kernels], None]:
    return functools.partial(check_exact, plan=plan, **{**TINY, **options})


def exact_fp32(plan: str, **options: object) -> Callable[[Kernels], None]:
    return functools.partial(check_exact_fp32, plan=plan, **{**TINY, **options})


def inside(plan: str, **options: object) -> Callable[[Kernels], None]:
    return functools.partial(check_envelope, plan=plan, **{**TINY, **options})


def rounding(word: str) -> Callable[[Kernels], None]:
    return functools.partial(check_rounding, word=word)


CHAIN, QKV, HEAD, ROUNDING = "chain.py", "norm_qkv.py", "head_norm.py", "rounding.py"
SPLIT, RMS, SEPARATE = "split_k.py", "rms_norm.py", "separate.py"
NAN_LINE = "    rounded = tl.where(is_nan, bits | 0x00400000, rounded)\n"
TOKENS = "    mask = (offs_m < T)[:, None] & (offs_n < DH)[None, :]\n"
NO_TOKENS = "    mask = (offs_m >= 0)[:, None] & (offs_n < DH)[None, :]\n"
V_PTRS = "v_ptr + offs_m[:, None] * stride_vm + (head - HQ - HKV) * stride_vh"
X_PTRS = "x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk"

SPLIT_K = Config("split-k", block_m=16, block_k=16, splits=3)  # 72 channels are five steps, in shares of 2, 2, 1
STEPS = Config(block_m=16, block_k=16)
RSTD, STORED = Config("fused", "rstd", 16, 32), Config("fused", "hidden", 16, 32)
BLOCKS = {"tokens": 17, "hidden_size": 72, "num_q_heads": 1, "num_kv_heads": 1, "head_dim": 16}
PLAN = "PLAN=words(plan)"  # of a launch
DOT = "acc = dot(hidden, weight, acc, PLAN, INTERPRETED)"
STORE_SUMS = "tl.store(sums_ptrs + split * BLOCK_M * BLOCK_N, acc, mask=mask)"
IN_BF16 = "((acc.to(tl.int32, bitcast=True) + 0x8000) & -0x10000).to(tl.float32, bitcast=True)"
BIAS = "tl.load(bias_ptr + head * DH + offs_n).to(tl.float32)[None, :]"


def with_config(net: Callable[..., None], plan: str, config: Config, **options: object) -> Callable[[Kernels], None]:
    return functools.partial(net, plan=plan, config=config, **{**BLOCKS, **options})


def in_split_k(old: str, new: str, net: Callable[..., None], plan: str = "hf", config: Config = SPLIT_K) -> Mutation:
    return Mutation(SPLIT, old, new, with_config(net, plan, config))


MUTATIONS = {
    # a rounding dropped
    "x not rounded": Mutation(
        CHAIN, ", mask=mask, other=0.0)), PLAN.x)", ", mask=mask, other=0.0)), 'fp32')", inside("fp32")
    ),
    "squares not rounded": Mutation(
        CHAIN, "round_to(x * x, PLAN.statistics)", "(x * x)", inside("bf16-statistics", residual=False), count=2
    ),
    "variance not rounded": Mutation(
        CHAIN, "D.to(tl.float32)), PLAN.variance)", "D.to(tl.float32)), 'fp32')", inside("bf16-statistics")
    ),
    "rstd not rounded": Mutation(
        CHAIN, "rsqrt_rn(variance + eps), PLAN.rstd)", "rsqrt_rn(variance + eps), 'fp32')", exact("rstd-rounded")
    ),
    "normed not rounded": Mutation(
        CHAIN, "round_to(hidden * rstd[:, None], PLAN.normed)", "(hidden * rstd[:, None])", exact("hf")
    ),
    "hidden not rounded": Mutation(CHAIN, "[None, :], PLAN.hidden)", "[None, :], 'fp32')", exact_fp32("bf16-operand")),
    "proj not rounded": Mutation(CHAIN, "round_to(acc, PLAN.proj)", "acc", exact("hf")),
    "proj not rounded, one rounding a norm": Mutation(
        CHAIN, "round_to(acc, PLAN.proj)", "acc", exact("one-rounding", num_q_heads=2)
    ),
    "proj rounded": Mutation(CHAIN, "round_to(acc, PLAN.proj)", "round_to(acc, 'bf16-rne')", exact("deferred")),
    "v not rounded": Mutation(CHAIN, "round_to(proj, PLAN.out)", "proj", exact("fp32")),
    "head squares not rounded": Mutation(
        HEAD, "round_to(proj * proj, PLAN.statistics)", "(proj * proj)", inside("bf16-statistics")
    ),
    "head variance not rounded": Mutation(
        HEAD, "DH * 1.0), PLAN.variance)", "DH * 1.0), 'fp32')", inside("bf16-statistics")
    ),
    "head rstd not rounded": Mutation(HEAD, "eps), PLAN.head_rstd)", "eps), 'fp32')", exact_fp32("rstd-rounded")),
    "head_normed not rounded": Mutation(
        HEAD, ", PLAN.head_normed)\n    return", ", 'fp32')\n    return", exact_fp32("hf")
    ),
    "unrotated not rounded": Mutation(
        HEAD, "round_to(value, PLAN.unrotated)", "value", exact_fp32("one-rounding", rope=True)
    ),
    "cos and sin not rounded": Mutation(
        HEAD, "0.0)), PLAN.cos_sin)", "0.0)), 'fp32')", exact_fp32("hf", rope=True), count=2
    ),
    "products not rounded": Mutation(
        HEAD, "round_to(second * sin, PLAN.products)", "second * sin", exact_fp32("hf", rope=True)
    ),
    "out not rounded": Mutation(CHAIN, "round_to(out, PLAN.out)", "out", exact("bf16-operand")),
    "out of a separate norm not rounded": Mutation(HEAD, "round_to(value, PLAN.out)", "value", exact("bf16-operand")),
    # rounding itself
    "ties not to even": Mutation(ROUNDING, "0x7FFF + ((bits >> 16) & 1)", "0x7FFF", rounding("bf16-rne")),
    "ties away from zero": Mutation(ROUNDING, "0x7FFF + ((bits >> 16) & 1)", "0x8000", rounding("bf16-rne")),
    "NaN rounded like a number": Mutation(ROUNDING, NAN_LINE, "", rounding("bf16-rne")),
    "NaN truncated like a number": Mutation(ROUNDING, NAN_LINE, "", rounding("bf16-rtz")),
    "nearest instead of truncated": Mutation(ROUNDING, 'if STORAGE == "bf16-rne":', "if True:", exact("truncating")),
    "tf32 not truncated": Mutation(ROUNDING, "& 0xFFFFE000", "& 0xFFFFFFFF", exact_fp32("fp32-tf32")),
    "tf32 a bit shorter": Mutation(ROUNDING, "& 0xFFFFE000", "& 0xFFFFC000", rounding("tf32")),
    "remainder of tf32 left out": Mutation(
        CHAIN, "tl.dot(truncate_tf32(hidden - high)", "tl.dot(truncate_tf32(high - high)", exact("fp32-tf32x3")
    ),
    # sums
    "accumulator in bf16": Mutation(
        CHAIN, DOT, f"acc = round_to({DOT[6:]}, 'bf16-rne')", with_config(check_exact, "bf16-operand", STEPS)
    ),
    "accumulator in tf32": Mutation(
        CHAIN, DOT, f"acc = truncate_tf32({DOT[6:]})", with_config(check_exact, "fp32", STEPS)
    ),
    "shares stored in bf16": in_split_k(STORE_SUMS, STORE_SUMS.replace("acc,", f"{IN_BF16},"), check_exact),
    # arithmetic
    "eps dropped": Mutation(CHAIN, "variance + eps", "variance", exact_fp32("fp32")),
    "head eps dropped": Mutation(HEAD, "variance + eps", "variance", exact_fp32("fp32")),
    "mean over one channel more": Mutation(CHAIN, "D.to(tl.float32)", "(D + 1).to(tl.float32)", exact("hf")),
    "head mean over one channel more": Mutation(HEAD, "DH * 1.0", "(DH + 1) * 1.0", exact("hf")),
    "bias dropped": Mutation(CHAIN, "if bias_ptr is not None:", "if False:", inside("hf")),
    "residual dropped": Mutation(CHAIN, "if residual_ptr is not None:", "if False:", inside("hf")),
    "rstd applied twice": Mutation(
        CHAIN, "acc = acc * rstd[:, None]", "acc = acc * rstd[:, None] * rstd[:, None]", exact("deferred")
    ),
    "rstd not applied": Mutation(CHAIN, "acc = acc * rstd[:, None]", "pass", exact("folded")),
    "weight offset dropped": Mutation(ROUNDING, "1.0 + widen(w)", "widen(w)", exact("gemma")),
    "k normed with q's weight": Mutation(CHAIN, "tl.load(k_norm_ptr", "tl.load(q_norm_ptr", exact("hf")),
    "v normed and stored as k": Mutation(CHAIN, "if head >= HQ + HKV:", "if head >= HQ + 2 * HKV:", check_memory),
    "k stored as v": Mutation(CHAIN, "if head >= HQ + HKV:", "if head >= HQ:", check_memory),
    "turned the other way": Mutation(
        HEAD, "cos, PLAN.products) - round", "cos, PLAN.products) + round", exact("fp32", rope=True)
    ),
    "pairs of neighbours": Mutation(
        HEAD, "tl.reshape(value, [BLOCK_M, 2, HALF]), (0, 2, 1))", "tl.reshape(value, [BLOCK_M, HALF, 2]), (0, 1, 2))",
        exact("fp32", rope=True),
    ),
    "halves exchanged": Mutation(
        HEAD, "tl.join(turned_first, turned_second)", "tl.join(turned_second, turned_first)", exact("fp32", rope=True)
    ),
    "the angle of the first token for all": Mutation(
        HEAD, "positions_ptr + offs_m", "positions_ptr + 0 * offs_m", exact("fp32", rope=True)
    ),
    "sin read as cos": Mutation(HEAD, "cos_ptrs + HALF", "cos_ptrs", exact("fp32", rope=True)),
    "not rotated behind a separate norm": Mutation(
        QKV, "plan, eps, rope)", "plan, eps, (None, None))", exact("fp32", rope=True, separate=True)
    ),
    "not rotated without a head norm": Mutation(
        SEPARATE, "q_norm_weight is not None or rope[0] is not None", "q_norm_weight is not None",
        with_config(check_exact, "hf", Config("separate"), rope=True, head_norm=False),
    ),
    "an infinity hidden": Mutation(
        CHAIN,
        "rsqrt_rn(variance + eps), PLAN.rstd",
        "rsqrt_rn(tl.minimum(variance, 3e38) + eps), PLAN.rstd",
        functools.partial(check_nonfinite, plan="fp32"),
    ),
    # memory
    "v one head too far": Mutation(CHAIN, V_PTRS, V_PTRS.replace("HKV)", "HKV + 1)"), check_memory),
    "tokens not masked": Mutation(CHAIN, TOKENS, NO_TOKENS, check_memory),
    "tokens of the head norm not masked": Mutation(
        HEAD,
        "store_head(out_ptrs, out, mask)",
        "store_head(out_ptrs, out, mask | (offs_n < DH)[None, :])",
        functools.partial(check_memory, separate=True),
        count=2,
    ),
    "channels of x not masked": Mutation(
        CHAIN, "(offs_k < D)[None, :]", "(offs_k >= 0)[None, :]", check_memory, count=2
    ),
    "x's channels taken as contiguous": Mutation(
        CHAIN, X_PTRS, X_PTRS.removesuffix(" * stride_xk"), inside("hf", layout="every second channel"), count=2
    ),
    "addresses of 32 bits in the cache": Mutation(
        HEAD, "position[:, None] * DH", "position.to(tl.int32)[:, None] * DH", check_far_positions
    ),
    "positions taken as contiguous": Mutation(
        QKV, "None if tensor is None else tensor.contiguous() for", "tensor for", inside("hf", rope=True)
    ),
    "addresses of 32 bits": Mutation(QKV, "tl.program_id(0).to(tl.int64)", "tl.program_id(0)", check_addressing),
    # split-K
    "sums without the last share": in_split_k("tl.range(0, splits, loop", "tl.range(0, splits - 1, loop", check_exact),
    "a share of squares counted twice": in_split_k(
        "sum_of_squares += squares", "sum_of_squares += 2 * squares", check_exact, "folded"
    ),
    "squares of the own share alone": in_split_k(
        "squares_ptrs + other * BLOCK_M", "squares_ptrs + split * BLOCK_M", check_exact, "deferred"
    ),
    "shares overlap": in_split_k("tl.minimum(begin + share, D)", "tl.minimum(begin + share + 1, D)", check_exact),
    "shares leave a step out": in_split_k(
        "tl.cdiv(tl.cdiv(D, BLOCK_K), splits) * BLOCK_K", "tl.cdiv(D, BLOCK_K) // splits * BLOCK_K", check_exact
    ),
    "counter not reset": in_split_k(
        "tl.store(counter_ptr + cell, 0)", "tl.store(counter_ptr + cell, arrived)", check_again
    ),
    "counter reset to one": in_split_k(  # with a share of nothing the sums are complete one arrival early
        "tl.store(counter_ptr + cell, 0)", "tl.store(counter_ptr + cell, 1)", check_again, "hf",
        dataclasses.replace(SPLIT_K, splits=6),
    ),
    "finished by the last but one": in_split_k("arrived == splits - 1", "arrived == splits - 2", check_exact),
    "finished by the last share, not the last to arrive": in_split_k(
        "arrived == splits - 1", "split == splits - 1", check_order
    ),
    "blocks of tokens share memory": in_split_k("cell = block * tl.num_programs(1) + head", "cell = head", check_order),
    "bias added by each share": in_split_k(STORE_SUMS, STORE_SUMS.replace("acc,", f"acc + {BIAS},"), check_envelope),
    "all tokens scaled by the first one's rstd": in_split_k(
        "rows = 1 if tokens == 1 else block_m", "rows = 1", check_envelope
    ),
    "rows of the first block in all": in_split_k(
        "block * BLOCK_M + tl.arange(0, BLOCK_R)", "tl.arange(0, BLOCK_R)", check_envelope
    ),
    # pre-pass
    "rstd not rounded before": Mutation(
        RMS, PLAN, PLAN.replace("plan", "plan.replace(rstd='fp32')"), with_config(check_exact, "rstd-rounded", RSTD)
    ),
    "squares not rounded before": Mutation(
        RMS, "round_to(x * x, PLAN.statistics)", "(x * x)",
        with_config(check_envelope, "bf16-statistics", RSTD, hidden_size=200, residual=False),
    ),
    "normed not rounded before": Mutation(
        RMS, PLAN, PLAN.replace("plan", "plan.replace(normed='fp32')"), with_config(check_exact, "hf", STORED)
    ),
    "hidden cut off before": Mutation(
        RMS, PLAN, PLAN.replace("plan", "plan.replace(hidden='fp32', matmul='fp32')"),  # no matmul is there
        with_config(check_exact_fp32, "bf16-operand", STORED),
    ),
    "residual lost where x is hidden": Mutation(
        QKV, 'plan.scale != "folded" or residual is not None', 'plan.scale != "folded"',
        with_config(check_envelope, "folded", STORED),
    ),
    "rstd of the first token for all": Mutation(
        QKV, "rstd_ptr + offs_m", "rstd_ptr + 0 * offs_m", with_config(check_envelope, "deferred", STORED)
    ),
    # cuBLAS and separate norms
    "v normed": Mutation(
        SEPARATE, "proj[:, : heads[0] + heads[1]]", "proj", with_config(check_exact, "hf", Config("separate"))
    ),
    "q's and k's weights exchanged": Mutation(
        HEAD, "head >= HQ:\n                stored", "head < HQ:\n                stored",
        with_config(check_exact, "hf", Config("separate")),
    ),
    "bias left out of addmm": Mutation(
        SEPARATE, "torch.addmm(bias,", "torch.addmm(0 * bias,", with_config(check_envelope, "hf", Config("separate"))
    ),
    "v not copied": Mutation(
        SEPARATE, "(2,) if finished", "() if finished", functools.partial(check_memory, config=Config("separate"))
    ),
}  # fmt: skip


def mutated(mutation: Mutation | None, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """The kernels, imported from a copy of their package under another name, changed as the mutation says."""
    package = folder / name
    package.mkdir()
    for source in (ROOT / "kernels").glob("*.py"):
        text = source.read_text()
        if mutation and source.name == mutation.file:
            assert text.count(mutation.old) == mutation.count, (
                f"{mutation.old!r} stands {text.count(mutation.old)} times"
            )
            text = text.replace(mutation.old, mutation.new)
        (package / source.name).write_text(text)
    monkeypatch.syspath_prepend(folder)
    try:
        return Kernels(*(importlib.import_module(f"{name}.{file}") for file in ("norm_qkv", "rounding", "split_k")))
    finally:
        for module in [module for module in sys.modules if module.split(".")[0] == name]:
            del sys.modules[module]


NETS = {
    "exact": exact("hf"),
    "exact in fp32": exact_fp32("fp32-tf32x3"),
    "envelope": inside("deferred"),
    "rounding": rounding("bf16-rne"),
    "nonfinite": functools.partial(check_nonfinite, plan="fp32"),
    "memory": functools.partial(check_memory, separate=True),
    "addressing": check_addressing,
    "far positions": check_far_positions,
    "again": with_config(check_again, "hf", SPLIT_K),
    "order": with_config(check_order, "hf", SPLIT_K),
}


@pytest.mark.parametrize("net", NETS)
def test_an_unchanged_copy_passes(net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    copy = mutated(None, "unchanged_kernels", tmp_path, monkeypatch)
    assert Path(copy.norm_qkv.__file__).is_relative_to(tmp_path)
    NETS[net](copy)


@pytest.mark.parametrize("change", MUTATIONS)
def test_a_changed_source_is_caught(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mutation = MUTATIONS[change]
    copy = mutated(mutation, "mutated_kernels", tmp_path, monkeypatch)
    with pytest.raises(AssertionError, match="differ|outside|not written|is NaN"):
        mutation.net(copy)
