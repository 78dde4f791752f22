"""Language models: what loads comes back bit for bit, and fits into memory or is refused before."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from tiny_models import add_tokenizer, saved, tiny_config, tiny_model, write_gguf
from transformers import AutoModelForCausalLM

from castpoint.harness.model import language_model
from castpoint.harness.model.language_model import (
    load,
    norms,
    precision_for,
    set_eps,
)
from castpoint.harness.runs.errors import UserError


def refusal(source: object) -> str:
    """What load says of a source that it must refuse, in one line."""
    with pytest.raises(UserError) as caught:
        load(str(source))
    assert "\n" not in str(caught.value), repr(caught.value)
    return str(caught.value)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading weights fails the test."""

    def read(*arguments: object, **options: object) -> None:
        pytest.fail("weights were read before the model was refused")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read)
    monkeypatch.setattr(language_model, "calibrated_model", read)


def free_memory(monkeypatch: pytest.MonkeyPatch, amount: float) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=int(amount)))


# ---------------------------------------------------------------- what loads


@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama", "gemma3_text"])
def test_a_folder_comes_back_bit_for_bit(tmp_path: Path, model_type: str) -> None:
    lm = load(str(saved(tmp_path / "tiny-model", model_type)))
    own, state = tiny_model(model_type).state_dict(), lm.model.state_dict()
    assert own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16} and not lm.model.training
    assert (lm.name, lm.weights) == ("tiny-model", "checkpoint")
    if model_type != "qwen2":  # transformers makes every Qwen2 tokenizer one of byte pairs, which this is not
        assert lm.encode("it was the best") == [1, 2, 3, 4] and lm.encode("it is") == [1, 0]
    assert lm.config.model_type == model_type


def test_shards_are_joined(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    own, state = tiny_model("qwen3").state_dict(), load(str(folder)).model.state_dict()
    assert all(torch.equal(own[name], state[name]) for name in own)
    sorted(folder.glob("*.safetensors"))[1].unlink()
    refusal(folder)


def test_wider_weights_are_rounded_to_bf16(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3", 1), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    add_tokenizer(tmp_path)
    own, state = model.state_dict(), load(str(tmp_path)).model.state_dict()
    assert all(torch.equal(own[name].bfloat16(), state[name]) for name in own)


def test_what_made_the_weights_is_kept(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    config = folder / "config.json"
    config.write_text(config.read_text().replace("{", '{"made_from": "GGUF, dequantised to bf16",', 1))
    assert load(str(folder)).weights == "GGUF, dequantised to bf16"


def test_gguf_weights_and_eps_come_back(tmp_path: Path) -> None:
    lm = load(str(write_gguf(tmp_path / "m.gguf", "qwen2")))
    own, state = tiny_model("qwen2").state_dict(), lm.model.state_dict()
    assert own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own)
    assert lm.weights == "GGUF, dequantised to bf16" and lm.encode("abc") == [62, 51]
    assert lm.config.rms_norm_eps == 1e-6 and {norm.variance_epsilon for norm in norms(lm.model)} == {1e-6}


def test_a_gguf_file_of_other_heads_than_transformers_thinks_is_refused(tmp_path: Path) -> None:
    """Of a Qwen3 file it does not read the head size, and takes 128; this one has 32."""
    assert "m.gguf" in refusal(write_gguf(tmp_path / "m.gguf", "qwen3"))


def test_eps_reaches_every_norm() -> None:
    for model_type, per_layer in (("qwen3", 4), ("qwen2", 2), ("gemma3_text", 6)):
        model = AutoModelForCausalLM.from_config(tiny_config(model_type, 2))
        found = norms(model)
        assert len(found) == 2 * per_layer + 1
        set_eps(model, 0.25)
        x = torch.ones(1, found[0].weight.numel())
        found[0].weight.data.fill_(0.0 if model_type == "gemma3_text" else 1.0)
        assert torch.allclose(found[0](x), x / 1.25**0.5) and model.config.rms_norm_eps == 0.25


# ---------------------------------------------------------------- memory


def test_too_little_memory_is_said_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_weights: None
) -> None:
    folder = saved(tmp_path / "m")
    free_memory(monkeypatch, 2**29)
    message = refusal(folder)
    assert "0.2 million" not in message and "needs 1.0 GiB" in message and "0.5 GiB are free" in message
    calibrated = refusal("qwen3-0.6b")  # 441 million x 8 bytes and 1 GiB
    assert "441 million parameters needs 4.3 GiB" in calibrated
    free_memory(monkeypatch, 2**40)
    with pytest.raises(BaseException, match="weights were read"):  # the fixture sees what it should
        load(str(folder))


def test_float64_where_it_fits_else_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """12 bytes a parameter or 8, and 1 GiB and logits on top, to the byte. Tied parameters count once."""
    config = tiny_config("qwen3")
    parameters = sum(parameter.numel() for parameter in tiny_model("qwen3").parameters())
    work = 2**30 + 48 * 100 * 64
    for free, expected in ((12, torch.float64), (11.99, torch.float32), (8, torch.float32)):
        free_memory(monkeypatch, free * parameters + work)
        assert precision_for(config, "cpu", 100) == expected
    free_memory(monkeypatch, 8 * parameters + work - 1)
    with pytest.raises(ValueError, match="float32 copies"):
        precision_for(config, "cpu", 100)
    config.tie_word_embeddings = True
    free_memory(monkeypatch, 8 * (parameters - 64 * 64) + work)
    assert precision_for(config, "cpu", 100) == torch.float32


def test_more_tokens_need_more_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_weights: None) -> None:
    folder = saved(tmp_path / "m")
    free_memory(monkeypatch, 2**30 + 2**28)
    with pytest.raises(ValueError, match="GiB are free"):
        load(str(folder), tokens=2**28 // (48 * 64) + 1)
    with pytest.raises(BaseException, match="weights were read"):
        load(str(folder), tokens=2**27 // (48 * 64))


@pytest.mark.parametrize(
    ("source", "name"),
    [("Qwen/Qwen3-0.6B", "Qwen3-0.6B"), ("meta-llama/Llama-3.2-1B", "Llama-3.2-1B"), ("x/y-1.5.gguf", "y-1.5")],
)
def test_a_model_keeps_its_whole_name(source: str, name: str) -> None:
    assert language_model.name_of(source) == name


def test_a_folder_is_called_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Qwen3-0.6B").mkdir()
    monkeypatch.chdir(tmp_path / "Qwen3-0.6B")
    assert language_model.name_of(".") == language_model.name_of("../Qwen3-0.6B/") == "Qwen3-0.6B"
