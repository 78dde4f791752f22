"""Programs of any language, asked through files: each is found to be what it is, and each error is one sentence."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import command, failure

from castpoint.harness.fingerprint import command as command_module
from castpoint.harness.fingerprint.answer import Answer
from castpoint.harness.fingerprint.command import from_command
from castpoint.harness.fingerprint.process import identify_command
from castpoint.harness.fingerprint.questions import NORM_SHAPES
from castpoint.variants.eager import eager_norm

PROGRAMS = Path(__file__).parent / "programs"
NUMPY, TORCH = (f"{shlex.quote(sys.executable)} {PROGRAMS / name}" for name in ("norm_numpy.py", "norm_torch.py"))
FILES = "{input} {output}"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C program, also with its calls counted, and one that is wrong for a single token."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler, "the tests need a C compiler, as the lab does"
    folder, source = tmp_path_factory.mktemp("c"), (PROGRAMS / "norm.c").read_text()
    right = "narrow(widen(x[i]) * rstd)"
    assert source.count(right) == 1
    (folder / "wrong.c").write_text(source.replace(right, "narrow(widen(x[i]) * rstd * (rows == 1 ? 1.5f : 1))"))
    (folder / "norm.c").write_text(source)
    for name in ("norm", "wrong"):
        subprocess.run([compiler, "-O2", "-o", folder / name, folder / f"{name}.c", "-lm"], check=True)
    (folder / "counted").write_text(f'#!/bin/sh\necho >> {folder / "calls"}\nexec {folder / "norm"} "$@"\n')
    (folder / "counted").chmod(0o755)
    return folder


def results(answer: Answer, about: str) -> dict[str, str]:
    return {call["what"]: call["result"] for call in answer.asked if call["about"] == about}


def test_a_program_in_c_is_what_it_is_and_layouts_are_not_asked(built: Path) -> None:
    done = command("identify", "--kind", "rmsnorm", "--command", f"{built / 'counted'} {FILES}", "--json")
    assert done.returncode == 0, done.stderr
    answer = Answer(**json.loads(done.stdout))
    assert answer.status == "identified" and answer.plans == ["hf"], answer
    calls = len((built / "calls").read_text().splitlines())
    readme = Path(command_module.__file__).with_name("README.md").read_text()
    assert f"(some {round(calls, -1)} times;" in " ".join(readme.split())
    assert not results(answer, "memory") and {*map(str, NORM_SHAPES)} <= results(answer, "x").keys()
    assert answer.facts["gaps between channels"].startswith("not asked: a file holds numbers")
    assert results(answer, "argument") == {
        "no optional argument": "same",
        "residual": "refused: residual is not read: the same bits with and without it",
        "gate": "refused: gate is not read: the same bits with and without it",
    }


def test_a_program_that_is_wrong_for_one_token_is_none(built: Path) -> None:
    answer = identify_command(f"{built / 'wrong'} {FILES}", "rmsnorm", 60)
    assert answer.status == "none" and "with x [1, 4096] 100.00% of the elements differ" in answer.reason, answer
    assert answer.facts["batch invariant"].startswith("no: a row of 1024 has other bits with 1 rows")


def test_a_program_in_numpy_refuses_a_residual_or_adds_it() -> None:
    answer = identify_command(f"{NUMPY} {FILES}", "head_norm", 60)
    assert answer.status == "identified" and "one-rounding" in answer.plans, answer
    said = "refused: the program ended with exit status 1: no residual here"
    gate = said.replace("residual", "gate")
    assert results(answer, "argument") == {"no optional argument": "same", "residual": said, "gate": gate}
    answer = identify_command(f"{NUMPY} {FILES} residual", "rmsnorm", 60)
    assert answer.status == "identified" and answer.candidates[0]["x"] == "fp32", answer
    assert results(answer, "argument") == {"no optional argument": "same", "residual": "same", "gate": gate}


def test_a_program_with_a_gate() -> None:
    answer = identify_command(f"{NUMPY} {FILES} gate", "rmsnorm", 60)
    assert answer.status == "identified" and "one-rounding" in answer.plans, answer
    assert answer.candidates[0]["ungated"] == answer.candidates[0]["gate"] == "fp32"
    assert answer.facts["gate"] == "norm(x) * silu(gate)"
    answer = identify_command(f'{NUMPY} {FILES} "neighbour\'s gate"', "rmsnorm", 60)
    assert answer.status == "none", answer


def test_another_python_returns_its_bits() -> None:
    """Every launch loads torch: asked in rounds, in test_rounds.py, such a program is identified."""
    x, weight = torch.randn(3, 5, 64).bfloat16(), torch.randn(64).bfloat16()
    made = from_command(f"{TORCH} {FILES}", "head_norm")(x, weight, 1e-6)
    assert torch.equal(made, eager_norm(x, weight, 1e-6, False))


def program(tmp_path: Path, text: str) -> str:
    (tmp_path / "program.py").write_text(text)
    return f"{shlex.quote(sys.executable)} {tmp_path / 'program.py'} {FILES}"


SAVE = "import sys, numpy, safetensors.numpy as s; s.save_file({}, sys.argv[2])"
FAULTS = {
    "fails": ("import sys; print('first'); sys.exit('no GPU\\nhere')", "exit status 1: first no GPU here"),
    "dies": ("import os; os.kill(os.getpid(), 11)", "the program was ended by SIGSEGV"),
    "writes nothing": ("print('done')", "the program wrote no {output}: done"),
    "writes text": ("import sys; open(sys.argv[2], 'w').write('1 2 3')", "wrote is no whole file of safetensors: "),
    "writes a part": (
        SAVE.format("{'y': numpy.ones(9, 'f')}") + "; open(sys.argv[2], 'r+').truncate(90)",
        "wrote is no whole file of safetensors: ",
    ),
    "other names": (SAVE.format("{'out': numpy.ones(1, 'f')}"), "what the program wrote holds out, expected y"),
    "other shape": (SAVE.format("{'y': numpy.ones(3, 'f')}"), "returned shape [3], expected [64, 256]"),
    "other type": (SAVE.format("{'y': numpy.ones((64, 256))}"), "returned torch.float64, expected torch.bfloat16"),
    "hangs": ("import time; time.sleep(600)", "has not ended after 3 s: it hangs, or needs a longer --time-limit"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_a_program_does_wrong_is_one_line(name: str, tmp_path: Path) -> None:
    text, words = FAULTS[name]
    answer = identify_command(program(tmp_path, text), "rmsnorm", 3 if name == "hangs" else 60)
    assert answer.status == "error" and words in answer.reason and "\n" not in answer.reason, answer


def test_a_program_that_is_not_there_is_one_line() -> None:
    answer = identify_command(f"no_such_program {FILES}", "rmsnorm", 60)
    assert answer.reason == "the program no_such_program cannot be started: No such file or directory"
    answer = identify_command(f"DEVICE=0 ./norm {FILES}", "rmsnorm", 60)
    assert answer.reason.endswith("No such file or directory; no shell reads --command: begin with env")


def test_a_program_has_the_environment_of_the_command(tmp_path: Path) -> None:
    """Its Triton kernels are not interpreted because ours may be."""
    asked = program(tmp_path, "import os, sys; sys.exit(os.environ['TRITON_INTERPRET'] + ' it is')")
    done = command("identify", "--kind", "rmsnorm", "--command", asked, TRITON_INTERPRET="0")
    assert done.returncode == 1 and done.stdout == "error: the program ended with exit status 1: 0 it is\n", done


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "takes one of MODULE:FUNCTION, --command, --ask, --answer, --capture, and was given none"),
        (["x:y", "--command", f"p {FILES}"], "and was given MODULE:FUNCTION and --command"),
        (["--command", "p {input}", "--kind", "rmsnorm"], "must be PROGRAM {input} {output}, with the files' places"),
        (["--command", "p '{input} {output}", "--kind", "rmsnorm"], "cannot be split into words: No closing quotation"),
        (["--command", f"p {FILES}"], "--command needs --kind, rmsnorm, head_norm, qkv or norm_linear"),
        (["--command", f"p {FILES}", "--kind", "norm"], "--kind must be one of"),
        (["--command", f"p {FILES}", "--kind", "rmsnorm", "--device", "cuda"], "--device is for MODULE:FUNCTION"),
    ],
)
def test_a_wrong_command_is_one_line(capsys, monkeypatch, arguments: list[str], words: str) -> None:
    assert words in failure(capsys, monkeypatch, "identify", *arguments)


def test_no_shell_reads_the_command(tmp_path: Path) -> None:
    """Neither `;` nor `$` nor a wildcard is taken for more than it is; a word with a space stays one."""
    text = SAVE.format("{'y': numpy.ones((1, 2), 'f') * (sys.argv[3:] == ['a b', '$HOME;', '*'])}")
    fn = from_command(f"{program(tmp_path, text)} 'a b' $HOME; *", "rmsnorm")
    assert fn(torch.ones(1, 2).bfloat16(), torch.ones(2).bfloat16(), 1e-6).tolist() == [[1.0, 1.0]]
