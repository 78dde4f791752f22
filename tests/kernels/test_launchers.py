"""Bad input of norm_qkv and head_norm: one line that names what is wrong and what would be right."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from support import DEVICE, NAN, ROOT, assert_bit_equal, random_problem

from castpoint.kernels.head_norm import head_norm, qk_norm
from castpoint.kernels.norm_qkv import norm_qkv
from castpoint.kernels.plan import CastPlan
from castpoint.variants.spec import with_table


def bf16(*shape: int, device: str = DEVICE, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


def outputs(**changed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple({"q": bf16(5, 2, 32), "k": bf16(5, 1, 32), "v": bf16(5, 1, 32), **changed}.values())


F32 = torch.float32
# What is wrong, and the words the error must hold: what was given, and what would be right.
BAD_INPUTS = {
    "x of three dimensions": ({"x": bf16(1, 5, 200)}, ["[1, 5, 200]", "[tokens, hidden size]"]),
    "x without channels": ({"x": bf16(5, 0)}, ["[5, 0]", "[tokens, hidden size]"]),
    "x in fp32": ({"x": bf16(5, 200, dtype=F32)}, ["x must be torch.bfloat16", "torch.float32"]),
    "norm weight too short": ({"norm_weight": bf16(199)}, ["norm_weight", "[200]", "[199]"]),
    "norm weight in fp32": ({"norm_weight": bf16(200, dtype=F32)}, ["norm_weight", ".to(torch.bfloat16)"]),
    "norm weight elsewhere": ({"norm_weight": bf16(200, device="meta")}, ["norm_weight is on meta", "x is on"]),
    "weight of other width": ({"qkv_weight": bf16(128, 100)}, ["qkv_weight", "[rows, 200]", "[128, 100]"]),
    "weight of one dimension": ({"qkv_weight": bf16(128)}, ["qkv_weight", "[rows, 200]", "[128]"]),
    "weight without rows": ({"qkv_weight": bf16(0, 200)}, ["0 rows", "4 heads"]),
    "rows that make no whole heads": ({"qkv_weight": bf16(130, 200)}, ["130 rows", "4 heads"]),
    "weight in fp16": ({"qkv_weight": bf16(128, 200, dtype=torch.float16)}, ["qkv_weight", "torch.float16"]),
    "weight elsewhere": ({"qkv_weight": bf16(128, 200, device="meta")}, ["qkv_weight is on meta", "one device"]),
    "groups that do not divide": ({"num_q_heads": 3, "num_kv_heads": 2}, ["3 query heads", "multiple"]),
    "no key heads": ({"num_kv_heads": 0}, ["0 key/value heads", "positive"]),
    "no query heads": ({"num_q_heads": 0}, ["0 query heads", "positive"]),
    "q norm alone": ({"k_norm_weight": None}, ["q_norm_weight and k_norm_weight", "together"]),
    "k norm of other size": ({"k_norm_weight": bf16(64)}, ["k_norm_weight", "[32]", "[64]"]),
    "q norm in fp32": ({"q_norm_weight": bf16(32, dtype=F32)}, ["q_norm_weight", "torch.float32"]),
    "bias too short": ({"bias": bf16(127)}, ["bias", "[128]", "[127]"]),
    "bias in fp32": ({"bias": bf16(128, dtype=F32)}, ["bias must be torch.bfloat16", "torch.float32"]),
    "residual of other shape": ({"residual": bf16(4, 200)}, ["residual", "[5, 200]", "[4, 200]"]),
    "residual elsewhere": ({"residual": bf16(5, 200, device="meta")}, ["residual is on meta"]),
    "eps of zero": ({"eps": 0.0}, ["eps must be a positive number", "1e-6", "0.0"]),
    "eps negative": ({"eps": -1e-6}, ["eps", "positive", "-1e-06"]),
    "eps infinite": ({"eps": float("inf")}, ["eps", "positive", "inf"]),
    "eps NaN": ({"eps": NAN}, ["eps", "positive", "nan"]),
    "eps in words": ({"eps": "1e-6"}, ["eps", "positive", "'1e-6'"]),
    "the name of a plan": ({"plan": "hf"}, ["plan must be a CastPlan, such as CastPlan(", "not 'hf'"]),
    "unknown storage": ({"plan": {"normed": "bf16"}}, ["normed", "fp32, bf16-rne, bf16-rtz", "'bf16'"]),
    "unknown x storage": ({"plan": {"x": "rne"}}, ["x must be one of fp32, bf16-rne, bf16-rtz", "'rne'"]),
    "unknown scale": ({"plan": {"scale": "prolog"}}, ["scale must be one of prologue, epilogue, folded", "'prolog'"]),
    "unknown matmul": ({"plan": {"matmul": "tf32x2"}}, ["matmul must be one of bf16, tf32, tf32x3, fp32", "'tf32x2'"]),
    "unknown offset": (
        {"plan": {"weight_offset": "one"}},
        ["weight_offset must be one of none, fp32, bf16-rne", "'one'"],
    ),
    "normed after the matmul": (
        {"plan": {"scale": "epilogue", "normed": "bf16-rne"}},
        ["normed must be 'fp32'", "epilogue"],
    ),
    "folded with hidden": ({"plan": {"scale": "folded"}}, ["hidden must be 'fp32'", "folded"]),
    "folded in fp32": (
        {"plan": {"scale": "folded", "hidden": "fp32", "matmul": "fp32"}},
        ["matmul must be 'bf16'", "folded"],
    ),
    "folded x in fp32": ({"plan": {"scale": "folded", "hidden": "fp32", "x": "fp32"}}, ["x rounded", "x='fp32'"]),
    "bf16 matmul of fp32": (
        {"plan": {"hidden": "fp32"}},
        ["matmul='bf16' contradicts hidden='fp32'", "needs hidden in bf16"],
    ),
    "fp32 matmul of bf16": (
        {"plan": {"matmul": "fp32"}},
        ["matmul='fp32' contradicts hidden='bf16-rne'", "same function"],
    ),
    "out in fp32": ({"out": outputs(k=bf16(5, 1, 32, dtype=F32))}, ["k must be torch.bfloat16", "torch.float32"]),
    "out in bf16": ({"out": outputs(), "plan": {"out": "fp32"}}, ["q must be torch.float32", "torch.bfloat16"]),
    "out of other shape": ({"out": outputs(v=bf16(5, 2, 32))}, ["v must have shape [5, 1, 32]", "[5, 2, 32]"]),
    "out elsewhere": ({"out": outputs(q=bf16(5, 2, 32, device="meta"))}, ["q is on meta"]),
    "out with strided heads": ({"out": outputs(q=bf16(5, 2, 64)[..., ::2])}, ["q must have contiguous heads", "64"]),
}


def with_plan(changes: dict[str, object]) -> dict[str, object]:
    """The changes with a plan in place of its words."""
    return changes | ({"plan": CastPlan(**changes["plan"])} if isinstance(changes.get("plan"), dict) else {})


def test_the_inputs_are_right_but_for_the_changes_below():
    norm_qkv(**random_problem(tokens=5).inputs(), out=outputs())


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_a_bad_input_is_named_in_one_line(case: str):
    changes, words = BAD_INPUTS[case]
    inputs = random_problem(tokens=5).inputs()
    with pytest.raises(ValueError) as error:
        norm_qkv(**{**inputs, **with_plan(changes)})
    message = str(error.value)
    assert "\n" not in message
    assert not [word for word in words if word not in message], message


BAD_HEAD_NORM = {
    "proj of two dimensions": ({"proj": bf16(5, 32)}, ["[tokens, heads, head size]", "[5, 32]"]),
    "proj with strided heads": ({"proj": bf16(5, 2, 64)[..., ::2]}, ["contiguous heads"]),
    "proj in fp16": ({"proj": bf16(5, 2, 32, dtype=torch.float16)}, ["torch.bfloat16 or torch.float32", "float16"]),
    "weight of other size": ({"weight": bf16(31)}, ["weight must have shape [32]", "[31]"]),
    "weight in fp32": ({"weight": bf16(32, dtype=F32)}, ["weight must be torch.bfloat16"]),
    "eps of zero": ({"eps": 0}, ["eps must be a positive number", "0"]),
    "the name of a plan": ({"plan": "hf"}, ["plan must be a CastPlan, such as CastPlan(", "not 'hf'"]),
    "unknown storage": (
        {"plan": {"head_rstd": "bf16-rn"}},
        ["head_rstd must be one of fp32, bf16-rne, bf16-rtz", "'bf16-rn'"],
    ),
    "out of other shape": ({"out": bf16(5, 1, 32)}, ["out must have shape [5, 2, 32]", "[5, 1, 32]"]),
    "out in bf16": ({"out": bf16(5, 2, 32), "plan": {"out": "fp32"}}, ["out must be torch.float32"]),
}


@pytest.mark.parametrize("case", BAD_HEAD_NORM)
def test_a_bad_input_of_head_norm_is_named_in_one_line(case: str):
    changes, words = BAD_HEAD_NORM[case]
    inputs = {"proj": bf16(5, 2, 32), "weight": bf16(32)}
    with pytest.raises(ValueError) as error:
        head_norm(**{**inputs, **with_plan(changes)})
    message = str(error.value)
    assert "\n" not in message
    assert not [word for word in words if word not in message], message


BAD_QK_NORM = {
    **BAD_HEAD_NORM,
    "q norm alone": ({"k_norm_weight": None}, ["q_norm_weight and k_norm_weight", "together"]),
    "weight of other size": ({"k_norm_weight": bf16(31)}, ["k_norm_weight must have shape [32]", "[31]"]),
    "weight in fp32": ({"q_norm_weight": bf16(32, dtype=F32)}, ["q_norm_weight must be torch.bfloat16"]),
    "no head of q": ({"num_q_heads": 0}, ["num_q_heads", "heads of 2", "0"]),
    "no head of k": ({"num_q_heads": 2}, ["num_q_heads", "heads of 2", "not be 2"]),
    "out of other shape": ({"out": (bf16(5, 1, 32), bf16(4, 1, 32))}, ["k must have shape [5, 1, 32]", "[4, 1, 32]"]),
    "out in bf16": ({"out": (bf16(5, 1, 32),) * 2, "plan": {"out": "fp32"}}, ["q must be torch.float32"]),
}


@pytest.mark.parametrize("case", BAD_QK_NORM)
def test_a_bad_input_of_qk_norm_is_named_in_one_line(case: str):
    changes, words = BAD_QK_NORM[case]
    inputs = {"proj": bf16(5, 2, 32), "q_norm_weight": bf16(32), "k_norm_weight": bf16(32), "num_q_heads": 1}
    with pytest.raises(ValueError) as error:
        qk_norm(**{**inputs, **with_plan(changes)})
    message = str(error.value)
    assert "\n" not in message
    assert not [word for word in words if word not in message], message


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("norm", [True, False])
def test_qk_norm_is_head_norm_of_q_and_of_k(norm: bool, rope: bool):
    problem = with_table(CastPlan(), random_problem(rope=rope, tokens=20))
    proj = torch.randn(20, 5, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)[:, :3]
    weights = (problem.q_norm_weight, problem.k_norm_weight) if norm else (None, None)
    plan, turned = CastPlan(proj="bf16-rne", head_normed="bf16-rne"), (problem.positions, problem.cos_sin_cache)
    expected = [
        head_norm(part, weight, problem.eps, *turned, plan=plan)
        for part, weight in zip((proj[:, :2], proj[:, 2:]), weights, strict=True)
    ]
    found = qk_norm(proj, *weights, 2, problem.eps, *turned, plan=plan)
    for actual, right, one in zip(found, expected, expected[::-1], strict=True):
        assert_bit_equal(actual=actual, expected=right)
        assert actual.shape != one.shape
    in_place = qk_norm(proj, *weights, 2, problem.eps, *turned, plan=plan, out=(proj[:, :2], proj[:, 2:]))
    for actual, right in zip(in_place, expected, strict=True):
        assert_bit_equal(actual=actual, expected=right)
        assert actual.untyped_storage().data_ptr() == proj.untyped_storage().data_ptr()


ON_A_CPU = """
import torch
from castpoint.kernels.head_norm import head_norm
from castpoint.kernels.norm_qkv import norm_qkv

def ones(*shape):
    return torch.ones(shape, dtype=torch.bfloat16)

for call in (lambda: norm_qkv(ones(2, 32), ones(32), ones(64, 32), 2, 1), lambda: head_norm(ones(2, 1, 16), ones(16))):
    try:
        call()
    except ValueError as error:
        print(error)
"""


def test_a_cpu_without_the_interpreter_says_how_to_get_it():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", ON_A_CPU], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 2
    for word in ("x is on the CPU", "proj is on the CPU", "TRITON_INTERPRET=1", "GPU"):
        assert word in result.stdout
