"""PTX run on a CPU: every thread of some programs in step, a register one numpy array with an element a thread.

What the PTX ISA defines is done to the bit, or refused: ptx.isa lists what is known. What it leaves open is chosen:
approximate instructions are rounded correctly, tensor cores add as ptx.matrix says, a NaN that is converted is the
canonical one, one whose sign changes keeps its other bits, and a product and a sum without `.rn`, which ptxas may fuse,
stay two. A kernel that reads a register which it never wrote runs three times, with other bits there, and is refused if
what it wrote to memory differs. Copies and products that run on their own finish where they start, and programs run in
step, so that no race is found here, and programs that wait for one another would wait for ever. Threads that part at a
branch run apart, those behind first, and join where they meet.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from castpoint.harness.ptx.accesses import Accesses
from castpoint.harness.ptx.arithmetic import operation
from castpoint.harness.ptx.blocks import Block, blocks
from castpoint.harness.ptx.memory import Global
from castpoint.harness.ptx.numbers import UNSIGNED, Array, Unsupported, bits_of, read, width
from castpoint.harness.ptx.products import summed
from castpoint.harness.ptx.program import Instruction, Operand, Program, declared
from castpoint.harness.ptx.runs import Loads, Matrices, Products, Run, runs
from castpoint.harness.ptx.warps import Warps

THREADS = 1 << 15  # in step: with more, registers leave the cache
TOGETHER = 1 << 13  # elements that a run of loads fetches at once, and twice the threads of a run of products
BARRIERS = ("bar", "barrier")
NOTHING = ("fence", "membar", "griddepcontrol", "prefetch", "applypriority")  # to do, since all is done in order
UNKNOWN = ((1 << 64) - 1, 0, None)  # bits of a register that was never written: NaN, 0, drawn ones
WAITS = ("commit_group", "wait_group", "wait_all", "fence")
Argument = Tensor | int | float | None


def launch(
    program: Program, grid: tuple[int, int, int], threads: int, shared: int, arguments: Sequence[Argument]
) -> None:
    """Runs a kernel on its arguments, CPU tensors and numbers in the order of its parameters; None is a null pointer.

    threads and bytes of shared memory: of a program. Parameters behind the arguments, Triton's scratch memory, are 0.
    Raises IndexError for an access outside of the tensors' storages or not aligned, Unsupported for what is not in
    isa.TABLE, and where what the tensors hold in the end depends on a register that was never written.
    """
    memory = Global([a for a in arguments if isinstance(a, Tensor)])
    given = itertools.zip_longest(program.parameters, arguments)
    values = {name: parameter(argument, kind) for (name, kind), argument in given}
    places = np.array(list(itertools.product(*map(range, reversed(grid))))).reshape(-1, 3)[:, ::-1]  # x counts fastest
    step = max(1, THREADS // threads)
    before, found, guessed = memory.contents(), [], set()
    for unknown in UNKNOWN:
        memory.fill(before)
        for first in range(0, len(places), step):
            run = _Run(program, places[first : first + step], grid, threads, shared, memory, values, unknown)
            run.run()
            guessed |= run.guessed
        if not guessed:
            return
        found.append(memory.contents())
        if not all(map(np.array_equal, found[0], found[-1])):
            raise Unsupported(f"{program.name} depends on {', '.join(sorted(guessed))}, read before it is written")


def parameter(argument: Argument, kind: str) -> Array:
    """An argument's bits."""
    if kind == "f32":
        return np.array(argument, np.float32).view(np.uint32)
    value = argument.data_ptr() if isinstance(argument, Tensor) else int(argument or 0)
    return np.array(value & (1 << width(kind)) - 1, UNSIGNED[width(kind)])


class _Run(Warps, Accesses):
    """Programs of a launch, from the first instruction to the last thread's end."""

    # ------------------------------------------------------------ control

    def run(self) -> None:
        joints = set(self.program.labels.values())
        joints |= {n + 1 for n, i in enumerate(self.program.instructions) if i.words[0] == "bra"}
        together = {place: run for place, run in runs(self.program).items() if self._pays(run)}
        computing = blocks(self.program)
        place: int | None = 0
        with np.errstate(all="ignore"):
            while place is not None:
                if self.waiting and place in joints:
                    self._wait(place, self.active)
                    place = self._next()
                    if place is None:
                        return
                if place in together and self.active is self.everyone:
                    with contextlib.suppress(IndexError):  # one by one it says which
                        place = self._together(together[place])
                        continue
                if place in computing and self._computed(computing[place]):
                    place = computing[place].end
                    continue
                instruction = self.program.instructions[place]
                try:
                    place = self._step(instruction, place)
                except (IndexError, Unsupported) as error:
                    text = " ".join(instruction.text.split())
                    text = text if len(text) < 120 else f"{text[:60]} ... {text[-50:]}"
                    raise type(error)(f"{error}, in {self.program.name}: {text}") from error

    def _step(self, instruction: Instruction, place: int) -> int | None:
        """The place that follows; None behind the end of the last thread."""
        self.executing = self.active
        mask, kind = self._guarded(instruction), instruction.words[0]
        self.executing = mask
        if instruction.refusal and mask.any():
            raise Unsupported(instruction.refusal)
        if kind == "bra":
            return self._branch(mask, self.program.labels[instruction.operands[0]], place + 1)
        if kind in ("ret", "exit"):
            self.active = self.active & ~mask
            return place + 1 if self.active.any() else self._next()
        if kind in BARRIERS:
            self._check_together(mask)
        elif (mask is self.everyone or mask.any()) and kind not in NOTHING:
            self._execute(instruction, mask)
        return place + 1

    def _guarded(self, instruction: Instruction) -> Array:
        """Threads that execute it."""
        if instruction.guard is None:
            return self.active
        return self.active & (self.predicate(instruction.guard) ^ instruction.unless)

    def _branch(self, mask: Array, target: int, following: int) -> int | None:
        stay = self.active & ~mask
        if not stay.any():
            return target
        if not mask.any():
            return following
        self._wait(target, mask)
        self._wait(following, stay)
        return self._next()

    def _wait(self, place: int, threads: Array) -> None:
        self.waiting[place] = self.waiting.get(place, False) | threads

    def _next(self) -> int | None:
        """Goes on with the threads that are furthest behind."""
        if not self.waiting:
            return None
        place = min(self.waiting)
        self.active = self.waiting.pop(place)
        if self.active.all():
            self.active = self.everyone
        return place

    def _check_together(self, mask: Array) -> None:
        """That no thread of a program is elsewhere, or passes a barrier by its guard, while others are at it."""
        for threads in (self.active & ~mask, *self.waiting.values()):
            if threads.any() and np.isin(self.shared_start[threads], self.shared_start[mask]).any():
                raise Unsupported("a barrier that not all threads of a program reach together")

    # ------------------------------------------------------------ instructions

    def _pays(self, run: Run) -> bool:
        """Whether it is faster at once: in wide launches sums of several products are, if they are several too."""
        several = isinstance(run, Products) and len(run.targets) >= 4 and len(run.counts) > 1
        return several or 2 * self.threads <= TOGETHER

    def _together(self, run: Run) -> int:
        """A run, by all threads. The place behind it."""
        self.executing = self.everyone
        if isinstance(run, Loads):
            size = TOGETHER // self.threads
            for part in run.parts:
                for first in range(0, len(part), size):
                    self._load(part[first : first + size], self.everyone)
            return run.end
        if isinstance(run, Matrices):
            size = max(1, TOGETHER // self.threads)
            for first in range(0, len(run.instructions), size):
                self._multiply(run.instructions[first : first + size])
            return run.end
        size = TOGETHER // 2
        parts = [slice(n, n + size) for n in range(0, self.threads, size)] if self.threads > size else [None]
        given = ((self.stacked(run.starts, part), self.stacked(run.factors, part)) for part in parts)
        found = [summed(run, *each) for each in given]
        self.put_each(run.targets, bits_of(np.concatenate(found, axis=1), "f32"), self.everyone)
        return run.end

    def _computed(self, block: Block) -> bool:
        """Whether it was executed here: not where it reads a register that was never written."""
        registers, unwritten = self.registers, self.unwritten
        if unwritten and any((unwritten[name] & self.active).any() for name in block.reads if name in unwritten):
            return False
        try:
            sources = [registers[name] for name in block.reads]
        except KeyError:
            return False
        self.put_each(block.writes, block.function(*sources), self.active)
        return True

    def _execute(self, i: Instruction, mask: Array) -> None:
        kind = i.words[0]
        if i.words[1:] and i.words[1] in WAITS or i.words[2:] and i.words[2] in WAITS:  # cp.async and wgmma
            return
        special: Callable[[Instruction, Array], None] | None = getattr(self, f"_{kind}", None)
        if special:
            special(i, mask)
        elif kind == "createpolicy":  # of a cache, which changes no value
            self.put(i.operands[0], np.uint64(0), mask)
        else:
            self._compute(i, mask)

    def _compute(self, i: Instruction, mask: Array) -> None:
        kind, types = i.words[0], i.words[-1]
        values = [self._source(operand) for operand in i.operands[1:]]
        if kind in ("div", "rem") and types[0] in "us" and (self.each(read(values[1], types))[mask] == 0).any():
            raise Unsupported("a division by zero, whose result the PTX ISA leaves open")
        self.put(i.operands[0], operation(i.words)(*values), mask)

    def _source(self, operand: Operand) -> Array:
        """Bits, or a predicate or its opposite."""
        if isinstance(operand, str) and declared(operand.removeprefix("!"), self.program.registers) == "pred":
            return self.predicate(operand)
        return self.bits(operand)

    def _mov(self, i: Instruction, mask: Array) -> None:
        """Also between a register and its parts."""
        target, source = i.operands
        if not isinstance(source, tuple) and not isinstance(target, tuple):
            self._compute(i, mask)
            return
        bits, word = width(i.words[-1]), UNSIGNED[width(i.words[-1])]
        if isinstance(source, tuple):
            part = bits // len(source)
            parts = (self.get(name, f"b{part}").astype(word) << word(part * n) for n, name in enumerate(source))
            self.put(target, sum(parts, word(0)), mask)
        else:
            part, whole = bits // len(target), self.get(source, f"b{bits}")
            for n, name in enumerate(target):
                self.put(name, (whole >> word(part * n)).astype(UNSIGNED[part]), mask)
