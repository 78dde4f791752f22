"""Checkpoints on the Hugging Face hub, by a client that is replaced: what is downloaded, what is said when it fails."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from tiny_checkpoints import TINY, assert_inputs, fails, inputs_of, layer_tensors, loaded, write_folder, write_sharded


def serve(monkeypatch, folder: Path) -> list[str]:
    """Replaces the download by a local folder; returns the list of the files asked for."""
    asked = []

    def download(repo: str, name: str) -> str:
        assert repo == "Qwen/Tiny"
        asked.append(name)
        if not (folder / name).is_file():
            raise EntryNotFoundError(f"404 Client Error.\n\nEntry Not Found for url: {name}.")
        return str(folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return asked


def test_hub_downloads_only_the_shards_of_the_layer(tmp_path, monkeypatch):
    asked = serve(monkeypatch, write_sharded(tmp_path / "m", "qwen3"))
    geometry, inputs = loaded("Qwen/Tiny", 1, "ignored")
    assert geometry == TINY["qwen3"]
    assert_inputs(inputs, inputs_of(layer_tensors("qwen3", 1)))
    shards = [name for name in asked if name.startswith("model-")]
    assert shards == ["model-1.safetensors", "model-2.safetensors"]


def test_hub_single_file(tmp_path, monkeypatch):
    asked = serve(monkeypatch, write_folder(tmp_path / "m", "qwen2"))
    assert_inputs(loaded("Qwen/Tiny", 2, "")[1], inputs_of(layer_tensors("qwen2", 2)))
    assert asked == ["config.json", "model.safetensors"]


def test_hub_without_safetensors(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "m", "qwen3")
    (folder / "model.safetensors").unlink()
    serve(monkeypatch, folder)
    fails("hub:Qwen/Tiny", "no model.safetensors", "index.json", source="Qwen/Tiny")
    (folder / "config.json").unlink()
    fails("hub:Qwen/Tiny", "no config.json", source="Qwen/Tiny")


def test_hub_shard_missing_from_the_repository(tmp_path, monkeypatch):
    folder = write_sharded(tmp_path / "m", "qwen3")
    (folder / "model-2.safetensors").unlink()
    serve(monkeypatch, folder)
    fails("index.json", "names the shard model-2.safetensors", source="Qwen/Tiny", layer=1)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            LocalEntryNotFoundError("An error happened.\nPlease check your connection."),
            ("cannot be reached", "local path"),
        ),
        (ConnectionError("[Errno 111]\nConnection refused"), ("cannot be downloaded", "Connection refused")),
        (RepositoryNotFoundError.__new__(RepositoryNotFoundError), ("neither a path here nor a repository",)),
        (GatedRepoError.__new__(GatedRepoError), ("is gated", "hf auth login")),
    ],
)
def test_hub_errors(monkeypatch, error, words):
    def download(repo: str, name: str) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    fails("Qwen/Tiny", *words, source="Qwen/Tiny")


def test_hub_offline_finds_cached_shards(tmp_path, monkeypatch):
    """Offline the client cannot tell a file that is not cached from one that does not exist: both must be tried."""
    folder = write_sharded(tmp_path / "m", "qwen3")

    def download(repo: str, name: str) -> str:
        if not (folder / name).is_file():
            raise LocalEntryNotFoundError("not in the disk cache")
        return str(folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert_inputs(loaded("Qwen/Tiny", 0, "")[1], inputs_of(layer_tensors("qwen3", 0)))
