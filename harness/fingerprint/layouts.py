"""How what a callable is given lies in memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

CONTIGUOUS = "contiguous"
ROWS = "rows of a packed buffer"  # as k in what a qkv projection returns
ODD = "rows of an odd stride"
OFFSET = "an offset of one element"
WEIGHTS_OFFSET = "the weight alone at an offset of one element"
HEADS_FIRST = "heads before tokens in memory"
GAPS = "channels apart"  # the last stride is not one
X_ALONE = "x alone as rows of a packed buffer"
ROOM = "room behind it"  # of a contiguous residual then, where a kernel that takes x's strides for its own ends
TURNED = "the projection's weight as the transpose of what lies in memory"
UPDATED = "a weight that is written to between two calls"  # as when a trainer's weights come in place


def of_each(layout: str) -> tuple[str, str, str]:
    """The layouts of x, of the weights and of what else is given."""
    if layout == X_ALONE:
        return ROWS, CONTIGUOUS, ROOM
    if layout == WEIGHTS_OFFSET:
        return CONTIGUOUS, OFFSET, CONTIGUOUS
    return layout, layout if layout == OFFSET else CONTIGUOUS, layout


def laid_out(value: Tensor, layout: str) -> Tensor:
    """value, contiguous, as a view of a larger buffer whose other elements are numbers like its own."""
    if layout in (CONTIGUOUS, UPDATED, TURNED):
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
