"""A user's callable or kernel by MODULE:FUNCTION."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from castpoint.harness.runs.errors import UserError, reason_of


class Fault(UserError):
    """What a callable did against its contract, in one sentence."""

    found: Any = None  # what was loaded and cannot be called


def load(target: str) -> Callable[..., Any]:
    """The callable of MODULE:FUNCTION; MODULE is a dotted name, importable from here, or the path of a .py file.

    Raises Fault if it cannot be imported or is no callable.
    """
    module_name, _, attribute = target.rpartition(":")
    if not module_name or not attribute:
        raise Fault(f"{target!r} is not MODULE:FUNCTION, such as my_kernels.norm:rms_norm or norm.py:rms_norm")
    try:
        if module_name.endswith(".py"):
            value: Any = _from_file(Path(module_name))
        else:
            sys.path.insert(0, "")
            value = importlib.import_module(module_name)
        for name in attribute.split("."):
            value = getattr(value, name)
    except Exception as error:  # user code runs on import and may raise anything
        raise Fault(f"{target} cannot be imported: {reason_of(error)}") from error
    if not callable(value):
        fault = Fault(f"{target} is of type {type(value).__name__}, which cannot be called")
        fault.found = value
        raise fault
    return value


def _from_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
