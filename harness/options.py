"""Options of the command line: their types, what they mean, and one line for each that cannot be.

All is checked before any work starts or a results folder is made. Heavy imports wait, so that --help is quick.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from castpoint.harness.problems.geometry import Geometry, geometry_named, name_of
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.settings import Settings

ResultsFolder = Annotated[Path | None, typer.Option(help="Folder for the records. Default: results/<machine>.")]
DeviceName = Annotated[str, typer.Option(help="cpu or cuda. Default: cuda where there is one.")]


def select(
    model: Annotated[str, typer.Option(help="A geometry by name, such as qwen2.5-7b. Default: qwen3-0.6b.")] = "",
    checkpoint: Annotated[
        str | None, typer.Option(help="Real weights: a safetensors or GGUF file, a folder of shards, or a hub id.")
    ] = None,
    layers: Annotated[str, typer.Option(help="Layers, such as 0-27 or 0,5,8. Default: all.")] = "",
    tokens: Annotated[int, typer.Option(help="Tokens of the problems whose errors are measured.", min=1)] = 128,
    plans: Annotated[str, typer.Option(help="Plans by name, with commas. Default: all (see `plans`).")] = "",
    seed: Annotated[int, typer.Option(help="Seed of drawn weights and inputs.", min=0)] = 0,
    device: DeviceName = "",
    results: ResultsFolder = None,
    short: Annotated[bool, typer.Option("--short", help="Three layers, fewer tokens: does everything run?")] = False,
) -> tuple[Settings, Records]:
    """Checks every option, decides how kernels run, and opens the results folder, before any work starts."""
    wanted = model or Settings.model
    geometry = geometry_named(wanted)
    if checkpoint is not None:
        wanted, geometry = _checkpoint_geometry(checkpoint, model, layers)
    chosen = parse_layers(layers, geometry.num_layers) or tuple(range(geometry.num_layers))
    chosen = chosen[:3] if short else chosen
    if checkpoint is not None:
        _check_layers(checkpoint, wanted, chosen)
    device = device_named(device)
    from castpoint.harness.runs.environment import describe, machine_name
    from castpoint.variants.catalogue import PLANS

    settings = Settings(
        model=wanted,
        checkpoint=checkpoint,
        layers=chosen,
        tokens=min(tokens, 32) if short else tokens,
        kernel_tokens=16 if device == "cpu" else 64,
        speed_tokens=(1, 16) if short else (1, 16, 128) if device == "cpu" else (1, 16, 256, 4096),
        plans=parse_plans(plans) if plans else tuple(PLANS),
        seed=seed,
        device=device,
        speed_budget_s=2.0 if short else 15.0,
    )
    return settings, Records(results or Path("results") / machine_name(device), settings.row(), describe(device))


def on_selection(command: Callable[[Settings, Records], None]) -> Callable[..., None]:
    """A command over a selection of plans and layers: it takes the options of `select`."""

    @functools.wraps(command)
    def with_options(**options: Any) -> None:
        settings, records = select(**options)
        records.note(command=command.__name__)
        command(settings, records)

    with_options.__signature__ = inspect.signature(select, eval_str=True).replace(return_annotation=None)
    return with_options


def records_of(command: str, results: Path | None, device: str, **settings: object) -> Records:
    """The results folder of a command that takes no selection of plans and layers."""
    from castpoint.harness.runs.environment import describe, machine_name

    folder = results or Path("results") / machine_name(device)
    records = Records(folder, {"command": command, "device": device, **settings}, describe(device))
    records.note(command=command)
    return records


def device_named(wanted: str) -> str:
    """The device to measure on. On a CPU Triton's interpreter is switched on, before kernels are imported."""
    import torch

    if wanted not in ("", "cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, not {wanted!r}")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA device here: `gpu` and --device cuda need one, `bench` measures on the CPU")
    if wanted != "cpu" and torch.cuda.is_available():
        if os.environ.get("TRITON_INTERPRET") == "1":
            raise ValueError("TRITON_INTERPRET=1 would interpret the kernels: unset it, or choose --device cpu")
        return "cuda"
    os.environ["TRITON_INTERPRET"] = "1"
    return "cpu"


def parse_plans(text: str) -> tuple[str, ...]:
    """Names with commas. Raises KeyError, with the nearest name, where one is no plan's."""
    from castpoint.variants.catalogue import plan_named

    names = tuple(text.split(","))
    for name in names:
        plan_named(name)
    return names


def parse_layers(text: str, count: int) -> tuple[int, ...]:
    """Layers of a text such as `0-3,8`. Raises ValueError if it is no such text or names a layer beyond count."""
    layers: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise ValueError(f"--layers takes numbers and ranges such as 0-3,8, not {text!r}")
        layers += range(int(first), int(last or first) + 1)
    if layers and max(layers) >= count:
        raise ValueError(f"--layers {text}: the model has layers 0 to {count - 1}")
    return tuple(dict.fromkeys(layers))


def prompts_hash(prompts: Path | None) -> str:
    """SHA-256 of a file of prompts, empty without one. Raises ValueError where there is no such file."""
    import hashlib

    if prompts is None:
        return ""
    if not prompts.is_file():
        raise ValueError(f"--prompts {prompts} does not exist: give a text file, with blank lines between prompts")
    return hashlib.sha256(prompts.read_bytes()).hexdigest()


def _checkpoint_geometry(checkpoint: str, model: str, layers: str) -> tuple[str, Geometry]:
    """Name and geometry of a checkpoint. Raises ValueError if it cannot be read or is not the model asked for."""
    from castpoint.harness.problems.checkpoint import load_layer

    first = parse_layers(layers, sys.maxsize)[:1] or (0,)
    geometry, _ = load_layer(checkpoint, first[0], model or Settings.model)
    if model and geometry != geometry_named(model):
        raise ValueError(f"{checkpoint} is {name_of(geometry) or geometry}, not --model {model}: leave --model out")
    return name_of(geometry) or Path(checkpoint).name, geometry


def _check_layers(checkpoint: str, model: str, layers: tuple[int, ...]) -> None:
    """Raises ValueError unless every layer can be read, so that no run ends halfway for it."""
    from castpoint.harness.problems.checkpoint import load_layer

    for layer in layers:
        load_layer(checkpoint, layer, model)
