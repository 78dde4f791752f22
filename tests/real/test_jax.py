"""JAX beside PyTorch on Qwen2.5-Coder 0.5B: fp32 logits within a gate, bf16 stages equal but for ties."""

import torch

from castpoint.harness.model.fetch import had
from castpoint.harness.systems.claims_jax import lost
from castpoint.harness.systems.jax import ALONE, OP_BY_OP, WHOLE, read, tallies

SOURCE = "qwen2.5-coder-0.5b-instruct"


def test_stages_and_logits_of_the_real_model():
    """1e-3 at the logits in fp32: the gate of a public port (tunix); a fault of any stage makes more than that."""
    weights, passages = read(had(SOURCE), 1, 16)
    end = weights.config.num_layers
    whole = tallies(weights, torch.float32, OP_BY_OP, passages, ("logits",))[WHOLE, end, "logits"]
    assert 0 < whole.figures["max_abs"] < 1e-3
    found = tallies(weights.shortened(4), torch.bfloat16, OP_BY_OP, passages)
    for (reading, layer, stage), tally in found.items():
        if reading == ALONE and stage not in ("angles", "mlp"):
            assert tally.equal / tally.elements > 0.99, (layer, stage)


def test_what_the_chain_of_casts_loses():
    """A bf16 weight is changed by float16 only below its normal numbers or above 65504: none of those is large."""
    weights, _ = read(had(SOURCE), 1, 2)
    count, changed, gone, largest = lost(weights.shortened(1))
    assert count > 1e8 and gone <= changed < count and largest < 2**-24
