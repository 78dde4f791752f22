"""Why JAX and PyTorch differ at a stage: their functions on all inputs, sums without an order, runs and threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import torch
from jax import Array, lax
from torch import Tensor

from castpoint.harness.runs.schema import JaxPartRow
from castpoint.harness.systems import jax_port as port
from castpoint.harness.systems.jax import JIT, OP_BY_OP, Tally, fresh

MANTISSAS = "every mantissa, two exponents"
# fp32 function -> PyTorch's, JAX's
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Array], Array]]] = {
    "rsqrt": (torch.rsqrt, lax.rsqrt),
    "power": (lambda v: v**-0.5, lambda v: v**-0.5),
    "1/sqrt": (lambda v: 1 / v.sqrt(), lambda v: 1 / jnp.sqrt(v)),
    "exp": (torch.exp, jnp.exp),
    "tanh": (torch.tanh, jnp.tanh),
    "cos": (torch.cos, jnp.cos),
    "sin": (torch.sin, jnp.sin),
    "silu": (torch.nn.functional.silu, jax.nn.silu),
}
PAIRS = (  # of one library: written in two ways
    ("rsqrt", "power"),
    ("rsqrt", "1/sqrt"),
    ("power", "1/sqrt"),
)


def mantissas(bits: int = 23) -> Iterator[Tensor]:
    """Every fp32 in [1, 4) whose mantissa has that many bits, in chunks: rsqrt(4^k x) is rsqrt(x) / 2^k, exactly, for a
    function that only sees mantissa and parity of the exponent, of which commutes() asks each."""
    step = 1 << (23 - bits)
    for start in range(0x3F800000, 0x40800000, 1 << 20):
        yield torch.arange(start, start + (1 << 20), step, dtype=torch.int32).view(torch.float32)


def span(low: float, high: float, count: int) -> Tensor:
    """[count] fp32, evenly."""
    return torch.linspace(low, high, count, dtype=torch.float64).float()


def of_function(name: str, x: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """JAX's and PyTorch's values."""
    theirs, ours = FUNCTIONS[name]
    return port.tensor((jax.jit(ours) if how == JIT else ours)(port.array(x))), theirs(x)


def row(part: str, how: str, inputs: str, says: str, pairs: Iterator[tuple[Tensor, Tensor]]) -> JaxPartRow:
    tally: Tally | None = None
    for actual, expected in pairs:
        tally = tally or Tally(8 if expected.dtype == torch.bfloat16 else 24)
        tally.add(actual, expected)
    made = tally.columns()
    kept = {name: made[name] for name in ("elements", "share_equal", "max_ulp")}
    return JaxPartRow(part=part, how=how, inputs=inputs, says=says, **kept)


def commutes(name: str, how: str, bits: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The function at 4^k x times 2^k, beside that at x, of both libraries: equal for every mantissa, or the two
    exponents do not stand for all."""
    for x in mantissas(bits):
        base = of_function(name, x, how)
        for k in (-60, -10, 1, 60):
            for far, near in zip(of_function(name, x * 4.0**k, how), base, strict=True):
                yield far * 2.0**k, near


def correct(x: Tensor) -> Tensor:
    """1 / sqrt(x), rounded once but for ties of float64's value."""
    return x.double().rsqrt().float()


def roots(how: str, bits: int) -> Iterator[JaxPartRow]:
    inputs = MANTISSAS if bits == 23 else f"mantissas of {bits} bits, two exponents"
    for name in ("rsqrt", "power", "1/sqrt"):
        pairs = (of_function(name, x, how) for x in mantissas(bits))
        yield row(f"{name}: JAX, PyTorch", how, inputs, f"whether {name} is one function in both", pairs)
        few = min(bits, 16)
        yield row(f"{name}: scaled by 4^k, not", how, f"mantissas of {few} bits, k = -60, -10, 1, 60",
                  "whether two exponents stand for all", commutes(name, how, few))  # fmt: skip
    for place, library in enumerate(("JAX", "PyTorch")):
        for name in ("rsqrt", "power", "1/sqrt"):
            pairs = ((of_function(name, x, how)[place], correct(x)) for x in mantissas(bits))
            yield row(f"{library}: {name}, correctly rounded", how, inputs, "which of two is nearer", pairs)
        for one, other in PAIRS:
            pairs = ((of_function(one, x, how)[place], of_function(other, x, how)[place]) for x in mantissas(bits))
            says = "whether two ways to write it are one"
            yield row(f"{library}: {one}, {other}", how, inputs, says, pairs)


def functions(how: str, count: int) -> Iterator[JaxPartRow]:
    for name, low, high, says in (
        ("exp", -32.0, 0.0, "softmax: its function, its sum left out"),
        ("silu", -16.0, 16.0, "Qwen's MLP: its function"),
        ("tanh", -4.0, 4.0, "Gemma's GELU: its function"),
        ("cos", 0.0, 64.0, "RoPE's angles: its function at equal phases"),
        ("sin", 0.0, 64.0, "the same"),
    ):
        inputs = f"{count:,} fp32 in [{low:g}, {high:g}]"
        yield row(f"{name}: JAX, PyTorch", how, inputs, says, iter([of_function(name, span(low, high, count), how)]))
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(torch.bfloat16)
    every = every[every.isfinite() & (every.float().abs() < 64)]
    jit = jax.jit if how == JIT else lambda function: function
    silu = jit(lambda v: jax.nn.silu(port.wide(v)).astype(v.dtype))
    yield row("silu, rounded once: JAX, PyTorch", how, "every bf16 below 64", "Qwen's MLP in bf16: its function",
              iter([(port.tensor(silu(port.array(every))), torch.nn.functional.silu(every))]))  # fmt: skip
    stepwise = jit(jax.nn.silu)
    yield row("silu, as jax.nn writes it: JAX, PyTorch", how, "every bf16 below 64", "what a port does without a cast",
              iter([(port.tensor(stepwise(port.array(every))), torch.nn.functional.silu(every))]))  # fmt: skip


def sums(how: str) -> Iterator[JaxPartRow]:
    """Matmuls and norms whose sums have no order, or were made by one library for both."""
    rng = torch.Generator().manual_seed(0)
    jit = jax.jit if how == JIT else lambda function: function
    for dtype, word in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        x, w = (torch.randint(-8, 9, shape, generator=rng).to(dtype) for shape in ((64, 896), (512, 896)))
        made = port.tensor(jit(port.linear)(port.array(x), port.array(w)))
        yield row(f"matmul of integers, {word}", how, "every partial sum exact in fp32",
                  "whether a matmul does anything but add in another order", iter([(made, x @ w.T)]))  # fmt: skip
    x, w = (torch.randn(shape, generator=rng) for shape in ((64, 896), (512, 896)))
    by_precision = {}
    for precision in ("default", "highest"):
        with jax.default_matmul_precision(precision):
            made = port.tensor(
                jit(lambda a, b: lax.dot_general(a, b, (((1,), (1,)), ((), ()))))(*map(port.array, (x, w)))
            )
        by_precision[precision] = made
    yield row("matmul, precision default and highest", how, "normal values, fp32", "whether JAX's precision matters",
              iter([(by_precision["highest"], by_precision["default"])]))  # fmt: skip
    mean = x.pow(2).mean(-1, keepdim=True)
    own = port.tensor(jit(lambda v: jnp.mean(jnp.square(v), -1, keepdims=True))(port.array(x)))
    yield row("mean of squares: JAX, PyTorch", how, "normal values, fp32", "the norm's sum", iter([(own, mean)]))
    rest = jit(lambda v, m: v * lax.rsqrt(m + 1e-6))
    yield row("norm behind PyTorch's mean: JAX, PyTorch", how, "normal values, fp32", "its root and products",
              iter([(port.tensor(rest(port.array(x), port.array(mean))), x * torch.rsqrt(mean + 1e-6))]))  # fmt: skip


def product() -> Tensor:
    """One matmul of fixed fp32 values in JAX, large enough to be shared among threads."""
    rng = torch.Generator().manual_seed(0)
    x, w = (port.array(torch.randn(shape, generator=rng)) for shape in ((256, 1024), (2048, 1024)))
    return port.tensor(port.linear(x, w))


def machine() -> Iterator[JaxPartRow]:
    """Runs and threads."""
    first = product()
    inputs = "256 x 1024 by 1024 x 2048, fp32"
    yield row("matmul, run again", OP_BY_OP, inputs, "whether runs differ", iter([(product(), first)]))
    alone = fresh("--xla_cpu_multi_thread_eigen=false", product)
    yield row("matmul, XLA's threads and one", OP_BY_OP, inputs, "whether threads differ", iter([(alone, first)]))


def part_rows(short: bool) -> list[JaxPartRow]:
    """Every part, op by op and compiled."""
    rows = [] if short else list(machine())
    for how in (OP_BY_OP, JIT):
        rows += [*roots(how, 16 if short else 23), *functions(how, 2**16 if short else 2**22), *sums(how)]
    return rows
