"""What the commands do once their options are checked. Heavy imports wait until a step needs them."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from castpoint.harness import options
from castpoint.harness.fingerprint.sizes import Sizes
from castpoint.harness.fingerprint.subject import Subject, compared
from castpoint.harness.runs.errors import UserError, mistakes, writing
from castpoint.harness.runs.records import Records, Settings
from castpoint.harness.runs.schema import AuditRow, CaseRow

BUDGET_TOKENS = 64  # at most: the budget runs a spec for every subset of a plan's boundaries


def measure(settings: Settings, records: Records, parts: tuple[str, ...]) -> None:
    """Those parts of a bench."""
    from castpoint.harness.accuracy.budget import sweep_budget
    from castpoint.harness.accuracy.rope_positions import sweep_rope_positions
    from castpoint.harness.accuracy.sweep import sweep_kernels, sweep_precision
    from castpoint.harness.timing.sweep import sweep_speed

    if "errors" in parts or "amplification" in parts:
        sweep_precision(settings, records)
    if "errors" in parts or "speed" in parts:  # what is red gets no time
        sweep_kernels(settings, records)
    if "budget" in parts:
        few = dataclasses.replace(settings, tokens=min(settings.tokens, BUDGET_TOKENS))
        sweep_budget(few, records)
        sweep_rope_positions(few, records)
    if "speed" in parts:
        sweep_speed(settings, records)


def identify(
    subject: Subject, kind: str, device: str, time_limit_s: float, sizes: Sizes, expect: str, as_json: bool
) -> int:
    """Prints the fingerprint, or what is asked next; exit status. Raises UserError unless it is the expected plan."""
    options.check_subject(subject, kind, device, expect, sizes)
    if subject.target:
        device = options.device_named(device)
    if subject.capture:
        return identify_capture(subject.capture, sizes, expect, as_json)
    from castpoint.harness.fingerprint.answer import check_expectation, unmet
    from castpoint.harness.fingerprint.kinds import known
    from castpoint.harness.fingerprint.norm import summary

    kind = known(kind) or subject.kind
    if expect:
        check_expectation(expect, kind or "qkv")
    answer = subject.asked(kind, device, time_limit_s, sizes)
    if isinstance(answer, str):  # the next round of questions
        print(json.dumps({"status": "asked", "reason": answer}) if as_json else answer)
        return int(bool(expect))
    kind = kind or answer.kind
    failed = expect and (unmet(answer, expect, kind) if kind else f"{answer.status}: {answer.reason}")
    if as_json or not failed:
        print(json.dumps(answer.as_dict()) if as_json else summary(answer))
    if failed:
        raise UserError(f"{subject} is not {expect}: {failed}")
    return int(answer.status == "error")


def compare(
    targets: tuple[str, str], kind: str, device: str, time_limit_s: float, sizes: Sizes, calls: list[str], as_json: bool
) -> int:
    """Prints whether two functions, programs or captures are one; the exit status."""
    found = compared(targets, kind, options.device_named(device), time_limit_s, sizes, calls)
    print(json.dumps(found.as_dict()) if as_json else found.told(targets))
    return int(not found.same)


def print_plans() -> None:
    """The named plans: where each rounds, and who uses it."""
    from castpoint.variants.catalogue import PLANS

    for name, named in PLANS.items():
        p = named.plan
        print(
            f"{name:20} {' '.join(p.roundings()):62} scale={p.scale} matmul={p.matmul} weight_offset={p.weight_offset} "
            f"RoPE: {' '.join(p.rope_roundings()) or 'none'}"
        )
        print(f"{'':20} {named.about}")


def identify_capture(path: Path, sizes: Sizes, expect: str, as_json: bool) -> int:
    """Prints which plans explain one recorded call; the exit status. Raises UserError unless every plan that is left is
    the expected one."""
    from castpoint.harness.fingerprint import capture, captured
    from castpoint.harness.fingerprint.answer import check_expectation

    recorded = capture.read(path, sizes)
    if expect:
        check_expectation(expect, recorded.kind)
    answer = captured.explain(recorded)
    failed = captured.unmet(answer, expect) if expect else ""
    if as_json or not failed:
        print(json.dumps(answer.as_dict()) if as_json else captured.told(answer))
    if failed:
        raise UserError(f"{path} is not {expect}: {failed}")
    return 0


def measure_gpu(folder: Path, archive: Path, deadline: float) -> int:
    """The steps of a GPU run until time.monotonic() passes the deadline; the exit status of the process."""
    from castpoint.harness.conformance.warm import Compilers

    compilers = Compilers()  # before CUDA is touched
    from castpoint.harness.gpu.run import run
    from castpoint.harness.runs.process import LOST
    from castpoint.harness.timing.cuda import Cuda, DeviceLost

    records = options.records_of("gpu", folder, device="cuda", archive=archive)
    try:
        gpu = Cuda()
        compilers.target = gpu.target()
        if run(records, gpu, compilers, deadline):
            records.finish()
    except DeviceLost as error:
        print(f"{error}; what was measured is kept, a new process goes on from there", file=sys.stderr)
        return LOST
    finally:
        records.close()
        compilers.close()
    return int(print_red(records, "gpu_checks", "gpu_speed", "tuning", "gpu_steps"))


def keep(folder: Path, archive: Path) -> None:
    """The archive of a GPU run as its folder is now: a process that was killed did not write it."""
    from castpoint.harness.runs import archive as archives
    from castpoint.harness.runs.records import load_runs

    if load_runs(folder):
        archives.write(folder, archive)


COUNTED = {  # what three columns of an audited kernel count
    "not_followed": "  (operations that the audit cannot see through)",
    "fused": "  (multiply-adds of the machine code where TTIR multiplies and adds apart)",
    "expanded": "  (multiply-adds that TTIR's products, quotients and roots expand to)",
}


def audit_foreign(kernel: str, target: str, signature: str, constants: list[str]) -> bool:
    """Prints what was found on each target; whether any row is red."""
    from castpoint.harness.audit.foreign import audit_foreign
    from castpoint.harness.compiled.compile import TARGETS

    rows = [audit_foreign(kernel, name, signature, constants) for name in ([target] if target else TARGETS)]
    for row in rows:
        said = {name: value for name, value in row.items() if value not in ("", None)}
        print("\n".join(f"{name:13} {value}{COUNTED.get(name, '')}" for name, value in said.items()) + "\n")
    return any(row["status"] in ("red", "failed") for row in rows)


def audit_ptx(path: Path, other: object) -> bool:
    """Prints what each function of a file of PTX rounds; False, since there is nothing to hold it to. other: whatever
    else was asked for, which UserError refuses."""
    from castpoint.harness.audit.listing import audit_ptx

    if other:
        raise UserError("--ptx lists what one file of PTX rounds: leave out all else")
    for row in audit_ptx(path):
        said = {name: value for name, value in row.items() if value != ""}
        words = {"fused": "  (multiply-adds)", "not_followed": "  (instructions that the audit cannot see through)"}
        print("\n".join(f"{name:13} {value}{words.get(name, '')}" for name, value in said.items()) + "\n")
    return False


def audit_own(run: bool, configs: bool, target: str, results: Path | None) -> bool:
    """The audits that were asked for, each with its own record; whether any row is red. Configs have no verdict."""
    from castpoint.harness.audit.kernels import audit_all, check_target
    from castpoint.harness.compiled.compile import TARGETS
    from castpoint.harness.compiled.resources import sweep_configs
    from castpoint.harness.conformance.execute import execute_kernels
    from castpoint.harness.ptx.driver import check_target as check_executed

    if target:
        check_target(target)
    targets, executed = (target,) if target else tuple(TARGETS), target or "sm_90"
    part_of, red = options.narrowed({}, target=target), False
    if run:
        check_executed(executed)
        records = options.records_of("execute", results, part_of, device="cpu", target=executed)
        execute_kernels(records, executed)
        red = finish_study(records, "executed")
    if configs:
        records = options.records_of("configs", results, part_of, device="cpu", targets=targets)
        sweep_configs(records, targets)
        finish_study(records, "configs")
    if not (run or configs):
        records = options.records_of("audit", results, part_of, device="cpu", targets=targets)
        for row in audit_all(targets):
            records.add(AuditRow(**row))
        red = finish_study(records, "audit")
    return red


STUDIES = {  # name -> its tables
    "survey": ("implementations",),
    "cases": ("cases",),
    "gates": ("gates", "tolerances"),
    "streams": ("streams",),
    "confusion": ("fingerprints", "captures"),
}
SYSTEMS = ("parallel", "jax", "engine", "four-bit")  # studies of a whole system, each a page of the report


def study_system(name: str, results: Path | None, source: str, short: bool, one: str = "") -> None:
    """Measures one of SYSTEMS or the claims (`one` of them) with its own run, and prints its page."""
    import importlib

    from castpoint.harness.report.systems import PAGES

    system = importlib.import_module(f"castpoint.harness.systems.{name.replace('-', '_')}")
    part_of = options.narrowed({}, model=source, short=short, claim=one)
    records = options.records_of(name, results, part_of, device="cpu", model=source, short=short)
    try:
        system.sweep(records, source, short, *([one] if one else []))
    except (UserError, ModuleNotFoundError):
        records.withdraw()
        raise
    records.finish()
    print(PAGES[name].page(records.folder))


def study(name: str, records: Records, device: str) -> None:
    """Measures what that study is of."""
    if name in ("survey", "confusion"):
        options.compiling()
    from castpoint.harness.accuracy.streams import sweep_streams
    from castpoint.harness.cases.run import run_cases
    from castpoint.harness.conformance.gates import sweep_gates
    from castpoint.harness.fingerprint.known import survey_captures, survey_known
    from castpoint.harness.fingerprint.survey import survey_implementations

    if name == "survey":
        survey_implementations(records, device)
    elif name == "confusion":
        survey_known(records)
        survey_captures(records)
    elif name == "gates":
        sweep_gates(records)
    elif name == "streams":
        sweep_streams(records)
    else:
        for row in run_cases():
            records.add(CaseRow(**row))


def red_rows(records: Records, *tables: str) -> list[dict[str, str]]:
    return [row for table in tables for row in records.rows(table) if row["status"] in ("red", "failed")]


def finish_study(records: Records, *tables: str) -> bool:
    """Ends the run and prints its sections of a report; whether any row is red."""
    from castpoint.harness.report.failures import bad_rows, section
    from castpoint.harness.report.markdown import paragraphs
    from castpoint.harness.report.studies import SECTIONS
    from castpoint.harness.runs.frames import load

    records.finish()
    frames = load(records.folder, records.run_id)
    print(paragraphs(*(part for t in tables for part in (SECTIONS[t](frames[t]), section(bad_rows(frames[t], t))))))
    return bool(red_rows(records, *tables))


def print_parts(records: Records, parts: tuple[str, ...]) -> None:
    from castpoint.harness.report import budget, rope_positions
    from castpoint.harness.report.markdown import paragraphs
    from castpoint.harness.report.page import tables
    from castpoint.harness.runs.frames import load

    frames = load(records.folder, records.run_id)
    turned = rope_positions.section(frames["rope_positions"])
    found = tables(frames) | {"budget": paragraphs(budget.section(frames["budget"]), turned)}
    shown = {"errors": ("plans", "kernels"), "amplification": ("amplification",), "budget": ("budget",)}
    for part in parts:
        print("\n\n".join(found[name] for name in shown.get(part, (part,))) + "\n")


def publish(source: Path | None) -> list[str]:
    """report.publish.publish of a run folder or an archive of one, after its outputs are compared with this CPU's; its
    configs into kernels/dispatch.csv. What may not be published is refused before anything is computed."""
    from castpoint.harness.report.publish import check_checkout, publish, publishable, unpacked
    from castpoint.harness.runs.frames import latest

    options.check_dispatch()
    check_checkout()
    with unpacked(source) as folder:
        if folder is None:
            return publish(None)
        publishable(folder)
        compared = compare_outputs(folder)
        tuned = latest(folder, "tuning", cut_off=True)
        return [*publish(folder), *compared, *([write_dispatch(folder)] if tuned else [])]


def compare_outputs(folder: Path) -> list[str]:
    """Outputs of the folder's newest GPU run against this CPU's, into its gpu_checks. Says in a line what it did;
    nothing where there is no such run."""
    from castpoint.harness.runs.frames import newest_gpu_run

    if not (run_id := newest_gpu_run(folder)):
        return []
    from castpoint.harness.conformance.outputs import compare_outputs

    found = compare_outputs(folder, run_id)
    said = found if isinstance(found, str) else f"{found} rows added to gpu_checks"
    return [f"outputs of run {run_id} {'not compared' if isinstance(found, str) else 'compared'}: {said}"]


def write_dispatch(folder: Path) -> str:
    """The fastest configs of the newest run with rows of tuning, finished or not, into kernels/dispatch.csv, whose
    other rows stay; says what it did. Raises UserError where no run of the folder has such rows."""
    from castpoint.harness.gpu.tune import table_of
    from castpoint.harness.runs.frames import latest
    from castpoint.harness.runs.records import load_runs, rows_of
    from castpoint.kernels.dispatch import TABLE, read_table, write_table

    if not (newest := latest(folder, "tuning", cut_off=True)):
        raise UserError(f"{folder} holds no rows of tuning: `castpoint gpu` measures them")
    run_id = newest[0]
    with mistakes(ValueError, KeyError, TypeError, about=str(TABLE)):
        table = read_table(TABLE)
    found = table_of(rows_of(folder, run_id, "tuning"), load_runs(folder)[run_id]["environment"]["gpu"]["name"])
    for key, configs in found.items():
        table.setdefault(key, {}).update(configs)
    with writing(TABLE):
        write_table(table, TABLE)
    return f"wrote {sum(map(len, found.values()))} configs of run {run_id} to {TABLE}"


def write_report(folder: Path) -> None:
    from castpoint.harness.report.publish import write

    print(write(folder))


def print_red(records: Records, *tables: str) -> bool:
    """Names what is red or failed on standard error; whether anything is."""
    found = red_rows(records, *tables)
    for row in found:
        name = next(row[column] for column in ("arm", "plan", "config", "step") if row.get(column))
        print(f"{name} {row['status']}: {row['reason']}", file=sys.stderr)
    return bool(found)
