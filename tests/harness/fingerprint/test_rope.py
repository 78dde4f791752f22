"""Kernels of q's and k's norms and RoPE: each is what was planted, and a wrong one is none."""

from __future__ import annotations

import inspect
import json
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import command
from rope_faults import WRONG
from rope_kernels import (
    HF,
    a_quarter,
    angles,
    approximate,
    first_64,
    into_new,
    mrope,
    noisy,
    normed,
    normed_and_turned,
    of_base,
    own_theta,
    packed,
    packed_into_out,
    returned,
)

from castpoint.harness.fingerprint.answer import unmet
from castpoint.harness.fingerprint.norm import identify, summary
from castpoint.harness.fingerprint.pairs import is_pair
from castpoint.harness.fingerprint.sizes import Sizes
from castpoint.kernels.plan import KEEP, PHASE_BOUNDARIES, RNE, RTZ

SECONDS = 40  # of one answer on one core, at most


def hugging_face(q, k, q_weight, k_weight, cos, sin, eps):
    """As Qwen3Attention does: types promoted, cos and sin in bf16."""

    def norm(x, weight):
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    def turn(x):
        a, b = x.chunk(2, -1)
        return x * cos.unsqueeze(1) + torch.cat([-b, a], -1) * sin.unsqueeze(1)

    return turn(norm(q, q_weight)), turn(norm(k, k_weight))


def in_place(q, k, q_norm_weight, k_norm_weight, cos_sin_cache, positions, variance_epsilon, rotary_dim, interleaved):
    assert cos_sin_cache.shape[1] == rotary_dim
    cos, sin = cos_sin_cache[positions].chunk(2, 1)
    for x, weight in ((q, q_norm_weight), (k, k_norm_weight)):
        x.copy_(normed_and_turned(x, weight, variance_epsilon, cos, sin, {}, "pairs" if interleaved else "half"))


def into_out(query, key, q_weight, k_weight, cos_cache, sin_cache, position_ids, eps, q_out, k_out):
    """Tables of cos and sin, each angle once, rows by position."""
    cos, sin = cos_cache[position_ids], sin_cache[position_ids]
    both = returned({"cos_sin": RTZ}, columns="once")(query, key, q_weight, k_weight, cos, sin, eps)
    q_out.copy_(both[0]), k_out.copy_(both[1])


def pair_of_norms(q, k, q_weight, k_weight, eps):
    return tuple(normed(x, w, eps, {"head_normed": RNE}).bfloat16() for x, w in ((q, q_weight), (k, k_weight)))


def of_angles(words):
    def fn(q, k, q_weight, k_weight, theta, pos, eps):
        cos, sin = angles(theta, pos, q.shape[-1], words)
        return returned(words, columns="once")(q, k, q_weight, k_weight, cos, sin, eps)

    return fn


EARLY, CUT = {"unrotated": RNE}, dict.fromkeys(("unrotated", "products", "out"), RTZ)
LATE = dict.fromkeys(("rotated", "products", "head_normed"), RNE)
RIGHT: dict[str, tuple[Callable[..., Any], dict[str, str]]] = {
    "Hugging Face, cos and sin in bf16": (hugging_face, HF),
    "Hugging Face's roundings of a fp32 table": (returned(HF), HF),
    "in pairs": (returned(EARLY, "interleaved", "in pairs"), EARLY | {"rotation": "interleaved"}),
    "once": (returned({"products": RNE}, columns="once"), {"products": RNE}),
    "truncating": (returned(CUT), CUT),
    "fp32 whole": (returned({"out": KEEP}), {"out": KEEP, "cos_sin": KEEP}),
    "fp32 stored, rounded before": (returned({"unrotated": RNE, "out": KEEP}), {"out": KEEP, "unrotated": RNE}),
    "norm after RoPE": (returned({"rotated": KEEP}), {"norm": "after RoPE"}),
    "norm after RoPE in bf16": (returned(LATE), LATE | {"norm": "after RoPE"}),
    "packed, in place, a table": (packed({}), {}),
    "packed, a rounded table": (packed({"cos_sin": RNE}), {"cos_sin": RNE}),
    "in place, partial by argument": (in_place, {}),
    "into out": (into_out, {"cos_sin": RTZ}),
    "packed, into out": (packed_into_out, {}),
    "packed, into new tensors": (into_new, {}),
    "64 channels of any table": (first_64, {}),
    "packed, a base": (of_base({}), dict.fromkeys(PHASE_BOUNDARIES, KEEP)),
    "a base, inv_freq in bf16": (of_base({"inv_freq": RNE}), {"inv_freq": RNE}),
    "a base, positions in bf16": (of_base({"position": RNE}), {"position": RNE}),
    "a base, positions cut": (of_base({"position": RTZ}), {"position": RTZ}),
    "a base, phase in bf16": (of_base({"phase": RNE, "cos_sin": RNE}), {"phase": RNE, "cos_sin": RNE}),
    "a base, half of the channels": (of_base({}, 0.5), {}),
    "a theta of its own": (own_theta, {}),
    "approximate powers, cos and sin": (approximate, {}),
    "angles of its own, fp32 stored": (of_angles({"head_normed": RNE, "out": KEEP}), {"head_normed": RNE, "out": KEEP}),
    "a quarter of the channels, 1 + w": (a_quarter, {"weight_offset": "fp32"}),
    "noise on few elements": (noisy, {}),
    "mRoPE of positions": (mrope({}, woven=False, made=True), {"sections": "contiguous"}),
    "mRoPE of a table, interleaved": (mrope(HF, woven=True, made=False), HF | {"sections": "interleaved"}),
    "rstd in bf16": (packed({"head_rstd": RNE}), {"head_rstd": RNE}),
    "norms alone": (pair_of_norms, {"head_normed": RNE}),
}  # fmt: skip
PLANTED = {name: KEEP for name in ("head_rstd", "head_normed", "unrotated", *PHASE_BOUNDARIES, "cos_sin", "products")}


@pytest.mark.parametrize("name", RIGHT)
def test_what_was_planted_is_found(name: str) -> None:
    fn, words = RIGHT[name]
    start = time.perf_counter()
    answer = identify(fn, "qk_norm_rope")
    seconds = time.perf_counter() - start
    print(f"one answer on {torch.get_num_threads()} core: {seconds:.1f} s")
    assert answer.status == "identified", (answer.reason, answer.nearest)
    found = answer.candidates[0]
    expected = PLANTED | {"out": RNE, "norm": "before RoPE", "rotation": "half"} | words
    assert {n: w for n, w in found.items() if n in expected} == {n: w for n, w in expected.items() if n in found}
    assert set(words) <= set(found), found
    assert seconds < SECONDS


# ---------------------------------------------------------------- what is wrong


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_not_identified(name: str) -> None:
    fn, said = WRONG[name]
    answer = identify(fn, "qk_norm_rope")
    print(answer.reason)
    assert answer.status in ("none", "error") and not answer.candidates and not answer.plans, answer
    assert re.search(said, answer.reason), answer.reason


# ---------------------------------------------------------------- how it is asked, and what is said


def test_a_call_says_what_names_do_not() -> None:
    def fn(a, b, c, d, e, norm_eps, f, g, h, i, j):
        packed(HF)(a, b, c, d, e, norm_eps, f, g, h, i, j)

    call = "fn(qkv, 2, 1, 1, 128, eps, q_weight, k_weight, cos_sin_cache, True, positions)"
    assert is_pair(fn, call) and not is_pair(fn) and not is_pair(fn, "fn(x, w, eps)")
    answer = identify(fn, "qk_norm_rope", sizes=Sizes(heads=(2, 1), head_dim=128), call=call)
    assert answer.status == "identified" and "hf" in answer.plans, answer

    def named(qkv, num_heads_q, num_heads_k, num_heads_v, head_dim, eps, q_weight, k_weight, table, neox, positions):
        heads = (num_heads_q, num_heads_k, num_heads_v, head_dim)
        packed(HF)(qkv, *heads, eps, q_weight, k_weight, table, neox, positions)

    answer = identify(named, "qk_norm_rope", call=call.replace("2, 1, 1", "4, 1, 1"))
    assert answer.status == "identified" and "hf" in answer.plans, answer
    refused = {call["result"] for call in answer.asked if call["result"] != "same"}
    assert refused == {"refused: the call says other numbers of heads, or another head_dim"}
    assert "refused with" in summary(answer) and "= the head norm and RoPE of hf" in summary(answer)


CALLS = {
    "fn(q, k, q_weight, cos, sin, eps)": "lacks k_weight",
    "fn(q, q_weight, k_weight, cos, sin, eps)": "lacks q and k or qkv",
    "fn(q, k, q_weight, k_weight, cos, eps)": "takes angles without cos or sin",
    "fn(q, k, q_weight, k_weight, cos_sin_cache, eps)": "takes angles without positions",
    "fn(q, k, q_weight, k_weight, cosine, sin, eps)": "has cosine, which is nothing",
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_cannot_be_is_one_line(call: str) -> None:
    answer = identify(hugging_face, "qk_norm_rope", call=call)
    assert answer.status == "error" and CALLS[call] in answer.reason and "\n" not in answer.reason, answer
    assert "give --call 'fn(q, k, q_weight, k_weight, cos, sin, eps)'" in answer.reason


def test_what_an_answer_is_held_to_is_listed() -> None:
    answer = identify(packed(HF), "qk_norm_rope", sizes=Sizes(eps=3e-5))
    whats = {call["what"] for call in answer.asked if call["about"] in ("call", "memory", "values", "eps", "argument")}
    assert {"q [600, 16, 128], k [600, 8, 128]", "q [33, 5, 96], k [33, 1, 96]", "positions up to 131,071"} <= whats
    assert {"rows of a packed buffer", "one channel of 2^10 to 2^18", "1.5625e-07", "3e-05", "is_neox=False"} <= whats
    assert {call["result"] for call in answer.asked} == {"same"}
    assert answer.facts["partial RoPE"] == "as asked for" and answer.facts["rotary channels"] == "all"
    assert answer.facts["q and k"] == "are written in place"
    said = summary(answer)
    assert "the same with q at position 0, x: [16, 4, 128]" in said and "rotation=half" in said


def test_a_plan_is_expected_with_its_words_of_rope() -> None:
    answer = identify(packed(HF), "qk_norm_rope")
    assert not unmet(answer, "hf", "qk_norm_rope") and "products=bf16-rne against fp32" in unmet(
        answer, "fp32", "qk_norm_rope"
    )
    answer = identify(of_base({"inv_freq": RNE}), "qk_norm_rope")
    assert unmet(answer, "fp32", "qk_norm_rope") == "inv_freq=bf16-rne against fp32" and not answer.plans
    answer = identify(returned({"rotated": KEEP}), "qk_norm_rope")
    assert unmet(answer, "fp32", "qk_norm_rope") == "norm=after RoPE against before RoPE" and not answer.plans


def test_tables_that_come_in_bf16_alone_are_said() -> None:
    def fn(q, k, q_weight, k_weight, cos_sin_cache, positions, eps):
        assert cos_sin_cache.dtype == torch.bfloat16 and positions.dtype == torch.int32
        cos, sin = cos_sin_cache[positions.long()].chunk(2, 1)
        return returned({}, columns="once")(q, k, q_weight, k_weight, cos, sin, eps)

    answer = identify(fn, "qk_norm_rope")
    assert answer.status == "identified" and answer.candidates[0]["cos_sin"] == RNE, answer
    assert answer.facts["cos and sin"] == "given in bf16: it is not known whether it would round others"


def test_a_part_of_the_channels_is_said() -> None:
    answer = identify(of_base({}, 0.5), "qk_norm_rope")
    assert answer.facts["rotary channels"] == "the first 64 of 128" and "partial RoPE" not in answer.facts
    answer = identify(pair_of_norms, "qk_norm_rope")
    assert answer.facts["RoPE"] == "not asked: it takes no angles" and "one-rounding" not in answer.plans
    assert "hf" in answer.plans and "= the head norm of hf" in summary(answer)


def test_the_command_asks_it(tmp_path: Path) -> None:
    support = Path(__file__).parents[2] / "support"
    (tmp_path / "mine.py").write_text(
        f"import sys\nsys.path.insert(0, {str(support)!r})\nfrom rope_kernels import HF, of_base, packed\n"
        "fused_qk_norm_rope, rounded = packed(HF), of_base({'inv_freq': 'bf16-rne'})\n"
    )
    target = f"{tmp_path / 'mine.py'}:"
    done = command("identify", f"{target}fused_qk_norm_rope", "--expect", "hf")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == ["guessed by its signature: --kind qk_norm_rope", "identified"]
    done = command("identify", f"{target}rounded", "--json", "--expect", "fp32")
    assert done.returncode == 1 and "inv_freq=bf16-rne against fp32" in done.stderr
    assert json.loads(done.stdout)["candidates"][0]["inv_freq"] == RNE
    for options in (["--command", "x {input} {output}"], ["--ask", str(tmp_path / "questions")]):
        done = command("identify", *options, "--kind", "qk_norm_rope")
        assert done.returncode and "qk_norm_rope is asked of MODULE:FUNCTION alone" in done.stderr
    done = command("compare", f"{target}rounded", f"{target}rounded", "--kind", "qk_norm_rope")
    assert done.returncode and "qk_norm_rope is for identify" in done.stderr


def test_a_triton_kernel_is_asked_without_a_gpu() -> None:
    kernels = Path(__file__).parents[2] / "support/rope_triton.py"
    done = command("identify", f"{kernels}:fused", "--expect", "bf16-operand")
    assert done.returncode == 0, done.stderr
    assert "refused: the callable raised ValueError: all channels are rotated" in done.stdout
    done = command("identify", f"{kernels}:by_its_width")
    assert "with rows of a packed buffer" in done.stdout.splitlines()[1], done.stdout


# ---------------------------------------------------------------- transformers' own


def qwen3(q, k, q_weight, k_weight, cos, sin, eps):
    from transformers.models.qwen3 import modeling_qwen3

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        module = modeling_qwen3.Qwen3RMSNorm(x.shape[-1], eps)
        return torch.func.functional_call(module, {"weight": weight}, (x,)).transpose(0, 1)[None]

    both = modeling_qwen3.apply_rotary_pos_emb(norm(q, q_weight), norm(k, k_weight), cos[None], sin[None])
    return tuple(x[0].transpose(0, 1) for x in both)


def qwen3_vl(q, k, q_weight, k_weight, rope_theta, position_ids, eps, mrope_section):
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

    dim = q.shape[-1]
    inv_freq = 1.0 / (rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))
    module = SimpleNamespace(inv_freq=inv_freq, attention_scaling=1.0, mrope_section=mrope_section)
    recompose = Qwen3VLTextRotaryEmbedding.recomposition_frequencies
    module.recomposition_frequencies = partial(recompose, module)
    forward = Qwen3VLTextRotaryEmbedding.forward
    cos, sin = inspect.unwrap(forward)(module, q, position_ids[:, None])
    return qwen3(q, k, q_weight, k_weight, cos[0], sin[0], eps)


@pytest.mark.parametrize("fn", [qwen3, qwen3_vl])
def test_transformers_own_are_hf(fn: Callable[..., Any]) -> None:
    pytest.importorskip("transformers")
    answer = identify(fn, "qk_norm_rope")
    assert answer.status == "identified" and "hf" in answer.plans, answer
    words = {name: answer.candidates[0].get(name) for name in ("cos_sin", "rotation", "sections", "phase")}
    other = {"sections": "interleaved", "phase": KEEP} if fn is qwen3_vl else {"sections": None, "phase": None}
    assert words == {"cos_sin": RNE, "rotation": "half"} | other
