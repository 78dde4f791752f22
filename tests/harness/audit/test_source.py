"""Faults planted in the kernels' source: the audit turns red for each, naming the boundary. Needs no GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from audit_support import FUSED, HEAD, QKV, RMS, ROUNDING, SPLIT, Planted, in_process, instead, kept, lost, planted

from castpoint.kernels.config import Config

NORMED, OUT = "round_to(hidden * rstd[:, None], NORMED)", "round_to(value, OUT)"
ACC, IEEE = "dot(hidden, weight, acc, MATMUL, INTERPRETED)", 'dot(hidden, wide, acc, input_precision="ieee")'
PROJ_AGAIN = "widen(tl.load(proj_ptr + offs_m[:, None] * stride_pm + head * stride_ph + offs_n[None, :], mask=mask))"
NAN_LINE = "    rounded = tl.where(is_nan, bits | 0x00400000, rounded)\n"
NEAREST = 'if STORAGE == "bf16-rne":'
STORE_RSTD, STORE_SUMS = "rstd_ptr + offs_m, rstd", "tl.store(sums_ptrs + split * BLOCK_M * BLOCK_N, acc, mask=mask)"
ROUND_IN_SPLIT_K = ("import finish_head,", "import round_to, finish_head,")
LOADED_HIDDEN = "other=0.0)\n        else:"
CUT_OFF = r"\(bf16-rtz without NaN\)"
# Small tiles, with which LLVM takes a quarter of the time; test_kernels.py has those of launches.
HEADS = {"head_dim": 32}
FEW, AFTER_RSTD, AFTER_HIDDEN = (
    HEADS | {"config": Config("fused", prepass, 16, 32, 4, 2)} for prepass in ("none", "rstd", "hidden")
)
SHARES = HEADS | {"config": Config("split-k", "none", 16, 32, 4, 2), "tokens": 1}
SHARES_AFTER_RSTD = HEADS | {"config": Config("split-k", "rstd", 16, 32, 4, 2)}
STORES_RSTD, STORES_HIDDEN, PACKED = {"stores": "rstd"}, {"stores": "hidden"}, {"packed": True}


def in_qkv(old: str, new: str, plan: str, says: str, keywords: dict = FEW, **options: object) -> Planted:
    return Planted(QKV, old, new, plan, says, "norm_qkv", keywords, **options)


def in_norm(file: str, old: str, new: str, plan: str, says: str, keywords: dict, **options: object) -> Planted:
    return Planted(file, old, new, plan, says, "rms_norm", keywords, **options)


def in_config(file: str, old: str, new: str, plan: str, says: str, keywords: dict, **options: object) -> Planted:
    return Planted(file, old, new, plan, says, "norm_qkv", keywords, **options)


PLANTED = {
    # a rounding removed
    "x": in_qkv("other=0.0)), X)", "other=0.0)), 'fp32')", "fp32", lost("x", "normed"), FEW | {"residual": True}),
    "squares": in_qkv("round_to(x * x, STATISTICS)", "(x * x)", "bf16-statistics", lost("statistics", "sum"), count=2),
    "variance": in_qkv(
        "D.to(tl.float32)), VARIANCE)", "D.to(tl.float32)), 'fp32')", "bf16-statistics", lost("variance", "shifted")
    ),
    "rstd": in_qkv("eps), RSTD)", "eps), 'fp32')", "rstd-rounded", lost("rstd", "normed")),
    "deferred rstd": in_qkv("eps), RSTD)", "eps), 'bf16-rne')", "deferred", kept("rstd", "proj")),
    "normed": in_qkv(NORMED, "(hidden * rstd[:, None])", "hf", lost("normed", "hidden")),
    "proj": in_qkv("round_to(acc, PROJ)", "acc", "hf", lost("proj", "head_statistics")),
    "head squares": Planted(
        HEAD, "round_to(proj * proj, STATISTICS)", "(proj * proj)", "bf16-statistics",
        lost("head_statistics", "head_sum"),
    ),
    "head variance": Planted(
        HEAD, "DH * 1.0), VARIANCE)", "DH * 1.0), 'fp32')", "bf16-statistics", lost("head_variance", "head_shifted")
    ),
    "head rstd": Planted(HEAD, "eps), HEAD_RSTD)", "eps), 'fp32')", "rstd-rounded", lost("head_rstd", "head_normed")),
    "head_normed": Planted(
        HEAD, ", HEAD_NORMED)\n    return", ", 'fp32')\n    return", "hf", lost("head_normed", "out")
    ),
    "weight offset": Planted(
        ROUNDING, "round_to(1.0 + widen(w), WEIGHT_OFFSET)", "1.0 + widen(w)", "gemma-bf16-offset",
        lost(r"weight_offset \(1 \+ w\)", "out"),
    ),
    # removed where bf16 is due: the matmul or the store takes the upper half
    "hidden, so cut off": in_qkv(
        "[None, :], HIDDEN)", "[None, :], 'fp32')", "bf16-operand", instead("hidden", CUT_OFF, "proj")
    ),
    "out, so cut off": Planted(HEAD, OUT, "value", "hf", instead("out", CUT_OFF, "out_ptr")),
    "v, so cut off": in_qkv("round_to(proj, OUT), mask", "proj, mask", "fp32", instead("proj", CUT_OFF, "v_ptr")),
    # rounding itself
    "truncated": Planted(ROUNDING, NEAREST, "if False:", "hf", instead("head_normed", r"\(bf16-rtz\)", "out")),
    "not truncated": Planted(
        ROUNDING, NEAREST, "if True:", "truncating", instead("head_normed", r"\(bf16-rne\)", "out", "bf16-rtz")
    ),
    "ties not to even": Planted(
        ROUNDING, "0x7FFF + ((bits >> 16) & 1)", "0x8000", "hf",
        instead("head_normed", r"\(unknown arithmetic on bits\)", "out"),
    ),
    "NaN like a number": Planted(
        ROUNDING, NAN_LINE, "", "hf", instead("head_normed", r"\(bf16-rne without NaN\)", "out")
    ),
    "lower bits kept": Planted(
        ROUNDING, "(rounded & 0xFFFF0000)", "rounded", "hf",
        instead("head_normed", r"\(unknown arithmetic on bits\)", "out"),
    ),
    "tf32 a bit shorter": Planted(
        ROUNDING, "& 0xFFFFE000", "& 0xFFFFC000", "fp32-tf32",
        instead("hidden", r"\(unknown arithmetic on bits\)", "proj", "tf32-rtz"), "norm_qkv", FEW,
    ),
    # elsewhere, twice, where none is declared
    "moved from hidden to normed": in_qkv(
        NORMED, NORMED.replace("NORMED", "HIDDEN"), "one-rounding",
        rf"{kept('normed', 'hidden')}.*{instead('hidden', r'.bf16-rtz without NaN.', 'proj')}",
        also=("[None, :], HIDDEN)", "[None, :], NORMED)"),
    ),
    "normed twice": in_qkv(
        NORMED, f"round_to({NORMED}, NORMED)", "hf", instead("normed", r"twice \(bf16-rne, bf16-rne\)", "hidden")
    ),
    "out twice": Planted(
        HEAD, OUT, f"round_to({OUT}, OUT)", "hf", instead("out", r"twice \(bf16-rne, bf16-rne\)", "out_ptr")
    ),
    "the sum of squares": Planted(
        HEAD, "tl.sum(squares, axis=1)", "round_to(tl.sum(squares, axis=1), 'bf16-rne')", "hf",
        kept("head_sum", "head_variance"),
    ),
    "the accumulator": in_qkv(f"acc = {ACC}", f"acc = round_to({ACC}, 'bf16-rne')", "hf", kept("proj", "proj")),
    # another product
    "a tf32 dot for fp32": in_qkv(
        IEEE, IEEE.replace("ieee", "tf32"), "fp32",
        r"TTIR: the matmul is tf32, the plan says ieee; matrix instructions \S+x?f32\S* where \S+ is due",
    ),
    "no remainder of tf32": in_qkv(
        'if MATMUL == "tf32x3":', "if False:", "fp32-tf32x3", "TTIR: the remainder of tf32 was not found"
    ),
    # the norm before the matmul
    "norm: rstd": in_norm(
        QKV, "eps), RSTD)", "eps), 'fp32')", "bf16-statistics", lost("rstd", "rstd_ptr"), STORES_RSTD
    ),
    "norm: squares of the rest of a row": in_norm(
        RMS, "round_to(more * more, STATISTICS)", "(more * more)", "bf16-statistics", lost("statistics", "sum"),
        STORES_RSTD,
    ),
    "norm: hidden, so cut off": in_norm(
        QKV, "[None, :], HIDDEN)", "[None, :], 'fp32')", "hf", instead("hidden", CUT_OFF, "hidden_ptr"), STORES_HIDDEN
    ),
    "norm: hidden of the deferred, so cut off": in_norm(
        QKV, "[None, :], HIDDEN)", "[None, :], 'fp32')", "deferred", instead("hidden", CUT_OFF, "hidden_ptr"),
        {"stores": "both"},
    ),
    "norm: x, so cut off": in_norm(
        QKV, "other=0.0)), X)", "other=0.0)), 'fp32')", "folded", instead("x", CUT_OFF, "hidden_ptr"),
        {"stores": "both", "residual": True},
    ),
    "norm: truncated": in_norm(
        ROUNDING, NEAREST, "if False:", "hf", instead("hidden", r"\(bf16-rtz\)", "hidden_ptr"), STORES_HIDDEN
    ),
    "norm: hidden twice": in_norm(
        RMS, "narrow(hidden)", "narrow(round_to(hidden, HIDDEN))", "hf",
        instead("hidden", r"twice \(bf16-rne, bf16-rne\)", "hidden_ptr"), STORES_HIDDEN,
    ),
    "norm: a rounded rstd": in_norm(
        RMS, STORE_RSTD, "rstd_ptr + offs_m, round_to(rstd, 'bf16-rne')", "hf", kept("rstd", "rstd_ptr"), STORES_RSTD
    ),
    "norm: the sum of squares for rstd": in_norm(
        RMS, STORE_RSTD, "rstd_ptr + offs_m, sum_of_squares", "hf", "TTIR: sum is stored to rstd_ptr, due is rstd",
        STORES_RSTD,
    ),
    # the fused kernel behind a pre-pass
    "after rstd: normed": in_config(
        QKV, NORMED, "(hidden * rstd[:, None])", "hf", lost("normed", "hidden"), AFTER_RSTD
    ),
    "after rstd: rstd rounded there": in_config(
        QKV, "hidden * rstd[:, None]", "hidden * round_to(rstd, 'bf16-rne')[:, None]", "hf", kept("rstd", "normed"),
        AFTER_RSTD,
    ),
    "after rstd: rstd computed again": in_config(
        FUSED, 'if PREPASS != "none":\n        if', 'if PREPASS == "":\n        if', "hf",
        "TTIR: statistics is computed again", AFTER_RSTD,
    ),
    "after hidden: hidden rounded again": in_config(
        QKV, LOADED_HIDDEN,
        LOADED_HIDDEN.replace("else", "    hidden = round_to(widen(hidden), 'bf16-rne')\n        else"), "hf",
        kept("hidden", "proj"), AFTER_HIDDEN,
    ),
    "after hidden: weighted again": in_config(
        QKV, 'if PREPASS == "hidden":', "if False:", "deferred", kept("a value outside the chain", "proj"), AFTER_HIDDEN
    ),
    # split-K, and its way through memory
    "split-K: rstd": in_config(QKV, "eps), RSTD)", "eps), 'fp32')", "bf16-statistics", lost("rstd", "normed"), SHARES),
    "split-K: normed twice": in_config(
        QKV, NORMED, f"round_to({NORMED}, NORMED)", "hf", instead("normed", r"twice \(bf16-rne, bf16-rne\)", "hidden"),
        SHARES_AFTER_RSTD,
    ),
    "split-K: proj": in_config(QKV, "round_to(acc, PROJ)", "acc", "hf", lost("proj", "head_statistics"), SHARES),
    "split-K: truncated": in_config(
        ROUNDING, NEAREST, "if False:", "hf", instead("hidden", r"\(bf16-rtz\)", "proj"), SHARES
    ),
    "split-K: shares stored in bf16": in_config(
        SPLIT, STORE_SUMS, STORE_SUMS.replace("acc", "round_to(acc, 'bf16-rne')"), "hf",
        rf"{kept('proj', 'sums_ptr')}.*{kept('proj', 'proj')}", SHARES, also=ROUND_IN_SPLIT_K,
    ),
    "split-K: shares added up in bf16": in_config(
        SPLIT, "acc += tl.load(sums", "acc = round_to(acc, 'bf16-rne') + tl.load(sums", "hf", kept("proj", "proj"),
        SHARES, also=ROUND_IN_SPLIT_K,
    ),
    "split-K: squares stored in bf16": in_config(
        SPLIT, "split * BLOCK_M, sum_of_squares", "split * BLOCK_M, round_to(sum_of_squares, 'bf16-rne')", "deferred",
        kept("sum", "squares_ptr"), SHARES, also=ROUND_IN_SPLIT_K,
    ),
    "split-K: shares added up by atomics": in_config(
        SPLIT, STORE_SUMS, "tl.atomic_add(sums_ptrs, acc, mask=mask)", "hf",
        "nothing is stored to sums_ptr.*does not see through tt.atomic_rmw, a load of sums_ptr that no store matches",
        SHARES,
    ),
    "split-K: a counter that is added": in_config(
        SPLIT, "dtype=tl.float32)\n        sum_of_squares",
        "dtype=tl.float32) + arrived.to(tl.float32)\n        sum_of_squares", "hf",
        "TTIR: the audit does not see through tt.atomic_rmw", SHARES,
    ),
    "split-K: another workspace": in_config(
        SPLIT, "squares_ptr + cell", "sums_ptr + cell", "deferred", "TTIR: sum is stored to sums_ptr, due is proj",
        SHARES,
    ),
    "split-K: a tf32 dot for fp32": in_config(
        QKV, IEEE, IEEE.replace("ieee", "tf32"), "fp32", "TTIR: the matmul is tf32, the plan says ieee; matrix",
        SHARES,
    ),
    # q's and k's heads in one launch
    "packed: out, so cut off": Planted(
        HEAD, OUT, "value", "hf", rf"{instead('out', CUT_OFF, 'out_ptr')}.*{instead('out', CUT_OFF, 'k_out_ptr')}",
        keywords=PACKED,
    ),
    "packed: proj for k": Planted(
        HEAD, "store_head(k_ptrs, out, mask)", f"store_head(k_ptrs, {PROJ_AGAIN}, mask)", "hf",
        "TTIR: proj is stored to k_out_ptr, due is out", keywords=PACKED,
    ),
}  # fmt: skip


def planted_for(target: str) -> dict[str, Planted]:
    """Where a rounding is, TTIR says, which is the same for every target: elsewhere the cheap half is enough."""
    cheap = {name for name, f in PLANTED.items() if f.kernel == "head_norm" or "tf32" in f.plan}
    return {name: fault for name, fault in PLANTED.items() if target == "sm_90" or name in cheap}


def planted_in(target: str) -> Iterator[dict]:
    return planted(target, planted_for(target))


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_faults_in_the_source_turn_red(target: str, tmp_path: Path):
    rows = {row["fault"]: row for row in in_process(planted_in, target, cache=tmp_path)}
    assert rows.pop("unchanged")["status"] == "ok"
    assert rows.keys() == planted_for(target).keys()
    for name, row in rows.items():
        assert row["status"] == "red", f"{name}: {row['status']} {row['reason']}"
        assert re.search(PLANTED[name].says, row["reason"]), f"{name}: {PLANTED[name].says!r} is not in {row['reason']}"
