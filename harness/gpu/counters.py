"""Two counters that decide what kernels are worth designing: what L2 delivers into an SM, and how full issue slots are.

Nsight Compute reads them of one warmed launch of each of LAUNCHES, in a process of its own (`python -m` this module).
It may be missing or forbidden, and on some machines it cannot work: then one row says why, and a run goes on. It
empties the caches before each pass over a kernel, so weights are cold; it is told to leave the clocks as they are.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from castpoint.harness.gpu.order import tiles
from castpoint.harness.problems.drawn import synthetic_problem
from castpoint.harness.problems.grid import Point
from castpoint.harness.runs.environment import ROOT
from castpoint.harness.runs.flight import in_flight
from castpoint.harness.runs.process import die_with_parent
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import GpuCounterRow
from castpoint.harness.runs.words import Status
from castpoint.harness.timing.cuda import DeviceLost
from castpoint.kernels.config import Config
from castpoint.variants.backends import run_triton
from castpoint.variants.catalogue import plan_named
from castpoint.variants.eager import Outputs, plan_weight

LIMIT_S = 180.0  # start of Python, drawn weights, two compilations, and some passes over two kernels
WARMED = 3  # launches of each before the one that is counted
INSTALLED = Path("/opt/nvidia/nsight-compute")  # where NVIDIA installs it, a folder a version
L2_BYTES, CYCLES = "l1tex__m_xbar2l1tex_read_bytes.sum", "sm__cycles_elapsed.sum"
ISSUED = "smsp__issue_active.avg.pct_of_peak_sustained_active"
# Its names for sm_70 and later -> their units as --print-units base gives them; older versions write nsecond.
METRICS = {
    L2_BYTES: ("byte",),  # from L2 into the L1s of all SMs, by loads, cp.async and TMA
    CYCLES: ("cycle",),  # of all SMs together
    "sm__cycles_elapsed.max": ("cycle",),  # of one
    ISSUED: ("%",),  # cycles in which a scheduler that has a warp issued an instruction: it can issue one a cycle
    "smsp__inst_executed.sum": ("inst",),
    "gpu__time_duration.sum": ("ns", "nsecond"),
}
COLUMNS = ("Kernel Name", "Metric Name", "Metric Unit", "Metric Value")
NUMBER = re.compile(r"\d+(\.\d+)?|\d{1,3}(,\d{3})+(\.\d+)?")  # thousands may be set apart


class NotCounted(Exception):
    """Nsight Compute gave no counters; the message says why in a line."""


@dataclass(frozen=True)
class Launch:
    """What is counted. function: the kernel's name on the GPU."""

    function: str
    model: str
    tokens: int
    plan: str
    config: Config

    def __str__(self) -> str:
        return f"{self.model}, {self.tokens} token{'s' * (self.tokens > 1)}, {self.plan}: {self.config}"


LAUNCHES = (
    Launch("norm_qkv_kernel", "qwen3-8b", 4096, "one-rounding", Config("fused", "hidden", 128, 64, 8, 4)),
    Launch("split_k_kernel", "qwen3-0.6b", 1, "deferred", tiles(Point("qwen3-0.6b", 1), "deferred")[0]),
)


def count(records: Records, limit_s: float = LIMIT_S) -> None:
    """Rows of gpu_counters: METRICS and what follows from them, of each of LAUNCHES; or one that failed, and why.

    The process that is counted needs memory of the GPU, as does what restores outputs between passes: call Cuda.release
    before. limit_s: seconds after which it is ended.
    """
    none = GpuCounterRow(kernel="all", counter="all", unit="")
    with in_flight(records, {"counters": none}, DeviceLost, 2 * limit_s):
        try:
            rows = counter_rows(read_table(profiled(limit_s)))
        except Exception as error:  # whatever it is, it must not cost a run
            reason = str(error) if isinstance(error, NotCounted) else f"{type(error).__name__}: {error}"
            rows = [dataclasses.replace(none, status=Status.FAILED, reason=reason)]
    records.add(*rows)


def counter_rows(found: dict[tuple[str, str], float]) -> list[GpuCounterRow]:
    """Rows of what was found, of each kernel and metric; raises NotCounted where one is missing.

    bytes_per_clock_and_sm: L2_BYTES / CYCLES. issue_share: of the cycles in which a scheduler had a warp, those in
    which it issued.
    """
    rows = []
    for launch in LAUNCHES:
        missing = [metric for metric in METRICS if (launch.function, metric) not in found]
        if missing:
            raise NotCounted(f"ncu says nothing of {missing[0]} of {launch.function}")
        values = {metric: (found[launch.function, metric], units[0]) for metric, units in METRICS.items()}
        values["bytes_per_clock_and_sm"] = values[L2_BYTES][0] / values[CYCLES][0], "byte/cycle"
        values["issue_share"] = values[ISSUED][0] / 100, "share"
        rows += [
            GpuCounterRow(kernel=str(launch), counter=counter, value=value, unit=unit)
            for counter, (value, unit) in values.items()
        ]
    return rows


def read_table(printed: str) -> dict[tuple[str, str], float]:
    """(kernel, metric) -> value, of what `ncu --csv` printed: a line for each, between others that begin with `==`.

    Raises NotCounted for a table that is not as expected: without COLUMNS, with a unit that was scaled, a value that is
    no positive number, or two launches of a kernel.
    """
    lines = [line for line in printed.splitlines() if line and not line.startswith("==")]
    begin = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    table = csv.DictReader(lines[begin:], strict=True)  # half a number is none
    if not set(COLUMNS) <= set(table.fieldnames or ()):
        raise NotCounted(f"ncu printed no table with the columns {', '.join(COLUMNS)}")
    found: dict[tuple[str, str], float] = {}
    for line in table:
        kernel, metric, unit, value = (line[column] or "" for column in COLUMNS)
        if metric not in METRICS:
            continue
        if unit not in METRICS[metric]:
            raise NotCounted(f"ncu gives {metric} in {unit!r}, not {METRICS[metric][0]!r}")
        number = float(value.replace(",", "")) if NUMBER.fullmatch(value) else 0.0
        if number <= 0:
            raise NotCounted(f"ncu gives {value!r} for {metric} of {kernel}")
        key = kernel.partition("(")[0].strip(), metric
        if key in found:
            raise NotCounted(f"ncu counted two launches of {kernel}")
        found[key] = number
    return found


# ---------------------------------------------------------------- Nsight Compute


def profiled(limit_s: float) -> str:
    """What ncu prints of the child's last launch of each kernel. Raises NotCounted, with ncu's own words where it has
    some."""
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        status = run(ncu_command(), limit_s, out.fileno(), err.fileno())
        out.seek(0)
        err.seek(0)
        printed, errors = out.read(), err.read()
    if status != 0 or not any(line.startswith('"ID"') for line in printed.splitlines()):
        raise NotCounted(f"ncu ended with status {status}: {said(printed, errors)}")
    return printed


def ncu_command() -> list[str]:
    """Filters name the kernels; launches to skip and to count are of those that they let through."""
    names = "|".join(launch.function for launch in LAUNCHES)
    return [
        *(nsight_compute(), "--clock-control", "none", "--cache-control", "all"),
        *("--csv", "--page", "details", "--print-units", "base", "--print-metric-name", "name"),
        *("--metrics", ",".join(METRICS), "--kernel-name", f"regex:^({names})$"),
        *("--launch-skip", str(WARMED * len(LAUNCHES)), "--launch-count", str(len(LAUNCHES))),
        *(sys.executable, "-m", "castpoint.harness.gpu.counters"),
    ]


def nsight_compute() -> str:
    """Path of ncu, the newest where several are installed. Raises NotCounted where there is none."""
    found = [shutil.which("ncu"), *map(str, sorted(INSTALLED.glob("*/ncu"), reverse=True))]
    path = next((path for path in found if path), None)
    if path is None:
        raise NotCounted(f"ncu is neither on PATH nor in {INSTALLED}")
    return path


def run(command: list[str], limit_s: float, out: int, err: int) -> int:
    """The command's exit status. Raises NotCounted when its time is over; then, or if this is broken off, it ends with
    every process that it started, which would hold memory of the GPU."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "LC_ALL": "C"}  # C: a decimal point
    child = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
        preexec_fn=functools.partial(die_with_parent, os.getpid()),
    )  # fmt: skip
    try:
        return child.wait(limit_s)
    except subprocess.TimeoutExpired:
        raise NotCounted(f"ncu took more than {limit_s:g} s") from None
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def said(printed: str, errors: str) -> str:
    """Why it failed: ncu's first error, or warning, and the last line of the program that it ran, which may be cause of
    the first."""
    lines = printed.splitlines() + errors.splitlines()
    words = [line for mark in ("==ERROR==", "==WARNING==") for line in lines if line.startswith(mark)][:1]
    words += [line for line in errors.splitlines() if line.strip() and not line.startswith("==")][-1:]
    return "; ".join(" ".join(line.split())[:300] for line in words) or "it says nothing"


# ---------------------------------------------------------------- the process that is counted


def launch_all(device: str = "cuda") -> None:
    """Launches each of LAUNCHES in turns, WARMED times and once more. Prints nothing: its output is ncu's too."""
    calls = [call_of(launch, device) for launch in LAUNCHES]
    for _ in range(WARMED + 1):
        for call in calls:
            call()


def call_of(launch: Launch, device: str) -> Callable[[], Outputs]:
    """Runs the launch's plan on a layer with drawn weights; the kernel that is counted is one of it."""
    plan = plan_named(launch.plan)
    problem = synthetic_problem(launch.model, 0, launch.tokens).to(device)
    weight = plan_weight(plan, problem)
    return lambda: run_triton(plan, problem, qkv_weight=weight, config=launch.config)


if __name__ == "__main__":
    launch_all()
    torch.cuda.synchronize()
