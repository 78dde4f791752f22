"""Whether an answer is the one that was written down before it was asked.

A right answer is a named plan's norm, or the plan of a chain, with the words in which it differs: `hf`,
`one-rounding, order=x*(rstd*w)`, by the names of an rmsnorm for a head's too; or `none` or `error`, with a part of the
reason: `none: LayerNorm`.
"""

from __future__ import annotations

from enum import StrEnum

from castpoint.harness.fingerprint.answer import Answer, words_of
from castpoint.harness.fingerprint.kinds import CHAINS
from castpoint.harness.fingerprint.norm_facts import NORM_WORDS
from castpoint.kernels.plan import PHASE_BOUNDARIES
from castpoint.variants.catalogue import plan_named

ARITHMETIC = {"eps": "float32", "root": "rsqrt", "order": "(x*rstd)*w"}  # of a norm that says nothing of it

UNSAID = ("weight_offset", *PHASE_BOUNDARIES, *ARITHMETIC)  # without a weight, by a table, in 8 bits
MORE = ("x", "weight", "ungated", "gate", "gated", "out")  # what a named plan does not say of a norm


class Verdict(StrEnum):
    """left open: the right words are among the candidates, and the others differ by fp32 steps that no plan fixes."""

    RIGHT = "right"
    OPEN = "left open"
    WRONG = "wrong"


def verdict(right: str, kind: str, answer: Answer) -> Verdict:
    """What the answer is beside the right one. Raises KeyError for a plan or a word that there is not."""
    status, _, reason = right.partition(": ")
    if status in ("none", "error"):
        return Verdict.RIGHT if answer.status == status and reason in answer.reason else Verdict.WRONG
    if not answer.candidates:
        return Verdict.WRONG
    words = right_words(right, kind)
    words = {name: word for name, word in words.items() if name in answer.candidates[0] or name not in UNSAID}
    there = [all(word in found[name].split(" or ") for name, word in words.items()) for found in answer.candidates]
    if not any(there):
        return Verdict.WRONG
    others = [found for found, same in zip(answer.candidates, there, strict=True) if not same]
    plain = {name: word for name, word in words.items() if name not in ARITHMETIC}
    if any(word not in found[name].split(" or ") for found in others for name, word in plain.items()):
        return Verdict.WRONG
    return Verdict.OPEN if others else Verdict.RIGHT


def right_words(right: str, kind: str) -> dict[str, str]:
    """The words of an answer that names a plan. Raises KeyError for a plan or a word that there is not."""
    name, *changes = right.split(", ")
    words = words_of(plan_named(name), kind if kind in (*CHAINS, "qk_norm_rope") else "rmsnorm") | ARITHMETIC
    for change in changes:
        key, _, word = change.partition("=")
        if key not in words and key not in MORE:
            raise KeyError(f"{key} is no word of {right!r}")
        words[key] = word
    return {
        NORM_WORDS["head_norm"].get(_rule_name(key), key) if kind == "head_norm" else key: word
        for key, word in words.items()
    }


def _rule_name(name: str) -> str:
    return "out" if name == "hidden" else name
