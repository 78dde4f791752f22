"""Where a fused RMSNorm, QKV, K-norm kernel rounds to bf16, what that costs, what it buys.

The public names. Nothing is imported before it is asked for: `import castpoint` loads neither torch nor Triton.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_CHECKOUT = None if (_HERE / "kernels").exists() else _HERE.parent
if _CHECKOUT:  # not a wheel: the three folders lie beside this one
    __path__.append(str(_CHECKOUT))

_HOMES = {
    "CastPlan": "castpoint.variants.catalogue",
    "PLANS": "castpoint.variants.catalogue",
    "plan_named": "castpoint.variants.catalogue",
    "norm_qkv": "castpoint.kernels.norm_qkv",
    "identify": "castpoint.harness.fingerprint.norm",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """What pyproject.toml says: a checkout's own, also where nobody installed it, or the wheel's copy of that."""
    from importlib.metadata import version

    if _CHECKOUT is None:
        return version("castpoint")
    import tomllib

    return str(tomllib.loads((_CHECKOUT / "pyproject.toml").read_text())["project"]["version"])
