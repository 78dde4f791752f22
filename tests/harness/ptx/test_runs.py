"""Instructions executed many at once leave what they leave one after the other."""

import numpy as np
import pytest
import torch
from ptx_support import THREADS, ints, kernel, run, words

from castpoint.harness.ptx import machine
from castpoint.harness.ptx.program import parse
from castpoint.harness.ptx.runs import runs

LOADS = "".join(f"ld.global.b32 %r{n}, [%rd1 + {4 * THREADS * (n - 10)}];" for n in range(10, 20))
STORES = "".join(f"st.global.b32 [%rd2 + {4 * THREADS * (n - 10)}], %r{n};" for n in range(10, 30))
REGISTERS = ".reg .b32 %r<40>;"


def products(rng: np.random.Generator, count: int, alone: bool = False) -> str:
    """So many of registers 10 to 29, 20 to 29 each written once if alone."""
    lines = []
    for n in range(count):
        target = 20 + n if alone else rng.integers(10, 30)
        sources = rng.integers(10, 20 + n if alone else 30, 3)
        lines.append("fma.rn.f32 %r{}, %r{}, %r{}, %r{};".format(target, *sources))
    return "\n".join(lines)


def stored(body: str, values: np.ndarray) -> np.ndarray:
    out = torch.zeros(20 * THREADS, dtype=torch.int32)
    start = "".join(f"mov.b32 %r{n}, 0f3F800000;" for n in range(20, 30))
    run(f"{REGISTERS} {LOADS} {start} {body} {STORES}", ints(values.view(np.uint32)), out)
    return words(out)


BODIES = {
    "each register once": lambda rng: products(rng, 10, alone=True),
    "registers read, then written, twice": lambda rng: products(rng, 60),
    "a label inside": lambda rng: (
        f"""
        {products(rng, 9)} setp.lt.u32 %p1, %r1, 9; @%p1 bra $L__in; {products(rng, 6)}
    $L__in:
        {products(rng, 9)}"""
    ),
    "guards": lambda rng: f"setp.lt.u32 %p1, %r1, 9; {products(rng, 5)} @%p1 {products(rng, 9)}",
    "by a part of the threads": lambda rng: (
        f"""
        setp.lt.u32 %p1, %r1, 9; @%p1 bra $L__end; {products(rng, 9)}
    $L__end:
        mov.b32 %r10, %r10;"""
    ),
    "numbers": lambda rng: "".join(f"fma.rn.f32 %r{n}, %r{n - 9}, 0f40490FDB, 0fBF800001;" for n in range(20, 28)),
}


@pytest.mark.parametrize("name", BODIES)
def test_products_at_once_are_products_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = 0
    for seed in range(20):
        body = BODIES[name](np.random.default_rng(seed))
        found += len(runs(parse(kernel(f"{REGISTERS} {body}", 2))))
        values = np.random.default_rng(seed).standard_normal(10 * THREADS).astype(np.float32)
        monkeypatch.setattr(machine, "runs", runs)
        at_once = stored(body, values)
        monkeypatch.setattr(machine, "runs", lambda program: {})
        assert np.array_equal(at_once, stored(body, values)), seed
    assert found > 5


def test_a_product_of_matrices_is_a_run_of_few_levels() -> None:
    """An accumulator of 16 elements and 8 steps."""
    body = "".join(f"fma.rn.f32 %r{20 + n}, %r10, %r11, %r{20 + n};" for n in range(10) for _ in range(8))
    apart = "".join(f"fma.rn.f32 %a{s + 1}_{n}, %r10, %r11, %a{s}_{n};" for n in range(16) for s in range(8))
    names = ", ".join(f"%a{s}_{n}" for s in range(9) for n in range(16))
    (found,) = runs(parse(kernel(f"{REGISTERS} .reg .f32 {names}; {apart}"))).values()
    assert [len(level) for level in found.levels] == [16] * 8
    assert found.given == ("%r10", "%r11", *(f"%a0_{n}" for n in range(16)))
    assert not runs(parse(kernel(f"{REGISTERS} {body}")))  # an accumulator is read and written: one by one


@pytest.mark.parametrize("space", ["global", "shared"])
def test_loads_at_once_are_loads_one_by_one(space: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two in a vector, also into `_`, into the register of their address, and with threads that are elsewhere."""
    values = np.random.default_rng(3).integers(0, 1 << 32, 40 * THREADS, np.uint64).astype(np.uint32)
    bases = ("%rd3", "%rd5") if space == "global" else ("%r5", "%r6")
    base = bases[0]
    many = "".join(
        f"ld.{space}.v2.b32 {{%r{n}, %r{n + 1}}}, [{bases[n > 17]} + {8 * (n % 7)}];" for n in range(10, 28, 2)
    )
    sinks = "".join(f"ld.{space}.v2.b32 {{_, %r{n}}}, [{base} + {8 * (n % 5)}];" for n in range(20, 26))
    chased = "ld.shared.b32 %r26, [%r5];" * 3 + "ld.shared.b32 %r5, [%r5 + 8];" * 5
    body = f"""
        mul.wide.u32 %rd4, %r1, 60; add.s64 %rd3, %rd1, %rd4;
        shl.b32 %r5, %r1, 3; xor.b32 %r6, %r5, 8; add.s64 %rd5, %rd3, 8;
        st.shared.v2.b32 [%r5], {{%r5, %r1}}; st.shared.v2.b32 [%r5 + 512], {{%r1, %r5}}; bar.sync 0;
        {many} setp.lt.u32 %p1, %r1, 9; @%p1 bra $L__end; {sinks}
    $L__end:
        {chased} mov.b32 %r27, 0; mov.b32 %r28, 0; mov.b32 %r29, %r5; {STORES}"""
    start = "".join(f"mov.b32 %r{n}, 7;" for n in range(20, 27))

    def result() -> np.ndarray:
        out = torch.zeros(20 * THREADS, dtype=torch.int32)
        run(f"{REGISTERS} {start} {body}", ints(values), out, shared=2048)
        return words(out)

    at_once = result()
    monkeypatch.setattr(machine, "runs", lambda program: {})
    assert np.array_equal(at_once, result())


@pytest.mark.parametrize("at_once", [True, False])
def test_a_load_beyond_a_tensor_is_named(at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not at_once:
        monkeypatch.setattr(machine, "runs", lambda program: {})
    with pytest.raises(IndexError, match=rf"^{THREADS} threads reach beyond .*%r14, .%rd1 . {16 * THREADS}.$"):
        run(f"{REGISTERS} {LOADS} st.global.b32 [%rd2], %r10;", ints(np.arange(4 * THREADS)), ints(np.arange(THREADS)))
