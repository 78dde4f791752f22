"""Every config of a plan is that plan's function: the nets of test_kernels.py, held to each way to cut a launch.

What these nets catch is shown in test_mutation.py. That a GPU runs the same, with its own order of stores and loads, no
interpreter can show: programs run one after another here, in the usual order and in random ones.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from launches import CONFIGS, TINY, expressible
from nets import check_again, check_envelope, check_exact, check_exact_fp32, check_memory, check_order, random_case
from support import DEVICE, KERNELS, assert_bit_equal, assert_inside, random_problem

import castpoint.kernels.rms_norm
import castpoint.kernels.split_k
from castpoint.kernels.config import Config, candidates, default_config
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
    default = default_config(32, plan, interpreted=True)
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
    assert getattr(settings, name) == ((True, split_k) if allowed and split_k is not None else allowed)
