"""The fingerprint of MODULE:FUNCTION in a process of its own, so that a callable that hangs, crashes or prints does no
harm. That process is `python -m castpoint.harness.fingerprint.process KIND DEVICE SIZES CALL TARGET [TARGET]`; it
writes one line of JSON to standard output. KIND may be empty: it is guessed then. CALL: of two targets a list."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from castpoint.harness.compiled.loading import Fault, load
from castpoint.harness.fingerprint.blackbox import Way
from castpoint.harness.fingerprint.command import INPUT, from_command
from castpoint.harness.fingerprint.comparison import Comparison, compare
from castpoint.harness.fingerprint.forms import adapted
from castpoint.harness.fingerprint.kinds import guessed_kind
from castpoint.harness.fingerprint.norm import Answer, identify
from castpoint.harness.fingerprint.pairs import is_pair
from castpoint.harness.fingerprint.sizes import ANY, Sizes
from castpoint.harness.ptx.driver import executed
from castpoint.harness.runs.errors import UserError

ON_A_GPU = (
    "if it wants a GPU, give --device cuda there, or here a function beneath that check: Triton runs on CPU tensors"
)


def identify_target(
    target: str, kind: str, device: str, time_limit_s: float, sizes: Sizes = ANY, call: str = ""
) -> Answer:
    """The fingerprint of MODULE:FUNCTION within that time; a process that fails or hangs is a status `error`. An empty
    kind is guessed, and the answer says which."""
    start = time.perf_counter()
    told, reason = _in_a_process(time_limit_s, kind, device, json.dumps(dataclasses.asdict(sizes)), call, target)
    seconds = round(time.perf_counter() - start, 2)
    return Answer(**told) if told else Answer("error", reason=reason, seconds=seconds)


def compare_targets(
    targets: tuple[str, str], kind: str, device: str, time_limit_s: float, sizes: Sizes, calls: tuple[str, str]
) -> Comparison:
    """The comparison of two of MODULE:FUNCTION and programs, in a process of its own. Raises UserError where one cannot
    be called, or the time is up."""
    call, given = json.dumps(calls), json.dumps(dataclasses.asdict(sizes))
    told, reason = _in_a_process(time_limit_s, kind, device, given, call, *targets)
    if not told or "fault" in told:
        raise UserError(told["fault"] if told else reason)
    answers = {name: Answer(**told.pop(name)) for name in ("first", "second")}
    return Comparison(**told, **answers)


def _in_a_process(limit_s: float, *arguments: str) -> tuple[dict[str, Any] | None, str]:
    """What that process writes, or why it writes nothing."""
    command = [sys.executable, "-m", "castpoint.harness.fingerprint.process", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}  # interpreted, a kernel's casts to bf16 would truncate
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment)
    try:
        output, _ = child.communicate(timeout=min(limit_s, 1e6))  # which takes no inf
        return json.loads(output.splitlines()[-1]), ""
    except subprocess.TimeoutExpired:
        return None, f"no answer within {limit_s:g} s: the callable hangs, or needs a longer --time-limit"
    except (json.JSONDecodeError, IndexError):
        code = child.returncode
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return None, f"the callable ended its process ({how})"
    finally:  # it, and whatever it started
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def identify_command(command: str, kind: str, time_limit_s: float, sizes: Sizes = ANY) -> Answer:
    """The fingerprint of a program, which has that time for each call. Raises UserError as from_command does."""
    return identify(from_command(command, kind, time_limit_s), kind, sizes=sizes, way=Way(files=True))


def _told(kind: str, device: str, sizes: str, call: str, *targets: str) -> dict[str, Any]:
    """The answer for one target, the comparison of two. On a CPU Triton kernels are compiled for sm_90, and their PTX
    is run."""
    taken = Sizes(**json.loads(sizes))
    here = executed("sm_90") if device == "cpu" else contextlib.nullcontext()
    try:
        if len(targets) == 2:
            calls = json.loads(call)
            functions = [(_loaded(t, device), c) for t, c in zip(targets, calls, strict=True) if INPUT not in t]
            kind = kind or guessed_kind(adapted(*functions[0]))
            first, second = (from_command(t, kind) if INPUT in t else functions.pop(0)[0] for t in targets)
            with here:
                return compare(first, second, kind, device, taken, calls).as_dict()
        fn = _loaded(targets[0], device)
        guessed = "" if kind else "qk_norm_rope" if is_pair(fn, call) else guessed_kind(adapted(fn, call))
        with here:
            answer = identify(fn, kind or guessed, device, taken, call)
        if answer.status == "error" and device == "cpu" and "cuda" in answer.reason.lower():
            answer = dataclasses.replace(answer, reason=f"{answer.reason}; {ON_A_GPU}")
        return dataclasses.replace(answer, kind=guessed).as_dict()
    except Fault as fault:
        return Answer("error", reason=str(fault)).as_dict() if len(targets) == 1 else {"fault": str(fault)}


def _loaded(target: str, device: str) -> Callable[..., Any]:
    """Outside of executed, where a package that looks for a GPU takes its way without one; inside it only a module that
    asks Triton for its driver as it is imported. What a file sets as torch's defaults ends with it: it would hold for
    all that is made here."""
    try:
        return load(target)
    except Fault:
        if device != "cpu":
            raise
        with executed("sm_90"), contextlib.suppress(Fault):
            return load(target)
        raise
    finally:
        torch.set_default_dtype(torch.float32)
        if device == "cpu":
            torch.set_default_device(None)


if __name__ == "__main__":
    result = os.dup(1)
    os.dup2(2, 1)  # what the callable prints goes to standard error
    line = json.dumps(_told(*sys.argv[1:]))
    os.write(result, f"{line}\n".encode())
    sys.stdout.flush()
    os._exit(0)  # threads that the callable left behind are not waited for
