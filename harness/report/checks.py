"""What was checked how, and what each check cannot see: the page that a sceptic reads first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from castpoint.harness.report import gates
from castpoint.harness.report.fingerprints import OPEN, SAME_BITS, THAT, outcome
from castpoint.harness.report.markdown import markdown, paragraphs
from castpoint.harness.report.studies import executed_words
from castpoint.harness.runs.frames import latest

HEADING = "What was checked how, and what each check cannot see"
# What tests/independent recomputes; its tests hold these numbers to it.
LAYERS, CASES, NORMS, BUDGETS = "0, 9 and 27", 44, 6, 6
FALSE_RED = 2e-9  # of the envelope, a sum: variants.envelope.false_red


def of_gates(frame: pd.DataFrame) -> str:
    faults, passed, looks, refused = gates.counted(frame)
    return (
        f"Of {faults} kernels with a planted fault {faults - passed} are seen; of {looks} looks at right ones {refused} "
        "were refused."
    )


def of_audit(frame: pd.DataFrame) -> str:
    return f"{int((frame['status'] == 'ok').sum())} of {len(frame)} kernels."


def of_fingerprints(frame: pd.DataFrame) -> str:
    found = pd.Series([outcome(row) for row in frame.itertuples(index=False)])
    right = int(found.isin([THAT, SAME_BITS, OPEN]).sum())
    return (
        f"Of {len(found)} planted plans {right} are answered with that plan, its unrounded steps open or not, or with one of the "
        "same bits."
    )


def of_cases(frame: pd.DataFrame) -> str:
    return f"{CASES} of {len(frame)} figures again in NumPy, with what changed in the first draw and the verdict."


# Figures, the table that counts what was checked, how, in which numbers, and what that cannot see.
CHECKS: tuple[tuple[str, str, str, Callable[[pd.DataFrame], str] | None, str], ...] = (
    (
        "Errors of plans, ulps, gains, logits",
        "",
        "Again in NumPy, by code that imports nothing of the lab, to the six digits that are printed: every plan's errors, also in "
        f"ulps, at layers {LAYERS}; histograms and logits at the first, gains of `hf` there; two plans on massive tokens, in one layer. What Hugging Face's own modules return lies in "
        "the envelope of `hf`, what `F.rms_norm` makes in that of `one-rounding`, and more than a tenth of either outside the other's.",
        None,
        "Whether drawn weights stand for a checkpoint's: how weights correlate with each other and with activations is not in "
        "them.",
    ),
    (
        "What K-norm weights do",
        "",
        "One draw with all its replaced weights again in NumPy, a channel's part by the logit of that channel alone. Multiples, "
        "correlations and their intervals again from the records.",
        None,
        "Other draws, and layers of a real model, were not recomputed. Positions, the values that attention adds up, and "
        "training: no other weights were ever trained with these.",
    ),
    (
        "Error budget",
        "",
        f"{BUDGETS} plans of the first layer again, one with positions too, by walking through all orders of making their roundings. The parts sum to the "
        "whole, or there is no row.",
        None,
        "A share's noise: a rounding redraws what those behind it do, by up to a few percent of the whole.",
    ),
    (
        "Kernels against their specs",
        "gates",
        "Equal bits where no sum depends on order, the envelope elsewhere. On exact inputs the number of elements that each moved "
        "boundary, short accumulator and split sum changes comes out of NumPy too (where the moved one makes a sum inexact, whether it changes any), and what other projects' tests say of these on drawn inputs, and of every fault in a single norm.",
        of_gates,
        f"The faults listed as seen by none; a fault of another kind. The envelope's verdicts were not made by other code. The envelope is wrong about a right sum once in {1 / FALSE_RED:.0e} "
        "under its model. Interpreted, no race and no compiler.",
    ),
    (
        "Compiled kernels, run on a CPU",
        "executed",
        "The same two checks on PTX; each instruction against exact arithmetic, over all its modifiers.",
        executed_words,
        "ptxas, races between threads, a tensor core's own order and truncation, the last bits of approximate instructions.",
    ),
    (
        "Static audit",
        "audit",
        "Every rounding of the plan followed from TTIR into machine code; kernels with one moved are found red by the tests.",
        of_audit,
        "Values: a rounding in the right place of a wrong number; the order of sums.",
    ),
    (
        "What public implementations do",
        "fingerprints",
        f"Answers on plans that are known. The words found for {NORMS} public norms, run eagerly, give all "
        "but one element in 10,000 in NumPy.",
        of_fingerprints,
        "Inputs and shapes that were not asked; boundaries that the family does not have.",
    ),
    (
        "Cases of the field",
        "cases",
        "Measured on inputs as their authors describe them.",
        of_cases,
        "What a thread does not say: weights, the residual's size, the model. Benchmarks and generated text.",
    ),
    (
        "A whole model",
        "",
        "Of small models with drawn weights, the figures of eager and of four plans against float64 and against eager again, by plain "
        "tensor code without a module, to the printed digits, K in ulps, attention logits and where text parts among them. The real model's rank correlations and its intervals again from the records, by trying flips of signs. Of the real model, by `make test-real`, float32's log likelihood of two passages, and what four plans say of one, with the errors of its layers.",
        None,
        "Inside the real model, other passages were not recomputed. Differences below those that the tables call detectable; other texts, other models; positions beyond a passage.",
    ),
    (
        "Eager's own figures",
        "",
        "On every instruction set that this CPU plays, as ranges. What is said to hold on any machine, of a bench of one layer "
        "byte for byte on two.",
        None,
        "Another make of CPU, a GPU.",
    ),
    (
        "Times",
        "",
        "Arms in turns, weights in rotation, medians beside quantiles and the roofline of the same machine.",
        None,
        "A GPU: times of a CPU rank two matmuls of PyTorch, not plans.",
    ),
)


def section(folder: Path) -> str:
    """Of report.md, with what the folder's newest studies count."""
    lines = []
    for figures, table, how, count, unseen in CHECKS:
        found = latest(folder, table) if table else None
        counted = count(found[1]) if count and found else ""
        lines.append([figures, f"{how} {counted}".rstrip(), unseen])
    frame = pd.DataFrame(lines, columns=["figures", "checked by", "what that cannot see"])
    said = "By `make test`, but for what a study does or where it says otherwise; numbers are of the studies in this report."
    return paragraphs(f"## {HEADING}", said, markdown(frame))
