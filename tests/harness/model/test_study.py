"""What a model with a variant attached says otherwise: metrics by hand, arms against independent arithmetic, a sweep
that goes on past failures and interruptions."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import failure
from gguf.quants import QuantError
from tiny_models import IDS, differing, modules, tiny_model
from torch import Tensor, nn

from castpoint.harness.model import language_model, yardsticks
from castpoint.harness.model import study as impact
from castpoint.harness.model.attach import attached, decoder_layers, layer_problem
from castpoint.harness.model.language_model import LanguageModel, precision_for
from castpoint.harness.model.passes import Pass, forward
from castpoint.harness.model.study import (
    Arm,
    Says,
    Text,
    arms,
    following,
    layer_errors,
    parting,
    read_prompts,
    sweep_model,
    texts,
    token_errors,
)
from castpoint.harness.model.yardsticks import four_bit, in_precision, one_ulp_on_k
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import KEYS, ModelLayerRow, Row
from castpoint.variants.catalogue import plan_named
from castpoint.variants.spec import truth

KINDS = ["qwen3", "qwen2", "llama", "gemma3_text"]


def tiny_lm(model_type: str = "qwen3") -> LanguageModel:
    words = SimpleNamespace(encode=lambda text: [sum(map(ord, word)) % 64 for word in text.split()])
    return LanguageModel(tiny_model(model_type), words, "tiny", "drawn")


def bits(model: nn.Module) -> list[Tensor]:
    return [tensor.clone().view(torch.int16) for tensor in model.state_dict().values()]


def assert_untouched(model: nn.Module, before: tuple[list[Tensor], list[tuple[str, int]], Tensor]) -> None:
    own, tree, logits = before
    assert all(torch.equal(a, b) for a, b in zip(bits(model), own, strict=True)) and modules(model) == tree
    assert torch.equal(forward(model, IDS).logits, logits)
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())


def state_of(model: nn.Module) -> tuple[list[Tensor], list[tuple[str, int]], Tensor]:
    return bits(model), modules(model), forward(model, IDS).logits


# ---------------------------------------------------------------- metrics by hand


def test_layer_errors_by_hand() -> None:
    """Two tokens, two channels, one head. Of K one element is off by a bf16 ulp at 2, 2^-6; of hidden one by 1."""
    q = torch.tensor([[[1.0, 0.0]], [[0.0, 4.0]]])
    k = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
    hidden = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    reference = Pass(hidden=[hidden], q=[q], k=[k], logits=hidden)
    off = torch.tensor([[3.0, 5.0], [0.0, 2.0]])
    k_off = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0 + 2**-6]]])
    found = layer_errors(Pass(hidden=[off], q=[q], k=[k_off], logits=off), reference, 0)
    expected = {
        "max_abs": 1.0,
        "rms": 0.5,
        "rel_rms": math.sqrt((1 / 25 + 0) / 2),
        "one_minus_cosine": (1 - 29 / (5 * math.sqrt(34))) / 2,
        "k_max_abs": 2**-6,
        "k_rel_rms": 2**-7 / math.sqrt(2),
        "k_p99_ulp": 1.0,
        "attention_logit_rms": 4 * 2**-6 / math.sqrt(2) / math.sqrt(3),  # three causal logits, one of them off
    }
    assert found == pytest.approx(expected, rel=1e-14)
    assert layer_errors(reference, reference, 0) == pytest.approx(dict.fromkeys(expected, 0.0))


P = torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.06, 0.04], [0.3, 0.3001, 0.2, 0.1, 0.0599, 0.04]], dtype=torch.float64)
Q = torch.tensor([[0.4, 0.3, 0.1, 0.06, 0.04, 0.1], [0.3001, 0.3, 0.2, 0.1, 0.0599, 0.04]], dtype=torch.float64)


def check_token_errors(function: Callable[..., tuple[dict[str, float], Tensor]]) -> None:
    """Q said where P is the reference; the token behind the first position is 1. Both rows' most likely token swaps in
    the second only; of the five most likely the first row has 4 in common."""
    says, said = Says.of(Q.log() + 3), Says.of(P.log())  # logits may be shifted: 3 shows in logit_max alone
    row, change = function(says, said, [0, 1])
    kl = [
        sum(p * math.log(p / q) for p, q in zip(a, b, strict=True)) for a, b in zip(P.tolist(), Q.tolist(), strict=True)
    ]
    moved = abs(math.log(0.3 / 0.2))
    expected = {
        "logit_max": 3 + math.log(2.5),
        "kl_mean": sum(kl) / 2,
        "kl_max": max(kl),
        "top1": 0.5,
        "top5": (4 / 5 + 1) / 2,
        "dlogp_p50": moved,
        "dlogp_p99": moved,
        "dlogp_max": moved,
    }
    assert row == pytest.approx(expected, rel=1e-9) and change.tolist() == pytest.approx([moved])


def test_token_errors_by_hand() -> None:
    check_token_errors(token_errors)


def test_faulty_metrics_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):  # KL the other way round
        check_token_errors(lambda says, said, ids: token_errors(said, says, ids))
    monkeypatch.setattr(impact, "following", lambda log_p, ids: log_p[:-1].gather(1, torch.tensor([ids[:-1]]).T)[:, 0])
    with pytest.raises(AssertionError):  # log p of the token itself instead of the next
        check_token_errors(token_errors)


def test_positions_behind_the_first_chunk_count(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(70, 16, generator=torch.Generator().manual_seed(0))
    moved = logits.clone()
    moved[69] = moved[69].flip(0)
    row, _ = token_errors(Says.of(moved), Says.of(logits), list(range(16)) * 4 + [0] * 6)
    expected = F.kl_div(moved[69].double().log_softmax(-1), logits[69].double().softmax(-1), reduction="sum").item()
    assert row["kl_max"] == pytest.approx(expected) and row["kl_mean"] == pytest.approx(expected / 70)


def test_following_and_parting_by_hand() -> None:
    log_p = torch.arange(12.0).reshape(4, 3)
    assert following(log_p, [2, 0, 1, 2]).tolist() == [0.0, 4.0, 8.0]
    logits = F.one_hot(torch.tensor([0, 2, 1, 0, 2]), 3)  # a prompt of two tokens; its last position chooses 2
    assert parting(logits, 2, [2, 1, 0]) == 3
    assert parting(logits, 2, [2, 0, 0]) == 1 and parting(logits, 2, [0, 1, 0]) == 0 and parting(logits, 1, [0]) == 1


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


# ---------------------------------------------------------------- texts


def test_prompts_are_read_and_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("one\r\ntwo\r\n\r\n\r\n\r\nthré e\r\n \r\nfour\r\n".encode())
    assert read_prompts(path) == ["one two", "thré e", "four"]  # a line of blanks is blank
    path.write_text(" \n\n\t\n")
    with pytest.raises(ValueError, match="prompts.txt holds no prompt"):
        read_prompts(path)


def test_texts_are_cut_and_a_prompt_beyond_the_context_is_refused(tmp_path: Path) -> None:
    lm, path = tiny_lm(), tmp_path / "prompts.txt"
    path.write_text("a b c d e f\n\ng h")
    found = texts(lm, path, tokens=4, passages=2)
    assert [(text.source, text.number, len(text.ids)) for text in found] == [
        ("passages", 0, 4),
        ("passages", 1, 4),
        ("prompts", 0, 4),
        ("prompts", 1, 2),
    ]
    assert found[2].ids == lm.encode("a b c d") and len(texts(lm, None, 4, 8)) == 8
    path.write_text("a b\n\n" + "word " * 225)  # 256 less 32 that it writes
    with pytest.raises(ValueError, match="prompt 2 of .* has 225 tokens: the model reads 224"):
        texts(lm, path, tokens=4, passages=1)
    path.write_text("word " * 224)
    assert len(texts(lm, path, tokens=4, passages=1)) == 2


@pytest.mark.parametrize("ids", [[], [3]])
def test_a_prompt_without_two_tokens_is_refused(tmp_path: Path, ids: list[int]) -> None:
    """A tokenizer that knows no letter makes none of it: nothing can be read, and no log probability measured."""
    path = tmp_path / "prompts.txt"
    path.write_text("words")
    lm = LanguageModel(tiny_model("qwen3"), SimpleNamespace(encode=lambda text: ids), "tiny", "drawn")
    with pytest.raises(ValueError, match="no tokens"):
        texts(lm, path, tokens=4, passages=1)


# ---------------------------------------------------------------- the sweep

TEXTS = [Text("passages", 0, IDS[:12]), Text("prompts", 0, IDS[12:20])]
ARMS = ["eager", "eager, batch of 2", "eager, token by token", "one ulp on K", "float32", "4-bit weights"]


def records_at(folder: Path) -> Records:
    return Records(folder, {"model": "tiny"}, {"device": "cpu"})


def keys_of(records: Records, table: str) -> list[tuple[str, ...]]:
    return [tuple(row[name] for name in KEYS[table]) for row in records.rows(table)]


def test_a_sweep_writes_every_row(tmp_path: Path) -> None:
    lm, records = tiny_lm(), records_at(tmp_path)
    sweep_model(lm, ["hf", "truncating"], "eager", TEXTS, records)
    names = [*ARMS, "hf", "truncating"]
    assert [arm.name for arm in arms(lm, ["hf", "truncating"], "eager")] == names
    wanted = {
        ("tiny", "drawn", text.source, "0", arm, reference)
        for text in TEXTS
        for arm in names
        for reference in ("float64", "eager")
    }
    tokens, layers = records.rows("model_tokens"), keys_of(records, "model_layers")
    assert set(keys_of(records, "model_tokens")) == wanted and len(tokens) == len(wanted)
    assert sorted(layers) == sorted((*key, str(layer)) for key in wanted for layer in range(3))
    for row in [*tokens, *records.rows("model_layers")]:
        assert row["status"] == "ok" and all(row[name] != "" for name in row if name != "reason"), row
    counted = collections.Counter()
    for row in records.rows("model_dlogp"):
        counted[tuple(row[name] for name in KEYS["model_tokens"])] += int(row["tokens"])
    lengths = {"passages": 12, "prompts": 8}
    assert counted == {key: lengths[key[2]] + 32 - 1 for key in wanted}  # every token but the first, once
    for row in tokens:
        assert int(row["tokens"]) == lengths[row["text"]] + 32, row
        if row["arm"] in ("eager", "hf") and row["reference"] == "eager":
            assert float(row["kl_max"]) < 1e-2 and 0 <= int(row["parts_at"]) <= 32
        if row["arm"] == "eager" and row["reference"] == "eager":
            zero = ("logit_max", "kl_mean", "kl_max", "dlogp_max")
            assert all(float(row[name]) == 0 for name in zero) and row["top1"] == row["top5"] == "1"
    errors = {key[4]: float(row["kl_mean"]) for key, row in zip(keys_of(records, "model_tokens"), tokens, strict=True)
              if key[5] == "float64"}  # fmt: skip
    assert errors["float32"] < 1e-8 < 1e-6 < errors["eager"] < errors["4-bit weights"]


def test_an_interrupted_sweep_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, whole = tiny_lm(), records_at(tmp_path / "whole")
    sweep_model(lm, ["truncating"], "eager", TEXTS, whole)
    records, add, left = records_at(tmp_path / "cut"), Records.add, iter(range(20))

    def until_interrupted(self: Records, row: Row) -> None:
        if isinstance(row, ModelLayerRow) and next(left, None) is None:
            raise KeyboardInterrupt
        add(self, row)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Records, "add", until_interrupted)
        sweep_model(lm, ["truncating"], "eager", TEXTS, records)
    done = [key[4] for key in keys_of(records, "model_tokens") if key[5] == "eager"]
    assert len(records.rows("model_layers")) == 20 and done == ARMS[:3]  # 6 rows an arm: cut inside the fourth
    ran, listed = [], arms

    def recorded(*arguments: object) -> list[Arm]:
        own = listed(*arguments)
        return [Arm(arm.name, arm.backend, lambda ids, arm=arm: ran.append(arm.name) or arm.run(ids)) for arm in own]

    monkeypatch.setattr(impact, "arms", recorded)
    again = records_at(tmp_path / "cut")
    sweep_model(lm, ["truncating"], "eager", TEXTS, again)
    assert again.run_id == records.run_id and not set(done) & set(ran[: -len(ARMS)])
    for table in ("model_tokens", "model_layers", "model_dlogp"):
        found = keys_of(again, table)
        assert len(found) == len(set(found)) and sorted(found) == sorted(keys_of(whole, table)), table
    ran.clear()
    sweep_model(lm, ["truncating"], "eager", TEXTS, again)
    assert not ran, "a finished sweep measured again"


@pytest.mark.parametrize("error", [RuntimeError, ValueError, QuantError])
def test_an_arm_that_fails_is_a_row_and_the_sweep_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Q4_0 cannot quantise rows that are no multiple of 32, and says so by an error of its own."""

    def fails(ids: list[int]) -> Pass:
        raise error("no\nkernel")

    own = arms
    monkeypatch.setattr(impact, "arms", lambda *a: [Arm(x.name, x.backend, fails) if x.name == "4-bit weights" else x
                                                    for x in own(*a)])  # fmt: skip
    records = records_at(tmp_path)
    sweep_model(tiny_lm(), ["truncating"], "eager", TEXTS[:1], records)
    rows = [row for row in records.rows("model_tokens") if row["reference"] == "eager"]
    assert [row["arm"] for row in rows] == [*ARMS, "truncating"]
    assert [(row["status"], row["reason"]) for row in rows] == [("ok", "")] * 5 + [("failed", "no kernel"), ("ok", "")]


def test_an_arm_that_says_nan_is_a_failed_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm()

    def broken(ids: list[int]) -> Pass:
        made = forward(lm.model, ids)
        made.logits[-1, 3] = math.nan
        return made

    own = arms
    monkeypatch.setattr(impact, "arms", lambda *a: [*own(*a), Arm("broken", "eager", broken)])
    records = records_at(tmp_path)
    sweep_model(lm, ["truncating"], "eager", TEXTS[:1], records)
    rows = [row for row in records.rows("model_tokens") if row["arm"] == "broken"]
    assert [(row["status"], row["reason"]) for row in rows] == [("failed", "its logits hold NaN or infinity")]


def test_what_could_be_loaded_can_be_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before loading 8 bytes a parameter are free, so that float32 is chosen; once loaded, bf16 has taken two."""
    lm = tiny_lm()
    parameters = sum(parameter.numel() for parameter in lm.model.parameters())
    tokens = len(TEXTS[0].ids) + impact.CONTINUATION
    free = 2**30 + 48 * tokens * 64 + 8 * parameters
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free))
    assert precision_for(lm.config, "cpu", tokens) == torch.float32
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free - 2 * parameters))
    records = records_at(tmp_path)
    sweep_model(lm, ["hf"], "eager", TEXTS[:1], records)
    assert {row["reference"] for row in records.rows("model_tokens")} == {"float32", "eager"}


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompts", "missing.txt"], "--prompts missing.txt does not exist"),
        (["--prompts", "empty.txt"], "empty.txt holds no prompt"),
        (["--plans", "hf,fp23"], "did you mean 'fp32'?"),
        (["--plans", "gemma"], "is for gemma3_text, not for qwen3"),
        (["--backend", "cudnn"], "unknown backend 'cudnn'"),
        (["--device", "tpu"], "must be cpu or cuda"),
    ],
)
def test_wrong_arguments_end_in_one_line(
    capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n\n")
    monkeypatch.setattr(language_model, "load", lambda source, device, tokens: tiny_lm())
    monkeypatch.setattr(impact, "sweep_model", lambda *arguments: pytest.fail("work has started"))
    assert words in failure(capsys, monkeypatch, "model", "tiny", *arguments, "--results", "results")
    assert not (tmp_path / "results").exists(), "a refused run left a results folder"


def test_wrong_plans_and_backends_are_refused_before_the_model_is_read(capsys, monkeypatch) -> None:
    monkeypatch.setattr(language_model, "load", lambda *arguments: pytest.fail("the model was read first"))
    assert "did you mean 'fp32'?" in failure(capsys, monkeypatch, "model", "tiny", "--plans", "fp23")
    assert "unknown backend 'cudnn'" in failure(capsys, monkeypatch, "model", "tiny", "--backend", "cudnn")
