"""PTX run on a CPU: every thread of some programs in step, a register one numpy array with an element a thread.

What the PTX ISA defines is done to the bit, or refused. What it leaves open is chosen: approximate instructions are
rounded correctly, tensor cores add as ptx.matrix says, and a product and a sum without `.rn`, which ptxas may
fuse, stay two. Copies and products that run on their own finish where they start, and programs run in step, so that no
race is found here, and programs that wait for one another would wait for ever. Threads that part at a branch run apart,
those behind first, and join where they meet.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from castpoint.harness.ptx import matrix
from castpoint.harness.ptx.arithmetic import INTEGER, LOGIC, arithmetic, compared, converted
from castpoint.harness.ptx.memory import Global, Shared, check_aligned
from castpoint.harness.ptx.numbers import UNSIGNED, Array, Unsupported, extended, read, width
from castpoint.harness.ptx.program import Address, Instruction, Operand, Program

THREADS = 1 << 15  # in step: with more, registers leave the cache
BARRIERS = ("bar", "barrier")
NOTHING = ("fence", "membar", "griddepcontrol", "prefetch", "applypriority")  # to do, since all is done in order
WAITS = ("commit_group", "wait_group", "wait_all", "fence")
REGISTER = re.compile(r"%[a-z]+\d+")
SHARED = "global_smem"  # Triton's only shared array; it starts at 0
Argument = Tensor | int | float | None


def launch(
    program: Program, grid: tuple[int, int, int], threads: int, shared: int, arguments: Sequence[Argument]
) -> None:
    """Runs a kernel on its arguments, CPU tensors and numbers in the order of its parameters; None is a null pointer.

    threads and bytes of shared memory: of a program. Parameters behind the arguments, Triton's scratch memory, are 0.
    Raises IndexError for an access outside of the tensors' storages or not aligned, Unsupported for what no
    kernel here has needed yet.
    """
    memory = Global([a for a in arguments if isinstance(a, Tensor)])
    given = itertools.zip_longest(program.parameters, arguments)
    values = {name: parameter(argument, kind) for (name, kind), argument in given}
    places = np.array(list(itertools.product(*map(range, reversed(grid))))).reshape(-1, 3)[:, ::-1]  # x counts fastest
    step = max(1, THREADS // threads)
    for first in range(0, len(places), step):
        _Run(program, places[first : first + step], grid, threads, shared, memory, values).run()


def parameter(argument: Argument, kind: str) -> Array:
    """An argument's bits."""
    if kind == "f32":
        return np.array(argument, np.float32).view(np.uint32)
    value = argument.data_ptr() if isinstance(argument, Tensor) else int(argument or 0)
    return np.array(value & (1 << width(kind)) - 1, UNSIGNED[width(kind)])


class _Run:
    """Programs of a launch, from the first instruction to the last thread's end. places: [programs, 3], x y z."""

    def __init__(
        self, program: Program, places: Array, grid: Sequence[int], threads: int, shared: int, memory: Global,
        values: dict[str, Array],
    ) -> None:  # fmt: skip
        self.program, self.memory, self.values = program, memory, values
        self.shared = Shared(len(places), shared)
        self.threads = len(places) * threads
        self.of_program = np.repeat(np.arange(len(places)), threads)
        thread = np.tile(np.arange(threads, dtype=np.uint32), len(places))
        self.registers: dict[str, Array] = {"%laneid": thread % 32}
        for axis, place, size in zip("xyz", places.T, grid, strict=True):
            self.registers[f"%tid.{axis}"] = thread if axis == "x" else np.uint32(0)
            self.registers[f"%ntid.{axis}"] = np.uint32(threads if axis == "x" else 1)
            self.registers[f"%ctaid.{axis}"] = place.astype(np.uint32).repeat(threads)
            self.registers[f"%nctaid.{axis}"] = np.uint32(size)
        self.active = np.ones(self.threads, bool)  # threads that are at this place
        self.waiting: dict[int, Array] = {}  # threads that are at others

    # ------------------------------------------------------------ control

    def run(self) -> None:
        joints = set(self.program.labels.values())
        joints |= {n + 1 for n, i in enumerate(self.program.instructions) if i.words[0] == "bra"}
        place: int | None = 0
        with np.errstate(all="ignore"):
            while place is not None:
                if self.waiting and place in joints:
                    self._wait(place, self.active)
                    place = self._next()
                    if place is None:
                        return
                instruction = self.program.instructions[place]
                try:
                    place = self._step(instruction, place)
                except (IndexError, Unsupported) as error:
                    text = " ".join(instruction.text.split())
                    text = text if len(text) < 120 else f"{text[:60]} ... {text[-50:]}"
                    raise type(error)(f"{error}, in {self.program.name}: {text}") from error

    def _step(self, instruction: Instruction, place: int) -> int | None:
        """The place that follows; None behind the end of the last thread."""
        mask, kind = self._guarded(instruction), instruction.words[0]
        if kind == "bra":
            return self._branch(mask, self.program.labels[instruction.operands[0]], place + 1)
        if kind in ("ret", "exit"):
            self.active = self.active & ~mask
            return place + 1 if self.active.any() else self._next()
        if kind in BARRIERS:
            self._check_together()
        elif mask.any() and kind not in NOTHING:
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
        return place

    def _check_together(self) -> None:
        for threads in self.waiting.values():
            if np.isin(self.of_program[threads], self.of_program[self.active]).any():
                raise Unsupported("a barrier that not all threads of a program reach together")

    # ------------------------------------------------------------ operands

    def bits(self, operand: Operand) -> Array:
        """A register's bits, an element a thread or one for all; an integer's in 64 bits."""
        if isinstance(operand, int):
            return np.array(operand & (1 << 64) - 1, np.uint64)
        if operand == SHARED:
            return np.uint64(0)
        if operand in self.registers:
            return self.registers[operand]
        if REGISTER.fullmatch(operand):
            return ~np.uint64(0)  # never written: the compiler said that its value does not matter
        raise Unsupported(operand)

    def get(self, operand: Operand, kind: str) -> Array:
        return read(self.bits(operand), kind)

    def predicate(self, operand: Operand) -> Array:
        if isinstance(operand, int):
            return np.array(operand != 0)
        return ~self.bits(operand[1:]) if operand.startswith("!") else self.bits(operand)

    def put(self, name: str, bits: Array, mask: Array) -> None:
        if not mask.all():
            bits = np.where(mask, bits, self.registers.get(name, bits.dtype.type(0)))
        self.registers[name] = bits

    def each(self, values: Array) -> Array:
        """An element a thread."""
        return np.broadcast_to(values, self.threads)

    def addresses(self, address: Address) -> Array:
        return self.each(self.bits(address.base).astype(np.int64) + address.offset)

    # ------------------------------------------------------------ instructions

    def _execute(self, i: Instruction, mask: Array) -> None:
        kind, types = i.words[0], i.words[-1]
        if i.words[1:] and i.words[1] in WAITS or i.words[2:] and i.words[2] in WAITS:  # cp.async and wgmma
            return
        special: Callable[[Instruction, Array], None] | None = getattr(self, f"_{kind}", None)
        if special:
            special(i, mask)
        elif types == "pred":
            values = [self.predicate(operand) for operand in i.operands[1:]]
            self.put(i.operands[0], ~values[0] if kind == "not" else LOGIC[kind](*values), mask)
        elif kind == "createpolicy":  # of a cache, which changes no value
            self.put(i.operands[0], np.uint64(0), mask)
        elif kind == "mad" and "wide" in i.words:
            product = arithmetic(("mul", "wide", types), types, [self.bits(operand) for operand in i.operands[1:3]])
            self.put(i.operands[0], product + self.get(i.operands[3], "u64"), mask)
        else:
            self.put(
                i.operands[0], arithmetic(i.words, types, [self.bits(operand) for operand in i.operands[1:]]), mask
            )

    def _mov(self, i: Instruction, mask: Array) -> None:
        """Also between a register and its parts."""
        target, source = i.operands
        if i.words[-1] == "pred":
            self.put(target, self.predicate(source), mask)
            return
        bits, word = width(i.words[-1]), UNSIGNED[width(i.words[-1])]
        if isinstance(source, tuple):
            part = bits // len(source)
            parts = (self.get(name, f"b{part}").astype(word) << word(part * n) for n, name in enumerate(source))
            self.put(target, sum(parts, word(0)), mask)
        elif isinstance(target, tuple):
            part, whole = bits // len(target), self.get(source, f"b{bits}")
            for n, name in enumerate(target):
                self.put(name, (whole >> word(part * n)).astype(UNSIGNED[part]), mask)
        else:
            self.put(target, self.get(source, f"b{bits}"), mask)

    def _cvt(self, i: Instruction, mask: Array) -> None:
        to, of = i.words[-2:]
        if to.endswith("x2"):  # the first operand becomes the upper half
            parts = (converted(i.words, self.bits(operand), of, to.removesuffix("x2")) for operand in i.operands[1:])
            high, low = (part.astype(np.uint32) for part in parts)
            self.put(i.operands[0], low | high << np.uint32(16), mask)
        else:
            self.put(i.operands[0], converted(i.words, self.bits(i.operands[1]), of, to), mask)

    def _setp(self, i: Instruction, mask: Array) -> None:
        found = compared(i.words, *(self.get(operand, i.words[-1]) for operand in i.operands[1:3]))
        if len(i.operands) > 3:
            found = LOGIC[i.words[2]](found, self.predicate(i.operands[3]))
        self.put(i.operands[0], np.asarray(found), mask)

    def _selp(self, i: Instruction, mask: Array) -> None:
        kind = f"b{width(i.words[-1])}"
        a, b = (self.get(operand, kind) for operand in i.operands[1:3])
        self.put(i.operands[0], np.where(self.predicate(i.operands[3]), a, b), mask)

    # ------------------------------------------------------------ memory

    def _ld(self, i: Instruction, mask: Array) -> None:
        names, address, kind = _listed(i.operands[0]), i.operands[1], i.words[-1]
        if "param" in i.words:
            self.put(names[0], extended(self.values[address.base], kind), mask)
            return
        bits, space = width(kind), _space(i)
        addresses = self.addresses(address)[mask]
        check_aligned(addresses, bits // 8 * len(names))
        for n, name in enumerate(names):
            found, places = np.zeros(self.threads, UNSIGNED[bits]), addresses + n * bits // 8
            if space == "global":
                found[mask] = self.memory.load(places, bits)
            else:
                found[mask] = self.shared.load(self.of_program[mask], places, bits)
            self.put(name, extended(found, kind), mask)

    def _st(self, i: Instruction, mask: Array) -> None:
        address, sources = i.operands[0], _listed(i.operands[1])
        bits, space = width(i.words[-1]), _space(i)
        addresses = self.addresses(address)[mask]
        check_aligned(addresses, bits // 8 * len(sources))
        for n, source in enumerate(sources):
            values, places = self.each(self.get(source, f"b{bits}"))[mask], addresses + n * bits // 8
            if space == "global":
                self.memory.store(places, values, bits)
            else:
                self.shared.store(self.of_program[mask], places, values, bits)

    def _cp(self, i: Instruction, mask: Array) -> None:
        """cp.async: so many bytes to shared memory, of them the first from global memory, the rest zeros."""
        if i.words[1] != "async" or "bulk" in i.words or not {"shared", "shared_cta"} & set(i.words):
            raise Unsupported("this copy")
        target, source = (self.addresses(operand)[mask] for operand in i.operands[:2])
        size, *rest = i.operands[2 : -1 if "L2_cache_hint" in i.words else None]
        given = self.each(self.get(rest[0] if rest else size, "u32"))[mask]
        check_aligned(target, size)
        check_aligned(source[given > 0], size)
        check_aligned(given, 4)
        for byte in range(0, size, 4):
            word, there = np.zeros(target.shape, np.uint32), given > byte
            word[there] = self.memory.load(source[there] + byte, 32)
            self.shared.store(self.of_program[mask], target + byte, word, 32)

    def _atom(self, i: Instruction, mask: Array) -> None:
        """Sums of 32 bits in global memory, thread after thread in the order of programs; a GPU takes any order."""
        kind = i.words[-1]
        if "global" not in i.words or i.words[-2] != "add" or kind not in ("u32", "s32", "f32"):
            raise Unsupported("this atomic operation")
        addresses, values = self.addresses(i.operands[-2]), self.each(self.get(i.operands[-1], "b32"))
        check_aligned(addresses[mask], 4)
        old = np.zeros(self.threads, np.uint32)
        for thread in np.flatnonzero(mask).tolist():
            place = addresses[[thread]]
            old[[thread]] = self.memory.load(place, 32)
            self.memory.store(place, arithmetic(("add", kind), kind, [old[[thread]], values[[thread]]]), 32)
        if i.words[0] == "atom":
            self.put(i.operands[0], old, mask)

    _red = _atom

    # ------------------------------------------------------------ whole warps

    def _groups(self, mask: Array, size: int) -> Array:
        """Which groups of that many threads take part. Raises Unsupported where one does in part."""
        groups = mask.reshape(-1, size)
        if (groups.any(1) != groups.all(1)).any():
            raise Unsupported("a part of a warp at an instruction of whole warps")
        return groups[:, 0]

    def _rows(self, names: Sequence[Operand], groups: Array) -> list[Array]:
        """Registers as [groups, threads], those that take part."""
        return [self.each(self.get(name, "b32")).reshape(len(groups), -1)[groups] for name in names]

    def _put_rows(self, names: Sequence[str], words: Sequence[Array], groups: Array, mask: Array) -> None:
        for name, word in zip(names, words, strict=True):
            bits = np.zeros(self.threads, np.uint32)
            bits[mask] = word.reshape(-1)
            self.put(name, bits, mask)

    def _shfl(self, i: Instruction, mask: Array) -> None:
        groups = self._groups(mask, 32)
        if i.operands[3] != (0 if i.words[2] == "up" else 31):
            raise Unsupported("shfl within parts of a warp")
        name, _, inside = i.operands[0].partition("|")
        found, there = matrix.shuffle(*self._rows(i.operands[1:3], groups), i.words[2])
        self._put_rows([name], [found], groups, mask)
        if inside:
            reached = np.zeros(self.threads, bool)
            reached[mask] = there.reshape(-1)
            self.put(inside, reached, mask)

    def _redux(self, i: Instruction, mask: Array) -> None:
        """Sum, least or greatest of a warp's 32-bit integers, or a logical function of them."""
        groups, kind = self._groups(mask, 32), i.words[-1]
        (values,) = self._rows(i.operands[1:2], groups)
        found = INTEGER[i.words[2]].reduce(read(values, kind), axis=1, keepdims=True, dtype=read(values, kind).dtype)
        self._put_rows([i.operands[0]], [np.broadcast_to(found, values.shape).astype(np.uint32)], groups, mask)

    def _ldmatrix(self, i: Instruction, mask: Array) -> None:
        groups, names = self._groups(mask, 32), _listed(i.operands[0])
        addresses, programs = (
            each.reshape(-1, 32)[groups] for each in (self.addresses(i.operands[1]), self.of_program)
        )
        words = matrix.load(self.shared, programs, addresses, len(names), "trans" in i.words)
        self._put_rows(names, words, groups, mask)

    def _stmatrix(self, i: Instruction, mask: Array) -> None:
        groups, names = self._groups(mask, 32), _listed(i.operands[1])
        addresses, programs = (
            each.reshape(-1, 32)[groups] for each in (self.addresses(i.operands[0]), self.of_program)
        )
        matrix.store(self.shared, programs, addresses, self._rows(names, groups), "trans" in i.words)

    def _mma(self, i: Instruction, mask: Array) -> None:
        groups = self._groups(mask, 32)
        a, b, c = (self._rows(names, groups) for names in i.operands[1:])
        words = matrix.mma(i.words[3], i.words[4:], a, b, c)
        self._put_rows(i.operands[0], words, groups, mask)

    def _wgmma(self, i: Instruction, mask: Array) -> None:
        """mma_async: its operands are accumulators, A, B, whether the accumulators count, signs, transpositions."""
        groups = self._groups(mask, 128)
        accumulators, left, right, keep, *signs = i.operands
        if i.words[-3:] != ("f32", "bf16", "bf16") or signs[:2] != [1, 1]:
            raise Unsupported("wgmma of other types than bf16, or with signs")
        if any(signs[2:]):
            raise Unsupported("wgmma of a transposed matrix")
        keep = np.unique(self.each(self.predicate(keep))[mask])
        if len(keep) > 1:
            raise Unsupported("a product to which not all threads add")
        columns = int(i.words[4].removeprefix("m64n").removesuffix("k16"))
        programs = self.of_program.reshape(-1, 128)[groups, 0]

        def described(register: Operand, rows: int) -> Array:
            descriptors = self.each(self.get(register, "b64")).reshape(-1, 128)[groups, 0]
            return matrix.described(self.shared, programs, descriptors, rows)

        a = matrix.left_of(self._rows(left, groups)) if isinstance(left, tuple) else described(left, 64)
        b = described(right, columns)
        words = matrix.wgmma(a, b, self._rows(accumulators, groups) if keep[0] else None, columns)
        self._put_rows(accumulators, words, groups, mask)


def _listed(operand: Operand) -> tuple[Operand, ...]:
    return operand if isinstance(operand, tuple) else (operand,)


def _space(i: Instruction) -> str:
    """`global` or `shared`."""
    for word in i.words[1:-1]:
        if word == "global" or word in ("shared", "shared_cta"):
            return word.removesuffix("_cta")
    raise Unsupported("this memory")
