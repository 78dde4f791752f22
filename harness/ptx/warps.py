"""Instructions that whole warps execute together: exchanges, reductions, matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from castpoint.harness.ptx import matrix
from castpoint.harness.ptx.arithmetic import INTEGER
from castpoint.harness.ptx.numbers import Array, Unsupported, read
from castpoint.harness.ptx.program import Instruction, Operand, listed
from castpoint.harness.ptx.threads import Threads


class Warps(Threads):
    """A method an instruction, called with the threads that execute it."""

    def _groups(self, mask: Array, size: int) -> Any:
        """Which groups of that many threads take part, ... for all. Raises Unsupported where one does in part."""
        if mask is self.everyone:
            return ...
        groups = mask.reshape(-1, size)
        if (groups.any(1) != groups.all(1)).any():
            raise Unsupported("a part of a warp at an instruction of whole warps")
        return groups[:, 0]

    def _whole(self, i: Instruction, mask: Array) -> Any:
        """Warps that take part in an instruction whose last operand says which threads do: all, or it is refused."""
        lanes = i.operands[-1]
        if lanes not in (-1, 0xFFFFFFFF) and (self.each(self.get(lanes, "u32"))[mask] != np.uint32(0xFFFFFFFF)).any():
            raise Unsupported("an instruction of parts of a warp")
        return self._groups(mask, 32)

    def _rows(self, names: Sequence[Operand], groups: Any, size: int = 32) -> list[Array]:
        """Registers as [groups, threads], those that take part."""
        return [self.each(self.get(name, "b32")).reshape(-1, size)[groups] for name in names]

    def _values(self, names: Sequence[Operand], groups: Any, size: int = 32) -> Array:
        """Registers as [names, groups, threads] of float32, groups that take part."""
        return self.stacked(names).reshape(len(names), -1, size)[:, groups]

    def _put_rows(self, names: Sequence[str], words: Sequence[Array], mask: Array) -> None:
        found = [word.reshape(-1) for word in words]
        if mask is not self.everyone:
            there, found = found, np.zeros((len(found), self.threads), np.uint32)
            found[:, mask] = there
        self.put_each(names, found, mask)

    def _shfl(self, i: Instruction, mask: Array) -> None:
        groups = self._whole(i, mask)
        if i.operands[3] != (0 if i.words[2] == "up" else 31):
            raise Unsupported("shfl within parts of a warp")
        name, _, inside = i.operands[0].partition("|")
        values, by = self._rows(i.operands[1:2], groups)[0], i.operands[2]
        lanes = self.get(by, "b32") if isinstance(by, int) else self._rows([by], groups)[0]
        found, there = matrix.shuffle(values, lanes, i.words[2])
        self._put_rows([name], [found], mask)
        if inside:
            reached = np.zeros(self.threads, bool)
            reached[mask] = np.broadcast_to(there, found.shape).reshape(-1)
            self.put(inside, reached, mask)

    def _redux(self, i: Instruction, mask: Array) -> None:
        """Sum, least or greatest of a warp's 32-bit integers, or a logical function of them."""
        groups, kind = self._whole(i, mask), i.words[-1]
        (values,) = self._rows(i.operands[1:2], groups)
        found = INTEGER[i.words[2]].reduce(read(values, kind), axis=1, keepdims=True, dtype=read(values, kind).dtype)
        self._put_rows([i.operands[0]], [np.broadcast_to(found, values.shape).astype(np.uint32)], mask)

    def _places(self, address: Operand, warps: Any) -> list[Array]:
        """[W, 32] of each thread of these warps: where its shared memory begins, and an address in it."""
        return [each.reshape(-1, 32)[warps] for each in (self.shared_start, self.addresses(address))]

    def _ldmatrix(self, i: Instruction, mask: Array) -> None:
        names, places = listed(i.operands[0]), self._places(i.operands[1], self._groups(mask, 32))
        self._put_rows(names, matrix.load(self.shared, *places, len(names), "trans" in i.words), mask)

    def _stmatrix(self, i: Instruction, mask: Array) -> None:
        groups = self._groups(mask, 32)
        places, words = self._places(i.operands[0], groups), self._rows(listed(i.operands[1]), groups)
        matrix.store(self.shared, *places, words, "trans" in i.words)

    def _mma(self, i: Instruction, mask: Array) -> None:
        groups = self._groups(mask, 32)
        a, b, c = (self._values(names, groups) for names in i.operands[1:])
        self._put_rows(i.operands[0], matrix.mma(i.words[-2], a, b, c), mask)

    def _multiply(self, products: Sequence[Instruction]) -> None:
        """mma of one opcode by all warps, none of which reads what another writes: one of so many times the warps."""
        lists = zip(*(i.operands for i in products), strict=True)  # of each operand, that of every instruction
        targets, *sources = ([name for part in zip(*each, strict=True) for name in part] for each in lists)
        a, b, c = (self._values(names, ...).reshape(len(names) // len(products), -1, 32) for names in sources)
        self.put_each(targets, matrix.mma(products[0].words[-2], a, b, c).reshape(len(targets), -1), self.everyone)

    def _wgmma(self, i: Instruction, mask: Array) -> None:
        """mma_async: its operands are accumulators, A, B, whether the accumulators count, signs, transpositions."""
        groups = self._groups(mask, 128)
        accumulators, left, right, keep, *signs = i.operands
        if signs[:2] != [1, 1]:
            raise Unsupported("wgmma with signs")
        if any(signs[2:]):
            raise Unsupported("wgmma of a transposed matrix")
        counts = self.each(self.predicate(keep))[mask]
        if (counts != counts[0]).any():
            raise Unsupported("a product to which not all threads add")
        columns = int(i.words[4].removeprefix("m64n").removesuffix("k16"))
        starts = self.shared_start.reshape(-1, 128)[groups, 0]

        def described(register: Operand, rows: int) -> Array:
            descriptors = self.each(self.get(register, "b64")).reshape(-1, 128)[groups, 0]
            return matrix.described(self.shared, starts, descriptors, rows)

        if isinstance(left, tuple):
            a = matrix.left_of(matrix.pairs(self._values(left, groups, 128))).reshape(-1, 64, 16)
        else:
            a = described(left, 64)
        b = described(right, columns)
        c = self._values(accumulators, groups, 128) if counts[0] else None
        self._put_rows(accumulators, matrix.wgmma(a, b, c, columns), mask)
