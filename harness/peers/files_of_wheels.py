"""Single Python files of packages that are too heavy to import: a file is found where its package is installed, `pip
install --no-deps` is enough, and executed while every other name of that package is a stand-in that does nothing."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor, nn

from castpoint.harness.peers.running import TRITON, Implementation, Norm, by_triton


@functools.cache
def load_file(package: str, path: str, *given: ModuleType) -> ModuleType:
    """The file of a package by its name on PyPI, `vllm/ir/ops/layernorm.py`, as a module that is found by nobody else.
    given: those modules of its package whose values it needs.

    Raises ImportError where the package is missing or has no such file.
    """
    found = importlib.metadata.distribution(package)
    file = str(found.locate_file(path))
    name = path.removesuffix(".py").replace("/", ".")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _alone(name.partition(".")[0], {each.__name__: each for each in given}):
        try:
            spec.loader.exec_module(module)
        except FileNotFoundError:
            raise ImportError(f"{package} {found.version} has no {path}") from None
    return module


def module_of(name: str, **values: Any) -> ModuleType:
    """A module of that name with these values."""
    module = ModuleType(name)
    module.__dict__.update(values)
    return module


@contextmanager
def _alone(top: str, given: dict[str, ModuleType]) -> Iterator[None]:
    """Inside, every module under that name is a _Standin, but those given."""

    def mine() -> dict[str, ModuleType]:
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == top}

    before, finder = mine(), _Finder(top)
    for name in before:
        del sys.modules[name]
    sys.modules.update(given)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in mine():
            del sys.modules[name]
        sys.modules.update(before)


class _Finder:
    """Finds a _Standin for each module of one package."""

    def __init__(self, top: str) -> None:
        self.top = top

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == self.top else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Standin(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Standin(ModuleType):
    """A module, function, decorator, base class or flag: false, and whatever is asked of it is one more."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Standin(name)

    def __call__(self, *values: Any, **named: Any) -> Any:
        decorated = len(values) == 1 and not named and callable(values[0])
        return values[0] if decorated else self

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (nn.Module,)

    def __bool__(self) -> bool:
        return False


# ---------------------------------------------------------------- rows


def row_of_file(
    name: str, how: str, load: Callable[[], Norm], right: str, source: str, kind: str = "rmsnorm"
) -> Implementation:
    """One whose file is `source`, of the package that its first folder names."""
    package = source.partition("/")[0].replace("_", "-")
    make = partial(by_triton, name, load) if how == TRITON else lambda device: load()
    return Implementation(name, package, kind, how, make, right, source)


def of_rows(launch: Callable[[Tensor, Tensor, Tensor, float, int, int, int], Any]) -> Norm:
    """A norm by launch(x, weight, y, eps, rows, width, block) on contiguous rows of x."""

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y, rows, width = torch.empty_like(x), x.numel() // x.shape[-1], x.shape[-1]
        launch(x, weight, y, eps, rows, width, triton.next_power_of_2(width))
        return y

    return norm
