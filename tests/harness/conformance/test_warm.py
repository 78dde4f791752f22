"""Binaries compiled ahead: a launch of another shape finds its own in Triton's cache, and no compiler costs a run.

They compile in processes of their own, since kernels are interpreted in this one.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from forks import rows_of_fork

from castpoint.kernels.config import Config

SPLIT = Config("split-k", "none", 16, 128, 4, 2, 2)
AFTER = Config("fused", "hidden", 64, 64, 4, 2)
SEPARATE = Config("separate")
LAUNCHES = {  # plan, config, tokens, hidden size, rope
    "one token": ("deferred", SPLIT, 1, 2048, False),
    "many tokens": ("one-rounding", AFTER, 130, 3072, True),
    "wide": ("one-rounding", SEPARATE, 96, 5120, False),
}


# ---------------------------------------------------------------- in a process whose kernels compile


def compiled_ahead(name: str, tokens: str = "") -> Iterator[dict]:
    """Kernels in the cache before and behind a launch whose binary, or that of so many tokens, was compiled ahead."""
    from castpoint.harness.conformance.cuda import binary_of

    plan, config, wanted, width, rope = LAUNCHES[name]
    compilers = made()
    binary = binary_of(plan, config, int(tokens or wanted), width, rope)
    compilers.start([binary, binary])
    compilers.wait([binary])
    before = cached()
    launch(plan, config, wanted, width, rope)
    yield {"before": before, "anew": cached() - before, "jobs": len(compilers.jobs)}
    compilers.close()


def loop_ahead() -> Iterator[dict]:
    from castpoint.harness.conformance.cuda import Binary
    from castpoint.harness.conformance.warm import _ones
    from castpoint.harness.ptx.driver import compiled_only
    from castpoint.kernels.main_loop import matmul

    compilers = made()
    compilers.start([Binary("", AFTER)])
    compilers.wait([Binary("", AFTER)])
    before = cached()
    with compiled_only("sm_90"):
        matmul(_ones(200, 2048), _ones(6 * 128, 2048), 128, AFTER)
    yield {"before": before, "anew": cached() - before}
    compilers.close()


def one_that_fails() -> Iterator[dict]:
    """Too many stages for the GPU; a plan that `separate` cannot express; one that is none."""
    from castpoint.harness.conformance.cuda import Binary

    compilers, bad = made(), [Binary("hf", Config("fused", "hidden", 128, 128, 8, 5)), Binary("deferred", SEPARATE)]
    bad.append(Binary("no such plan", SPLIT))
    good = Binary("hf", SEPARATE)
    compilers.start([*bad, good])
    compilers.wait([*bad, good])
    yield {"errors": [type(compilers.jobs[b].exception()).__name__ for b in (*bad, good)], "cached": cached()}
    compilers.close()


def one_that_crashes() -> Iterator[dict]:
    """A compiler that ends with its process, as one that is killed for its memory does."""
    from castpoint.harness.conformance import warm
    from castpoint.harness.conformance.cuda import Binary

    warm.compile_binary = crashed
    compilers, binaries = made(), [Binary("hf", SEPARATE), Binary("hf", SPLIT)]
    for binary in binaries:
        compilers.start([binary])
        compilers.wait([binary])
    compilers.start([Binary("hf", AFTER)])
    compilers.wait([Binary("hf", AFTER)])
    yield {"went": "on"}


def crashed(binary: object, target: str) -> None:
    os._exit(1)


def another_target() -> Iterator[dict]:
    from castpoint.harness.conformance.cuda import Binary

    for target in ("sm_70", ""):
        compilers = made(target)
        compilers.start([Binary("hf", SEPARATE)])
        compilers.wait([Binary("hf", SEPARATE)])
        yield {"jobs": len(compilers.jobs), "cached": cached()}
        compilers.close()


def killed() -> Iterator[dict]:
    """Ids of the processes that compile, for one that is then killed."""
    read, write = os.pipe()
    parent = os.fork()
    if not parent:
        os.write(write, " ".join(map(str, made().pool._processes)).encode())
        os.close(write)
        time.sleep(60)
    os.close(write)
    compilers = [int(word) for word in os.read(read, 100).split()]
    alive = [pid for pid in compilers if Path(f"/proc/{pid}").exists()]
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    yield {"compilers": alive, "late": os.waitstatus_to_exitcode(os.waitpid(begun_late(), 0)[1])}


def begun_late() -> int:
    """Id of a compiler whose parent ended before it began."""
    from castpoint.harness.conformance.warm import _begin

    child = os.fork()
    if not child:
        _begin(os.getpid())  # which is not its parent's
        os._exit(0)
    return child


def made(target: str = "sm_90"):  # noqa: ANN201
    from castpoint.harness.conformance.warm import Compilers

    compilers = Compilers(2)
    compilers.target = target
    return compilers


def cached() -> int:
    """Kernels in Triton's cache, whole."""
    return len(list(Path(os.environ["TRITON_CACHE_DIR"]).glob("*/*.cubin")))


def launch(plan: str, config: Config, tokens: int, width: int, rope: bool) -> None:
    """With other heads than compiled, and other shares."""
    import dataclasses

    from castpoint.harness.conformance.warm import _ones
    from castpoint.harness.problems.drawn import with_positions
    from castpoint.harness.ptx.driver import compiled_only
    from castpoint.variants.backends import run_triton
    from castpoint.variants.catalogue import plan_named
    from castpoint.variants.problem import Problem

    heads = {"q_norm_weight": _ones(128), "k_norm_weight": _ones(128)}
    problem = Problem(_ones(tokens, width), _ones(width), _ones(8 * 128, width), num_q_heads=4, num_kv_heads=2, **heads)
    if config.splits > 1:
        config = dataclasses.replace(config, splits=7)
    with compiled_only("sm_90"):
        run_triton(plan_named(plan), with_positions(problem) if rope else problem, config=config)


# ---------------------------------------------------------------- tests


def forked(function, folder: Path, *args: str) -> list[dict]:
    """With a cache of its own."""
    return rows_of_fork(function, *args, folder=folder, TRITON_CACHE_DIR=str(folder / "cache"))


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_launch_of_another_shape_compiles_nothing_anew(name: str, tmp_path: Path) -> None:
    (row,) = forked(compiled_ahead, tmp_path, name)
    assert row["before"] >= 1 and row["anew"] == 0 and row["jobs"] == 1, row


def test_our_own_loop_is_compiled_too(tmp_path: Path) -> None:
    (row,) = forked(loop_ahead, tmp_path)
    assert row == {"before": 1, "anew": 0}


def test_another_binary_would_show(tmp_path: Path) -> None:
    """That of several tokens is not the one that a launch of one token takes."""
    (row,) = forked(compiled_ahead, tmp_path, "one token", "70")
    assert row["before"] >= 1 and row["anew"] == 1, row


def test_one_that_cannot_compile_is_no_error_and_the_next_one_compiles(tmp_path: Path) -> None:
    (row,) = forked(one_that_fails, tmp_path)
    assert row["errors"] == ["OutOfResources", "ValueError", "KeyError", "NoneType"] and row["cached"] >= 2, row


def test_a_compiler_that_crashes_is_no_error(tmp_path: Path) -> None:
    assert forked(one_that_crashes, tmp_path) == [{"went": "on"}]


def test_an_unknown_target_compiles_nothing(tmp_path: Path) -> None:
    assert forked(another_target, tmp_path) == [{"jobs": 0, "cached": 0}] * 2


def test_compilers_end_with_the_process_that_measures(tmp_path: Path) -> None:
    (row,) = forked(killed, tmp_path)
    assert len(row["compilers"]) == 2 and row["late"] == 1
    for _ in range(100):
        if not [pid for pid in row["compilers"] if running(pid)]:
            return
        time.sleep(0.1)
    pytest.fail("they compile for nobody")


def running(pid: int) -> bool:
    """Whoever adopts a process that ended may not ask at once how."""
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"
