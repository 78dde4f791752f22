"""Passes and yardsticks: float64 against independent arithmetic, an ulp on K, 4-bit weights; behind each the model
is as before."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import ROOT
from tiny_models import IDS, assert_untouched, differing, state_of, tiny_model
from torch import Tensor, nn

from castpoint.harness.model import yardsticks
from castpoint.harness.model.attach import attached, decoder_layers, layer_problem
from castpoint.harness.model.passes import forward
from castpoint.harness.model.yardsticks import four_bit, in_precision, one_ulp_on_k
from castpoint.variants.catalogue import plan_named
from castpoint.variants.spec import truth

KINDS = ["qwen3", "qwen2", "llama", "gemma3_text"]


# ---------------------------------------------------------------- passes


def float64_logits(model: nn.Module, ids: list[int]) -> Tensor:
    """The model of these weights in float64, written down without transformers, but for its table of float32 cosines
    and sines, which belongs to the model. Qwen3, Qwen2 and Llama."""
    c, s = model.config, {name: tensor.double() for name, tensor in model.state_dict().items()}
    cos, sin = (t[0].double() for t in model.model.rotary_emb(torch.zeros(1).float(), torch.arange(len(ids))[None]))

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * s[f"{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ s[f"{name}.weight"].T + s.get(f"{name}.bias", 0)

    x = s["model.embed_tokens.weight"][ids]
    for layer in range(c.num_hidden_layers):
        at = f"model.layers.{layer}."
        h, heads = norm(x, f"{at}input_layernorm"), []
        for n in "qkv":
            value = linear(h, f"{at}self_attn.{n}_proj").unflatten(-1, (-1, c.head_dim)).transpose(0, 1)
            if n != "v":
                value = norm(value, f"{at}self_attn.{n}_norm") if f"{at}self_attn.{n}_norm.weight" in s else value
                first, second = value.chunk(2, -1)
                value = value * cos + torch.cat([-second, first], -1) * sin
            heads.append(value if n == "q" else value.repeat_interleave(2, 0))
        q, k, v = heads
        scores = (q @ k.mT / c.head_dim**0.5).masked_fill(torch.ones(len(ids), len(ids)).triu(1).bool(), -math.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(0, 1).flatten(1), f"{at}self_attn.o_proj")
        h = norm(x, f"{at}post_attention_layernorm")
        x = x + linear(F.silu(linear(h, f"{at}mlp.gate_proj")) * linear(h, f"{at}mlp.up_proj"), f"{at}mlp.down_proj")
    return norm(x, "model.norm") @ s["lm_head.weight"].T


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
def test_float64_is_the_exact_model(kind: str) -> None:
    model = tiny_model(kind)
    with in_precision(model, torch.float64):
        made = forward(model, IDS)
    assert relative(made.logits, float64_logits(model, IDS)) < 1e-13
    stream = model.model.embed_tokens.weight[IDS].detach()  # layer 0 reads bf16: there the chain's own truth applies
    assert relative(made.k[0], truth(layer_problem(decoder_layers(model)[0], model.config, stream)).k) < 1e-14


@pytest.mark.parametrize("kind", KINDS)
def test_precisions_are_ordered_and_undone(kind: str) -> None:
    """Relative error of the logits: float32 about 1e-6, bf16 about 1e-2."""
    model = tiny_model(kind)
    before, passes = state_of(model), {}
    for dtype in (torch.float64, torch.float32):
        with in_precision(model, dtype):
            assert {p.dtype for p in model.parameters()} == {dtype}
            passes[dtype] = forward(model, IDS)
        assert_untouched(model, before)
    exact = passes[torch.float64]
    assert {t.dtype for t in (*exact.hidden, *exact.q, *exact.k, exact.logits)} == {torch.float64}
    assert 1e-8 < relative(passes[torch.float32].logits, exact.logits) < 1e-5
    assert 1e-3 < relative(before[2], exact.logits) < 0.2
    with pytest.raises(RuntimeError, match="inside"), in_precision(model, torch.float64):
        raise RuntimeError("inside")
    assert_untouched(model, before)


def test_gemmas_float64_norm_and_embedding() -> None:
    """1 + w exactly, and the embedding times the bf16 number that sqrt(64) is."""
    model = tiny_model("gemma3_text")
    norm, x = model.model.norm, torch.randn(3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with in_precision(model, torch.float64):
        found, embedded = norm(x), model.model.embed_tokens(torch.tensor([IDS]))[0]
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + norm.weight.double())
    assert relative(found, expected) < 1e-15
    assert torch.equal(embedded, model.model.embed_tokens.weight[IDS].double() * 8)


def test_norms_left_in_float32_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yardsticks, "norms", lambda model: [])
    with pytest.raises(AssertionError):
        test_float64_is_the_exact_model("qwen3")


def test_decoding_gives_the_same_tokens_in_the_same_places() -> None:
    """Of a pass whose last 8 tokens come one at a time; with the sums of `spec` K of layer 0 has the same bits."""
    for kind in KINDS:
        model = tiny_model(kind)
        with attached(model, plan_named("truncating"), "spec"):
            whole, stepwise = forward(model, IDS), forward(model, IDS, decoded=8)
            copies = forward(model, IDS, batch=3)
        for a, b in ((whole, stepwise), (whole, copies)):
            shapes = [[t.shape for t in (*p.hidden, *p.q, *p.k, p.logits)] for p in (a, b)]
            assert shapes[0] == shapes[1] and torch.equal(a.k[0], b.k[0]) and torch.equal(a.q[0], b.q[0])
            assert relative(b.logits, a.logits.double()) < 0.1
        heads = (model.config.num_key_value_heads, model.config.head_dim)
        assert whole.k[0].shape == (40, *heads) and whole.hidden[0].shape == (40, 64)


# ---------------------------------------------------------------- yardsticks


@pytest.mark.parametrize("kind", KINDS)
def test_one_ulp_moves_every_element_of_k_by_one_and_nothing_else(kind: str) -> None:
    model = tiny_model(kind)
    before, own = state_of(model), forward(model, IDS)
    with one_ulp_on_k(model):
        moved, again = forward(model, IDS), forward(model, IDS)
    step = moved.k[0].contiguous().view(torch.int16).int() - own.k[0].contiguous().view(torch.int16).int()
    assert torch.equal(step.abs(), (own.k[0] != 0).int()) and 0.4 < (step > 0).double().mean() < 0.6
    assert torch.equal(moved.q[0], own.q[0]) and torch.equal(moved.logits, again.logits)
    assert differing(moved.logits, own.logits) > 0.1
    zeros = torch.tensor([0.0, -0.0, 1.0]).bfloat16()
    kept = yardsticks._one_ulp(0, model, (), zeros)
    assert torch.equal(kept[:2].view(torch.int16), zeros[:2].view(torch.int16)) and kept[2] != 1
    assert_untouched(model, before)


def q4_0(weight: np.ndarray) -> np.ndarray:
    """ggml's Q4_0: of 32 weights the one largest in size becomes -8, the scale is kept as float16."""
    blocks = weight.reshape(-1, 32)
    largest = blocks[np.arange(len(blocks)), np.abs(blocks).argmax(-1)][:, None]
    scale = (largest / -8).astype(np.float32)
    codes = np.clip(np.trunc(blocks / scale + np.float32(8.5)), 0, 15)
    return ((codes - 8) * scale.astype(np.float16).astype(np.float32)).reshape(weight.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_four_bits_are_q4_0_in_every_matrix_of_every_layer(kind: str) -> None:
    model = tiny_model(kind)
    before, own = state_of(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    context = four_bit(model)
    for _ in range(2):
        with context():
            changed = {name for name, p in model.named_parameters() if not torch.equal(p, own[name])}
            assert changed == {name for name in own if name.endswith("_proj.weight")}
            for name in changed:
                expected = torch.from_numpy(q4_0(own[name].float().numpy())).bfloat16()
                assert differing(model.get_parameter(name), expected) < 1e-3, name  # x / d or x * (1 / d)
        assert_untouched(model, before)


WITHOUT_GGUF = """
import sys
sys.modules["gguf"] = None  # as if it were not there
from castpoint.harness.model.yardsticks import four_bit, in_precision
from torch import nn
four_bit(nn.Linear(1, 1))
print("loaded")
four_bit(nn.Linear(1, 1))()
"""


def test_gguf_is_needed_by_the_four_bit_arm_alone() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_GGUF], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "loaded\n", done.stderr
    assert "gguf" in done.stderr.splitlines()[-1] and "ModuleNotFoundError" in done.stderr
