"""Every config that a launch may take, compiled ahead of time: registers, spills, shared memory, matrix instruction.

No time is claimed here. A config that passes a target's shared memory is said not to fit it, which is no fault: configs
are sized for an H200, and portable where the table says so.
"""

from __future__ import annotations

from collections.abc import Iterable

from castpoint.harness.compiled.compile import COMPILERS, SHARED, TARGETS, compile_matmul, config_binaries
from castpoint.harness.runs.errors import reason_of
from castpoint.harness.runs.progress import track
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import ConfigRow
from castpoint.harness.runs.words import Status
from castpoint.variants.catalogue import plan_named


def sweep_configs(records: Records, targets: Iterable[str] = tuple(TARGETS)) -> None:
    """A row for each binary that the candidates of decode and prefill need."""
    for kernel, name, target, keywords in track(list(config_binaries(targets)), "configs"):
        words = ", ".join(str(v) if k == "config" else f"{k} {v}" for k, v in keywords.items())
        key = {"kernel": kernel, "plan": name, "target": target, "keywords": words}
        if not records.has(ConfigRow, **key):
            records.add(ConfigRow(**key, **_compiled(kernel, name, target, keywords)))


def _compiled(kernel: str, name: str, target: str, keywords: dict[str, object]) -> dict[str, object]:
    config = keywords.get("config")
    if config and config.kernel == "split-k" and TARGETS[target].backend == "hip":
        why = "split-k is not shown to be right on AMD's GPUs (kernels/split_k.py)"
        return {"status": Status.REFUSED, "reason": why}
    try:
        loop = kernel == "matmul"
        built = compile_matmul(target, **keywords) if loop else COMPILERS[kernel](plan_named(name), target, **keywords)
    except Exception as error:  # whatever a compiler raises belongs into the row
        return {"status": Status.FAILED, "reason": reason_of(error)}
    row = {"registers": built.registers, "spills": built.spills, "shared": built.shared}
    row["matrix"] = ", ".join(built.matrix_instructions())
    if built.shared > SHARED[target]:
        why = f"{target} has {SHARED[target]} bytes of shared memory a block"
        return row | {"status": Status.DOES_NOT_FIT, "reason": why}
    return row
