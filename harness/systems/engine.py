"""The engine on whole models: every plan inside it, the text that it writes, where it parts from PyTorch's own.

Arms: `eager` is what PyTorch's modules compute, in the same engine; `transformers` its generate(); every other a plan.
`shuffled` is eager's text in a drawn order: how improbable tokens are whose order says nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from castpoint.harness.model.attach import fitted
from castpoint.harness.model.fetch import had
from castpoint.harness.model.language_model import LanguageModel, load
from castpoint.harness.model.study import texts
from castpoint.harness.problems.drawn import CALIBRATED_MODEL
from castpoint.harness.runs.errors import UserError
from castpoint.harness.runs.progress import track
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import EngineRow, EngineRunRow
from castpoint.harness.runs.words import How, KScale
from castpoint.harness.systems.decoder import forward
from castpoint.harness.systems.generate import PAGE, Chain, Counts, Engine, Model, Request, Running, modules, of_plan
from castpoint.harness.systems.weights import of_model
from castpoint.variants.catalogue import PLANS, plan_named

EAGER, TRANSFORMERS, SHUFFLED = "eager", "transformers", "shuffled"
OWN_PLAN = {"qwen2": "hf", "qwen3": "hf", "gemma3_text": "gemma"}  # by which transformers runs that architecture
LARGEST = 96.5  # the largest K-norm weight of Qwen3-0.6B
FUSED = ("cast-after-matmul", "fp32")  # what a kernel does that keeps the normed value in fp32


@dataclass(frozen=True)
class Size:
    """prompts, tokens of each, tokens that each goes on for; plans: none names all that fit; backend: of plans."""

    prompts: int
    prompt: int
    tokens: int
    plans: tuple[str, ...] = ()
    backend: str = "eager"


WHOLE, SHORT = Size(8, 48, 32, backend="inductor"), Size(3, 28, 8, FUSED)


def plans_of(model_type: str) -> list[str]:
    """Plans of the catalogue that fit that architecture."""
    fit = []
    for name, named in PLANS.items():
        with suppress(UserError):
            fitted(named.plan, model_type)
            fit.append(name)
    return fit


def generations(
    model: Model, plan: str, prompts: Sequence[Sequence[int]], tokens: int, backend: str = "eager"
) -> list[Running]:
    """What the model writes behind each prompt, greedily, all in one batch; plan: of the catalogue, or `eager`."""
    return write(Engine(model, chain_of(model, plan, backend), batch=len(prompts)), prompts, tokens)


def chain_of(model: Model, plan: str, backend: str) -> Chain:
    return modules(model) if plan == EAGER else of_plan(model, plan_named(plan), backend)


def write(engine: Engine, prompts: Sequence[Sequence[int]], tokens: int) -> list[Running]:
    """The same of an engine as it is."""
    sequences = [engine.add(Request(tuple(prompt), tokens)) for prompt in prompts]
    engine.run()
    return sequences


def with_k_norms(model: Model, change: KScale) -> Model:
    """The model with each layer's K-norm weights, as they are applied, multiplied until the largest is 96.5 and rounded
    to bf16. BALANCED: the scale of q k is divided by that factor. It stands there and not in the q norm, because Gemma
    stores w - 1 in bf16, which has no digits left for a small w."""
    if change == KScale.OWN:
        return model
    offset, changed, scales = float(model.config.gemma), dict(model.w), []
    for layer in range(model.config.num_layers):
        applied = model.weight(layer, "self_attn.k_norm").float() + offset
        factor = LARGEST / applied.abs().max().item()
        changed[f"model.layers.{layer}.self_attn.k_norm.weight"] = (applied * factor - offset).bfloat16()
        scales.append(model.config.scale / (factor if change == KScale.BALANCED else 1))
    return replace(model, w=changed, scales=tuple(scales))


def compared(new: Sequence[int], other: Running) -> dict[str, Any]:
    """equal: tokens before the first that differs; and margins of the other's logits (runs.schema.EngineRow)."""
    equal = next((i for i, (a, b) in enumerate(zip(new, other.new, strict=True)) if a != b), len(new))
    rows = [row.float() for row in other.logits]
    lead = (rows[equal][other.new[equal]] - rows[equal][new[equal]]).item() if equal < len(new) else None
    usual = statistics.median((row.topk(2).values @ torch.tensor([1.0, -1.0])).item() for row in rows)
    return {"equal": equal, "margin": lead, "margin_median": usual}


def nats(model: Model, wide: dict[str, Tensor], prompt: Sequence[int], new: Sequence[int]) -> float:
    """Mean of - log p of the tokens of `new` behind the prompt, by the weights `wide`; its exp is the perplexity."""
    logits = forward(model.config, wide, [*prompt, *new])[len(prompt) - 1 : -1].double()
    return -logits.log_softmax(-1).gather(1, torch.tensor(new)[:, None]).mean().item()


def sweep(records: Records, source: str, short: bool) -> None:
    """Rows of a model, or of Gemma 3 270M and of Qwen3-0.6B with drawn weights. Raises what load and of_model raise."""
    size = SHORT if short else WHOLE
    for name in [source] if source else ["gemma-3-270m", *([] if short else [CALIBRATED_MODEL])]:
        Study(records, load(had(name), tokens=size.prompt + size.tokens), size).run()


@dataclass(frozen=True)
class Arm:
    """A way to a text."""

    k_scale: KScale
    plan: str
    backend: str = EAGER
    how: How = How.BATCH


class Study:
    """One model's rows. A text is compared with eager's under the same weights and, where it was written alone, with
    what eager writes alone: what differs is the plan, or the way, and nothing else."""

    def __init__(self, records: Records, lm: LanguageModel, size: Size) -> None:
        self.records, self.lm, self.size = records, lm, size
        weights = of_model(lm.model, lm.name)
        self.model = Model(weights.config, weights.all(torch.bfloat16))
        self.prompts = [text.ids for text in texts(lm, None, size.prompt, size.prompts)]
        self.wide = {} if lm.weights == "calibrated" else weights.all(torch.float32)
        self.known: dict[tuple[int, ...], float] = {}  # text -> its nats

    def run(self) -> None:
        """Eager, and the plan that it is, in every way: what batches and pages change by themselves; then every plan in
        one batch; then what fuses, under larger K-norm weights, unless the model's reach 96.5 already."""
        own = OWN_PLAN[kind := self.model.config.model_type]
        plans = dict.fromkeys((own, *(self.size.plans or plans_of(kind))))
        ways = [Arm(KScale.OWN, EAGER, how=how) for how in How]
        ways += [Arm(KScale.OWN, TRANSFORMERS, how=How.ALONE)]
        ways += [Arm(KScale.OWN, own, how=how) for how in (How.ALONE, How.BATCH)]
        self.measure(KScale.OWN, ways + [Arm(KScale.OWN, plan, self.size.backend) for plan in plans])
        norms = [w for name, w in self.model.w.items() if "k_norm" in name]
        if norms and max((w + float(self.model.config.gemma)).abs().max().item() for w in norms) < LARGEST:
            for change in (KScale.BALANCED, KScale.ALONE):
                fused = [Arm(change, plan, self.size.backend) for plan in (own, *FUSED)]
                self.measure(change, [Arm(change, EAGER), *fused])

    def measure(self, change: KScale, arms: list[Arm]) -> None:
        """Those arms, on the model with its K norms so changed; of each first its texts, then the run."""
        todo = [arm for arm in arms if not self.records.has(EngineRunRow, **self.key(arm))]
        if not todo:
            return
        model, tokens = with_k_norms(self.model, change), self.size.tokens
        beside = {How.BATCH: generations(model, EAGER, self.prompts, tokens)}
        if any(arm.how == How.ALONE for arm in todo):
            beside[How.ALONE] = [run for p in self.prompts for run in generations(model, EAGER, [p], tokens)]
        rng = np.random.default_rng(0)
        for prompt, other in enumerate(beside[How.BATCH]):
            self.records.add(self.row(Arm(change, SHUFFLED), prompt, rng.permutation(other.new).tolist()))
        for arm in track(todo, f"{self.lm.name}, K norms {change}"):
            reference = How.ALONE if arm.how == How.ALONE else How.BATCH
            if arm.plan == TRANSFORMERS:
                found, counts = [generated(self.lm, prompt, tokens) for prompt in self.prompts], Counts()
            else:
                found, counts = self.written(model, arm)
            pairs = zip(found, beside[reference], strict=True)
            rows = [self.row(arm, i, new, **compared(new, other)) for i, (new, other) in enumerate(pairs)]
            self.records.add(*(replace(row, beside=f"{EAGER}, {reference}") for row in rows))
            self.records.add(EngineRunRow(**self.key(arm), **self.totals(arm, found, counts)))

    def written(self, model: Model, arm: Arm) -> tuple[list[list[int]], Counts]:
        """Texts of that arm, and what its engine did."""
        chain, together = chain_of(model, arm.plan, arm.backend), 1 if arm.how == How.ALONE else len(self.prompts)
        if arm.backend == "inductor":  # compiles, for both its shapes
            write(Engine(model, chain, batch=together), self.prompts, 2)
        lengths = [len(prompt) for prompt in self.prompts]
        whole = -(-(max(lengths) + self.size.tokens) // PAGE)
        scarce = max(whole, sum(-(-length // PAGE) for length in lengths) + 1)  # a page more than the prompts fill
        engine = Engine(model, chain, scarce if arm.how == How.PREEMPTED else len(lengths) * whole, together)
        if arm.how == How.REUSED:
            write(engine, self.prompts, self.size.tokens)
            engine.counts = Counts()
        return [sequence.new for sequence in write(engine, self.prompts, self.size.tokens)], engine.counts

    def key(self, arm: Arm) -> dict[str, Any]:
        return {"model": self.lm.name, "weights": self.lm.weights, **vars(arm)}

    def row(self, arm: Arm, prompt: int, new: list[int], **beside: Any) -> EngineRow:
        text = " ".join(map(str, new)) if self.lm.tokenizer is None else self.lm.tokenizer.decode(new)
        said = {"nats": self.nats(prompt, new), "text": text.replace("\n", "⏎"), "tokens": len(new)}
        return EngineRow(**self.key(arm), prompt=prompt, **said, **beside)

    def totals(self, arm: Arm, found: list[list[int]], counts: Counts) -> dict[str, Any]:
        row: dict[str, Any] = {"sequences": len(found), "new_tokens": sum(map(len, found))}
        row |= {"prompt_tokens": sum(map(len, self.prompts)), "threads": torch.get_num_threads()}
        if not counts.seconds:  # transformers' own, and untimed
            return row
        low, middle, high = (1e3 * np.quantile(counts.seconds, [0.1, 0.5, 0.9])).tolist()
        row |= {name: value for name, value in vars(counts).items() if name != "seconds"}
        row |= {"step_p10_ms": low, "step_p50_ms": middle, "step_p90_ms": high}
        together = 1 if arm.how == How.ALONE else len(found)  # of one preempted, batches have many sizes
        return row if arm.how == How.PREEMPTED else row | {"tokens_per_s": 1e3 * together / middle}

    def nats(self, prompt: int, new: list[int]) -> float | None:
        """None where weights are drawn: nothing that such a model writes is probable."""
        whole = (*self.prompts[prompt], *new)
        if self.wide and whole not in self.known:
            self.known[whole] = nats(self.model, self.wide, self.prompts[prompt], new)
        return self.known.get(whole)


def generated(lm: LanguageModel, prompt: Sequence[int], tokens: int) -> list[int]:
    """transformers' own greedy tokens, by its eager attention; no token ends the text, as none ends ours."""
    before, ids = lm.config._attn_implementation, torch.tensor([list(prompt)])
    lm.model.set_attn_implementation("eager")
    try:  # without a mask generate() takes a prompt's pad tokens for padding
        asked = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": None}
        out = lm.model.generate(ids, attention_mask=torch.ones_like(ids), **asked)
    finally:
        lm.model.set_attn_implementation(before)
    return out[0, len(prompt) :].tolist()
