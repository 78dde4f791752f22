"""Targets of identify and audit: files that import what lies beside them, and what is no function of tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from castpoint.harness.compiled.loading import Fault, check_function, load

ROOT = Path(__file__).parents[3]
NORM = """
import torch
{imports}
def norm(x, weight, eps):
    x = x.float()
    return weight * (x * rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)).bfloat16()
"""
HELPERS = "import torch\ndef rsqrt(x):\n    return torch.rsqrt(x)\n"


@pytest.fixture(autouse=True)
def same_path_and_modules() -> Iterator[None]:
    path, modules = list(sys.path), dict(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - set(modules):
        del sys.modules[name]


def written(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def identified(target: str, cwd: Path = ROOT) -> dict[str, object]:
    """The answer of the command, as a user starts it."""
    command = [sys.executable, "-m", "castpoint", "identify", target, "--json"]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- what a file imports


PACKAGE = {"__init__.py": "", "ops/__init__.py": "", "helpers.py": HELPERS}
RELATIVE = {
    "beside it": ("engine/norms.py", "from .helpers import rsqrt"),
    "above it": ("engine/ops/norms.py", "from ..helpers import rsqrt"),
    "its package": ("engine/norms.py", "from . import helpers\nrsqrt = helpers.rsqrt"),
    "in a function": ("engine/norms.py", "def rsqrt(x):\n    from .helpers import rsqrt as own\n    return own(x)"),
}


@pytest.mark.parametrize("case", RELATIVE)
def test_a_file_that_imports_relatively_is_loaded_as_part_of_its_package(case: str, tmp_path: Path) -> None:
    name, imports = RELATIVE[case]
    written(tmp_path / "engine", PACKAGE)
    written(tmp_path, {name: NORM.format(imports=imports)})
    norm = load(f"{tmp_path / name}:norm")
    assert norm(torch.ones(2, 4).bfloat16(), torch.ones(4).bfloat16(), 0.0).eq(1).all()
    assert norm.__module__ == name.removesuffix(".py").replace("/", ".")


def test_its_package_may_be_asked_by_a_path_from_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "inner", PACKAGE | {"norms.py": NORM.format(imports="from .helpers import rsqrt")})
    monkeypatch.chdir(tmp_path / "inner")
    assert load("norms.py:norm").__module__ == "inner.norms"


def test_relative_imports_without_a_package_are_told_what_to_do(tmp_path: Path) -> None:
    written(tmp_path / "loose", {"norms.py": NORM.format(imports="from .helpers import rsqrt"), "helpers.py": HELPERS})
    with pytest.raises(Fault) as fault:
        load(f"{tmp_path}/loose/norms.py:norm")
    said = str(fault.value)
    assert (
        said.startswith("norms.py imports relatively, and ") and "add an __init__.py" in said and "loose.norms" in said
    )
    assert "\n" not in said


def test_a_file_beside_it_is_found_and_hides_no_package(tmp_path: Path) -> None:
    sys.modules.pop("colorsys", None)
    beside = {"aside.py": HELPERS, "colorsys.py": "1/0"}
    written(tmp_path, {"norms.py": NORM.format(imports="import colorsys\nfrom aside import rsqrt"), **beside})
    assert load(f"{tmp_path}/norms.py:norm")(torch.ones(2, 4).bfloat16(), torch.ones(4).bfloat16(), 0.0).eq(1).all()


def test_a_file_with_the_name_of_a_module_does_not_take_its_place(tmp_path: Path) -> None:
    import random

    written(tmp_path, {"random.py": NORM.format(imports="from torch import rsqrt")})
    assert load(f"{tmp_path}/random.py:norm").__module__ == "target_random"
    assert sys.modules["random"] is random


def test_a_relative_target_is_identified(tmp_path: Path) -> None:
    written(tmp_path / "pack", PACKAGE | {"norms.py": NORM.format(imports="from .helpers import rsqrt")})
    answer = identified(f"{tmp_path}/pack/norms.py:norm")
    assert answer["status"] == "identified" and answer["plans"] == ["hf"], answer


# ---------------------------------------------------------------- files of another kind


FOREIGN = {
    "k.cu:rms_norm": "k.cu is source code that is not compiled here: compile it, call it in a Python function, and ",
    "a/k.CPP:f": "is source code that is not compiled here",
    "lib/ops.so:rms_norm": "lib/ops.so is compiled code without a Python function: call it in a Python function, and",
    "norm.ptx:kernel": "is compiled code without a Python function",
    "norm.cubin:kernel": "is compiled code without a Python function",
    "try.ipynb:norm": "try.ipynb is a notebook: copy the function into a .py file",
    "my/norms:rms_norm": "my/norms is no .py file and no dotted name: give my/norms.py:rms_norm or my.norms:rms_norm",
}


@pytest.mark.parametrize("target", FOREIGN)
def test_a_file_without_a_python_function(target: str) -> None:
    with pytest.raises(Fault) as fault:
        load(target)
    assert FOREIGN[target] in str(fault.value) and "\n" not in str(fault.value)


def test_a_folder_is_no_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "norms").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Fault, match="norms is no .py file and no dotted name"):
        load("norms:rms_norm")


def test_a_module_of_here_is_still_found_by_its_dotted_name() -> None:
    assert load("castpoint.kernels.norm_qkv:norm_qkv").__name__ == "norm_qkv"
    assert load("torch.nn:functional.rms_norm") is torch.nn.functional.rms_norm
    with pytest.raises(Fault, match="cannot be imported: .*No module named 'nowhere'"):
        load("nowhere:f")


# ---------------------------------------------------------------- what is no function of tensors


TARGETS = """
import functools, torch, triton, triton.language as tl
from torch import nn

@triton.jit
def kernel(x_ptr, w_ptr, y_ptr, eps, D: tl.constexpr): pass

@triton.autotune(configs=[triton.Config({})], key=["D"])
@triton.jit
def tuned(x_ptr, w_ptr, y_ptr, eps, D: tl.constexpr): pass

@triton.heuristics({"D": lambda args: 1})
@triton.jit
def heuristic(x_ptr, w_ptr, y_ptr, eps, D: tl.constexpr): pass

class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
    def forward(self, x): return x * self.weight

class Takes(nn.Module):
    def forward(self, x, weight, eps): return x

class Plain: pass

module, takes = Norm(), Takes()
def named(x, *, weight, eps): return x
def half(x, weight, *, eps): return x
def out_first(out, x, weight, eps): pass
def out_last(x, weight, eps, output): pass
def result(result, input, weight, epsilon): pass
def y_first(y, x, weight, eps): pass

torch.library.define("castpoint_tests::rms_norm", "(Tensor! result, Tensor input, Tensor weight, float epsilon) -> ()")
op = torch.ops.castpoint_tests.rms_norm
torch.library.define("castpoint_tests::pure", "(Tensor x, Tensor weight, float eps) -> Tensor")

def optional(x, weight, eps, out=None, *, enable_pdl=False): return x
def right(x, weight, eps): return x
def anything(*args, **kwargs): return args[0]
partial = functools.partial(half, eps=1e-6)
pure = torch.ops.castpoint_tests.pure
"""
LAUNCHER = (
    " is a Triton kernel, which returns nothing: name its launcher, a Python function that makes the output, launches"
)
REFUSED = {
    "kernel": LAUNCHER,
    "tuned": LAUNCHER,
    "heuristic": LAUNCHER,
    "Norm": " is a class, whose call makes a module: give a function that takes the weights by position and gives",
    "Plain": " is a class, whose call makes an object: give a function that",
    "module": " is a module, which holds its own weight and eps: give a function that takes the weights by position "
    "and gives them to it, such as torch.func.functional_call(module, {'weight': weight}, (x,))",
    "named": " takes weight and eps by name alone: give a function that takes them by position and calls named with "
    "weight=weight, eps=eps",
    "half": " takes eps by name alone: give a function that takes them by position and calls half with eps=eps",
    "out_first": " writes to its argument out: give a function that takes (x, weight, eps), makes out, calls "
    "out_first(out, x, weight, eps) and returns what was written",
    "out_last": " writes to its argument output: give a function",
    "result": " writes to its argument result: give a function",
    "y_first": " writes to its argument y: give a function",
    "op": " writes to its argument result: give a function that takes (x, weight, eps), makes result, calls "
    "op(result, input, weight, epsilon) and returns what was written",
}
TAKEN = ("takes", "optional", "right", "anything", "partial", "pure")


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("engine"), {"targets.py": TARGETS}) / "targets.py"


ASK = """
import json, sys
from castpoint.harness.compiled.loading import Fault, check_function, load
said = {}
for name in sys.argv[2:]:
    try:
        said[name] = check_function(load(f"{sys.argv[1]}:{name}"), f"{sys.argv[1]}:{name}")
    except Fault as fault:
        said[name] = str(fault)
print(json.dumps(said))
"""


def test_each_gets_the_sentence_that_helps(targets: Path) -> None:
    """In a process of its own: here kernels are interpreted."""
    # Each load runs the file again, which defines its operators once: so one process a name.
    for name in [*REFUSED, *TAKEN]:
        command = [sys.executable, "-c", ASK, str(targets), name]
        environment = {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)[name]
        assert said is None if name in TAKEN else said.startswith(f"{targets}:{name}{REFUSED[name]}"), (name, said)
        assert said is None or "\n" not in said


@pytest.mark.parametrize("name", ["kernel", "tuned", "module", "named", "op"])
def test_identify_says_so(targets: Path, name: str) -> None:
    answer = identified(f"{targets}:{name}")
    assert answer["status"] == "error" and REFUSED[name] in answer["reason"], answer


def test_a_builtin_that_does_not_tell_is_let_through() -> None:
    check_function(torch.rsqrt, "torch:rsqrt")
