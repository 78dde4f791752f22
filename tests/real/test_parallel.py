"""Qwen2.5-Coder 0.5B over four processes, its query heads 4, 3, 4 and 3: bits with the tree, 1e-3 without; its GGUF."""

from pathlib import Path

import pytest
import torch

from castpoint.harness.model.fetch import KNOWN, fetch
from castpoint.harness.report import parallel as report
from castpoint.harness.runs.frames import load_table
from castpoint.harness.runs.records import Records
from castpoint.harness.systems.parallel import study
from castpoint.harness.systems.shards import part_of
from castpoint.harness.systems.weights import opened

MODEL = "qwen2.5-coder-0.5b-instruct"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    records = Records(folder, {}, {})
    study(records, str(fetch(MODEL)), (1, 4), ["fp32"], ["fp32", "tree"], 8, 2)
    records.finish()
    assert report.page(folder).startswith("# Tensor parallel\n") and (folder / "plots" / "parallel.png").exists()
    return load_table(folder, records.run_id, "parallel")


def test_four_processes_equal_one_in_every_bit_with_the_tree(rows):
    tree = rows[(rows["reduce"] == "tree") & (rows["reference"] == "one process")]
    assert set(tree["stage"]) == {"k", "hidden", "logits", "copies of k"} and set(tree["ranks"]) == {1, 4}
    assert (tree["share_equal"] == 1).all() and len(tree) == 2 * (2 * 24 + 2) + 1


def test_fp32_stays_within_a_thousandth(rows):
    logits = rows[(rows["stage"] == "logits") & (rows["ranks"] == 4)]
    assert len(logits) == 8 and (logits["max_abs"] < 1e-3).all() and (logits["first_equal"] == 1).all()
    others = logits[(logits["reduce"] == "fp32") & (logits["reference"] == "one process")]
    assert (others["share_equal"] < 1).all()  # what the tree is for


def test_blocks_of_the_gguf_file_are_read_in_part():
    """Of a layer in Q4_K_M's mixture of types, against each tensor whole."""
    weights = opened(str(Path(fetch(MODEL)) / KNOWN[MODEL].file))
    wide = part_of(weights.config, 1, 4)
    assert (wide.q, wide.kv, wide.inner) == (range(4, 7), range(1), range(1216, 2432))
    for name, rows, columns in (
        ("self_attn.o_proj", slice(None), slice(256, 448)),
        ("mlp.down_proj", slice(None), slice(1216, 2432)),
        ("mlp.gate_proj", slice(1216, 2432), slice(None)),
    ):
        whole = weights.read(f"model.layers.3.{name}.weight")
        assert torch.equal(weights.part(f"model.layers.3.{name}.weight", rows, columns), whole[rows, columns])
