"""The tests hold interpreted kernels to their specs, on the CPU, also beside a GPU; `make gpu` checks compiled ones.

The variables must be set before torch and the kernels are imported. `make compare` sets TRITON_INTERPRET to 0, to time
what runs compiled. `make test` starts one pytest process a core: each takes one thread, as do the processes that its
tests start.
"""

import contextlib
import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator

INTERPRETED = os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """One folder of compiled kernels for all processes of a run, empty at first: no test compiles what another has."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        config.compiled = os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled")


def pytest_unconfigure(config: pytest.Config) -> None:
    if hasattr(config, "compiled"):
        shutil.rmtree(config.compiled, ignore_errors=True)


HEAVIEST = ("rounds_as_its_plan", "kernels_equal_their_spec", "less_than_a_minute", "compiles_once_for_all_layers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that take longest begin, so that no worker of a run is left with one when the others have ended."""
    items.sort(key=lambda item: not any(name in item.name for name in HEAVIEST))


@pytest.fixture(autouse=True)
def interpreted_as_before() -> Iterator[None]:
    """A command that compiles says so to the process that it runs in; the tests behind it go on as they were."""
    os.environ["TRITON_INTERPRET"] = INTERPRETED
    yield
    os.environ["TRITON_INTERPRET"] = INTERPRETED


@pytest.fixture(scope="module", autouse=True)
def freed_memory_given_back() -> Iterator[None]:
    """What tests have freed stays with glibc in small pieces: gigabytes a worker, in the end."""
    yield
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() and os.environ["TRITON_INTERPRET"] == "0" else "cpu"


@pytest.fixture
def alone() -> Iterator[None]:
    """Thousands of small operations: a second thread on a busy machine makes them ten times slower, not faster."""
    from castpoint.harness.runs.environment import one_thread

    with one_thread():
        yield


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For tests that would notice what leaves another number of threads behind: a worker of `make test` has one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
