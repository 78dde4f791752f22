"""What is said of a norm besides its plan: facts, and what becomes of fp32, of x as out, of batches and of scales."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math

import torch
from torch import Tensor

from castpoint.harness.fingerprint import facts, probes
from castpoint.harness.fingerprint.arguments import parameters_of
from castpoint.harness.fingerprint.blackbox import BlackBox, Refused
from castpoint.harness.fingerprint.calls import NormCalls
from castpoint.harness.fingerprint.evidence import Call, Miss, missed
from castpoint.harness.fingerprint.layouts import CONTIGUOUS
from castpoint.harness.fingerprint.layouts import ROWS as LONGER
from castpoint.harness.fingerprint.questions import LARGE_WEIGHT, SMALL_WEIGHT
from castpoint.harness.fingerprint.rules import Rows, Rule, predict
from castpoint.harness.fingerprint.sizes import Sizes
from castpoint.harness.fingerprint.stores import MOST
from castpoint.kernels.plan import KEEP

# A rule's words, as a plan calls them.
NORM_WORDS = {
    "rmsnorm": {"rstd": "rstd", "normed": "normed", "out": "hidden"},
    "head_norm": {"rstd": "head_rstd", "normed": "head_normed", "out": "out"},
}
IN_8_BITS = {  # where results are stored so, of what is rounded before
    "rmsnorm": {},
    "head_norm": {"rstd": "head_rstd", "normed": "head_normed", "hidden": "out", "out": "stored"},
}


def norm_facts(rule: Rule, asked: NormCalls, main: Rows, sizes: Sizes) -> dict[str, str]:
    box = asked.box
    said = None
    with contextlib.suppress(Refused):
        said = _facts_at(rule, asked if asked.heads else dataclasses.replace(asked, width=1024), main.weight, sizes)
    said = said or _facts_at(rule, asked, main.weight, sizes)
    if main.scales is not None and not fixed_scale(box):
        said["scales"] = _scales(rule, asked, main)
    kept, plain = dict(box.manners), dataclasses.replace(main, scales=None)
    if "over" in parameters_of(box.fn) and main.scales is None:
        given = dataclasses.replace(main, eps=probes.EPS_LARGE)
        said["x as out"] = facts.tried(lambda: missed(rule, asked.at(given, asked.shape(len(main.x)), over=True)))
    if not asked.heads and asked.tokens is None:
        batch = [4, probes.ROWS // 4, asked.width]
        said["x [B, S, D] of longer rows"] = facts.tried(lambda: missed(rule, asked.at(plain, batch, LONGER)))
    box.manners = kept
    if box.a_weight_a_head:
        said["weight"] = "[H, Dh], one for each head"
    if box.takes("residual") and box.dtype != torch.float32 and main.scales is None:
        said["fp32 residual"] = facts.fp32_residual(rule, asked, main.weight, NORM_WORDS[box.kind])
    if box.weightless:
        return said
    return said | {"fp32 weights": facts.fp32_weights(rule, main, asked, NORM_WORDS[box.kind])}


def fixed_scale(box: BlackBox) -> bool:
    """Whether results are divided by a scale that is given."""
    return "quant_scale" in parameters_of(box.fn)


def largest_of(rule: Rule, rows: Rows) -> Tensor:
    """facts.largest of results in 8 bits: one number where all have one scale."""
    assert rows.scales is not None
    found = facts.largest(predict(rule.replace(out=KEEP), rows), rows.scales)
    return found.max()[None] if (rows.scales == rows.scales[0, 0]).all() else found


def results_of(rule: Rule, call: Call) -> float:
    """The largest result, before it is divided by a scale."""
    plain = dataclasses.replace(call.rows, scales=None)
    return predict(rule.replace(out=KEEP), plain).abs().max().item()


def _scales(rule: Rule, asked: NormCalls, main: Rows) -> str:
    """facts.scales, and that of results so large and so small that a least or a largest scale shows."""
    said: dict[str, str] = {}
    for times in (1.0, LARGE_WEIGHT[rule.narrow], SMALL_WEIGHT[rule.narrow]):
        rows = asked.call(dataclasses.replace(main, weight=times * main.weight, scales=None)).rows
        assert rows.scales is not None
        text = facts.scales(facts.largest(predict(rule.replace(out=KEEP), rows), rows.scales), MOST[rule.out[:4]])
        said.setdefault(text, "" if times == 1 else f"with a weight 2^{math.log2(times):.0f} times as large ")
    return "; ".join(at + text for text, at in said.items())


def _facts_at(rule: Rule, asked: NormCalls, weight: Tensor, sizes: Sizes) -> dict[str, str]:
    box = asked.box

    rng = torch.Generator().manual_seed(3)
    count, first = asked.tokens or probes.ROWS, next((w for w in (rule.rstd, rule.normed, rule.out) if w != KEEP), KEEP)
    tied, eps = facts.rows_near_a_tie(
        asked.width, rng, math.ceil(count / 2), sizes.narrow, 0.0 if first.endswith("-rtz") else 0.5
    )
    x = torch.cat([tied, probes.gaussian([count // 2, asked.width], rng, sizes.narrow)])

    def rows_of(x: Tensor, weight: Tensor, eps: float) -> Rows:
        return Rows(x.to(box.dtype).float(), weight, eps, asked.width, exact=False)

    def stored(x: Tensor, finite: bool) -> Tensor:
        rows = rows_of(x.repeat_interleave(asked.heads or 1, 0), torch.ones(asked.width), eps)
        return asked.at(rows, [len(x), *asked.shape(1)[1:]], finite=finite).stored.reshape(len(x), -1)

    def missing(x: Tensor, layout: str, eps: float) -> Miss:
        return missed(rule, asked.call(rows_of(x, probes.weight_of_width(weight, asked.width), eps), layout))

    said = facts.all_facts(stored, missing, x, asked.tokens, sizes.narrow)
    said["with gradients"] = facts.gradients(box, functools.partial(missing, x, CONTIGUOUS, probes.EPS_LARGE))
    return said
