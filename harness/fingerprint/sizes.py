"""What a user's kernel is called with. Loads no torch: the command line checks its options with it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Sizes that a kernel takes where not every size will do; None is any. heads: of q, or of the one kind that a head
    norm sees, and of k and v. eps: asked besides those of public models. dtype: of x, bf16, fp16 or fp32 (a residual
    stream); weights are fp16 with fp16, else bf16."""

    width: int | None = None
    head_dim: int | None = None
    heads: tuple[int, ...] | None = None
    tokens: int | None = None
    eps: float | None = None
    dtype: str = "bf16"

    def beyond(self, kind: str) -> str:
        """What to say of sizes that no kernel of that kind has; empty if there are none."""
        names = {"rmsnorm": ("heads", "head_dim"), "head_norm": ("width",)}.get(kind, ())
        odd = [f"no --{name.replace('_', '-')}" for name in names if getattr(self, name) is not None]
        return f"{kind} takes {' and '.join(odd)}: leave that out, or give another --kind" if odd else ""

    @property
    def narrow(self) -> str:
        """What is rounded to: fp16 where x is, else bf16."""
        return "fp16" if self.dtype == "fp16" else "bf16"


ANY = Sizes()
