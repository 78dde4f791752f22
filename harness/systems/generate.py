"""A small engine in the manner of nano-vLLM: sequences join and leave a batch, keys and values lie in pages, a common
prefix is computed once, and the chain RMSNorm -> QKV -> head norm of every layer is that of any plan.

Of a sliding window only keys within it are read; its pages are kept until the sequence leaves.
"""

from __future__ import annotations

import copy
import functools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from castpoint.harness.model.attach import fitted
from castpoint.harness.runs.errors import UserError
from castpoint.harness.systems.cache import Pages
from castpoint.harness.systems.decoder import angles, attention, behind, embed, heads, hidden_from, norm, rotate
from castpoint.harness.systems.weights import Config
from castpoint.kernels.plan import CastPlan
from castpoint.variants.backends import compiled_plan, run_triton
from castpoint.variants.eager import plan_eager, plan_weight
from castpoint.variants.problem import Problem

Heads = tuple[Tensor, Tensor, Tensor]  # q [T, Hq, Dh], k and v [T, Hkv, Dh], before rotary embedding
Chain = Callable[[int, Tensor], Heads]  # of a layer, on x [T, D]
PAGE, BATCH = 16, 8  # tokens of a page, sequences of a batch


@dataclass(frozen=True)
class Model:
    """A decoder. w: every parameter as Hugging Face names it, in bf16 wherever a plan is to run it; scales: of q k,
    a layer each; none: the configuration's."""

    config: Config
    w: Mapping[str, Tensor]
    scales: tuple[float, ...] = ()

    @property
    def embedding(self) -> Tensor:
        return self.w["model.embed_tokens.weight"]

    def weight(self, layer: int, name: str, kind: str = "weight") -> Tensor:
        return self.w[f"model.layers.{layer}.{name}.{kind}"]

    @functools.cached_property
    def problems(self) -> list[Problem]:
        """The chain of every layer, on one token."""
        return [self._problem(layer) for layer in range(self.config.num_layers)]

    def _problem(self, layer: int) -> Problem:
        def together(kind: str) -> Tensor:
            return torch.cat([self.weight(layer, f"self_attn.{name}_proj", kind) for name in "qkv"])

        c, normed_heads = self.config, "qk" if self.config.head_norm else ""
        sizes = {"num_q_heads": c.num_q_heads, "num_kv_heads": c.num_kv_heads, "eps": c.eps, "weight_offset": c.gemma}
        normed = self.weight(layer, "input_layernorm")
        return Problem(
            x=normed[None],
            norm_weight=normed,
            qkv_weight=together("weight"),
            bias=together("bias") if c.bias else None,
            **{f"{name}_norm_weight": self.weight(layer, f"self_attn.{name}_norm") for name in normed_heads},
            **sizes,
        )


def modules(model: Model) -> Chain:
    """What PyTorch's own modules compute: a norm, three projections, two head norms, each rounding."""
    return lambda layer, x: heads(model.config, functools.partial(model.weight, layer), x, _untapped)


def _untapped(stage: str, value: Tensor) -> Tensor:
    return value


def of_plan(model: Model, plan: CastPlan, backend: str) -> Chain:
    """That plan on `inductor`, `eager` or `triton`. Compiled for powers of two of tokens, to which others are padded
    with zeros. Raises UserError for a plan that does not fit the model."""
    plan = fitted(plan, model.config.model_type)
    weights = [plan_weight(plan, problem) for problem in model.problems]
    run = {
        "inductor": compiled_plan(plan),
        "eager": functools.partial(plan_eager, plan),
        "triton": lambda problem, weight: run_triton(plan, problem, qkv_weight=weight),
    }[backend]

    def chain(layer: int, x: Tensor) -> Heads:
        rows = len(x)
        if backend == "inductor":
            x = F.pad(x, (0, 0, 0, (1 << (rows - 1).bit_length()) - rows))
        problem = copy.copy(model.problems[layer])
        object.__setattr__(problem, "x", x)  # replace() would look through all weights again
        q, k, v = run(problem, weights[layer])
        return q[:rows], k[:rows], v[:rows]

    return chain


@dataclass(frozen=True)
class Request:
    """A prompt and how it goes on: at most `tokens` more, or until one of `stop`. temperature 0 takes the most likely
    token; any other draws with a generator of its own, so that neighbours take no draw from it."""

    prompt: tuple[int, ...]
    tokens: int
    temperature: float = 0.0
    seed: int = 0
    stop: frozenset[int] = frozenset()


@dataclass
class Running:
    """A request under way. computed: how many of its ids have their keys and values in pages."""

    request: Request
    ids: list[int]
    rng: torch.Generator
    table: list[int] = field(default_factory=list)
    computed: int = 0
    logits: list[Tensor] = field(default_factory=list)  # [V], of every new token

    @property
    def new(self) -> list[int]:
        return self.ids[len(self.request.prompt) :]


@dataclass
class Counts:
    """What an engine did. computed: tokens that went through the layers; reused: that lay in pages already; seconds:
    of every step of one token a sequence."""

    steps: int = 0
    computed: int = 0
    reused: int = 0
    preempted: int = 0
    seconds: list[float] = field(default_factory=list)


class Engine:
    """Requests in, tokens out. A step computes the prompts of those that wait and fit, or else one token of each that
    runs. Where no page is left for it, the last that came is sent back to wait, and is computed again.

    pages: of PAGE tokens; batch: sequences at once.
    """

    def __init__(self, model: Model, chain: Chain, pages: int = 256, batch: int = BATCH) -> None:
        self.model, self.chain, self.batch = model, chain, batch
        self.pages = Pages(model.config, pages, PAGE, model.embedding)
        self.configs = [replace(model.config, scale=scale) for scale in model.scales] or [
            model.config
        ] * model.config.num_layers
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []
        self.counts = Counts()

    def add(self, request: Request) -> Running:
        """Puts it last in the queue. Raises UserError for what could never be computed."""
        self._check(request)
        rng = torch.Generator().manual_seed(request.seed)
        self.waiting.append(Running(request, list(request.prompt), rng))
        return self.waiting[-1]

    def _check(self, request: Request) -> None:
        config, prompt, tokens = self.model.config, request.prompt, request.tokens
        need, have, whole = self.pages.needed(len(prompt) + tokens - 1), self.pages.pages, len(prompt) + tokens
        wrong = {
            f"{len(prompt)} prompt and {tokens} new tokens: both must be 1 or more": not prompt or tokens < 1,
            f"temperature {request.temperature:g} is below 0: 0 is greedy, 1 the model's own": request.temperature < 0,
            f"a prompt's tokens must lie in 0 to {config.vocab_size - 1}, the model's vocabulary": not all(
                0 <= token < config.vocab_size for token in prompt
            ),
            f"{whole} tokens with those to come: the model reads {config.context}": whole > config.context,
            f"{len(prompt)} prompt and {tokens} new tokens need {need} pages of {PAGE} tokens, and the cache has "
            f"{have}: give it more pages, or ask for fewer tokens": need > have,
        }
        if said := next((said for said, is_wrong in wrong.items() if is_wrong), None):
            raise UserError(said)

    def run(self) -> None:
        while self.waiting or self.running:
            self.step()

    @torch.no_grad()
    def step(self) -> None:
        joined, start = self._admitted(), time.perf_counter()
        batch = joined or self._continued()
        logits = self._forward(batch)
        for sequence, row in zip(batch, logits, strict=True):
            sequence.computed = len(sequence.ids)
            self.pages.seal(sequence.table, sequence.ids)
            sequence.logits.append(row)
            sequence.ids.append(choose(row, sequence.request.temperature, sequence.rng))
            if len(sequence.new) == sequence.request.tokens or sequence.ids[-1] in sequence.request.stop:
                self.running.remove(sequence)
                self.pages.release(sequence.table)
        self.counts.steps += 1
        if not joined:
            self.counts.seconds.append(time.perf_counter() - start)

    def _admitted(self) -> list[Running]:
        """Those that wait and now fit, in their order."""
        joined: list[Running] = []
        while self.waiting and len(self.running) < self.batch and (found := self.pages.admit(self.waiting[0].ids)):
            sequence = self.waiting.popleft()
            sequence.table, sequence.computed = found
            self.counts.reused += sequence.computed
            self.running.append(sequence)
            joined.append(sequence)
        return joined

    def _continued(self) -> list[Running]:
        """Those that run and have a page for their next token; for the first of them there always is one."""
        kept: list[Running] = []
        while len(kept) < len(self.running):
            sequence = self.running[len(kept)]
            if self.pages.grow(sequence.table, len(sequence.ids)):
                kept.append(sequence)
                continue
            last = self.running.pop()
            self.pages.release(last.table)
            self.waiting.appendleft(last)
            self.counts.preempted += 1
        return kept

    def _forward(self, batch: Sequence[Running]) -> Tensor:
        """Logits [len(batch), V] of the last token of each; keys and values of all that were not computed."""
        config, w, table = self.model.config, self.model.w, self.model.embedding
        device = table.device
        spans = [(s.computed, len(s.ids)) for s in batch]
        ids = torch.tensor([token for s in batch for token in s.ids[s.computed :]], device=device)
        positions = [torch.arange(*span, device=device) for span in spans]
        slots = [self.pages.slots(s.table, 0, len(s.ids)) for s in batch]
        turns = {theta: angles(config, config.thetas.index(theta), torch.cat(positions), table.dtype)
                 for theta in set(config.thetas)}  # fmt: skip
        x = embed(config, table, ids)
        for layer in range(config.num_layers):
            q, k, v = self.chain(layer, x)
            q, k = (rotate(value, *turns[config.thetas[layer]]) for value in (q, k))
            written = torch.cat([slot[first:] for slot, (first, _) in zip(slots, spans, strict=True)])
            self.pages.k[layer, written], self.pages.v[layer, written] = k, v
            parts = zip(q.split([end - first for first, end in spans]), positions, slots, strict=True)
            attended = torch.cat([self._attended(layer, *part) for part in parts])
            x = behind(config, functools.partial(self.model.weight, layer), x, attended, _untapped)
        self.counts.computed += len(ids)
        last = torch.tensor([end - first for first, end in spans], device=device).cumsum(0) - 1
        x = norm(config, x[last], w["model.norm.weight"])
        return F.linear(x, table if config.tied else w["lm_head.weight"])

    def _attended(self, layer: int, q: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        """[S, Hq * Dh] of q [S, Hq, Dh] at those positions, over the pages of its sequence."""
        window = self.model.config.windows[layer]
        first = max(0, int(positions[0]) - window + 1) if window else 0
        keys = torch.arange(first, len(slots), device=q.device)
        config, seen = self.configs[layer], slots[first:]
        hidden = hidden_from(config, layer, positions, keys)
        k, v = self.pages.k[layer, seen], self.pages.v[layer, seen]
        return attention(config, q, k, v, hidden, _untapped)


def choose(logits: Tensor, temperature: float, rng: torch.Generator) -> int:
    """The most likely of logits [V], of equal ones the first; with a temperature one drawn, by inverting the
    distribution function in float64: one number of rng a token."""
    if not temperature:
        return int(logits.float().argmax())
    up_to = (logits.double().cpu() / temperature).softmax(-1).cumsum(-1)
    drawn = torch.rand((), generator=rng, dtype=torch.float64) * up_to[-1]
    return int(torch.searchsorted(up_to, drawn, right=True).clamp(max=len(logits) - 1))
