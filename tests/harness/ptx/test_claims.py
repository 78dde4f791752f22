"""Of what several processes need, one compiles each kernel, and the others wait for it."""

import contextlib
import errno
import gc
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forks import rows_of_fork
from triton import knobs

from castpoint.harness.fingerprint import known
from castpoint.harness.fingerprint.norm import identify
from castpoint.harness.ptx import claims
from castpoint.harness.ptx.claims import Claimed
from castpoint.harness.ptx.driver import executed

KEY, NAME = "kernel", "kernel.json"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path) -> Iterator[None]:
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path / "cache")
        yield


def compile_it(cache: Claimed) -> None:
    cache.put_group(NAME, {NAME: cache.put("{}", NAME, binary=False)})


@contextlib.contextmanager
def beside(run: Callable[[], object]) -> Iterator[Callable[[float], bool]]:
    """A fork runs it; whether that is done within so many seconds. Fails if it has failed."""
    if not (process := os.fork()):
        code = 1
        try:
            run()
            code = 0
        finally:
            os._exit(code)
    ended = []

    def done(seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not ended and time.monotonic() < until:
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                ended.append(status)
                assert os.waitstatus_to_exitcode(status) == 0
            time.sleep(0.01)
        return bool(ended)

    try:
        yield done
    finally:
        if not ended:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


def test_another_process_waits_for_what_is_compiled() -> None:
    def other() -> None:
        assert Claimed(KEY).get_group(NAME), "compiled again"

    cache = Claimed(KEY)
    assert cache.get_group(NAME) is None
    with beside(other) as done:
        assert not done(0.3)
        compile_it(cache)
        del cache
        assert done(20)
    assert Claimed(KEY).get_group(NAME)


def test_what_one_fails_to_compile_another_tries(tmp_path: Path) -> None:
    """Though a process that was forked meanwhile lives on: what holds the claim is no more."""

    def other() -> None:
        assert Claimed(KEY).get_group(NAME) is None
        (tmp_path / "tried").touch()

    cache = Claimed(KEY)
    assert cache.get_group(NAME) is None
    with beside(lambda: time.sleep(600)), beside(other) as done:
        assert not done(0.3)
        del cache
        gc.collect()
        assert done(20)
    assert (tmp_path / "tried").exists()


def test_what_one_failed_to_compile_is_free_while_it_goes_on() -> None:
    """An exception that is handled keeps what failed."""

    def other() -> None:
        assert Claimed(KEY).get_group(NAME) is None

    failed = Claimed(KEY)
    assert failed.get_group(NAME) is None
    Claimed("another").get_group(NAME)
    with beside(other) as done:
        assert done(claims.PATIENCE / 2)
    assert failed.claim.closed


def test_an_end_takes_the_claim_along(tmp_path: Path) -> None:
    def other() -> None:
        kept.append(Claimed(KEY))
        kept[0].get_group(NAME)
        (tmp_path / "claimed").touch()
        time.sleep(600)

    kept: list[Claimed] = []
    with beside(other) as done:
        while not (tmp_path / "claimed").exists():
            assert not done(0.01)
    begun = time.monotonic()
    assert Claimed(KEY).get_group(NAME) is None
    assert time.monotonic() - begun < claims.PATIENCE / 2


def test_nobody_waits_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other() -> None:
        assert Claimed(KEY).get_group(NAME) is None

    monkeypatch.setattr(claims, "PATIENCE", 0.1)
    cache = Claimed(KEY)
    assert cache.get_group(NAME) is None
    with beside(other) as done:
        assert done(20)


def test_on_a_file_system_without_locks_each_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(*of: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(claims.fcntl, "lockf", lockf)
    begun = time.monotonic()
    assert Claimed(KEY).get_group(NAME) is None
    assert time.monotonic() - begun < claims.PATIENCE / 2


def test_a_cache_of_the_users_own_stays() -> None:
    class Own(Claimed):
        pass

    with executed():
        with executed():
            assert knobs.cache.manager_class is Claimed
        assert knobs.cache.manager_class is Claimed
    assert knobs.cache.manager_class is None
    knobs.cache.manager_class = Own
    with executed():
        assert knobs.cache.manager_class is Own
    assert knobs.cache.manager_class is Own


def compiled_kernels(log: str) -> Iterator[dict]:
    """What all processes of a first answer compile."""

    def note(*, metadata: dict, cache_hit: bool, **others: object) -> None:
        if not cache_hit:
            file.write(f"{os.getpid()} {metadata['hash']}\n")

    os.sched_getaffinity, claims.PATIENCE = lambda process: {0, 1}, 600.0
    with open(log, "a", buffering=1) as file:
        knobs.compilation.listener = note
        answer = identify(executed()(known.triton_head_norm(known.norm_plans()[0])), "head_norm")
        yield {"status": answer.status}
    yield from ({"process": line.split()[0], "kernel": line.split()[1]} for line in Path(log).read_text().splitlines())


def test_no_kernel_is_compiled_twice(tmp_path: Path) -> None:
    log, cache = str(tmp_path / "log"), str(tmp_path / "cache")
    answer, *rows = rows_of_fork(compiled_kernels, log, folder=tmp_path, TRITON_CACHE_DIR=cache)
    kernels = [row["kernel"] for row in rows]
    assert answer["status"] == "identified"
    assert len(kernels) == len({*kernels}) > 15
    assert len({row["process"] for row in rows}) > 1
