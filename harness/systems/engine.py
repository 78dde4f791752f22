"""The engine on whole models: every plan inside it, the text that it writes, where it parts from PyTorch's own.

Arms: `eager` is what PyTorch's modules compute, in the same engine; `transformers` its generate(); every other a plan.
`shuffled` is eager's text in a drawn order: how improbable tokens are whose order says nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
from castpoint.harness.systems.generate import PAGE, Chain, Engine, Model, Request, Running, modules, of_plan
from castpoint.harness.systems.weights import of_model
from castpoint.variants.catalogue import PLANS, plan_named

EAGER, TRANSFORMERS, SHUFFLED = "eager", "transformers", "shuffled"
LARGEST = 96.5  # the largest K-norm weight of Qwen3-0.6B
FUSED = ("cast-after-matmul", "fp32")  # what a kernel does that keeps the normed value in fp32


@dataclass(frozen=True)
class Size:
    """prompts, tokens of each, tokens that each goes on for; plans: none names all that fit."""

    prompts: int
    prompt: int
    tokens: int
    plans: tuple[str, ...] = ()


WHOLE, SHORT = Size(8, 48, 32), Size(3, 28, 8, FUSED)


# ---------------------------------------------------------------- what claims and tests call too


def plans_of(model_type: str) -> list[str]:
    """Plans of the catalogue that fit that architecture."""
    fit = []
    for name, named in PLANS.items():
        try:
            fitted(named.plan, model_type)
        except UserError:
            continue
        fit.append(name)
    return fit


def own_plan(model_type: str) -> str:
    """The plan by which transformers runs that architecture."""
    return "gemma" if model_type == "gemma3_text" else "hf"


def generations(
    model: Model, plan: str, prompts: Sequence[Sequence[int]], tokens: int, backend: str = "eager"
) -> list[Running]:
    """What the model writes behind each prompt, greedily, all in one batch; plan: of the catalogue, or `eager`."""
    engine = Engine(model, chain_of(model, plan, backend), batch=len(prompts))
    return written(engine, prompts, tokens)


def chain_of(model: Model, plan: str, backend: str) -> Chain:
    return modules(model) if plan == EAGER else of_plan(model, plan_named(plan), backend)


def written(engine: Engine, prompts: Sequence[Sequence[int]], tokens: int) -> list[Running]:
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
        scales.append(model.scales[layer] / (factor if change == KScale.BALANCED else 1))
    return replace(model, w=changed, scales=tuple(scales))


def equal_tokens(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))


def margins(sequence: Running) -> list[float]:
    """Of its logits, for every new token: the largest over the second."""
    return [(row.float().topk(2).values * torch.tensor([1.0, -1.0])).sum().item() for row in sequence.logits]


def nats(model: Model, wide: dict[str, Tensor], prompt: Sequence[int], new: Sequence[int]) -> float:
    """Mean of - log p of the tokens of `new` behind the prompt, by the weights `wide`; its exp is the perplexity."""
    logits = forward(model.config, wide, [*prompt, *new])[len(prompt) - 1 : -1].double()
    return -logits.log_softmax(-1).gather(1, torch.tensor(new)[:, None]).mean().item()


# ---------------------------------------------------------------- the study


def sweep(records: Records, source: str, short: bool) -> None:
    """Rows of a model, or of Gemma 3 270M and of Qwen3-0.6B with drawn weights. Raises what load and of_model raise."""
    sources = [had(source)] if source else [had("gemma-3-270m"), *([] if short else [CALIBRATED_MODEL])]
    size = SHORT if short else WHOLE
    for name in sources:
        lm = load(name, tokens=size.prompt + size.tokens)
        Study(records, lm, size).run()


class Study:
    """One model's rows. A text is compared with eager's under the same weights and, unless said otherwise, in the same
    batch: what differs is the plan alone."""

    def __init__(self, records: Records, lm: LanguageModel, size: Size) -> None:
        self.records, self.lm, self.size = records, lm, size
        weights = of_model(lm.model, lm.name)
        self.model = Model.of(weights.config, weights.all(torch.bfloat16))
        self.prompts = [text.ids for text in texts(lm, None, size.prompt, size.prompts)]
        self.wide = weights.all(torch.float32) if lm.weights != "calibrated" else {}
        self.known: dict[tuple[int, ...], float] = {}  # text -> its nats

    def run(self) -> None:
        own = own_plan(self.model.config.model_type)
        plans = self.size.plans or tuple(plans_of(self.model.config.model_type))
        self.ways(own)
        self.plans(KScale.OWN, list(dict.fromkeys((own, *plans))))
        if self.model.config.head_norm and self.lm.weights != "calibrated":  # whose K-norm weights reach 96.5
            for change in (KScale.BALANCED, KScale.ALONE):
                self.plans(change, [own, *FUSED])

    def ways(self, own: str) -> None:
        """Eager, and the plan that it is, in other ways: what batches and pages change by themselves."""
        model, prompts, tokens = self.model, self.prompts, self.size.tokens
        arms = ((EAGER, EAGER, How.ALONE), (own, EAGER, How.ALONE), (EAGER, EAGER, How.REUSED))
        arms = (*arms, (EAGER, EAGER, How.PREEMPTED), (TRANSFORMERS, EAGER, How.ALONE))
        todo = [arm for arm in arms if not self.has(KScale.OWN, *arm)]
        if not todo:
            return
        batch = generations(model, EAGER, prompts, tokens)
        alone = [run for prompt in prompts for run in generations(model, EAGER, [prompt], tokens)]
        for plan, backend, how in track(todo, f"{self.lm.name}, eager"):
            beside, named = (alone, How.ALONE) if plan != EAGER else (batch, How.BATCH)
            if plan == TRANSFORMERS:
                found = [_generated(self.lm, prompt, tokens) for prompt in prompts]
                self.keep(KScale.OWN, plan, backend, how, found, beside, named)
                self.records.add(EngineRunRow(**self.key(KScale.OWN, plan, backend, how), **self.totals(found)))
                continue
            pages = self.scarce() if how == How.PREEMPTED else 256
            engine = Engine(model, chain_of(model, plan, backend), pages, 1 if how == How.ALONE else len(prompts))
            if how == How.REUSED:
                written(engine, prompts, tokens)
                engine.counts = type(engine.counts)()
            sequences = written(engine, prompts, tokens)
            self.keep(KScale.OWN, plan, backend, how, [s.new for s in sequences], beside, named)
            self.count(KScale.OWN, plan, backend, how, engine, sequences)

    def scarce(self) -> int:
        """Pages for all prompts and for one page more, or for one whole text, where that is more."""
        prompts, whole = map(len, self.prompts), self.size.prompt + self.size.tokens
        return max(sum(-(-length // PAGE) for length in prompts) + 1, -(-whole // PAGE))

    def plans(self, change: KScale, plans: list[str]) -> None:
        """Eager and those plans in one batch each, of a model with its K norms so changed."""
        backend = "inductor" if self.size is WHOLE else EAGER
        arms = [(EAGER, EAGER), *((plan, backend) for plan in plans)]
        todo = [arm for arm in arms if not self.has(change, *arm, How.BATCH)]
        if not todo:
            return
        model, tokens = with_k_norms(self.model, change), self.size.tokens
        beside = generations(model, EAGER, self.prompts, tokens)
        self.shuffled(change, beside)
        for plan, ran in track(todo, f"{self.lm.name}, K norms {change}"):
            chain = chain_of(model, plan, ran)
            if ran == "inductor":  # compiles, of both its shapes
                written(Engine(model, chain, batch=len(self.prompts)), self.prompts, 2)
            engine = Engine(model, chain, batch=len(self.prompts))
            sequences = written(engine, self.prompts, tokens)
            self.keep(change, plan, ran, How.BATCH, [s.new for s in sequences], beside, How.BATCH)
            self.count(change, plan, ran, How.BATCH, engine, sequences)

    def shuffled(self, change: KScale, beside: list[Running]) -> None:
        rng = np.random.default_rng(0)
        for prompt, sequence in enumerate(beside):
            key = self.key(change, SHUFFLED, EAGER, How.BATCH, prompt)
            if not self.records.has(EngineRow, **key):
                new = rng.permutation(sequence.new).tolist()
                self.records.add(EngineRow(**key, nats=self.nats(prompt, new), text=self.text(new)))

    def key(self, change: KScale, plan: str, backend: str, how: How, prompt: int | None = None) -> dict[str, object]:
        key = {"model": self.lm.name, "weights": self.lm.weights, "k_scale": change, "plan": plan, "backend": backend}
        return key | {"how": how} | ({} if prompt is None else {"prompt": prompt})

    def has(self, change: KScale, plan: str, backend: str, how: How) -> bool:
        return self.records.has(EngineRunRow, **self.key(change, plan, backend, how))

    def keep(
        self,
        change: KScale,
        plan: str,
        backend: str,
        how: How,
        found: list[list[int]],
        beside: list[Running],
        named: How,
    ) -> None:
        """A row a text."""
        rows = []
        for prompt, (new, other) in enumerate(zip(found, beside, strict=True)):
            equal = equal_tokens(new, other.new)
            parts = equal < len(new)
            rows.append(
                EngineRow(
                    **self.key(change, plan, backend, how, prompt),
                    beside=f"{EAGER}, {named}",
                    tokens=len(new),
                    equal=equal,
                    margin=_lead(other.logits[equal], other.new[equal], new[equal]) if parts else None,
                    margin_median=statistics.median(margins(other)),
                    nats=self.nats(prompt, new),
                    text=self.text(new),
                )
            )
        self.records.add(*rows)

    def count(
        self, change: KScale, plan: str, backend: str, how: How, engine: Engine, sequences: list[Running]
    ) -> None:
        """The row of a whole run, behind those of its texts."""
        done = engine.counts
        low, middle, high = np.quantile(done.seconds, [0.1, 0.5, 0.9]).tolist()
        together = 1 if how == How.ALONE else len(sequences)
        speed = {} if how == How.PREEMPTED else {"tokens_per_s": together / middle}  # its batches are of many sizes
        self.records.add(
            EngineRunRow(
                **self.key(change, plan, backend, how),
                **self.totals([s.new for s in sequences]),
                threads=torch.get_num_threads(),
                steps=done.steps,
                computed=done.computed,
                reused=done.reused,
                preempted=done.preempted,
                step_p10_ms=1e3 * low,
                step_p50_ms=1e3 * middle,
                step_p90_ms=1e3 * high,
                **speed,
            )
        )

    def totals(self, found: list[list[int]]) -> dict[str, int]:
        prompts = sum(map(len, self.prompts))
        return {"sequences": len(found), "prompt_tokens": prompts, "new_tokens": sum(map(len, found))}

    def nats(self, prompt: int, new: list[int]) -> float | None:
        """None where weights are drawn: nothing that such a model writes is probable."""
        whole = (*self.prompts[prompt], *new)
        if self.wide and whole not in self.known:
            self.known[whole] = nats(self.model, self.wide, self.prompts[prompt], new)
        return self.known.get(whole)

    def text(self, new: list[int]) -> str:
        """In one line; of a model without a tokenizer its tokens' numbers."""
        read = " ".join(map(str, new)) if self.lm.tokenizer is None else self.lm.tokenizer.decode(new)
        return read.replace("\n", "⏎")


def _lead(logits: Tensor, own: int, other: int) -> float:
    """By how much one token leads another."""
    return (logits[own].float() - logits[other].float()).item()


def _generated(lm: LanguageModel, prompt: Sequence[int], tokens: int) -> list[int]:
    """transformers' own greedy tokens, with its eager attention; no token ends the text, as none ends ours."""
    model, before = lm.model, lm.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        ids = torch.tensor([list(prompt)])
        out = model.generate(  # without a mask it takes a prompt's pad tokens for padding
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, eos_token_id=None
        )
    finally:
        model.set_attn_implementation(before)
    return out[0, len(prompt) :].tolist()
