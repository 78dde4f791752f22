"""What a GPU's kernels returned, against the same kernels on this CPU: interpreted, and their PTX run by harness/ptx.

A GPU run keeps the bits (conformance.cuda.store_outputs); a CPU elsewhere takes its time over them. Both sides are
kernels of the same source with the same tiles and inputs, so that what differs is one of these:

- order of sums. Interpreted, a tile is added up by NumPy; as PTX in harness/ptx's order, which rounds where a tensor
  core truncates. The envelope says how much of it there may be: a few ulps of few elements.
- the last bits of approximate instructions (rsqrt), and, as PTX, what ptxas makes of it: fused multiply-adds.
- another Triton, there than here: it may order a reduction or fuse operations otherwise, and its interpreter may have
  other faults. Which versions the run had stands in its environment; the interpreter's and the PTX's are those here.
- a fault: of a compiler, of the interpreter, of harness/ptx, or of the kernel. A plan that equals its spec there on
  exact inputs and shares far fewer bits here than the others has one.

No row is red by this: how much is too much the checks against spec and envelope say.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from castpoint.harness.conformance.cuda import OUTPUTS, compared, fused_outputs, inputs_digest, outputs_rows
from castpoint.harness.ptx.driver import executed
from castpoint.harness.runs.environment import ROOT, one_thread, sources
from castpoint.harness.runs.errors import reason_of
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import GpuCheckRow, GpuStepRow
from castpoint.harness.runs.words import COMPARED, Check, Status, Step
from castpoint.variants.catalogue import PLANS

OUTPUTS_STEP = {"step": Step.OUTPUTS, "model": "", "tokens": 0, "regime": ""}


def compare_outputs(folder: Path, run_id: str) -> int | str:
    """Adds to gpu_checks of that run, finished or not, a row for each plan whose outputs it kept and each of COMPARED:
    share of equal bits and the largest difference in ulps of q, k and v [8, heads, 128] together. Returns how many, or
    why nothing can be compared.

    A row that is there is not computed again. A plan that raises here is a failed row. Takes two processes, since
    kernels are interpreted or compiled for as long as a process lives, and a minute or two for all plans.
    """
    records = Records.of_run(folder, run_id)
    if not records.has(GpuStepRow, **OUTPUTS_STEP):
        return "the run has not come to its step `outputs`"
    environment = records.runs[run_id]["environment"]
    if environment["sources"] != sources():
        return f"they are of other sources, {environment['sources']}, than those here, {sources()}"
    try:
        names, inputs = stored(folder)
    except (OSError, SafetensorError) as error:
        return f"{OUTPUTS} cannot be read ({reason_of(error)})"
    if inputs != inputs_digest():
        return "its inputs are drawn otherwise here, by another CPU or another torch: run this where they are the same"
    todo = {
        check: {n: row for n, row in outputs_rows(check, names).items() if not records.has(GpuCheckRow, **vars(row))}
        for check in COMPARED
    }
    target = "sm_" + environment["gpu"]["capability"].replace(".", "")
    found = side_by_side(folder, target, {check: tuple(rows) for check, rows in todo.items() if rows})
    for check, rows in todo.items():
        for name, row in rows.items():
            records.add(GpuCheckRow(**vars(row) | found[check][name]))
    return sum(map(len, todo.values()))


def stored(folder: Path) -> tuple[list[str], str]:
    """Names of the plans whose outputs a folder holds, and the digest of their inputs."""
    with safe_open(folder / OUTPUTS, "pt") as file:
        kept = {key.rpartition(" ")[0] for key in file.keys()}
        return [name for name in PLANS if name in kept], (file.metadata() or {}).get("inputs", "")


# ---------------------------------------------------------------- two processes

Found = dict[str, dict[str, Any]]  # plan -> columns of its row


def side_by_side(folder: Path, target: str, todo: dict[Check, tuple[str, ...]]) -> dict[Check, Found]:
    """What one process a check finds, all at a time. Where one dies, plans that it left out have failed."""
    if todo:
        count = len({name for names in todo.values() for name in names})
        print(f"comparing outputs of {count} plans with this CPU's: a minute or two", file=sys.stderr, flush=True)
    with contextlib.ExitStack() as stack:
        children = {check: stack.enter_context(_Child(folder, target, check, names)) for check, names in todo.items()}
        return {check: child.found(todo[check]) for check, child in children.items()}


class _Child:
    """This module as a program, which compares those plans; it ends with the context."""

    def __init__(self, folder: Path, target: str, check: Check, names: Iterable[str]) -> None:
        self.out, self.err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
        interpret = str(int(check == Check.INTERPRETER))
        environment = {**os.environ, "TRITON_INTERPRET": interpret, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", __name__, str(folder.resolve()), target, check, *names]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=self.out, stderr=self.err)

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *raised: object) -> None:
        self.process.kill()
        self.process.wait()
        self.out.close()
        self.err.close()

    def found(self, names: Iterable[str]) -> Found:
        status = self.process.wait()
        self.out.seek(0)
        self.err.seek(0)
        said = [line for line in self.err.read().splitlines() if line.strip()][-1:]
        died = {"status": Status.FAILED, "reason": f"exit status {status}: {' '.join(said)[:300]}"}
        return dict.fromkeys(names, died) | dict(json.loads(line) for line in self.out.read().splitlines())


def columns(folder: Path, target: str, check: str, names: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """In a process of that check: each plan and columns of its row, share_equal and max_ulp, or status and reason."""
    with one_thread(), executed(target) if check == Check.PTX else contextlib.nullcontext():
        for name in names:
            try:
                with safe_open(folder / OUTPUTS, "pt") as file:
                    kept = tuple(file.get_tensor(f"{name} {i}") for i in range(3))
                yield name, compared(kept, fused_outputs(name, "cpu"))
            except Exception as error:  # a kernel that this Triton does not compile, an instruction unknown to ptx
                yield name, {"status": Status.FAILED, "reason": reason_of(error)}


if __name__ == "__main__":
    for pair in columns(Path(sys.argv[1]), *sys.argv[2:4], sys.argv[4:]):
        print(json.dumps(pair), flush=True)
