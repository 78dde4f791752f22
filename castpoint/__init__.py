"""Where a fused RMSNorm, QKV, K-norm kernel rounds to bf16, what that costs, what it buys."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent
if not (_HERE / "kernels").exists():  # a checkout that nobody installed: the three folders lie beside this one
    __path__.append(str(_HERE.parent))
