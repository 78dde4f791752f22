"""A decoder split over ranks: columns of q, k, v, gate and up, rows of o and down, rows of the vocabulary.

Heads, channels of the MLP and rows of the vocabulary are halved from the top, so that every rank of 2, 4 or 8 holds a
whole subtree of the one tree that adds the tiles of a sum (after arXiv 2511.17826). The first half takes the odd one:
14 query heads in 2 groups are 4, 3, 4 and 3 on four ranks. A rank that has no key head of its own holds a copy of the
one its query heads read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from castpoint.harness.runs.errors import UserError
from castpoint.harness.systems.decoder import angles, attention, embed, hidden_from, norm, rotate
from castpoint.harness.systems.weights import Config, Weights

REDUCES = ("bf16", "fp32", "tree")
TILES = 8  # of the MLP's channels and of the vocabulary, at every rank count


class Ranks(Protocol):
    """What joins the ranks. add: the sum of every rank's tensor, in its dtype; swap: what that rank gave for this
    one's; gather: every rank's tensor, the ranks in their order."""

    rank: int
    ranks: int

    def add(self, x: Tensor) -> Tensor: ...
    def swap(self, x: Tensor, other: int) -> Tensor: ...
    def gather(self, x: Tensor) -> list[Tensor]: ...


def span(total: int, rank: int, ranks: int) -> range:
    """That rank's part of so many, halved from the top."""
    first, last = 0, total
    while ranks > 1:
        middle, ranks = first + (last - first + 1) // 2, ranks // 2
        first, last = (first, middle) if rank // ranks % 2 == 0 else (middle, last)
    return range(first, last)


def tree(parts: list[Tensor]) -> Tensor:
    """Their sum by one fixed binary tree, halved as span halves."""
    middle = (len(parts) + 1) // 2
    return parts[0] if len(parts) == 1 else tree(parts[:middle]) + tree(parts[middle:])


def check_divides(config: Config, ranks: int) -> None:
    """Raises UserError where a rank would hold no whole part: what does not divide, and which counts do."""

    def fault(count: int) -> str:
        kv, group = config.num_kv_heads, config.num_q_heads // config.num_kv_heads
        if count not in (1, 2, 4, 8):
            return "the tree of its all-reduce halves: take 1, 2, 4 or 8"
        if kv % count and count % kv:
            return f"{kv} key heads neither divide over it nor it over them"
        if count > kv * group:
            return f"{kv * group} query heads leave a rank without one"
        for what, total in (("channels of the MLP", config.intermediate_size), ("tokens", config.vocab_size)):
            if total % TILES:
                return f"{total} {what} do not divide into {TILES} tiles"
        return ""

    if said := fault(ranks):
        right = [str(count) for count in (1, 2, 4, 8) if not fault(count)]
        raise UserError(f"{ranks} ranks do not divide this model: {said}; {', '.join(right) or 'none'} would be right")


@dataclass(frozen=True)
class Part:
    """What a rank holds: ranges of query heads, key heads, MLP channels and tokens."""

    q: range
    kv: range
    inner: range
    vocabulary: range


def part_of(config: Config, rank: int, ranks: int) -> Part:
    """Raises UserError as check_divides does."""
    check_divides(config, ranks)
    q, group = span(config.num_q_heads, rank, ranks), config.num_q_heads // config.num_kv_heads
    inner, tokens = (span(TILES, rank, ranks), span(TILES, rank, ranks))
    wide, tall = config.intermediate_size // TILES, config.vocab_size // TILES
    return Part(
        q=q,
        kv=range(q.start // group, (q.stop - 1) // group + 1),
        inner=range(inner.start * wide, inner.stop * wide),
        vocabulary=range(tokens.start * tall, tokens.stop * tall),
    )


@dataclass
class Shard:
    """A rank's tensors: columns and vectors in dtype, the tiles of o [D, Dh] and down [D, I / TILES] in float32."""

    config: Config
    part: Part
    dtype: torch.dtype
    plain: dict[str, Tensor] = field(default_factory=dict)
    tiles: dict[str, list[Tensor]] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)  # o and down as one matrix, as reduced() takes them
    read: int = 0  # elements

    def prepare(self, reduce: str) -> None:
        """Lays the row-parallel weights out for that all-reduce."""
        wide = torch.float32 if reduce == "fp32" else self.dtype
        self.whole = {} if reduce == "tree" else {n: torch.cat(t, 1).to(wide) for n, t in self.tiles.items()}


def load(
    weights: Weights, rank: int, ranks: int, dtype: torch.dtype, device: str = "cpu",
    beat: Callable[[str], None] = lambda where: None,
) -> Shard:  # fmt: skip
    """That rank's shard; of each tensor its own rows and columns are read."""
    config, part = weights.config, part_of(weights.config, rank, ranks)
    shard, size = Shard(config, part, dtype), config.head_dim

    def got(name: str, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        tensor = weights.part(name, rows, columns)
        shard.read += tensor.numel()
        return tensor.to(device, dtype)

    def heads(of: range) -> slice:
        return slice(of.start * size, of.stop * size)

    inner, tokens = (slice(of.start, of.stop) for of in (part.inner, part.vocabulary))
    shard.plain["embedding"] = got("model.embed_tokens.weight", tokens)
    shard.plain["head"] = shard.plain["embedding"] if config.tied else got("lm_head.weight", tokens)
    shard.plain["norm"] = got("model.norm.weight")
    names = [name.split(".", 3)[3] for name in config.shapes() if name.startswith("model.layers.0.")]
    for number in range(config.num_layers):
        at, mine = f"model.layers.{number}.", f"{number}."
        beat(f"reading layer {number}")
        for kind in ("weight", "bias") if config.bias else ("weight",):
            rows = {"q": heads(part.q), "k": heads(part.kv), "v": heads(part.kv)}
            qkv = [got(f"{at}self_attn.{name}_proj.{kind}", rows[name]) for name in "qkv"]
            shard.plain[f"{mine}qkv.{kind}"] = torch.cat(qkv)
        gate_up = [got(f"{at}mlp.{name}_proj.weight", inner) for name in ("gate", "up")]
        shard.plain[f"{mine}gate_up"] = torch.cat(gate_up)
        for name, held in (("self_attn.o_proj", heads(part.q)), ("mlp.down_proj", inner)):
            tile = size if "o_proj" in name else config.intermediate_size // TILES
            wide = got(f"{at}{name}.weight", slice(None), held).float()
            shard.tiles[mine + name] = [tile.clone() for tile in wide.split(tile, 1)]
        for name in names:
            if "norm" in name:
                shard.plain[mine + name] = got(at + name)
    return shard


@dataclass
class Run:
    """A rank's pass: its cache of rotated K and of V [S, Hkv, Dh] a layer, and who is told of each value."""

    shard: Shard
    ranks: Ranks
    reduce: str
    keep: Callable[[str, int, Tensor], None] = lambda stage, layer, value: None
    beat: Callable[[str], None] = lambda where: None
    cache: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @torch.no_grad()
    def forward(self, ids: list[int]) -> Tensor:
        """Logits [S, V] of these tokens behind those in the cache, on every rank."""
        s, config = self.shard, self.shard.config
        device = s.plain["norm"].device
        seen = len(self.cache[0][0]) if self.cache else 0
        positions = torch.arange(seen, seen + len(ids), device=device)
        x = self._embedded(torch.tensor(ids, device=device))
        for number in range(config.num_layers):
            self.beat(f"layer {number}")
            x = self._layer(number, x, positions)
        x = norm(config, x, s.plain["norm"])
        rows = s.plain["head"]
        tiles = rows.split(config.vocab_size // TILES) if self.reduce == "tree" else [rows]
        return torch.cat(self.ranks.gather(torch.cat([F.linear(x, tile) for tile in tiles], -1)), -1)

    def _embedded(self, ids: Tensor) -> Tensor:
        """One rank holds the row, the others add zeros: exact in any order."""
        s = self.shard
        held = (ids >= s.part.vocabulary.start) & (ids < s.part.vocabulary.stop)
        rows = s.plain["embedding"][(ids - s.part.vocabulary.start).where(held, 0)] * held[:, None]
        return embed(s.config, self.ranks.add(rows), torch.arange(len(ids), device=ids.device))

    def _layer(self, number: int, x: Tensor, positions: Tensor) -> Tensor:
        config, plain = self.shard.config, self.shard.plain
        normed = norm(config, x, plain[f"{number}.input_layernorm.weight"])
        output = self._reduced(f"{number}.self_attn.o_proj", self._attended(number, normed, positions))
        if config.gemma:
            output = norm(config, output, plain[f"{number}.post_attention_layernorm.weight"])
        x = x + output
        before = "pre_feedforward_layernorm" if config.gemma else "post_attention_layernorm"
        inner = self._opened(number, norm(config, x, plain[f"{number}.{before}.weight"]))
        mixed = self._reduced(f"{number}.mlp.down_proj", inner)
        if config.gemma:
            mixed = norm(config, mixed, plain[f"{number}.post_feedforward_layernorm.weight"])
        x = x + mixed
        self.keep("hidden", number, x)
        return x

    def _attended(self, number: int, normed: Tensor, positions: Tensor) -> list[Tensor]:
        """[S, Dh] of each query head, or of all of this rank's as one [S, Hq * Dh]."""
        s, config = self.shard, self.shard.config
        weight, bias = s.plain[f"{number}.qkv.weight"], s.plain.get(f"{number}.qkv.bias")
        heads = projected(config, normed, weight, bias, tiled=self.reduce == "tree")
        q, k, v = heads.split([len(s.part.q), len(s.part.kv), len(s.part.kv)], 1)
        self.keep("k", number, k)
        if config.head_norm:
            q, k = (norm(config, t, s.plain[f"{number}.self_attn.{n}_norm.weight"]) for t, n in ((q, "q"), (k, "k")))
        turned = [t.to(normed.device) for t in angles(config, number, positions, normed.dtype)]
        q, k = (rotate(t, *turned) for t in (q, k))
        if len(self.cache) > number:
            k, v = (torch.cat([old, new]) for old, new in zip(self.cache[number], (k, v), strict=True))
            self.cache[number] = (k, v)
        else:
            self.cache.append((k, v))
        hidden = hidden_from(config, number, positions, torch.arange(len(k), device=positions.device))
        group = config.num_q_heads // config.num_kv_heads
        reads = [head // group - s.part.kv.start for head in s.part.q]  # the key head of each query head
        if self.reduce == "tree":
            each = ((q[:, i : i + 1], k[:, j : j + 1], v[:, j : j + 1]) for i, j in enumerate(reads))
            return [
                attention(config, *(t.contiguous() for t in one), hidden, lambda stage, value: value) for one in each
            ]
        return [attention(config, q, k[:, reads], v[:, reads], hidden, lambda stage, value: value)]

    def _opened(self, number: int, x: Tensor) -> list[Tensor]:
        """[S, I / TILES] of each tile, or all of this rank's channels as one."""
        config, gate_up = self.shard.config, self.shard.plain[f"{number}.gate_up"]
        half, wide = len(gate_up) // 2, config.intermediate_size // TILES
        if self.reduce == "tree":
            made = [F.linear(x, tile) for tile in gate_up.split(wide)]
            gates, ups = made[: len(made) // 2], made[len(made) // 2 :]
        else:
            gate, up = F.linear(x, gate_up).split(half, -1)
            gates, ups = [gate], [up]
        opened = [F.gelu(gate, approximate="tanh") if config.gemma else F.silu(gate) for gate in gates]
        return [gate * up for gate, up in zip(opened, ups, strict=True)]

    def _reduced(self, name: str, parts: list[Tensor]) -> Tensor:
        """A row-parallel projection of all ranks, [S, D] in the model's dtype. bf16: each rank's sum is rounded to bf16
        and added there; fp32: it stays in float32; tree: so do those of the tiles, added by one tree."""
        s = self.shard
        if self.reduce == "tree":
            sums = [F.linear(x.float(), tile) for x, tile in zip(parts, s.tiles[name], strict=True)]
            total, step = tree(sums), 1
            while step < self.ranks.ranks:
                total = total + self.ranks.swap(total, self.ranks.rank ^ step)
                step *= 2
            return total.to(s.dtype)
        weight = s.whole[name]
        mine = F.linear(parts[0].to(weight.dtype), weight)
        if self.ranks.ranks > 1:
            mine = self.ranks.add(mine.to(getattr(torch, {"bf16": "bfloat16", "fp32": "float32"}[self.reduce])))
        return mine.to(s.dtype)


def projected(config: Config, normed: Tensor, weight: Tensor, bias: Tensor | None, tiled: bool) -> Tensor:
    """[S, H, Dh] of these rows of Q, K and V: one matmul, or one a head, whose shape no rank count moves."""
    size = config.head_dim
    if not tiled:
        return F.linear(normed, weight, bias).unflatten(-1, (-1, size))
    biases = bias.split(size) if bias is not None else [None] * (len(weight) // size)
    return torch.stack([F.linear(normed, w, b) for w, b in zip(weight.split(size), biases, strict=True)], 1)
