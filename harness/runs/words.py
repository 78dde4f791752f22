"""Words of the records that who measures and who tells both know: the report reads them without loading torch."""

from __future__ import annotations

# The error budget: its measures, its players in the order of the chain, and what is listed beside them.
MEASURES = ("k_rel_ms", "logit_ms")
FP32, ORDER_OF_SUMS = "fp32 arithmetic", "order of sums"
ROPE_BOUNDARIES = ("unrotated", "cos_sin", "products")
PLAYERS = (
    *"x weight_offset statistics variance rstd normed hidden scale matmul proj head_rstd head_normed".split(),
    *ROPE_BOUNDARIES,
    "out",
)
ROTATED = ", rotated from position "  # in the words for a problem's weights
EXACT, DRAWN = "exact", "envelope"  # checks of kernels
BINS = [10 ** (i / 4) for i in range(-28, 5)]  # lower edges of |difference of log p|, nats; below the first: 0
