"""Targets of identify and audit: files that import what lies beside them, and what is no function of tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from castpoint.harness.compiled.loading import Fault, load

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


def test_a_file_of_another_suffix_is_no_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, {"norms.txt": "", "norms.py.bak": "", "norms": "", "norms.py": HELPERS})
    monkeypatch.chdir(tmp_path)
    for name in ("norms.txt", "norms.py.bak"):
        with pytest.raises(Fault, match=f"{name} is no .py file and no dotted name"):
            load(f"{name}:rsqrt")
    assert load("norms:rsqrt")(torch.ones(2)).eq(1).all()  # beside a program of that name


OBJECTS = """
import torch
class Norm:
    eps = 1e-6
    def __call__(self, x, weight, eps):
        return x
    def norm(self, x, weight, eps):
        return x
    def plain(x, weight, eps):
        return x
    @staticmethod
    def static(x, weight, eps):
        return x
    @classmethod
    def of_class(cls, x, weight, eps):
        return x
class Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        return x.clone()
one = Norm()
"""
NO_OBJECTS = {
    "Norm": "Norm is a class: make an object of it in the file, and name that, or one of its methods",
    "Norm.norm": "Norm.norm is a method without its object: make one of Norm in the file, and name that",
    "Apply": "Apply is an autograd.Function, which is called by its apply: give ",
}


@pytest.mark.parametrize("name", NO_OBJECTS)
def test_a_class_and_a_method_without_an_object(name: str, tmp_path: Path) -> None:
    written(tmp_path, {"objects.py": OBJECTS})
    with pytest.raises(Fault) as fault:
        load(f"{tmp_path}/objects.py:{name}")
    assert NO_OBJECTS[name] in str(fault.value) and "\n" not in str(fault.value)


@pytest.mark.parametrize("name", ["one", "one.norm", "Norm.plain", "Norm.static", "Norm.of_class", "Apply.apply"])
def test_what_may_be_called_of_a_class(name: str, tmp_path: Path) -> None:
    written(tmp_path, {"objects.py": OBJECTS})
    x = torch.ones(2, 4)
    assert load(f"{tmp_path}/objects.py:{name}")(x, x[0], 0.0).eq(x).all()


def test_a_script_that_ends_itself_is_told_what_to_do(tmp_path: Path) -> None:
    written(tmp_path, {"script.py": "import sys\ndef norm(x, weight, eps):\n    return x\nsys.exit('usage: script')\n"})
    answer = identified(f"{tmp_path}/script.py:norm")
    assert answer["status"] == "error", answer
    assert answer["reason"].endswith('SystemExit: usage: script: put that under if __name__ == "__main__"'), answer


def test_a_module_of_here_is_still_found_by_its_dotted_name() -> None:
    assert load("castpoint.kernels.norm_qkv:norm_qkv").__name__ == "norm_qkv"
    assert load("torch.nn:functional.rms_norm") is torch.nn.functional.rms_norm
    with pytest.raises(Fault, match="cannot be imported: .*No module named 'nowhere'"):
        load("nowhere:f")
