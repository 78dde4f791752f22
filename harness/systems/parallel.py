"""A tensor-parallel decoder against one process and the plain decoder: by layer, all-reduce, dtype and rank count."""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from castpoint.harness.model.fetch import had
from castpoint.harness.model.language_model import name_of
from castpoint.harness.model.study import PASSAGES, read_prompts
from castpoint.harness.runs.environment import one_thread
from castpoint.harness.runs.errors import UserError
from castpoint.harness.runs.progress import track
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import ParallelCostRow, ParallelRow
from castpoint.harness.runs.torchrun import launch
from castpoint.harness.systems.decoder import forward
from castpoint.harness.systems.ranks import DTYPES, Job
from castpoint.harness.systems.shards import REDUCES, check_divides
from castpoint.harness.systems.weights import Config, Weights, opened, tokenizer_of

RANKS = (1, 2, 4)
REAL = ("qwen2.5-coder-0.5b-instruct", "gemma-3-270m")
ONE, PLAIN = "one process", "plain decoder"
RANK = "castpoint.harness.systems.ranks"  # the module that every rank runs


@dataclass(frozen=True)
class Got:
    """Of all ranks: K of every layer [S, Hkv, Dh] and the copies of it, the hidden state behind it, logits [S, V]."""

    k: list[Tensor]
    copies: list[tuple[Tensor, Tensor]]  # of K, of one layer and head on two ranks
    hidden: list[Tensor]
    logits: Tensor
    facts: dict[str, Any]


def sweep(records: Records, source: str, short: bool) -> None:
    """Every rank count that divides the model. Raises UserError where none but 1 does, and as torchrun.launch."""
    for name in [source] if source else REAL[: 1 if short else None]:
        study(records, had(name), RANKS, list(DTYPES), list(REDUCES), 12 if short else 24, 2 if short else 4)


def study(
    records: Records, source: str, counts: tuple[int, ...], dtypes: list[str], reduces: list[str],
    tokens: int, decoded: int,
) -> None:  # fmt: skip
    """So many tokens of a passage, and `decoded` more one at a time behind the cache."""
    weights, name = opened(source), name_of(source)
    for ranks in counts:
        check_divides(weights.config, ranks)
    ids = [i for text in read_prompts(PASSAGES) for i in tokenizer_of(source).encode(text)][: tokens + decoded]
    if len(ids) < tokens + decoded:
        raise UserError(
            f"the tokenizer of {source} makes {len(ids)} tokens of all passages: {tokens + decoded} are needed"
        )
    if len(ids) > weights.config.context:
        raise UserError(f"{source} reads {weights.config.context} tokens at once: the study needs {len(ids)}")
    each = [(dtype, reduce) for dtype in dtypes for reduce in reduces]

    def due(ranks: int) -> bool:
        keys = [{"model": name, "dtype": dtype, "reduce": reduce, "ranks": ranks} for dtype, reduce in each]
        return not all(records.has(ParallelCostRow, **key) for key in keys)

    missing = [ranks for ranks in counts if due(ranks)]
    if not missing:
        return
    plain = {dtype: _plain(weights, ids, dtype) for dtype in dtypes}
    job = Job(source, ids, decoded, dtypes, reduces, repeats=1 if decoded < 4 else 3)
    with tempfile.TemporaryDirectory() as scratch:
        for ranks in track([1, *(ranks for ranks in missing if ranks > 1)], f"ranks of {name}"):
            folder = Path(scratch) / str(ranks)
            launch(RANK, asdict(job), ranks, folder)
            for dtype, reduce in each:
                one, got = (_got(Path(scratch) / str(n), dtype, reduce, n, weights.config) for n in (1, ranks))
                about = {"model": name, "dtype": dtype, "reduce": reduce, "ranks": ranks}
                rows = [*_rows(got, one, ONE, decoded, about), *_rows(got, plain[dtype], PLAIN, decoded, about)]
                records.add(*rows)
                records.add(_cost(got, tokens, about))


def _cost(got: Got, tokens: int, about: dict[str, Any]) -> ParallelCostRow:
    times = {what: [1000 * second for second in found] for what, found in got.facts["times"].items()}
    return ParallelCostRow(
        **about,
        tokens=tokens,
        repeats=len(times["prefill"]),
        prefill_ms=statistics.median(times["prefill"]),
        prefill_low_ms=min(times["prefill"]),
        prefill_high_ms=max(times["prefill"]),
        decode_ms=statistics.median(times["decode"]),
        sent_bytes=round(got.facts["sent"]),
        read_elements=got.facts["read"],
    )


def _plain(weights: Weights, ids: list[int], dtype: str) -> Got:
    """The plain decoder over all tokens at once."""
    config = weights.config
    kept: dict[str, list[Tensor]] = {"k": [], "hidden": []}

    def keep(stage: str, layer: int, value: Tensor) -> None:
        if stage in kept:
            kept[stage].append(value)

    with one_thread():  # as a rank runs: a matmul over more threads may add otherwise
        logits = forward(config, weights.all(DTYPES[dtype]), ids, keep)
    return Got(kept["k"], [], kept["hidden"], logits, {})


def _got(folder: Path, dtype: str, reduce: str, ranks: int, config: Config) -> Got:
    paths = [folder / f"{dtype}-{reduce}-{rank}" for rank in range(ranks)]
    kept = [load_file(path.with_suffix(".safetensors")) for path in paths]
    facts = [json.loads(path.with_suffix(".json").read_text()) for path in paths]
    k, copies = [], []
    for layer in range(config.num_layers):
        heads: dict[int, Tensor] = {}
        for rank in range(ranks):
            for head, value in zip(range(*facts[rank]["kv"]), kept[rank][f"k.{layer}"].unbind(1), strict=True):
                if head in heads:
                    copies.append((value, heads[head]))
                heads.setdefault(head, value)
            if not torch.equal(kept[rank][f"hidden.{layer}"], kept[0][f"hidden.{layer}"]):
                raise AssertionError(f"rank {rank} has another hidden state behind layer {layer} than rank 0")
        k.append(torch.stack([heads[head] for head in range(config.num_kv_heads)], 1))
    hidden = [kept[0][f"hidden.{layer}"] for layer in range(config.num_layers)]
    return Got(k, copies, hidden, kept[0]["logits"], facts[0])


def _rows(got: Got, other: Got, reference: str, decoded: int, about: dict[str, Any]) -> list[ParallelRow]:
    rows, prompt = [], len(got.logits) - decoded

    def add(stage: str, layer: int, part: str, actual: Tensor, expected: Tensor) -> None:
        found = _apart(actual, expected)
        rows.append(
            ParallelRow(
                **about, tokens=len(actual), part=part, reference=reference, stage=stage, layer=layer, **found
            )
        )  # fmt: skip

    for layer, (k, hidden) in enumerate(zip(got.k, got.hidden, strict=True)):
        add("k", layer, "prefill", k, other.k[layer][:prompt])
        add("hidden", layer, "prefill", hidden, other.hidden[layer][:prompt])
    if got.copies and reference == ONE:
        add("copies of k", -1, "prefill", *(torch.stack(each) for each in zip(*got.copies, strict=True)))
    add("logits", len(got.k), "prefill", got.logits[:prompt], other.logits[:prompt])
    add("logits", len(got.k), "decode", got.logits[prompt:], other.logits[prompt:])
    return rows


def _apart(actual: Tensor, expected: Tensor) -> dict[str, float]:
    a, e = actual.double(), expected.double()
    difference = a - e
    return {
        "max_abs": difference.abs().max().item(),
        "rms": difference.square().mean().sqrt().item(),
        "rel_rms": (difference.square().mean() / e.square().mean()).sqrt().item(),
        "reference_max": e.abs().max().item(),
        "share_equal": (actual == expected).double().mean().item(),
        "first_equal": (a.argmax(-1) == e.argmax(-1)).double().mean().item(),
    }
