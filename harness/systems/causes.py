"""What may have made the logits of a tensor-parallel Qwen2.5-0.5B differ from Hugging Face's by 14.31.

Every cause that was named or suspected is planted in the plain decoder, on real weights of that shape, and compared
with the decoder as it is, in float32:

unloaded bias    an output projection with a bias that no tensor of the checkpoint fills, so that it keeps what
                 torch.nn.Linear draws: uniform in +- 1 / sqrt(896), other numbers in every process
forgotten bias   that of K, or of q, k and v
one ulp on K     every element of K one float32 ulp off
bf16             all weights and activations
bf16 all-reduce  what the two row-parallel projections of a layer give, rounded to bf16 as the parts of two ranks
theta 10,000     rotary embedding with another base
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from castpoint.harness.model.fetch import had
from castpoint.harness.model.study import PASSAGES, read_prompts
from castpoint.harness.runs.progress import track
from castpoint.harness.systems.decoder import forward
from castpoint.harness.systems.weights import Config, opened, tokenizer_of

MODEL = "qwen2.5-coder-0.5b-instruct"
PROMPT = "What is the capital of France?"  # of the reports' check
SEEDS, TOKENS = 20, 64
UNLOADED, ULP, K_BIAS, BIASES = "unloaded bias", "one ulp on K", "forgotten K bias", "forgotten q, k, v biases"
BF16, REDUCED, THETA = "bf16", "bf16 all-reduce of two ranks", "theta 10,000"
OUTPUT, AFTER_0, AFTER_1, AFTER_3, AFTER_LAST = (
    "first layer's output projection",
    "behind layer 0",
    "behind layer 1",
    "behind layer 3",
    "behind the last layer",
)
LARGEST_AFTER_3 = "largest value behind layer 3, without it"
SCORES, LOGITS, LOGITS_MEAN = "attention scores of the first layer", "logits, largest", "logits, mean"
KL, PROBABILITY, CHOICE = "KL, last token", "largest probability change, last token", "first choice kept, last token"
TOP_5, TOP_10 = "of the top 5 kept", "of the top 10 kept"
State = dict[str, Tensor]
Change = Callable[[str, int, Tensor], Tensor | None]


@dataclass(frozen=True)
class Ran:
    """Logits [S, V] and values by (stage, layer)."""

    logits: Tensor
    kept: Mapping[tuple[str, int], Tensor]


@functools.cache
def model(source: str) -> tuple[Config, State, dict[str, list[int]]]:
    """Its configuration, its weights in float32, and prompts by name; the reports' own comes first."""
    folder = had(source)
    weights, tokenizer = opened(folder), tokenizer_of(folder)
    asked = [{"role": "user", "content": PROMPT}]
    chat = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    passages = read_prompts(PASSAGES)[:2]
    prompts = {"theirs": tokenizer.encode(PROMPT), "theirs as chat": list(chat)}
    prompts |= {f"passage {i}": tokenizer.encode(text)[:TOKENS] for i, text in enumerate(passages)}
    return weights.config, weights.all(torch.float32), prompts


def ran(config: Config, w: Mapping[str, Tensor], ids: list[int], change: Change | None = None) -> Ran:
    kept: dict[tuple[str, int], Tensor] = {}

    def keep(stage: str, layer: int, value: Tensor) -> Tensor | None:
        other = change(stage, layer, value) if change else None
        if stage == "hidden" or (layer == 0 and stage in ("output", "scores")):
            kept[stage, layer] = value if other is None else other
        return other

    return Ran(forward(config, w, ids, keep), kept)


def apart(made: Ran, reference: Ran) -> dict[str, float]:
    """Every figure of the reports, of one run against another."""

    def largest(stage: str, layer: int) -> float:
        return (made.kept[stage, layer].double() - reference.kept[stage, layer].double()).abs().max().item()

    last = max(layer for stage, layer in made.kept if stage == "hidden")
    difference = (made.logits.double() - reference.logits.double()).abs()
    a, r = (run.logits[-1].double().log_softmax(-1) for run in (made, reference))
    tops = {n: len(set(a.topk(n).indices.tolist()) & set(r.topk(n).indices.tolist())) for n in (1, 5, 10)}
    return {
        OUTPUT: largest("output", 0),
        SCORES: largest("scores", 0),
        AFTER_0: largest("hidden", 0),
        AFTER_1: largest("hidden", min(1, last)),
        AFTER_3: largest("hidden", min(3, last)),
        AFTER_LAST: largest("hidden", last),
        LARGEST_AFTER_3: reference.kept["hidden", min(3, last)].abs().max().item(),
        LOGITS: difference.max().item(),
        LOGITS_MEAN: difference.mean().item(),
        KL: (r.exp() * (r - a)).sum().item(),
        PROBABILITY: (a.exp() - r.exp()).abs().max().item(),
        CHOICE: float(tops[1]),
        TOP_5: float(tops[5]),
        TOP_10: float(tops[10]),
    }


# ---------------------------------------------------------------- causes


def with_unloaded_bias(config: Config, w: State, seed: int) -> State:
    """As torch.nn.Linear draws the bias that nothing fills: one a layer, [D]."""
    rng, size = torch.Generator().manual_seed(seed), config.hidden_size
    bound = 1 / math.sqrt(config.num_q_heads * config.head_dim)  # of what it multiplies
    names = [f"model.layers.{layer}.self_attn.o_proj.bias" for layer in range(config.num_layers)]
    return w | {name: (2 * torch.rand(size, generator=rng) - 1).mul(bound).to(w["model.norm.weight"]) for name in names}


def without(w: State, projections: str) -> State:
    """Biases of these projections zero."""
    return {
        n: torch.zeros_like(t) if n.endswith("bias") and n.split(".")[-2][0] in projections else t for n, t in w.items()
    }


def one_ulp(stage: str, layer: int, value: Tensor) -> Tensor | None:
    """Every element of K a float32 ulp away from 0."""
    return value.nextafter(value.sign() * math.inf) if stage == "k" else None


def reduced_in_bf16(config: Config, w: State) -> Change:
    """The output projection and the MLP of every layer as the bf16 sum of two ranks' bf16 parts."""
    inputs: dict[str, Tensor] = {}

    def change(stage: str, layer: int, value: Tensor) -> Tensor | None:
        if stage in ("attended", "mlp_normed"):
            inputs[stage] = value
            return None
        if stage == "output":
            return _halves(inputs["attended"], w[f"model.layers.{layer}.self_attn.o_proj.weight"])
        if stage == "mlp":
            gate, up, down = (w[f"model.layers.{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
            x = inputs["mlp_normed"]
            return _halves(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
        return None

    return change


def _halves(x: Tensor, weight: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = (F.linear(x[:, part], weight[:, part]).bfloat16() for part in (slice(half), slice(half, None)))
    return (first + second).to(x.dtype)


def rivals(config: Config, w: State) -> dict[str, Callable[[list[int]], Ran]]:
    """Causes that nothing redraws: cause -> token ids -> a run."""
    narrow = {name: tensor.bfloat16() for name, tensor in w.items()}
    other = dataclasses.replace(config, thetas=(1e4,) * config.num_layers)
    return {
        ULP: lambda ids: ran(config, w, ids, one_ulp),
        BF16: lambda ids: ran(config, narrow, ids),
        REDUCED: lambda ids: ran(config, w, ids, reduced_in_bf16(config, w)),
        K_BIAS: lambda ids: ran(config, without(w, "k"), ids),
        BIASES: lambda ids: ran(config, without(w, "qkv"), ids),
        THETA: lambda ids: ran(other, w, ids),
    }


@functools.cache
def measured(source: str, short: bool) -> dict[tuple[str, str], list[float]]:
    """(figure, cause) -> its value of every prompt, and of the unloaded bias of every seed."""
    config, w, prompts = model(source)
    found: dict[tuple[str, str], list[float]] = {}

    def add(cause: str, made: Ran, reference: Ran) -> None:
        for figure, value in apart(made, reference).items():
            found.setdefault((figure, cause), []).append(value)

    for ids in track(list(prompts.values())[: 1 if short else None], "causes"):
        reference = ran(config, w, ids)
        for cause, run in rivals(config, w).items():
            add(cause, run(ids), reference)
        for seed in range(3 if short else SEEDS):
            add(UNLOADED, ran(config, with_unloaded_bias(config, w, seed), ids), reference)
    return found
