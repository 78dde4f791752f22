"""Config: what contradicts itself is refused, what cannot express a plan says so, candidates fit their shape."""

from __future__ import annotations

import pytest
from launches import CONFIGS, TINY, expressible
from support import random_problem

from castpoint.kernels.config import Config, candidates, split_shares, unsupported
from castpoint.variants.backends import run_triton
from castpoint.variants.catalogue import PLANS

SHAPES = {  # channels, heads, channels of a head
    "qwen3-0.6b": (1024, 32, 128),
    "qwen3-4b": (2560, 48, 128),
    "qwen3-32b": (5120, 80, 128),
    "qwen2.5-0.5b": (896, 18, 64),
    "gemma-3-270m": (640, 6, 256),
    "tiny": (48, 4, 16),
}


# ---------------------------------------------------------------- what a config cannot do


@pytest.mark.parametrize("plan", PLANS)
def test_unsupported_says_what_raises(plan: str):
    """Of every candidate of every shape, without a launch: there are no tokens."""
    plan = PLANS[plan].plan
    problem = random_problem(**{**TINY, "tokens": 0}, weight_offset=plan.weight_offset != "none")
    found = {c for tokens in (1, 16, 64, 256) for shape in SHAPES.values() for c in candidates(tokens, *shape)}
    for config in {*found, *CONFIGS.values()}:
        why = unsupported(config, plan)
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
    why = unsupported(CONFIGS[config], PLANS[plan].plan)
    assert not [word for word in words if word not in why], why


def test_what_each_config_can_express():
    """All that hidden, scale and proj allow: nothing is refused without need."""
    counts = {config: sum(1 for _plan, c in expressible() if c == config) for config in CONFIGS}
    bf16 = sum(entry.plan.matmul == "bf16" for entry in PLANS.values())
    assert counts["split-k"] == counts["split-k after rstd"] == counts["fused after rstd"] == len(PLANS)
    assert counts["fused after hidden"] == counts["split-k after hidden"] == bf16
    separate = [plan for plan, config in expressible() if config == "separate"]
    assert {"hf", "one-rounding", "separate-head-norm", "rstd-rounded", "bf16-statistics", "gemma"} <= set(separate)
    assert unsupported(CONFIGS["separate"], PLANS["hf"].plan.replace(out="fp32"))


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
