"""Two kernels compared: one function or not, the boundary at which they part, and a smallest input on which they do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from commands import command
from safetensors.torch import save_file
from torch import Tensor

from castpoint.harness.fingerprint import known
from castpoint.harness.fingerprint.comparison import compare
from castpoint.harness.fingerprint.sizes import ANY, Sizes
from castpoint.harness.fingerprint.stores import round_to
from castpoint.kernels.plan import KEEP, RNE, RTZ
from castpoint.variants.catalogue import HF
from castpoint.variants.eager import eager_norm

NORMS = """
import torch
import torch.nn.functional as F


def hf(x, weight, eps):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def one_rounding(x, weight, eps):
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)
"""


def hf(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return eager_norm(x, weight, eps, False)


def one_rounding(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def by_formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    total = wide.pow(2).sum(-1, keepdim=True)
    return (wide * torch.rsqrt(total / x.shape[-1] + eps) * weight.float()).bfloat16()


def in_company(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Another norm where there are many rows."""
    return one_rounding(x, weight, eps) if len(x) > 16 else hf(x, weight, eps)


def test_norms_part_at_the_first_boundary_on_a_small_input() -> None:
    found = compare(hf, one_rounding, "rmsnorm", "cpu", ANY)
    assert found.same is False and found.parts == "normed, bf16-rne against fp32"
    given, _, said = found.smallest.partition(", weight ")
    weight, value = float(said.split(",")[0]), said.rpartition(" is ")[2]
    numbers = {int(p.split("]")[0]): float(p.split("= ")[1]) for p in given.split("x[")[1:] for p in [p.rstrip(", ")]}
    assert 1 <= len(numbers) <= 4, found.smallest  # made again from what is said
    x, w = torch.zeros(1, 256), torch.ones(256)
    for place, number in numbers.items():
        x[0, place] = number
    channel = int(said.split("channel ")[1].split(" ")[0])
    w[channel] = weight
    a, b = (fn(x.bfloat16(), w.bfloat16(), 1e-6)[0, channel].item() for fn in (hf, one_rounding))
    assert a != b and value == f"{a:.9g} against {b:.9g}"


def test_one_function_in_two_ways_of_writing() -> None:
    found = compare(one_rounding, by_formula, "rmsnorm", "cpu", ANY)
    assert found.same is True and found.bits.startswith("the same bits") and not found.smallest
    assert found.line.startswith("one plan: the same bits")


def test_what_differs_in_company_alone_is_said() -> None:
    found = compare(hf, in_company, "rmsnorm", "cpu", ANY)
    assert not found.same and "alone none of them differs" in found.smallest, found
    assert found.second.status == "none"


@pytest.mark.parametrize(
    ("plan", "parts"), [(HF.replace(head_normed=KEEP), "head_normed, bf16-rne against fp32"), (HF, "")]
)
def test_chains(plan: object, parts: str) -> None:
    found = compare(known.chain(HF, "eager"), known.chain(plan, "eager"), "qkv", "cpu", ANY)
    assert found.same == (not parts) and found.parts == parts, found
    assert (
        not parts
        or found.smallest.startswith("x [1, 256], zero but x[")
        and ("q" in found.smallest or "k" in found.smallest)
    )


Write = Callable[[Path], Path]


def recorded(path: Path, fn: Callable[..., Tensor], scale: float = 1.0) -> str:
    rng = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 1024, generator=rng).bfloat16() * scale, torch.rand(1024, generator=rng).bfloat16()
    tensors = {"x": x, "weight": weight, "y": fn(x, weight, 1e-6)}
    save_file(tensors, path, metadata={"eps": "1e-6"})
    return str(path)


def test_the_command_compares_functions_programs_and_captures(tmp_path: Path) -> None:
    (tmp_path / "norms.py").write_text(NORMS)
    hf_, one = (f"{tmp_path / 'norms.py'}:{name}" for name in ("hf", "one_rounding"))
    done = command("compare", hf_, one)
    assert done.returncode == 1, done.stderr
    first, *others = done.stdout.splitlines()
    assert first.startswith("two functions, which part at normed, bf16-rne against fp32: ")
    assert others[0].startswith(f"{hf_}: identified, hf") and others[2].startswith(
        "a smallest input: x [1, 256], zero but"
    )
    same = command("compare", hf_, hf_, "--json")
    assert same.returncode == 0 and json.loads(same.stdout)["same"] is True
    a, b = (recorded(tmp_path / f"{name}.safetensors", fn) for name, fn in (("a", hf), ("b", one_rounding)))
    done = command("compare", a, b)
    assert done.returncode == 1 and " elements differ" in done.stdout and "a smallest input: token " in done.stdout
    assert command("compare", a, a).returncode == 0


def test_what_cannot_be_compared_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "norms.py").write_text(NORMS)
    fn = f"{tmp_path / 'norms.py'}:hf"
    a, b = recorded(tmp_path / "a.safetensors", hf), recorded(tmp_path / "b.safetensors", hf, 2.0)
    for words, line in (
        ((fn, a), "a capture is compared with a capture"),
        ((a, b), "has another x than"),
        ((a, a, "--tokens", "5"), "captures say all but --heads by themselves"),
        (("p {input} {output}", "q {input} {output}"), "two programs need --kind"),
        ((fn, f"{fn}x"), "cannot be imported"),
        ((fn, fn, "--kind", "norm"), "--kind must be one of"),
    ):
        done = command("compare", *words)
        assert done.returncode == 1 and line in done.stderr and len(done.stderr.splitlines()) == 1, (words, done.stderr)


def adds(storage: str, returned: bool) -> Callable[..., object]:
    def fn(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> object:
        total = x.float() + residual.float()
        y = hf(total.to(x.dtype), weight, eps)
        return (y, round_to(total, storage).to(x.dtype)) if returned else y

    return fn


def in_8_bits(times: float) -> Callable[..., tuple[Tensor, Tensor]]:
    def fn(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y = hf(x, weight, eps).float()
        scale = (y.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-12)
        return (y / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale * times

    return fn


def in_blocks(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return hf(x, weight[:1024].repeat(8)[: x.shape[-1]], eps)


SAME_Y = {  # two functions that store the same y of the first inputs
    "another sum": (adds(RNE, True), adds(RTZ, True), "x + residual, given back against given back as bf16-rtz"),
    "no sum": (adds(RNE, True), adds(RNE, False), "x + residual, given back against not given back"),
    "no residual": (adds(RNE, True), hf, "x + residual, given back against no residual"),
}


@pytest.mark.parametrize("name", SAME_Y)
def test_what_is_returned_beside_y_parts_too(name: str) -> None:
    first, second, parts = SAME_Y[name]
    found = compare(first, second, "rmsnorm", "cpu", ANY)
    assert found.same is False and found.parts == parts


def test_scales_and_wide_rows_are_compared() -> None:
    assert compare(in_8_bits(1), in_8_bits(2), "rmsnorm", "cpu", ANY).same is False
    assert compare(in_8_bits(1), in_8_bits(1), "rmsnorm", "cpu", ANY).same
    found = compare(hf, in_blocks, "rmsnorm", "cpu", Sizes(width=8192))
    assert not found.same and found.bits.endswith("(128 rows of 8192)")
