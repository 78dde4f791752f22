"""A program of any language as a callable: its arguments go through a file of safetensors, and so does its result.

The file that it reads holds bf16 tensors by the names of kinds.KINDS (and residual, bias or gate, where that is
asked; a norm's weight and residual once in fp32), eps as one float64, num_q_heads and num_kv_heads as one int64 each,
and these numbers in its metadata too. The file that it writes must hold y, or q, k and v.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from castpoint.harness.compiled.loading import Fault
from castpoint.harness.fingerprint.blackbox import Refused
from castpoint.harness.fingerprint.kinds import KINDS, OPTIONAL
from castpoint.harness.runs.errors import UserError, writing

ARGUMENTS = {kind: said.partition("(")[2].partition(")")[0].split(", ") for kind, said in KINDS.items()}
OUTPUTS = {
    kind: tuple(said.partition("-> ")[2].partition(";")[0].strip("()").split(", ")) for kind, said in KINDS.items()
}
INPUT, OUTPUT = "{input}", "{output}"
LIMIT_S = 300.0
Tensors = dict[str, Tensor]
Run = Callable[[Tensors], Tensors]  # what is returned, by OUTPUTS, for the arguments


def from_command(command: str, kind: str, limit_s: float = LIMIT_S) -> Callable[..., Any]:
    """A callable of that kind of kinds.KINDS that runs the command with {input} and {output} replaced, without a
    shell, at most so long a call.

    Raises UserError for a command without both places. The callable raises Refused where the program ends with an exit
    status that is not zero, Fault where it cannot be started, hangs, or writes something else.
    """
    words = words_of(command)
    return by_files(lambda tensors: _run(words, kind, tensors, limit_s), kind, OPTIONAL[kind])


def words_of(command: str) -> list[str]:
    """The command in words, as a shell would split it. Raises UserError where it lacks {input} or {output}."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"--command {command!r} cannot be split into words: {error}") from error
    lacks = [place for place in (INPUT, OUTPUT) if not any(place in word for word in words[1:])]
    if lacks:
        raise UserError(
            f"--command must be PROGRAM {INPUT} {OUTPUT}, with the files' places, and has no {' and no '.join(lacks)}"
        )
    return words


def by_files(run: Run, kind: str, optional_names: Sequence[str]) -> Callable[..., Any]:
    """A callable of that kind whose arguments run gets by name. One of those optional arguments that leaves the result
    as it is is not read: that is Refused."""
    noticed: dict[str, bool] = {}

    def asked(tensors: Tensors, given: Tensors) -> Tensors:
        for name, value in given.items():
            if name not in noticed:  # turned, x is no multiple of itself, and a gate that a norm would undo
                other = torch.ones_like(value) if name == "bias" else tensors["x"].roll(1, -1)
                with_it = run({**tensors, name: other})
                try:
                    without = run(tensors)
                    noticed[name] = any(not torch.equal(with_it[each], without[each]) for each in without)
                except Refused:  # it must have it
                    noticed[name] = True
            if not noticed[name]:
                raise Refused(f"{name} is not read: the same bits with and without it")
        return run({**tensors, **given})

    def fn(*arguments: Any, **optional: Any) -> Any:
        bound = signature.bind(*arguments, **optional).arguments
        there = {name: value for name, value in bound.items() if value is not None}
        tensors = {name: value if isinstance(value, Tensor) else _number(value) for name, value in there.items()}
        given = {name: tensors.pop(name) for name in optional_names if name in tensors}
        made = tuple(asked(tensors, given).values())
        return made if len(made) > 1 else made[0]

    places = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ARGUMENTS[kind]]
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in optional_names]
    signature = inspect.Signature([*places, *more])
    fn.__signature__ = signature  # type: ignore[attr-defined]
    return fn


def _number(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64 if isinstance(value, float) else torch.int64)


def write(path: Path, kind: str, tensors: Tensors, **metadata: str) -> None:
    """The file of a call's arguments."""
    numbers = {name: repr(value.item()) for name, value in tensors.items() if value.numel() == 1}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    path.write_bytes(save(tensors, {"kind": kind, **numbers, **metadata}))


def read(path: Path, names: tuple[str, ...] | None = None) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a file, in the order of names (None: all), and its metadata. Raises Fault for what is no whole
    file of safetensors, or has other names; the sentence goes on behind a subject."""
    try:
        with safe_open(path, "pt") as file:
            there, metadata = list(file.keys()), file.metadata() or {}
            if names is None or set(there) == set(names):
                return {name: file.get_tensor(name).clone() for name in names or there}, metadata
    except (SafetensorError, OSError) as error:
        said = " ".join(str(error).split())[:200]
        raise Fault(f"is no whole file of safetensors: {said}") from error
    raise Fault(f"holds {', '.join(sorted(there)) or 'nothing'}, expected {', '.join(names)}")


def _run(words: list[str], kind: str, tensors: Tensors, limit_s: float) -> Tensors:
    """One launch of the program, in a folder for its two files."""
    with tempfile.TemporaryDirectory(prefix="castpoint-", ignore_cleanup_errors=True) as folder:
        given, made = (Path(folder, name) for name in ("input.safetensors", "output.safetensors"))
        with writing(given.parent):
            write(given, kind, tensors)
        placed = [word.replace(INPUT, str(given)).replace(OUTPUT, str(made)) for word in words]
        said = _launch(placed, Path(folder, "said"), limit_s)
        if not made.exists():
            raise Fault(f"the program wrote no {OUTPUT}{said}")
        try:
            return read(made, OUTPUTS[kind])[0]
        except Fault as fault:
            raise Fault(f"what the program wrote {fault}{said}") from fault


def _launch(words: list[str], log: Path, limit_s: float) -> str:
    """Runs the program; what it said last, for a sentence."""
    with log.open("wb") as file:
        try:
            child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True)
        except OSError as error:
            shell = "; no shell reads --command: begin with env" if "=" in words[0] else ""
            raise Fault(f"the program {words[0]} cannot be started: {error.strerror}{shell}") from error
        try:
            code = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise Fault(
                f"the program has not ended after {limit_s:g} s: it hangs, or needs a longer --time-limit"
            ) from None
        finally:  # it, and whatever it started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    said = log.read_text(errors="replace").split()
    last = f": {' '.join(said)[-300:]}" if said else ""
    if code:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        raise Refused(f"the program {how}{last}")
    return last
