"""Another process compiles ahead: from the last question back, until both meet, and nothing of it stays."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from castpoint.harness.ptx import driver
from castpoint.harness.ptx.ahead import compiled_ahead

QUESTIONS = range(6)


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr(driver, "launches", 0)


def no_process() -> int:
    pytest.fail("another process was started")


def asked_ahead(folder: Path) -> Callable[[int], object]:
    """What the other process, which only compiles, does with a question: a file that says when, a line, a failure."""

    def ask(question: int) -> None:
        assert driver.compiles_only
        (folder / str(question)).write_text(str(time.monotonic_ns()))
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
def test_no_process_is_left(taken: int, tmp_path: Path) -> None:
    """Also where the caller stops at a fault."""
    questions = compiled_ahead(QUESTIONS, lambda question: time.sleep(60))
    for _ in range(taken):
        next(questions)
        driver.launches += 1
    questions.close()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


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
