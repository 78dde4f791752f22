"""The audit passes every kernel of the catalogue and turns red for planted faults, naming the boundary. Needs no GPU.

The kernels of this process may be interpreted, so what compiles runs in processes of its own, each started by
`in_process` with the name of a function here, whose rows come back as JSON.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import triton
import triton.language as tl

import harness.aot
from harness.aot import TARGETS, cases, compile_head_norm, compile_norm_qkv, compile_rms_norm
from harness.audit import COLUMNS, audit_case, audit_compiled
from harness.audit_foreign import audit_foreign
from harness.audit_ptx import ptx_graph
from harness.audit_roundings import machine_roundings
from kernels.config import Config
from variants.catalogue import PLANS

ROOT = Path(__file__).parent.parent
BF16 = tl.constexpr(tl.bfloat16)


def in_process(function: str, *args: str, cache: Path, **env: str) -> list[dict]:
    """Rows that a function of this module yields in a process whose kernels compile, with an empty cache."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    code = f"import json, test_audit\nfor row in test_audit.{function}(*{args!r}): print(json.dumps(row), flush=True)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache), **env},
        cwd=cache,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


# ---------------------------------------------------------------- the kernels as they are


def chosen(target: str) -> list[tuple[str, str, dict]]:
    """The cases of that target; of the kernels that configs ask for few but on sm_90: TTIR is the same everywhere."""
    found = list(cases(target))
    if target == "sm_90":
        return found
    few = [("rms_norm", {"stores"}), ("head_norm", {"packed"}), ("norm_qkv", {"config", "tokens"})]
    return [
        (kernel, plan, words)
        for kernel, plan, words in found
        if kernel != "rms_norm" and not words.keys() & {"config", "packed"}
        or plan == "hf" and (kernel, set(words)) in few
    ]  # fmt: skip


def catalogue(target: str) -> Iterator[dict]:
    for kernel, plan, keywords in chosen(target):
        yield audit_case(target, kernel, plan, keywords)


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_rounds_as_its_plan_declares(target: str, tmp_path: Path):
    rows = in_process("catalogue", target, cache=tmp_path)
    wanted = [(kernel, plan, " ".join(f"{k}={v}" for k, v in words.items())) for kernel, plan, words in chosen(target)]
    assert [(row["kernel"], row["plan"], row["keywords"]) for row in rows] == wanted
    assert not [row["reason"] for row in rows if row["status"] != "ok"]
    for row in rows:
        assert tuple(row) == COLUMNS and row["target"] == target
        plan = PLANS[row["plan"]].plan
        assert row["fused"] == 0 and row["not_followed"] == ""
        assert bool(row["matrix"]) == (row["kernel"] == "norm_qkv" and (plan.matmul != "fp32" or target == "gfx942"))
        declared, found = (
            {word.split()[-2] for word in row[name].split(", ") if word} for name in ("declared", "ttir")
        )
        assert declared == found  # the words of a boundary: `normed bf16-rne`, `2 x out bf16-rne`
        in_code = {word.split()[0] for word in row["machine"].split(", ") if word}
        assert in_code == found - ({"out"} if "head_norm=" in row["keywords"] and plan.proj != "fp32" else set())


def test_split_k_is_audited_where_it_is_launched():
    asked = {
        target: [words["config"].kernel for _, _, words in cases(target) if "config" in words] for target in TARGETS
    }
    assert all(("split-k" in asked[target]) == (target != "gfx942") for target in TARGETS)


# ---------------------------------------------------------------- faults in the source


@dataclasses.dataclass(frozen=True)
class Planted:
    """A change of the kernels' source, and a pattern of what the audit must say about it."""

    file: str
    old: str
    new: str
    plan: str
    says: str
    kernel: str = "head_norm"
    keywords: dict = dataclasses.field(default_factory=dict)
    count: int = 1  # how often the old text stands in the file
    also: tuple[str, str] = ("", "")  # a second change of the same file


QKV, HEAD, ROUNDING = "chain.py", "head_norm.py", "rounding.py"
NORMED, OUT = "round_to(hidden * rstd[:, None], NORMED)", "round_to(head_normed * weight[None, :], OUT)"
ACC, IEEE = "dot(hidden, weight, acc, MATMUL, INTERPRETED)", 'dot(hidden, wide, acc, input_precision="ieee")'
NAN_LINE = "    rounded = tl.where(is_nan, bits | 0x00400000, rounded)\n"
NEAREST = 'if STORAGE == "bf16-rne":'


def in_qkv(old: str, new: str, plan: str, says: str, **options: object) -> Planted:
    return Planted(QKV, old, new, plan, says, "norm_qkv", **options)


def lost(role: str, to: str) -> str:
    return rf"TTIR: {role} is not rounded on its way to {to}, the plan says bf16-rne"


def instead(role: str, kind: str, to: str, due: str = "bf16-rne") -> str:
    return rf"TTIR: {role} is rounded {kind} on its way to {to}, the plan says {due}"


def kept(role: str, to: str) -> str:
    return rf"TTIR: {role} is rounded \(bf16-rne\) on its way to {to}, the plan keeps it"


PLANTED = {
    # a rounding removed
    "x": in_qkv("other=0.0)), X)", "other=0.0)), 'fp32')", "fp32", lost("x", "normed"), keywords={"residual": True}),
    "squares": in_qkv("round_to(x * x, STATISTICS)", "(x * x)", "bf16-statistics", lost("statistics", "sum"), count=2),
    "variance": in_qkv(
        "D.to(tl.float32)), VARIANCE)", "D.to(tl.float32)), 'fp32')", "bf16-statistics", lost("variance", "shifted")
    ),
    "rstd": in_qkv("eps), RSTD)", "eps), 'fp32')", "rstd-rounded", lost("rstd", "normed")),
    "deferred rstd": in_qkv("eps), RSTD)", "eps), 'bf16-rne')", "deferred", kept("rstd", "proj")),
    "normed": in_qkv(NORMED, "(hidden * rstd[:, None])", "hf", lost("normed", "hidden")),
    "proj": in_qkv("round_to(acc, PROJ)", "acc", "hf", lost("proj", "head_statistics")),
    "head squares": Planted(
        HEAD,
        "round_to(proj * proj, STATISTICS)",
        "(proj * proj)",
        "bf16-statistics",
        lost("head_statistics", "head_sum"),
    ),
    "head variance": Planted(
        HEAD,
        "DH * 1.0), VARIANCE)",
        "DH * 1.0), 'fp32')",
        "bf16-statistics",
        lost("head_variance", "head_shifted"),
    ),
    "head rstd": Planted(HEAD, "eps), HEAD_RSTD)", "eps), 'fp32')", "rstd-rounded", lost("head_rstd", "head_normed")),
    "head_normed": Planted(
        HEAD, ", HEAD_NORMED)\n    return", ", 'fp32')\n    return", "hf", lost("head_normed", "out")
    ),
    "weight offset": Planted(
        ROUNDING,
        "round_to(1.0 + widen(w), WEIGHT_OFFSET)",
        "1.0 + widen(w)",
        "gemma-bf16-offset",
        lost(r"weight_offset \(1 \+ w\)", "out"),
    ),
    # removed where bf16 is due: the matmul or the store takes the upper half
    "hidden, so cut off": in_qkv(
        "[None, :], HIDDEN)",
        "[None, :], 'fp32')",
        "bf16-operand",
        instead("hidden", r"\(bf16-rtz without NaN\)", "proj"),
    ),
    "out, so cut off": Planted(
        HEAD, OUT, "head_normed * weight[None, :]", "hf", instead("out", r"\(bf16-rtz without NaN\)", "out_ptr")
    ),
    "v, so cut off": in_qkv(
        "round_to(proj, OUT), mask", "proj, mask", "fp32", instead("proj", r"\(bf16-rtz without NaN\)", "v_ptr")
    ),
    # rounding itself
    "truncated": Planted(ROUNDING, NEAREST, "if False:", "hf", instead("head_normed", r"\(bf16-rtz\)", "out")),
    "not truncated": Planted(
        ROUNDING, NEAREST, "if True:", "truncating", instead("head_normed", r"\(bf16-rne\)", "out", "bf16-rtz")
    ),
    "ties not to even": Planted(
        ROUNDING,
        "0x7FFF + ((bits >> 16) & 1)",
        "0x8000",
        "hf",
        instead("head_normed", r"\(unknown arithmetic on bits\)", "out"),
    ),
    "NaN like a number": Planted(
        ROUNDING, NAN_LINE, "", "hf", instead("head_normed", r"\(bf16-rne without NaN\)", "out")
    ),
    "lower bits kept": Planted(
        ROUNDING,
        "(rounded & 0xFFFF0000)",
        "rounded",
        "hf",
        instead("head_normed", r"\(unknown arithmetic on bits\)", "out"),
    ),
    "tf32 a bit shorter": Planted(
        ROUNDING,
        "& 0xFFFFE000",
        "& 0xFFFFC000",
        "fp32-tf32",
        instead("hidden", r"\(unknown arithmetic on bits\)", "proj", "tf32-rtz"),
        "norm_qkv",
    ),
    # elsewhere, twice, where none is declared
    "moved from hidden to normed": in_qkv(
        NORMED,
        NORMED.replace("NORMED", "HIDDEN"),
        "one-rounding",
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
        HEAD,
        "tl.sum(squares, axis=1)",
        "round_to(tl.sum(squares, axis=1), OUT)",
        "hf",
        kept("head_sum", "head_variance"),
    ),
    "the accumulator": in_qkv(f"acc = {ACC}", f"acc = round_to({ACC}, 'bf16-rne')", "hf", kept("proj", "proj")),
    # another product
    "a tf32 dot for fp32": in_qkv(
        IEEE,
        IEEE.replace("ieee", "tf32"),
        "fp32",
        r"TTIR: the matmul is tf32, the plan says ieee; matrix instructions \S+x?f32\S* where \S+ is due",
    ),
    "no remainder of tf32": in_qkv(
        'if MATMUL == "tf32x3":', "if False:", "fp32-tf32x3", "TTIR: the remainder of tf32 was not found"
    ),
}


RMS, FUSED, SPLIT = "rms_norm.py", "norm_qkv.py", "split_k.py"
STORES_RSTD, STORES_HIDDEN, PACKED = {"stores": "rstd"}, {"stores": "hidden"}, {"packed": True}
AFTER_RSTD = {"config": Config("fused", "rstd", 64, 64, 4, 3)}
AFTER_HIDDEN = {"config": Config("fused", "hidden", 64, 64, 4, 3)}
SHARES = {"config": Config("split-k", "none", 16, 128, 8, 4), "tokens": 1}
SHARES_AFTER_RSTD = {"config": Config("split-k", "rstd", 16, 128, 8, 3)}
SMALL_SHARES = {"config": Config("split-k", "none", 32, 32, 4, 2)}
STORE_RSTD, STORE_SUMS = "rstd_ptr + offs_m, rstd", "tl.store(sums_ptrs + split * BLOCK_M * BLOCK_N, acc, mask=mask)"
ROUND_IN_SPLIT_K = ("import finish_head,", "import round_to, finish_head,")
LOADED_HIDDEN = "other=0.0)\n        else:"
CUT_OFF = r"\(bf16-rtz without NaN\)"


def in_norm(file: str, old: str, new: str, plan: str, says: str, keywords: dict, **options: object) -> Planted:
    return Planted(file, old, new, plan, says, "rms_norm", keywords, **options)


def in_config(file: str, old: str, new: str, plan: str, says: str, keywords: dict, **options: object) -> Planted:
    return Planted(file, old, new, plan, says, "norm_qkv", keywords, **options)


PLANTED |= {
    # the norm before the matmul
    "norm: rstd": in_norm(
        QKV, "eps), RSTD)", "eps), 'fp32')", "bf16-statistics", lost("rstd", "rstd_ptr"), STORES_RSTD
    ),
    "norm: squares of the rest of a row": in_norm(
        RMS,
        "round_to(more * more, STATISTICS)",
        "(more * more)",
        "bf16-statistics",
        lost("statistics", "sum"),
        STORES_RSTD,
    ),
    "norm: hidden, so cut off": in_norm(
        QKV, "[None, :], HIDDEN)", "[None, :], 'fp32')", "hf", instead("hidden", CUT_OFF, "hidden_ptr"), STORES_HIDDEN
    ),
    "norm: hidden of the deferred, so cut off": in_norm(
        QKV,
        "[None, :], HIDDEN)",
        "[None, :], 'fp32')",
        "deferred",
        instead("hidden", CUT_OFF, "hidden_ptr"),
        {"stores": "both"},
    ),
    "norm: x, so cut off": in_norm(
        QKV,
        "other=0.0)), X)",
        "other=0.0)), 'fp32')",
        "folded",
        instead("x", CUT_OFF, "hidden_ptr"),
        {"stores": "both", "residual": True},
    ),
    "norm: truncated": in_norm(
        ROUNDING, NEAREST, "if False:", "hf", instead("hidden", r"\(bf16-rtz\)", "hidden_ptr"), STORES_HIDDEN
    ),
    "norm: hidden twice": in_norm(
        RMS,
        "narrow(hidden)",
        "narrow(round_to(hidden, HIDDEN))",
        "hf",
        instead("hidden", r"twice \(bf16-rne, bf16-rne\)", "hidden_ptr"),
        STORES_HIDDEN,
    ),
    "norm: a rounded rstd": in_norm(
        RMS, STORE_RSTD, "rstd_ptr + offs_m, round_to(rstd, 'bf16-rne')", "hf", kept("rstd", "rstd_ptr"), STORES_RSTD
    ),
    "norm: the sum of squares for rstd": in_norm(
        RMS,
        STORE_RSTD,
        "rstd_ptr + offs_m, sum_of_squares",
        "hf",
        "TTIR: sum is stored to rstd_ptr, due is rstd",
        STORES_RSTD,
    ),
    # the fused kernel behind a pre-pass
    "after rstd: normed": in_config(
        QKV, NORMED, "(hidden * rstd[:, None])", "hf", lost("normed", "hidden"), AFTER_RSTD
    ),
    "after rstd: rstd rounded there": in_config(
        QKV,
        "hidden * rstd[:, None]",
        "hidden * round_to(rstd, 'bf16-rne')[:, None]",
        "hf",
        kept("rstd", "normed"),
        AFTER_RSTD,
    ),
    "after rstd: rstd computed again": in_config(
        FUSED,
        'if PREPASS != "none":\n        if',
        'if PREPASS == "":\n        if',
        "hf",
        "TTIR: statistics is computed again",
        AFTER_RSTD,
    ),
    "after hidden: hidden rounded again": in_config(
        QKV,
        LOADED_HIDDEN,
        LOADED_HIDDEN.replace("else", "    hidden = round_to(widen(hidden), 'bf16-rne')\n        else"),
        "hf",
        kept("hidden", "proj"),
        AFTER_HIDDEN,
    ),
    "after hidden: weighted again": in_config(
        QKV, 'if PREPASS == "hidden":', "if False:", "deferred", kept("a value outside the chain", "proj"), AFTER_HIDDEN
    ),
    # split-K, and its way through memory
    "split-K: rstd": in_config(QKV, "eps), RSTD)", "eps), 'fp32')", "bf16-statistics", lost("rstd", "normed"), SHARES),
    "split-K: normed twice": in_config(
        QKV,
        NORMED,
        f"round_to({NORMED}, NORMED)",
        "hf",
        instead("normed", r"twice \(bf16-rne, bf16-rne\)", "hidden"),
        SHARES_AFTER_RSTD,
    ),
    "split-K: proj": in_config(QKV, "round_to(acc, PROJ)", "acc", "hf", lost("proj", "head_statistics"), SHARES),
    "split-K: truncated": in_config(
        ROUNDING, NEAREST, "if False:", "hf", instead("hidden", r"\(bf16-rtz\)", "proj"), SHARES
    ),
    "split-K: shares stored in bf16": in_config(
        SPLIT,
        STORE_SUMS,
        STORE_SUMS.replace("acc", "round_to(acc, 'bf16-rne')"),
        "hf",
        rf"{kept('proj', 'sums_ptr')}.*{kept('proj', 'proj')}",
        SHARES,
        also=ROUND_IN_SPLIT_K,
    ),
    "split-K: shares added up in bf16": in_config(
        SPLIT,
        "acc += tl.load(sums",
        "acc = round_to(acc, 'bf16-rne') + tl.load(sums",
        "hf",
        kept("proj", "proj"),
        SHARES,
        also=ROUND_IN_SPLIT_K,
    ),
    "split-K: squares stored in bf16": in_config(
        SPLIT,
        "split * BLOCK_M, sum_of_squares",
        "split * BLOCK_M, round_to(sum_of_squares, 'bf16-rne')",
        "deferred",
        kept("sum", "squares_ptr"),
        SHARES,
        also=ROUND_IN_SPLIT_K,
    ),
    "split-K: shares added up by atomics": in_config(
        SPLIT,
        STORE_SUMS,
        "tl.atomic_add(sums_ptrs, acc, mask=mask)",
        "hf",
        "nothing is stored to sums_ptr.*does not see through tt.atomic_rmw, a load of sums_ptr that no store matches",
        SHARES,
    ),
    "split-K: a counter that is added": in_config(
        SPLIT,
        "dtype=tl.float32)\n        sum_of_squares",
        "dtype=tl.float32) + arrived.to(tl.float32)\n        sum_of_squares",
        "hf",
        "TTIR: the audit does not see through tt.atomic_rmw",
        SHARES,
    ),
    "split-K: another workspace": in_config(
        SPLIT,
        "squares_ptr + cell",
        "sums_ptr + cell",
        "deferred",
        "TTIR: sum is stored to sums_ptr, due is proj",
        SHARES,
    ),
    "split-K: a tf32 dot for fp32": in_config(
        QKV,
        IEEE,
        IEEE.replace("ieee", "tf32"),
        "fp32",
        "TTIR: the matmul is tf32, the plan says ieee; matrix",
        SMALL_SHARES,
    ),
    # q's and k's heads in one launch
    "packed: out, so cut off": Planted(
        HEAD,
        OUT,
        "head_normed * weight[None, :]",
        "hf",
        instead("out", CUT_OFF, "k_out_ptr or out_ptr"),
        keywords=PACKED,
    ),
    "packed: proj for out": Planted(
        HEAD,
        "store_head(out_ptrs, out, mask)",
        "store_head(out_ptrs, proj, mask)",
        "hf",
        "TTIR: proj is stored to k_out_ptr, due is out; TTIR: proj is stored to out_ptr, due is out",
        keywords=PACKED,
    ),
}


def planted_for(target: str) -> dict[str, Planted]:
    """Where a rounding is, TTIR says, which is the same for every target: elsewhere the cheap half is enough."""
    cheap = {name for name, f in PLANTED.items() if f.kernel == "head_norm" or "tf32" in f.plan}
    return {name: fault for name, fault in PLANTED.items() if target == "sm_90" or name in cheap}


def planted(target: str) -> Iterator[dict]:
    """Each fault of planted_for in a copy of the kernels, audited; first an unchanged copy."""
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, folder)
        for index, (name, fault) in enumerate([("unchanged", None), *planted_for(target).items()]):
            package = Path(folder) / f"planted_{index}"
            package.mkdir()
            for source in (ROOT / "kernels").glob("*.py"):
                text = source.read_text()
                if fault and source.name == fault.file:
                    assert text.count(fault.old) == fault.count, f"{fault.old!r} stands {text.count(fault.old)} times"
                    text = text.replace(*fault.also).replace(fault.old, fault.new)
                (package / source.name).write_text(text.replace("from kernels.", f"from {package.name}."))
            for module in ("norm_qkv", "split_k", "rms_norm", "head_norm"):
                kernel = f"{module}_kernel"
                setattr(harness.aot, kernel, getattr(importlib.import_module(f"{package.name}.{module}"), kernel))
            case = (fault.kernel, fault.plan, fault.keywords) if fault else ("norm_qkv", "hf", {})
            yield {"fault": name, **audit_case(target, *case)}


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_faults_in_the_source_turn_red(target: str, tmp_path: Path):
    rows = {row["fault"]: row for row in in_process("planted", target, cache=tmp_path)}
    assert rows.pop("unchanged")["status"] == "ok"
    assert rows.keys() == planted_for(target).keys()
    for name, row in rows.items():
        assert row["status"] == "red", f"{name}: {row['status']} {row['reason']}"
        assert re.search(PLANTED[name].says, row["reason"]), f"{name}: {PLANTED[name].says!r} is not in {row['reason']}"


# ---------------------------------------------------------------- faults of a compiler


def replace_one(pattern: str, new: str, which: int = 0) -> Callable[[str], str]:
    """The text with one match of the pattern replaced."""

    def change(text: str) -> str:
        match = list(re.finditer(pattern, text, re.M))[which]
        return text[: match.start()] + match.expand(new) + text[match.end() :]

    return change


def unselected(text: str) -> str:
    """PTX or AMD assembly with one rounding bypassed: what is rounded goes on in place of the result."""
    quiet = r"or\.b32 +\t(%r\d+), (%r\d+), 4194304;" if ".ptr" in text else r"v_or_b32_e32 (v\d+), 0x400000, (v\d+)"
    quieted, value = re.search(quiet, text).groups()
    if ".ptr" in text:
        return re.sub(rf"selp\.b32 +\t(%r\d+), {quieted}, .*;", rf"mov.b32 \t\1, {value};", text, count=1)
    return text


NVIDIA, AMD = "sm_90", "gfx942"
ONE_ELEMENT = "elements of head_normed left unrounded: 1"
BROKEN = {  # target, change of the machine code of head_norm under `hf`, pattern of what the audit must say
    "other addend": (
        NVIDIA, replace_one(r"(add\.s32 +\t%r\d+, %r\d+, )32767;", r"\g<1>32768;"), ONE_ELEMENT
    ),
    "other tie": (NVIDIA, replace_one(r"(bfe\.u32 .*), 16, 1;", r"\1, 17, 1;"), ONE_ELEMENT),
    "shorter cut": (
        NVIDIA,
        replace_one(r"(and\.b32 +\t%r\d+, %r\d+, )-65536;", r"\1-32768;", -1),
        "machine code: head_normed is rounded rne with lower bits kept, TTIR says bf16-rne",
    ),
    "bypassed": (NVIDIA, unselected, "machine code: .*bf16-rtz without NaN"),
    "fused": (
        NVIDIA,
        replace_one(r"add\.rn\.f32 +\t(%r\d+), (%r\d+), (%r\d+);", r"fma.rn.f32 \1, \2, \2, \3;"),
        "multiply-adds fused that TTIR has apart: 1, at standard.py",
    ),
    "added": (
        NVIDIA,
        replace_one(r"sqrt\.rn\.f32 +\t(%r\d+), (%r\d+);", r"and.b32 \2, \2, -65536;\n\tsqrt.rn.f32 \1, \2;"),
        "a value is rounded bf16-rtz without NaN where TTIR does not",
    ),
    "converted": (
        NVIDIA,
        replace_one(r"sqrt\.rn\.f32 +\t(%r\d+), (%r\d+);", r"cvt.rn.bf16.f32 %rs99, \2;\n\tsqrt.rn.f32 \1, %rs99;"),
        "a value is rounded bf16-rne where TTIR does not",
    ),
    "AMD: other addend": (
        AMD, replace_one(r"v_add3_u32 (v\d+), (v\d+), (v\d+), s\d+", r"v_add3_u32 \1, \2, \3, 0x8000"), ONE_ELEMENT
    ),
    "AMD: fused": (
        AMD,
        replace_one(r"v_add_f32_e32 (v\d+), (v\d+), (v\d+)$", r"v_fma_f32 \1, \2, \2, \3"),
        "multiply-adds fused that TTIR has apart: 1",
    ),
    "AMD: shorter cut": (
        AMD, replace_one(r"(v_and_b32_e32 v\d+, )0xffff0000(, v\d+)", r"\g<1>0xffff8000\2", -1), "lower bits kept"
    ),
}  # fmt: skip


def broken(target: str) -> Iterator[dict]:
    """The machine code of a right kernel, changed as a compiler could have; then what it takes too much of."""
    plan = PLANS["hf"].plan
    compiled, stage = compile_head_norm(plan, target), "ptx" if target == NVIDIA else "amdgcn"
    yield {"fault": "", **audit_compiled(compiled, plan, {})}
    for name, (where, change, _) in BROKEN.items():
        if where == target:
            asm = compiled.asm | {stage: change(compiled.asm[stage])}
            yield {"fault": name, **audit_compiled(dataclasses.replace(compiled, asm=asm), plan, {})}
    much = dataclasses.replace(compiled, shared=10**6, spills=100)
    yield {"fault": "resources", **audit_compiled(much, plan, {})}
    fused = compile_norm_qkv(plan, target)
    addends = re.findall(r"add\.s32 +\t%r\d+, %r\d+, 32767;", fused.asm[stage])
    for which in range(0, len(addends), 17):  # single elements, of every boundary
        text = replace_one(r"(add\.s32 +\t%r\d+, %r\d+, )32767;", r"\g<1>32768;", which)(fused.asm[stage])
        changed = dataclasses.replace(fused, asm=fused.asm | {stage: text})
        yield {"fault": f"element {which}", **audit_compiled(changed, plan, {})}
    if target == NVIDIA:
        words = {"stores": "both"}
        built = {"rms_norm": (compile_rms_norm(plan, target, **words), words)}
        built["split_k"] = (compile_norm_qkv(plan, target, **SHARES), SHARES)
        for kernel, (right, keywords) in built.items():
            text = replace_one(r"(add\.s32 +\t%r\d+, %r\d+, )32767;", r"\g<1>32768;")(right.asm[stage])
            changed = dataclasses.replace(right, asm=right.asm | {stage: text})
            yield {"fault": kernel, **audit_compiled(changed, plan, keywords)}
    other = {"wgmma.mma_async": "mma.sync", "v_mfma_f32_32x32x8_bf16": "v_mfma_f32_32x32x8_f16"}
    text = fused.asm[stage]
    for name, new in other.items():
        text = text.replace(name, new)
    yield {"fault": "matrix", **audit_compiled(dataclasses.replace(fused, asm=fused.asm | {stage: text}), plan, {})}


@pytest.mark.parametrize("target", [NVIDIA, AMD])
def test_faults_of_a_compiler_turn_red(target: str, tmp_path: Path):
    rows = {row["fault"]: row for row in in_process("broken", target, cache=tmp_path)}
    assert rows.pop("")["status"] == "ok"
    says = {name: pattern for name, (where, _, pattern) in BROKEN.items() if where == target}
    says |= {"resources": r"^1000000 bytes of shared memory, \w+ has \d+; 100 bytes of registers spilled"}
    says |= {"matrix": r"^matrix instructions \S+ where \S+ is due"}
    if target == NVIDIA:
        says |= dict.fromkeys(
            ("rms_norm", "split_k"), r"^machine code: elements of (normed|hidden) left unrounded: 1( .2 times.)?$"
        )
    elements = [row["reason"] for name, row in rows.items() if name.startswith("element")]
    if target == NVIDIA:
        single = r"machine code: elements of (\w+) left unrounded: 1"
        found = [re.fullmatch(single, reason)[1] for reason in elements]
        assert set(found) == {"normed", "hidden", "proj", "head_normed", "out"} and len(found) == 16
    assert rows.keys() == says.keys() | {name for name in rows if name.startswith("element")}
    rows = {name: row for name, row in rows.items() if name in says}
    for name, row in rows.items():
        assert row["status"] == "red" and re.search(says[name], row["reason"]), f"{name}: {row['reason']}"


# ---------------------------------------------------------------- fusion, and other people's kernels


@triton.jit
def product_and_sum(a_ptr, b_ptr, c_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(a_ptr + offs, mask=offs < n).to(tl.float32)
    b = tl.load(b_ptr + offs, mask=offs < n).to(tl.float32)
    c = tl.load(c_ptr + offs, mask=offs < n).to(tl.float32)
    product = (a * b).to(tl.bfloat16).to(tl.float32)
    tl.store(out_ptr + offs, (product + c).to(tl.bfloat16), mask=offs < n)


@triton.jit
def rms_norm(x_ptr, w_ptr, out_ptr, eps, D: tl.constexpr, BLOCK: tl.constexpr = 1024):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < D, other=0.0).to(tl.float32)
    normed = (x * tl.rsqrt(tl.sum(x * x) / D + eps)).to(tl.bfloat16)
    tl.store(out_ptr + offs, normed * tl.load(w_ptr + offs, mask=offs < D), mask=offs < D)


@triton.jit
def product(a_ptr, b_ptr, out_ptr, K, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(0, K, BLOCK):
        a = tl.load(a_ptr + offs[:, None] * K + k + offs[None, :])
        b = tl.load(b_ptr + (k + offs[:, None]) * BLOCK + offs[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(out_ptr + offs[:, None] * BLOCK + offs[None, :], acc.to(tl.bfloat16, fp_downcast_rounding="rtz"))


@triton.jit
def opaque(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(n):
        total = (total + x).to(tl.bfloat16).to(tl.float32)
    doubled = tl.inline_asm_elementwise("add.f32 $0, $1, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    while n > 0:
        doubled *= 2.0
        n -= 1
    tl.atomic_add(out_ptr + offs, total * doubled)
    bits = (x.to(tl.uint32, bitcast=True) + 0x8000) & 0xFFFF0000
    tl.store(out_ptr + BLOCK + offs, bits.to(tl.float32, bitcast=True))


THREE = "*bf16,*bf16,*bf16,*bf16,i32"


def foreign(target: str) -> Iterator[dict]:
    for fusion in (True, False):
        yield audit_foreign("test_audit:product_and_sum", target, THREE, ["BLOCK=1024"], fp_fusion=fusion)
    yield audit_foreign("test_audit:rms_norm", target, "*bf16:16,*bf16:16,*bf16:16,fp32", ["D=1000"], fp_fusion=False)
    yield audit_foreign("test_audit:product", target, "*fp32:16,*fp32:16,*bf16:16,i32:16", ["BLOCK=64", "num_warps=8"])
    yield audit_foreign("test_audit:opaque", target, "*fp32,*fp32,i32", ["BLOCK=128"])


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_foreign_kernels(target: str, tmp_path: Path):
    fused, apart, norm, matmul, blind = in_process("foreign", target, cache=tmp_path)
    for row in (fused, apart):
        assert row["ttir"] == "product bf16-rne, unclassified bf16-rne"
        assert re.match(
            r"bf16-rne of a product for arith.addf, at test_audit.py:\d+; bf16-rne of unclass", row["roundings"]
        )
    if target == "gfx942":  # which has no multiply-add in bf16
        assert (fused["status"], fused["fused"], fused["machine"]) == ("reported", 0, apart["machine"])
    else:
        assert (fused["status"], fused["fused"], fused["machine"]) == ("red", 8, "unclassified 8")
        assert fused["reason"] == "machine code: a product is not rounded, TTIR says bf16-rne"
        assert apart["machine"] == "product 8, unclassified 8"
    assert (apart["status"], apart["fused"], apart["reason"]) == ("reported", 0, "")

    assert (norm["status"], norm["ttir"]) == ("reported", "normed bf16-rne, hidden bf16-rne")
    assert re.fullmatch(r"normed (\d), hidden \1", norm["machine"])
    assert "bf16-rne of normed for hidden, at test_audit.py" in norm["roundings"]

    assert (matmul["status"], matmul["ttir"], matmul["matmul"]) == ("reported", "proj bf16-rtz", "tf32")
    assert re.search("tf32|xf32", matmul["matrix"]) and matmul["machine"].startswith("proj ")
    assert blind["not_followed"] == (
        "tt.elementwise_inline_asm, scf.while, tt.atomic_rmw, a rounding that a loop carries around, of arith.addf"
    )
    assert "unknown arithmetic on bits of load x_ptr for out_ptr" in blind["roundings"]


def fusing(target: str) -> Iterator[dict]:
    """Kernels of this repository, compiled with the fusion that they turn off."""
    compile_ = triton.compile
    triton.compile = lambda source, target, options: compile_(source, target, {**options, "enable_fp_fusion": True})
    for kernel, plan in (("norm_qkv", "hf"), ("norm_qkv", "bf16-statistics"), ("norm_qkv", "fp32-tf32x3")):
        yield audit_case(target, kernel, plan, {})


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_roundings_by_integers_survive_fusion(target: str, tmp_path: Path):
    """What is fused then are products that no plan rounds: squares into their sum, and with tf32x3 hidden, of whose
    remainder fma(normed, w, -high) is another value."""
    fused, rounded, tf32x3 = in_process("fusing", target, cache=tmp_path)
    for row in (fused, rounded, tf32x3):
        assert {word.split()[-2] for word in row["declared"].split(", ")} == {
            word.split()[0] for word in row["machine"].split(", ")
        }
    assert fused["fused"] and tf32x3["fused"] and not rounded["fused"]
    for row in (fused, tf32x3):
        assert re.fullmatch(r"machine code: multiply-adds fused that TTIR has apart: \d+, at [\w.]+:\d+", row["reason"])
    assert rounded["status"] == "ok"


REFUSED = {  # arguments of audit_foreign, and the sentence
    "no target": (("a:b", "sm_70", "", []), "unknown target 'sm_70': targets are sm_80, sm_90, sm_100, gfx942"),
    "no function": (("test_audit", "sm_90", "", []), "'test_audit' is not MODULE:FUNCTION, such as .*"),
    "no module": (("nowhere:f", "sm_90", "", []), "nowhere:f cannot be imported: .*No module named 'nowhere'"),
    "no name": (
        ("test_audit:nothing", "sm_90", "", []),
        "test_audit:nothing cannot be imported: AttributeError.*nothing.*",
    ),
    "no kernel": (
        ("test_audit:lost", "sm_90", "", []),
        "test_audit:lost is a function, not a function under @triton.jit",
    ),
    "no constant": (("test_audit:rms_norm", "sm_90", "*bf16", []), "rms_norm needs a value for D: give D=VALUE"),
    "no value": (("test_audit:rms_norm", "sm_90", "*bf16", ["D"]), "a constant is written NAME=VALUE, not 'D'"),
    "no argument": (
        ("test_audit:rms_norm", "sm_90", "", ["D=8", "E=1"]),
        "rms_norm has no argument E: it has x_ptr, .*",
    ),
    "too few types": (
        ("test_audit:rms_norm", "sm_90", "*bf16,*bf16", ["D=8"]),
        "rms_norm needs 4 types, for x_ptr, w_ptr, out_ptr, eps; 2 are given",
    ),
    "no type": (
        ("test_audit:rms_norm", "sm_90", "*bf16,*bfloat16,*bf16,fp32", ["D=8"]),
        "unknown type '\\*bfloat16': types are written like .*",
    ),
}


def refused() -> Iterator[dict]:
    for name, (arguments, _) in REFUSED.items():
        try:
            audit_foreign(*arguments)
        except ValueError as error:
            yield {"name": name, "says": str(error)}
    for arguments in (("sm_70", "norm_qkv", "hf", {}), ("sm_90", "rope", "hf", {})):
        try:
            audit_case(*arguments)
        except ValueError as error:
            yield {"name": arguments[1], "says": str(error)}


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path):
    says = {row["name"]: row["says"] for row in in_process("refused", cache=tmp_path)}
    wanted = {name: sentence for name, (_, sentence) in REFUSED.items()}
    wanted |= {
        "norm_qkv": "unknown target 'sm_70': .*",
        "rope": "unknown kernel 'rope': kernels are norm_qkv, rms_norm, head_norm",
    }
    assert says.keys() == wanted.keys()
    for name, sentence in wanted.items():
        assert re.fullmatch(sentence, says[name]), says[name]


def unnumbered() -> Iterator[dict]:
    try:
        audit_case("sm_90", "head_norm", "hf", {})
    except ValueError as error:
        yield {"says": str(error)}


def test_kernels_without_line_numbers_are_refused(tmp_path: Path):
    (row,) = in_process("unnumbered", cache=tmp_path, TRITON_DISABLE_LINE_INFO="1")
    assert row["says"] == "the kernel was compiled without line numbers: unset TRITON_DISABLE_LINE_INFO"


def test_interpreted_kernels_are_refused():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 cannot be compiled"):
        audit_case("sm_90", "norm_qkv", "hf", {})
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 cannot be compiled"):
        audit_foreign("kernels.head_norm:head_norm_kernel", "sm_90", "")


# ---------------------------------------------------------------- near misses

IDIOM = """\
	mul.rn.f32 	%r2, %r1, %r1;
	bfe.u32 	%r3, %r2, 16, 1;
	add.s32 	%r4, %r2, %r3;
	add.s32 	%r5, %r4, 32767;
	and.b32 	%r6, %r2, 2147483647;
	setp.gt.u32 	%p1, %r6, 2139095040;
	or.b32 	%r7, %r2, 4194304;
	selp.b32 	%r8, %r7, %r5, %p1;
	and.b32 	%r9, %r8, -65536;
	st.global.b32 	[%rd1], %r9;
"""
TEST = "setp.gt.u32 	%p1, %r6, 2139095040"
PACKED_TEST = """\
setp.gt.u32 	%p2, %r6, 2139095040;
	setp.gt.u32 	%p3, %r1, 2139095040;
	selp.b16 	%rs1, -1, 0, %p2;
	selp.b16 	%rs2, 1, 0, %p3;
	shl.b16 	%rs3, %rs1, 3;
	and.b16 	%rs4, %rs3, 15;
	or.b16 	%rs5, %rs4, %rs2;
	cvt.u32.u16 	%r10, %rs5;
	shr.u32 	%r11, %r10, 3;
	and.b32 	%r12, %r11, 1;
	setp.ne.b32 	%p1, %r12, 0"""
NEAR_MISSES = {
    "": ("", "", ["bf16-rne"]),
    "the upper half taken": ("and.b32 	%r9, %r8, -65536", "shr.u32 	%r9, %r8, 16", ["bf16-rne"]),
    "selected the other way": ("%r7, %r5, %p1", "%r5, %r7, %p1", ["bf16-rne without NaN"]),
    "another bit": ("%r2, 16, 1", "%r2, 15, 1", []),
    "the bit of another value": ("bfe.u32 	%r3, %r2", "bfe.u32 	%r3, %r1", []),
    "half an ulp more": ("32767", "32768", []),
    "no addend": ("%r7, %r5, %p1", "%r7, %r2, %p1", ["bf16-rtz"]),
    "infinity taken for NaN": ("2139095040", "2139095039", ["bf16-rne without NaN"]),
    "the sign tested too": ("%r6, %r2, 2147483647", "%r6, %r2, -1", ["bf16-rne without NaN"]),
    "lower bits kept": ("%r9, %r8, -65536", "%r9, %r8, -32768", ["rne with lower bits kept"]),
    "tests packed": (TEST, PACKED_TEST, ["bf16-rne"]),
    "tests packed, another bit": (TEST, PACKED_TEST.replace("r10, 3", "r10, 2"), ["bf16-rne without NaN"]),
    "tests packed, the bit masked": (TEST, PACKED_TEST.replace("15;", "7;"), ["bf16-rne without NaN"]),
    "tests packed, the other element": (TEST, PACKED_TEST.replace("r10, 3", "r10, 0"), ["bf16-rne without NaN"]),
    "tests packed, inverted": (TEST, PACKED_TEST.replace("setp.ne", "setp.eq"), ["bf16-rne without NaN"]),
    "tests packed, beyond the word": (
        TEST,
        PACKED_TEST.replace("rs1, 3", "rs1, 16").replace("r10, 3", "r10, 16"),
        ["bf16-rne without NaN"],
    ),
    "not cut off": ("[%rd1], %r9", "[%rd1], %r8", ["rne with lower bits kept"]),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_only_the_whole_idiom_is_a_rounding(name: str):
    old, new, kinds = NEAR_MISSES[name]
    assert IDIOM.count(old) == 1 or not name
    graph = ptx_graph(IDIOM.replace(old, new) if name else IDIOM)
    assert [rounding.kind for rounding in machine_roundings(graph)] == kinds
