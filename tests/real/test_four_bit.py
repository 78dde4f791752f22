"""Weights of few bits on Gemma 3 270M, and our encoder of Q4_K against llama.cpp's own blocks."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pandas as pd
import pytest

from castpoint.harness.model.fetch import KNOWN, fetch
from castpoint.harness.report import four_bit as report
from castpoint.harness.runs.frames import load_table
from castpoint.harness.runs.records import Records
from castpoint.harness.systems.codecs import q4_k
from castpoint.harness.systems.four_bit import MODEL_PLANS, sweep
from castpoint.variants.catalogue import PLANS

NAME = "gemma-3-270m"


def test_what_llama_cpp_encoded_stays_what_it_is() -> None:
    """Read and encoded again, 99 % of its tools' blocks hold the same values; the rest, whose levels do not
    show their scale, come near."""
    reader = gguf.GGUFReader(Path(fetch(NAME)) / KNOWN[NAME].file)
    found = [tensor for tensor in reader.tensors if tensor.tensor_type == gguf.GGMLQuantizationType.Q4_K]
    for tensor in found[:4]:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        again = gguf.dequantize(q4_k(values), tensor.tensor_type)
        other = (again != values).reshape(-1, 256).any(1)
        assert other.mean() < 0.01 and np.linalg.norm(again - values) < 1e-3 * np.linalg.norm(values), tensor.name
    assert len(found) > 20


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, pd.DataFrame]:
    folder = tmp_path_factory.mktemp("four-bit")
    records = Records(folder, {}, {})
    sweep(records, "", short=True)
    records.finish()
    assert report.page(folder).startswith("# 4-bit weights") and (folder / "plots" / "four-bit.png").exists()
    return tuple(load_table(folder, records.run_id, table) for table in ("four_bit", "kl_statistics"))  # type: ignore


def test_four_bits_move_k_more_than_any_plan(made: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    k = made[0][made[0]["status"] == "ok"].set_index(["model", "layer", "arm"])["k_rel_rms"].unstack("arm")
    plans = k[[arm for arm in k if arm in PLANS]].max(axis=1)
    assert len(plans) == 3 and (k["Q4_0"] > 5 * plans).all() and (k["Q4_0"] > 10 * k["Q8_0"]).all()


def test_norm_weights_in_few_bits_cost_a_model_more_than_its_matrices(made: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    rows = made[1]
    kl = rows[rows["statistic"] == "Mean KLD"].set_index("arm")["value"]
    assert kl["Q8_0 of QKV and norms"] > 100 * kl["Q8_0 of QKV"]
    assert kl["Q4_0 of QKV and norms"] > 10 * kl["Q4_0 of QKV"] > 100 * kl[list(MODEL_PLANS)].max()
