"""Weights of 8 and 4 bits beside cast plans: their error in a layer's K and attention logits, and what a whole model
says otherwise, in llama.cpp's own statistics.

In a layer everything but the weights is float64, so that the two kinds of error stand apart. In a whole model it is
float32 for quantised weights and bf16 for a plan, each against the model in float32. The two real models come from GGUF
files whose q and k lie on a grid of 5 bits already: what a second quantisation does to such weights is not what it does
to weights that no grid has touched, as the drawn ones are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor, nn

from castpoint.harness.accuracy.amplification import applied, attention_logits
from castpoint.harness.accuracy.errors import error_stats
from castpoint.harness.model.attach import attached, decoder_layers, fitted, layer_problem, replaced
from castpoint.harness.model.fetch import had
from castpoint.harness.model.k_norms import entering
from castpoint.harness.model.language_model import LanguageModel, load
from castpoint.harness.model.passes import forward, norm_offset
from castpoint.harness.model.study import texts
from castpoint.harness.model.yardsticks import in_precision
from castpoint.harness.problems.drawn import synthetic_problem
from castpoint.harness.runs.progress import track
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import FourBitRow, KlRow
from castpoint.harness.runs.words import Status
from castpoint.harness.systems.codecs import TYPES, through
from castpoint.harness.systems.kl_statistics import Tokens, listed
from castpoint.kernels.plan import KEEP
from castpoint.variants.catalogue import PLANS, plan_named
from castpoint.variants.problem import Problem
from castpoint.variants.spec import Chain, spec, truth

MODELS = ("gemma-3-270m", "qwen2.5-coder-0.5b-instruct")
MODEL_PLANS = ("hf", "one-rounding", "cast-after-matmul", "fp32", "truncating")
DRAWN_LAYERS, TOKENS, TEXTS = (0, 9, 18, 27), 64, 16
NORMS_TOO, K_NORM, EAGER = ", norms too", ", K norm alone", "eager"


def sweep(records: Records, source: str, short: bool) -> None:
    """Rows of drawn layers, of a model's own layers, and of whole models."""
    names = MODELS[: 1 if short else None]
    models = [load(had(source), tokens=TOKENS)] if source else (load(had(name), tokens=TOKENS) for name in names)
    for layer in DRAWN_LAYERS[: 1 if short else None]:
        add_layer(records, synthetic_problem(layer=layer, tokens=TOKENS))
    for lm in models:
        found = texts(lm, None, 24 if short else TOKENS, 2 if short else TEXTS)
        for layer, problem in enumerate(_layers(lm, found[0].ids)[: 2 if short else None]):
            add_layer(records, problem.replace(model=lm.name, weights=lm.weights, layer=layer))
        add_model(records, lm, [text.ids for text in found])


@torch.no_grad()
def _layers(lm: LanguageModel, ids: list[int]) -> list[Problem]:
    streams = entering(lm, ids)
    return [layer_problem(layer, lm.config, x) for layer, x in zip(decoder_layers(lm.model), streams, strict=True)]


# ---------------------------------------------------------------- a layer


def add_layer(records: Records, problem: Problem) -> None:
    """Rows of every plan and weight type on one layer, against the chain in float64 with the weights as they are."""
    exact = truth(problem)
    key = {"model": problem.model, "weights": problem.weights, "layer": problem.layer}
    for arm, make in layer_arms(problem).items():
        if records.has(FourBitRow, **key, arm=arm):
            continue
        try:
            q, k = make()
        except ValueError as error:
            records.add(FourBitRow(**key, arm=arm, status=Status.NOT_APPLICABLE, reason=str(error)))
            continue
        logits, expected = attention_logits(q, k), attention_logits(exact.q, exact.k)
        seen = expected.isfinite()
        apart = (logits - expected)[seen].square().mean().sqrt() / expected[seen].square().mean().sqrt()
        stats = error_stats(actual=k, reference=exact.k)
        records.add(FourBitRow(**key, arm=arm, k_rel_rms=stats.rel_rms, logit_rel_rms=apart.item()))


def layer_arms(problem: Problem) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """Arm -> q and k [T, H, Dh], float64."""
    arms: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {}
    for name, named in PLANS.items():
        if named.plan.weight_offset == "none":
            plan = named.plan.replace(weight_offset=KEEP) if problem.weight_offset else named.plan
            arms[name] = functools.partial(_of_chain, functools.partial(spec, plan, problem))
    for kind in TYPES:
        arms[kind] = functools.partial(quantised, problem, kind)
        arms[kind + NORMS_TOO] = functools.partial(quantised, problem, kind, True, ("norm", "q_norm", "k_norm"))
        if problem.has_head_norm:
            arms[kind + K_NORM] = functools.partial(quantised, problem, kind, False, ("k_norm",))
    return arms


def _of_chain(make: Callable[[], Chain]) -> tuple[Tensor, Tensor]:
    chain = make()
    return chain.q, chain.k


def quantised(problem: Problem, kind: str, matrix: bool = True, norms: tuple[str, ...] = ()) -> tuple[Tensor, Tensor]:
    """q and k in float64 with the QKV matrix and these norms' weights through that type. Norm weights are quantised as
    they are applied, 1 + w in Gemma, as a GGUF file holds them."""

    def weight(name: str) -> Tensor:
        whole = applied(problem, getattr(problem, f"{name}_weight"))
        return through(kind, whole).double() if name in norms else whole

    qkv = through(kind, problem.qkv_weight).double() if matrix else problem.qkv_weight.double()
    hidden = _rms(problem.x.double(), problem.eps) * weight("norm")
    proj = hidden @ qkv.T
    if problem.bias is not None:
        proj = proj + problem.bias.double()
    q, k, _ = problem.split_heads(proj)
    if not problem.has_head_norm:
        return q, k
    return _rms(q, problem.eps) * weight("q_norm"), _rms(k, problem.eps) * weight("k_norm")


def _rms(x: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


# ---------------------------------------------------------------- a whole model


def add_model(records: Records, lm: LanguageModel, found: list[list[int]]) -> None:
    """llama.cpp's statistics of every arm over all texts, against the model in float32."""
    key = {"model": lm.name, "weights": lm.weights}
    arms = {name: arm for name, arm in model_arms(lm).items() if not _done(records, lm.name, name)}
    with in_precision(lm.model, torch.float32):
        base = [forward(lm.model, ids).logits for ids in (found if arms else [])]
    for name in track(list(arms), f"arms of {lm.name}"):
        tokens = Tokens()
        try:
            with arms[name]():
                for ids, expected in zip(found, base, strict=True):
                    tokens.add(forward(lm.model, ids).logits, expected, ids)
        except ValueError as error:
            records.add(KlRow(**key, arm=name, status=Status.NOT_APPLICABLE, reason=str(error)))
            continue
        rows = [
            KlRow(**key, arm=name, statistic=what, value=value, standard_error=error, tokens=len(tokens.kl))
            for what, (value, error) in listed(tokens).items()
        ]
        records.add(*rows)


def _done(records: Records, model: str, arm: str) -> bool:
    return any(records.has(KlRow, model=model, arm=arm, statistic=what) for what in ("", "Same top p"))


def model_arms(lm: LanguageModel) -> dict[str, Callable[[], AbstractContextManager[object]]]:
    """Arm -> the context in which the model is it."""
    model, kind_of = lm.model, lm.config.model_type
    arms: dict[str, Callable[[], AbstractContextManager[object]]] = {EAGER: lambda: ExitStack()}
    for name in MODEL_PLANS:
        arms[name] = functools.partial(attached, model, fitted(plan_named(name), kind_of), "eager")
    for kind in TYPES:
        arms[f"{kind} of QKV"] = _weights_in(model, kind, _matrices(model, ("q_proj", "k_proj", "v_proj")))
        arms[f"{kind} of all matrices"] = _weights_in(model, kind, _matrices(model, ("proj",)))
        arms[f"{kind} of QKV and norms"] = _weights_in(
            model, kind, [*_matrices(model, ("q_proj", "k_proj", "v_proj")), *_norms(model)]
        )
    return arms


def _matrices(model: nn.Module, ends: tuple[str, ...]) -> list[nn.Module]:
    named = decoder_layers(model).named_modules()
    return [m for name, m in named if isinstance(m, nn.Linear) and name.endswith(ends)]


def _norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in decoder_layers(model).modules() if type(m).__name__.endswith("RMSNorm")]


def _weights_in(model: nn.Module, kind: str, modules: list[nn.Module]) -> Callable[[], AbstractContextManager[None]]:
    """A context in which the model is float32 and these weights went through that type."""

    @functools.cache  # by the first text that needs it
    def values() -> list[Tensor]:
        found = []
        for module in modules:
            offset = norm_offset(module)
            found.append(through(kind, module.weight.detach().float() + offset) - offset)
        return found

    @contextmanager
    def context() -> Iterator[None]:
        made = values()  # of the bf16 weights, before they are widened
        with in_precision(model, torch.float32):
            with replaced([(m.weight, "data", value) for m, value in zip(modules, made, strict=True)]):
                yield

    return context
