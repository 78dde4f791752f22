"""Every way to cut a launch, small."""

from __future__ import annotations

from castpoint.kernels.config import Config, unsupported
from castpoint.variants.catalogue import PLANS

# 72 channels are five steps of 16, the last half empty, and two blocks hold 17 tokens.
TINY = {"tokens": 17, "hidden_size": 72, "num_q_heads": 1, "num_kv_heads": 1, "head_dim": 16}
CONFIGS = {
    "fused, small tiles": Config("fused", "none", 16, 32),
    "fused after rstd": Config("fused", "rstd", 16, 32),
    "fused after hidden": Config("fused", "hidden", 32, 64),
    "split-k": Config("split-k", "none", 16, 16, splits=3),  # shares of 2, 2 and 1 steps
    "split-k after rstd": Config("split-k", "rstd", 16, 16, splits=7),  # more shares than steps
    "split-k after hidden": Config("split-k", "hidden", 16, 32, splits=2),
    "separate": Config("separate"),
}


def expressible(plans: tuple[str, ...] = tuple(PLANS)) -> list[tuple[str, str]]:
    """(plan, config) of those that go together."""
    return [(p, c) for p in plans for c in CONFIGS if not unsupported(CONFIGS[c], PLANS[p].plan)]
