"""Processes in which kernels compile, forked from one that has imported what they need: the imports take 1.5 s, a fork
takes milliseconds. Each has its own memory, so that whatever it patches or loads ends with it."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SERVER = """
import importlib.util, json, os, sys, traceback
import torch, triton
import castpoint.harness.audit.foreign, castpoint.harness.conformance.execute, castpoint.harness.ptx.driver

def answer(module, file, function, args, folder, env):
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ.update(env)
    os.chdir(folder)
    spec = importlib.util.spec_from_file_location(module, file)
    asking = sys.modules[module] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(asking)
    for row in getattr(asking, function)(*args):
        print(json.dumps(row), flush=True)

for line in sys.stdin:
    child = os.fork()
    if not child:
        code = 1
        try:
            answer(**json.loads(line))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    """One for each pytest process; it ends when that closes its input."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    command = [sys.executable, "-c", SERVER]
    server = subprocess.Popen(
        command, env={**kept, "PYTHONPATH": path}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(server.communicate)  # which closes its input and waits
    return server


def rows_of_fork(function: Callable[..., Iterator[dict]], *args: str, folder: Path, **env: str) -> list[dict]:
    """Rows that a function of a test module yields in a fork that imports the module again, run in that folder. Fails
    with what it wrote if it fails."""
    request = {"module": function.__module__, "file": function.__code__.co_filename, "function": function.__name__}
    request |= {"args": args, "folder": str(folder), "env": env}
    server = _server()
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    code = server.stdout.readline().strip()
    assert code == "0", f"exit status {code or 'of the server'}: {(folder / 'stderr').read_text()[-2000:]}"
    return [json.loads(line) for line in (folder / "stdout").read_text().splitlines()]
