"""What a K norm makes of a difference that arrives at it, in NumPy. It imports nothing of the lab."""

import numpy as np
from plain_chain import PLANS, chain, relative_rms


def through(k, given):
    """k [T, H, Dh] behind the K norm, in float64, and the factors that the norm applies."""
    factor = given["k_norm_weight"] + (1 if given["weight_offset"] else 0)
    return factor * k / np.sqrt(np.mean(k * k, -1, keepdims=True) + given["eps"]), factor


def amplified(given):
    """Of a layer: K by PyTorch's casts and by a cast behind a tf32 matmul, before the norm and behind it."""
    ks = [chain(given, PLANS[plan])["k_proj"] for plan in ("hf", "cast-after-matmul")]
    (first, factor), (second, _) = (through(k, given) for k in ks)
    before, behind = np.abs(ks[1] - ks[0]), np.abs(second - first)
    share = np.where(behind == 0, 0, behind / np.abs(first))
    return {
        "largest K-norm weight": np.abs(factor).max(),
        "largest difference before the norm": before.max(),
        "largest difference behind the norm": behind.max(),
        "times": behind.max() / before.max(),
        "relative error, times": relative_rms(second, first) / relative_rms(ks[1], ks[0]),
        "relative difference of one value, median": np.sort(share, axis=None)[(share.size - 1) // 2],
    }
