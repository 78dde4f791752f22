"""Command line: castpoint COMMAND. Heavy imports wait until a command needs them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
except ImportError:
    sys.exit("error: the command line needs typer and rich: `make bench` sets them up, or pip install typer rich")

from castpoint.harness.options import (
    DeviceName,
    ResultsFolder,
    device_named,
    on_selection,
    parse_plans,
    prompts_hash,
    records_of,
    select,
)
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.settings import Settings

app = typer.Typer(
    help="Where does a fused RMSNorm -> QKV -> K-norm kernel round to bf16, what does it cost, what does it buy?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
@on_selection
def bench(settings: Settings, records: Records) -> None:
    """Errors, amplification and speed of every plan, then plots and report."""
    from castpoint.harness.accuracy.sweep import sweep_kernels, sweep_precision
    from castpoint.harness.timing.sweep import sweep_speed

    sweep_precision(settings, records)
    sweep_kernels(settings, records)
    sweep_speed(settings, records)
    records.finish()
    _write_report(records.folder)


@app.command()
@on_selection
def errors(settings: Settings, records: Records) -> None:
    """Errors of q, k and v of every plan and backend, without times."""
    from castpoint.harness.accuracy.sweep import sweep_kernels, sweep_precision
    from castpoint.harness.report.page import tables

    sweep_precision(settings, records)
    sweep_kernels(settings, records)
    records.finish()
    for table in ("plans", "kernels"):
        print(tables(records.folder, records.run_id)[table] + "\n")


@app.command()
@on_selection
def amplify(settings: Settings, records: Records) -> None:
    """What the K-norm weights do to K's error, to the attention logits and to softmax."""
    from castpoint.harness.accuracy.sweep import sweep_precision
    from castpoint.harness.report.page import tables

    sweep_precision(settings, records)
    records.finish()
    print(tables(records.folder, records.run_id)["amplification"])


@app.command()
@on_selection
def budget(settings: Settings, records: Records) -> None:
    """How much of each plan's error each of its roundings makes: exact Shapley values."""
    from castpoint.harness.accuracy.budget import sweep_budget

    sweep_budget(settings, records)
    records.finish()
    _print_study(records, "budget")


@app.command()
@on_selection
def speed(settings: Settings, records: Records) -> None:
    """Times of eager, torch.compile and every plan on this machine."""
    from castpoint.harness.accuracy.sweep import sweep_kernels
    from castpoint.harness.report.page import tables
    from castpoint.harness.timing.sweep import sweep_speed

    sweep_kernels(settings, records)  # what is red gets no time
    sweep_speed(settings, records)
    records.finish()
    print(tables(records.folder, records.run_id)["speed"])


@app.command()
def gpu(
    results: ResultsFolder = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two models at four token counts, three layers.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List every measurement; touch no GPU.")] = False,
) -> None:
    """Everything that wants a CUDA device: checks, errors, the grid of speeds, fingerprints. Continues where it was."""
    from castpoint.harness.problems import grid

    if dry_run:
        from castpoint.harness.gpu.arms import listing

        print("\n".join(listing(quick)))
        return
    settings, records = select(device="cuda", results=results, short=quick)
    records.note(command="gpu")
    from castpoint.harness.accuracy.sweep import sweep_kernels, sweep_precision
    from castpoint.harness.conformance.cuda import check_eager, check_interpreter, check_kernels
    from castpoint.harness.fingerprint.survey import survey_implementations
    from castpoint.harness.gpu.sweep import sweep_gpu
    from castpoint.harness.timing.cuda import Cuda, DeviceLost
    from castpoint.harness.timing.sweep import sweep_speed

    device = Cuda()
    try:
        check_kernels(records, device)
        check_eager(records, device)
        check_interpreter(records, device)
        sweep_precision(settings, records)
        sweep_kernels(settings, records)
        sweep_gpu(grid.points(quick), records, device, quick)
        sweep_speed(settings, records)
        if not quick:
            survey_implementations(records, "cuda")
    except DeviceLost as error:
        raise ValueError(f"{error}; what was measured is kept, the same command goes on from there") from None
    records.finish()
    tables = ("errors", "speed", "gpu_checks", "gpu_speed")
    red = [row for table in tables for row in records.rows(table) if row["status"] in ("red", "failed")]
    for row in red:
        print(f"{row.get('arm') or row['plan']} {row['status']}: {row['reason']}", file=sys.stderr)
    try:
        _write_report(records.folder)
    except ImportError as error:
        print(f"records are in {records.folder}; {error.name} is missing, so plots and report wait for `make report`")
    if red:
        raise typer.Exit(1)


@app.command()
def tune(
    results: ResultsFolder = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two models at four token counts.")] = False,
) -> None:
    """Time every config of the kernels on this GPU, and write the fastest into kernels/dispatch.csv."""
    device = device_named("cuda")
    from castpoint.harness.gpu.tune import tune as tuned
    from castpoint.harness.problems import grid
    from castpoint.harness.timing.cuda import Cuda, DeviceLost
    from castpoint.kernels.dispatch import TABLE, read_table, write_table

    records = records_of("tune", results, device, quick=quick)
    try:
        found = tuned([p for p in grid.points(quick) if p.regime == grid.COLD], records, Cuda())
    except DeviceLost as error:
        raise ValueError(f"{error}; what was measured is kept, the same command goes on from there") from None
    records.finish()
    table = read_table()
    for key, configs in found.items():
        table.setdefault(key, {}).update(configs)
    write_table(table)
    print(f"wrote {sum(map(len, found.values()))} configs to {TABLE}")


@app.command()
def identify(
    target: Annotated[str, typer.Argument(help="MODULE:FUNCTION, such as engine.norms:rms_norm or norm.py:rms_norm.")],
    kind: Annotated[str, typer.Option(help="rmsnorm, head_norm or qkv: the callable's signature (see the README).")],
    device: Annotated[str, typer.Option(help="cpu or cuda: where it is called; on cpu PTX for sm_90 is run.")] = "cpu",
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    time_limit: Annotated[float, typer.Option(help="Seconds after which the callable counts as hanging.", min=1)] = 300,
    expect: Annotated[str, typer.Option(help="A named plan: exits with 1 unless this is it, or its norm.")] = "",
) -> None:
    """Which plan does a callable implement? Exits with 1 if it cannot be called as it should."""
    import json

    from castpoint.harness.fingerprint.answer import check_expectation, unmet
    from castpoint.harness.fingerprint.blackbox import KINDS
    from castpoint.harness.fingerprint.norm import summary
    from castpoint.harness.fingerprint.process import identify_target

    if kind not in KINDS:
        raise ValueError(f"--kind must be one of {', '.join(KINDS)}, not {kind!r}")
    if expect:
        check_expectation(expect, kind)
    answer = identify_target(target, kind, device_named(device), time_limit)
    failed = expect and unmet(answer, expect, kind)
    if json_ or not failed:
        print(json.dumps(answer.as_dict()) if json_ else summary(answer))
    if failed:
        raise ValueError(f"{target} is not {expect}: {failed}")
    if answer.status == "error":
        raise typer.Exit(1)


@app.command()
def survey(results: ResultsFolder = None, device: DeviceName = "") -> None:
    """Fingerprints of public implementations: PyTorch, Hugging Face, Liger, JAX and others that are installed."""
    device = device_named(device)
    os.environ["TRITON_INTERPRET"] = "0"
    from castpoint.harness.fingerprint.survey import survey_implementations

    records = records_of("survey", results, device)
    survey_implementations(records, device)
    records.finish()
    _print_study(records, "implementations")


@app.command()
def cases(results: ResultsFolder = None) -> None:
    """Cases of the field: a boundary that moved in a public engine, what it changes here, and what was claimed."""
    from castpoint.harness.cases.run import run_cases

    records = records_of("cases", results, device_named("cpu"))
    for row in run_cases():
        if not records.has("cases", **row):
            records.add("cases", **row)
    records.finish()
    _print_study(records, "cases")


@app.command()
def confusion(results: ResultsFolder = None) -> None:
    """Fingerprints of this lab's own plans, whose answers are known: takes half an hour on two cores."""
    device = device_named("cpu")
    from castpoint.harness.fingerprint.survey import survey_known

    records = records_of("confusion", results, device)
    survey_known(records)
    records.finish()
    _print_study(records, "fingerprints")


COUNTED = {  # what three columns of an audited kernel count
    "not_followed": "  (operations of TTIR that the audit cannot see through)",
    "fused": "  (multiply-adds of the machine code where TTIR multiplies and adds apart)",
    "expanded": "  (multiply-adds that TTIR's products, quotients and roots expand to)",
}


@app.command()
def audit(
    constants: Annotated[
        list[str] | None, typer.Argument(help="With --kernel: NAME=VALUE for each tl.constexpr, num_warps, num_stages.")
    ] = None,
    kernel: Annotated[str, typer.Option(help="MODULE:FUNCTION, a foreign @triton.jit kernel. Default: our own.")] = "",
    signature: Annotated[
        str, typer.Option(help="With --kernel: types of its other arguments: *bf16,*bf16,i32,fp32")
    ] = "",
    target: Annotated[str, typer.Option(help="sm_80, sm_90, sm_100 or gfx942. Default: all.")] = "",
    results: ResultsFolder = None,
) -> None:
    """Does the compiled code hold the roundings that the plan declares? Needs no GPU; exits with 1 if a row is red."""
    os.environ["TRITON_INTERPRET"] = "0"
    from castpoint.harness.audit.foreign import audit_foreign
    from castpoint.harness.audit.kernels import audit_all, check_target
    from castpoint.harness.compiled.compile import TARGETS

    targets = (target,) if target else tuple(TARGETS)
    for name in targets:
        check_target(name)
    if kernel:
        rows = [audit_foreign(kernel, name, signature, constants or ()) for name in targets]
        for row in rows:
            said = {name: value for name, value in row.items() if value not in ("", None)}
            print("\n".join(f"{name:13} {value}{COUNTED.get(name, '')}" for name, value in said.items()) + "\n")
    else:
        records = records_of("audit", results, "cpu", targets=targets)
        for row in audit_all(targets):
            if not records.has("audit", **row):
                records.add("audit", **row)
        records.finish()
        _print_study(records, "audit")
        rows = records.rows("audit")
    if any(row["status"] in ("red", "failed") for row in rows):
        raise typer.Exit(1)


@app.command()
def execute(
    target: Annotated[str, typer.Option(help="sm_80 or sm_90: the GPU to compile for.")] = "sm_90",
    results: ResultsFolder = None,
) -> None:
    """Runs the PTX of every kernel on this CPU: does it equal its spec? Needs no GPU; exits with 1 if a row is red."""
    os.environ["TRITON_INTERPRET"] = "0"
    from castpoint.harness.conformance.execute import execute_kernels
    from castpoint.harness.ptx.driver import check_target

    check_target(target)
    records = records_of("execute", results, "cpu", target=target)
    execute_kernels(records, target)
    records.finish()
    _print_study(records, "executed")
    if any(row["status"] != "ok" for row in records.rows("executed")):
        raise typer.Exit(1)


@app.command()
def configs(results: ResultsFolder = None) -> None:
    """Registers, spills and shared memory of every tile that a launch may take. Needs no GPU."""
    os.environ["TRITON_INTERPRET"] = "0"
    from castpoint.harness.compiled.resources import sweep_configs

    records = records_of("configs", results, "cpu")
    sweep_configs(records)
    records.finish()
    _print_study(records, "configs")


# Cast before the matmul, twice and once a norm; after it; not at all before the store; and by truncation.
MODEL_PLANS = "hf,one-rounding,cast-after-matmul,fp32,truncating"


@app.command()
def model(
    source: Annotated[
        str, typer.Argument(metavar="MODEL", help="A hub id, a folder, a .gguf file, or qwen3-0.6b (calibrated).")
    ],
    plans: Annotated[str, typer.Option(help="Plans by name, with commas (see `plans`).")] = MODEL_PLANS,
    backend: Annotated[str, typer.Option(help="eager, inductor, triton, triton-separate or spec.")] = "eager",
    prompts: Annotated[Path | None, typer.Option(help="Text file, blank lines between prompts.")] = None,
    tokens: Annotated[int, typer.Option(help="At most so many tokens of each prompt.", min=2)] = 128,
    passages: Annotated[int, typer.Option(help="How many of the eight fixed passages to read.", min=1, max=8)] = 8,
    results: ResultsFolder = None,
    device: DeviceName = "",
) -> None:
    """Does a language model notice? Every plan inside a real model, against float64 and against eager bf16."""
    device = device_named(device)
    from castpoint.harness.model.language_model import load
    from castpoint.harness.model.study import CONTINUATION, arms, sweep_model, texts
    from castpoint.harness.report import model as impact_report
    from castpoint.variants.backends import check_backend

    read = prompts_hash(prompts)
    names = parse_plans(plans)
    check_backend(backend)
    lm = load(source, device, tokens + CONTINUATION)
    arms(lm, names, backend)  # raises what does not fit, before work starts
    found = texts(lm, prompts, tokens, passages)
    asked = {"plans": names, "backend": backend, "prompts": read, "tokens": tokens, "passages": passages}
    records = records_of("model", results, device, model=lm.name, weights=lm.weights, **asked)
    sweep_model(lm, names, backend, found, records)
    records.finish()
    (study,) = [study for study in impact_report.studies(records.folder) if study.run_id == records.run_id]
    print(impact_report.section(study))


@app.command()
def models() -> None:
    """Fetch Gemma 3 270M, a real model with q and k norms, into models/."""
    from castpoint.harness.model.fetch import fetch

    folder = fetch()
    print(f"{folder} is ready: castpoint model {folder}")


@app.command()
def report(
    results: Annotated[Path | None, typer.Option(help="Results folder. Default: results/cpu, and the README.")] = None,
) -> None:
    """Plots, report.md and the README's tables from the newest finished bench or gpu run of a results folder."""
    from castpoint.harness.report.readme import update_readme

    folder = results or Path("results/cpu")
    _write_report(folder)
    if results is None:
        update_readme(Path("README.md"), folder)
        print("wrote the tables of README.md")


@app.command(name="plans")
def show_plans() -> None:
    """The named plans: where each rounds, and who uses it."""
    from castpoint.variants.catalogue import PLANS

    for name, named in PLANS.items():
        p = named.plan
        print(
            f"{name:20} {' '.join(p.roundings()):62} scale={p.scale} matmul={p.matmul} weight_offset={p.weight_offset} "
            f"RoPE: {' '.join(p.rope_roundings()) or 'none'}"
        )
        print(f"{'':20} {named.about}")


@app.command()
def doctor() -> None:
    """What is missing or in the way on this machine, and the cure."""
    from castpoint.harness.doctor import checks

    failed = False
    for check in checks():
        print(
            f"{'ok' if check.ok else 'PROBLEM':8} {check.what}" + ("" if check.ok else f"\n{'':8} cure: {check.cure}")
        )
        failed = failed or not check.ok
    if failed:
        raise typer.Exit(1)


def _print_study(records: Records, table: str) -> None:
    from castpoint.harness.report.studies import SECTIONS
    from castpoint.harness.runs.frames import load

    print(SECTIONS[table](load(records.folder, records.run_id)[table]))


def _write_report(folder: Path) -> None:
    from castpoint.harness.report import gpu_plots, gpu_rows
    from castpoint.harness.report.page import newest_run, write_report
    from castpoint.harness.report.plots import draw

    run_id, gpu_run = newest_run(folder), gpu_rows.newest(folder)
    draw(folder, run_id)
    if gpu_run:
        gpu_plots.draw(folder, gpu_run.run_id)
    print(f"wrote {write_report(folder, run_id)} and {folder / 'plots'}")


def main() -> None:
    try:
        app()
    except (ValueError, KeyError, OSError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
        sys.exit(1)
    except ImportError as error:
        sys.exit(f"error: the package {error.name} is missing: `make bench` sets up what is needed")


if __name__ == "__main__":
    main()
