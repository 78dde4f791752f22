"""Forks of this process on other cores: one compiles ahead what Triton will be asked for, of a first answer more than
half; one makes a part of the answer meanwhile."""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing.connection
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch

from castpoint.harness.ptx import driver

T = TypeVar("T")


def _counted(begun: mmap.mmap, questions: Iterable[T]) -> Iterator[T]:
    """The questions, where begun holds how many."""
    for n, question in enumerate(questions, 1):
        begun[:] = n.to_bytes(8)
        yield question


def _has_other_core(before: int) -> bool:
    """Whether ptx.driver runs what is asked, so that it has more launches than before, and another process may."""
    return driver.launches != before and len(os.sched_getaffinity(0)) > 1


@contextlib.contextmanager
def _forked(run: Callable[[], None]) -> Iterator[None]:
    """A fork of this process runs what never returns, until the end of the context."""
    if not (other := os.fork()):
        run()
    try:
        yield
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)


@contextlib.contextmanager
def compiling(
    questions: Callable[[], Iterable[T]], ask: Callable[[T], object], before: int
) -> Iterator[Callable[[Iterable[T]], Iterator[T]]]:
    """Where ptx.driver runs what is asked, so that it has more launches than before, a fork of this process asks the
    questions, on another core, from the last one back. Its launches do nothing but compile into Triton's cache, where
    this process finds them; it hands back nothing else, and is not waited for. This process asks what it is about to
    through the function that is given, until both meet."""
    if not _has_other_core(before):
        yield iter
        return
    with mmap.mmap(-1, 8) as begun, _forked(partial(_compile, questions, ask, begun)):
        yield partial(_counted, begun)


def compiled_ahead(questions: Iterable[T], ask: Callable[[T], object]) -> Iterator[T]:
    """The questions, which the caller asks, behind the first one as compiling has it."""
    questions, before = iter(questions), driver.launches
    for question in questions:
        yield question
        break
    with compiling(lambda: questions, ask, before) as asked:
        yield from asked(questions)


@dataclass
class Beside(Generic[T]):
    """made: what is made elsewhere, once it is there, or else here; more: what was found there until now; asked: gives
    questions, so that it is known there how many were begun."""

    made: Callable[[], T]
    more: Callable[[], set[Any]]
    asked: Callable[[Iterable[Any]], Iterator[Any]] = iter


@contextlib.contextmanager
def made_beside(
    make: Callable[[], T], before: int, more: Callable[[Callable[[], int]], Iterable[Any]] = lambda begun: ()
) -> Iterator[Beside[T]]:
    """Where ptx.driver runs what is asked, so that it has more launches than before, a fork of this process makes
    something meanwhile, on another core, and is waited for; where it fails, it is made here. Then it finds more, for
    which it is told how many questions were begun here, and is not waited for."""
    if not _has_other_core(before):
        yield Beside(make, set)
        return
    reading, writing = multiprocessing.Pipe(duplex=False)
    with reading, mmap.mmap(-1, 8) as begun:
        others = partial(more, lambda: int.from_bytes(begun[:]))
        with _forked(partial(_hand_back, make, others, writing)):
            writing.close()
            made, found = list[T](), set[Any]()

            def read(wait: bool) -> set[Any]:
                with contextlib.suppress(EOFError):
                    while reading.poll(None if wait and not made else 0):
                        is_made, value = reading.recv()
                        made.append(value) if is_made else found.add(value)
                return found

            def get() -> T:
                read(wait=True)
                return made[0] if made else make()

            yield Beside(get, partial(read, False), partial(_counted, begun))


def _by_itself(nice: int) -> None:
    """A fork says nothing, lets others go first, and has none of the threads that PyTorch began: it would wait for them
    for ever."""
    os.nice(nice)
    sys.stdout = sys.stderr = nowhere = open(os.devnull, "w")
    os.dup2(nowhere.fileno(), 1)
    os.dup2(nowhere.fileno(), 2)
    torch.set_num_threads(1)
    torch.set_num_threads = lambda count: None


def _hand_back(
    make: Callable[[], object], more: Callable[[], Iterable[object]], writing: multiprocessing.connection.Connection
) -> None:
    """Never returns."""
    try:
        _by_itself(15)
        with contextlib.suppress(Exception), writing:
            writing.send((True, make()))
            for found in more():
                writing.send((False, found))
    finally:
        os._exit(0)


def _compile(questions: Callable[[], Iterable[T]], ask: Callable[[T], object], begun: mmap.mmap) -> None:
    """Never returns."""
    try:
        _by_itself(5)  # it goes before one that makes: what both need is compiled once then
        driver.compiles_only = True
        left = [*questions()]
        while len(left) > int.from_bytes(begun[:]):
            with contextlib.suppress(Exception):  # of results that mean nothing
                ask(left.pop())
    finally:
        os._exit(0)
