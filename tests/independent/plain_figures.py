"""The columns of a whole-model study, in NumPy, of what plain_model makes. It imports nothing of the lab."""

import math

import numpy as np
from plain_chain import attention_logits, relative_rms, spacing


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


class Said:
    """What a pass says of the tokens it read: logits, log p, and the log p of each next token."""

    def __init__(self, made, ids):
        self.logits = made["logits"].double().numpy()
        self.log_p = log_softmax(self.logits)
        self.next = self.log_p[np.arange(len(ids) - 1), ids[1:]]


def of_tokens(said, reference, ids, prompt):
    """All but top5. prompt: so many of ids were read, the others are a continuation."""
    kl = np.array([np.sum(np.exp(r) * (r - a)) for a, r in zip(said.log_p, reference.log_p, strict=True)])
    change = np.abs(said.next - reference.next)
    parted = np.flatnonzero(said.logits[prompt - 1 : -1].argmax(-1) != ids[prompt:])
    return {
        "tokens": len(ids),
        "logit_max": np.abs(said.logits - reference.logits).max(),
        "kl_mean": kl.mean(),
        "kl_max": kl.max(),
        "top1": np.mean(said.logits.argmax(-1) == reference.logits.argmax(-1)),
        "dlogp_p50": np.quantile(change, 0.5),
        "dlogp_p99": np.quantile(change, 0.99),
        "dlogp_max": change.max(),
        "parts_at": parted[0] if len(parted) else len(ids) - prompt,
        "nll": -said.next[: prompt - 1].mean(),
    }


def common_of_five(said, reference):
    """Least and greatest mean share of the five likeliest that are common: of equal logits any may be the fifth."""
    sure, possible = [], []
    for both in zip(said.logits, reference.logits, strict=True):
        fifth = [np.partition(logits, -5)[-5] for logits in both]
        above = [set(np.flatnonzero(logits > least)) for logits, least in zip(both, fifth, strict=True)]
        there = [set(np.flatnonzero(logits >= least)) for logits, least in zip(both, fifth, strict=True)]
        certain = [t if len(t) == 5 else a for a, t in zip(above, there, strict=True)]
        sure.append(len(certain[0] & certain[1]) / 5)
        possible.append(min(5, len(there[0] & there[1])) / 5)
    return np.mean(sure), np.mean(possible)


def of_layer(made, reference, layer):
    """Of the state behind a layer, its K, and its attention logits, q.k times the model's scale, without positions."""
    (a, q, k), (r, true_q, true_k) = (
        [each[name][layer].double().numpy() for name in ("hidden", "q", "k")] for each in (made, reference)
    )
    logits = attention_logits(q, k)[:, np.tri(len(q), dtype=bool)]
    error = logits - attention_logits(true_q, true_k)[:, np.tri(len(q), dtype=bool)]
    cosine = (a * r).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(r, axis=-1)
    ulps = np.sort((np.abs(k - true_k) / spacing(true_k))[(true_k != 0) | (k == true_k)])
    scale = made["scale"] * math.sqrt(q.shape[-1])  # attention_logits divides by sqrt(Dh)
    return {
        "max_abs": np.abs(a - r).max(),
        "rms": math.sqrt(np.mean((a - r) ** 2)),
        "rel_rms": relative_rms(a, r),
        "one_minus_cosine": np.mean(1 - cosine),
        "k_max_abs": np.abs(k - true_k).max(),
        "k_rel_rms": relative_rms(k, true_k),
        "k_p99_ulp": ulps[math.ceil(0.99 * len(ulps)) - 1],
        "attention_logit_rms": scale * math.sqrt(np.mean(error**2)),
    }
