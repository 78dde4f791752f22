"""What a user does wrong is one line and exit 1, at every command; a bug of ours is a traceback."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import ROOT, failure
from safetensors.torch import load_file, save_file
from tiny_checkpoints import SAMPLE, gguf_tensors, model_tensors, write_folder, write_gguf
from tiny_models import write_gguf as write_whole

import castpoint.harness.__main__ as cli
import castpoint.harness.accuracy.sweep as sweep
from castpoint.harness.runs.errors import UserError, writing
from castpoint.harness.runs.records import Records
from castpoint.harness.steps import SYSTEMS

KERNEL = """
import triton
import triton.language as tl

@triton.jit
def copy(x, y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n), mask=at < n)

@triton.autotune([triton.Config({"BLOCK": 4})], key=[])
@triton.jit
def tuned(x, BLOCK: tl.constexpr):
    pass

def plain(x):
    return x
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the mistakes below name; TRITON_INTERPRET, which commands set, is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", os.environ["TRITON_INTERPRET"])
    (tmp_path / "kernels_of_mine.py").write_text(KERNEL)
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "environment.json").write_text('{"schema": 99, "runs": {}}')
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "environment.json").write_text("not JSON")
    return tmp_path


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "identify x:y --kind norm",
            "--kind must be one of rmsnorm, head_norm, qkv, norm_linear, qk_norm_rope, not 'norm'",
        ),
        ("identify x:y --expect hff", "did you mean 'hf'?"),
        ("identify x:y --kind rmsnorm --expect deferred", "use --kind qkv"),
        ("identify x:y --device cuda", "no CUDA device here"),
        ("bench --model qwen3-0.6", "did you mean 'qwen3-0.6b'?"),
        ("bench --plans hf,fp23", "did you mean 'fp32'?"),
        ("bench --plans ,", "unknown plan ''"),
        ("bench --layers 28", "the model has layers 0 to 27"),
        ("bench --layers 5-3", "numbers and ranges such as 0-3,8"),
        ("bench --layers 0-99999999999", "the model has layers 0 to 27"),
        ("bench --only amplify", "--only takes errors, amplification, budget, speed"),
        ("bench --device tpu", "must be cpu or cuda"),
        ("bench --checkpoint nothing", "nothing does not exist, and is no hub id"),
        ("bench --checkpoint file", "no safetensors file"),
        ("bench --results file", "cannot be written"),
        ("bench --results other", "has schema 99"),
        ("bench --results foreign", "is not a record of this lab"),
        ("gpu", "no CUDA device here"),
        ("gpu --minutes 9 --archive run.tar.gz", "no CUDA device here"),
        ("gpu --from-records", "runs/ holds no run yet"),
        ("gpu --from-records --results nothing", "nothing holds no rows of tuning"),
        ("gpu --from-records --results other", "has schema 99"),
        ("model nothing", "nothing does not exist, and is no hub id"),
        ("model file", "file is one file of a model"),
        ("model qwen3-0.6b --plans fp23", "did you mean 'fp32'?"),
        ("model qwen3-0.6b --backend cudnn", "unknown backend 'cudnn'"),
        ("model qwen3-0.6b --prompts nothing.txt", "nothing.txt does not exist"),
        ("model qwen3-0.6b --device tpu", "must be cpu or cuda"),
        ("audit nothing", "is not MODULE:FUNCTION"),
        ("audit nothing.py:kernel", "nothing.py does not exist"),
        ("audit broken.py:kernel", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("audit kernels_of_mine.py:missing", "has no attribute 'missing'"),
        ("audit kernels_of_mine.py:plain", "not a function under @triton.jit"),
        ("audit kernels_of_mine.py:copy", "needs a value for BLOCK"),
        ("audit kernels_of_mine.py:copy BLOCK", "a constant is written NAME=VALUE"),
        ("audit kernels_of_mine.py:copy SIZE=4", "has no argument SIZE"),
        ("audit kernels_of_mine.py:copy BLOCK=4 --signature i32", "needs 3 types, for x, y, n; 1 are given"),
        ("audit kernels_of_mine.py:copy BLOCK=4 --signature a,b,c", "unknown type 'a'"),
        ("audit kernels_of_mine.py:copy --run", "leave KERNEL out"),
        ("audit --signature i32", "name it before"),
        ("audit --target sm_70", "unknown target 'sm_70'"),
        ("audit kernels_of_mine.py:copy BLOCK=4 --signature *bf16,*bf16,i32 --target sm_70", "unknown target 'sm_70'"),
        ("audit --run --target gfx942", "target must be sm_80 or sm_90"),
        ("audit --configs --results file", "cannot be written"),
        ("study", "studies are survey, cases, gates, streams, confusion"),
        ("study parallel A1", "'A1' is no part of `study parallel`"),
        ("study cases --short", "--model and --short are for systems and claims"),
        ("bound nothing", "nothing does not exist, and is no hub id"),
        ("study cases --results file", "cannot be written"),
        ("study survey --device tpu", "must be cpu or cuda"),
        ("report", "runs/ holds no run yet"),
        ("report --results nothing", "holds no finished bench"),
        ("report --results other", "has schema 99"),
        ("report --results foreign", "is not a record of this lab"),
        ("publish", "runs in the root of a checkout"),
    ],
)
def test_a_mistake_is_one_line(capsys, monkeypatch, line: str, words: str) -> None:
    arguments = line.split() + (["nothing"] if line == "study" else [])
    assert words in failure(capsys, monkeypatch, *arguments)
    assert not Path("runs").exists(), "a refused run left a folder"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        *((f"{name} --model nothing --short", "nothing does not exist, and is no hub id") for name in SYSTEMS),
        *((f"{name} --model other --short", "config.json") for name in SYSTEMS),
        ("claims A2 --model nothing --short", "nothing does not exist, and is no hub id"),
        ("claims A9", "there is no claim 'A9': claims are A1, A2"),
        ("claims B1 --model other", "--model is for a claim of reports 000 to 002"),
    ],
)
def test_a_refused_study_of_a_system_leaves_nothing(capsys, monkeypatch, line: str, words: str) -> None:
    assert words in failure(capsys, monkeypatch, "study", *line.split())
    assert not Path("runs").exists()


@pytest.mark.parametrize("line", ["jax", "four-bit", *(f"{name} --model m.gguf" for name in ("parallel", "engine"))])
def test_a_study_without_its_package_leaves_nothing(capsys, monkeypatch, here: Path, line: str) -> None:
    write_whole(here / "m.gguf", "qwen2")
    package = "jax" if line == "jax" else "gguf"
    for module in ("jax", "codecs", "four_bit", "jax_port"):
        monkeypatch.delitem(sys.modules, f"castpoint.harness.systems.{module}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    said = failure(capsys, monkeypatch, "study", *line.split(), "--short")
    assert f"the package {package} is missing: pip install" in said
    assert not Path("runs").exists()


def test_a_refused_study_leaves_other_runs_as_they_are(capsys, monkeypatch, here: Path) -> None:
    failure(capsys, monkeypatch, *"study claims A9 --results foreign".split())
    assert (here / "foreign" / "environment.json").read_text() == "not JSON"
    Records(here / "records", {"command": "bench"}, {}).finish()
    before = (here / "records" / "environment.json").read_text()
    failure(capsys, monkeypatch, *"study claims A9 --results records".split())
    assert (here / "records" / "environment.json").read_text() == before


@pytest.mark.parametrize("command", ["bench", "study cases", "audit", "model qwen3-0.6b", "report", "gpu"])
def test_published_results_are_nobodys_folder(capsys, monkeypatch, command: str) -> None:
    monkeypatch.setattr("castpoint.harness.options.device_named", lambda wanted: "cpu")
    for folder in (ROOT / "results" / "cpu", ROOT / "results"):
        said = failure(capsys, monkeypatch, *command.split(), "--results", str(folder))
        assert "which `make publish` alone writes" in said


def test_checkpoints_that_hold_no_problem(capsys, monkeypatch, here: Path) -> None:
    tensors = load_file(SAMPLE)
    tensors["k_proj_weight"][3, 4] = torch.nan
    save_file(tensors, here / "nan.safetensors", {"layer": "0"})
    said = failure(capsys, monkeypatch, *"bench --checkpoint nan.safetensors --model qwen2.5-0.5b --layers 0".split())
    assert "layer 0 of nan.safetensors: qkv_weight holds NaN or infinity" in said
    folder = write_folder(here / "m", "qwen3")
    for key, value in (("head_dim", "32"), ("num_key_value_heads", 0), ("rms_norm_eps", -1)):
        config = json.loads((folder / "config.json").read_text()) | {key: value}
        write_folder(here / f"m-{key}", "qwen3", model_tensors("qwen3"), config)
        said = failure(capsys, monkeypatch, "bench", "--checkpoint", f"m-{key}")
        assert f"must give {key} as a positive number, not {value!r}" in said


@pytest.mark.parametrize(
    ("package", "line", "extra"),
    [
        ("gguf", "bench --checkpoint m.gguf", "models"),
        ("gguf", "model m.gguf", "models"),
        ("gguf", "bound m.gguf", "models"),
        ("huggingface_hub", "bench --checkpoint Qwen/Tiny", "models"),
        ("castpoint.harness.model.language_model", "model qwen3-0.6b", None),
    ],
)
def test_a_missing_package_is_named_with_its_extra(capsys, monkeypatch, here: Path, package, line, extra) -> None:
    write_gguf(here / "m.gguf", "qwen3", gguf_tensors("qwen3"))
    monkeypatch.setitem(sys.modules, package, None)
    if extra:
        said = failure(capsys, monkeypatch, *line.split())
        assert said == f"error: the package {package} is missing: pip install 'castpoint[{extra}]'"
    else:  # a module of ours that cannot be imported is our bug
        monkeypatch.setattr(sys, "argv", ["castpoint", *line.split()])
        with pytest.raises(ModuleNotFoundError):
            cli.main()


def test_a_folder_that_takes_no_more_is_the_users(capsys, monkeypatch, here: Path) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert "records cannot be written (No space left on device)" in failure(
        capsys, monkeypatch, *"bench --layers 0 --results records".split()
    )
    with pytest.raises(FileNotFoundError), writing(here):  # that is nobody's but ours
        raise FileNotFoundError(errno.ENOENT, "no such file")
    with pytest.raises(UserError, match="Read-only"), writing(here):
        raise OSError(errno.EROFS, "Read-only file system")


@pytest.mark.parametrize("error", [ValueError, KeyError, FileNotFoundError, ImportError])
def test_a_bug_of_ours_shows_its_traceback(monkeypatch, error: type[Exception]) -> None:
    def planted(*arguments: object, **options: object) -> None:
        raise error("planted")

    monkeypatch.setattr(sweep, "problem_at", planted)
    monkeypatch.setattr(sys, "argv", "castpoint bench --only amplification --layers 0 --plans hf --device cpu".split())
    with pytest.raises(error, match="planted"):
        cli.main()


def test_the_traceback_reaches_the_screen(here: Path) -> None:
    code = (
        "import sys, castpoint.harness.runs.records as records\n"
        "records.Records.has = lambda *a, **k: {}['planted']\n"
        "sys.argv = 'castpoint study cases'.split()\n"
        "from castpoint.harness.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" in done.stderr and "KeyError: 'planted'" in done.stderr
