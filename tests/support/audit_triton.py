"""Other people's kernels in small, in Triton, which the tests of the audit compile, and run."""

from __future__ import annotations

import triton
import triton.language as tl


def named(kernel: triton.JITFunction) -> str:
    """MODULE:FUNCTION, as audit_foreign takes it."""
    return f"{kernel.__module__}:{kernel.__name__}"


@triton.jit
def narrow(a_ptr, b_ptr, c_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    a, b, c = tl.load(a_ptr + offs), tl.load(b_ptr + offs), tl.load(c_ptr + offs)
    if OP == "add":
        r = a + b
    elif OP == "sub":
        r = a - b
    elif OP == "mul":
        r = a * b
    elif OP == "div":
        r = a / b
    elif OP == "mod":
        r = a % b
    elif OP == "max":
        r = tl.maximum(a, b)
    elif OP == "clamp":
        r = tl.clamp(a, b, c)
    elif OP == "muladd":
        r = a * b + c
    elif OP == "mulsub":
        r = a * b - c
    elif OP == "fma":
        r = tl.fma(a, b, c)
    elif OP == "sum":
        r = a + tl.sum(b)
    elif OP == "cumsum":
        r = tl.cumsum(a)
    elif OP == "wide":
        r = a.to(tl.float32) * b.to(tl.float32)
    elif OP == "explicit":
        r = (a.to(tl.float32) * b.to(tl.float32)).to(tl.bfloat16).to(tl.float32) + c.to(tl.float32)
    else:
        r = tl.where(a > b, -a, tl.abs(c))
    tl.store(out_ptr + offs, r.to(out_ptr.dtype.element_ty))


@triton.jit
def linear(a_ptr, b_ptr, bias_ptr, out_ptr, K, rest_ptr, ACT: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(0, K, BLOCK):
        a = tl.load(a_ptr + offs[:, None] * K + k + offs[None, :])
        b = tl.load(b_ptr + offs[None, :] * K + k + offs[:, None])
        acc = tl.dot(a, b.to(a.dtype), acc)
    y = acc + tl.load(bias_ptr + offs)[None, :]
    if ACT == "relu":
        y = tl.maximum(y, 0.0)
    elif ACT == "half":
        y = y * 0.5
    elif ACT == "silu":
        y = y * tl.sigmoid(y)
    elif ACT == "gelu":
        y = 0.5 * y * (1 + tl.erf(y * 0.7071))
    y = y.to(out_ptr.dtype.element_ty)
    if rest_ptr is not None:
        y = (y + tl.load(rest_ptr + offs[:, None] * BLOCK + offs[None, :])).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs[:, None] * BLOCK + offs[None, :], y)


@triton.jit
def norm(
    x_ptr, res_ptr, w_ptr, out_ptr, sum_ptr, eps, D, ADDS: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr
):
    """ROUNDS: letters of what is rounded to bf16: x the sum that is normed, n normed."""
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * D + offs, mask=offs < D, other=0.0).to(tl.float32)
    if ADDS:
        x += tl.load(res_ptr + row * D + offs, mask=offs < D, other=0.0).to(tl.float32)
        if ROUNDS == "x" or ROUNDS == "xn":
            x = x.to(tl.bfloat16).to(tl.float32)
        tl.store(sum_ptr + row * D + offs, x.to(tl.bfloat16), mask=offs < D)
    normed = x * tl.rsqrt(tl.sum(x * x) / D + eps)
    if ROUNDS == "n" or ROUNDS == "xn":
        normed = normed.to(tl.bfloat16).to(tl.float32)
    w = tl.load(w_ptr + offs, mask=offs < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * D + offs, (normed * w).to(tl.bfloat16), mask=offs < D)
