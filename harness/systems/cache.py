"""Keys and values of many sequences in pages: tables, a free list, counts of holders, prefixes that are reused."""

from __future__ import annotations

import hashlib
from array import array
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from castpoint.harness.systems.weights import Config


class Pages:
    """k and v [layers, pages * size, Hkv, Dh]: `pages` pages of `size` tokens, NaN where nothing was written.

    A full page has a key, the hash of its tokens chained with the key of the page before. A sequence that starts with
    pages of known keys shares them. A page without a holder is free and keeps its key until it is handed out again.
    """

    def __init__(self, config: Config, pages: int, size: int, like: Tensor) -> None:
        """like: of whose dtype and device k and v are."""
        shape = (config.num_layers, pages * size, config.num_kv_heads, config.head_dim)
        self.k, self.v = (like.new_full(shape, torch.nan) for _ in "kv")
        self.pages, self.size = pages, size
        self.free = deque(range(pages))  # the longest unused first
        self.holders = [0] * pages
        self.keys: dict[int, bytes] = {}  # page -> its key
        self.known: dict[bytes, int] = {}  # and back

    def needed(self, tokens: int) -> int:
        """Pages that so many tokens fill."""
        return -(-tokens // self.size)

    def admit(self, ids: Sequence[int]) -> tuple[list[int], int] | None:
        """A table for ids, and how many of them it holds already; None where too few pages are free. The last token
        is never held: somebody wants its logits."""
        shared: list[int] = []
        for key in chained(ids[:-1], self.size):
            if key not in self.known:
                break
            shared.append(self.known[key])
        fresh = self.needed(len(ids)) - len(shared)
        if fresh > len(self.free) - sum(not self.holders[page] for page in shared):
            return None
        for page in shared:
            if not self.holders[page]:
                self.free.remove(page)
            self.holders[page] += 1
        table = shared + [self._take() for _ in range(fresh)]
        self.seal(table, ids)
        return table, len(shared) * self.size

    def grow(self, table: list[int], tokens: int) -> bool:
        """Whether the table holds so many tokens, with one page more where it must; False if none is free."""
        if tokens <= len(table) * self.size:
            return True
        if not self.free:
            return False
        table.append(self._take())
        return True

    def seal(self, table: list[int], ids: Sequence[int]) -> None:
        """Makes full pages of ids known. All of ids must be written before anybody reads them."""
        for page, key in zip(table, chained(ids, self.size), strict=False):
            if page not in self.keys and key not in self.known:
                self.keys[page], self.known[key] = key, page

    def release(self, table: list[int]) -> None:
        """Gives the pages of a table back, its last page to be handed out first."""
        for page in reversed(table):
            self.holders[page] -= 1
            if not self.holders[page]:
                self.free.append(page)
        table.clear()

    def slots(self, table: list[int], first: int, end: int) -> Tensor:
        """Where in k and v the tokens at positions first to end lie, [end - first]."""
        at = torch.arange(first, end)
        return (torch.tensor(table)[at // self.size] * self.size + at % self.size).to(self.k.device)

    def _take(self) -> int:
        page = self.free.popleft()
        if key := self.keys.pop(page, None):
            del self.known[key]
        self.holders[page] = 1
        return page


def chained(ids: Sequence[int], size: int) -> list[bytes]:
    """The key of every full page of ids: equal for equal tokens behind equal pages."""
    keys, before = [], b""
    for end in range(size, len(ids) + 1, size):
        before = hashlib.sha256(before + array("q", ids[end - size : end]).tobytes()).digest()
        keys.append(before)
    return keys
