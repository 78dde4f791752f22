"""A results folder as one file, for machines from which one file comes back."""

from __future__ import annotations

import gzip
import os
import tarfile
import tempfile
import zlib
from contextlib import AbstractContextManager
from pathlib import Path

from castpoint.harness.runs.errors import UserError, mistakes, writing

ENVIRONMENT = "environment.json"  # says which runs there are: moved last, so that no half of a folder looks whole


def write(folder: Path, archive: Path) -> None:
    """The folder's files as a .tar.gz. It is written beside and moved into place, so that whoever opens it at any
    moment, or after a kill at any moment, finds a whole one. Raises UserError where there is no room."""
    draft = archive.with_name(archive.name + ".tmp")
    with writing(archive):
        archive.parent.mkdir(parents=True, exist_ok=True)
        with open(draft, "wb") as file:
            with tarfile.open(fileobj=file, mode="w:gz", compresslevel=3) as tar:
                for path in sorted(folder.rglob("*")):
                    if path.is_file() and path.suffix != ".tmp" and path.resolve() != archive.resolve():
                        tar.add(path, path.relative_to(folder).as_posix())
            file.flush()
            os.fsync(file.fileno())
        draft.replace(archive)


def unpack(archive: Path, folder: Path) -> None:
    """Its files into that folder, made where there is none. Raises UserError for what is no archive of a results
    folder, and for a folder that holds records."""
    if _holds_records(folder):
        raise UserError(f"{folder} holds records already: choose another folder for those of {archive}")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpacked-") as draft:
            with _reading(archive), tarfile.open(archive) as tar:
                tar.getmember(ENVIRONMENT)
                tar.extractall(draft, filter="data")  # nothing outside of draft, no links out of it, no devices
            found = [path for path in sorted(Path(draft).rglob("*")) if path.is_file()]
            for path in sorted(found, key=lambda path: path.name == ENVIRONMENT):
                target = folder / path.relative_to(draft)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)


def restore(archive: Path, folder: Path) -> None:
    """Before a run: the archive's files, where the folder holds no records. Raises UserError where it does and the
    archive holds more, which the run would write over."""
    if not _holds_records(folder):
        return unpack(archive, folder)
    with _reading(archive), tarfile.open(archive) as tar:
        sizes = {member.name: member.size for member in tar if member.name.endswith(".csv")}
    more = [name for name, size in sizes.items() if size > _size(folder / name)]
    if more:
        raise UserError(f"{archive} holds more rows than {folder} ({', '.join(more)}): move one of them away")


def _reading(archive: Path) -> AbstractContextManager[None]:
    """Within it whatever a file is that is no such archive, or half of one, is a UserError."""
    kinds = (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, KeyError, FileNotFoundError, IsADirectoryError)
    return mistakes(*kinds, about=f"{archive} is no archive of a results folder")


def _holds_records(folder: Path) -> bool:
    return (folder / ENVIRONMENT).exists() or any(folder.glob("*.csv"))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
