"""A decoder in JAX beside PyTorch's, stage by stage: the whole model end to end, and every stage alone on PyTorch's own
input; each JAX op by op, compiled (jit), and compiled without XLA's excess precision."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax
import torch
from jax import Array
from torch import Tensor

from castpoint.harness.model import language_model
from castpoint.harness.model.fetch import KNOWN, had
from castpoint.harness.model.study import PASSAGES, read_prompts
from castpoint.harness.problems.drawn import CALIBRATED_MODEL
from castpoint.harness.runs.progress import track
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import JaxCauseRow, JaxPartRow, JaxStageRow
from castpoint.harness.systems import decoder
from castpoint.harness.systems import jax_port as port
from castpoint.harness.systems.tally import Tally
from castpoint.harness.systems.weights import LAYER, Config, Lazy, Weights, drawn_layer, of_model, opened, tokenizer_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
OP_BY_OP, JIT, NO_EXCESS = "op by op", "jit", "jit, no excess precision"
GIVEN_ANGLES = "op by op, PyTorch's angles"
ALONE, WHOLE = "alone", "end to end"
EXACT = "matmul, exact sums"
Kept = dict[tuple[str, int], Tensor]


def reference(weights: Weights, dtype: torch.dtype, ids: list[int]) -> Kept:
    """Every stage of PyTorch's pass, on its CPU kernels."""
    kept: Kept = {}
    config, w = weights.config, Lazy(weights, dtype)
    logits = decoder.forward(config, w, ids, lambda stage, layer, value: kept.__setitem__((stage, layer), value))
    for layer in range(config.num_layers):
        kept["angles", layer] = torch.stack(decoder.angles(config, layer, torch.arange(len(ids)), torch.float32))
    return kept | {("logits", config.num_layers): logits}


def fp64(dtype: torch.dtype) -> Any:
    """Within it JAX has float64, where that is the dtype."""
    return jax.enable_x64(dtype == torch.float64)


@functools.cache
def runner(config: Config, kind: int, how: str, only: tuple[str, ...]) -> tuple[Callable[..., Any], list[port.Stage]]:
    """A layer in JAX, whole and by stages. kind: the first of its theta and window; those share what is compiled."""
    compiled = how.startswith("jit")

    def whole(x: Array, w: Any, given: Any) -> Any:
        state = port.run_layer(config, kind, x, w, given)
        shown = {"hidden", *only} if compiled else state.keys()  # what is shown is stored, and rounded for that
        return {name: value for name, value in state.items() if name in shown}

    jit = jax.jit if compiled else lambda function: function
    return jit(whole), [(name, jit(make)) for name, make in port.stages(config, kind)]


def tallies(
    weights: Weights, dtype: torch.dtype, how: str, passages: list[list[int]], only: tuple[str, ...] = ()
) -> dict[tuple[str, int, str], Tally]:
    """(reading, layer, stage) -> differences over these passages of token ids. only: those stages, end to end."""
    config, found, w = weights.config, {}, Lazy(weights, dtype)
    kinds = list(zip(config.thetas, config.windows, strict=True))

    def tally(reading: str, layer: int, stage: str, actual: Array, kept: Kept) -> None:
        if only and (reading == ALONE or stage not in only):
            return
        expected = kept[stage, layer]
        found.setdefault((reading, layer, stage), Tally()).add(port.tensor(actual), expected)

    for ids in passages:
        kept = reference(weights, dtype, ids)
        x = port.first(config, w, ids)
        tally(ALONE, -1, "embedding", x, kept)
        tally(WHOLE, -1, "embedding", x, kept)
        for number in range(config.num_layers):
            lw, kind = port.layer_weights(w, number), kinds.index(kinds[number])
            whole, alone = runner(config, kind, how, only)
            theirs = {stage: port.array(value) for (stage, layer), value in kept.items() if layer == number}
            theirs["x"] = port.array(kept["hidden", number - 1] if number else kept["embedding", -1])
            for stage, make in () if only else alone:
                tally(ALONE, number, stage, make(theirs, lw), kept)
            given = {"angles": theirs["angles"]} if how == GIVEN_ANGLES else {}
            state = whole(x, lw, given)
            x = state["hidden"]
            for stage in state.keys() - {"x"} - given.keys():
                tally(WHOLE, number, stage, state[stage], kept)
        last, table = port.array(w["model.norm.weight"]), port.array(port.head(config, w))
        for reading, hidden in ((ALONE, port.array(kept["hidden", number])), (WHOLE, x)):
            normed = port.norm(config, hidden, last)
            tally(reading, number + 1, "normed", normed, kept)
            normed = port.array(kept["normed", number + 1]) if reading == ALONE else normed
            tally(reading, number + 1, "logits", port.linear(normed, table), kept)
    return found


def read(source: str, count: int, tokens: int) -> tuple[Weights, list[list[int]]]:
    """A source's weights, and token ids of the first passages. Sources: LAYER, `qwen3-0.6b` (calibrated), a name of
    fetch.KNOWN, a folder, a .gguf file, a hub id. Raises UserError for a source without weights or a tokenizer."""
    texts = read_prompts(PASSAGES)[:count]
    if source == LAYER:
        return drawn_layer(), [list(range(tokens))]
    if source == CALIBRATED_MODEL:
        model = language_model.calibrated_model(language_model.calibrated_config())
        return of_model(model, source), [list(text.encode())[:tokens] for text in texts]
    weights, tokenizer = opened(had(source)), tokenizer_of(had(source))
    return weights, [tokenizer.encode(text)[:tokens] for text in texts]


def fresh(flags: str, function: Callable[..., Any], *arguments: object) -> Any:
    """What the function returns in a process of its own, whose XLA reads these flags: it reads them once."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _set_flags, (flags,)) as pool:
        return pool.submit(function, *arguments).result()


def _set_flags(flags: str) -> None:
    os.environ["XLA_FLAGS"] = flags


def stage_rows(source: str, dtype: str, how: str, count: int, tokens: int, shown: int = 0) -> list[JaxStageRow]:
    """Of one model, dtype and way to run JAX. shown: at most so many layers of the model, 0 for all."""
    weights, passages = read(source, count, tokens)
    weights = weights.shortened(shown or weights.config.num_layers)
    with fp64(DTYPES[dtype]):
        found = tallies(weights, DTYPES[dtype], how, passages)
    size = {"model": name_of(source), "dtype": dtype, "how": how, "tokens": sum(map(len, passages))}
    end = weights.config.num_layers
    return [
        JaxStageRow(**size, reading=reading, layer=layer, stage=stage, **tally.columns())
        for (reading, layer, stage), tally in found.items()
        if not (source == LAYER and layer == end)  # its head is no model's
    ]


def name_of(source: str) -> str:
    return source if source in (LAYER, CALIBRATED_MODEL, *KNOWN) else language_model.name_of(source)


def runs(source: str, short: bool) -> Iterator[tuple[str, str, str]]:
    """Model, dtype and how of every comparison."""
    models = [source] if source else ["gemma-3-270m", "qwen2.5-coder-0.5b-instruct"]
    for model in models if not short else models[:1]:
        for dtype in ("fp32", "bf16"):
            yield from ((model, dtype, how) for how in ((OP_BY_OP, JIT) if short else (OP_BY_OP, JIT, NO_EXCESS)))
        yield from ((model, "fp64", how) for how in ((GIVEN_ANGLES,) if short else (OP_BY_OP, GIVEN_ANGLES)))
    if not source and not short:
        yield from ((name, dtype, OP_BY_OP) for name in (CALIBRATED_MODEL, LAYER) for dtype in ("fp32", "bf16"))


def sweep(records: Records, source: str, short: bool) -> None:
    """Rows of every stage, of what makes it differ, and of the functions behind that."""
    from castpoint.harness.systems.jax_causes import cause_rows, part_rows

    count, tokens, shown = (1, 16, 4) if short else (2, 64, 0)
    read(source, 1, 2) if source else None  # a mistake is said before work starts
    for model, dtype, how in track(list(runs(source, short)), "JAX beside PyTorch"):
        about = {"model": name_of(model), "dtype": dtype}
        if not records.has(JaxStageRow, **about, how=how, reading=WHOLE, layer=-1, stage="embedding"):
            flags = "--xla_allow_excess_precision=false" if how == NO_EXCESS else ""
            arguments = (model, dtype, how, count, tokens, shown)
            records.add(*(fresh(flags, stage_rows, *arguments) if flags else stage_rows(*arguments)))
        asked = how == OP_BY_OP and dtype != "fp64"
        if asked and not records.has(JaxCauseRow, **about, stage="mlp", by_jax=EXACT):
            records.add(*cause_rows(model, dtype, tokens, shown))
    if not records.has(JaxPartRow, part="rsqrt: JAX, PyTorch", how=OP_BY_OP):
        records.add(*part_rows(short))
