"""How what a callable is given lies in memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

CONTIGUOUS = "contiguous"
ROWS = "rows of a packed buffer"  # as k in what a qkv projection returns
ODD = "rows of an odd stride"
OFFSET = "a view at an offset of one element"
HEADS_FIRST = "heads before tokens in memory"
GAPS = "channels apart"  # the last stride is not one
ROOM = "room behind it"  # of what is contiguous where another tensor is not, and a kernel may take that one's strides
TURNED = "the projection's weight as the transpose of what lies in memory"
SLICED = "the projection's weight as columns of a wider one"
ALONE_AS = " alone as "
UPDATED = "a weight that is written to between two calls"  # as when a trainer's weights come in place


def alone(who: str, layout: str) -> str:
    """That layout of x, of the weight, or of what else is given."""
    return f"{who}{ALONE_AS}{layout}"


def each_alone(other: str) -> list[str]:
    """Layouts of x and of another input of its shape, one of them contiguous."""
    return [alone(who, layout) for who in ("x", other) for layout in (ROWS, OFFSET)]


WEIGHTS_OFFSET = alone("the weight", OFFSET)


def of_each(layout: str) -> tuple[str, str, str]:
    """The layouts of x, of the weights and of what else is given."""
    who, _, its_own = layout.rpartition(ALONE_AS)
    if not who:
        return layout, layout if layout == OFFSET else CONTIGUOUS, layout
    if who == "the weight":
        return CONTIGUOUS, its_own, CONTIGUOUS
    return (its_own, CONTIGUOUS, ROOM) if who == "x" else (ROOM, CONTIGUOUS, its_own)


def of_projection(layout: str) -> str:
    """The layout of a projection's weight."""
    return {TURNED: HEADS_FIRST, SLICED: ROWS}.get(layout, of_each(layout)[1])


def laid_out(value: Tensor, layout: str) -> Tensor:
    """value, contiguous, as a view of a larger buffer whose other elements are numbers like its own."""
    if layout in (CONTIGUOUS, UPDATED, TURNED, SLICED):
        return value
    if layout == ROWS:
        buffer = torch.cat([value.roll(1, 0), value, value.roll(1, 0)], dim=1)
        return buffer.narrow(1, value.shape[1], value.shape[1])
    if layout == ODD:
        return torch.cat([value, value[..., : 1 + value.shape[-1] % 2]], dim=-1)[..., : value.shape[-1]]
    if layout == ROOM:
        return torch.cat([value.flatten()] * 4)[: value.numel()].view(value.shape)
    if layout == OFFSET:
        return torch.cat([value.flatten()[-1:], value.flatten()])[1:].view(value.shape)
    if layout == HEADS_FIRST:
        return value.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == GAPS:
        return torch.stack([value, value.roll(1, 0)], dim=-1)[..., 0]
    raise ValueError(layout)


def inside(owner: Tensor, views: Iterable[Tensor]) -> Tensor:
    """Which elements of owner are those of its views, in a buffer of its shape."""
    found = torch.zeros_like(owner, dtype=torch.bool)
    for view in views:
        if view.untyped_storage().data_ptr() == owner.untyped_storage().data_ptr():
            found.as_strided(view.size(), view.stride(), view.storage_offset()).fill_(True)
    return found
