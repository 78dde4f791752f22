"""Command line: castpoint COMMAND. Heavy imports wait until a command needs them."""

from __future__ import annotations

import hashlib
import math
import sys
import time
from pathlib import Path
from typing import Annotated

try:
    import typer
except ImportError:
    sys.exit("error: the command line needs typer and rich: `make bench` sets them up, or pip install typer rich")

from castpoint.harness import options, steps
from castpoint.harness.fingerprint.subject import Subject
from castpoint.harness.options import DeviceName, ResultsFolder
from castpoint.harness.runs.errors import UserError, mistakes

app = typer.Typer(
    help="Where does a fused RMSNorm -> QKV -> K-norm kernel round to bf16, what does it cost, what does it buy?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
WHICH, COST, BUYS, MATTERS = "Which plan?", "What does it cost?", "What does it buy?", "Does it matter?"
PROVEN, LAB = "Is it proven?", "The lab"


@app.command(rich_help_panel=WHICH)
def identify(
    target: options.Target = "",
    command: options.Command = "",
    ask: options.Ask = None,
    answer: options.Answered = None,
    kind: options.Kind = "",
    device: options.AskedDevice = "cpu",
    json_: options.Json = False,
    time_limit: options.TimeLimit = 300,
    expect: Annotated[str, typer.Option(help="A named plan: exits with 1 unless this is it, or its norm.")] = "",
    width: options.Width = None,
    head_dim: options.HeadDim = None,
    heads: options.Heads = "",
    tokens: options.AskedTokens = None,
    eps: options.Eps = None,
    dtype: options.Dtype = "bf16",
    call: options.Call = "",
    capture: options.CaptureFile = None,
) -> None:
    """Which plan is a function's, a program's, a capture's? Exits with 1 if it cannot be called, or read."""
    sizes = options.sizes(width, head_dim, heads, tokens, eps, dtype)
    subject = Subject(target, command, ask, answer, capture, call)
    raise typer.Exit(steps.identify(subject, kind, device, time_limit, sizes, expect, json_))


@app.command(rich_help_panel=WHICH)
def compare(
    targets: options.Targets,
    kind: options.Kind = "",
    device: options.AskedDevice = "cpu",
    json_: options.Json = False,
    time_limit: options.TimeLimit = 600,
    width: options.Width = None,
    head_dim: options.HeadDim = None,
    heads: options.Heads = "",
    tokens: options.AskedTokens = None,
    dtype: options.Dtype = "bf16",
    call: options.Calls = None,
) -> None:
    """Are two functions, programs or captures one? If not, where do they part? Exits with 1 unless they are."""
    sizes = options.sizes(width, head_dim, heads, tokens, None, dtype)
    raise typer.Exit(steps.compare(targets, kind, device, time_limit, sizes, call or [], json_))


app.command(name="plans", rich_help_panel=WHICH)(steps.print_plans)


@app.command(rich_help_panel=COST)
def bench(
    model: options.ModelName = "",
    checkpoint: options.Source = None,
    layers: options.Layers = "",
    tokens: options.Tokens = 128,
    plans: options.Plans = "",
    seed: options.Seed = 0,
    device: DeviceName = "",
    results: ResultsFolder = None,
    short: options.Short = False,
    only: options.Only = "",
) -> None:
    """Errors, amplification, error budget and speed of every plan, then plots and report."""
    given = dict(locals())  # the options, by their names
    parts = options.parse_parts(given.pop("only"))
    settings, records = options.select("bench", **given, parts=parts)
    steps.measure(settings, records, parts)
    records.finish()
    if parts == options.PARTS:
        steps.write_report(records.folder)
    else:
        steps.print_parts(records, parts)
    raise typer.Exit(steps.print_red(records, "errors", "budget", "speed"))


@app.command(rich_help_panel=BUYS)
def gpu(
    results: ResultsFolder = None,
    minutes: Annotated[float | None, typer.Option(help="Time to spend. Default: until all is measured.", min=0)] = None,
    archive: Annotated[
        Path | None, typer.Option(help="The run as one file, which a new folder goes on from. Default: NAME.tar.gz.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Every step in order, with a clock; no GPU.")] = False,
    from_records: Annotated[
        bool,
        typer.Option("--from-records", help="What was tuned into kernels/dispatch.csv; outputs against this CPU's."),
    ] = False,
) -> None:
    """Speeds on a CUDA device, checked before they count, most worth first. Continues where it was."""
    if dry_run:
        from castpoint.harness.gpu.order import listing

        print("\n".join(listing()))
        return
    if from_records:
        folder = results or options.newest_folder()
        print(steps.write_dispatch(folder))
        print("\n".join(steps.compare_outputs(folder)))
        return
    options.compiling()
    options.check_dispatch()
    from castpoint.harness.runs.process import apart, supervised

    deadline = time.monotonic() + 60 * minutes if minutes is not None else math.inf
    folder = apart(options.gpu_folder, results)
    archive = archive or folder.with_name(f"{folder.name}.tar.gz")
    status = supervised(folder, deadline)
    if status is None:
        raise typer.Exit(steps.measure_gpu(folder, archive, deadline))
    steps.keep(folder, archive)
    raise typer.Exit(status)


# Cast before the matmul, twice and once a norm; after it; not at all before the store; and by truncation.
MODEL_PLANS = "hf,one-rounding,cast-after-matmul,fp32,truncating"
MODEL_TOKENS, MODEL_PASSAGES = 96, 32  # all passages have more tokens, and there are no more passages


@app.command(rich_help_panel=MATTERS)
def model(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A hub id, a folder, a .gguf file; gemma-3-270m, qwen2.5-coder-0.5b-instruct (fetched into models/) "
            "or qwen3-0.6b (calibrated).",
        ),
    ],
    plans: Annotated[str, typer.Option(help="Plans by name, with commas (see `plans`).")] = MODEL_PLANS,
    backend: Annotated[str, typer.Option(help="eager, inductor, triton, triton-separate or spec.")] = "eager",
    prompts: Annotated[Path | None, typer.Option(help="Text file, blank lines between prompts.")] = None,
    tokens: Annotated[int, typer.Option(help="At most so many tokens of each prompt.", min=2)] = MODEL_TOKENS,
    passages: Annotated[
        int, typer.Option(help="How many of the fixed passages to read.", min=1, max=MODEL_PASSAGES)
    ] = MODEL_PASSAGES,
    results: ResultsFolder = None,
    device: DeviceName = "",
    fetch_only: Annotated[bool, typer.Option("--fetch-only", help="Have the model ready, and stop.")] = False,
) -> None:
    """Does a language model notice? Every plan inside a real model, against float64 and against eager bf16."""
    device = options.device_named(device)
    names = options.parse_plans(plans)
    from castpoint.variants.backends import check_backend

    with mistakes(ValueError):
        check_backend(backend)
    if results is not None:
        options.refuse_published(results)
    from castpoint.harness.model.fetch import had
    from castpoint.harness.model.k_norms import sweep_k_norms
    from castpoint.harness.model.language_model import load
    from castpoint.harness.model.study import CONTINUATION, arms, read_prompts, sweep_model, texts
    from castpoint.harness.report.model import section, study_of

    read = hashlib.sha256(prompts.read_bytes()).hexdigest() if prompts and read_prompts(prompts) else ""
    source = had(source)
    if fetch_only:
        print(f"{source} is ready")
        return
    lm = load(source, device, tokens + CONTINUATION)
    arms(lm, names, backend)  # raises what does not fit, before work starts
    found = texts(lm, prompts, tokens, passages)
    asked = {"plans": names, "backend": backend, "prompts": read, "tokens": tokens, "passages": passages}
    whole = {"plans": MODEL_PLANS, "backend": "eager", "tokens": MODEL_TOKENS, "passages": MODEL_PASSAGES}
    part_of = options.narrowed(whole, **asked | {"plans": plans, "prompts": prompts})
    records = options.records_of("model", results, part_of, device=device, model=lm.name, weights=lm.weights, **asked)
    sweep_model(lm, names, backend, found, records)
    sweep_k_norms(lm, found, records)
    records.finish()
    print(section(study_of(records.folder, records.run_id)))


@app.command(rich_help_panel=MATTERS)
def bound(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="As `model` takes it: Qwen2, Qwen3 or Gemma 3.")],
    measured: Annotated[
        Path | None, typer.Option(help="CSV of differences to judge: stage,layer,max_abs (logits: no layer).")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16: what both implementations compute in.")] = "float32",
    prompt: Annotated[str, typer.Option(help="The text that they read.")] = "What is the capital of France?",
) -> None:
    """Fault or rounding? The most that rounding alone can make two right implementations differ by, at every stage."""
    import torch

    from castpoint.harness.model.fetch import had
    from castpoint.harness.systems import bound as bounding
    from castpoint.harness.systems.weights import opened, tokenizer_of

    if dtype not in bounding.BITS:
        raise UserError(f"--dtype must be {' or '.join(bounding.BITS)}, not {dtype!r}")
    differences = bounding.read_differences(measured) if measured else []
    folder = had(source)
    weights, ids = opened(folder), tokenizer_of(folder).encode(prompt)
    if not ids:
        raise UserError(f"--prompt {prompt!r} has no tokens: give some text")
    bounding.check_stages(differences, weights.config)
    found = bounding.bounds(weights.config, weights.all(torch.float64), ids, dtype)
    if not measured:
        print("\n".join(f"{stage},{'' if layer < 0 else layer},{most:.3g}" for (stage, layer), most in found.items()))
        return
    judged = bounding.judge(differences, found)
    print("\n".join(each.line() for each in judged))
    raise typer.Exit(any(each.fault for each in judged))


@app.command(rich_help_panel=PROVEN)
def audit(
    kernel: Annotated[
        str, typer.Argument(help="MODULE:FUNCTION, a foreign @triton.jit kernel. Default: our own, all of them.")
    ] = "",
    constants: Annotated[
        list[str] | None, typer.Argument(help="NAME=VALUE for each tl.constexpr of KERNEL, num_warps, num_stages.")
    ] = None,
    signature: Annotated[str, typer.Option(help="Types of KERNEL's other arguments: *bf16,*bf16,i32,fp32")] = "",
    run: Annotated[bool, typer.Option("--run", help="Run our kernels' PTX on this CPU, against their specs.")] = False,
    configs: Annotated[bool, typer.Option("--configs", help="Registers, spills, shared memory of every tile.")] = False,
    target: Annotated[str, typer.Option(help="sm_80, sm_90, sm_100 or gfx942. Default: all; of --run: sm_90.")] = "",
    ptx: Annotated[Path | None, typer.Option(help="PTX of any compiler, nvcc too: what it rounds, and where.")] = None,
    results: ResultsFolder = None,
) -> None:
    """Does the compiled code hold the roundings that the plan declares? Needs no GPU; exits with 1 if a row is red."""
    if ptx:
        raise typer.Exit(steps.audit_ptx(ptx, kernel or signature or run or configs or target or results))
    options.compiling()
    if kernel and (run or configs):
        raise UserError("--run and --configs are for the lab's own kernels: leave KERNEL out")
    if signature and not kernel:
        raise UserError("--signature is for a foreign kernel: name it before, MODULE:FUNCTION")
    if kernel:
        red = steps.audit_foreign(kernel, target, signature, constants or [])
    else:
        options.check_dispatch()
        red = steps.audit_own(run, configs, target, results)
    raise typer.Exit(red)


@app.command(rich_help_panel=LAB)
def study(
    name: Annotated[str, typer.Argument(help="survey, cases, gates, streams, confusion; a system; claims.")],
    results: ResultsFolder = None,
    device: DeviceName = "",
    claim: Annotated[str, typer.Argument(help="One claim, such as A1, of `study claims`. Default: all.")] = "",
    model: Annotated[str, typer.Option(help="Of a system: a folder, a .gguf file, a hub id. Default: real ones.")] = "",
    short: Annotated[bool, typer.Option("--short", help="Of a system or claims: few tokens, few draws.")] = False,
) -> None:
    """A study by its name: survey, cases, gates, streams, confusion; systems, or one of them; claims.

    survey: fingerprints of public implementations that are installed. cases: what moved boundaries did to public
    engines, measured here beside what was claimed. gates: which of the lab's checks, and of other people's tolerances,
    see which planted fault. streams: what massive tokens change (a quarter of an hour). confusion: fingerprints of the
    lab's own plans (over an hour). systems: those of five reports, rebuilt: parallel (tensor parallel), jax, engine
    (paged KV cache, any plan inside), four-bit (llama.cpp's weights). claims: what the reports said, with verdicts.
    """
    systems = steps.SYSTEMS if name == "systems" else (name,) if name in (*steps.SYSTEMS, "claims") else ()
    if not systems and name not in steps.STUDIES:
        raise UserError(
            f"unknown study {name!r}: studies are {', '.join([*steps.STUDIES, 'systems', *steps.SYSTEMS, 'claims'])}"
        )
    if claim and name != "claims":
        raise UserError(f"{claim!r} is no part of `study {name}`: only `study claims` takes a claim")
    if (model or short) and not systems:
        raise UserError(f"--model and --short are for systems and claims, not for `study {name}`")
    device = options.device_named(device if name == "survey" else "cpu")
    for system in systems:
        steps.study_system(system, results, model, short, claim)
    if not systems:
        records = options.records_of(name, results, device=device)
        steps.study(name, records, device)
        steps.finish_study(records, *steps.STUDIES[name])


@app.command(rich_help_panel=LAB)
def report(
    results: Annotated[Path | None, typer.Option(help="Results folder. Default: the newest under runs/.")] = None,
) -> None:
    """Plots and report.md from a results folder's newest finished bench and its newest GPU run, cut off or not."""
    folder = results or options.newest_folder()
    options.refuse_published(folder)
    steps.write_report(folder)


@app.command(hidden=True)
def publish(
    source: Annotated[Path | None, typer.Argument(help="A run folder, such as runs/cpu, or an archive of one.")] = None,
) -> None:
    """For maintainers (`make publish`): a run folder's records into results/, with plots, report and README."""
    print("\n".join(steps.publish(source)))


@app.command(rich_help_panel=LAB)
def doctor() -> None:
    """What is missing or in the way on this machine, and the cure."""
    from castpoint.harness.doctor import checks

    found = list(checks())
    for check in found:
        print(f"ok       {check.what}" if check.ok else f"PROBLEM  {check.what}\n         cure: {check.cure}")
    raise typer.Exit(not all(check.ok for check in found))


def main() -> None:
    """What a user did wrong is one line, and exit 1. A bug of ours shows its traceback."""
    from castpoint.harness.doctor import cure_of

    try:
        app()
    except UserError as error:
        message = " ".join(str(error).split())
    except ModuleNotFoundError as error:
        cure = cure_of((error.name or "").partition(".")[0])
        if cure is None:
            raise
        message = f"the package {error.name} is missing: {cure}"
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
