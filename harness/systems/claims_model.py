"""Claim C4: that what a fused kernel rounds otherwise makes a model write gibberish, under K-norm weights of 96.5.

Whole models with their own weights: Gemma 3 270M (K-norm weights up to 30.1) and Qwen2.5-Coder 0.5B (no K norm). 96.5
is put into Gemma in two ways: every layer's K factors times what lifts the largest to 96.5, and q's divided by it, so
that up to the weights' own rounding the model stays what it is; and the first layer's largest factor set to 96.5 alone,
which is another model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from castpoint.harness.model.attach import attached, decoder_layers, fitted, replaced
from castpoint.harness.model.fetch import had
from castpoint.harness.model.language_model import LanguageModel, load
from castpoint.harness.model.passes import forward, greedy, k_norm_max, norm_offset
from castpoint.harness.model.study import following, parting, texts, token_errors
from castpoint.harness.model.yardsticks import in_precision
from castpoint.harness.runs.words import Judged
from castpoint.harness.systems.found import Figure, Found
from castpoint.variants.catalogue import plan_named

GEMMA, QWEN = "gemma-3-270m", "qwen2.5-coder-0.5b-instruct"
PLANS = ("cast-after-matmul", "fp32")  # the kernel of the report, and the two megakernels
LARGEST = 96.5  # of Qwen3-0.6B's K-norm weights
MEGAKERNELS = (0.000582, 0.000725)  # KL, nats, of two kernels of plan fp32 against Hugging Face, Qwen3-0.6B
TOKENS, WRITTEN, TEXTS = 64, 24, 4
KL, KL_AGAIN = "KL from eager, mean of a text", "KL of eager, token by token, from eager"
EQUAL, PARTS = "share of equal first choices", "tokens before the text parts"
SURE, OWN_SURE, SHUFFLED = "what it writes", "what eager writes", "the same tokens, shuffled"


@contextmanager
def lifted(model: nn.Module) -> Iterator[None]:
    """K's factors of every layer times what lifts the largest to 96.5, q's divided by it; stored in bf16."""
    changes = []
    for layer in decoder_layers(model):
        times = LARGEST / (k_norm_max(layer) or LARGEST)
        for name, factor in (("k_norm", times), ("q_norm", 1 / times)):
            changes.append(_scaled(getattr(layer.self_attn, name), torch.tensor(factor)))
    with replaced(changes):
        yield


@contextmanager
def first_at_largest(model: nn.Module) -> Iterator[None]:
    """The largest K factor of the first layer set to 96.5, all else as it is."""
    norm = decoder_layers(model)[0].self_attn.k_norm
    own = (norm.weight.detach().float() + norm_offset(norm)).abs()
    with replaced([_scaled(norm, torch.where(own == own.max(), LARGEST / own.max(), 1.0))]):
        yield


def _scaled(norm: nn.Module, times: Tensor) -> tuple[object, str, object]:
    offset = norm_offset(norm)
    factors = (norm.weight.detach().float() + offset) * times
    return norm.weight, "data", (factors - offset).to(torch.bfloat16)


ARMS = {  # model and what was done to it -> the model, and the context in which it is so
    "Qwen2.5-Coder 0.5B, its own weights": (QWEN, lambda model: nullcontext()),
    "Gemma 3 270M, its own weights": (GEMMA, lambda model: nullcontext()),
    "Gemma 3 270M, every K norm lifted to 96.5": (GEMMA, lifted),
    "Gemma 3 270M, 96.5 in the first layer": (GEMMA, first_at_largest),
}


def _sureness(lm: LanguageModel, ids: list[int], written: list[int]) -> float:
    """Nats a token, mean, that the model in float32 and as it was published gives to what was written behind ids."""
    with in_precision(lm.model, torch.float32):
        said = -following(forward(lm.model, [*ids, *written]).log_p, [*ids, *written])
    return said[-len(written) :].mean().item()


def _shuffled(tokens: list[int]) -> list[int]:
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    return [tokens[at] for at in order]


def measured(
    lm: LanguageModel, change: AbstractContextManager[None], ids: list[int]
) -> tuple[dict[tuple[str, str], float], dict[str, list[int]]]:
    """(figure, plan) -> its value of one text; and what each arm wrote behind it."""
    found: dict[tuple[str, str], float] = {}
    with change:
        written = {"eager": greedy(lm.model, ids, WRITTEN)}
        whole = [*ids, *written["eager"]]
        eager = forward(lm.model, whole)
        again = forward(lm.model, whole, decoded=len(whole) - 1)
        found[KL_AGAIN, "eager"] = token_errors(again, eager, whole)[0]["kl_mean"]
        for name in PLANS:
            with attached(lm.model, fitted(plan_named(name), lm.config.model_type)):
                made = forward(lm.model, whole)
                written[name] = greedy(lm.model, ids, WRITTEN)
            errors, _ = token_errors(made, eager, whole)
            found[KL, name], found[EQUAL, name] = errors["kl_mean"], errors["top1"]
            found[PARTS, name] = parting(made.logits, len(ids), written["eager"])
    return found, written


def c4(short: bool) -> Found:
    """That difference makes the model diverge and write gibberish."""
    samples: dict[tuple[str, str], list[float]] = {}
    arms = dict(list(ARMS.items())[1:3] if short else ARMS)
    models = {name: load(had(name)) for name, _ in arms.values()}
    for arm, (name, change) in arms.items():
        lm = models[name]
        for text in texts(lm, None, TOKENS, 1 if short else TEXTS):
            found, written = measured(lm, change(lm.model), text.ids)
            sure = {(SURE, plan): _sureness(lm, text.ids, written[plan]) for plan in PLANS}
            sure |= {(OWN_SURE, "eager"): _sureness(lm, text.ids, written["eager"])}
            sure |= {(SHUFFLED, "eager"): _sureness(lm, text.ids, _shuffled(written["eager"]))}
            for (figure, plan), value in (found | sure).items():
                samples.setdefault((figure, f"{arm}: {plan}"), []).append(value)
    return judged(list(arms), samples)


def judged(arms: list[str], samples: dict[tuple[str, str], list[float]]) -> Found:
    """Gibberish is what the model itself, in float32, is as unsure of as of shuffled tokens: halfway from what eager
    writes to these, on the mean of texts, is where a plan's text would have to lie."""
    mean = {key: sum(values) / len(values) for key, values in samples.items()}
    way = {}  # from eager's text, 0, to shuffled tokens, 1
    for arm in arms:
        own, lost = (mean[figure, f"{arm}: eager"] for figure in (OWN_SURE, SHUFFLED))
        way |= {(arm, plan): (mean[SURE, f"{arm}: {plan}"] - own) / (lost - own) for plan in PLANS}
    own_weights = [arm for arm in arms if "own" in arm]
    kl = [value for arm in own_weights for value in samples[KL, f"{arm}: fp32"]]
    again = [value for arm in own_weights for value in samples[KL_AGAIN, f"{arm}: eager"]]
    worst, said = max(way, key=way.__getitem__), {(KL, "fp32"): MEGAKERNELS}
    return Found(
        Judged.REPRODUCED if way[worst] > 0.5 else Judged.NOT_REPRODUCED,
        f"from what eager writes (0) to its tokens shuffled (1) no plan's text lies beyond {way[worst]:.2g}. Plan fp32 "
        f"differs from eager by {min(kl):.2g} to {max(kl):.2g} nats a token, eager token by token from itself by "
        f"{min(again):.2g} to {max(again):.2g}: so much is predicted of Qwen3-0.6B, where two kernels report "
        f"{MEGAKERNELS[0]:.3g} and {MEGAKERNELS[1]:.3g}",
        f"plans {' and '.join(PLANS)} inside whole models, {WRITTEN} greedy tokens; nats a token in float32 with the "
        "published weights",
        f"{len(next(iter(samples.values())))} texts of {TOKENS} tokens; Qwen3-0.6B itself was not run",
        tuple(
            Figure(figure, cause, values, said.get((figure, cause.rpartition(": ")[2]), ()), UNITS.get(figure, ""))
            for (figure, cause), values in samples.items()
        ),
        "castpoint model Qwen/Qwen3-0.6B",
    )


UNITS = {KL: "nats", KL_AGAIN: "nats", SURE: "nats", OWN_SURE: "nats", SHUFFLED: "nats", PARTS: "tokens"}
MEASURES = {"C4": c4}
