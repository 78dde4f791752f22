"""Instructions executed many at once leave what they leave one after the other."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from ptx_support import THREADS, ints, kernel, run, words

from castpoint.harness.ptx import machine
from castpoint.harness.ptx import products as products_module
from castpoint.harness.ptx.numbers import Unsupported, fma
from castpoint.harness.ptx.products import summed
from castpoint.harness.ptx.program import parse
from castpoint.harness.ptx.runs import Products, runs

LOADS = "".join(f"ld.global.b32 %r{n}, [%rd1 + {4 * THREADS * (n - 10)}];" for n in range(10, 20))
STORES = "".join(f"st.global.b32 [%rd2 + {4 * THREADS * (n - 10)}], %r{n};" for n in range(10, 30))
REGISTERS = ".reg .b32 %r<40>; .reg .f32 %a<100>;"


def products(rng: np.random.Generator, count: int) -> str:
    """So many of registers 10 to 29."""
    lines = []
    for _ in range(count):
        lines.append("fma.rn.f32 %r{}, %r{}, %r{}, %r{};".format(rng.integers(10, 30), *rng.integers(10, 30, 3)))
    return "\n".join(lines)


def sums(rng: np.random.Generator, count: int) -> str:
    """So many products, added to ten sums in any order; seldom to one already left, or times one, as no matrix has."""
    at = [f"%r{n}" for n in range(10, 20)]
    lines = []
    for n in range(count):
        which, a, b = rng.integers(0, 10, 3)
        last = rng.random() < 0.1
        target = f"%r{20 + which}" if last else f"%a{n}"
        factor = at[a] if rng.random() < 0.01 else f"%r{10 + a}"
        start = at[b] if rng.random() < 0.01 else at[which]
        lines.append(f"fma.rn.f32 {target}, {factor}, %r{10 + b}, {start};")
        at[which] = f"%r{10 + which}" if last else target
    return "\n".join(lines)


def stored(body: str, values: np.ndarray) -> np.ndarray:
    out = torch.zeros(20 * THREADS, dtype=torch.int32)
    start = "".join(f"mov.b32 %r{n}, 0f3F800000;" for n in range(20, 30))
    run(f"{REGISTERS} {LOADS} {start} {body} {STORES}", ints(values.view(np.uint32)), out)
    return words(out)


BODIES = {
    "sums of products": lambda rng: sums(rng, 40),
    "few sums": lambda rng: sums(rng, 4),
    "registers read, then written, twice": lambda rng: products(rng, 60),
    "a label inside": lambda rng: (
        f"""
        {products(rng, 9)} setp.lt.u32 %p1, %r1, 9; @%p1 bra $L__in; {products(rng, 6)}
    $L__in:
        {products(rng, 9)}"""
    ),
    "guards": lambda rng: f"setp.lt.u32 %p1, %r1, 9; {sums(rng, 9)} @%p1 {products(rng, 9)}",
    "by a part of the threads": lambda rng: (
        f"""
        setp.lt.u32 %p1, %r1, 9; @%p1 bra $L__end; {sums(rng, 9)}
    $L__end:
        mov.b32 %r10, %r10;"""
    ),
    "numbers": lambda rng: "".join(f"fma.rn.f32 %r{n}, %r{n - 9}, 0f40490FDB, 0fBF800001;" for n in range(20, 28)),
}


@pytest.mark.parametrize("together", [machine.TOGETHER, 48])
@pytest.mark.parametrize("name", BODIES)
def test_products_at_once_are_products_one_by_one(name: str, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all threads, or of 24 and what is left, as in a launch of many."""
    monkeypatch.setattr(machine, "TOGETHER", together)
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
    """An accumulator of 16 elements and 8 steps, but for its last element, which has seven."""
    apart = "".join(
        f"fma.rn.f32 %a{s + 1}_{n}, %r{10 + n}, %r{s}, %a{s}_{n};"
        for n in reversed(range(16))
        for s in range(8 - n // 15)
    )
    names = ", ".join(f"%a{s}_{n}" for s in range(9) for n in range(16))
    start = f"{REGISTERS} .reg .f32 {names};"
    (found,) = runs(parse(kernel(f"{start} {apart}"))).values()
    assert found.counts == (16,) * 7 + (15,)
    assert found.starts == tuple(f"%a0_{n}" for n in (*range(14, -1, -1), 15))
    assert found.targets == tuple(f"%a{8 - n // 15}_{n}" for n in (*range(14, -1, -1), 15))
    assert [found.factors[n] for n in found.places[-1]] == ["%r10", "%r7"]
    assert found.factors[: found.first] == tuple(f"%r{n}" for n in reversed(range(10, 26)))
    for left in ("mov.b32 %r1, %a3_2;", "@%a3_2 bra $L__end; $L__end:", "st.global.b32 [%rd1], {%r1, %a3_2};"):
        assert not runs(parse(kernel(f"{start} {apart} {left}"))), left  # what a sum was on its way is read
    for other in ("fma.rn.f32 %r30, %a8_0, %r1, %r2;", "fma.rn.f32 %r30, %r1, %a8_0, %r2;"):
        assert not runs(parse(kernel(f"{start} {apart} {other}"))), other  # a sum is a factor
    assert not runs(parse(kernel(f"{start} {apart} fma.rn.f32 %r30, %r1, %r2, %a3_0;")))  # two go on from one
    both = f"{apart} fma.rn.f32 %r30, %r1, %r2, %a8_0; fma.rn.f32 %r31, %r1, %r2, %a8_0;"
    assert not runs(parse(kernel(f"{start} {both}")))  # ... from its end


@pytest.mark.parametrize("scale", [1.0, 2.0**-40, 2.0**-59, 2.0**-62, 2.0**-75])
@pytest.mark.parametrize("bits", [3, 13, 24])
def test_sums_are_rounded_once_a_product(scale: float, bits: int) -> None:
    """Products of 13 bits and 13 have 25 or 26, often a tie of float32, to which a start of no size tells the way."""
    rng = np.random.default_rng(bits)
    drawn = rng.integers(1 - (1 << bits), 1 << bits, (9, 997)) * 2.0 ** (1 - bits) * scale
    tiny = rng.standard_normal((7, 997)) * np.float32(max(2.0**-70 * scale, 2.0**-148))
    starts, factors = tiny.astype(np.float32), drawn.astype(np.float32)
    products = drawn_products(rng)
    assert np.array_equal(summed(products, starts, factors), one_by_one(products, starts, factors))


def drawn_products(rng: np.random.Generator) -> Products:
    """Of 4 first factors by 5 second ones, added to 7 sums; to 5 of them three, and to one of them four."""
    counts = (7, 7, 5, 1)
    places = np.stack([rng.integers(0, 4, sum(counts)), rng.integers(4, 9, sum(counts))], axis=1)
    return Products(starts=(), targets=(), factors=(), first=4, places=places, counts=counts, end=0)


def one_by_one(products: Products, starts: np.ndarray, factors: np.ndarray) -> np.ndarray:
    found, rows = starts.copy(), [row for count in products.counts for row in range(count)]
    for row, (a, b) in zip(rows, products.places, strict=True):
        found[row] = fma(factors[a], factors[b], found[row]).astype(np.float32)
    return found


@pytest.mark.parametrize("at_once", [1 << 18, 27 * 50, 26])
@pytest.mark.parametrize("scale", [1.0, 2.0**-70, 2.0**-120])
def test_threads_of_which_all_products_are_zero(scale: float, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside others, or alone, with room for all, for 50, or for none: a zero of either sign by what is finite leaves a
    sum as it is, unless it is -0."""
    monkeypatch.setattr(products_module.ROOM, "rows", np.empty((2, at_once)))
    rng = np.random.default_rng(5)
    starts, factors = ((rng.standard_normal((count, 400)) * scale).astype(np.float32) for count in (7, 9))
    factors[4:] /= np.float32(scale)
    factors[:4, 100:200], factors[4:, 200:300] = -0.0, 0.0
    factors[:, 300:350] = 0.0
    odd = np.array([-0.0, np.nan, np.inf, -np.inf], np.float32)
    starts[:, ::7] = rng.choice(odd, 58)
    factors[rng.integers(0, 9, 80), np.arange(0, 400, 5)] = rng.choice(odd, 80)
    products = drawn_products(rng)
    with np.errstate(invalid="ignore"):
        for threads in (slice(0, 400), slice(301, 307)):
            given = starts[:, threads].copy(), factors[:, threads].copy()
            found, right = summed(products, *given), one_by_one(products, *given)
            assert np.array_equal(found, right, equal_nan=True)
            assert np.array_equal(np.signbit(found)[found == 0], np.signbit(right)[found == 0])


def test_threads_of_python_do_not_share_their_room() -> None:
    rng = np.random.default_rng(7)
    products = drawn_products(rng)
    given = [[rng.standard_normal((count, 4000)).astype(np.float32) for count in (7, 9)] for _ in range(40)]
    right = [summed(products, *each) for each in given]
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda each: summed(products, *each), given)]
    assert all(map(np.array_equal, found, right))


def test_small_factors_of_which_float64_loses_a_bit() -> None:
    """Of 2^-70 each: the sum is below a tie of float32's subnormals by less than float64 holds."""
    one, modulus = 1 << 23, 1 << 37  # of a factor; of the product, of which 2^-149 is that much
    found = [
        (i, j)
        for i in range(1, 4000, 2)
        for inverse in [pow(one + i, -1, modulus)]
        for left in range(1, 64)
        if (j := (modulus // 2 - left) * inverse % modulus - one) in range(one)
    ]
    assert found
    factors = np.ldexp(one + np.repeat(np.array(found).T, 2, axis=1), -93).astype(np.float32)
    starts = (2.0**-127 + np.tile([0.0, 2.0**-149], len(found)))[None].astype(np.float32)
    products = Products((), (), (), first=1, places=np.array([[0, 1]]), counts=(1,), end=0)
    right = np.ldexp(
        [
            (int(start * 2.0**149) << 37) + int(a) * int(b) >> 37
            for start, a, b in zip(
                starts[0].astype(float),
                np.ldexp(factors[0].astype(float), 93),
                np.ldexp(factors[1].astype(float), 93),
                strict=True,
            )
        ],
        -149,
    )
    assert np.array_equal(summed(products, starts, factors)[0], right)


def test_what_float64_holds_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of whole numbers below 2^28 in the middle between two float32, most of them of several products."""
    rng = np.random.default_rng(6)
    starts, factors = (rng.integers(0, 1 << 13, (count, 997)).astype(np.float32) for count in (7, 9))
    products = drawn_products(rng)
    right = one_by_one(products, starts, factors)
    monkeypatch.setattr(products_module, "_rounded_once", lambda *of: pytest.fail("computed again"))
    assert np.array_equal(summed(products, starts, factors), right)


def test_a_sum_below_normal_numbers_is_rounded_once() -> None:
    """float64 takes the first for a tie of float32's subnormals, and goes up to the even one; one element of many."""
    factors = np.ones((2, 9), np.float32)
    factors[:, 3] = 2.0**-75 * (1 + 2.0**-23), 2.0**-75 * (1 - 2.0**-23)
    start = np.float32(2.0**-127 + 2.0**-149)
    products = Products((), (), (), first=1, places=np.array([[0, 1]]), counts=(1,), end=0)
    found = summed(products, np.full((1, 9), start), factors)
    assert found[0].tolist() == [1.0] * 3 + [start] + [1.0] * 5


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
    with pytest.raises(IndexError, match=rf"^\d+ threads reach beyond .*%r14, .%rd1 . {16 * THREADS}.$"):
        run(f"{REGISTERS} {LOADS} st.global.b32 [%rd2], %r10;", ints(np.arange(4 * THREADS)), ints(np.arange(THREADS)))


@pytest.mark.parametrize("base, offsets, aligned", [(0, 0, True), (-2, 2, True), (2, 0, False), (0, 2, False)])
def test_loads_at_once_that_are_not_aligned_are_refused(base: int, offsets: int, aligned: bool) -> None:
    loads = "".join(f"ld.global.b32 %r{n}, [%rd3 + {4 * n + offsets}];" for n in range(10, 20))
    with contextlib.nullcontext() if aligned else pytest.raises(IndexError, match="no multiple of 4"):
        run(f"{REGISTERS} add.s64 %rd3, %rd1, {base}; {loads}", ints(np.arange(9 * THREADS)))


def test_of_loads_at_once_one_alone_is_not_aligned() -> None:
    loads = "".join(f"ld.global.b32 %r{n}, [%rd1 + {4 * n + 2 * (n == 17)}];" for n in range(10, 20))
    with pytest.raises(IndexError, match="no multiple of 4.*%r17"):
        run(f"{REGISTERS} {loads}", ints(np.arange(9 * THREADS)))


@pytest.mark.parametrize("load", ["ld.global.b32 %r10, [%rd1];", "ld.global.v2.b32 {%r10, %r11}, [%rd3];"])
def test_a_load_by_some_threads_leaves_the_others_what_they_had(load: str) -> None:
    out = torch.zeros(THREADS, dtype=torch.int32)
    start = "mul.wide.u32 %rd4, %r1, 4; add.s64 %rd3, %rd1, %rd4; mov.b32 %r10, %r1; mov.b32 %r11, %r1;"
    body = f"{start} setp.lt.u32 %p1, %r1, 9; @%p1 {load} st.global.b32 [%rd2], %r10;"
    run(f"{REGISTERS} {body}", ints(np.full(3 * THREADS, 77)), out)
    assert words(out).tolist() == [77] * 9 + list(range(9, THREADS))


@pytest.mark.parametrize("register", ["%r11", "%r15"])
def test_a_product_of_what_some_threads_never_wrote_is_refused(register: str) -> None:
    """Seven products of all threads: of a factor, or from a start, that only some wrote."""
    written = "".join(f"mov.b32 %r{n}, %r1;" for n in range(10, 30) if f"%r{n}" != register)
    many = "".join(f"fma.rn.f32 %r{n}, %r11, %r12, %r{n - 10};" for n in range(23, 30))
    body = f"{written} setp.lt.u32 %p1, %r1, 9; @%p1 mov.b32 {register}, %r1; {many}"
    with pytest.raises(Unsupported, match=f"{register}, read before it is written"):
        run(f"{REGISTERS} {body} st.global.b32 [%rd1], %r25;", ints(np.zeros(THREADS)))


MMA = {"bf16": "m16n8k16.row.col.f32.bf16.bf16.f32", "tf32": "m16n8k8.row.col.f32.tf32.tf32.f32"}


@pytest.mark.parametrize("kind", MMA)
@pytest.mark.parametrize("together", [machine.TOGETHER, 2 * THREADS])
def test_matrices_at_once_are_matrices_one_by_one(kind: str, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four accumulators in turn, seldom written elsewhere than where they were, or read as a factor."""
    monkeypatch.setattr(machine, "TOGETHER", together)
    found = 0
    for seed in range(20):
        rng, lines = np.random.default_rng(seed), []
        for n in range(40):
            a, b = 10 + rng.permutation(4), 10 + rng.permutation(4)[:2]
            c, d = (14 + 4 * ((n + (rng.random() < part)) % 4) + np.arange(4) for part in (0, 0.1))
            a[0] = 14 + 4 * rng.integers(4) if rng.random() < 0.05 else a[0]
            lists = (f"{{{', '.join(f'%r{register}' for register in each)}}}" for each in (d, a, b, c))
            lines.append(f"mma.sync.aligned.{MMA[kind]} {', '.join(lists)};")
            lines += ["mov.b32 %r10, %r20;"] if n == 21 else []
        values = np.random.default_rng(seed).standard_normal(10 * THREADS).astype(np.float32)
        body = "\n".join(lines)
        found += len(runs(parse(kernel(f"{REGISTERS} {body}", 2))))
        monkeypatch.setattr(machine, "runs", runs)
        at_once = stored(body, values)
        monkeypatch.setattr(machine, "runs", lambda program: {})
        assert np.array_equal(at_once, stored(body, values)), seed
    assert found > 5
