"""`castpoint gpu`: the steps of gpu.order on a CUDA device, until they are done or their time is up.

Every row is on disk before the next step begins. What breaks the CUDA context costs its own row and ends the process
(runs.process starts another, which goes on behind it).
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import traceback
from collections.abc import Callable

import torch

from castpoint.harness.conformance.cuda import Checks, check_eager, store_outputs
from castpoint.harness.conformance.tensor_cores import check_tensor_cores
from castpoint.harness.conformance.warm import Compilers
from castpoint.harness.gpu import sweep
from castpoint.harness.gpu.counters import count
from castpoint.harness.gpu.order import CARDS, Costs, Item, arm_counts, binaries, clock, order
from castpoint.harness.gpu.point import prepared
from castpoint.harness.gpu.sweep import launched
from castpoint.harness.gpu.tune import table_of, time_candidates
from castpoint.harness.runs.errors import UserError, writing
from castpoint.harness.runs.flight import in_flight, recover
from castpoint.harness.runs.records import ARCHIVE_EVERY_S, Records
from castpoint.harness.runs.schema import GpuLimitRow, GpuStepRow
from castpoint.harness.runs.words import Status, Step
from castpoint.harness.timing.cpu import Ceilings
from castpoint.harness.timing.cuda import Cuda, DeviceLost, reason_of
from castpoint.harness.timing.limits import LIMITS
from castpoint.kernels.dispatch import write_table

AT_POINTS = {
    Step.PARTS: sweep.time_parts, Step.TUNING: time_candidates, Step.CHAINS: sweep.time_chains,
    Step.PLANS: sweep.time_plans, Step.COMPILED: sweep.time_compiled,
}  # fmt: skip


def run(records: Records, gpu: Cuda, compilers: Compilers, deadline: float) -> bool:
    """The steps that the records do not have yet, until gpu.now() passes the deadline; whether all are done.

    A step that would not end in time, as estimated, is not begun. One that fails by an error of ours is a row, its
    traceback is printed, and the run goes on. Raises DeviceLost where the CUDA context broke.
    """
    recover(records)
    checks = Checks(records, gpu)
    todo = [item for item in order() if not records.has(GpuStepRow, **item.key)]
    card = next((card for name, card in CARDS.items() if name in gpu.name().lower()), CARDS["h100"])
    for item in todo:
        compilers.start(binaries(item))
    costs = Costs(cores=compilers.processes)
    for number, estimate in enumerate(clock(todo, card, costs)):
        item, start = estimate.item, gpu.now()
        if start + estimate.seconds > deadline:
            say(f"stopped before {describe(item)}: {estimate.seconds:.0f} s more would pass the time given")
            return False
        compile_for(item, records, gpu, compilers)
        if estimate.measure > ARCHIVE_EVERY_S / 2:  # it adds no row for long
            records.close()
        row = GpuStepRow(**item.key, estimated_s=estimate.seconds)
        row = dataclasses.replace(row, **step(item, records, gpu, checks))
        records.add(dataclasses.replace(row, seconds=gpu.now() - start))
        say(f"{number + 1}/{len(todo)} {describe(item)}: {row.status} in {gpu.now() - start:.1f} s")
    return True


def compile_for(item: Item, records: Records, gpu: Cuda, compilers: Compilers) -> None:
    """Waits until all is compiled that the step launches. What tuning chose for plans that come later is begun."""
    tuned = records.rows("tuning")
    wanted = launched(item, tuned, gpu.name())
    compilers.start(wanted)
    if item.step == Step.CHAINS:
        compilers.start(launched(Item(Step.PLANS, item.point), tuned, gpu.name()))
    compilers.wait(wanted)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def describe(item: Item) -> str:
    at = f" at {item.point.model}, {item.point.tokens} tokens, {item.point.regime}" if item.point else ""
    return f"{item.step}{at}"


def step(item: Item, records: Records, gpu: Cuda, checks: Checks) -> dict[str, str]:
    """Does one step; status and reason of its row."""
    try:
        if item.point is None:
            _without_point(item.step, records, gpu)
        else:
            arms = max(count for count, _ in arm_counts(item))
            AT_POINTS[item.step](prepared(item.point, records, gpu, checks, limits_of(records), arms))
            if item.step == Step.TUNING:
                write_dispatch(records, gpu)
        return {"status": Status.OK, "reason": ""}
    except (DeviceLost, UserError):
        raise
    except Exception as error:  # no memory; or a bug of ours: seen, and no reason to measure nothing else
        if not isinstance(error, torch.OutOfMemoryError):
            traceback.print_exc()
        try:
            return {"status": Status.FAILED, "reason": reason_of(gpu, describe(item), error)}
        except DeviceLost as lost:  # of which no arm knew: without this row the next process ends here again
            records.add(GpuStepRow(**item.key, status=Status.FAILED, reason=str(lost)))
            raise
    finally:
        with contextlib.suppress(RuntimeError):  # a broken context says so here too, and not which arm broke it
            gpu.release()


def _without_point(what: Step, records: Records, gpu: Cuda) -> None:
    does: dict[Step, Callable[[], None]] = {
        Step.LIMITS: lambda: measure_limits(records, gpu),
        Step.EAGER: lambda: check_eager(records, gpu),
        Step.TENSOR_CORES: lambda: check_tensor_cores(records, gpu),
        Step.OUTPUTS: lambda: store_outputs(records, gpu),
        Step.COUNTERS: lambda: count(records),
    }
    does[what]()


def measure_limits(records: Records, gpu: Cuda) -> None:
    """A row for each of timing.limits.LIMITS. Raises DeviceLost where one broke the context, with its row written."""
    for name, (unit, measured) in LIMITS.items():
        row = GpuLimitRow(limit=name, unit=unit)
        if records.has(GpuLimitRow, **vars(row)):
            continue
        with in_flight(records, {name: row}, DeviceLost):
            value, reason = measured(gpu)
        status = Status.OK if value is not None else Status.FAILED
        records.add(dataclasses.replace(row, value=value, status=status, reason=reason))
        gpu.release()


def limits_of(records: Records) -> Ceilings | None:
    """What this run measured, the memory's by the faster of copying and reading; None where it has no such limit."""
    found = {row["limit"]: float(row["value"]) for row in records.rows("gpu_limits") if row["value"]}
    memory = max((found[name] for name in ("copy", "read") if name in found), default=None)
    matmul = found.get("bf16 matmul")
    return Ceilings(memory, matmul) if memory and matmul else None


def write_dispatch(records: Records, gpu: Cuda) -> None:
    """dispatch.csv of the results folder, from this run's rows so far."""
    with writing(records.folder):
        write_table(table_of(records.rows("tuning"), gpu.name()), records.folder / "dispatch.csv")
