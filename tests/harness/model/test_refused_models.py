"""Language models that are refused, in one line and before any weight is read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import saved, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from castpoint.harness.model import language_model
from castpoint.harness.model.language_model import (
    load,
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


def test_a_missing_tokenizer_is_named(tmp_path: Path, no_weights: None) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path / "m")
    assert "a tokenizer cannot be read" in refusal(tmp_path / "m")


def test_a_pickle_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: pytest.fail("a pickle was opened"))
    folder = saved(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model("qwen3").state_dict(), folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "safetensors" in message and str(folder) in message
    assert "pickle" in refusal(folder / "pytorch_model.bin")
    assert "pickle" in refusal(tmp_path / "not-there.pt")


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    ran = tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')\n")
    config = '{"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}'
    (folder / "config.json").write_text(config)
    refusal(folder)
    assert not ran.exists()


def test_an_unsupported_architecture_is_named(tmp_path: Path, no_weights: None) -> None:
    AutoConfig.for_model("olmo2").save_pretrained(tmp_path)
    said = refusal(tmp_path)
    assert "unsupported model type 'olmo2', which has no norm before its projections: supported are qwen2, " in said


@pytest.mark.parametrize("source", ["nowhere", "no/such/folder", "./m", "qwen3-0.6", "m.gguf", "a b/c", ""])
def test_a_nonsense_path_says_what_would_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(source)
    assert source in message and ("a hub id" in message or not source)


def test_one_file_of_a_model_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    assert "give the folder" in refusal(folder / "model.safetensors")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\3\0\0\0")
    assert "cut.gguf" in refusal(tmp_path / "cut.gguf")


def test_broken_files_are_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "safetensors weights cannot be read" in refusal(folder)
    (folder / "config.json").write_text("{")
    assert "config.json cannot be read" in refusal(folder)
    (folder / "config.json").unlink()
    assert "config.json cannot be read" in refusal(folder)


def test_weights_that_do_not_fill_the_model_are_refused(tmp_path: Path) -> None:
    """transformers draws what a checkpoint lacks at random and says so in a log: a record of that would be nonsense."""
    from safetensors.torch import load_file, save_file

    folder = saved(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "model.layers.1.self_attn.k_proj.weight" in refusal(folder)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    config = saved(tmp_path / "m") / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 96', '"intermediate_size": 128'))
    assert "safetensors weights cannot be read" in refusal(tmp_path / "m")


def test_a_hub_id_is_read_through_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "m")
    asked = []

    def there(own: Callable[..., object], name: object, **options: object) -> object:
        asked.append((name, options.get("trust_remote_code", False)))
        return own(folder, **options)

    for auto in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):
        monkeypatch.setattr(auto, "from_pretrained", functools.partial(there, auto.from_pretrained))
    lm = load("some/model")
    assert asked.count(("some/model", False)) == 3 and not any(trusted for _, trusted in asked)
    assert lm.name == "model" and torch.equal(lm.model.lm_head.weight, tiny_model("qwen3").lm_head.weight)


def test_without_a_network_a_hub_id_ends_in_one_line(monkeypatch: pytest.MonkeyPatch, no_weights: None) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "castpoint-tests/not-there" in refusal("castpoint-tests/not-there")
