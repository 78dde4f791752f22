"""Rounding to bf16 and tf32 as integer arithmetic on fp32 bit patterns.

Why not `.to(tl.bfloat16)`: with fp fusion on, Triton up to 3.9 turns bf16(a * b) + c into one fused
multiply-add and the rounding is lost; and Triton's interpreter truncates every cast to bf16. Integer
arithmetic means the same on every backend, compiled or interpreted, so inside the kernels a value
is always fp32, rounded or not, and becomes bf16 only at a store or as the operand of a matmul.
"""

import triton
import triton.language as tl


@triton.jit
def widen(x):
    """fp32 of a bf16 tensor, exact for every bit pattern (subnormals and NaN payloads too); fp32 passes."""
    if x.dtype == tl.float32:
        return x
    else:  # not a plain return: Triton type-checks what follows a taken branch
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def narrow(x):
    """bf16 of an fp32 tensor that holds bf16 values already (see round_to); takes the upper 16 bits. bf16 passes."""
    if x.dtype == tl.bfloat16:
        return x
    else:
        return (x.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def round_to(x, STORAGE: tl.constexpr):
    """fp32 tensor x as that storage type holds it, still in fp32.

    STORAGE: `fp32` keeps x, `bf16-rne` rounds to nearest with ties to even, `bf16-rtz` truncates.
    NaN stays NaN (made quiet, so that no payload is lost to the truncated bits), overflow goes to infinity
    under `bf16-rne` and to the largest finite value under `bf16-rtz`.
    """
    if STORAGE == "fp32":
        return x
    bits = x.to(tl.uint32, bitcast=True)
    if STORAGE == "bf16-rne":
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    else:
        rounded = bits
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    rounded = tl.where(is_nan, bits | 0x00400000, rounded)
    return (rounded & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def truncate_tf32(x):
    """fp32 tensor x with its mantissa cut to tf32's 10 bits; NaN made quiet first, so that it stays NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return (tl.where(is_nan, bits | 0x00400000, bits) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def applied_weight(w, WEIGHT_OFFSET: tl.constexpr):
    """The factor a stored norm weight stands for, in fp32: w, or 1 + w formed in fp32 or rounded to bf16."""
    if WEIGHT_OFFSET == "none":
        return widen(w)
    return round_to(1.0 + widen(w), WEIGHT_OFFSET)
