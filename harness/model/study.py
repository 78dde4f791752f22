"""Does it matter? A language model with a variant attached, against itself in float64 and in eager bf16.

Every arm reads the same tokens in one pass: a prompt, and behind it the greedy continuation that eager bf16 chose for
it. So one pass shows the hidden state after every layer, the logits, what a token's log probability changes by, and
the first token of the continuation that the arm would not have chosen. Up to there its greedy text is eager's, but for
near ties: a pass over all tokens and a pass token by token sum in another order. How often that matters is what the
arm `eager` shows, since eager chose the continuation token by token.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from castpoint.harness.accuracy.amplification import attention_logits
from castpoint.harness.accuracy.errors import error_stats
from castpoint.harness.model.attach import attached, decoder_layers, fitted
from castpoint.harness.model.language_model import LanguageModel, precision_for
from castpoint.harness.model.passes import Pass, forward, greedy, k_norm_max
from castpoint.harness.model.yardsticks import four_bit, in_precision, one_ulp_on_k
from castpoint.harness.runs.errors import UserError, mistakes
from castpoint.harness.runs.progress import track
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import ModelDlogpRow, ModelLayerRow, ModelTokensRow
from castpoint.harness.runs.words import BINS, Status
from castpoint.variants.catalogue import plan_named

PASSAGES = Path(__file__).parent / "data" / "passages.txt"
CONTINUATION = 32  # greedy tokens behind a prompt
CHUNK = 4  # positions whose logits are compared at once: more leave the caches, and take four times as long


@dataclass(frozen=True)
class Arm:
    """A way to run the model: token ids -> what it computes of them."""

    name: str
    backend: str
    run: Callable[[Sequence[int]], Pass]


@dataclass(frozen=True)
class Text:
    """source: `passages` or `prompts`; ids: token ids of the prompt."""

    source: str
    number: int
    ids: list[int]


def read_prompts(path: Path) -> list[str]:
    """Prompts of a UTF-8 text file, with blank lines between them. Raises UserError if it is none, or holds none."""
    if not path.is_file():
        raise UserError(f"--prompts {path} does not exist: give a text file, with blank lines between prompts")
    with mistakes(OSError, UnicodeDecodeError, about=f"{path} cannot be read, prompts are UTF-8 text"):
        text = path.read_text(encoding="utf-8")
    prompts = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompt: write some text, with blank lines between prompts")
    return prompts


def texts(lm: LanguageModel, prompts: Path | None, tokens: int, passages: int) -> list[Text]:
    """The first of the fixed passages, whose perplexity is measured, and the prompts of a file; at most so many tokens
    of each.

    Raises UserError for a prompt that does not fit into the model's context.
    """
    context = lm.config.max_position_embeddings - CONTINUATION
    found = []
    for source, path in (("passages", PASSAGES), ("prompts", prompts)):
        listed = read_prompts(path) if path else []
        for number, prompt in enumerate(listed[:passages] if source == "passages" else listed):
            ids = lm.encode(prompt)
            if len(ids) < 2:
                raise UserError(f"prompt {number + 1} of {path} has no tokens, or one: the model needs two")
            if len(ids) > context:
                raise UserError(
                    f"prompt {number + 1} of {path} has {len(ids)} tokens: the model reads {context}, and "
                    f"{CONTINUATION} more that it writes"
                )
            found.append(Text(source, number, ids[:tokens]))
    return found


# ---------------------------------------------------------------- arms


def arms(lm: LanguageModel, plans: Sequence[str], backend: str) -> list[Arm]:
    """Eager first, then yardsticks, then every plan on that backend. Raises what fitted raises."""
    model = lm.model
    listed = [
        Arm("eager", "eager", lambda ids: forward(model, ids)),
        Arm("eager, batch of 2", "eager", lambda ids: forward(model, ids, batch=2)),
        Arm("eager, token by token", "eager", lambda ids: forward(model, ids, decoded=len(ids) - 1)),
        Arm("one ulp on K", "eager", _within(model, lambda: one_ulp_on_k(model))),
        Arm("float32", "eager", _within(model, lambda: in_precision(model, torch.float32))),
        Arm("4-bit weights", "eager", _within(model, four_bit(model))),
    ]
    for name in plans:
        plan = fitted(plan_named(name), lm.config.model_type)
        listed.append(Arm(name, backend, _within(model, functools.partial(attached, model, plan, backend))))
    return listed


def _within(model: nn.Module, context: Callable[[], AbstractContextManager[None]]) -> Callable[[Sequence[int]], Pass]:
    def run(ids: Sequence[int]) -> Pass:
        with context():
            return forward(model, ids)

    return run


# ---------------------------------------------------------------- errors


def layer_errors(actual: Pass, reference: Pass, layer: int) -> dict[str, float]:
    """Errors of one layer's hidden state, of its K, and of its attention logits, q.k times the model's scale, causal,
    without positions. rel_rms: rms over tokens (K: and heads) of (rms error / rms of the reference). 1 - cosine: mean
    over tokens."""
    a, r = actual.hidden[layer].to(torch.float64), reference.hidden[layer].to(torch.float64)
    error = a - r
    relative = error.square().mean(-1).sqrt() / r.square().mean(-1).sqrt()
    k = error_stats(actual=actual.k[layer], reference=reference.k[layer])
    logits, expected = (attention_logits(p.q[layer], p.k[layer], p.logit_scale) for p in (actual, reference))
    logit_error = (logits - expected)[expected.isfinite()]
    return {
        "max_abs": error.abs().max().item(),
        "rms": error.square().mean().sqrt().item(),
        "rel_rms": relative.square().mean().sqrt().item(),
        "one_minus_cosine": (1 - torch.cosine_similarity(a, r, dim=-1)).mean().item(),
        "k_max_abs": k.max_abs,
        "k_rel_rms": k.rel_rms,
        "k_p99_ulp": k.p99_ulp,
        "attention_logit_rms": logit_error.square().mean().sqrt().item(),
    }


def token_errors(actual: Pass, reference: Pass, ids: Sequence[int]) -> tuple[dict[str, float], Tensor]:
    """What a model says otherwise than the reference, and |difference of log p| of each next token [S - 1].

    kl: of the reference's distribution from the actual one, nats. top1, top5: share of positions with the same most
    likely token (of equal ones the first), and mean share of the five most likely that are common.
    """
    largest, kl = [], []
    for at in range(0, len(actual.logits), CHUNK):
        part = slice(at, at + CHUNK)
        largest.append((actual.logits[part].to(torch.float64) - reference.logits[part].to(torch.float64)).abs().amax())
        log_a, log_r = actual.log_p[part], reference.log_p[part]
        kl.append((log_r.exp() * (log_r - log_a)).sum(-1))
    a, r = (p.logits.topk(5, -1).indices for p in (actual, reference))
    common = (a[:, :, None] == r[:, None, :]).any(-1)
    change = (following(actual.log_p, ids) - following(reference.log_p, ids)).abs()
    row = {
        "logit_max": max(largest).item(),
        "kl_mean": torch.cat(kl).mean().item(),
        "kl_max": torch.cat(kl).max().item(),
        "top1": (actual.logits.argmax(-1) == reference.logits.argmax(-1)).double().mean().item(),
        "top5": common.double().mean().item(),
        "dlogp_p50": change.quantile(0.5).item(),
        "dlogp_p99": change.quantile(0.99).item(),
        "dlogp_max": change.max().item(),
    }
    return row, change


def following(log_p: Tensor, ids: Sequence[int]) -> Tensor:
    """log p of each next token, [len(ids) - 1]: log_p [S, V] at position i is of ids[i + 1]."""
    return log_p[: len(ids) - 1].gather(1, torch.tensor(list(ids[1:]), device=log_p.device)[:, None])[:, 0]


def parting(logits: Tensor, prompt: int, continuation: Sequence[int]) -> int:
    """Tokens of the continuation before the first that logits [S, V] would not choose; all of them if none."""
    chosen = logits[prompt - 1 : prompt - 1 + len(continuation)].argmax(-1).tolist()
    return next((i for i, (a, b) in enumerate(zip(chosen, continuation, strict=True)) if a != b), len(continuation))


# ---------------------------------------------------------------- the study


def sweep_model(lm: LanguageModel, plans: Sequence[str], backend: str, found: list[Text], records: Records) -> None:
    """Rows of every text and arm, against the truth and against eager."""
    listed = arms(lm, plans, backend)
    tokens = max(len(text.ids) for text in found) + CONTINUATION
    dtype = precision_for(lm.config, next(lm.model.parameters()).device.type, tokens, loaded=True)
    weights = [k_norm_max(layer) for layer in decoder_layers(lm.model)]
    for text in track(found, "passages and prompts"):
        key = {"model": lm.name, "weights": lm.weights, "text": text.source, "prompt": text.number}
        todo = [arm for arm in listed if not records.has(ModelTokensRow, **key, arm=arm.name, reference="eager")]
        if not todo:
            continue
        try:
            ids = [*text.ids, *greedy(lm.model, text.ids, CONTINUATION)]
            with in_precision(lm.model, dtype):
                truth = finite(forward(lm.model, ids))
            eager = finite(forward(lm.model, ids))
        except Exception as error:  # no arm has anything to be held against: the other texts go on
            for arm in todo:
                _fail(records, {**key, "arm": arm.name, "backend": arm.backend}, f"no reference: {error}")
            continue
        references = {str(dtype).removeprefix("torch."): truth, "eager": eager}
        for arm in todo:
            row = {**key, "arm": arm.name, "backend": arm.backend}
            try:
                result = eager if arm.name == "eager" else finite(arm.run(ids))
            except Exception as error:  # whatever a kernel, a compiler or a quantiser raises: the other arms go on
                _fail(records, row, str(error))
                continue
            _record(records, row, result, references, ids, len(text.ids), weights)


def finite(result: Pass) -> Pass:
    """That pass. Raises ValueError where its logits are no numbers."""
    if not result.logits.isfinite().all():
        raise ValueError("its logits hold NaN or infinity")
    return result


def _fail(records: Records, row: dict[str, object], reason: str) -> None:
    records.add(ModelTokensRow(**row, reference="eager", status=Status.FAILED, reason=reason))


def _record(
    records: Records,
    key: dict[str, object],
    made: Pass,
    references: dict[str, Pass],
    ids: list[int],
    prompt: int,
    k_norm_max: list[float | None],
) -> None:
    """Rows of one arm on ids, `prompt` of them a prompt; k_norm_max: of every layer. That of its tokens against eager
    comes last, and says that the others are there."""
    nll = -following(made.log_p, ids[:prompt]).mean().item()
    parts_at = parting(made.logits, prompt, ids[prompt:])
    for name, reference in references.items():
        row = {**key, "reference": name}
        for layer, weight in enumerate(k_norm_max):
            if not records.has(ModelLayerRow, **row, layer=layer):
                found = layer_errors(made, reference, layer)
                records.add(ModelLayerRow(**row, layer=layer, k_norm_max=weight, **found))
        errors, change = token_errors(made, reference, ids)
        counts = torch.histogram(change.cpu(), torch.tensor([-1.0, *BINS, float("inf")], dtype=torch.float64)).hist
        for edge, count in zip([0.0, *BINS], counts.tolist(), strict=True):
            if count:
                records.add(ModelDlogpRow(**row, above=edge, tokens=int(count)))
        records.add(ModelTokensRow(**row, tokens=len(ids), parts_at=parts_at, nll=nll, **errors))
