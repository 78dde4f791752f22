"""Options: how they are read, and that a checkpoint is opened once for all that a run asks of it."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import pytest
from tiny_checkpoints import SAMPLE, TINY, gguf_tensors, write_folder, write_gguf, write_sharded

import castpoint.harness.__main__ as cli
from castpoint.harness import steps
from castpoint.harness.options import PARTS, newest_folder, parse_layers, parse_parts, parse_plans, select
from castpoint.harness.problems import checkpoint, files
from castpoint.harness.problems.drawn import problem_at
from castpoint.harness.report.publish import unfit
from castpoint.harness.runs.errors import UserError
from castpoint.harness.runs.records import Settings, load_runs


def test_layers_are_parsed() -> None:
    assert parse_layers("0-3,8,2", 28) == (0, 1, 2, 3, 8)
    assert parse_layers("", 3) == (0, 1, 2)
    with pytest.raises(UserError, match="unknown plan ''"):
        parse_plans("")
    with pytest.raises(UserError, match="layers 0 to 4"):
        parse_layers("5", 5)


def test_parts_are_parsed_in_their_order() -> None:
    assert parse_parts("") == PARTS and parse_parts("speed,errors") == ("errors", "speed")
    with pytest.raises(UserError, match="--only takes errors"):
        parse_parts("errors,")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files that are opened as checkpoints, and tensors that are read, as it happens."""
    checkpoint._kept.cache_clear()
    found: list[str] = []
    safe_open, reader, read = files.safe_open, gguf.GGUFReader, checkpoint._read_inputs
    monkeypatch.setattr(files, "safe_open", lambda path, **k: found.append(Path(path).name) or safe_open(path, **k))
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: found.append(Path(path).name) or reader(path))
    monkeypatch.setattr(checkpoint, "_read_inputs", lambda *a: found.append("a layer") or read(*a))
    return found


@pytest.mark.parametrize(
    ("write", "names"),
    [
        (lambda where: write_folder(where / "m", "qwen3"), ["model.safetensors"]),
        (lambda where: write_sharded(where / "m", "qwen3"), [f"model-{n}.safetensors" for n in range(4)]),
        (lambda where: write_gguf(where / "m.gguf", "qwen3", gguf_tensors("qwen3")), ["m.gguf"]),
    ],
)
def test_a_run_opens_a_checkpoint_once(tmp_path: Path, opened: list[str], write, names: list[str]) -> None:
    """However often its problems are asked for: by the options, by three sweeps on every layer."""
    settings, records = select(checkpoint=str(write(tmp_path)), device="cpu", results=tmp_path / "results")
    for layer in [*settings.layers] * 3:
        assert problem_at(settings, layer, 4).layer == layer
    files_opened = sorted(name for name in opened if name != "a layer")
    assert files_opened == names and opened.count("a layer") == TINY["qwen3"].num_layers == len(settings.layers)


def test_a_lone_file_too(tmp_path: Path, opened: list[str]) -> None:
    settings, _ = select(
        checkpoint=str(SAMPLE), model="qwen2.5-0.5b", layers="0", device="cpu", results=tmp_path / "results"
    )
    problems = [problem_at(settings, 0, tokens) for tokens in (1, 8)]
    assert opened == [SAMPLE.name, "a layer"]
    assert [problem.tokens for problem in problems] == [1, 8] and settings.checkpoint == str(SAMPLE)


def test_a_part_of_a_bench_is_a_run_of_its_own(tmp_path: Path) -> None:
    """So that a bench that was stopped is not ended by one of its parts."""
    settings, whole = select(device="cpu", results=tmp_path)
    _, part = select(device="cpu", results=tmp_path, parts=("speed",))
    assert whole.run_id != part.run_id and part.runs[part.run_id]["command"] == "bench --only speed"
    assert whole.runs[whole.run_id]["settings"] == {"command": "bench", **vars(settings)}
    assert settings == Settings(layers=tuple(range(28)), plans=settings.plans)


@pytest.mark.parametrize(
    ("line", "noted"),
    [
        ("--layers 0 --tokens 4 --plans hf", {"layers": "0", "tokens": "4", "plans": "hf"}),
        ("--short", {"short": "True"}),
        ("--model qwen3-8b --seed 3", {"model": "qwen3-8b", "seed": "3"}),
        (f"--checkpoint {SAMPLE} --model qwen2.5-0.5b --layers 0", {"checkpoint": str(SAMPLE), "layers": "0"}),
        ("--only speed", {"parts": "('speed',)"}),
        ("--model qwen3-0.6b --tokens 128 --seed 0", {}),
    ],
)
def test_what_narrows_a_run_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str, noted: dict) -> None:
    """By the command line itself: publish refuses such a run."""
    monkeypatch.setattr(steps, "measure", lambda *arguments: None)
    monkeypatch.setattr(steps, "write_report", lambda folder: None)
    monkeypatch.setattr(steps, "print_parts", lambda *arguments: None)
    monkeypatch.setattr(sys, "argv", f"castpoint bench --device cpu --results {tmp_path / 'r'} {line}".split())
    with pytest.raises(SystemExit) as status:
        cli.main()
    assert not status.value.code
    (run,) = load_runs(tmp_path / "r").values()
    assert noted.items() <= run["narrowed_by"].items() and bool(noted) == bool(run["narrowed_by"])
    assert bool(unfit(run | {"environment": {"commit": "c0ffee"}})) == bool(noted)


def test_the_newest_folder_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="holds no run yet"):
        newest_folder()
    for name in ("cpu", "h200"):
        select(device="cpu", results=Path("runs") / name)
    assert newest_folder() == Path("runs/h200")
