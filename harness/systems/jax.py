"""A decoder in JAX beside PyTorch's, stage by stage: the whole model end to end, and every stage alone on PyTorch's own
input; each JAX op by op, compiled (jit), and compiled without XLA's excess precision."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import torch
from jax import Array
from torch import Tensor
from transformers import AutoTokenizer

from castpoint.harness.model import language_model
from castpoint.harness.model.fetch import KNOWN, had
from castpoint.harness.model.study import PASSAGES, read_prompts
from castpoint.harness.problems.drawn import CALIBRATED_MODEL, layer_statistics, standard_normal, synthetic_problem
from castpoint.harness.problems.files import Stored
from castpoint.harness.problems.geometry import geometry_named
from castpoint.harness.runs.errors import mistakes
from castpoint.harness.runs.progress import track
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import JaxPartRow, JaxStageRow
from castpoint.harness.systems import decoder
from castpoint.harness.systems import jax_port as port
from castpoint.harness.systems.weights import Config, Weights, of_model, opened

DIGITS = {torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
OP_BY_OP, JIT, NO_EXCESS = "op by op", "jit", "jit, no excess precision"
GIVEN_ANGLES = "op by op, PyTorch's angles"
ALONE, WHOLE = "alone", "end to end"
LAYER = "qwen2.5-7b, one layer"
INNER = 18944  # Qwen2.5-7B's MLP, from its published configuration
Kept = dict[tuple[str, int], Tensor]


@dataclass
class Tally:
    """Differences of one stage of one layer, over passages."""

    digits: int
    elements: int = 0
    equal: int = 0
    figures: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("max_abs", "p999", "max_ulp", "largest"), 0.0)
    )
    squares: tuple[float, float] = (0.0, 0.0)

    def add(self, actual: Tensor, reference: Tensor) -> None:
        counted = (actual != 0) | (reference != 0)  # of a softmax most are 0 in both: keys that nothing sees
        a, r = actual[counted].double(), reference[counted].double()
        if not len(r):
            return
        off = (a - r).abs()
        ulp = torch.ldexp(torch.ones_like(r), torch.frexp(r).exponent - self.digits)
        self.elements, self.equal = self.elements + len(r), self.equal + int((off == 0).sum())
        tail = off.kthvalue(max(1, int(0.999 * len(off)))).values
        made = (off.max(), tail, (off / ulp)[r != 0].max() if bool((r != 0).any()) else 0.0, r.abs().max())
        self.figures = {n: max(old, float(new)) for (n, old), new in zip(self.figures.items(), made, strict=True)}
        self.squares = self.squares[0] + float(off @ off), self.squares[1] + float(r @ r)

    def columns(self) -> dict[str, Any]:
        unit = 2.0 ** (torch.frexp(torch.tensor(self.figures["largest"])).exponent.item() - self.digits)
        return self.figures | {
            "elements": self.elements,
            "share_equal": self.equal / self.elements,
            "ulps_of_largest": self.figures["max_abs"] / unit,
            "rel_rms": (self.squares[0] / self.squares[1]) ** 0.5 if self.squares[1] else 0.0,
        }


def reference(weights: Weights, dtype: torch.dtype, ids: list[int]) -> Kept:
    """Every stage of PyTorch's pass, on its CPU kernels."""
    kept: Kept = {}
    w = port.Lazy(weights, dtype)
    kept["logits", weights.config.num_layers] = decoder.forward(
        weights.config, w, ids, lambda stage, layer, value: kept.__setitem__((stage, layer), value)
    )
    for layer in range(weights.config.num_layers):
        places = torch.arange(len(ids))
        kept["angles", layer] = torch.stack(decoder.angles(weights.config, layer, places, torch.float32))
    return kept


def fp64(dtype: torch.dtype) -> Any:
    """Within it JAX has float64, where that is the dtype."""
    return jax.enable_x64(dtype == torch.float64)


class Runner:
    """A configuration's layers in JAX, op by op or compiled; layers of one theta and window share what is compiled."""

    def __init__(self, config: Config, compiled: bool, only: tuple[str, ...]) -> None:
        self.config, self.compiled, self.shown = config, compiled, {"hidden", *only}
        self.of_kind = functools.cache(self._of_kind)

    def _of_kind(self, kind: int) -> tuple[Callable[..., Any], list[port.Stage]]:
        def whole(x: Array, w: Any, given: Any) -> Any:
            state = port.run_layer(self.config, kind, x, w, given)
            shown = self.shown if self.compiled else state.keys()  # what is shown is stored, and rounded for that
            return {name: value for name, value in state.items() if name in shown}

        jit = jax.jit if self.compiled else lambda function: function
        return jit(whole), [(name, jit(make)) for name, make in port.stages(self.config, kind)]

    def layer(self, number: int) -> tuple[Callable[..., Any], list[port.Stage]]:
        kinds = list(zip(self.config.thetas, self.config.windows, strict=True))
        return self.of_kind(kinds.index(kinds[number]))


def tallies(
    weights: Weights, dtype: torch.dtype, how: str, passages: list[list[int]], only: tuple[str, ...] = ()
) -> dict[tuple[str, int, str], Tally]:
    """(reading, layer, stage) -> differences over these passages of token ids. only: those stages, end to end."""
    config, found = weights.config, {}
    runner, w = Runner(config, how.startswith("jit"), only), port.Lazy(weights, dtype)

    def tally(reading: str, layer: int, stage: str, actual: Array, kept: Kept) -> None:
        if only and (reading == ALONE or stage not in only):
            return
        expected = kept[stage, layer]
        found.setdefault((reading, layer, stage), Tally(DIGITS[expected.dtype])).add(port.tensor(actual), expected)

    for ids in passages:
        kept = reference(weights, dtype, ids)
        x = port.first(config, w, ids)
        tally(ALONE, -1, "embedding", x, kept)
        tally(WHOLE, -1, "embedding", x, kept)
        for number in range(config.num_layers):
            lw, (whole, alone) = port.layer_weights(w, number), runner.layer(number)
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
        theirs = {
            stage: port.array(kept[stage, layer]) for stage, layer in (("hidden", number), ("normed", number + 1))
        }
        tally(ALONE, number + 1, "normed", port.norm(config, theirs["hidden"], last), kept)
        tally(ALONE, number + 1, "logits", port.linear(theirs["normed"], table), kept)
        normed = port.norm(config, x, last)
        tally(WHOLE, number + 1, "normed", normed, kept)
        tally(WHOLE, number + 1, "logits", port.linear(normed, table), kept)
    return found


# ---------------------------------------------------------------- models


def drawn_layer() -> Weights:
    """One layer of Qwen2.5-7B's geometry with drawn weights; its table is the residual stream of 64 drawn tokens."""
    g, row, rng = geometry_named("qwen2.5-7b"), layer_statistics()[1], torch.Generator().manual_seed(0)
    problem = synthetic_problem("qwen2.5-7b", 1, 64)
    config = Config(
        *("qwen2", 64, g.hidden_size, INNER, 1, g.num_q_heads, g.num_kv_heads, g.head_dim, g.eps, g.head_dim**-0.5),
        *((1e6,), (None,), True, True, 32768),
    )
    made = {"model.embed_tokens.weight": problem.x, "model.norm.weight": problem.norm_weight}
    layer = "model.layers.0."
    made |= {f"{layer}{name}_layernorm.weight": problem.norm_weight for name in ("input", "post_attention")}
    rows = list(g.projections.values())
    for name, part in zip("qkv", problem.qkv_weight.split(rows), strict=True):
        made[f"{layer}self_attn.{name}_proj.weight"] = part
        made[f"{layer}self_attn.{name}_proj.bias"] = (standard_normal(rng, len(part)) * 0.5).bfloat16()
    for name, shape in config.shapes().items():
        if name not in made:
            std = row[f"{name.split('.')[-2]}_std"] * (1024 / g.hidden_size) ** 0.5
            made[name] = (standard_normal(rng, *shape) * std).bfloat16()
    return Weights(config, LAYER, {n: Stored(list(t.shape), partial(lambda kept: kept, t)) for n, t in made.items()})


def read(source: str, count: int, tokens: int) -> tuple[Weights, list[list[int]]]:
    """A source's weights, and token ids of the first passages. Sources: LAYER, `qwen3-0.6b` (calibrated), a name of
    fetch.KNOWN, a folder, a .gguf file, a hub id. Raises UserError for a source without weights or a tokenizer."""
    texts = read_prompts(PASSAGES)[:count]
    if source == LAYER:
        return drawn_layer(), [list(range(tokens))]
    if source == CALIBRATED_MODEL:
        model = language_model.calibrated_model(language_model.calibrated_config())
        return of_model(model, source), [list(text.encode())[:tokens] for text in texts]
    weights, path = opened(had(source)), Path(had(source)).expanduser()
    where, options = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    with mistakes(Exception, about=f"{source}: a tokenizer cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(str(where) if where.is_dir() else source, **options)
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
    if shown and shown < weights.config.num_layers:
        weights = port.shortened(weights, shown)
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
    """Rows of every stage, and of the parts that say why."""
    from castpoint.harness.systems.jax_parts import part_rows

    count, tokens, shown = (1, 16, 4) if short else (2, 64, 0)
    read(source, 1, 2) if source else None  # a mistake is said before work starts
    for model, dtype, how in track(list(runs(source, short)), "JAX beside PyTorch"):
        end = {"reading": WHOLE, "layer": -1, "stage": "embedding"}
        if records.has(JaxStageRow, model=name_of(model), dtype=dtype, how=how, **end):
            continue
        flags = "--xla_allow_excess_precision=false" if how == NO_EXCESS else ""
        arguments = (model, dtype, how, count, tokens, shown)
        records.add(*(fresh(flags, stage_rows, *arguments) if flags else stage_rows(*arguments)))
    if not records.has(JaxPartRow, part="rsqrt: JAX, PyTorch", how=OP_BY_OP):
        records.add(*part_rows(short))
