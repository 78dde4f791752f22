"""Floors of the chain with weights of fewer bits, against figures worked out by hand."""

import gguf
import pytest

from castpoint.harness.problems.geometry import GEOMETRIES
from castpoint.harness.report.four_bit_arithmetic import BITS, CARDS, MODELS, floor_of, table, weight_bytes, words
from castpoint.kernels.quantised import BLOCK, BLOCK_BYTES

SIZES = gguf.constants.GGML_QUANT_SIZES


def test_bits_are_those_of_the_blocks_that_are_read():
    for name, kind in (("q4_0", gguf.GGMLQuantizationType.Q4_0), ("q8_0", gguf.GGMLQuantizationType.Q8_0)):
        assert SIZES[kind] == (BLOCK, BLOCK_BYTES[name]) and BITS[name] == 8 * BLOCK_BYTES[name] / BLOCK


def test_bytes_by_hand():
    """Qwen3-0.6B: 4,096 rows of 1,024. Qwen2.5-7B: 4,608 rows of 3,584, with a bias and no head norm."""
    g = GEOMETRIES["qwen3-0.6b"]
    assert [weight_bytes(g, weights) for weights in BITS] == [8_388_608, 4_456_448, 2_359_296]
    small = 2 * (1024 + 1024 + 2 * 128 + 4096)  # x, w_in, both head weights; q, k and v
    assert floor_of("qwen3-0.6b", "q4_0", "H200").bytes == 2_359_296 + small
    assert floor_of("qwen2.5-7b", "q4_0", "H100").bytes == 4608 * 3584 * 18 // 32 + 2 * (2 * 3584 + 2 * 4608)


def test_floors_by_hand():
    floor = floor_of("qwen3-8b", "q4_0", "H100")  # 6,144 rows of 4,096: 14.16 MB and 29 KB
    assert floor.seconds == pytest.approx((6144 * 4096 * 18 / 32 + 2 * (2 * 4096 + 256 + 6144)) / 3.352e12)
    assert floor.tokens_per_s == pytest.approx(1 / (36 * floor.seconds))
    for model in MODELS:
        for card in CARDS:
            gain = floor_of(model, "bf16", card).seconds / floor_of(model, "q4_0", card).seconds
            assert 3.4 < gain < 16 / 4.5


def test_the_table_has_each_model_and_format_and_says_what_it_is():
    rows = table().splitlines()
    assert len(rows) == 2 + len(MODELS) * len(BITS) and len({row.count("|") for row in rows}) == 1
    assert words().startswith("Arithmetic, not measured")
