"""Another process compiles ahead: from the last question back, until both meet, and nothing of it stays. Another makes
what is said besides, which is the same as if it were made here."""

import dataclasses
import functools
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from norm_support import linear_chain

from castpoint.harness.fingerprint import chain as fingerprint_chain
from castpoint.harness.fingerprint.answer import Answer, Question
from castpoint.harness.fingerprint.facts import noted
from castpoint.harness.fingerprint.norm import identify
from castpoint.harness.ptx import driver
from castpoint.harness.ptx.ahead import compiled_ahead, made_beside
from castpoint.variants.eager import eager_norm

QUESTIONS = range(6)


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr(driver, "launches", 0)


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The processes that were begun. The worker of a test run may have others."""
    begun, fork = [], os.fork

    def noted_fork() -> int:
        if process := fork():
            begun.append(process)
        return process

    monkeypatch.setattr(os, "fork", noted_fork)
    return begun


def check_ended(forks: list[int]) -> None:
    (process,) = forks
    with pytest.raises(ChildProcessError):
        os.waitpid(process, os.WNOHANG)


def no_process() -> int:
    pytest.fail("another process was started")


def asked_ahead(folder: Path) -> Callable[[int], object]:
    """What the other process, which only compiles, does with a question: a file that says when, a line, a failure."""

    def ask(question: int) -> None:
        assert driver.compiles_only
        when = folder.with_name(f"{folder.name}-{question}")
        when.write_text(str(time.monotonic_ns()))
        when.rename(folder / str(question))  # whole: this process may be ended at any moment
        print("not to be seen", flush=True)
        raise RuntimeError("of results that mean nothing")

    return ask


def until(there: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not there():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_last_is_compiled_first_and_each_is_asked_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    asked = []
    for question in compiled_ahead(QUESTIONS, asked_ahead(tmp_path)):
        driver.launches += 1
        asked.append(question)
        if question == 1:  # begun as the other process begins
            until(lambda: (tmp_path / "2").exists())
    assert asked == [*QUESTIONS]
    ahead = sorted(tmp_path.iterdir(), key=lambda file: int(file.read_text()))
    assert [file.name for file in ahead][:4] == ["5", "4", "3", "2"]
    assert "0" not in [file.name for file in ahead]
    assert not driver.compiles_only
    assert capfd.readouterr() == ("", "")


def test_both_meet(tmp_path: Path) -> None:
    def ask(question: int) -> None:
        (tmp_path / str(question)).touch()
        until(lambda: (tmp_path / "met").exists())

    for question in compiled_ahead(QUESTIONS, ask):
        driver.launches += 1
        if question == 4:
            until(lambda: (tmp_path / "5").exists())
            (tmp_path / "met").touch()
            time.sleep(0.5)
    assert {file.name for file in tmp_path.iterdir()} == {"5", "met"}


@pytest.mark.parametrize("taken", [2, 6])
def test_no_process_is_left(taken: int, forks: list[int]) -> None:
    """Also where the caller stops at a fault."""
    questions = compiled_ahead(QUESTIONS, lambda question: time.sleep(60))
    for _ in range(taken):
        next(questions)
        driver.launches += 1
    questions.close()
    check_ended(forks)


def test_where_nothing_is_launched_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fork", no_process)
    assert [*compiled_ahead(QUESTIONS, print)] == [*QUESTIONS]
    assert [*compiled_ahead([], print)] == []


def test_one_core_has_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fork", no_process)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    for _ in compiled_ahead(QUESTIONS, print):
        driver.launches += 1


@pytest.mark.parametrize("only", [False, True])
def test_a_process_that_only_compiles_runs_no_launch(
    only: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernel.ptx").write_text("")
    manager = SimpleNamespace(get_group=lambda name: {"kernel.ptx": tmp_path / "kernel.ptx"})
    monkeypatch.setattr(driver, "get_cache_manager", lambda key: manager)
    monkeypatch.setattr(driver, "parse", lambda text: text)
    ran: list[tuple[object, ...]] = []
    monkeypatch.setattr(driver, "launch", lambda *given: ran.append(given))
    monkeypatch.setattr(driver, "compiles_only", only)
    source = SimpleNamespace(fn=SimpleNamespace(arg_names=["x"]), signature={"x": "*fp32"})
    metadata = SimpleNamespace(hash="", name="kernel", num_warps=1, warp_size=32, shared=0)
    driver._Driver("sm_90").launcher_cls(source, metadata)(1, 1, 1, *[None] * 6, "x")
    assert len(ran) == driver.launches == (not only)


# ---------------------------------------------------------------- made beside


@pytest.fixture
def alarm() -> Iterator[None]:
    """A fork that waits for a thread which it has not would wait for ever, and we for it."""

    def late(number: int, frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_another_process_makes_it_meanwhile(capfd: pytest.CaptureFixture[str]) -> None:
    def make() -> int:
        print("not to be seen", flush=True)
        return os.getpid()

    driver.launches = 1
    with made_beside(make, 0) as beside:
        assert beside.made() != os.getpid()
    assert capfd.readouterr() == ("", "")


def test_it_has_no_threads_to_wait_for(two_threads: None, alarm: None) -> None:
    """torch.set_num_threads(2) is what the fingerprint does before it calls what it asks."""

    def make() -> float:
        torch.set_num_threads(2)
        return torch.ones(1 << 22).exp().sum().item()

    driver.launches, here = 1, make()
    with made_beside(make, 0) as beside:
        assert beside.made() == pytest.approx(here, rel=1e-6)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("launches", "cores"), [(0, {0, 1}), (1, {0})])
def test_where_nothing_is_launched_or_on_one_core_it_is_made_here(
    launches: int, cores: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fork", no_process)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: cores)
    driver.launches = launches
    with made_beside(os.getpid, 0) as beside:
        assert beside.made() == os.getpid()


def test_what_fails_there_is_made_here() -> None:
    def make() -> int:
        if os.getpid() != here:
            raise RuntimeError("not here")
        return here

    driver.launches, here = 1, os.getpid()
    with made_beside(make, 0) as beside:
        assert beside.made() == here


def test_a_fault_leaves_no_process_that_makes(alarm: None, forks: list[int]) -> None:
    driver.launches = 1
    with pytest.raises(ZeroDivisionError), made_beside(functools.partial(time.sleep, 600), 0):
        raise ZeroDivisionError
    check_ended(forks)


def test_what_was_known_before_is_not_said_again() -> None:
    """It may be known better by then: the other process has it as it was when it began."""
    box = SimpleNamespace(manners={"y": "is returned", "x": "is kept"})

    def make() -> dict[str, str]:
        box.manners |= {"x": "is written over", "result": "lies there"}
        return {"subnormal x": "counts"}

    assert noted(box, make) == {"x": "is written over", "result": "lies there", "subnormal x": "counts"}


@pytest.mark.parametrize("what", ["a norm", "a chain", "a chain that is another at the end", "a chain that refuses"])
def test_the_answer_is_the_same(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what would be launched, if the processes were one core's, and with both of them; and fewer calls are made
    here of a chain. Its last questions are of an eps of 1e-8."""

    def noting_who() -> None:
        driver.launches += 1
        if not driver.compiles_only:  # that one may be ended before its first
            (tmp_path / str(os.getpid())).touch()

    def norm(x, weight, eps, bias):
        noting_who()
        return eager_norm(x, weight, eps, False) + bias

    def chain(x, norm_weight, eps, qkv_weight, q_norm_weight, k_norm_weight, num_q_heads, num_kv_heads):
        noting_who()
        if eps == 1e-8 and "refuses" in what:
            raise ValueError("too small")
        eps *= 3 if eps == 1e-8 and "another" in what else 1
        return linear_chain(x, norm_weight, eps, qkv_weight, q_norm_weight, k_norm_weight, num_q_heads, num_kv_heads)

    def count(fn: Callable, kind: str) -> tuple[Answer, int]:
        before = driver.launches
        answer = identify(fn, kind)
        return dataclasses.replace(answer, seconds=0.0), driver.launches - before

    def waiting(questions: Iterable[Question], same: Callable[[], set]) -> Iterator[Question]:
        if driver.launches and len(os.sched_getaffinity(0)) > 1:
            until(lambda: len(same()) > 3)
        yield from known(questions, same)

    known = fingerprint_chain._known
    if what.startswith("a chain that"):  # the other process comes to its questions before any is asked here
        monkeypatch.setattr(fingerprint_chain, "chain_facts", lambda calls, found: {})
        monkeypatch.setattr(fingerprint_chain, "_known", waiting)
    asked = (norm, "rmsnorm") if what == "a norm" else (chain, "qkv")
    together, calls = count(*asked)
    assert together.status == ("none" if "another" in what else "identified"), together
    assert len([*tmp_path.iterdir()]) == 2, "one that makes the facts, and this one"
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    monkeypatch.setattr(os, "fork", no_process)
    alone, of_both = count(*asked)
    assert alone == together
    assert calls < of_both


def test_more_is_found_until_both_meet(forks: list[int]) -> None:
    """What is made, then from the last question back; of what fails nothing is known, nor what would come behind."""

    def more(begun: Callable[[], int]) -> Iterator[int]:
        for question in reversed(QUESTIONS):
            until(lambda: begun() >= 2)
            if question < begun():
                return
            yield question

    driver.launches = 1
    with made_beside(os.getpid, 0, more) as beside:
        asked = []
        for question in beside.asked(QUESTIONS):
            asked.append(question)
            if question == 1:
                until(lambda: beside.more() == {2, 3, 4, 5})
        assert asked == [*QUESTIONS] and beside.made() == forks[0]
    check_ended(forks)


def test_what_fails_behind_leaves_what_was_made() -> None:
    def more(begun: Callable[[], int]) -> Iterator[int]:
        yield 5
        raise ZeroDivisionError

    driver.launches = 1
    with made_beside(os.getpid, 0, more) as beside:
        until(lambda: beside.more() == {5})
        assert beside.made() != os.getpid()
        assert beside.more() == {5}
