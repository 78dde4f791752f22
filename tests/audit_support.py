"""What the tests of the audit share: kernels of this process may be interpreted, so what compiles runs in its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent  # as in support.py, whose imports would cost each process 1.5 s


def in_process(function: Callable[..., Iterator[dict]], *args: str, cache: Path, **env: str) -> list[dict]:
    """Rows that a function of a test module yields in a process whose kernels compile, with an empty cache."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    code = f"import json, {function.__module__} as module\nfor row in module.{function.__name__}(*{args!r}): "
    run = subprocess.run(
        [sys.executable, "-c", code + "print(json.dumps(row), flush=True)"],
        env={**kept, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache), **env},
        cwd=cache,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]
