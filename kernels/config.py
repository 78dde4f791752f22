"""Config: how a launch is cut into programs. Every config of a plan is the same numerical function, up to the order
of fp32 sums; where values are rounded is not decided here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import triton

from .checks import check_count, described
from .plan import RNE, RTZ, CastPlan

KERNELS = ("fused", "split-k", "separate")
PREPASSES = ("none", "rstd", "hidden")
MANY_TOKENS = 128  # beyond, all take the same candidates
PROCESSORS = 132  # streaming multiprocessors of an H100 or H200


@dataclass(frozen=True)
class Config:
    """How a launch is cut into programs.

    kernel      `fused`: one program a block of tokens and a head. `split-k`: several programs a head, each over a
                share of D, the last to arrive sums up: for few tokens. `separate`: RMSNorm, cuBLAS, head norm
    prepass     `none`; `rstd` or `hidden`: a kernel before stores rstd [T] fp32, or hidden [T, D] bf16 (and rstd,
                where the plan applies it after the matmul), which the main kernel then loads. Not for `separate`
    block_m     tokens of a program; block_k: channels of a step, both powers of two of at least 16
    num_warps, num_stages   as Triton's
    splits      shares of D, for `split-k`

    `separate` has no tiles to choose. Raises ValueError with one sentence for what contradicts itself.
    """

    kernel: str = "fused"
    prepass: str = "none"
    block_m: int = 64
    block_k: int = 64
    num_warps: int = 4
    num_stages: int = 3
    splits: int = 1

    def __post_init__(self) -> None:
        for name, allowed in (("kernel", KERNELS), ("prepass", PREPASSES), ("num_warps", (1, 2, 4, 8, 16))):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, not {value!r}")
        for name in ("block_m", "block_k", "num_stages", "splits"):
            check_count(name, getattr(self, name))
        for name in ("block_m", "block_k"):
            if (value := getattr(self, name)) < 16 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two of at least 16, not {value}")
        for name in ("num_stages", "splits"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.splits > 1 and self.kernel != "split-k":
            raise ValueError(f"only kernel='split-k' divides D: kernel={self.kernel!r} needs splits=1")
        if self.prepass != "none" and self.kernel == "separate":
            wrong = f"prepass must be 'none', not {self.prepass!r}"
            raise ValueError(f"kernel='separate' always stores hidden first: {wrong}")

    @classmethod
    def of_row(cls, row: Mapping[str, str]) -> Config:
        """The config in a row of a table, which has its fields for columns. Raises ValueError as a Config does."""
        return cls(row["kernel"], row["prepass"], *(int(row[field.name]) for field in dataclasses.fields(cls)[2:]))

    def __str__(self) -> str:
        if self.kernel == "separate":
            return self.kernel
        before = "" if self.prepass == "none" else f" after {self.prepass}"
        shares = f", {self.splits} splits" if self.kernel == "split-k" else ""
        tiles = f"{self.block_m} x {self.block_k}{shares}, {self.num_warps} warps, {self.num_stages} stages"
        return f"{self.kernel}{before} {tiles}"


def check_config_type(config: Config | None) -> None:
    """Raises ValueError for what is neither a config nor None, such as the name of a kernel."""
    if config is not None and not hasattr(config, "prepass"):  # by what it has: a copied folder has a class of its own
        right = "a Config, such as Config(kernel='separate'), or None"
        raise ValueError(f"config must be {right}, not {described(config)}")


def unsupported(config: Config, plan: CastPlan) -> str:
    """Why this config cannot express the plan, in one sentence; empty where it can."""
    if config.prepass == "hidden" and plan.matmul != "bf16":
        return (
            f"prepass='hidden' stores bf16, and matmul={plan.matmul!r} multiplies hidden as fp32: "
            "prepass must be 'none' or 'rstd'"
        )
    if config.kernel != "separate":
        return ""
    wanted = {"scale": ("prologue",), "matmul": ("bf16",), "proj": (RNE,), "out": (RNE, RTZ)}
    for name, words in wanted.items():
        if (word := getattr(plan, name)) not in words:
            return (
                "kernel='separate' stores hidden, proj and out as bf16, and cuBLAS rounds to nearest: "
                f"{name} must be {' or '.join(map(repr, words))}, not {word!r}"
            )
    return ""


def head_block(head_dim: int) -> int:
    """BLOCK_N: channels of a tile that holds one head."""
    return max(16, triton.next_power_of_2(head_dim))


def default_config(head_dim: int, plan: CastPlan, interpreted: bool) -> Config:
    """One config for every number of tokens: smaller tiles for fewer tokens would mean other matrix instructions and
    other sums. Given to every launch, a row's bits do not depend on its batch; it is not the fastest.

    What a launch that is given none takes where nothing else is known: see dispatch.launch_config. Operands wider
    than bf16 take smaller tiles, because they wait in shared memory at 4 bytes. The interpreter's cost is per
    operation, whatever the tile.
    """
    if interpreted:
        return Config(block_m=64, block_k=256)
    if plan.matmul != "bf16":
        return Config(block_m=32, block_k=32, num_warps=4, num_stages=2)
    if head_block(head_dim) >= 256:  # at block_k 64 three stages of W pass gfx942's 64 KiB; on four warps it spills
        return Config(block_m=64, block_k=32, num_warps=8, num_stages=3)
    return Config(block_m=64, block_k=64, num_warps=4, num_stages=3)


def candidates(tokens: int, hidden_size: int, heads: int, head_dim: int) -> tuple[Config, ...]:
    """At most eight configs worth timing for that shape on a GPU like an H200, most promising first.

    heads: of q, k and v together. Sized by arithmetic for 132 processors with 227 KiB of shared memory each; whether
    one is fast, only a timing says, and not all can express every plan: see unsupported. With heads of 128 the 163 KiB
    of an A100 hold them all; the 64 KiB of an AMD gfx942 hold two: after hidden 128 x 64 and after rstd 64 x 64, with
    three stages.
    """
    narrow = head_block(head_dim) < 256  # heads of 256 halve the step, so that a stage of W keeps its 16 or 32 KiB
    long, short, few = (128, 64, 4) if narrow else (64, 32, 8)  # steps, and warps of a tile of few tokens
    block_m = min(64, max(16, triton.next_power_of_2(tokens)))

    def split(prepass: str, block_k: int, num_warps: int, stages: int, waves: int) -> Config:
        shares = split_shares(tokens, hidden_size, heads, block_m, block_k, waves * PROCESSORS)
        return Config("split-k", prepass, block_m, block_k, num_warps, stages, shares)

    if tokens > MANY_TOKENS:
        found = [
            Config("fused", "hidden", 128, short, 8, 4),
            Config("fused", "hidden", 128, short, 8, 3),
            Config("fused", "hidden", 128, long, 8, 3),
            Config("fused", "hidden", 64, short, few, 4),
            Config("fused", "rstd", 128, short, 8, 3),
            Config("fused", "rstd", 64, short, few, 3),
        ]
        if triton.cdiv(tokens, 128) * heads < PROCESSORS:
            found.append(split("hidden", short, few, 4, 2))
    else:
        warps = few if block_m < 64 else 8
        found = [split("none", long, 8, 4, 1), split("none", long, 8, 3, 2)]
        found += [split("none", short, warps, 4, 2), split("none", short, warps, 4, 4), split("hidden", long, 8, 3, 2)]
        found += [Config("fused", "hidden", 64, short, few, 4) if block_m == 64 else split("rstd", long, 8, 3, 2)]
    return (*dict.fromkeys(found), Config("separate"))


def split_shares(tokens: int, hidden_size: int, heads: int, block_m: int, block_k: int, programs: int) -> int:
    """Shares of D that make at most so many programs, each with a step to do; at least 1."""
    cells, steps = triton.cdiv(tokens, block_m) * heads, triton.cdiv(hidden_size, block_k)
    longest = triton.cdiv(steps, max(1, min(steps, programs // cells)))
    return triton.cdiv(steps, longest)
