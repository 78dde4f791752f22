"""The command line: its groups, quick help, options that are checked before any work starts."""

import json
import re
import time
from pathlib import Path

import pytest
import torch
from commands import ROOT, command, failure
from safetensors import safe_open
from safetensors.torch import save_file

from castpoint.harness.options import select
from castpoint.variants.catalogue import PLANS


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "--model", "qwen3-0.6"], "did you mean 'qwen3-0.6b'?"),
        (["bench", "--plans", "hf,fp23"], "did you mean 'fp32'?"),
        (["bench", "--layers", "0,28"], "the model has layers 0 to 27"),
        (["bench", "--only", "amplification", "--layers", "first"], "numbers and ranges such as 0-3,8"),
        (["bench", "--only", "speed", "--device", "tpu"], "must be cpu or cuda"),
        (["bench", "--checkpoint", "missing.safetensors"], "missing.safetensors does not exist"),
        (["report", "--results", "nowhere"], "run `make bench` first"),
    ],
)
def test_wrong_arguments(capsys, monkeypatch, tmp_path: Path, arguments: list[str], words: str) -> None:
    if arguments[0] != "report":
        arguments = [*arguments, "--results", str(tmp_path / "results")]
    assert words in failure(capsys, monkeypatch, *arguments)
    assert not (tmp_path / "results").exists(), "a refused run left a results folder"


def test_a_pickle_is_never_opened(capsys, monkeypatch, tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(1)}, tmp_path / "model.bin")
    words = failure(
        capsys, monkeypatch, "bench", "--checkpoint", str(tmp_path / "model.bin"), "--results", str(tmp_path / "r")
    )
    assert "pickle" in words and "safetensors" in words


def test_a_checkpoint_is_checked_against_the_model_and_the_layers(capsys, monkeypatch, tmp_path: Path) -> None:
    sample = ["bench", "--checkpoint", str(ROOT / "tests/data/qwen2.5-coder-0.5b-layer0.safetensors")]
    results = ["--results", str(tmp_path / "results")]
    assert "qwen3-0.6b" in failure(capsys, monkeypatch, *sample, *results)
    assert "layer 0" in failure(capsys, monkeypatch, *sample, "--model", "qwen2.5-0.5b", "--layers", "0,1", *results)
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"model_type": "qwen2", "hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2}
    config |= {"num_hidden_layers": 24, "rms_norm_eps": 1e-6, "vocab_size": 8, "intermediate_size": 8}
    (folder / "config.json").write_text(json.dumps(config))
    with safe_open(sample[2], "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    names = {
        name: f"model.layers.0.self_attn.{name.replace('_proj_', '_proj.')}" for name in tensors if "_proj_" in name
    }
    names["input_layernorm_weight"] = "model.layers.0.input_layernorm.weight"
    save_file({new: tensors[old] for old, new in names.items()}, folder / "model.safetensors")
    own = ["bench", "--checkpoint", str(folder), *results]
    assert "not --model qwen3-8b: leave --model out" in failure(
        capsys, monkeypatch, *own, "--model", "qwen3-8b", "--layers", "0"
    )
    settings, _ = select(checkpoint=str(folder), layers="0", device="cpu", results=tmp_path / "results")
    assert settings.model == "qwen2.5-0.5b", "the record would name another model"


def test_a_truncated_checkpoint(capsys, monkeypatch, tmp_path: Path) -> None:
    whole = (ROOT / "tests/data/qwen2.5-coder-0.5b-layer0.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:100_000])
    arguments = ["bench", "--model", "qwen2.5-0.5b", "--layers", "0", "--results", str(tmp_path / "r")]
    assert "cut.safetensors" in failure(
        capsys, monkeypatch, *arguments, "--checkpoint", str(tmp_path / "cut.safetensors")
    )


def test_results_that_cannot_be_written_or_are_of_another_schema(capsys, monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot be written" in failure(capsys, monkeypatch, "bench", "--results", str(tmp_path / "file" / "x"))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "speed.csv").write_text("a,b\n1,2\n")
    assert "other columns" in failure(capsys, monkeypatch, "bench", "--results", str(tmp_path / "old"))
    assert (tmp_path / "old" / "speed.csv").read_text() == "a,b\n1,2\n"


def test_gpu_without_a_device_says_so(tmp_path: Path) -> None:
    result = command("gpu", "--results", str(tmp_path / "h200"), CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert (
        result.stderr.strip()
        == "error: no CUDA device here: `gpu` and --device cuda need one, `bench` measures on the CPU"
    )
    assert not (tmp_path / "h200").exists()


def test_help_is_quick() -> None:
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        result = command("--help")
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 1.5 and result.returncode == 0
    for name in "identify plans bench gpu model audit study report doctor".split():
        assert re.search(rf"\b{name}\b", result.stdout), name
    for group in (
        "Which plan?",
        "What does it cost?",
        "What does it buy?",
        "Does it matter?",
        "Is it proven?",
        "The lab",
    ):
        assert group in result.stdout
    assert "publish" not in result.stdout, "that is for maintainers"


def test_plans_are_listed() -> None:
    result = command("plans")
    assert result.returncode == 0 and all(name in result.stdout for name in PLANS)


def test_a_part_of_a_bench_prints_its_tables(tmp_path: Path) -> None:
    arguments = [
        "bench",
        "--only",
        "errors",
        "--layers",
        "0",
        "--tokens",
        "4",
        "--plans",
        "hf,fp32",
        "--device",
        "cpu",
        "--results",
        str(tmp_path),
    ]
    result = command(*arguments)
    assert result.returncode == 0, result.stderr
    assert "| hf |" in result.stdout and "K error" in result.stdout
    assert (tmp_path / "errors.csv").exists()
