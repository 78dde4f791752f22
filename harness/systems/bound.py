"""Fault or rounding? How far rounding alone could have moved every stage of a model, and what exceeds it.

The decoder runs in float64, and behind every operation each element is moved by what a right implementation may have
done otherwise. With u = 2^-24, float32's unit roundoff, z standard normal and r uniform in [-1/2, 1/2]:

    dot products   u sqrt(K) / 3 * sum |a b| * z     one chain of K terms of one sign; any other order does less
    a norm's row   u sqrt(D) / 6 * |v| * z           its sum of squares, one factor of the whole row
    rotation       u p |the other channel| * z       an angle, of position p, rounded otherwise
    every value    2 ulp(v) * r, of float32          two roundings of it
    every value    ulp(v) * r, of bfloat16           where that is the dtype: stored there, or kept

Two implementations may stand on opposite sides of the truth, so the bound is twice the largest deviation of a run, at
the quantile that one run in 10,000 passes, by a Gumbel distribution fitted to SEEDS runs.
"""

from __future__ import annotations

import csv
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from castpoint.harness.runs.errors import UserError, mistakes
from castpoint.harness.runs.progress import track
from castpoint.harness.systems.decoder import STAGES, forward
from castpoint.harness.systems.weights import Config

SEEDS = 8
PASSED = 1e-4  # share of right implementations beyond the bound, of one stage
U = 2.0**-24
BITS = {"float32": 24, "bfloat16": 8}  # significant ones
KNOWN = ("embedding", *STAGES, "logits")
State = dict[str, Tensor]
Key = tuple[str, int]  # stage and layer; logits of layer -1


@dataclass(frozen=True)
class Judgement:
    """A difference that somebody measured, and the most that rounding alone could have made there."""

    stage: str
    layer: int
    measured: float
    bound: float

    @property
    def fault(self) -> bool:
        return self.measured > self.bound

    def line(self) -> str:
        where = self.stage if self.layer < 0 else f"{self.stage}, layer {self.layer}"
        times = f"{self.measured / self.bound:,.3g}" if self.measured < 10 * self.bound else ""
        times = f"{times or format(self.measured / self.bound, ',.0f')} times" if self.bound else "rounding makes none"
        said = f"a fault: {times}" if self.fault else "rounding may have made it"
        return f"{where}: {self.measured:.3g} measured, rounding alone at most {self.bound:.2g}: {said}"


class Perturbed:
    """What a decoder in float64 is shown stage by stage, and moves each by a rounding that a seed chose."""

    def __init__(self, config: Config, w: State, sizes: State, dtype: str, seed: int) -> None:
        self.config, self.w, self.sizes = config, w, sizes
        self.narrow = dtype == "bfloat16"
        self.rng = torch.Generator().manual_seed(seed)
        self.seen: dict[str, Tensor] = {}
        self.kept: dict[Key, Tensor] = {}

    def __call__(self, stage: str, layer: int, value: Tensor) -> Tensor:
        value = self.rounded(self.moved(stage, layer, value))
        self.seen[stage] = self.kept[stage, layer] = value
        return value

    def rounded(self, value: Tensor) -> Tensor:
        """With two roundings to float32 and, where values are stored in bfloat16, one to it."""
        half = torch.rand(value.shape, generator=self.rng, dtype=torch.float64) - 0.5
        _, exponent = torch.frexp(value)
        steps = 2 * 2.0 ** -BITS["float32"] + (2.0 ** -BITS["bfloat16"] if self.narrow else 0.0)
        return value + torch.ldexp(half * steps, exponent)

    def z(self, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=self.rng, dtype=torch.float64)

    def summed(self, value: Tensor, terms: int, sizes: Tensor) -> Tensor:
        """A sum of so many terms; sizes: of their absolute values."""
        return value + self.z(value.shape) * (U * math.sqrt(terms) / 3) * sizes

    def moved(self, stage: str, layer: int, value: Tensor) -> Tensor:
        """Behind the sums and norms of a stage."""
        c, seen = self.config, self.seen
        if stage in ("q", "k", "v"):
            return self.projected(value, seen["normed"], f"model.layers.{layer}.self_attn.{stage}_proj.weight")
        if stage == "output":
            return self.projected(value, seen["attended"], f"model.layers.{layer}.self_attn.o_proj.weight")
        if stage.endswith("normed"):
            row = self.z(torch.Size([*value.shape[:-1], 1]))
            return value * (1 + row * U * math.sqrt(value.shape[-1]) / 6)
        if stage.endswith("rotated"):
            positions = torch.arange(len(value), dtype=torch.float64)[:, None, None]
            return value + self.z(value.shape) * U * positions * value.roll(c.head_dim // 2, -1).abs()
        if stage == "scores":
            q, k = (seen[f"{name}_rotated"].transpose(0, 1).abs() for name in "qk")
            return self.summed(value, c.head_dim, q @ k.repeat_interleave(len(q) // len(k), 0).mT * c.scale)
        if stage == "attended":
            v = seen["v"].transpose(0, 1).abs().repeat_interleave(c.num_q_heads // c.num_kv_heads, 0)
            return self.summed(value, len(value), (seen["weights"] @ v).transpose(0, 1).flatten(1))
        return self.mixed(layer) if stage == "mlp" else value

    def projected(self, value: Tensor, x: Tensor, name: str) -> Tensor:
        """x @ weight^T, with its sums moved."""
        return self.summed(value, x.shape[-1], (x.abs().float() @ self.sizes[name].T).view_as(value))

    def mixed(self, layer: int) -> Tensor:
        """The MLP again, from what enters it, with its three sums moved."""

        def linear(x: Tensor, part: str) -> Tensor:
            name = f"model.layers.{layer}.mlp.{part}_proj.weight"
            return self.projected(F.linear(x, self.w[name]), x, name)

        x = self.seen["mlp_normed"]
        gate, up = self.rounded(linear(x, "gate")), self.rounded(linear(x, "up"))
        opened = self.rounded(F.gelu(gate, approximate="tanh") if self.config.gemma else F.silu(gate))
        return linear(self.rounded(opened * up), "down")


@torch.no_grad()
def bounds(config: Config, w: State, ids: list[int], dtype: str = "float32") -> dict[Key, float]:
    """(stage, layer) -> the largest difference that rounding alone may make between two right implementations in that
    dtype, on these tokens. w: the model's weights in float64."""
    exact: dict[Key, Tensor] = {}

    def keep(stage: str, layer: int, value: Tensor) -> None:
        exact[stage, layer] = value

    exact["logits", -1] = forward(config, w, ids, keep)
    head = "model.embed_tokens.weight" if config.tied else "lm_head.weight"
    sizes = {name: tensor.abs().float() for name, tensor in w.items() if tensor.ndim == 2}
    found: dict[Key, list[float]] = {key: [] for key in exact}
    for seed in track(list(range(SEEDS)), "roundings"):
        run = Perturbed(config, w, sizes, dtype, seed)
        logits = run.projected(forward(config, w, ids, run), run.seen["normed"], head)
        run.kept["logits", -1] = run.rounded(logits)
        for key, value in run.kept.items():
            found[key].append((value - exact[key]).abs().max().item())
    return {key: 2 * beyond(values) for key, values in found.items()}


def beyond(maxima: list[float]) -> float:
    """What one maximum in 1 / PASSED passes, of a Gumbel distribution with their mean and deviation."""
    scale = statistics.stdev(maxima) * math.sqrt(6) / math.pi
    return statistics.mean(maxima) - scale * (0.5772156649 + math.log(-math.log1p(-PASSED)))


def read_differences(path: Path) -> list[tuple[str, int, float]]:
    """Stage, layer and largest difference of each line of a CSV with the columns stage, layer, max_abs; no layer: -1.

    Raises UserError in one line for a file that is none, or a stage that is none."""
    with mistakes(OSError, UnicodeDecodeError, about=f"--measured {path} cannot be read"):
        text = path.read_text(encoding="utf-8")
    reader = csv.DictReader(text.splitlines())
    if not {"stage", "layer", "max_abs"} <= set(reader.fieldnames or ()):
        raise UserError(f"--measured {path} must be a CSV with the columns stage, layer, max_abs")
    found = []
    for number, row in enumerate(reader, 2):
        if row["stage"] not in KNOWN:
            raise UserError(f"line {number} of {path}: unknown stage {row['stage']!r}, stages are {', '.join(KNOWN)}")
        with mistakes(ValueError, TypeError, about=f"line {number} of {path}: layer and max_abs must be numbers"):
            found.append((row["stage"], int(row["layer"] or -1), float(row["max_abs"])))
    return found


def check_stages(measured: list[tuple[str, int, float]], config: Config) -> None:
    """Raises UserError for a stage that this model has not in that layer."""
    for stage, layer, _ in measured:
        alone = stage in ("embedding", "logits")
        if (layer != -1 if alone else not 0 <= layer < config.num_layers) or (
            stage in ("q_normed", "k_normed") and not config.head_norm
        ):
            layers = "without a layer" if alone else f"of layers 0 to {config.num_layers - 1}"
            raise UserError(f"this model has no {stage} of layer {layer}: give one {layers}")


def judge(measured: list[tuple[str, int, float]], bound: dict[Key, float]) -> list[Judgement]:
    """Each difference beside its bound."""
    return [Judgement(stage, layer, value, bound[stage, layer]) for stage, layer, value in measured]
