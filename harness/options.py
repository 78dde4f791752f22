"""Options of the command line: their types, what they mean, and one line for each that cannot be.

All is checked before any work starts or a results folder is made. Heavy imports wait, so that --help is quick.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated

import typer

from castpoint.harness.fingerprint.sizes import Sizes
from castpoint.harness.fingerprint.subject import Subject
from castpoint.harness.problems.geometry import geometry_named, name_of
from castpoint.harness.runs.environment import ROOT, describe, machine_name
from castpoint.harness.runs.errors import UserError, mistakes
from castpoint.harness.runs.records import Records, Settings

RUNS = Path("runs")  # where records go, one folder a machine; git ignores it
PUBLISHED = ROOT / "results"
PARTS = ("errors", "amplification", "budget", "speed")  # of a bench
WHOLE = {"model": Settings.model, "tokens": Settings.tokens, "parts": PARTS}  # values that leave nothing out
NEUTRAL = ("command", "device", "results")  # options that narrow nothing

ResultsFolder = Annotated[Path | None, typer.Option(help="Folder for the records. Default: runs/<machine>.")]
DeviceName = Annotated[str, typer.Option(help="cpu or cuda. Default: cuda where there is one.")]
ModelName = Annotated[str, typer.Option(help="A geometry by name, such as qwen2.5-7b. Default: qwen3-0.6b.")]
Source = Annotated[str | None, typer.Option(help="Real weights: safetensors or GGUF, a folder of shards, a hub id.")]
Layers = Annotated[str, typer.Option(help="Layers, such as 0-27 or 0,5,8. Default: all.")]
Tokens = Annotated[int, typer.Option(help="Tokens of the problems whose errors are measured.", min=1)]
Plans = Annotated[str, typer.Option(help="Plans by name, with commas. Default: all (see `plans`).")]
Seed = Annotated[int, typer.Option(help="Seed of drawn weights and inputs.", min=0, max=10**9)]
Short = Annotated[bool, typer.Option("--short", help="Three layers, fewer tokens: does everything run?")]
Only = Annotated[str, typer.Option(help=f"Parts by name, with commas: {', '.join(PARTS)}. Default: all.")]

# What identify asks: a function, a program, or through files.
Target = Annotated[str, typer.Argument(help="MODULE:FUNCTION, such as engine.norms:rms_norm or norm.py:rms_norm.")]
Command = Annotated[str, typer.Option(help="A program instead: 'PROGRAM {input} {output}', both files of safetensors.")]
Ask = Annotated[Path | None, typer.Option(help="No connection: writes the questions into this new folder.")]
Answered = Annotated[Path | None, typer.Option("--answer", help="A folder of --ask: answers, or asks once more.")]
Kind = Annotated[str, typer.Option(help="rmsnorm, head_norm, qkv, norm_linear or qk_norm_rope. Default: guessed.")]
AskedDevice = Annotated[str, typer.Option(help="cpu or cuda: where it is called; on cpu PTX for sm_90 is run.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
TimeLimit = Annotated[float, typer.Option(help="Seconds after which the callable counts as hanging.", min=1)]

Targets = Annotated[
    tuple[str, str], typer.Argument(help="MODULE:FUNCTION, 'PROGRAM {input} {output}' or capture.safetensors, twice.")
]

# Of a kernel that identify asks, where it does not take any.
Width = Annotated[int | None, typer.Option(help="Channels of x that it takes.", min=16, max=65536)]
HeadDim = Annotated[int | None, typer.Option(help="Channels of a head that it takes.", min=16, max=4096)]
Heads = Annotated[str, typer.Option(help="Heads that it takes: 16, or 16,8 of q and of k and v.")]
AskedTokens = Annotated[int | None, typer.Option(help="Tokens that every call has.", min=1, max=65536)]
Dtype = Annotated[str, typer.Option(help="Of x: bf16, fp16 (throughout), or, of norms, fp32 (a residual stream).")]
Call = Annotated[str, typer.Option(help="How a norm is called, such as 'fn(out, x, w, eps)'. Default: by its names.")]
Calls = Annotated[
    list[str] | None,
    typer.Option("--call", help="How both norms are called, 'fn(out, x, w, eps)'; twice: one for each."),
]
CaptureFile = Annotated[
    Path | None, typer.Option("--capture", help="One recorded call, in safetensors, in place of a function.")
]
Eps = Annotated[float | None, typer.Option(help="An eps that it is asked with, besides those of public models.", min=0)]


def sizes(
    width: int | None, head_dim: int | None, heads: str, tokens: int | None, eps: float | None, dtype: str
) -> Sizes:
    """What identify calls a kernel with. Raises UserError for heads that are no numbers, and an unknown dtype."""
    if dtype not in ("bf16", "fp16", "fp32"):
        raise UserError(f"--dtype must be bf16, fp16 or fp32, not {dtype!r}")
    try:
        numbers = tuple(int(number) for number in heads.split(",")) if heads else None
    except ValueError:
        numbers = ()
    if numbers is not None and not (len(numbers) in (1, 2) and min(numbers) > 0 and numbers[0] % numbers[-1] == 0):
        raise UserError(f"--heads must be heads of q, or heads of q and of k and v that divide them, not {heads!r}")
    if eps is not None and not math.isfinite(eps):
        raise UserError(f"--eps must be a number, not {eps:g}")
    return Sizes(width, head_dim, numbers, tokens, eps, dtype)


def check_subject(subject: Subject, kind: str, device: str, expect: str, sizes: Sizes) -> None:
    """Raises UserError unless one of what identify asks, by the names of its options, is given, with what it needs."""
    given = {"MODULE:FUNCTION": subject.target, "--command": subject.command, "--ask": subject.ask}
    given |= {"--answer": subject.answer, "--capture": subject.capture}
    there = [name for name, value in given.items() if value]
    if len(there) != 1:
        raise UserError(f"identify takes one of {', '.join(given)}, and was given {' and '.join(there) or 'none'}")
    if there[0] in ("--command", "--ask") and kind == "qk_norm_rope":
        raise UserError(f"qk_norm_rope is asked of MODULE:FUNCTION alone: {there[0]} takes others")
    if there[0] in ("--command", "--ask") and not kind:
        raise UserError(f"{there[0]} needs --kind, rmsnorm, head_norm, qkv or norm_linear: a program does not tell")
    if there[0] != "MODULE:FUNCTION" and device != "cpu":
        raise UserError(f"--device is for MODULE:FUNCTION: what {there[0]} asks chooses its own, leave it out")
    if subject.call and there[0] != "MODULE:FUNCTION":
        raise UserError(f"--call is for MODULE:FUNCTION: leave it out with {there[0]}")
    if there[0] == "--capture" and (kind or sizes != Sizes(heads=sizes.heads, eps=sizes.eps)):
        raise UserError("--capture says all but --heads and --eps by itself: leave out other options")
    if there[0] in ("--command", "--ask") and sizes.dtype != "bf16":
        raise UserError(f"--dtype is for MODULE:FUNCTION: {there[0]} gives bf16")
    if there[0] == "--ask" and expect:
        raise UserError("--expect is for an answer: give it to --answer, not to --ask")


def select(
    command: str = "bench",
    *,
    model: str = "",
    checkpoint: str | None = None,
    layers: str = "",
    tokens: int = Settings.tokens,
    plans: str = "",
    seed: int = Settings.seed,
    device: str = "",
    results: Path | None = None,
    short: bool = False,
    parts: tuple[str, ...] = PARTS,
) -> tuple[Settings, Records]:
    """Checks every option, decides how kernels run, and opens the results folder, before any work starts.

    Raises UserError for an option that cannot be."""
    part_of = narrowed(WHOLE, **locals())
    name, geometry = model or Settings.model, geometry_named(model or Settings.model)
    if checkpoint is not None:
        from castpoint.harness.problems.checkpoint import opened

        named, geometry = geometry, opened(checkpoint, name).geometry
        if model and geometry != named:
            raise UserError(f"{checkpoint} is {name_of(geometry) or geometry}, not --model {model}: leave --model out")
        name = name_of(geometry) or Path(checkpoint).name
    chosen = parse_layers(layers, geometry.num_layers)
    device = device_named(device)
    from castpoint.variants.catalogue import PLANS

    settings = Settings(
        model=name,
        checkpoint=checkpoint,
        layers=chosen[:3] if short else chosen,
        tokens=min(tokens, 32) if short else tokens,
        kernel_tokens=16 if device == "cpu" else 64,
        speed_tokens=(1, 16) if short else (1, 16, 128) if device == "cpu" else (1, 16, 256, 4096),
        plans=parse_plans(plans) if plans else tuple(PLANS),
        seed=seed,
        device=device,
        speed_budget_s=2.0 if short else 15.0,
    )
    if checkpoint is not None:  # every layer makes a problem, so that no run ends halfway for it
        from castpoint.harness.problems.drawn import checkpoint_problem

        for layer in settings.layers:
            checkpoint_problem(checkpoint, settings.model, layer, 1, seed)
    command += f" --only {','.join(parts)}" if parts != PARTS else ""
    return settings, records_of(command, results, part_of, **vars(settings))


def records_of(
    command: str,
    results: Path | None,
    part_of: dict[str, str] | None = None,
    archive: Path | None = None,
    *,
    device: str,
    **settings: object,
) -> Records:
    """The results folder of a command, where its run is opened. part_of: as narrowed says; archive: the folder as one
    file, as Records says; the rest is recorded."""
    folder = results or RUNS / machine_name(device)
    refuse_published(folder)
    records = Records(folder, {"command": command, "device": device, **settings}, describe(device), archive)
    records.note(command=command, narrowed_by=part_of or {})
    return records


def gpu_folder(results: Path | None) -> Path:
    """Where the records of a GPU run go. Raises UserError without a CUDA device, and for published results."""
    device = device_named("cuda")
    folder = results or RUNS / machine_name(device)
    refuse_published(folder)
    return folder


def refuse_published(folder: Path) -> None:
    """Raises UserError for the folder of published results, or one in it."""
    if PUBLISHED in (folder.resolve(), *folder.resolve().parents):
        raise UserError(
            f"{folder} holds published results, which `make publish` alone writes: choose another --results"
        )


def newest_folder() -> Path:
    """The folder under runs/ that was last written to by a run. Raises UserError if there is none."""
    found = sorted(RUNS.glob("*/environment.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"{RUNS}/ holds no run yet: run `castpoint bench` first, or give --results")
    return found[-1].parent


def narrowed(whole: dict[str, object], **asked: object) -> dict[str, str]:
    """Those of a command's options that make its run a part of the whole one: such a run is not published. whole:
    values that leave nothing out."""
    return {name: str(v) for name, v in asked.items() if v and v != whole.get(name) and name not in NEUTRAL}


def device_named(wanted: str) -> str:
    """The device to measure on. On a CPU Triton's interpreter is switched on, before kernels are imported."""
    import torch

    if wanted not in ("", "cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda, not {wanted!r}")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device here: `gpu` and --device cuda need one, `bench` measures on the CPU")
    if wanted != "cpu" and torch.cuda.is_available():
        if os.environ.get("TRITON_INTERPRET") == "1":
            raise UserError("TRITON_INTERPRET=1 would interpret the kernels: unset it, or choose --device cpu")
        return "cuda"
    os.environ["TRITON_INTERPRET"] = "1"
    return "cpu"


def compiling() -> None:
    """Kernels are compiled by this command, not interpreted; before they are imported."""
    os.environ["TRITON_INTERPRET"] = "0"


def parse_plans(text: str) -> tuple[str, ...]:
    """Names with commas. Raises UserError, with the nearest name, where one is no plan's."""
    from castpoint.variants.catalogue import plan_named

    names = tuple(text.split(","))
    with mistakes(KeyError):
        for name in names:
            plan_named(name)
    return names


def parse_parts(text: str) -> tuple[str, ...]:
    """Parts of a bench with commas, in their order; all of them if text is empty. Raises UserError for another."""
    asked = text.split(",") if text else PARTS
    for name in asked:
        if name not in PARTS:
            raise UserError(f"--only takes {', '.join(PARTS)}, with commas, not {name!r}")
    return tuple(part for part in PARTS if part in asked)


def parse_layers(text: str, count: int) -> tuple[int, ...]:
    """Layers of a text such as `0-3,8`; all of them if it is empty. Raises UserError if it is no such text or names a
    layer beyond count."""
    layers: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()) or int(last or first) < int(first):
            raise UserError(f"--layers takes numbers and ranges such as 0-3,8, not {text!r}")
        if int(last or first) >= count:
            raise UserError(f"--layers {text}: the model has layers 0 to {count - 1}")
        layers += range(int(first), int(last or first) + 1)
    return tuple(dict.fromkeys(layers or range(count)))


def check_dispatch() -> None:
    """Raises UserError where kernels/dispatch.csv, which a user may have written, is no such table."""
    from castpoint.kernels.dispatch import TABLE, read_table

    with mistakes(ValueError, KeyError, TypeError, about=str(TABLE)):
        read_table()
