"""Files of a checkpoint: found in a folder or on the hub, opened without reading a tensor.

What cannot be had is a UserError of one line. A pickle is never opened. gguf and huggingface_hub are imported where a
source needs them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from castpoint.harness.runs.errors import UserError, mistakes, reason_of

if TYPE_CHECKING:
    from gguf import ReaderTensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Stored:
    """A tensor lying in a checkpoint: its shape, known from the header, and how to read it, whole or, where cut is
    given, some rows and columns of it (of a vector, some of its elements, the columns without meaning)."""

    shape: list[int]
    read: Callable[[], Tensor]
    cut: Callable[[slice, slice], Tensor] | None = None


def open_safetensors(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Every tensor of the file, unread, and the file's metadata. safetensors checks the header against the size."""
    refuse_pickle(path)
    with mistakes(SafetensorError, OSError, about=f"{path} is truncated or no safetensors file"):
        file = safe_open(path, framework="pt")
    stored = {}
    for name in file.keys():
        held = file.get_slice(name)
        stored[name] = Stored(held.get_shape(), partial(file.get_tensor, name), partial(_cut, held))
    return stored, file.metadata() or {}


def _cut(held: Any, rows: slice, columns: slice) -> Tensor:
    part: Tensor = held[rows] if len(held.get_shape()) == 1 else held[rows, columns]
    return part


def dequantised_part(tensor: ReaderTensor, subtract_one: bool, rows: slice, columns: slice) -> Tensor:
    """float32, as dequantised, of these rows and columns; no block without one of them is dequantised."""
    import gguf

    if len(tensor.shape) == 1:
        return dequantised(tensor, subtract_one)[rows]
    block, size = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    unit = size if tensor.data.dtype == np.uint8 else block  # elements of data that hold a block
    first, last, _ = columns.indices(int(tensor.shape[0]))
    left, right = first // block, -(-last // block)
    data = np.ascontiguousarray(tensor.data[rows, left * unit : right * unit])
    part = dequantised(tensor._replace(data=data), subtract_one)
    return part[:, first - left * block : last - left * block]


def dequantised(tensor: ReaderTensor, subtract_one: bool) -> Tensor:
    """float32 [rows, columns], copied out of the mapped file."""
    import gguf

    with mistakes(NotImplementedError, about=f"gguf cannot read {tensor.name}, stored as {tensor.tensor_type.name}"):
        values = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    return torch.from_numpy(values) - 1 if subtract_one else torch.from_numpy(values)


def read_json(path: Path) -> dict[str, object]:
    with mistakes(ValueError, about=f"{path} is not JSON"):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def local_file(folder: Path, *names: str) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES) if WEIGHTS in names else []
    hint = f": {pickles[0]} is a pickle, which is never opened, convert it to safetensors" if pickles else ""
    raise UserError(f"{folder} holds no {' and no '.join(names)}{hint}")


def hub_file(repo: str, *names: str) -> Path:
    from huggingface_hub import errors, hf_hub_download

    problem = f"hub:{repo} holds no {' and no '.join(names)}"
    for name in names:
        try:
            return Path(hf_hub_download(repo, name))
        except errors.GatedRepoError:
            problem = f"hub:{repo} is gated: accept its licence on the hub and log in with `hf auth login`"
        except errors.RepositoryNotFoundError:
            problem = f"{repo} is neither a path here nor a repository on the Hugging Face hub: check the spelling"
        except errors.LocalEntryNotFoundError:  # not final: offline, the next name may lie in the cache
            problem = f"{name} of hub:{repo} is not in the cache and the hub cannot be reached: give a local path"
        except errors.EntryNotFoundError:
            continue
        except Exception as error:  # the client passes on errors of its transport, which change with its version
            problem = f"{name} of hub:{repo} cannot be downloaded: {reason_of(error)}"
    raise UserError(problem)


def hub_id(source: str, instead: str) -> str:
    """That source, which is no path here. Raises UserError, with what to give instead, where it is no hub id either."""
    if HUB_ID.fullmatch(source) and Path(source).suffix not in (".safetensors", ".gguf"):
        return source
    raise UserError(f"{source} does not exist, and is no hub id such as Qwen/Qwen3-0.6B: give {instead}")


def shortest(value: float) -> float:
    """The shortest decimal of a number that was kept as float32: 1e-6 of 9.99999997e-7."""
    return float(str(np.float32(value)))


def refuse_pickle(path: Path) -> None:
    """Raises UserError for a pickle, by suffix or, under another name, by its first bytes."""
    first = head(path) if path.is_file() else b""
    # torch.save writes a zip, before 1.6 a bare pickle: \x80 and a protocol of 2 to 5. The length that opens a
    # safetensors file may look so too (640 is 80 02), but there the ninth byte is the { of the header.
    bare = first[:1] == b"\x80" and first[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and first[8:9] != b"{"
    if path.suffix.lower() in PICKLES or bare or first.startswith(b"PK\x03\x04"):
        raise UserError(f"{path} is a pickle, which is never opened: convert it to safetensors")


def head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(16)
