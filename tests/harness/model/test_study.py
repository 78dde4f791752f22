"""A whole-model study: its texts, and a sweep that goes on past failures and interruptions."""

from __future__ import annotations

import collections
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import failure
from gguf.quants import QuantError
from tiny_models import IDS, tiny_lm, tiny_model

import castpoint.harness.__main__ as cli
from castpoint.harness.model import language_model
from castpoint.harness.model import study as impact
from castpoint.harness.model.language_model import LanguageModel, precision_for
from castpoint.harness.model.passes import Pass, forward
from castpoint.harness.model.study import (
    Arm,
    Text,
    arms,
    read_prompts,
    sweep_model,
    texts,
)
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import KEYS, ModelLayerRow, Row

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


def test_every_fixed_passage_is_another_and_is_read_by_default() -> None:
    passages = read_prompts(impact.PASSAGES)
    assert len(passages) == cli.MODEL_PASSAGES == len(set(passages)) >= 32


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
        (["--plans", "gemma"], "is for gemma3_text and gemma, not for qwen3"),
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
