"""llama.cpp's weight types as functions of a matrix: what it becomes when it is stored in blocks and read again.

Q8_0 and Q4_0 are gguf's own codecs. gguf reads Q4_K and writes none, so it is encoded here and read by gguf: 256
weights with two fp16 factors, d and dmin; each 32 of them a scale and a minimum of 6 bits, w = d sc q - dmin m, q of 4
bits (ggml's block_q4_K). Scales are chosen by least squares over a few trials, as ggml's are, not by the same steps.
"""

from __future__ import annotations

import gguf
import numpy as np
import torch
from torch import Tensor

TYPES = {"Q8_0": 8.5, "Q4_K": 4.5, "Q4_0": 4.5}  # bits a weight, scales included
BLOCK = {"Q8_0": 32, "Q4_K": 256, "Q4_0": 32}
TRIALS = np.linspace(-1.0, 1.0, 21)  # of a block's scale, steps of the largest level


def through(kind: str, weight: Tensor) -> Tensor:
    """weight [rows, columns] or [columns], any float type, quantised to that type and read again, float32.

    Raises ValueError where the last dimension is no multiple of the block (llama.cpp stores another type there).
    """
    if weight.shape[-1] % BLOCK[kind]:
        raise ValueError(f"{weight.shape[-1]} columns are no multiple of {BLOCK[kind]}, the block of {kind}")
    values = weight.detach().float().cpu().numpy().reshape(-1, weight.shape[-1])
    qtype = gguf.GGMLQuantizationType[kind]
    blocks = q4_k(values) if kind == "Q4_K" else gguf.quantize(values, qtype)
    return torch.from_numpy(gguf.dequantize(blocks, qtype).copy()).view_as(weight)


def q4_k(values: np.ndarray) -> np.ndarray:
    """float32 [rows, columns] as blocks of Q4_K, uint8 [rows, columns / 256 * 144]."""
    rows = values.shape[0]
    parts = values.astype(np.float64).reshape(-1, 8, 32)
    scale, minimum = _fitted(parts)
    d, dmin = (np.float16(each.max(1) / 63).astype(np.float64) for each in (scale, minimum))
    steps = [_levels(each, one[:, None], 63) for each, one in ((scale, d), (minimum, dmin))]
    levels = _levels(parts + (dmin[:, None] * steps[1])[..., None], (d[:, None] * steps[0])[..., None], 15)
    nibbles = levels.reshape(-1, 4, 2, 32)
    packed = (nibbles[:, :, 0] | nibbles[:, :, 1] << 4).reshape(len(parts), 128)
    head = np.stack([d, dmin], 1).astype(np.float16).view(np.uint8)
    return np.concatenate([head, _six_bits(*steps), packed], 1).reshape(rows, -1)


def _fitted(parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and minimum (of -w, at least 0) of each 32 weights: for each trial scale the weights' levels, and for these
    levels the least squares; the best of all."""
    low = np.minimum(parts.min(-1), 0)
    span = parts.max(-1).clip(0) - low
    best, scale, minimum = np.full(span.shape, np.inf), span / 15, -low
    for trial in TRIALS:
        step = span / (15 + trial)
        q = _levels(parts - low[..., None], step[..., None], 15).astype(np.float64)
        mean_q, mean_w = q.mean(-1), parts.mean(-1)
        variance = (q * q).mean(-1) - mean_q**2
        slope = np.divide((q * parts).mean(-1) - mean_q * mean_w, variance, out=step.copy(), where=variance > 0)
        floor = np.minimum(mean_w - slope * mean_q, 0)
        error = ((slope[..., None] * q + floor[..., None] - parts) ** 2).sum(-1)
        better = (error < best) & (slope > 0)
        best = np.where(better, error, best)
        scale, minimum = np.where(better, slope, scale), np.where(better, -floor, minimum)
    return scale, minimum


def _levels(values: np.ndarray, step: np.ndarray, most: int) -> np.ndarray:
    """The nearest whole numbers of steps, 0 to most; 0 where the step is 0."""
    steps = np.divide(values, step, out=np.zeros_like(values), where=step > 0)
    return np.rint(steps).clip(0, most).astype(np.uint8)


def _six_bits(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Eight scales and eight minima of 6 bits in 12 bytes: four of each whole, two bits of the others above them."""
    first = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    second = minima[:, :4] | (minima[:, 4:] >> 4) << 6
    return np.concatenate([first, second, (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4], 1)
