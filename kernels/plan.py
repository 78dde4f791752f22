"""CastPlan: where a chain RMSNorm -> QKV -> head norm (-> RoPE) rounds to bf16; the kernels' one argument PLAN.

Needs neither torch nor triton, so that plans can be named where neither is.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

KEEP = "fp32"
RNE = "bf16-rne"
RTZ = "bf16-rtz"
STORAGE = (KEEP, RNE, RTZ)  # how a value is held: kept, rounded to nearest even, truncated

# The values of the chain that may be rounded, in order; RoPE's exist only where q and k are rotated. Those of its phase
# are made where the table of cos and sin is: kernels are given that table.
PHASE_BOUNDARIES = ("inv_freq", "position", "phase")
ROPE_BOUNDARIES = ("unrotated", *PHASE_BOUNDARIES, "cos_sin", "products")
BOUNDARIES = (
    *("x", "statistics", "variance", "rstd", "normed", "hidden", "proj", "head_rstd", "head_normed"),
    *ROPE_BOUNDARIES,
    "out",
)
CHOICES = {
    "scale": ("prologue", "epilogue", "folded"),
    "matmul": ("bf16", "tf32", "tf32x3", "fp32"),
    "weight_offset": ("none", "fp32", "bf16-rne"),
}
OPTIONAL = ("x", *ROPE_BOUNDARIES)  # boundaries that a problem may have no use for


@dataclass(frozen=True)
class CastPlan:
    """A numerical function of the chain, by its roundings.

    The chain of T tokens, D hidden channels, H heads of Dh channels. Each of its values is a boundary, one of `fp32`
    (kept), `bf16-rne` (rounded to nearest, ties to even) or `bf16-rtz` (truncated). The default rounds where a bf16
    chain cannot avoid it: the sum x + residual, the operand of a bf16 matmul, and what is stored.

    x            [T, D]          x (+ residual); has no effect on a problem without a residual
    statistics   [T, D]          each square under both norms' means (Liger's casting mode `none` squares in bf16)
    variance     [T]             mean(x^2), and that of each head
    rstd         [T]             (variance + eps)^-1/2
    normed       [T, D]          x * rstd
    hidden       [T, D]          normed * w_in, the left operand of the matmul
    proj         [T, H, Dh]      hidden @ W^T (+ bias)
    head_rstd    [T, H]          (mean(proj^2) + eps)^-1/2
    head_normed  [T, H, Dh]      proj * head_rstd
    out          [T, H, Dh]      head_normed * w_head as q, k and v are stored. `fp32` stores float32 tensors

    With positions q and k are rotated before they are stored, each channel i of a head with channel i + Dh/2:

    unrotated    [T, H, Dh]      q and k: head_normed * w_head; this and the next five have no effect without positions
    inv_freq     [Dh/2]          theta^(-2i/Dh), radians a position
    position     [T]             of each token, as it is multiplied with inv_freq
    phase        [T, Dh/2]       position * inv_freq, radians; an error in it grows with position
    cos_sin      [T, Dh/2] each  cos and sin of phase, as they are held
    products     [T, H, Dh]      unrotated * cos, and that of the other channel * sin; out is their sum or difference

    A kernel is given a table of cos and sin: inv_freq, position and phase are rounded by whoever makes that table.

    Choices that are no roundings, and make two numerical functions where two plans differ in one:

    scale          `prologue`: rstd is applied before the matmul; `epilogue`: after it, so that
                   normed never exists and hidden = x * w_in; `folded`: after it, and w_in was
                   multiplied into W ahead of time, W' = bf16(W * w_in), so that hidden = x
    matmul         precision of the operands. `tf32` truncates to 10 bits of mantissa, `tf32x3` adds
                   the truncated remainder; accumulation is fp32 in all of them
    weight_offset  `none`: weights are w. `fp32` and `bf16-rne`: weights are stored as w - 1 (Gemma)
                   and 1 + w is formed in that type

    Raises ValueError with a sentence where choices contradict each other.
    """

    x: str = RNE
    statistics: str = KEEP
    variance: str = KEEP
    rstd: str = KEEP
    normed: str = KEEP
    hidden: str = RNE
    proj: str = KEEP
    head_rstd: str = KEEP
    head_normed: str = KEEP
    unrotated: str = KEEP
    inv_freq: str = KEEP
    position: str = KEEP
    phase: str = KEEP
    cos_sin: str = KEEP
    products: str = KEEP
    out: str = RNE
    scale: str = "prologue"
    matmul: str = "bf16"
    weight_offset: str = "none"

    def __post_init__(self) -> None:
        for name, word in self.choices().items():
            allowed = CHOICES.get(name, STORAGE)
            if word not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {word!r}")
        if self.scale != "prologue" and self.normed != KEEP:
            raise ValueError(
                f"scale={self.scale!r} applies rstd after the matmul, so x * rstd is never formed: "
                f"normed must be {KEEP!r}, not {self.normed!r}"
            )
        if self.scale == "folded":
            if self.hidden != KEEP:
                raise ValueError(
                    "scale='folded' feeds x itself to the matmul, so there is no x * w_in to round: "
                    f"hidden must be {KEEP!r}, not {self.hidden!r}"
                )
            if self.matmul != "bf16" or self.x == KEEP:
                raise ValueError(
                    "scale='folded' multiplies x in bf16 with weights folded to bf16: "
                    f"matmul must be 'bf16' and x rounded, not matmul={self.matmul!r} with x={self.x!r}"
                )
        elif (self.matmul == "bf16") != (self.hidden != KEEP):
            raise ValueError(
                f"matmul={self.matmul!r} contradicts hidden={self.hidden!r}: a bf16 matmul needs hidden in bf16, and "
                "with hidden in bf16 every wider matmul is the same function, because products of bf16 values are "
                "exact in fp32"
            )

    def replace(self, **changes: str) -> CastPlan:
        """This plan with some choices changed; checked like a new one."""
        return dataclasses.replace(self, **changes)

    def without_rope(self) -> CastPlan:
        """This plan for problems without positions, where RoPE's boundaries have no effect: they are kept."""
        return self.replace(**dict.fromkeys(ROPE_BOUNDARIES, KEEP))

    def choices(self) -> dict[str, str]:
        """The word of every boundary and choice, by name."""
        return dataclasses.asdict(self)

    def roundings(self) -> list[str]:
        """Names of the boundaries that are rounded, in the order of the chain; without x and RoPE's,
        which only round where a problem has a residual or positions."""
        return [name for name in BOUNDARIES if name not in OPTIONAL and getattr(self, name) != KEEP]

    def rope_roundings(self) -> list[str]:
        """Names of RoPE's boundaries that are rounded."""
        return [name for name in ROPE_BOUNDARIES if getattr(self, name) != KEEP]


DEFAULT = CastPlan()


@dataclass(frozen=True, repr=False)
class Words:
    """A plan as the kernels read it, their one compile-time argument PLAN: `PLAN.proj` and so on.

    Each word is a tl.constexpr, since Triton 3.6 does not compile with plain strings. The repr holds every word, since
    Triton's caches know the argument by it: two plans that print alike would share one binary.
    """

    plan: CastPlan

    def __post_init__(self) -> None:
        import triton.language as tl  # not above: plans are named where no Triton is

        vars(self).update({name: tl.constexpr(word) for name, word in self.plan.choices().items()})

    def __repr__(self) -> str:
        return repr(self.plan)


@functools.cache
def words(plan: CastPlan) -> Words:
    """PLAN of a launch."""
    return Words(plan)
