"""ggml's Q8_0 and Q4_0 from their published formats, in NumPy, and what a token of Qwen3-0.6B reads. It imports nothing
of the lab and nothing of gguf.

A block holds 32 weights of a row: an fp16 scale d, and 32 whole numbers q. Q8_0: d = largest |w| / 127, a weight is
d q, 34 bytes. Q4_0: d = (the weight of largest |w|, with its sign) / -8, a weight is d (q - 8), q in 0 to 15, 18 bytes.
"""

import numpy as np

BLOCK, BYTES = 32, {"Q8_0": 34, "Q4_0": 18, "bf16": 64}  # bytes of 32 weights


def quantised(weight, kind):
    """float64 of the weights that such blocks give back; weight [N, K], K a multiple of 32. Arithmetic is in fp32."""
    blocks = weight.astype(np.float32).reshape(-1, BLOCK)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[:, None], -1)  # with its sign, the first of equals
    d = np.abs(largest) / np.float32(127) if kind == "Q8_0" else largest / np.float32(-8)
    over = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)
    scaled = blocks * over
    if kind == "Q8_0":
        q = np.trunc(scaled + np.copysign(np.float32(0.5), scaled))  # halves away from zero
    else:
        q = np.clip(np.floor(scaled + np.float32(8.5)), 0, 15) - 8
    return (d.astype(np.float16).astype(np.float64) * q).reshape(weight.shape)


def bytes_a_token(kind):
    """Of every matrix that a token of Qwen3-0.6B multiplies, once: 28 layers and the head, which is the table."""
    hidden, inner, heads, kv_heads, size = 1024, 3072, 16, 8, 128
    layer = hidden * size * (heads + 2 * kv_heads) + heads * size * hidden + 3 * hidden * inner
    return (28 * layer + 151936 * hidden) * BYTES[kind] // BLOCK


def bandwidth(kind, tokens_a_second):
    """GB/s."""
    return bytes_a_token(kind) * tokens_a_second / 1e9
