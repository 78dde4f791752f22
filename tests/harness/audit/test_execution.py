"""The audit and the execution of the same kernels, which must agree: red is what computes otherwise than its source.

PTX is run on this CPU, and its bits are held to the source's own operations in PyTorch, each rounded where the source
rounds. Norms are identified too, and must round where the audit says. Needs no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from audit_support import in_process
from audit_triton import linear, named, narrow, norm
from torch import Tensor

BF16, FP32 = torch.bfloat16, torch.float32


@triton.jit
def rope(x_ptr, c_ptr, s_ptr, out_ptr, HALF: tl.constexpr):
    offs = tl.arange(0, HALF)
    first, second = tl.load(x_ptr + offs), tl.load(x_ptr + HALF + offs)
    c, s = tl.load(c_ptr + offs), tl.load(s_ptr + offs)
    tl.store(out_ptr + offs, first * c - second * s)
    tl.store(out_ptr + HALF + offs, second * c + first * s)


# ---------------------------------------------------------------- kernels and what their source says


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(BF16)


def rounded(value: Tensor) -> Tensor:
    return value.to(BF16).float()


TWO: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {  # of float32 values that bf16 holds
    "add": lambda a, b, c: a + b,
    "sub": lambda a, b, c: a - b,
    "mul": lambda a, b, c: a * b,
    "max": lambda a, b, c: torch.maximum(a, b),
    "muladd": lambda a, b, c: rounded(a * b) + c,
    "mulsub": lambda a, b, c: rounded(a * b) - c,
    "wide": lambda a, b, c: a * b,
    "explicit": lambda a, b, c: rounded(a * b) + c,
}


def cases(target: str) -> Iterator[tuple[triton.JITFunction, str, list[str], list[Any], Tensor]]:
    """(kernel, signature, constants, arguments before the output, the output that the source says)."""
    size, four = 512, [drawn(512), drawn(2, 256).reshape(-1), drawn(4, 128).reshape(-1)]
    for op, of in TWO.items():
        for to in ("bf16", "fp32"):
            expected = of(*(each.float() for each in four))
            exact = op in ("max", "wide", "explicit")  # else the source has a bf16 result
            expected = expected.to(BF16) if to == "bf16" else expected if exact else rounded(expected)
            types = f"*bf16:16,*bf16:16,*bf16:16,*{to}:16"
            yield narrow, types, [f"OP={op}", f"BLOCK={size}"], four, expected
    x, c, s = drawn(256), drawn(128), drawn(1, 128).reshape(-1)
    first, second, cos, sin = x[:128].float(), x[128:].float(), c.float(), s.float()
    turned = [rounded(first * cos) - rounded(second * sin), rounded(second * cos) + rounded(first * sin)]
    yield rope, ",".join(["*bf16:16"] * 4), ["HALF=128"], [x, c, s], torch.cat(turned).to(BF16)
    block, depth = (64, 128) if target == "sm_90" else (32, 64)
    a, b = ((drawn(*shape) * 4).round() for shape in ((block, depth), (block, depth)))  # sums exact in any order
    for act in ("none", "relu", "half"):
        for to in ("bf16", "fp32"):
            bias = (drawn(block) * 3).to(BF16 if to == "bf16" else FP32)
            y = a.float() @ b.float().T + bias.float()
            y = {"none": y, "relu": y.clamp(min=0), "half": y * 0.5}[act].to(BF16)
            types = f"*bf16:16,*bf16:16,*{to}:16,*bf16:16,i32:16"
            constants = [f"ACT={act}", f"BLOCK={block}", "rest_ptr=None"]
            yield linear, types, constants, [a, b, bias, depth], y


def both(target: str) -> Iterator[dict]:
    """Each kernel audited, and run: whether its bits are those of its source."""
    from castpoint.harness.audit.foreign import audit_foreign, parsed_constant
    from castpoint.harness.ptx.driver import executed

    for kernel, signature, constants, given, expected in cases(target):
        for fusion in (False, True):
            row = audit_foreign(named(kernel), target, signature, constants, fp_fusion=fusion)
            words = dict(map(parsed_constant, constants))
            out = torch.full_like(expected, float("nan"))
            arguments = [*given[:3], out, *given[3:]]  # K of linear comes behind its output
            with executed(target):
                kernel[(1,)](*arguments, **words, enable_fp_fusion=fusion)
            equal = torch.equal(out, expected)
            about = f"{kernel.__name__} {signature} {' '.join(constants)} fusion={fusion}"
            yield {"kernel": about, "status": row["status"], "reason": row["reason"], "equal": equal}


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_red_is_what_computes_otherwise_than_its_source(target: str, tmp_path: Path):
    rows = in_process(both, target, cache=tmp_path)
    assert len(rows) == 2 * (2 * len(TWO) + 7)
    for row in rows:
        assert (row["status"] == "reported") == row["equal"], row
    red = {
        row["kernel"].split()[2] if row["kernel"][0] == "n" else row["kernel"][:4] for row in rows if not row["equal"]
    }
    assert red == {"OP=muladd", "OP=mulsub", "OP=explicit", "rope"}  # products that are fused into sums
    assert all("fusion=True" in row["kernel"] for row in rows if not row["equal"])


# ---------------------------------------------------------------- norms, identified and audited


def launched(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, rounds: str) -> tuple[Tensor, Tensor]:
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    out, total, (rows, width) = torch.empty_like(x), torch.empty_like(x), x.shape
    block = triton.next_power_of_2(width)
    norm[(rows,)](x, residual, weight, out, total, eps, width, residual is not None, rounds, block, num_warps=4)
    return out, total


def as_one(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return launched(x, None, weight, eps, "")[0]


def as_hf(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return launched(x, None, weight, eps, "n")[0]


def adds(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
    return launched(x, residual, weight, eps, "")


def adds_rounded(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
    return launched(x, residual, weight, eps, "x")


def adds_as_hf(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
    return launched(x, residual, weight, eps, "xn")


NORMS = {"as_one": (0, ""), "as_hf": (0, "n"), "adds": (1, ""), "adds_rounded": (1, "x"), "adds_as_hf": (1, "xn")}


def asked() -> Iterator[dict]:
    from castpoint.harness.audit.foreign import audit_foreign
    from castpoint.harness.fingerprint.norm import identify
    from castpoint.harness.ptx.driver import executed

    for name, (add, rounds) in NORMS.items():
        with executed("sm_90"):
            answer = identify(globals()[name], "rmsnorm")
        types = ["*bf16:16"] * 5 if add else ["*bf16:16"] * 4
        words = [f"ADDS={add}", f"ROUNDS={rounds}", "BLOCK=256", *([] if add else ["res_ptr=None"])]
        row = audit_foreign(named(norm), "sm_90", ",".join([*types, "fp32", "i32:16"]), words)
        yield {"name": name, "status": answer.status, "words": answer.candidates, **row, "answer": answer.status}


def test_a_norm_rounds_where_it_is_found_to_when_it_runs(tmp_path: Path):
    """A sum that is rounded for its store alone is none of the plan's roundings: the norm does not read it."""
    rows = {row["name"]: row for row in in_process(asked, cache=tmp_path)}
    assert rows.keys() == NORMS.keys()
    for name, row in rows.items():
        assert row["answer"] == "identified" and row["status"] == "reported", row
        found = {word for word in ("x", "normed", "hidden") if row["words"][0].get(word) == "bf16-rne"}
        audited = {each.removesuffix(" bf16-rne") for each in row["ttir"].split(", ")}
        assert found == audited - {"stored x"}, (name, row["words"], row["ttir"])
        assert ("stored x" in audited) == (name == "adds")
