"""Sums in fp32 in the orders that processors take, and operands whose partial sums differ most."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from castpoint.harness.conformance.tensor_model import HOPPER, Model, modelled

AMPERE = Model(24, products=8)
Operands = tuple[Tensor, Tensor]

# ---------------------------------------------------------------- orders, of terms [..., n] fp32


def chain(terms: Tensor) -> Tensor:
    """From the first to the last."""
    total = torch.zeros(terms.shape[:-1])
    for term in terms.unbind(-1):
        total = total + term
    return total


def backward(terms: Tensor) -> Tensor:
    return chain(terms.flip(-1))


def blocks(terms: Tensor, size: int) -> Tensor:
    """Each of so many terms by itself, then the blocks."""
    return chain(chain(F.pad(terms, (0, -terms.shape[-1] % size)).unflatten(-1, (-1, size))))


def shares(terms: Tensor, count: int) -> Tensor:
    """As a split K adds: so many long blocks."""
    return blocks(terms, -(-terms.shape[-1] // count))


def lanes(terms: Tensor, count: int) -> Tensor:
    """Every count-th term in a chain of its own, the chains by a tree."""
    return tree(chain(F.pad(terms, (0, -terms.shape[-1] % count)).unflatten(-1, (-1, count)).mT))


def tree(terms: Tensor) -> Tensor:
    """Neighbours by pairs."""
    while (n := terms.shape[-1]) > 1:
        even = F.pad(terms, (0, n % 2))
        terms = even[..., 0::2] + even[..., 1::2]
    return terms[..., 0]


BESIDE: dict[str, Callable[[Tensor], Tensor]] = {  # in several chains
    **{f"blocks of {size}": partial(blocks, size=size) for size in (16, 32, 64, 128)},
    **{f"{count} lanes": partial(lanes, count=count) for count in (8, 16, 32)},
    "tree": tree,
}
ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "forward": chain,
    "backward": backward,
    **BESIDE,
    **{f"{count} shares": partial(shares, count=count) for count in range(2, 9)},
}


def rounded_sums(hidden: Tensor, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """hidden @ weight^T of bf16 operands in fp32, rounded to nearest at each addition."""
    terms = hidden.float()[:, None] * weight.float()[None]
    for name, order in ORDERS.items():
        yield name, order(terms)


def truncated_sums(hidden: Tensor, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """hidden @ weight^T of bf16 operands as tensor cores are said to add."""
    padding = (0, -hidden.shape[1] % 48)
    a, b = F.pad(hidden, padding), F.pad(weight, padding)
    zeros = torch.zeros(len(a), len(b))
    for model in (HOPPER, AMPERE):
        yield f"{model}", modelled(a, b, zeros, model)
        yield f"{model}, backward", modelled(a.flip(-1), b.flip(-1), zeros, model)
        thirds = zip(a.chunk(3, dim=1), b.chunk(3, dim=1), strict=True)
        first, second, third = (modelled(*part, zeros, model) for part in thirds)
        yield f"{model}, 3 shares", first + second + third


# ---------------------------------------------------------------- operands


def gaussian(shape: tuple[int, int], rng: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=rng)


def uniform(shape: tuple[int, int], rng: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=rng)


def massive(hidden: Tensor, at: float, size: float = 14_016.0) -> Tensor:
    """One channel of that size, at that part of the row."""
    hidden = hidden.clone()
    hidden[:, round(at * (hidden.shape[1] - 1))] = size
    return hidden


def halves(hidden: Tensor) -> Tensor:
    """The second half of a row is the first, negated."""
    first = hidden[:, : hidden.shape[1] // 2]
    return torch.cat([first, -first, 0 * hidden[:, 2 * first.shape[1] :]], dim=1)


def neighbours(hidden: Tensor, weight: Tensor) -> Operands:
    """Two massive channels beside each other, whose terms cancel: only orders that part them see large sums."""
    hidden, weight = massive(hidden, 0.2), weight.clone()
    first = round(0.2 * (hidden.shape[1] - 1))
    hidden[:, first + 1], weight[:, first + 1] = -hidden[:, first], weight[:, first]
    return hidden, weight


def scaled(hidden: Tensor, ratio: float) -> Tensor:
    """Each channel times that ratio smaller, or larger, than the one before it, over 64 channels again and again."""
    return hidden * ratio ** (torch.arange(hidden.shape[1]) % 64)


OPERANDS: dict[str, Callable[[tuple[int, int], tuple[int, int], torch.Generator], Operands]] = {
    "gaussian": lambda a, b, rng: (gaussian(a, rng), gaussian(b, rng)),
    "torch.rand": lambda a, b, rng: (uniform(a, rng), uniform(b, rng)),
    "one sign": lambda a, b, rng: (gaussian(a, rng).abs(), -gaussian(b, rng).abs()),
    "sorted": lambda a, b, rng: (gaussian(a, rng).sort().values, uniform(b, rng)),
    "both sorted": lambda a, b, rng: (uniform(a, rng).sort().values, uniform(b, rng).sort().values),
    "massive first": lambda a, b, rng: (massive(gaussian(a, rng), 0.0), gaussian(b, rng)),
    "massive amid": lambda a, b, rng: (massive(gaussian(a, rng), 0.3), gaussian(b, rng)),
    "massive last": lambda a, b, rng: (massive(gaussian(a, rng), 1.0), gaussian(b, rng)),
    "massive, one sign": lambda a, b, rng: (massive(uniform(a, rng), 0.0), uniform(b, rng)),
    "massive pair": lambda a, b, rng: (massive(massive(gaussian(a, rng), 0.2), 0.6, -14_016.0), uniform(b, rng)),
    "massive neighbours": lambda a, b, rng: neighbours(gaussian(a, rng), gaussian(b, rng)),
    "halves cancel": lambda a, b, rng: (halves(uniform(a, rng)), halves(uniform(b, rng)).abs()),
    "falling": lambda a, b, rng: (scaled(uniform(a, rng), 0.7), uniform(b, rng)),
    "rising": lambda a, b, rng: (scaled(gaussian(a, rng), 1.2), gaussian(b, rng)),
    "constant": lambda a, b, rng: (torch.full(a, 1.1), torch.full(b, 0.7)),
    "two values": lambda a, b, rng: (uniform(a, rng).round() + 0.375, 0.3 * uniform(b, rng).round() + 0.4),
}


def operands(kind: str, channels: int) -> Operands:
    """bf16 hidden [4, channels] and W [12, channels]."""
    made = OPERANDS[kind]((4, channels), (12, channels), torch.Generator().manual_seed(channels))
    return made[0].bfloat16(), made[1].bfloat16()
