"""The fingerprint of MODULE:FUNCTION in a process of its own, so that a callable that hangs, crashes or prints does no
harm. That process is `python -m castpoint.harness.fingerprint.process TARGET KIND DEVICE SIZES CALL`; it writes one
line of JSON to standard output. KIND may be empty: it is guessed then."""

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

from castpoint.harness.compiled.loading import Fault, load
from castpoint.harness.fingerprint.blackbox import Way, guessed_kind
from castpoint.harness.fingerprint.command import from_command
from castpoint.harness.fingerprint.forms import adapted
from castpoint.harness.fingerprint.norm import Answer, identify
from castpoint.harness.fingerprint.sizes import ANY, Sizes
from castpoint.harness.ptx.driver import executed


def identify_target(
    target: str, kind: str, device: str, time_limit_s: float, sizes: Sizes = ANY, call: str = ""
) -> Answer:
    """The fingerprint of MODULE:FUNCTION within that time; a process that fails or hangs is a status `error`. An empty
    kind is guessed, and the answer says which."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "castpoint.harness.fingerprint.process", target, kind, device]
    command += [json.dumps(dataclasses.asdict(sizes)), call]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}  # interpreted, a kernel's casts to bf16 would truncate
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment)
    try:
        output, _ = child.communicate(timeout=time_limit_s)
        return Answer(**json.loads(output.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        reason = f"no answer within {time_limit_s:g} s: the callable hangs, or needs a longer --time-limit"
    except (json.JSONDecodeError, IndexError, TypeError):
        code = child.returncode
        reason = f"the callable ended its process ({signal.Signals(-code).name if code < 0 else f'exit status {code}'})"
    finally:  # it, and whatever it started
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return Answer("error", reason=reason, seconds=round(time.perf_counter() - start, 2))


def identify_command(command: str, kind: str, time_limit_s: float, sizes: Sizes = ANY) -> Answer:
    """The fingerprint of a program, which has that time for each call. Raises UserError as from_command does."""
    return identify(from_command(command, kind, time_limit_s), kind, sizes=sizes, way=Way(files=True))


def _answer(target: str, kind: str, device: str, sizes: str, call: str) -> Answer:
    """On a CPU Triton kernels are compiled for sm_90, and their PTX is run."""
    try:
        fn = _loaded(target, device)
        guessed = "" if kind else guessed_kind(adapted(fn, call))
        with executed("sm_90") if device == "cpu" else contextlib.nullcontext():
            return dataclasses.replace(
                identify(fn, kind or guessed, device, Sizes(**json.loads(sizes)), call), kind=guessed
            )
    except Fault as fault:
        return Answer("error", reason=str(fault))


def _loaded(target: str, device: str) -> Callable[..., Any]:
    """Outside of executed, where a package that looks for a GPU takes its way without one; inside it only a module that
    asks Triton for its driver as it is imported."""
    try:
        return load(target)
    except Fault:
        if device != "cpu":
            raise
        with executed("sm_90"), contextlib.suppress(Fault):
            return load(target)
        raise


if __name__ == "__main__":
    result = os.dup(1)
    os.dup2(2, 1)  # what the callable prints goes to standard error
    line = json.dumps(_answer(*sys.argv[1:]).as_dict())
    os.write(result, f"{line}\n".encode())
    sys.stdout.flush()
    os._exit(0)  # threads that the callable left behind are not waited for
