"""A user's callable or kernel by MODULE:FUNCTION."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from triton.runtime.jit import KernelInterface

from castpoint.harness.runs.errors import UserError, reason_of

SOURCE, COMPILED = "is source code that is not compiled here", "is compiled code without a Python function"
WRAP = "call it in a Python function, and give that function's .py file"
FOREIGN = {  # suffix -> what such a file is, and what would be right
    **dict.fromkeys((".cu", ".cuh", ".hip", ".cpp", ".cc", ".c", ".h", ".hpp"), (SOURCE, f"compile it, {WRAP}")),
    **dict.fromkeys((".so", ".pyd", ".dll"), (COMPILED, WRAP)),
    **dict.fromkeys((".ptx", ".cubin", ".hsaco", ".ttir", ".ttgir", ".ll"), (COMPILED, WRAP)),
    ".ipynb": ("is a notebook", "copy the function into a .py file"),
}


class Fault(UserError):
    """What a callable did against its contract, in one sentence."""


def load(target: str) -> Callable[..., Any]:
    """The callable of MODULE:FUNCTION; MODULE is a dotted name, importable from here, or the path of a .py file, which
    may import the files beside it, and relatively if it lies in a package.

    Raises Fault if it cannot be imported or is no callable.
    """
    module_name, _, attribute = target.rpartition(":")
    if not module_name or not attribute:
        raise Fault(f"{target!r} is not MODULE:FUNCTION, such as my_kernels.norm:rms_norm or norm.py:rms_norm")
    check_path(module_name)
    try:
        if module_name.endswith(".py"):
            value: Any = _from_file(Path(module_name))
        else:
            sys.path.insert(0, "")
            value = importlib.import_module(module_name)
        for name in attribute.split("."):
            owner, value = value, getattr(value, name)
    except Fault:
        raise
    except SystemExit as error:
        how = f'{reason_of(error)}: put that under if __name__ == "__main__"'
        raise Fault(f"{target} cannot be imported: it is a script that ends itself, {how}") from error
    except Exception as error:  # user code runs on import and may raise anything
        raise Fault(f"{target} cannot be imported: {reason_of(error)}") from error
    if not callable(value) and not isinstance(value, KernelInterface):
        raise Fault(f"{target} is of type {type(value).__name__}, which cannot be called")
    _check_bound(target, value, owner)
    return value


def _check_bound(target: str, value: Any, owner: Any) -> None:
    """Raises Fault for a class that is no torch.nn.Module, and for a method without its object."""
    if inspect.isclass(value) and issubclass(value, torch.autograd.Function):
        raise Fault(f"{target} is an autograd.Function, which is called by its apply: give {target}.apply")
    if inspect.isclass(value) and not issubclass(value, torch.nn.Module):
        raise Fault(f"{target} is a class: make an object of it in the file, and name that, or one of its methods")
    if inspect.isclass(owner) and inspect.isfunction(value) and "self" in inspect.signature(value).parameters:
        raise Fault(f"{target} is a method without its object: make one of {owner.__name__} in the file, and name that")


def check_path(module: str) -> None:
    """Raises Fault for the path of a file that holds no Python function."""
    suffix = Path(module).suffix.lower()
    if suffix in FOREIGN:
        what, right = FOREIGN[suffix]
        raise Fault(f"{module} {what}: {right}")
    other = bool(suffix) and Path(module).is_file()
    if suffix != ".py" and (
        other or "/" in module or Path(module).is_dir() and not Path(module, "__init__.py").exists()
    ):
        raise Fault(f"{module} is no .py file and no dotted name: give my/norms.py:rms_norm or my.norms:rms_norm")


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file" if path.exists() else f"{path} does not exist")
    path = path.resolve()
    if imports_relatively(path.read_bytes()):
        root = package_root(path)
        sys.path.insert(0, str(root))
        parts = path.relative_to(root).with_suffix("").parts
        return importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    name = path.stem if path.stem not in sys.modules else f"target_{path.stem}"  # theirs may be called random.py
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    sys.path.append(str(path.parent))  # behind all others: what lies beside it hides no package
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def imports_relatively(source: bytes) -> bool:
    """Whether that Python text has `from .a import b`, in a function or not; what does not parse has not."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # its import says what is wrong
        return False
    return any(isinstance(node, ast.ImportFrom) and node.level > 0 for node in ast.walk(tree))


def package_root(path: Path) -> Path:
    """The folder in which the outermost package of that file lies. Raises Fault where it lies in none."""
    folder = path.parent
    while (folder / "__init__.py").exists():
        folder = folder.parent
    if folder == path.parent:
        name = f"{folder.name}.{path.stem}"
        raise Fault(
            f"{path.name} imports relatively, and {folder} is no package: add an __init__.py to it, or give {name} in "
            f"place of the path, from {folder.parent}"
        )
    return folder
